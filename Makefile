# `make demo` and `make test` need Python 3.10 or newer with its headers, a C++20 compiler and make.
# Everything else is installed into .venv. `make clean` removes what was made, .venv included.

PYTHON ?= python3
VENV ?= .venv
# What the environment is made with; override to build and test against another release.
TORCH ?= torch==2.14.1 torchvision==0.29.1
DEMO_OUTPUT ?= demo_output
DEMO_ARGS ?=
PYTEST_ARGS ?=
export MAX_JOBS ?= 2

BIN := $(VENV)/bin
CMAKE_BUILD := build/cmake
CPP_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILD_INPUTS := $(CPP_FILES) $(wildcard build_support/*.py) csrc/sources.txt setup.py pyproject.toml

.PHONY: help install tools demo docs test lint pytest ctest test-long test-install wheel test-wheel rehearse-gpu \
  syntax format clean

help:
	@echo "make demo          train baseline and lnl on coloured MNIST; table and figure in $(DEMO_OUTPUT)/"
	@echo "make test          all tests, linters and types"
	@echo "make lint|pytest|ctest    one part of make test"
	@echo "make test-long     the Python tests on more cases as well"
	@echo "make test-install  build and install from source, sdist and wheel in new environments (slow)"
	@echo "make wheel         a source distribution and a wheel in dist/"
	@echo "make test-wheel    wheels built with the oldest torch, in environments with newer ones (slow)"
	@echo "make rehearse-gpu  benchmarks/gpu_check.py as with a GPU and no package index (slow)"
	@echo "make docs          the documentation as a site in build/site/"
	@echo "make syntax        compile csrc/ as C++17 and C++20 against torch's headers, syntax only"
	@echo "make format        format the Python and C++ code"
	@echo "make clean         remove .venv, build folders and the compiled module"

# A stamp is newer than what it was made from, so that nothing is installed twice.
$(VENV)/torch.stamp: Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	@touch $@

$(VENV)/package.stamp: $(VENV)/torch.stamp $(BUILD_INPUTS)
	$(BIN)/python -m pip install --editable '.[train]'
	@touch $@

# By name, it is the package that is there already: only what it lacks is installed.
$(VENV)/tools.stamp: $(VENV)/package.stamp pyproject.toml
	$(BIN)/python -m pip install 'lnl_ext[test,docs,compare,onnx]'
	@touch $@

install: $(VENV)/package.stamp

tools: $(VENV)/tools.stamp

demo: install
	$(BIN)/python benchmarks/demo.py --output $(DEMO_OUTPUT) $(DEMO_ARGS)

docs: tools
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: lint pytest ctest

lint: tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

# One thread a process, as there are as many processes as cores; a file's fixtures are made once.
pytest: tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(MAX_JOBS) --dist loadfile $(PYTEST_ARGS)

ctest: tools
	$(BIN)/cmake -S . -B $(CMAKE_BUILD) -DCMAKE_BUILD_TYPE=Release -DPython3_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build $(CMAKE_BUILD) --parallel $(MAX_JOBS)
	$(BIN)/ctest --test-dir $(CMAKE_BUILD) --parallel $(MAX_JOBS) --output-on-failure --no-tests=error

test-long: tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(MAX_JOBS) --dist loadfile -m "not slow" \
		--hypothesis-profile=long $(PYTEST_ARGS)

test-install: tools
	$(BIN)/python -m pytest -m slow python_tests/test_installation.py

# What a machine with a GPU has: Python 3.12, torch 2.11 and these packages, and no package index.
# Once with a build for it (which needs nvcc), once with the compiled parts of a wheel.
PYTHON_OF_GPU ?= python3.12
PACKAGES_OF_GPU := torch==2.11.0 setuptools pybind11 ninja pytest hypothesis pytest-xdist
REHEARSAL := build/rehearsal
REHEARSE := cd $(REHEARSAL)/tree && env -u PYTHONPATH PIP_NO_INDEX=1 MAX_JOBS=1 ../bin/python

$(REHEARSAL)/torch.stamp:
	$(PYTHON_OF_GPU) -m venv $(REHEARSAL)
	$(REHEARSAL)/bin/python -m pip install $(PACKAGES_OF_GPU)
	@touch $@

rehearse-gpu: $(REHEARSAL)/torch.stamp
	$(REHEARSAL)/bin/python -m pip uninstall --yes lnl_ext
	rm -rf $(REHEARSAL)/tree && mkdir $(REHEARSAL)/tree
	git ls-files -z | xargs -0 cp --parents --target-directory $(REHEARSAL)/tree
	$(REHEARSE) benchmarks/gpu_check.py --device cpu --build-for 9.0 --minutes 30 --output built
	$(REHEARSE) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .
	$(REHEARSE) -m pip uninstall --yes lnl_ext
	rm $(REHEARSAL)/tree/lnl_ext/*.so
	$(REHEARSE) benchmarks/gpu_check.py --device cpu --build-for 9.0 --minutes 30 --output prebuilt \
	  --prebuilt dist/*.whl

# TORCH_INCLUDE: the headers to compile against, those of the installed torch unless it says others.
TORCH_INCLUDE ?= $(shell $(BIN)/python -c "import torch, os; print(os.path.dirname(torch.__file__))")/include
STABLE_FILES := $(filter-out csrc/emulator/% csrc/tests/% csrc/bindings.cpp,$(filter %.cpp,$(CPP_FILES)))

# It loads with every torch that the package supports, whichever it is built with.
wheel: tools
	$(BIN)/python -m build --no-isolation --outdir dist

test-wheel: tools
	$(BIN)/python -m pytest -m slow python_tests/test_wheels.py

syntax: tools
	for standard in 17 20; do for file in $(STABLE_FILES); do \
	  $(CXX) -std=c++$$standard -fsyntax-only -fvisibility=hidden -Wall -Wextra -Werror -DUSE_CUDA \
	    -DTORCH_TARGET_VERSION=0x020b000000000000 -isystem $(TORCH_INCLUDE) $$file || exit 1; done; done

format: tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean:
	rm -rf $(VENV) build dist lnl_ext.egg-info lnl_ext/_C.*.so lnl_ext/_c*.so
