"""docs/contract.md shows what the tests check, and the table is made from what becomes of them."""

import pytest

from cases import CASES, FEW
from contract_table import NOT_APPLICABLE, OPTIMIZERS, PAGE, declared_rows

pytest_plugins = ["pytester"]


def rows_of(text):
    """row -> its cells"""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in lines}


def test_every_exported_optimizer_is_in_the_tables():
    assert len(OPTIMIZERS) > 1
    for names in (CASES, FEW):
        assert {CASES[name][0].__name__ for name in names} == set(OPTIMIZERS)


def test_the_page_lists_what_is_checked_for_every_optimizer():
    rows = rows_of(PAGE.read_text(encoding="utf-8"))
    assert rows.pop("check") == OPTIMIZERS
    assert set(rows.pop("---")) == {"---"}
    assert rows.keys() == declared_rows() | NOT_APPLICABLE.keys()
    for row, cells in rows.items():
        assert set(cells) == ({"n/a"} if row in NOT_APPLICABLE else {"yes"}), row


def test_a_cell_is_yes_only_where_all_of_its_tests_ran_and_passed(pytester):
    pytester.makepyfile("""
        import pytest

        contract = pytest.mark.contract
        every = pytest.mark.parametrize("name", ["AdamW", "AdamW, bfloat16 moments", "SGDP", "FRUGAL, columns"])

        @contract("one variant fails")
        @every
        def test_first(name):
            assert "bfloat16" not in name

        @contract("one of two tests is skipped")
        @every
        def test_second(name):
            pass

        @contract("one of two tests is skipped")
        @every
        def test_third(name):
            if name == "SGDP":
                pytest.skip("for some reason")

        @contract("named by the marker", "AdamW", "AdamP")
        def test_fourth():
            pass

        @pytest.fixture
        def broken():
            raise RuntimeError

        @contract("never runs", "AdamW")
        def test_fifth(broken):
            pass
    """)
    result = pytester.runpytest_inprocess(
        "-p", "contract_table", "--contract-table", "table.md", "-p", "no:cacheprovider"
    )
    result.assert_outcomes(passed=11, failed=1, skipped=1, errors=1)
    rows = rows_of((pytester.path / "table.md").read_text())
    assert {
        row: {name for name, cell in zip(OPTIMIZERS, cells, strict=True) if cell == "yes"}
        for row, cells in rows.items()
    } == {
        "check": set(),
        "---": set(),
        "one variant fails": {"SGDP", "FRUGAL"},
        "one of two tests is skipped": {"AdamW", "FRUGAL"},
        "named by the marker": {"AdamW", "AdamP"},
        "never runs": set(),
        **{key: set() for key in NOT_APPLICABLE},
    }


@pytest.mark.parametrize("arguments", ["'about what?'", "'a slip of the pen', 'AdamX'"])
def test_a_test_that_does_not_say_which_optimizer_it_is_about_is_refused(pytester, arguments):
    pytester.makepyfile(f"""
        import pytest

        @pytest.mark.contract({arguments})
        def test_something():
            pass
    """)
    result = pytester.runpytest_inprocess("-p", "contract_table", "-p", "no:cacheprovider")
    assert result.ret != 0
    assert "which optimizer is it about" in result.stderr.str() + result.stdout.str()
