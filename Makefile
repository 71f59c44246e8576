# make demo   virtual environment, install, distil the digits teacher into 5 steps, evaluate
# make test   the same environment, the tests
# make benchmark   few-step samplers of each teacher, measured and drawn into docs/benchmarks; hours, and resumable
# make demo-text   distil a text-to-image teacher into 4 steps, and draw scenes that it was not trained on
# make benchmark-kinds, make benchmark-text   the same of guided teachers and flows, and of text to image
# make docs   the pages of docs as a site, in build/docs
# make lint   ruff and mypy, as pre-commit and CI run them

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/digits_t5
# Extra arguments of pip, such as --constraint tests/oldest.txt
PIP_PINS ?=
EXTRAS ?= dev,demo,docs
# Processes that share the tests; a slow one takes up to 6 GiB.
WORKERS ?= 2
# One thread: on a small, busy machine two are often slower than one.
export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-text test coverage test-slow benchmark benchmark-kinds benchmark-text docs lint format clean

$(VENV)/installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {v} was found: make {sys.argv[1]} PYTHON=python3.12")' "$(or $(MAKECMDGOALS),demo)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(PIP_PINS) --editable ".[$(EXTRAS)]"
	@touch $@

demo: $(VENV)/installed
	$(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		training/train_hsivi.py --config training/configs/digits_t5.yaml --output_dir $(RUN) --resume_from_checkpoint latest
	$(BIN)/hsivi evaluate --config training/configs/digits_evaluation.yaml --run_dir $(RUN)

demo-text: RUN := runs/scenes_t4
demo-text: $(VENV)/installed
	$(BIN)/hsivi distil --config training/configs/scenes_t4.yaml --output_dir $(RUN) --resume_from_checkpoint latest
	$(BIN)/hsivi sample --pipeline $(RUN) --prompts training/configs/scenes_new_prompts.txt \
		--output_dir $(RUN)/drawn --overwrite_output_dir true

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(TEST)

# A third slower than without
coverage:
	$(MAKE) test TEST="--cov --cov-fail-under=95"

test-slow: $(VENV)/installed
	$(BIN)/python -m pip install --quiet $(PIP_PINS) "bitsandbytes>=0.50"
	$(BIN)/python -m pytest --numprocesses $(WORKERS) -m slow

# What docs/benchmarks/results.json has is not measured again: BENCHMARK=--output_dir=runs/again measures again, with the
# trainings that are there.
benchmark: $(VENV)/installed
	for set in digits fashion emoji mnist; do \
		$(BIN)/python -m training.benchmarks.images.benchmark --config training/configs/benchmark_$$set.yaml $(BENCHMARK) || exit; \
	done
	$(BIN)/python -m training.benchmarks.images.benchmark_pages

# `benchmark` of a rectified flow and of guided teachers, a scale and the calls of its solvers each, in docs/benchmarks/kinds
benchmark-kinds: $(VENV)/installed
	$(BIN)/python -m training.benchmarks.images.tune_solvers --config training/configs/solvers_flow.yaml
	$(BIN)/python -m training.benchmarks.images.benchmark --config training/configs/benchmark_flow.yaml $(BENCHMARK)
	for each in "1 1 2 4 10 20" "2 2 4 8 20 40" "4 2 4 8 20 40"; do \
		set -- $$each; scale=$$1; guided="--guidance_scale $$1 --dataset w=$$1"; shift; \
		$(BIN)/python -m training.benchmarks.images.tune_solvers --config training/configs/solvers_guided.yaml $$guided --calls $$* || exit; \
		[ $$scale = 1 ] || $(BIN)/python -m training.benchmarks.images.tune_solvers --config training/configs/solvers_guided.yaml $$guided --calls $$* \
			--guidance_falls true --solvers iPNDM "DPM-Solver++ SDE" SA-Solver UniPC || exit; \
		$(BIN)/python -m training.benchmarks.images.benchmark --config training/configs/benchmark_guided.yaml $$guided $(BENCHMARK) || exit; \
	done

# The same of a text-to-image teacher, in docs/benchmarks/text
benchmark-text: $(VENV)/installed
	$(BIN)/python -m training.benchmarks.images.tune_solvers --config training/configs/solvers_text.yaml
	$(BIN)/python -m training.benchmarks.images.tune_solvers --config training/configs/solvers_text.yaml \
		--guidance_falls true --calls 2 4 8
	$(BIN)/python -m training.benchmarks.images.tune_solvers --config training/configs/solvers_text.yaml \
		--guidance_interval true --calls 4 8
	$(BIN)/python -m training.benchmarks.images.tune_solvers --config training/configs/solvers_text.yaml \
		--guidance_scale 1 --dataset "scenes without guidance" --calls 1 2 4 8
	$(BIN)/python -m training.benchmarks.images.benchmark --config training/configs/benchmark_text.yaml $(BENCHMARK)

docs: $(VENV)/installed
	rm -rf docs/api
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs
	@echo "the pages are in build/docs/index.html"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
