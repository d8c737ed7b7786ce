# SPDX-License-Identifier: Apache-2.0
"""What was compiled."""

import warnings

import torch  # noqa: F401  loads the libraries that the extension is linked against

DEVICES: frozenset[str] = frozenset()
TARGET = "nothing is compiled, PyTorch is used"
try:
    import slimstate._C as _C
except ModuleNotFoundError:
    pass
except ImportError as error:
    warnings.warn(f"slimstate._C was built but does not load, PyTorch is used instead: {error}", stacklevel=2)
else:
    DEVICES = frozenset(_C.DEVICES.split())
    TARGET = f"compiled for {'this machine' if _C.NATIVE else 'any machine'}, kernels run as {_C.CPU_LEVEL} here"
    if "cuda" in DEVICES:
        names = [f"sm_{int(number) // 10}" for number in _C.CUDA_ARCHITECTURES.split(",")]
        TARGET += f"; for CUDA {', '.join(names)}"

COMPILED: bool = bool(DEVICES)

# On the meta device ops do nothing: a step there goes the way of a real one, see `slimstate.optim.memory`.
TAKEN = DEVICES | {"meta"} if COMPILED else DEVICES
