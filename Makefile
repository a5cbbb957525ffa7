# Every target makes the environment that it needs; nothing but python3 and make has to be there.
# ARGS is passed on: make demo ARGS="--steps 50", make test ARGS="-k blocking".
# PYTHON and VENV choose another Python, and the environment that is made with it:
# make test PYTHON=python3.13 VENV=.venv-3.13.

PYTHON ?= python3
ARGS ?=

VENV ?= .venv
# A file of versions that pip has to keep to, and the folders that are tested (all).
CONSTRAINTS ?=
PARTS ?=
# What an environment for development holds too, and need not install again.
ALL_OF_DEV = $(addprefix $(VENV)/.installed-,examples notebook test docs site package)
PEER_VENV := .venv-psgd-jax
KFAC_VENV := .venv-kfac-jax
# Holds the wheel and what it depends on, nothing else.
BARE_VENV := .venv-bare
RUN := $(VENV)/bin/python

# psgd-jax imports a private Optax module; these are the newest releases that still have it.
PEER_PINS := psgd-jax==0.2.9 jax==0.4.38 jaxlib==0.4.38 optax==0.2.4 flax==0.10.2 scikit-learn
# kfac-jax 0.0.8 works with JAX 0.8.0 and 0.9.0, and fails on a dense layer with 0.10.
KFAC_PINS := kfac-jax==0.0.8 jax==0.9.0 jaxlib==0.9.0 optax==0.2.8 scikit-learn

# Tests that share compiled programs stay with one worker; tests/conftest.py groups them.
WORKERS := -n 2 --dist loadgroup

# What the oldest supported JAX is tested with.
OLDEST_PARTS := tests/capture tests/contract tests/kernels tests/operators
# What of the tests shows the arithmetic and the control flow of another device; it takes minutes on
# one GPU, where every program takes longer to compile than on a CPU, and every small step to run.
GPU_WORKERS := -n 14 --dist worksteal
GPU_CONTRACT := (test_thirty or test_gradient_that_is_not or test_zero_gradient_gives \
	or test_real_dtypes or test_complex64 or test_gradients_of_another or test_donated_state \
	or test_update_keeps or test_an_ensemble or test_every_element or test_refresh_that_is_not \
	or test_identities) and not ekfac-captured
# JAX 0.12 turns these on one day; an older one does not look at them. jax_scan3 has no gradient yet.
UPGRADES := JAX_REMAT3=1 JAX_CUSTOM_VJP3=1 JAX_CUSTOM_JVP3=1 JAX_REMAT_BARRIER_NO_COTANGENTS=1

# A hang must end as a failure. Systems without GNU timeout (macOS) run without the limit.
# On a terminal the command stays in the foreground, or Ctrl-C would not reach it; elsewhere the
# limit ends its whole process group.
TIMEOUT := $(shell command -v timeout || command -v gtimeout)
FOREGROUND := $(shell test -t 0 && echo --foreground)
within = $(if $(TIMEOUT),$(TIMEOUT) $(FOREGROUND) -k 30 $(1))

.DEFAULT_GOAL := help
# Two pips must not write to one environment at the same time.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo demo-mesh notebook test test-oldest test-flags test-site pictures package lint gallery docs bench bench-peers bench-psgd bench-kfac bench-ekfac bench-family bench-cg bench-rates bench-minibatches bench-outliers bench-influence bench-laplace bench-lapack bench-busy bench-gpu test-gpu bench-scale bench-tasks bench-widths bench-rounding soak clean

help: ## List the targets
	@sed -n 's/^\([a-z%-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{sub("%", "NAME", $$1); printf "%-17s %s\n", $$1, $$2}'

demo: $(VENV)/.installed-examples ## Train on real digits, AdamW beside kron_psgd; writes out/digits.png
	@mkdir -p out
	$(call within,600) $(RUN) benchmarks/tournament.py digits --out out/digits.png $(ARGS)

demo-%: $(VENV)/.installed-examples ## Run examples/NAME.py; writes out/NAME.png
	@mkdir -p out
	$(call within,900) $(RUN) examples/$*.py --out out/$*.png $(ARGS)

