"""Sphinx: `make docs`."""

import slimstate

project = "slimstate"
author = "The slimstate developers"
release = slimstate.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
html_theme = "furo"
exclude_patterns = ["_build"]
