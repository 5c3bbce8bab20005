# make demo      a pretrained model on real text: eager, SDPA and fastattn; ends with a table and out/demo.png
# make test      the whole test suite
# make bench     every benchmark; writes a table, JSON and charts to out/bench
# make lint      formatters, linters and types
# make sanitize  the kernel tests against a build with AddressSanitizer and UndefinedBehaviorSanitizer
# make gpu       on a machine with an NVIDIA GPU: build, tests, compute-sanitizer and benchmarks, with the packages that
#                PYTHON (python3) has; nothing is installed
#
# The others work in .venv, which the first of them makes. PYTHON=python3.12 make … chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: demo test bench lint sanitize gpu clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py --out out

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q --durations=15 -n auto --maxprocesses 8 --dist worksteal

bench: $(VENV)/.installed
	$(BIN)/python -m fastattn bench --json out/bench/results.json --markdown out/bench/results.md --plot out/bench

lint: $(VENV)/.lint
	PATH="$(abspath $(BIN)):$$PATH" pre-commit run --all-files

sanitize: $(VENV)/.installed $(VENV)/.build
	PYTHON="$(abspath $(BIN))/python" tests/sanitize.sh

gpu:
	PYTHON="$(PYTHON)" benchmarks/gpu.sh

clean:
	rm -rf $(VENV) build dist out

# torch first and by itself: the constraint picks its version, and nothing that depends on torch can then bring another.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install torch -c constraints.txt
	touch $@

# One build for every target, with emulations of what the machine lacks, so that no target undoes another's. nvcc, where it is,
# makes machine code for Hopper alone, as the tests of Triton's budgets do: each generation takes it half a minute more.
# FASTATTN_CUDA_ARCHS=80,90a,100a asks for all.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	FASTATTN_BUILD_EMULATED=auto FASTATTN_CUDA_ARCHS=$${FASTATTN_CUDA_ARCHS:-90a} $(BIN)/pip install -e '.[transformers,test,bench,demo]' -c constraints.txt
	touch $@

# What setup.py needs, as pyproject.toml says to pip: sanitize.sh runs it without pip.
$(VENV)/.build: $(VENV)/.torch pyproject.toml
	sed -n 's/^requires = \[\(.*\)\]$$/\1/p' pyproject.toml | tr , ' ' | xargs $(BIN)/pip install -c constraints.txt
	touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install 'pip>=25.1'
	$(BIN)/pip install --group lint -c constraints.txt
	touch $@
