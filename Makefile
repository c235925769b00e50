# Three commands do everything on a fresh Linux machine with Python >= 3.10, a C++17 compiler and a network:
#   make demo    train, attack and compare the vanilla and the contractive network on handwritten digits
#   make test    the whole test suite
#   make bench   every measurement against PyTorch, torchdiffeq, OpenVINO, ONNX Runtime and ncnn: 20 minutes, idle machine
# and `make throughput` measures training, evaluation and memory of the CIFAR networks, and gloo: 45 minutes, idle machine
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test bench throughput setup clean
demo: setup
	$(BIN)/rnf demo --out runs/demo

test: setup
	$(BIN)/python -m pytest

bench: $(VENV)/.bench
	ATEN_CPU_CAPABILITY=$$($(BIN)/python -m robust_node_fast.bench.capability) $(BIN)/rnf bench --output bench/results --plots docs

throughput: setup
	export ATEN_CPU_CAPABILITY=$$($(BIN)/python -m robust_node_fast.bench.capability); \
	$(BIN)/python -m robust_node_fast.bench.throughput --page docs/throughput.md && \
	$(BIN)/python -m robust_node_fast.bench.scaling --measure --picture docs/scaling.png --page docs/scaling.md

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py requirements-dev.txt $(wildcard csrc/*.cpp csrc/cpu/* csrc/cuda/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-dev.txt "setuptools>=77" "pybind11>=2.12" ninja
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation -e ".[test,tensorboard]"
	touch $@

$(VENV)/.bench: $(VENV)/.installed requirements-bench.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-bench.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info robust_node_fast/_C*.so robust_node_fast/_cuda_C*.so
