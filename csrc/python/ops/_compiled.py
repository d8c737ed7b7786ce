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
    TARGET = f"compiled for the CPU ({'this machine: ' if _C.NATIVE else 'any machine; here '}{_C.CPU_LEVEL})"
    if "cuda" in DEVICES:
        names = [f"sm_{int(number) // 10}" for number in _C.CUDA_ARCHITECTURES.split(",")]
        TARGET += f" and for CUDA ({', '.join(names)})"

COMPILED: bool = bool(DEVICES)
