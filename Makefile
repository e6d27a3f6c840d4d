# The interpreter that everything runs with: the project's own environment where there is one.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
JOBS ?= $(shell nproc)

.PHONY: dev
dev:  ## compile into python/bitfold, for work on the sources (PYTHONPATH=python)
	cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(abspath $(shell command -v $(PYTHON))) \
	  -DBITFOLD_BUILD_PYTHON=ON -DBITFOLD_INPLACE=ON
	cmake --build build/dev -j $(JOBS)
