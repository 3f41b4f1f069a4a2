PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: install quickstart test test-fast test-ray test-load coverage fuzz imports compat docs quality style clean

# torchvision comes with optimum-intel, and where it was built for another torch than the one installed (CUDA beside CPU), it
# breaks transformers on import. Nothing here needs it: transformers then prepares pictures with PIL, as the original does.
install: $(BIN)/optimum-cli
$(BIN)/optimum-cli: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	$(BIN)/python -c "import torchvision" 2>/dev/null || $(BIN)/python -m pip uninstall --quiet --yes torchvision
	touch $@

quickstart: install
	$(BIN)/optimum-cli export openvino --model examples/shapes/checkpoint shapes-ov
	$(BIN)/python examples/quickstart.py shapes-ov

# In parallel, but not beyond what a few large imports and models take of memory
test: install
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

# Damaged files, hostile images and random conversations, for as long as you like: make fuzz SECONDS=3600 SEED=$$RANDOM
SECONDS ?= 600
SEED ?= 0
fuzz: install
	PYTHONPATH=tests $(BIN)/python -m fuzz --seconds $(SECONDS) --seed $(SEED)

# Every public name of transformers, Optimum and optimum-intel as the first import, beside this package: half an hour.
imports: install
	$(BIN)/python tests/import_order.py --all

# Tools and tests of others against our bundles: writes docs/compatibility.md. PEERS holds checkouts of openvino.genai and optimum-intel.
compat: install
	$(BIN)/python tests/compat/run.py $(PEERS)

# The core, in two minutes: no programs, no compression, no browser, no GenAI, no Hub. CONTRIBUTING.md says what is left out.
test-fast: install
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal -m "not slow and not browser and not genai and not hub"

# A Ray cluster of several processes, some of which are killed. Ray is large, so `make test` leaves these tests out.
test-ray: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "ray[data,serve]"
	$(BIN)/python -m pytest tests/test_ray.py

# The server under the load of Locust. It brings gevent and Flask, so `make test` leaves this test out.
test-load: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt locust
	$(BIN)/python -m pytest tests/test_load.py

# What the tests in this process reach; programs that they start do not count. Fails if the share is below the one in pyproject.toml.
coverage: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pytest-cov
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal --cov --cov-report=term:skip-covered

# The extra `quality` of pyproject.toml, by name: to ask for the package again would bring torchvision back
$(BIN)/mypy: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		codespell import-linter mypy ruff types-psutil types-PyYAML types-tqdm

quality: $(BIN)/mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

style: $(BIN)/mypy
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site in site/: open site/index.html. Nothing in it is loaded from other servers.
docs: install
	$(BIN)/python -c "import mkdocs" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt mkdocs-material "mkdocstrings[python]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) shapes-ov shapes-int4-ov shapes-awq-ov shapes-mixed-ov shapes-llama-ov shapes-16-ov shapes-64-ov base-ov ring-ov \
		captions.parquet labels.jsonl schema.json tokens.png build dist site *.egg-info optimum_llava_ov/kernels/*.so .coverage* \
		.mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache lowest.txt
