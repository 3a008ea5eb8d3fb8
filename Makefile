# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# make demo          a fleet of emulated hosts, the whole cycle, and what can go wrong; no root, nothing outside build/
# make test          lint, sanity, units, test-crash, test-stores, integration, artefact-test: stops at the first failure
# make lint | sanity | units | integration      one of them
# make test-crash    killed, failed, cut off and raced everywhere; LONG=1 takes every call and 200,000 steps (an hour)
# make test-mutation each small change of the cycle, the spool and the verifier against the unit tests; goes on where it stopped (2 hours)
# make test-stores   the stores with a real S3 server and a real sshd
# make test-eda      the event source in a real ansible-rulebook, as root; needs Java 17
# make molecule      the scenarios of extensions/molecule on hosts of their own, as root; MOLECULE="default faults" narrows it
# make units-oldest  the unit tests of modules and module_utils on the oldest target Python that this machine has
#                    SANITY="--test validate-modules" and UNITS="tests/unit/plugins/module_utils/test_x.py" narrow them
# make artefact-test the built artefact in an empty environment, then docs/tutorial.md as it is written
# make matrix        sanity, units, integration and cycles with each supported ansible-core, and managed Pythons from 3.8 to 3.13 (an hour)
# make gates         galaxy-importer, ansible-lint, antsibull-nox, antsibull-docs and the site in build/docs-site, REUSE, changelog
# make clean         removes .venv and build

PYTHON ?= python3
SANITY ?=
UNITS ?=
# where everything but the virtual environment goes
BUILD ?= build

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(abspath $(VENV))/bin
STAGE := $(abspath $(BUILD))/ansible_collections/integrity/ima
INSTALLED := $(abspath $(BUILD))/collections
DEMO := $(abspath $(BUILD))/demo
# short output, and no file outside of $(BUILD)
DEMO_ENV := ANSIBLE_HOME=$(abspath $(BUILD))/ansible ANSIBLE_LOCAL_TEMP=$(abspath $(BUILD))/ansible/tmp \
	ANSIBLE_REMOTE_TEMP=$(abspath $(BUILD))/ansible/tmp \
	ANSIBLE_FORKS=8 ANSIBLE_PIPELINING=true ANSIBLE_DISPLAY_SKIPPED_HOSTS=false
# another Python is another environment
PYVER := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
DEMO_STAMP := $(VENV)/.installed-demo-$(PYVER)
TEST_STAMP := $(VENV)/.installed-test-$(PYVER)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export ANSIBLE_NOCOWS := 1
# Settings of the user must change neither the demo nor the tests.
unexport ANSIBLE_CONFIG PYTHONPATH ANSIBLE_COLLECTIONS_PATH ANSIBLE_ROLES_PATH

title = @printf '\n========== %s ==========\n' "$(1)"

.PHONY: help demo test lint sanity units integration units-oldest stage collection clean test-crash test-stores test-mutation molecule

help:
	@sed -n 's/^# \(make .*\|  .*\)/\1/p' Makefile

$(DEMO_STAMP): requirements/demo.txt tests/tools/venv.sh
	@tests/tools/venv.sh "$(PYTHON)" $(VENV) requirements/demo.txt
	@touch $@

$(TEST_STAMP): $(DEMO_STAMP) requirements/test.txt
	@tests/tools/venv.sh "$(PYTHON)" $(VENV) requirements/test.txt
	@touch $@

# A copy of the working tree at a path that ansible-test accepts.
stage:
	@tests/tools/stage.sh $(STAGE)