demo-mesh: $(VENV)/.installed-examples ## Two processes on one mesh, and checkpoints; writes out/two_processes.png
	@mkdir -p out
	$(call within,900) $(RUN) examples/two_processes.py --out out/two_processes.png $(ARGS)

notebook: $(VENV)/.installed-notebook ## Run examples/tour.ipynb anew, with the outputs that it then holds
	$(call within,600) $(RUN) -m tests.notebook examples/tour.ipynb

tournament-%: $(VENV)/.installed-examples ## Optimizers on the task of an example, each at several rates
	@mkdir -p out
	$(call within,1800) $(RUN) benchmarks/tournament.py $* --out out/tournament-$*.png $(ARGS)

test: $(VENV)/.installed-test ## Run the test suite
	$(call within,3600) $(RUN) -m pytest $(WORKERS) $(PARTS) $(ARGS)

test-oldest: ## Run capture, contract, kernels and operators on the oldest supported JAX
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=tests/constraints-oldest.txt PARTS="$(OLDEST_PARTS)"

test-gpu: $(VENV)/.installed-test ## Run a selection of the tests on a GPU, with a JAX that has one
	$(call within,3600) $(RUN) -m pytest $(GPU_WORKERS) tests/kernels $(ARGS)
	$(call within,3600) $(RUN) -m pytest $(GPU_WORKERS) tests/contract tests/capture -k "$(GPU_CONTRACT)" $(ARGS)

test-flags: $(VENV)/.installed-test ## Run the tests of capture with JAX's upgrade flags on
	$(UPGRADES) $(call within,3600) $(RUN) -m pytest $(WORKERS) tests/capture $(ARGS)

lint: $(VENV)/.installed-dev ## Check style, formatting and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(call within,600) $(RUN) -m pyright --pythonpath $(RUN)

gallery: $(VENV)/.installed-examples ## Record pictures and output of the examples for their pages; ARGS=digits for one
	$(call within,7200) $(RUN) docs/gallery_record.py $(ARGS)

docs: $(VENV)/.installed-docs ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(call within,600) $(RUN) -m mkdocs build --strict

test-site: $(VENV)/.installed-site docs ## Build the documentation, and try every page in Chromium
	SITE=site $(call within,900) $(RUN) -m pytest tests/site $(ARGS)

pictures: $(VENV)/.installed-site docs ## Build the documentation; writes pictures of some pages into out/site/
	$(call within,300) $(RUN) -m tests.site.pictures $(ARGS)

