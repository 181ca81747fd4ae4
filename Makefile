# Needs Python 3.10+ with headers and pip, g++ and make. Everything else goes into .venv.
#   make demo    train a small WaveNet on a bundled recording, generate sound: demo/out.wav, demo/report.png
#   make test    the tests              make test-full  with the long ones and a sanitizer build
#   make build   the compiled kernels   make lint, make bench, make wheel, make clean
# Variables: PYTHON=python3.12, TORCH=torch==2.11.0 TRITON=triton==3.6.0, PYTEST_ARGS="-k wavenet";
# AUDIOKERNELS_CUDA=0|1|auto, TORCH_CUDA_ARCH_LIST and DEBUG=1 reach the build through the environment.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# What TORCH itself names; its CPU build does not bring it, and the tests interpret the Triton kernels.
TRITON ?= triton==3.7.1
PYTEST_ARGS ?=
# A process a core (tests/conftest.py says when not), each with whole files; PYTEST_ARGS="-n 0" takes it back.
PARALLEL = -n auto --dist loadfile --no-loadscope-reorder

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# pip would make the bytecode on one core, of the packages' own tests too; sources that are not Python 3 are no error
INSTALL = $(PIP) install -q --no-compile
BYTECODE = $(BIN)/python -m compileall -qq -j 0 -x /tests/ .venv/lib || true
SOURCES := $(wildcard csrc/*) CMakeLists.txt setup.py build_backend.py pyproject.toml
CXX_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu tests/cuda_on_host/*.h)

.PHONY: build test test-full test-sanitize lint format bench wheel demo clean
.DELETE_ON_ERROR:

build: .venv/built

demo: .venv/models
	$(BIN)/audiokernels demo --out demo

test: .venv/dev
	@rm -f .venv/pytest-exit
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(PYTEST_ARGS); echo $$? > .venv/pytest-exit; exit $$(cat .venv/pytest-exit)

test-full: .venv/dev test-sanitize
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The tests of the compiled ops on an AddressSanitizer + UndefinedBehaviorSanitizer build of _C, in a copy of the package.
# Left out: what runs torch's own compiler, what measures time, and the bit-identity runs over millions of samples.
# Tile registers are emulated: the sanitizers do not see what their instructions read and write.
SANITIZE_TESTS = $(wildcard $(patsubst audiokernels/%.py,tests/test_%.py,$(wildcard audiokernels/*.py)) tests/test_*_errors.py) \
  tests/test_attention_pairs.py
test-sanitize: .venv/dev
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O1 \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -DAUDIOKERNELS_CUDA=0 -DAUDIOKERNELS_SANITIZE=ON \
	  -DAUDIOKERNELS_EMULATE=ON
	$(BIN)/cmake --build build/sanitize
	rm -rf build/sanitize/package && mkdir -p build/sanitize/package
	cp -r audiokernels build/sanitize/package/ && rm -f build/sanitize/package/audiokernels/_C.*so
	cp build/sanitize/_C.*.so build/sanitize/package/audiokernels/
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=build/sanitize/package \
	  $(BIN)/pytest --capture=sys -m "not slow" $(SANITIZE_TESTS) \
	  -k "not test_compile and not test_export and not test_cost and not test_interpreted and not (test_codes and depend)"

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: .venv/dev
	for script in benchmarks/benchmark_*.py; do $(BIN)/python $$script || exit 1; done

# torch's library is found at run time, so auditwheel leaves it out.
wheel: .venv/dev
	rm -rf build/wheel
	$(PIP) wheel --no-build-isolation --no-deps -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libtorch_cpu.so -w dist build/wheel/*.whl

clean:
	rm -rf .venv build dist demo *.egg-info audiokernels/_C.*.so audiokernels/not_compiled.txt .pytest_cache .ruff_cache

# ---- .venv, each step done once

.venv/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv || ($(PYTHON) -m venv --clear --without-pip .venv && \
	  $(PYTHON) -m pip --python .venv/bin/python install pip)
	touch $@

.venv/tools: .venv/python
	$(INSTALL) "$(TORCH)" numpy "setuptools>=77" "cmake>=3.25" ninja "pybind11>=3"
	$(BYTECODE)
	touch $@

.venv/built: .venv/tools $(SOURCES)
	$(PIP) install -q --no-build-isolation --no-deps -e .
	$(BIN)/python -m audiokernels
	touch $@

# audiokernels is installed already: these add what its extras name
.venv/models: .venv/built
	$(INSTALL) "audiokernels[models]"
	$(BYTECODE)
	touch $@

.venv/dev: .venv/built
	$(INSTALL) "$(TRITON)" "audiokernels[models,train,dev]"
	$(BYTECODE)
	touch $@
