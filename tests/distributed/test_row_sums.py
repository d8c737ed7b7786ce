import pytest
import torch

import sharded
from cases import CASES
from world import world

NAMES = [name for name in CASES if name.startswith(("AdamP", "SGDP", "GaLoreAdafactor"))]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows(name, dim, n, dtype):
    shapes = [x if len(x) < 4 or (n, dim) != (3, 1) else (6, 3, 3, 3) for x in sharded.SHAPES]
    x = max(world(n).run(sharded.equal_to_one_process, name, dim, dtype, 50, shapes))
    print(name, dim, n, dtype, x)
    assert x < (1e-9 if dtype == torch.float64 else 1e-5)
