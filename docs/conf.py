"""Sphinx: `make docs`."""

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import slimstate

project = "slimstate"
author = "The slimstate developers"
release = slimstate.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_default_options = {"exclude-members": "axes, projections, shares, transports"}  # for those who write a method
autodoc_member_order = "bysource"
autosummary_generate = False
copybutton_prompt_text = ">>> "
default_role = "code"
html_theme = "furo"
html_title = f"slimstate {release}"
html_static_path = ["_static"]
html_css_files = ["slimstate.css"]
exclude_patterns = ["_build"]


def mathml(node: nodes.Element, display: str) -> str:
    r"""LaTeX as MathML, with three things that latex2mathml leaves: the space around `max`, norms that grow, `\_`."""
    formula = convert(node.astext(), display=display)
    formula = re.sub(r"<m[io]>([a-z]{2,})</m[io]>", r'<mo lspace="0.15em" rspace="0.1em">\1</mo>', formula)
    return formula.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>').replace(r"\_", "_")


def inline_math(translator: HTML5Translator, node: nodes.math) -> None:
    """`$...$`."""
    translator.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def display_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    """`$$...$$`, in a box that scrolls."""
    translator.body.append(f'<div class="math">{mathml(node, "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Formulas as MathML, which browsers show without a script, a font or the network."""
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))


html_math_renderer = "mathml"
