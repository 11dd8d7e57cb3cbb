# make run: the app on 127.0.0.1:7860 · make test: all but the long suites, about twelve minutes on two cores · make long: those
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test long torture gpu qlora check screenshots bench bench-train bench-doctors settings clean

# the environment is made again whenever the dependencies change
$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

run: $(VENV)/.run
	$(BIN)/python app.py

# three at a time, since they often wait for a browser or a child; a file of tests in one process: each has its own runtime directory, so that their device locks never meet;
# in the order of names, since the files with the fewest tests, left for last otherwise, are the longest
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# minutes to hours: every mutant, every stop step, every browser path
long: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

# about an hour and a half: kills, failed file calls, power loss, damage, two people in random order; the table at the end is docs/reliability.md's
torture: $(VENV)/.test
	$(BIN)/python -m pytest -m torture -v

# on a machine with a GPU that torch can use
gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu

# 4-bit LoRA and the 8-bit optimizer, on a processor too; installs bitsandbytes
qlora: $(VENV)/.test
	$(BIN)/python -m pip install --quiet -e ".[qlora,test]"
	$(BIN)/python -m pytest -m qlora

check: $(VENV)/.test
	$(BIN)/python -m pip install --quiet "ruff>=0.9" "mypy>=1.13"
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy trainer profiles

# pictures of the real app for the README; needs Chromium
screenshots: $(VENV)/.test
	$(BIN)/python docs/take_screenshots.py

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.page

# training speed beside transformers and TRL, on this machine's GPU or else its processor; about ten minutes
bench-train: $(VENV)/.test
	$(BIN)/python -m pip install --quiet -e ".[bench]"
	$(BIN)/python -m benchmarks.train --peers hf,trl

# how long the model doctor takes, on sparse files of 100 shards
bench-doctors: $(VENV)/.run
	$(BIN)/python -m benchmarks.doctors

settings: $(VENV)/.run
	$(BIN)/python -m trainer.settings_doc > docs/settings.md

clean:
	rm -rf $(VENV) build *.egg-info
