# SPDX-License-Identifier: Apache-2.0
"""What was compiled."""

import warnings

import torch  # noqa: F401  loads the libraries that the extension is linked against

try:
    import slimstate._C as _C
except ModuleNotFoundError:
    DEVICES: frozenset[str] = frozenset()
except ImportError as error:
    warnings.warn(f"slimstate._C was built but does not load, PyTorch is used instead: {error}", stacklevel=2)
    DEVICES = frozenset()
else:
    DEVICES = frozenset(_C.DEVICES.split())

COMPILED: bool = bool(DEVICES)
