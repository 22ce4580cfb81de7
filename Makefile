# Needs Python and a C++ compiler. `make demo` and `make test` first set up .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Test files run in JOBS processes; threads that wait leave the cores to the others.
JOBS ?= 2
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(JOBS) --dist loadfile

.PHONY: setup demo test test-slow bench peers lint format gpu clean

$(VENV)/.installed: setup.py pyproject.toml
	@echo "== Setting up $(VENV): PyTorch and the other packages are installed once, in a few minutes =="
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.native

# Rebuilds the native engine after a change of its sources.
CSRC := $(wildcard csrc/*.h csrc/*.cpp)
$(VENV)/.native: $(CSRC) | $(VENV)/.installed
	@echo "== Building the native engine =="
	$(PY) -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

setup: $(VENV)/.installed $(VENV)/.native

demo: setup
	@echo "== Train a small DCGAN on real digits, then compare the drop-in with the reference =="
	$(PY) -m dcgan.demo --out runs/demo
	@echo "== Benchmark generation =="
	$(PY) -m bench generate --batch 1 64 --seconds 1.5

test: setup
	@echo "== C++ tests, with and without AddressSanitizer and UBSan =="
	$(MAKE) --no-print-directory -C csrc/tests
	@echo "== Triton kernels in Triton's interpreter =="
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" tests/interpreter
	@echo "== Everything else =="
	$(PYTEST) -m "not slow"

test-slow: setup
	@echo "== Exhaustive tests =="
	TRITON_INTERPRET=1 $(PYTEST) -m slow tests/interpreter
	$(PYTEST) -m slow

$(VENV)/.peers: $(VENV)/.installed
	$(PY) -m pip install -q --disable-pip-version-check -e '.[peers]'
	@touch $@

peers: $(VENV)/.peers setup

bench: setup
	@echo "== Inference: every provider is checked, then timed (\`make peers\` installs the other runtimes) =="
	$(PY) -m bench generate --batch 1 8 64 256 --json bench/results/cpu.jsonl
	$(PY) -m bench discriminate --batch 1 8 64 --json bench/results/cpu-discriminate.jsonl
	@echo "== Training: every variant is checked, then timed and profiled =="
	$(PY) -m bench train --json bench/results/train.jsonl
	@echo "== The native engine: errors, optimization steps, time per layer, scaling =="
	$(PY) -m tests.accuracy
	$(PY) examples/ladder.py --json bench/results/ladder.jsonl
	$(PY) -m bench profile
	$(PY) -m bench scale --json bench/results/scale.jsonl
	@echo "== Dtypes, modes and edited networks, next to eager =="
	$(PY) -m bench situations --json bench/results/situations.jsonl
	@echo "== Networks as users write them, fused, next to eager =="
	$(PY) -m bench any --json bench/results/any.jsonl
	$(PY) -m bench plot bench/results/cpu.jsonl --out bench/results/cpu.png
	$(PY) -m bench docs
	@echo "== Single ops =="
	$(PY) -m pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds

CPP = $(shell git ls-files '*.h' '*.cpp')

lint: $(VENV)/.installed
	@echo "== ruff, mypy, clang-format, retired words =="
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(PY) tests/vocabulary.py

format: $(VENV)/.installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# Needs an NVIDIA GPU. Writes the results and an archive of them to OUT. STAGE=check takes three minutes; test, tune,
# bench and kernels one or two each, all together seven; autotune, sanitize and native nine each. ARGS are passed to
# `python -m tests.gpu`. Without a .venv, python3 is used, with its PyTorch and Triton.
STAGE ?= all
OUT ?= runs/gpu
GPU_PY := $(if $(wildcard $(VENV)/.installed),$(PY),python3)

gpu:
	@$(GPU_PY) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu needs an NVIDIA GPU, and there is no GPU here')"
ifneq ($(GPU_PY),$(PY))
	$(GPU_PY) -m pip install -q --no-build-isolation --no-deps -e .
endif
	@$(GPU_PY) -m tests.gpu $(STAGE) --out $(OUT) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
