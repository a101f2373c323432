# Each command sets up what it needs and is safe to repeat.
PYTHON ?= python3
BIN := .venv/bin
DEMO_ROUNDS ?= 12
.PHONY: demo test lint docs bench bench-gpu bench-gpus up down chromium postgresql

# Which build of torch: without CUDA if there is no NVIDIA driver, CUDA 12.6 for drivers before 580, else the driver's.
DRIVER = $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | grep -m 1 -oE '^[0-9]+')
TORCH_BACKEND ?= $(if $(DRIVER),$(if $(shell [ $(DRIVER) -lt 580 ] && echo old),cu126,auto),cpu)
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The pinned install; made again when the pins change. Only uv can choose a build of torch; if it or the index of builds
# cannot be reached, pip's default build works too, but is larger on a machine without a GPU.
.venv/ready: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	@{ $(PIP) uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt \
		--torch-backend $(TORCH_BACKEND) torch; } 2>.venv/torch.log || \
		echo "torch's build '$(TORCH_BACKEND)' cannot be fetched (.venv/torch.log says why); taking pip's default build"
	$(PIP) --editable .
	@touch $@

# The same with what tests, lint and documentation need.
.venv/dev: .venv/ready
	$(PIP) --editable '.[dev]'
	@touch $@

demo: .venv/ready
	$(BIN)/d3po run round --rounds $(DEMO_ROUNDS)

# Two files at a time: many tests wait for servers. Threads that wait for work must then leave the processor to others.
# In the order of their names: pytest-xdist would put files of few tests last, which are the long ones, and at the end
# one process would work alone.
test: .venv/dev chromium postgresql
	GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15

# The labelling page is tested in a real browser: Debian's, installed when that is possible; else those tests are skipped.
chromium:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		{ apt-get install -y -qq chromium >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; }; }; } || \
		echo "no chromium and no way to install it: the tests in a browser are skipped"

# Debian's PostgreSQL, for the tests of shared servers; each starts one of its own on loopback.
postgresql:
	@ls /usr/lib/postgresql/*/bin/pg_ctl >/dev/null 2>&1 || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		{ apt-get install -y -qq postgresql >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq postgresql >/dev/null; }; }; } || \
		echo "no PostgreSQL and no way to install it: the tests of shared servers are skipped"

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/hadolint deploy/*.Dockerfile
	$(BIN)/shellcheck deploy/*.sh
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
	$(BIN)/check-jsonschema --schemafile deploy/kubernetes/raycluster.schema.json deploy/kubernetes/ray.yaml
	$(BIN)/kubernetes-validate --strict --quiet --no-warn deploy/kubernetes/*.yaml
	D3PO_DOMAIN=d3po.test D3PO_OWNERS=owners.example $(BIN)/caddy adapt --config deploy/Caddyfile >/dev/null

# The site of docs/, in site/: open site/index.html. The variable silences a notice: mkdocs-material ends in May 2027.
docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: .venv/dev
	$(BIN)/python tests/benchmarks/speed.py
	$(BIN)/python tests/benchmarks/duckdb_pairs.py
	$(BIN)/python tests/benchmarks/overhead.py
	$(BIN)/python tests/benchmarks/import_judgements.py
	$(BIN)/python tests/benchmarks/page.py

# One NVIDIA GPU; the install must be one whose torch sees it. First the passes, then whole rounds.
bench-gpu: .venv/dev
	$(BIN)/python tests/benchmarks/gpu.py
	$(BIN)/python tests/benchmarks/gpu_round.py --warm-start

# As many NVIDIA GPUs as there are, up to four, one process each.
bench-gpus: .venv/dev
	$(BIN)/python tests/benchmarks/gpu_processes.py

up: .venv/ready
	$(BIN)/d3po up

down: .venv/ready
	$(BIN)/d3po down
