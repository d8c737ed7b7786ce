"""What a Monitor says of parameters that processes divide is what it says of whole ones."""

import pytest

import fully_sharded
from world import world

EXPERTS = {"experts": 3}
ALWAYS = [
    ("GaLoreAdamW, svd, rotate", fully_sharded.by_columns, None),
    ("FRUGAL, columns", fully_sharded.by_rows, None),
    ("GradNormLoRP, svd, rotate", fully_sharded.by_columns, None),
    ("GaLoreAdamW, svd, rotate", fully_sharded.experts_alone, EXPERTS),
]
SLOW = [
    ("AdamW", fully_sharded.by_rows, None),
    ("DCTAdamW, every third", fully_sharded.by_columns, None),
    *(
        (name, divide, sizes)
        for name in ("GaLoreAdamW, random, reset", "GaLoreAdafactor, beta1", "DCTAdamW, every step")
        for divide, sizes in (
            (fully_sharded.by_rows, None),
            (fully_sharded.tensor_parallel, None),
            (fully_sharded.experts_alone, EXPERTS),
        )
    ),
]
ROWS = ALWAYS + [pytest.param(*row, marks=pytest.mark.slow) for row in SLOW]


@pytest.mark.parametrize(("name", "divide", "sizes"), ROWS)
def test_a_monitor_reports_of_the_whole_in_every_process(name, divide, sizes):
    for ours, alone in world(2).run(fully_sharded.monitored, name, divide, sizes):
        assert [step for step, _ in ours] == [step for step, _ in alone] == [1, 2, 4]
        for (_, values), (_, expected) in zip(ours, alone, strict=True):
            assert values == pytest.approx(expected, rel=1e-5, abs=1e-6)
