# CI (.ci/run) runs test, lint and types, and builds docs in a test. The first target makes .venv: PYTHON=python3.12
# chooses its Python, pip's own environment variables (PIP_EXTRA_INDEX_URL, PIP_CONSTRAINT, ...) apply, and a torch that
# PYTHON has is used.
PYTHON ?= python3
VENV_PYTHON = .venv/bin/python
# Arguments of benchmarks/run.py or gpu.py, such as BENCH="scoring --released DIR".
BENCH ?=
PARALLEL = --numprocesses=auto --maxprocesses=4

.PHONY: demo demo-edits test lint types docs tinyworld reproduce bench bench-gpu fullsize

demo: .venv/.test ; $(VENV_PYTHON) -m tools.demo
demo-edits: .venv/.test ; $(VENV_PYTHON) -m tools.demo --edits
test: .venv/.test ; $(VENV_PYTHON) -m pytest -m "not slow and not gpu and not browser" $(PARALLEL)
lint: .venv/.dev ; $(VENV_PYTHON) -m ruff check . && $(VENV_PYTHON) -m ruff format --check .
types: .venv/.dev ; $(VENV_PYTHON) -m mypy
docs: .venv/.docs ; NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --strict
tinyworld: .venv/.test ; $(VENV_PYTHON) -m tools.pretraining.pipelines --output runs/pipelines && $(VENV_PYTHON) -m tools.pretraining.pixel_scorers --output runs/scorers
reproduce: .venv/.test ; $(VENV_PYTHON) -m tools.reproduce --jobs 2 --page docs/reproduction.md
bench: .venv/.test ; $(VENV_PYTHON) benchmarks/run.py $(BENCH)
bench-gpu: .venv/.test ; $(VENV_PYTHON) benchmarks/gpu.py $(BENCH)
fullsize: .venv/.test ; $(VENV_PYTHON) benchmarks/fullsize

# .venv/.test, .venv/.dev, .venv/.docs mark an installed extra; older than setup.cfg, they are to be installed again.
.venv/.%: setup.cfg pyproject.toml | .venv/bin/pip
	$(VENV_PYTHON) -m pip install -e ".[$*]"
	@touch $@

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("latentreward needs Python 3.11 or newer, and $(PYTHON) is %d.%d; try: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	@$(PYTHON) .ci/reuse_torch.py .venv
