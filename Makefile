PYTHON ?= python3
BIN := .venv/bin

.PHONY: dreambooth test clean

dreambooth: .venv/installed
	$(BIN)/python main.py --base configs/dreambooth.yaml

test: .venv/tests-installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.venv/installed: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e .
	touch $@

.venv/tests-installed: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv
