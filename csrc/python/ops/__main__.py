# SPDX-License-Identifier: Apache-2.0
"""Prints what is compiled and where it runs, and compares it with the references: 1 if any differs, else 0."""

import torch

from ._compiled import DEVICES, TARGET
from ._samples import all_samples


def main() -> int:
    """Runs the samples of every compiled op on every device that is here."""
    print(f"torch {torch.__version__}; {TARGET}")
    failed = False
    for device in sorted(DEVICES):
        if device == "cuda" and not torch.cuda.is_available():
            print("  cuda: no GPU here, not compared")
            continue
        differs: dict[str, list[str]] = {}
        for sample in all_samples(device):
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"slimstate::{sample.op}", device.upper()):
                differs.setdefault(sample.op, []).extend([] if sample.agrees() else [sample.what])
        for op, where in differs.items():
            print(f"  {device} {op}: {'DIFFERS for ' + '; '.join(where) if where else 'equals the reference'}")
            failed |= bool(where)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