package: $(VENV)/.installed-package ## Build sdist and wheel into dist/; try the wheel in an environment of its own
	rm -rf dist $(BARE_VENV)
	$(call within,300) $(RUN) -m build
	$(RUN) -m twine check --strict dist/*
	$(RUN) tests/package/archives.py dist
	$(PYTHON) -m venv $(BARE_VENV)
	$(BARE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	$(call within,300) $(BARE_VENV)/bin/python -I tests/package/smoke.py
	$(call within,300) $(RUN) -m pyright --project tests/package --pythonpath $(BARE_VENV)/bin/python

bench: $(VENV)/.installed-examples ## Measure compile time, step time and state size
	$(call within,1800) $(RUN) benchmarks/step.py $(ARGS)

bench-peers: bench-psgd bench-kfac ## Measure the same beside psgd-jax, and K-FAC beside kfac-jax

bench-psgd: $(VENV)/.installed-examples $(PEER_VENV)/.installed ## Beside psgd-jax alone
	$(call within,3600) $(RUN) benchmarks/peers.py --peer-python $(PEER_VENV)/bin/python $(ARGS)

bench-kfac: $(VENV)/.installed-examples $(KFAC_VENV)/.installed ## Beside kfac-jax alone
	$(call within,3600) $(RUN) benchmarks/kfac_peers.py --peer-python $(KFAC_VENV)/bin/python $(ARGS)

bench-ekfac: $(VENV)/.installed-examples ## EKFAC beside K-FAC
	$(call within,3600) $(RUN) benchmarks/ekfac.py $(ARGS)

bench-cg: $(VENV)/.installed-examples ## Conjugate gradients, preconditioned by curvature of layers
	OPENBLAS_NUM_THREADS=1 $(call within,1800) $(RUN) benchmarks/curvature.py $(ARGS)

bench-family: $(VENV)/.installed-examples ## SOAP and Shampoo beside figures of their peers
	$(call within,3600) $(RUN) benchmarks/family.py $(ARGS)

bench-rates: $(VENV)/.installed-examples ## One optimizer on the digits autoencoder at several rates
	$(call within,1800) $(RUN) benchmarks/learning_rates.py $(ARGS)

bench-minibatches: $(VENV)/.installed-examples ## K-FAC and EKFAC on minibatches, with their defaults
	$(call within,1800) $(RUN) benchmarks/minibatches.py $(ARGS)

bench-outliers: $(VENV)/.installed-examples ## What one outlier among the gradients costs every optimizer
	$(call within,7200) $(RUN) benchmarks/outliers.py $(ARGS)

bench-rounding: $(VENV)/.installed-examples ## State of 16 bits: losses of the digits autoencoder; bytes and times
	$(call within,7200) $(RUN) benchmarks/rounding.py $(ARGS)

bench-influence: $(VENV)/.installed-examples ## Influence scores beside training without some images
	@mkdir -p out
	OPENBLAS_NUM_THREADS=1 $(call within,1800) $(RUN) benchmarks/influence_retraining.py --out out/influence_retraining.png $(ARGS)

bench-laplace: $(VENV)/.installed-examples ## Calibration of Laplace approximations, of one layer and of all
	@mkdir -p out
	OPENBLAS_NUM_THREADS=1 $(call within,1800) $(RUN) benchmarks/laplace_calibration.py --out out/laplace_calibration.png $(ARGS)

bench-lapack: $(VENV)/.installed-examples ## Count the batched LAPACK calls that hang on this JAX
	$(call within,7200) $(RUN) benchmarks/lapack_hang.py $(ARGS)

bench-busy: $(VENV)/.installed-examples ## What a busy process beside it does to a step of every optimizer
	$(call within,1800) $(RUN) benchmarks/busy.py $(ARGS)

bench-gpu: $(VENV)/.installed-examples ## Optimizers on the shapes of GPT-2 small, on a GPU
	$(call within,1800) $(RUN) benchmarks/gpu.py $(ARGS)

bench-tasks: $(VENV)/.installed-examples out/psgd-jax/.installed ## Every optimizer at its defaults on eight small tasks, beside tuned AdamW
	$(call within,7200) $(RUN) benchmarks/tasks.py $(ARGS)

bench-widths: $(VENV)/.installed-examples ## Whether the best learning rate moves with the width of a net
	@mkdir -p out
	$(call within,1800) $(RUN) benchmarks/widths.py $(ARGS)

bench-scale: $(VENV)/.installed-examples ## 7 B parameters on 64 devices, by the compiler: state, collectives, operations
	$(call within,1800) $(RUN) benchmarks/scale.py $(ARGS)

soak: $(VENV)/.installed-examples ## Run 200 updates of every optimizer, under a time limit
	OPENBLAS_NUM_THREADS=1 $(call within,7200) $(RUN) benchmarks/soak.py $(ARGS)

clean: ## Remove the environments and everything that the other targets made
	rm -rf $(VENV) .venv-newest .venv-oldest $(PEER_VENV) $(KFAC_VENV) $(BARE_VENV) out site dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so an interrupted installation is done again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "optax_kron needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(VENV)/.created
	$(RUN) -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=--constraint %) --editable '.[$*]'
	@touch $@ $(if $(filter dev,$*),$(ALL_OF_DEV))

$(PEER_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(PEER_VENV)
	$(PEER_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PEER_PINS)
	@touch $@

# Beside the JAX of the benchmarks: what it imports of an older one is put in its place there.
out/psgd-jax/.installed: Makefile | $(VENV)/.installed-examples
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) psgd-jax==0.2.9
	@touch $@

$(KFAC_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(KFAC_VENV)
	$(KFAC_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(KFAC_PINS)
	@touch $@
