"""The Python of the documentation does what it says.

Of every page, all blocks that begin with ```` ```python ```` are run from top to bottom as one program, in an empty
folder. Beside them a page may have, at the beginning of a line,

- ``<!-- run``, then lines of Python, then ``-->``: run in its place, and not shown. A model, a batch, an assertion.
- ``<!-- prints -->``, then a block ```` ```text ````: what the Python above it has printed since the last of these.
- ``<!-- not run: the reason -->``, then a block ```` ```python ````, which is only compiled.
"""

import pathlib
import re
import sys
import types

import pytest

from slimstate.optim import _moments

ROOT = pathlib.Path(__file__).parents[2]
BLOCKS = re.compile(
    r"^<!-- run\n(?P<hidden>.*?)^-->"
    r"|^<!-- prints -->\n```text\n(?P<printed>.*?)^```"
    r"|^<!-- not run: (?P<reason>[^\n]+) -->\n```python\n(?P<skipped>.*?)^```"
    r"|^```python\n(?P<shown>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
FENCES = re.compile(r"^[ \t]*[`~]{3,} *(python|py|pycon)\b|^[ \t]*<!-- *(run|prints|not run)\b", re.MULTILINE)
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]}
NOT_RUN = 2  # torchtitan, bitsandbytes

matches = {name: list(BLOCKS.finditer(path.read_text(encoding="utf-8"))) for name, path in PAGES.items()}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft and transformers
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.compile
@pytest.mark.parametrize("name", [name for name, found in matches.items() if found])
def test_the_blocks_of_a_page_run_from_top_to_bottom(name, tmp_path, monkeypatch, capsys):
    path = PAGES[name]
    page = types.ModuleType("page")  # a module, so that classes of the page can be pickled
    page.__file__ = str(path)
    monkeypatch.setitem(sys.modules, "page", page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_moments, "SMALLEST_CODED", 4096)  # which tests/optim/cases.py lowers
    for block in matches[name]:
        kind = block.lastgroup
        if kind == "printed":
            assert capsys.readouterr().out == block[kind]
            continue
        lines = block.string.count("\n", 0, block.start(kind))
        code = compile("\n" * lines + block[kind], str(path), "exec")  # a traceback names the line of the page
        if kind != "skipped":
            exec(code, vars(page))


@pytest.mark.parametrize("name", PAGES)
def test_no_block_escapes_the_test(name):
    text = PAGES[name].read_text(encoding="utf-8")
    inside = [block.span() for block in matches[name]]
    for fence in FENCES.finditer(text):
        line = text.count("\n", 0, fence.start()) + 1
        assert any(start <= fence.start() < end for start, end in inside), f"the block at line {line}"


def test_few_blocks_are_not_run():
    assert sum(block.lastgroup == "skipped" for found in matches.values() for block in found) <= NOT_RUN