# The collection as a user gets it: built, then installed.
collection: $(DEMO_STAMP) stage
	@rm -rf $(INSTALLED) $(BUILD)/artifact
	@$(DEMO_ENV) $(BIN)/ansible-galaxy collection build $(STAGE) --output-path $(BUILD)/artifact > $(BUILD)/collection.log 2>&1 || { cat $(BUILD)/collection.log; exit 1; }
	@$(DEMO_ENV) $(BIN)/ansible-galaxy collection install --offline --collections-path $(INSTALLED) $(BUILD)/artifact/*.tar.gz \
		>> $(BUILD)/collection.log 2>&1 || { cat $(BUILD)/collection.log; exit 1; }

demo: collection
	@rm -rf $(BUILD)/demo-tmp && mkdir -p "$(DEMO)" $(BUILD)/demo-tmp
	@TMPDIR=$(abspath $(BUILD))/demo-tmp ANSIBLE_COLLECTIONS_PATH=$(INSTALLED) ANSIBLE_PYTHON_INTERPRETER=$(BIN)/python $(DEMO_ENV) \
		$(BIN)/ansible-playbook -i localhost, -c local integrity.ima.demo \
		-e '{"demo_directory": "$(DEMO)", "demo_prefix": "ANSIBLE_COLLECTIONS_PATH=$(INSTALLED) $(BIN)/"}'

test:
	@start=$$SECONDS; \
	for step in lint sanity units test-crash test-stores integration artefact-test; do \
		$(MAKE) --no-print-directory $$step || { printf '\nFAILED in %s\n' $$step; exit 1; }; \
	done; \
	printf '\nPASSED: lint, sanity, units, test-crash, test-stores, integration, artefact-test in %d s\n' $$((SECONDS - start))

lint: $(TEST_STAMP) stage
	$(call title,lint: ruff mypy yamllint ansible-lint role specs schemas links)
	@tests/tools/lint.sh $(VENV) $(STAGE) $(BUILD)/cache
	@echo '--- role specs'; $(BIN)/python $(STAGE)/tests/tools/check_role_specs.py
	@echo '--- schemas'; $(BIN)/python $(STAGE)/tests/tools/write_schemas.py --check
	@echo '--- links'; $(BIN)/python $(STAGE)/tests/tools/check_links.py

sanity: $(TEST_STAMP) stage
	$(call title,sanity: ansible-test sanity)
	@tests/tools/ansible_test.sh $(VENV) $(STAGE) sanity $(SANITY)

units: $(TEST_STAMP) stage
	$(call title,units: ansible-test units)
	@tests/tools/ansible_test.sh $(VENV) $(STAGE) units $(UNITS)

units-oldest: $(TEST_STAMP) stage
	$(call title,units-oldest: ansible-test units on the oldest target Python)
	@tests/tools/ansible_test.sh $(VENV) $(STAGE) units-oldest $(UNITS)

integration: $(TEST_STAMP) collection
	$(call title,integration: tests/integration/run.sh)
	@if [ -x tests/integration/run.sh ]; then \
		PATH="$(BIN):$$PATH" ANSIBLE_COLLECTIONS_PATH=$(INSTALLED) ANSIBLE_PYTHON_INTERPRETER=$(BIN)/python \
			tests/integration/run.sh; \
	elif [ -e tests/integration/run.sh ]; then \
		echo 'error: tests/integration/run.sh is not executable' >&2; exit 1; \
	elif [ "$${REQUIRE_ALL:-0}" = 1 ]; then \
		echo 'error: there is no tests/integration/run.sh' >&2; exit 1; \
	else \
		echo 'SKIPPED: there is no tests/integration/run.sh'; \
	fi

# The arguments of pytest: CRASH="-k points", STORES="-k sftp"
CRASH ?=
STORES ?=

test-crash: $(TEST_STAMP) stage
	$(call title,test-crash: tests/crash)
	@PYTHONPATH=$(abspath $(BUILD)) tests/crash/run.sh $(BIN) $(CRASH)

# MUTATION=--report prints what is known
MUTATION ?=

test-mutation: $(TEST_STAMP)
	$(call title,test-mutation: tests/mutation)
	@MUTATION_STATE=$(or $(MUTATION_STATE),$(abspath $(BUILD))/mutation) tests/mutation/run.sh $(BIN) $(MUTATION)

test-stores: $(TEST_STAMP) collection
	$(call title,test-stores: tests/stores)
	@PYTHONPATH=$(abspath $(BUILD)) ANSIBLE_COLLECTIONS_PATH=$(INSTALLED) tests/stores/run.sh $(BIN) $(STORES)

# ansible-rulebook has an environment of its own.
EDA_VENV := $(abspath $(BUILD))/eda-venv
EDA_STAMP := $(EDA_VENV)/.installed-$(PYVER)

$(EDA_STAMP): requirements/eda.txt requirements/demo.txt tests/tools/venv.sh
	@tests/tools/venv.sh "$(PYTHON)" $(EDA_VENV) requirements/eda.txt
	@touch $@

.PHONY: test-eda
test-eda: $(EDA_STAMP) collection
	$(call title,test-eda: tests/eda)
	@ANSIBLE_COLLECTIONS_PATH=$(INSTALLED) nice -n 10 tests/eda/run.sh $(EDA_VENV)/bin

# A newcomer's way: the artefact in an empty environment, then the tutorial.
.PHONY: artefact-test
artefact-test: collection
	$(call title,artefact-test: tests/tools/artefact.sh)
	@tests/tools/artefact.sh "$(PYTHON)" $(STAGE) $(BUILD)/artifact/*.tar.gz $(BUILD)/artefact-test

# MATRIX="--core 2.20 --only units,cycle"
MATRIX ?=

.PHONY: matrix
matrix:
	$(call title,matrix: tests/tools/matrix.py)
	@$(PYTHON) tests/tools/matrix.py $(abspath $(BUILD))/matrix $(MATRIX)

# What the Ansible community asks of a collection; GATES="docs site" narrows it.
GATES ?=
GATES_VENV := $(BUILD)/gates
GATES_STAMP := $(GATES_VENV)/.installed-$(PYVER)
GALAXY_VENV := $(BUILD)/galaxy
GALAXY_STAMP := $(GALAXY_VENV)/.installed-$(PYVER)

$(GATES_STAMP): requirements/gates.txt tests/tools/venv.sh
	@tests/tools/venv.sh "$(PYTHON)" $(GATES_VENV) requirements/gates.txt
	@touch $@

$(GALAXY_STAMP): requirements/galaxy.txt tests/tools/venv.sh
	@tests/tools/venv.sh "$(PYTHON)" $(GALAXY_VENV) requirements/galaxy.txt
	@touch $@

.PHONY: gates
gates: $(GATES_STAMP) $(GALAXY_STAMP) collection
	$(call title,gates: tests/tools/gates.sh)
	@tests/tools/gates.sh $(GATES_VENV) $(GALAXY_VENV) $(STAGE) $(INSTALLED) $(BUILD)/artifact/*.tar.gz $(BUILD) $(GATES)

# Molecule has an environment of its own.
MOLECULE ?=
MOLECULE_VENV := $(abspath $(BUILD))/molecule-venv
MOLECULE_STAMP := $(MOLECULE_VENV)/.installed-$(PYVER)

$(MOLECULE_STAMP): requirements/molecule.txt requirements/demo.txt tests/tools/venv.sh
	@tests/tools/venv.sh "$(PYTHON)" $(MOLECULE_VENV) requirements/molecule.txt
	@touch $@

molecule: $(MOLECULE_STAMP) stage
	$(call title,molecule: extensions/molecule)
	@PATH="$(MOLECULE_VENV)/bin:$$PATH" MOLECULE_LOGS=$(abspath $(BUILD))/molecule nice -n 10 $(STAGE)/extensions/molecule/run.sh $(MOLECULE)

clean:
	rm -rf $(VENV) $(BUILD) .ansible .mypy_cache .pytest_cache .ruff_cache .hypothesis .nox tests/output

# make kernel-lab | kernel-lab-clean   Debian kernels with IMA and a software TPM under QEMU, kept in ~/.cache (KERNEL_LAB=...)
# make test-kernel                     the collection on those kernels; KERNEL_TESTS="--kernels backports -k cycle" narrows it
# make test-kernel-staging             the same on a kernel with CONFIG_IMA_STAGING, which it builds first
KERNEL_LAB ?= $(HOME)/.cache/integrity-ima/kernel-lab
KERNEL_TESTS ?=
export KERNEL_LAB

.PHONY: kernel-lab kernel-lab-clean test-kernel test-kernel-staging

kernel-lab:
	@$(PYTHON) tests/kernel/build.py

kernel-lab-clean:
	@$(PYTHON) tests/kernel/lab.py clean

# Keylime judges the stitched lists, from an environment of its own.
KEYLIME := $(abspath $(BUILD))/keylime
KEYLIME_STAMP := $(KEYLIME)/.installed-$(PYVER)
export KEYLIME_PYTHON := $(KEYLIME)/bin/python

$(KEYLIME_STAMP): requirements/keylime.txt tests/tools/venv.sh
	@tests/tools/venv.sh "$(PYTHON)" $(KEYLIME) requirements/keylime.txt
	@touch $@

test-kernel: kernel-lab $(TEST_STAMP) $(KEYLIME_STAMP) collection
	$(call title,test-kernel: tests/kernel)
	@ANSIBLE_COLLECTIONS_PATH=$(INSTALLED) tests/kernel/run.sh $(BIN) --kernels bookworm,trixie,backports $(KERNEL_TESTS)

test-kernel-staging: $(TEST_STAMP) $(KEYLIME_STAMP) collection
	$(call title,test-kernel-staging: tests/kernel)
	@$(PYTHON) tests/kernel/build.py staging
	@ANSIBLE_COLLECTIONS_PATH=$(INSTALLED) tests/kernel/run.sh $(BIN) --kernels staging $(KERNEL_TESTS)
