# Everything a checkout needs, from nothing but Python and a C++ compiler. `make demo` and `make test` set up .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test test-slow bench peers lint format gpu clean

$(VENV)/.installed: setup.py pyproject.toml
	@echo "== Setting up $(VENV): PyTorch and the rest are installed once; this takes a few minutes =="
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	@echo "== Training a small DCGAN on real digits, then the drop-in on its checkpoint =="
	$(PY) -m dcgan.demo --out runs/demo
	@echo "== Generation, beside what one would use instead =="
	$(PY) -m bench generate --batch 1 64 --seconds 1.5

test: $(VENV)/.installed
	@echo "== Tests =="
	$(PY) -m pytest -m "not slow"

test-slow: $(VENV)/.installed
	@echo "== Exhaustive tests =="
	$(PY) -m pytest -m slow

$(VENV)/.peers: $(VENV)/.installed
	$(PY) -m pip install -q --disable-pip-version-check -e '.[peers]'
	@touch $@

peers: $(VENV)/.peers

bench: $(VENV)/.installed
	@echo "== Generation, every provider checked, then timed (\`make peers\` installs the rival runtimes) =="
	$(PY) -m bench generate --batch 1 8 64 256 --json results/generate.jsonl
	@echo "== Single ops =="
	$(PY) -m pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds

lint: $(VENV)/.installed
	@echo "== ruff, mypy =="
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
