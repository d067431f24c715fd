# Two commands matter: `make demo` shows the sidecar at work, `make test` checks everything. Each sets up what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# What the demo needs; the rest takes as long again.
DEMO_READY := $(VENV)/.demo
# What test-deploy needs.
DEPLOY_READY := $(VENV)/.deploy
# The package once more, its hot modules compiled: for benchmarks, and in about half the time for tests.
COMPILED := build/compiled
UNOPTIMIZED := build/unoptimized
COMPILED_READY := $(COMPILED)/.compiled
UNOPTIMIZED_READY := $(UNOPTIMIZED)/.compiled
# What is compiled there is found before the sources.
first = PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(1):$(CURDIR)
# What compiling can break, quickly; make test-slow runs all that is compiled through all that tests it.
COMPILED_TESTS := $(addprefix tests/,crdt limiter/test_limiter.py limiter/test_matching_properties.py limiter/test_any_bytes.py \
	limiter/test_answers.py limiter/test_waiting.py limiter/test_give_back.py \
	limiter/test_quota.py::test_whatever_happens_a_node_assigns_no_more_than_the_limit conformance/test_corpus.py \
	services/test_ext_authz_any_input.py server/test_sessions.py server/test_messages.py server/test_grpc_front_end.py \
	replication/test_mesh.py replication/test_session.py)
ALL_COMPILED_TESTS := $(addprefix tests/,crdt limiter replication server services simulation conformance e2e telemetry/test_traces.py)
# A file's tests run one after the other, files in the order of tests/conftest.py.
IN_PARALLEL := --dist loadfile --no-loadscope-reorder
# Many tests wait for something most of the time.
PYTEST := $(BIN)/python -m pytest -n 4 $(IN_PARALLEL)
ALL_COMPILED_MARKS := not interpreted and not slow and not long and not deployment
COMPILED_MARKS := $(ALL_COMPILED_MARKS) and not thorough
SOURCES := setup.py pyproject.toml $(shell find ratelimit_sidecar third_party -name '*.py' -o -name '*.pyx' -o -name '*.[ch]')
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Tests start hundreds of processes, each of which would compile all it imports.
unexport PYTHONDONTWRITEBYTECODE

# What the demo takes, for example: make demo DEMO="--duration 30"
DEMO ?=
# What pytest takes, for example: make test TESTS="tests/crdt -x"
TESTS ?=
# What is measured, and how, for example: make benchmark BENCHMARK="front_end --rounds 3"
BENCHMARK ?= decision
# What the soak test takes, for example: make soak SOAK="--seconds 600 --nodes 5"
SOAK ?=
# What the differential test takes, for example: make differential DIFFERENTIAL="--seed 17 --file 3"
DIFFERENTIAL ?=
# What the compose demo takes, for example: make compose-demo COMPOSE_DEMO="--local-images --keep"
COMPOSE_DEMO ?=
# What the fuzzer takes, for example: make fuzz FUZZ="--seconds 3600"
FUZZ ?=

.DEFAULT_GOAL := help
.PHONY: help demo compose-demo test test-slow test-all test-deploy differential test-sources test-compiled lint collect compile benchmark format generate simulate soak fuzz lock clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

demo: $(DEMO_READY) ## Three regions on this machine, each a real Envoy and a sidecar, sharing one limit (DEMO="--duration 30" ends it)
	$(BIN)/ratelimit-sidecar demo $(DEMO)

test: $(READY) ## Lint, types, layers, all tests but the slow ones, and those of what is compiled (TESTS="tests/crdt -x" selects)
	./dev/system-packages test
ifeq ($(TESTS),)
	$(MAKE) --jobs 2 --output-sync=target lint collect
	$(MAKE) --jobs 2 --output-sync=target test-sources test-compiled
else
	$(MAKE) lint
	@echo "==> Tests"
	$(BIN)/python -m pytest $(TESTS)
endif

test-slow: $(READY) $(UNOPTIMIZED_READY) ## The tests that wait for seconds, and more of each property and each combination; CI runs it after make test
	./dev/system-packages test
	@echo "==> Slow tests, two at a time, as each has several processes"
	$(BIN)/python -m pytest -n 2 $(IN_PARALLEL) -m slow $(TESTS)
	@echo "==> More of each property, and all combinations"
	HYPOTHESIS_PROFILE=thorough $(PYTEST) -m "hypothesis and not slow and not long" $(addprefix --ignore=,$(ALL_COMPILED_TESTS))
	HYPOTHESIS_PROFILE=thorough $(MAKE) test-compiled COMPILED_TESTS="$(ALL_COMPILED_TESTS)" COMPILED_MARKS="$(ALL_COMPILED_MARKS)"

test-all: test-slow ## What needs too much for CI, too, as the real envoyproxy/ratelimit beside the sidecar (many minutes)
	./dev/system-packages test-all
	$(BIN)/python -m pytest -m long $(TESTS)

