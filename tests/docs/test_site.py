"""The site builds without a warning, offline, and has every public name."""

import inspect
import os
import pathlib
import re
import subprocess
import sys

import pytest
from sphinx.util.inventory import InventoryFile

from slimstate import ops, optim, projections

DOCS = pathlib.Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What `make docs` builds."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS), str(folder)]
    done = subprocess.run(build, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return folder


def members(cls: type) -> dict[str, set[str]]:
    """Its public methods and properties, but for those of torch and Python, and where they may be documented."""
    places: dict[str, set[str]] = {}
    for c in cls.__mro__:
        for name, x in vars(c).items() if c.__module__.startswith("slimstate") else ():
            if not name.startswith("_") and (callable(x) or isinstance(x, property | classmethod | staticmethod)):
                public = f"{cls.__module__.rsplit('.', 1)[0]}.{c.__name__}.{name}"
                places.setdefault(name, set()).update({public, f"{c.__module__}.{c.__name__}.{name}"})
    return places


@pytest.mark.parametrize("module", [optim, projections, ops], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference_and_has_a_docstring(module, site):
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    documented = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    for name in module.__all__:
        x = getattr(module, name)
        assert f"{module.__name__}.{name}" in documented, name
        if not callable(x):
            continue
        assert inspect.getdoc(x), name
        for member, places in members(x).items() if isinstance(x, type) else ():
            assert places & documented, f"{name}.{member}"
            assert inspect.getdoc(getattr(x, member)), f"{name}.{member}"


def test_pages_need_no_network(site):
    """Formulas, scripts, styles and figures are all in the folder; links to other sites are links alone."""
    loads = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//|<link\b[^>]*rel=\"stylesheet\"[^>]*\bhref=\"(?:https?:)?//"
    )
    for page in site.rglob("*.html"):
        assert not loads.search(page.read_text(encoding="utf-8")), page.name


def test_formulas_are_converted_whole(site):
    """What latex2mathml does not know it leaves in the text."""
    for page in site.rglob("*.html"):
        for formula in re.findall(r"<math\b.*?</math>", page.read_text(encoding="utf-8"), re.DOTALL):
            assert "\\" not in formula, f"{page.name}: {formula}"
