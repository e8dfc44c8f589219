# Two commands set everything up on a fresh machine: `make demo` and `make test`.
# Another Python beside it: `make test PYTHON=python3.13 VENV=.venv-3.13`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# pip compiles nothing here, so that imports must write bytecode even where the environment forbids it. Otherwise each of
# the many processes of a test would compile all that it imports.
export PYTHONDONTWRITEBYTECODE :=

# What may differ between versions of Python: every module is imported, every published YAML file loaded, scenes are
# rendered, files read, models built. A minute.
QUICK := tests/test_architecture.py tests/test_cli.py tests/test_published_configs.py tests/utils tests/data/test_options.py \
	tests/data/test_data_config.py tests/data/test_tar.py tests/train/test_config.py tests/models/test_registry.py \
	tests/demo/test_render.py tests/demo/test_simulator.py tests/demo/test_shipped.py tests/test_publishing.py

.PHONY: demo notebook test test-quick package test-package docs lint install

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile -e '.[demo,dev,docs]'
	touch $@

demo: install
	$(BIN)/python -m fourm demo

notebook: install
	for notebook in notebooks/*.ipynb; do OMP_NUM_THREADS=1 $(BIN)/python notebooks/execute.py --notebook $$notebook || exit; done

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-quick: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not dist" $(QUICK)

package: install
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# The wheel in a new environment. The tests come from the sdist, without its copy of the package.
PACKAGE_PYTHON ?= $(PYTHON)
PACKAGE_VENV ?= .venv-package

test-package:
	rm -rf dist build/package $(PACKAGE_VENV)
	$(PACKAGE_PYTHON) -m venv $(PACKAGE_VENV)
	$(PACKAGE_VENV)/bin/pip install --quiet --no-compile build 'setuptools>=77'
	$(PACKAGE_VENV)/bin/python -m build --no-isolation
	mkdir -p build/package
	tar -xzf dist/fourm-*.tar.gz --strip-components=1 -C build/package
	rm -r build/package/fourm
	$(PACKAGE_VENV)/bin/pip install --quiet --no-compile "$$(echo dist/fourm-*.whl)[demo,dev]"
	cd build/package && $(abspath $(PACKAGE_VENV))/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not dist" $(QUICK)

# The documents and the reference of the API as a web site in site/, which needs no other server.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
