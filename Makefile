# make demo    train a small GPT on this machine and read what it writes
# make test    run the tests
# make lint    check the style
# make gpu     measure a CUDA GPU for ten minutes, then test it; the same command continues

ifeq ($(OS),Windows_NT)
BASE_PYTHON ?= python
PYTHON := .venv/Scripts/python.exe
ACTIVATE := .venv\Scripts\activate
else
BASE_PYTHON ?= python3
PYTHON := .venv/bin/python
ACTIVATE := source .venv/bin/activate
endif

# Linux without a GPU takes PyTorch's CPU build, which is gigabytes smaller. GPU=yes takes the default build.
GPU ?= $(shell command -v nvidia-smi || ls -d /proc/driver/nvidia /dev/kfd 2>/dev/null)
CPU_BUILDS := https://download.pytorch.org/whl/cpu
TORCH := $(shell grep '^torch==' requirements.txt)

.PHONY: demo test lint gpu clean

demo: .venv/installed
	$(PYTHON) data/stdlib_char/prepare.py
	$(PYTHON) train.py config/train_stdlib_char.py
	$(PYTHON) sample.py --out_dir=out-stdlib-char --num_samples=3 --max_new_tokens=400
	@echo
	@echo 'To go on, activate the environment, sample, and train on your own text:'
	@echo '    $(ACTIVATE)'
	@echo '    python sample.py --out_dir=out-stdlib-char --interactive=True'
	@echo '    python data/text/prepare.py my_notes.txt --name=my_text'
	@echo '    python train.py config/train_shakespeare_char_cpu.py --dataset=my_text --out_dir=out-my-text'

test: .venv/installed
	$(PYTHON) -m pytest -n 2

lint: .venv/installed
	$(PYTHON) -m ruff check .

gpu: .venv/installed
	$(PYTHON) data/shakespeare_char/prepare.py
	$(PYTHON) scripts/gpu_report.py $(ARGS)

clean:
	rm -rf .venv

.venv/installed: requirements.txt
	$(BASE_PYTHON) -m venv .venv
ifeq ($(shell uname -s)$(GPU),Linux)
	@echo 'No GPU found: installing the CPU build of PyTorch. "make GPU=yes ..." installs the default build.'
	$(PYTHON) -m pip install --no-deps --retries=1 --timeout=15 --extra-index-url=$(CPU_BUILDS) $(TORCH) || true
endif
	$(PYTHON) -m pip install -r requirements.txt
	touch .venv/installed