test-deploy: $(DEPLOY_READY) ## The image and compose demo on a Docker engine, the Helm chart, Envoy Gateway and Istio on a Kubernetes API (builds tools, long the first time)
	./dev/system-packages test-deploy
	PYTHONPATH=tests $(BIN)/python -m deployment.tools
	$(BIN)/python -m pytest -m "deployment or not deployment" $(or $(TESTS),tests/deployment)

compose-demo: $(READY) ## docker-compose.yml from start to stop, a region cut off and healed (COMPOSE_DEMO="--local-images" pulls nothing)
	-./dev/system-packages compose
	PYTHONPATH=tests $(BIN)/python -m deployment.compose $(COMPOSE_DEMO)

differential: $(READY) ## Compare the answers of envoyproxy/ratelimit and the sidecar (DIFFERENTIAL="--requests 50000")
	./dev/system-packages test-all
	PYTHONPATH=tests $(BIN)/python -m differential $(DIFFERENTIAL)

# By the plus its output is seen at once, and that of the other only when it is complete.
test-sources: $(READY)
	@echo "==> Tests"
	+$(PYTEST)

# The demo needs a checkout, which what is compiled is not.
test-compiled: $(UNOPTIMIZED_READY) ## The tests of what is compiled, on the compiled modules
	@echo "==> Tests of the compiled modules"
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-quick} $(call first,$(UNOPTIMIZED)) $(PYTEST) -m "$(COMPILED_MARKS)" $(COMPILED_TESTS) \
		--ignore tests/e2e/test_demo_command.py

compile: $(COMPILED_READY) ## The modules that requests and replication pass through as machine code, into build/compiled (a minute)

benchmark: $(COMPILED_READY) ## Measure the compiled sidecar (BENCHMARK="front_end --rounds 3"; docs/performance.md)
	$(call first,$(COMPILED)) $(BIN)/python -m benchmarks.$(BENCHMARK)

lint: $(READY) ## Style, types and the direction of dependencies
	@echo "==> Style"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "==> Types"
	$(BIN)/mypy
	@echo "==> Layers"
	$(BIN)/lint-imports --no-logo

# At the first run pytest compiles all tests, which else each of the processes that run them would do. They tell of errors.
collect: $(READY)
	-@$(BIN)/python -m pytest --collect-only -qqq > /dev/null

format: $(READY) ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: $(READY) ## Write anew all that is generated: protobuf code, reference pages, Envoy configurations, dashboards, the chart's copies
	$(BIN)/python proto/generate.py
	$(BIN)/python -m ratelimit_sidecar.config.reference
	$(BIN)/python -m ratelimit_sidecar.telemetry.reference
	$(BIN)/python -m ratelimit_sidecar.demo.bootstrap
	$(BIN)/python deploy/grafana/generate.py
	$(BIN)/python deploy/helm/generate.py

simulate: $(READY) ## Simulate admission over several regions, and quotas: tables and charts into docs/, from seeds
	$(BIN)/python -m benchmarks.admission
	$(BIN)/python -m benchmarks.quotas

soak: $(READY) ## Whole sidecars on virtual time under random faults, seed after seed for a minute (SOAK="--seconds 600")
	$(BIN)/python -m simulation $(SOAK)

fuzz: $(READY) ## What a client may send to the HTTP/2 front end, under sanitizers, for a minute (FUZZ="--seconds 3600")
	./dev/system-packages fuzz $(BIN)/python
	PYTHONPATH=tests $(BIN)/python -m fuzz $(FUZZ)

lock: $(READY) ## Pin the newest versions that pyproject.toml allows, in requirements.lock
	$(BIN)/uv pip compile --quiet --upgrade --universal --all-extras --output-file requirements.lock pyproject.toml

clean: ## Remove the virtual environment, what is compiled and the caches
	rm -rf $(VENV) build .fuzz .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(DEMO_READY): pyproject.toml requirements.lock
	./dev/system-packages setup $(PYTHON)
	@echo "==> Virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@echo "==> Packages, as pinned in requirements.lock (a minute when none is cached)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[demo]'
	@touch $@

$(READY): $(DEMO_READY)
	@echo "==> What the tests need"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	@touch $@

$(DEPLOY_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[deploy]'
	@touch $@

$(COMPILED_READY): MODE := 1
$(UNOPTIMIZED_READY): MODE := unoptimized
$(COMPILED_READY) $(UNOPTIMIZED_READY): $(READY) $(SOURCES)
	./dev/system-packages compile $(BIN)/python
	@echo "==> Hot modules compiled by mypyc, in $(@D)"
	rm -rf $(@D) build/bdist.* build/lib.* build/temp.*
	RATELIMIT_SIDECAR_COMPILE=$(MODE) $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation --target $(@D) .
	@touch $@
