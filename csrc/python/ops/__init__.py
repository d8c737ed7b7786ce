# SPDX-License-Identifier: Apache-2.0
"""Element-wise kernels: the compiled ops where they were built, the same arithmetic in PyTorch everywhere.

An op ``name`` comes with ``name_reference``, which is its definition: it runs where nothing was compiled, and is what
each kernel is tested against. Where nothing was compiled no op is registered either: ``torch.compile`` then traces the
reference and fuses it, which an opaque op would prevent.

``python -m slimstate.ops`` prints what is compiled and compares it with the reference.
"""

from ._compiled import COMPILED, DEVICES
from .adamw import Dense, adamw_step_, takes_adamw
from .codes import decode, encode_
from .directions import adam_direction_reference_, adam_directions_
from .hadamard import (
    carry_,
    hadamard_adam_,
    hadamard_adam_reference_,
    hadamard_down,
    hadamard_down_reference,
    hadamard_scores,
    hadamard_scores_reference,
    hadamard_write_back_,
    hadamard_write_back_reference_,
)
from .keys import WHOLE, Key, PartKey, Place, counter_key
from .residual import (
    scaled_residual_,
    scaled_residual_reference_,
    sign_residual_,
    sign_residual_reference_,
)
from .rounding import stochastic_round_, stochastic_round_reference_
from .split import Split, SplitRule, split_, takes_split

__all__ = [
    "COMPILED",
    "DEVICES",
    "WHOLE",
    "Dense",
    "Key",
    "PartKey",
    "Place",
    "Split",
    "SplitRule",
    "adam_direction_reference_",
    "adam_directions_",
    "adamw_step_",
    "carry_",
    "counter_key",
    "decode",
    "encode_",
    "hadamard_adam_",
    "hadamard_adam_reference_",
    "hadamard_down",
    "hadamard_down_reference",
    "hadamard_scores",
    "hadamard_scores_reference",
    "hadamard_write_back_",
    "hadamard_write_back_reference_",
    "scaled_residual_",
    "scaled_residual_reference_",
    "sign_residual_",
    "sign_residual_reference_",
    "split_",
    "stochastic_round_",
    "stochastic_round_reference_",
    "takes_adamw",
    "takes_split",
]
