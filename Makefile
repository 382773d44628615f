# make demo    train a small GPT on this machine and read what it writes
# make test    run the tests
# make lint    check the style

ifeq ($(OS),Windows_NT)
BASE_PYTHON ?= python
PYTHON := .venv/Scripts/python.exe
else
BASE_PYTHON ?= python3
PYTHON := .venv/bin/python
endif

.PHONY: demo test lint clean

demo: .venv/installed
	$(PYTHON) data/stdlib_char/prepare.py
	$(PYTHON) train.py config/train_stdlib_char.py
	$(PYTHON) sample.py --out_dir=out-stdlib-char --num_samples=3 --max_new_tokens=400

test: .venv/installed
	$(PYTHON) -m pytest

lint: .venv/installed
	$(PYTHON) -m ruff check .

clean:
	rm -rf .venv

.venv/installed: requirements.txt
	$(BASE_PYTHON) -m venv .venv
	$(PYTHON) -m pip install -r requirements.txt
	touch .venv/installed
