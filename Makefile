# PYTHON=python3.12 names another Python; TORCH=2.11.0 another torch, in an environment of its own.
PYTHON ?= python3
TORCH ?=
ARGS ?=
export PYTHON TORCH

.PHONY: help setup build demo test bench lint docs gallery clean
help:
	@echo "make demo     train on real citations, ask the C++ app (under 10 minutes the first time)"
	@echo "make test     build, C++ tests, Python tests"
	@echo "make setup    an environment with torch and mixhead in it; demo and test begin with it"
	@echo "make build    the library and the C++ tests"
	@echo "make bench    against what one would use instead; ARGS='--groups one_query' measures a part"
	@echo "make lint     clang-format, clang-tidy, ruff"
	@echo "make docs     draw the figures of the documentation"
	@echo "make gallery  run every example with three seeds, write docs/gallery.md (45 minutes)"
	@echo "make clean    remove what was built (environments stay)"
	@echo "Each takes PYTHON=python3.12 (another Python) and TORCH=2.11.0 (another torch)."

setup build demo test bench lint docs gallery clean:
	@tools/dev.sh $@ $(ARGS)
