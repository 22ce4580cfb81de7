# Everything a checkout needs, from nothing but Python and a C++ compiler. `make demo` and `make test` set up .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: setup demo test test-slow bench peers lint format gpu clean

$(VENV)/.installed: setup.py pyproject.toml
	@echo "== Setting up $(VENV): PyTorch and the rest are installed once; this takes a few minutes =="
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.native

# The native engine, built anew where its sources have changed since.
CSRC := $(wildcard csrc/*.h csrc/*.cpp)
$(VENV)/.native: $(CSRC) | $(VENV)/.installed
	@echo "== Building the native engine =="
	$(PY) -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

setup: $(VENV)/.installed $(VENV)/.native

demo: setup
	@echo "== Training a small DCGAN on real digits, then the drop-in on its checkpoint =="
	$(PY) -m dcgan.demo --out runs/demo
	@echo "== Generation, beside what one would use instead =="
	$(PY) -m bench generate --batch 1 64 --seconds 1.5

test: setup
	@echo "== The native engine's own tests, under AddressSanitizer and UBSan too =="
	$(MAKE) --no-print-directory -C csrc/tests
	@echo "== The Triton kernels in Triton's interpreter =="
	TRITON_INTERPRET=1 $(PY) -m pytest -m "not slow" tests/interpreter
	@echo "== Everything else =="
	$(PY) -m pytest -m "not slow"

test-slow: setup
	@echo "== Exhaustive tests =="
	TRITON_INTERPRET=1 $(PY) -m pytest -m slow tests/interpreter
	$(PY) -m pytest -m slow

$(VENV)/.peers: $(VENV)/.installed
	$(PY) -m pip install -q --disable-pip-version-check -e '.[peers]'
	@touch $@

peers: $(VENV)/.peers setup

bench: setup
	@echo "== Generation, every provider checked, then timed (\`make peers\` installs the rival runtimes) =="
	$(PY) -m bench generate --batch 1 8 64 256 --json bench/results/cpu.jsonl
	$(PY) -m bench discriminate --batch 1 8 64 --json bench/results/cpu-discriminate.jsonl
	@echo "== Training, every way checked, then timed, and where its time goes =="
	$(PY) -m bench train --json bench/results/train.jsonl
	@echo "== The native engine: errors, the steps to it, where its time goes, by batch and threads =="
	$(PY) -m bench accuracy
	$(PY) -m bench ladder --json bench/results/ladder.jsonl
	$(PY) -m bench profile
	$(PY) -m bench scale --json bench/results/scale.jsonl
	@echo "== Beside eager, where a drop-in is apt to be slower =="
	$(PY) -m bench situations --json bench/results/situations.jsonl
	@echo "== Single ops =="
	$(PY) -m pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds

CPP = $(shell git ls-files '*.h' '*.cpp')

lint: $(VENV)/.installed
	@echo "== ruff, mypy, clang-format =="
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# On a machine with an NVIDIA GPU; the results and an archive of them go to OUT. STAGE=check takes three minutes,
# test, tune, bench and kernels one or two, all of them together seven; autotune, sanitize and native nine each.
# ARGS are more options of `python -m bench gpu`. Without a .venv it uses the python3 it is given, with the PyTorch
# and Triton that it has.
STAGE ?= all
OUT ?= runs/gpu
GPU_PY := $(if $(wildcard $(VENV)/.installed),$(PY),python3)

gpu:
	@$(GPU_PY) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu needs an NVIDIA GPU, and there is no GPU here')"
ifneq ($(GPU_PY),$(PY))
	$(GPU_PY) -m pip install -q --no-build-isolation --no-deps -e .
endif
	@$(GPU_PY) -m bench gpu $(STAGE) --out $(OUT) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
