# Everything a fresh checkout needs, from nothing but Python (3.11 or newer), pip and make:
#
#     make demo      see it work        make test      everything CI runs
#
# Both make a virtual environment in .venv first, with the PYTHON and TORCH below; `rm -rf .venv`
# starts anew, for instance with others.

PYTHON ?= python3
VENV := .venv

# torch and torchvision must come from the same release, or torchvision does not import, and pip
# does not see to it when one of the two is there already. So the pair is pinned together, to the
# newest one: it is what we develop on and what is tested. Another pair, or a build for the CPU only:
#     make test TORCH="torch==2.13.0 torchvision==0.28.0"      (pip's own options may follow)
TORCH ?= torch==2.14.1 torchvision==0.29.1

# What `pip install -e .` adds: every optional part, and the tools.
EXTRAS := all,dev

# Anything for pytest: make test PYTEST_ARGS="-n 2 -k tome". Work is stolen, not dealt out one by one,
# so that tests of one file share the fixtures of that file.
PYTEST_ARGS ?= -n 2 --dist worksteal

BIN := $(VENV)/bin
PY := $(BIN)/python
READY := $(VENV)/.ready

# True when the environment works: a broken or too old one is made anew.
USABLE := import sys, pip; sys.exit(sys.version_info < (3, 11) or sys.prefix == sys.base_prefix)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
VERSION := import sys; print("%d.%d" % sys.version_info[:2])

# $(call install,WHAT,PIP ARGUMENTS): one line, with a dot every five seconds while pip works.
# The dots end by themselves when this shell does, however it ends.
define install
	@printf '%s' "$(1)"; \
	(while sleep 5 >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do printf .; done) & \
	dots=$$!; trap 'kill $$dots 2>/dev/null' EXIT; trap 'exit 130' INT TERM; \
	$(PY) -m pip install -qq --disable-pip-version-check $(2) || \
	{ status=$$?; echo; echo "pip could not install this; see its message above. 'make' again goes on from here." >&2; exit $$status; }; \
	echo " done"
endef

.DEFAULT_GOAL := help
.PHONY: help demo test fast check format clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
	while IFS='|' read -r target text; do printf '%-15s %s\n' "$$target" "$$text"; done

demo: $(READY) ## Reduce the embedded model on the embedded images: a table and a picture
	@$(BIN)/mergence demo

test: check ## Format, lint and type checks, then every test: what CI runs
	@$(PY) -m pytest $(PYTEST_ARGS)

fast: $(READY) ## The tests that are not marked slow
	@$(PY) -m pytest -m "not slow" $(PYTEST_ARGS)

check: $(READY) ## Format, lint and type checks, changing nothing
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy

format: $(READY) ## Format the code and fix what ruff can fix safely
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

clean: ## Remove caches and build output; .venv stays
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last: an interrupted or failed installation is done again.
$(READY): pyproject.toml Makefile
	@rm -f $@
	@$(PY) -c '$(USABLE)' 2>/dev/null && exit; \
	fail() { echo "mergence: $$1" >&2; exit 1; }; \
	command -v "$(PYTHON)" >/dev/null || \
	  fail "Python 3.11 or newer is needed, and there is no '$(PYTHON)' here; name yours: make PYTHON=python3.12 ..."; \
	version=$$("$(PYTHON)" -c '$(VERSION)') || fail "'$(PYTHON)' does not run"; \
	"$(PYTHON)" -c '$(NEW_ENOUGH)' || \
	  fail "Python 3.11 or newer is needed, and '$(PYTHON)' is $$version; name a newer one: make PYTHON=python3.12 ..."; \
	echo "Making $(VENV) with Python $$version"; \
	"$(PYTHON)" -m venv --clear $(VENV) || \
	  fail "'$(PYTHON) -m venv' failed; Debian and Ubuntu have it in the package python3-venv"
	$(call install,Installing $(TORCH) (several GB the first time: minutes),$(TORCH))
	$(call install,Installing mergence with its extras and development tools,-e ".[$(EXTRAS)]")
	@echo '$(CURDIR)' >$@

# A moved or renamed checkout: the environment's links still point to the old place.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif
