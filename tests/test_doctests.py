import doctest
import importlib
import pkgutil

import pytest

import slimstate

# Package by package, since they are folders of their own; `_C` is compiled, and has no source to look into.
PACKAGES = [slimstate, slimstate.optim, slimstate.projections]
MODULES = sorted(
    module.name
    for package in PACKAGES
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + ".")
    if module.name != "slimstate._C"
)


def test_all_modules_are_found():
    assert {"slimstate.ops", "slimstate.optim.galore", "slimstate.projections.svd"} <= set(MODULES)


@pytest.mark.parametrize("name", ["slimstate", *MODULES])
def test_examples_do_what_they_show(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not failed


def test_the_optimizers_have_examples():
    optim = importlib.import_module("slimstate.optim")
    finder = doctest.DocTestFinder(recurse=False)
    for name in set(optim.__all__) - {"InBackward", "ParamGroups", "UpdateSparsity", "state_bytes"}:
        assert any(test.examples for test in finder.find(getattr(optim, name))), name
