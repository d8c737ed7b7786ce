"""`pytest --contract-table FILE` writes docs/contract.md: checks by optimizers, from the tests that name their check.

    @pytest.mark.contract("closures run with gradients")

puts a test into the row of that name. Its columns are the optimizers that its parameters speak of, by a key of CASES or
the name of a class; where none does, the marker names them: `contract("closures run with gradients", "AdamW")`.
"""

import ast
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from cases import CASES
from slimstate import optim

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "contract.md"

OPTIMIZERS = sorted(
    name
    for name, kind in vars(optim).items()
    if name in optim.__all__ and isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
)

# row -> why there is nothing to check
NOT_APPLICABLE = {
    "sparse gradients": "`torch.optim.AdamW` takes none either.",
    "complex parameters": "Bases, norms of rows and low-precision states are those of real matrices; "
    "give the optimizer `torch.view_as_real` of the weight.",
    "`differentiable=True`": "A step is made of fused kernels that write in place, which autograd does not record.",
    "`foreach=True`": "Lists of tensors go through torch's fused kernel, which is faster and needs no temporaries.",
}

TEXT = """# The contract

What code written for `torch.optim` may rely on, optimizer by optimizer. A row is one check, made of one or several
tests; *yes* means that all of them pass for all variants of the class in `tests/optim/cases.py`, *n/a* is explained
below, *NO* is everything else. A new optimizer joins with a line in that file, a new check with a test that names its
row, `@pytest.mark.contract("...")`.

```sh
make test ARGS="-n 0 -m contract --contract-table=docs/contract.md"
```

wrote this page, with PyTorch {version}.

{table}

Not applicable, and refused by name:

{reasons}

`amsgrad=True`, `capturable=True` and `fused=False` are refused by name too: no running maximum is kept, the counter of
steps stays on the CPU, and torch's fused kernel is used wherever there is one.
"""


def declared_rows() -> set[str]:
    """The rows that tests name, read off their source: whichever of them run."""
    calls = (
        node
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) == "contract"
    )
    return {ast.literal_eval(call.args[0]) for call in calls}


def columns(item: pytest.Item, marker: pytest.Mark) -> set[str]:
    """The optimizers that a test is about.

    Raises:
        pytest.UsageError: if neither its parameters nor its marker name one, or the marker names something else.
    """
    named = set(marker.args[1:])
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    words = (CASES[value][0].__name__ if value in CASES else value for value in values if isinstance(value, str))
    found = named | (set(words) & set(OPTIMIZERS))
    if not found or not named <= set(OPTIMIZERS):
        raise pytest.UsageError(f"{item.nodeid}: which optimizer is it about? See contract_table.py")
    return found


class Table:
    """Takes down what becomes of the tests of each cell."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.cells: dict[str, list[tuple[str, str]]] = {}
        self.outcomes: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.rows: dict[str, None] = {}  # in the order in which they come

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for marker in item.iter_markers("contract"):
                row = marker.args[0]
                self.rows[row] = None
                cells = self.cells.setdefault(item.nodeid, [])
                cells.extend((row, column) for column in sorted(columns(item, marker)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or report.when == "call":
            for cell in self.cells.get(report.nodeid, ()):
                self.outcomes[cell].add(report.outcome)

    def pytest_sessionfinish(self) -> None:
        lines = [["check", *OPTIMIZERS], ["---"] * (1 + len(OPTIMIZERS))]
        for row in self.rows:
            passed = (self.outcomes[row, column] == {"passed"} for column in OPTIMIZERS)
            lines.append([row, *("yes" if x else "NO" for x in passed)])
        lines += ([row, *["n/a"] * len(OPTIMIZERS)] for row in NOT_APPLICABLE)
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        reasons = "\n".join(f"- {row}: {reason}" for row, reason in NOT_APPLICABLE.items())
        version = torch.__version__.split("+")[0]
        self.file.write_text(TEXT.format(version=version, table=table, reasons=reasons), encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--contract-table", metavar="FILE", type=Path, help="write the page of docs/contract.md there")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("--contract-table"):
        if config.getoption("numprocesses", None):
            raise pytest.UsageError("--contract-table needs the tests in one process: add -n 0")
        config.pluginmanager.register(Table(file))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("contract"):
            columns(item, marker)
