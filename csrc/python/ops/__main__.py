# SPDX-License-Identifier: Apache-2.0
"""Prints what is compiled; 1 if it disagrees with the reference anywhere, else 0."""

import torch

from . import directions, rounding, split
from ._compiled import DEVICES

MODULES = (rounding, directions, split)


def main() -> int:
    """Compares every op on every device that is here with its reference."""
    print(f"torch {torch.__version__}; compiled for: {', '.join(sorted(DEVICES)) or 'no device, PyTorch is used'}")
    failed = False
    for device in sorted(DEVICES):
        if device == "cuda" and not torch.cuda.is_available():
            print("  cuda: no GPU here, not compared")
            continue
        for sample in (sample for module in MODULES for sample in module.samples(device)):
            same = sample.agrees()
            failed |= not same
            print(f"  {device} {sample.op} {sample.what}: {'equals the reference' if same else 'DIFFERS'}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
