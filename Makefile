# make demo    draw a catalogue, train on it from scratch, evaluate, and make a picture of the results
# make check   check style, and run the fast tests: below 90 seconds on two cores
# make test    run all tests, and tell why some were skipped
# make style   check style and formatting
# make soak    kill -9 under every setting, resume, compare; half an hour, writes benchmarks/results/soak.json
# make common  run the common tests of transformers against our models: two minutes, fetches its source distribution
# make clean   remove what these made, except .venv and outputs
#
# The first call sets up .venv. Another interpreter: make demo PYTHON=python3.12
# A build of torch of your own choice (by default pip takes the one for your platform): install it into .venv first.
# The same by hand: python -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[dev]"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The demo runs on two CPU processes everywhere, so that it is the same run on every machine.
LAUNCH := CUDA_VISIBLE_DEVICES= $(BIN)/accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml \
	--main_process_port 0

# Side by side, a file to each process; what is slow comes first (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo check test style soak common clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

# Set up again whenever the requirements change.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (several minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(VENV)/.installed
	$(eval STARTED := $(shell date +%s))
	@echo "1/3 drawing the catalogue"
	@$(BIN)/python demo/make_catalogue.py --output_dir demo/catalogue
	@echo "2/3 training from scratch"
	@$(LAUNCH) train.py --config recipes/demo.yaml
	@echo "3/3 evaluating"
	@$(LAUNCH) evaluate_retrieval.py --model_name_or_path demo/output/best --data_dir demo/catalogue \
		--split_name test --k_rerank 8,16,32 --slices product_type,pattern \
		--output_dir demo/output/evaluation --overwrite_output_dir \
		--contact_sheet demo/output/contact_sheet.png --report demo/output/report.html
	@$(BIN)/python demo/what_next.py --started $(STARTED) --python $(BIN)/python

check: style
	@$(PYTEST) -q --disable-warnings -m "not slow"

test: $(VENV)/.installed
	@$(PYTEST) -rs

style: $(VENV)/.installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

soak: $(VENV)/.installed
	@$(BIN)/python tests/soak.py --json benchmarks/results/soak.json

common: $(VENV)/.installed
	@$(BIN)/python tests/common_model_tests.py

clean:
	rm -rf demo/catalogue demo/output build dist .pytest_cache .ruff_cache *.egg-info
