# Every target sets up what it needs. PYTHON is the interpreter .venv is made with (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo demo-video demo-detection test check bench clean

setup: $(STAMP)

# uv installs the hashed lock in seconds; the project itself is linked, not copied. editable_mode=compat: otherwise
# `import mvit` beside a clone that is called mvit finds the clone's folder instead of the package.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; use make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --no-deps --config-setting editable_mode=compat --editable .
	touch $@

demo: setup
	$(BIN)/python -m launcher.demo

demo-video: setup
	$(BIN)/python -m launcher.demo camera

demo-detection: setup
	$(BIN)/python -m launcher.demo detection

# Two workers (tests/conftest.py says who does what); plain `pytest` runs all in one process.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest -q tests/test_architecture.py tests/test_configs.py tests/test_docs.py tests/mvit/test_config.py tests/data_pipeline tests/mvit/model

bench: setup
	$(BIN)/mvit bench model mvitv2_tiny --batch 4 --threads 1
	$(BIN)/mvit data pack digits data/digits-bench --overwrite
	$(BIN)/mvit bench data configs/demo/digits.yaml data.train=data/digits-bench/train

clean:
	rm -rf .venv data/digits data/digits-bench data/camera data/shapes data/nuclei runs/digits runs/camera runs/shapes runs/nuclei
