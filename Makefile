# `make demo` fine-tunes a model across six devices; `make test` checks everything.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# No telemetry, no update checks; idle threads sleep, for two cores share all nodes of a simulation.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv nginx chromium demo test lint format bench docs screenshots gpu-check neon-check arm-check sanitize clean

help:
	@echo "make demo       fine-tune a language model across six unlike devices, and report"
	@echo "make test       lint, types and tests, with coverage"
	@echo "make lint       ruff and mypy alone          make format     apply ruff's fixes and format"
	@echo "make bench      recompression, bytes, kernels make docs       build the documentation"
	@echo "make gpu-check  check and time GPU kernels   make clean      remove what builds left behind"
	@echo "make screenshots  pictures of the dashboard   make chromium   the browser that tests need"
	@echo "make neon-check the kernels' bits on ARM     make sanitize   the kernels' tests under ASan, UBSan"
	@echo "make arm-check  the same, and the stub on ARM"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt fedserver/dashboard/vendor.py kernels/CMakeLists.txt $(wildcard kernels/fedkernels/cpu/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fedbraid needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	@echo "Installing fedbraid into $(VENV); the first time takes some minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--build-constraint constraints.txt --editable '.[sim,dev]'
	$(BIN)/python -m fedserver.dashboard.vendor
	@touch $@

demo: venv
	$(BIN)/fedbraid simulate quickstart

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Tests run the real front door and the real browser; a fresh Debian machine gets them where that is allowed.
nginx:
	@PATH="$$PATH:/usr/sbin" command -v nginx > /dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
		&& apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nginx > /dev/null; \
	} || { echo "nginx is missing: sudo apt-get install nginx (or your system's package)"; exit 1; }

chromium: venv
	@command -v chromium chromium-browser google-chrome > /dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
		&& apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null; \
	} || { echo "Chromium is missing: sudo apt-get install chromium (or your system's package)"; exit 1; }
	@$(BIN)/python tests/fedserver/dashboard/browser.py

# Every view at 1440 and 390 pixels into build/screenshots, and three pictures into docs/images.
screenshots: venv chromium
	$(BIN)/python -m pytest --quiet tests/fedserver/dashboard/screenshots.py

# Processes of a deployment and whole benchmarks run outside of what coverage sees.
test: nginx lint chromium
	$(BIN)/python -m fedclient.base_model fetch
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
		--cov --cov-report=term --cov-fail-under=80 --durations=25 --durations-min=10

bench: venv
	$(BIN)/python -m simulations.benchmarks.recompression
	$(BIN)/python -m simulations.benchmarks.downlink
	$(BIN)/fedbraid bench kernels

docs: venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--build-constraint constraints.txt --editable '.[sim,dev,docs]'
	$(BIN)/mkdocs build --strict

gpu-check: venv
	@$(BIN)/python -m simulations.benchmarks.gpu_check

# Needs cmake, qemu-user and a cross-compiler, and says how to get what is missing.
neon-check: venv
	$(BIN)/python tests/kernels/native/neon_check.py

# Needs qemu-user, and fetches Debian's Python for arm64 into build/arm.
arm-check: neon-check
	$(BIN)/python tests/fedclient/resident/arm_check.py

sanitize: venv
	$(BIN)/python tests/kernels/native/sanitize.py

clean:
	rm -rf build dist site htmlcov .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
