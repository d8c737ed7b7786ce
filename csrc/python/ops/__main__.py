# SPDX-License-Identifier: Apache-2.0
"""Prints what is compiled; 1 if it disagrees with the reference anywhere, else 0."""

import torch

from . import hadamard, rounding
from ._compiled import DEVICES

CHECKED = (rounding, hadamard)


def main() -> int:
    """Compares every op on every device that is here with its reference."""
    print(f"torch {torch.__version__}; compiled for: {', '.join(sorted(DEVICES)) or 'no device, PyTorch is used'}")
    failed = False
    for device in sorted(DEVICES):
        if device == "cuda" and not torch.cuda.is_available():
            print("  cuda: no GPU here, not compared")
            continue
        for module in CHECKED:
            for what, same in module.check(device):
                failed |= not same
                print(f"  {device} {what}: {'equals the reference' if same else 'DIFFERS'}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
