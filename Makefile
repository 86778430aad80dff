# make demo: the main job in a few minutes | make test: the tests | make lint: ruff and mypy | make bench: the benchmarks
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all soak lint bench bench-toy clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python train/demo.py

# RobustBench pins a timm of 2024, which would replace the present one
$(VENV)/.robustbench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[robustbench]'
	$(BIN)/python -m pip install --quiet --no-deps robustbench==1.1.1
	@touch $@

# the client of those who have not changed to huggingface_hub 2 yet
$(VENV)/hub1: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --upgrade --target $@ huggingface_hub==1.33.0
	@touch $@

# one thread a process: the tests' networks are tiny, and threads of two processes would wait for each other
test: $(VENV)/.installed $(VENV)/hub1 $(VENV)/.robustbench
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

test-all: $(VENV)/.installed $(VENV)/hub1 $(VENV)/.robustbench
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# an hour and more: kills, damaged files, memory
soak: $(VENV)/.installed
	$(BIN)/python tests/reliability/soak.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torchattacks pins a requests of 2020, and its wheel holds a robustbench of 2022, which would lie over that of today:
# benchmarks/peers.py looks into a folder of its own
$(VENV)/peers: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ torchattacks
	@touch $@

# make bench DATA=FOLDER attacks the released ResNet-18 on CIFAR-10, half an hour on two cores; else a small one on digits
bench: $(VENV)/peers
	$(BIN)/python benchmarks/activation.py
	$(BIN)/python benchmarks/app.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/train_step.py --sizes
	$(BIN)/python benchmarks/train_step.py --imagenet --repeats 3
	$(BIN)/python benchmarks/attack.py $(if $(DATA),--model resnet18_pssilu.fgsm_cifar10_linf --data-dir $(DATA) -n 48,--train-steps 300 --width 16 -n 16)

bench-toy: $(VENV)/peers
	$(BIN)/python benchmarks/activation.py --elements 100000 --repeats 2 --output ''
	$(BIN)/python benchmarks/train_step.py --toy --repeats 1 --steps 1 --models resnet18_pssilu --output ''
	$(BIN)/python benchmarks/train_step.py --toy --repeats 1 --sizes --output ''
	$(BIN)/python benchmarks/train_step.py --toy --repeats 1 --imagenet --output ''
	$(BIN)/python benchmarks/attack.py --toy --output ''
	$(BIN)/python benchmarks/app.py test_resnet --repeats 1
	$(BIN)/python benchmarks/gpu_smoke.py --toy

clean:
	rm -rf $(VENV) .cache build dist *.egg-info output
