# These commands do everything, set-up included:
#   make demo   fill in a real study with the weights of the bundle and draw demo_output/demo.png
#   make demo-train   make a phantom cohort, train on it, fill in an incomplete study, draw the result
#   make test   style, types, configs and the test suite
#   make benchmark   speed and memory of this machine: docs/speed.md (BENCHMARK="--parts training" and the like)
# All use the virtual environment VENV, which is made if it does not exist: make test VENV=/path/to/another

PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= demo_output

PY := $(abspath $(VENV))/bin/python
# the demos need less than the tests, and their first minute is short: Python compiles what is imported, not all of torch
RUNTIME := $(VENV)/.sscf_runtime
READY := $(VENV)/.sscf_requirements
DEMO := cd sscf_bundle && $(PY) -m monai.bundle run
DEMO_OUTPUT := --output_dir "$(abspath $(DEMO_DIR))"
DEMO_CONFIG := --config_file "['configs/inference.json','configs/demo.json']" $(DEMO_OUTPUT)
TRAIN_CONFIG := --config_file "['configs/train.json','configs/demo_train.json']" $(DEMO_OUTPUT)

.PHONY: demo demo-train test benchmark clean

demo: $(RUNTIME)
	$(DEMO) inference $(DEMO_CONFIG)
	$(DEMO) picture $(DEMO_CONFIG)

demo-train: $(RUNTIME)
	$(DEMO) training $(TRAIN_CONFIG)
	$(DEMO) inference --config_file "['configs/inference.json','configs/demo_inference.json']" --demo_dir "$(abspath $(DEMO_DIR))"
	$(DEMO) picture $(TRAIN_CONFIG)

test: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

benchmark: $(READY)
	$(PY) benchmarks $(BENCHMARK)

$(RUNTIME): requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --no-compile -r requirements.txt
	touch $(RUNTIME)

$(READY): $(RUNTIME) requirements-dev.txt
	$(PY) -m pip install --no-compile -r requirements-dev.txt
	touch $(READY)

clean:
	rm -rf $(DEMO_DIR) .venv .pytest_cache .ruff_cache .mypy_cache
