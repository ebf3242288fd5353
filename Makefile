# virt-ports: the commands for working with this repository; `make help` lists them.
# All but help, check, fuzz, prove and clean need root, for network namespaces and libvirtd.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON := /usr/bin/python3
BIN := .venv/bin
PACKAGES := build/packages-are-installed
VENV := .venv/is-complete
PROMETHEUS := build/prometheus/usr/bin/promtool
# What natd loads into the kernel (docs/design/0033-fast-path.md).
PROGRAMS := natctl/bpf/edge.bpf.o natctl/bpf/guard.bpf.o natctl/bpf/tap.bpf.o
CLANG ?= clang
CLOUD_INIT := build/cloud-init/usr/lib/python3/dist-packages/cloudinit/config/schemas/schema-cloud-config-v1.json
LAB ?= vp
# More than the cores of a small machine: the tests that take long wait for guests and timers.
PYTEST_JOBS ?= 4
RELEASE ?= trixie
RELEASES ?= bookworm trixie
MINUTES ?= 3
LAB_COMMAND = $(BIN)/python -m lab --lab "$(LAB)"
# Empty unless given: the lab has a default site, and each site a first host.
SITE_OPTION = $(if $(SITE),--site "$(SITE)")
# MINUTES has a default, which is chaos's.
STORIES_OPTION = $(if $(SEEDS),--seeds "$(SEEDS)",$(if $(filter file,$(origin MINUTES)),,--minutes "$(MINUTES)"))
HOST_OPTION = $(if $(HOST),--host "$(HOST)")

# Debian packages. For the daemons: Python, what libvirt-python is built with, and clang for programs in the kernel. For
# the lab and the tests: real libvirtds and QEMU, what makes the guest image, and the tools that watch our work from
# outside.
PACKAGES_DAEMONS := python3 python3-venv python3-dev gcc libc6-dev pkg-config libvirt-dev ca-certificates clang
PACKAGES_LAB := libvirt-daemon-system libvirt-clients qemu-system-x86 qemu-utils dnsmasq-base iproute2 iptables \
                util-linux procps lz4 zstd cpio
PACKAGES_TESTS := nftables conntrack coturn natpmpc miniupnpc gnutls-bin iputils-ping tcpdump systemd tshark tmux bash zsh fish man-db
PACKAGES_MACHINES := mmdebstrap e2fsprogs git
# Browsers, for the status page.
PACKAGES_TESTS += chromium w3m

.PHONY: help
help: ## This list.
	@echo "virt-ports: make TARGET     (LAB=name picks another lab than $(LAB);"
	@echo "                                SITE=single with lab-up and demo: one server with one public address)"
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- set-up ---------------------------------------------------------------------------------------------------

.PHONY: setup
setup: $(PACKAGES) $(PROMETHEUS) $(CLOUD_INIT) $(VENV) $(PROGRAMS) ## Install what is missing: Debian packages (root, if any), .venv.
	@:

.PHONY: packages-daemons
packages-daemons: ## Install only the Debian packages that the daemons need (root, if any is missing).
	@$(call install_missing,$(PACKAGES_DAEMONS))

$(PACKAGES): Makefile
	@$(call install_missing,$(PACKAGES_DAEMONS) $(PACKAGES_LAB) $(PACKAGES_TESTS))
	@mkdir -p $(@D) && touch $@

# Prometheus and promtool, for the tests. Unpacked and not installed: Debian's package would start a service.
$(PROMETHEUS): | $(PACKAGES)
	@echo "Prometheus in build/prometheus"
	@rm -rf build/prometheus && mkdir -p build/prometheus
	@cd build/prometheus && { apt-get -qq download prometheus || { apt-get -qq update && apt-get -qq download prometheus; }; }
	@cd build/prometheus && dpkg-deb -x prometheus_*.deb . && rm prometheus_*.deb

# The schema of cloud-init, likewise: an installed cloud-init would configure this machine at its next boot.
$(CLOUD_INIT): | $(PACKAGES)
	@echo "cloud-init in build/cloud-init"
	@rm -rf build/cloud-init && mkdir -p build/cloud-init
	@cd build/cloud-init && { apt-get -qq download cloud-init || { apt-get -qq update && apt-get -qq download cloud-init; }; }
	@cd build/cloud-init && dpkg-deb -x cloud-init_*.deb . && rm cloud-init_*.deb

# The versions in the lock are all there is, so pip need not resolve anything.
$(VENV): requirements.lock pyproject.toml setup.cfg | $(PACKAGES)
	@echo "python environment in .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# All that they need is clang and the kernel's headers (of libc6-dev).
.PHONY: programs
programs: $(PROGRAMS) ## The programs that natd loads into the kernel, for packages; needs clang.

natctl/bpf/%.bpf.o: natctl/bpf/%.bpf.c natctl/bpf/kernel.h
	@echo "$@"
	@$(CLANG) -O2 -g0 -Wall -Wextra -Werror -fno-strict-aliasing -target bpf -mcpu=v3 \
	    -idirafter /usr/include/$$(gcc -print-multiarch) -c $< -o $@

# Asks the network for nothing when nothing is missing.
define install_missing
	missing=(); \
	for package in $(1); do \
	    status=$$(dpkg-query -W -f '$${db:Status-Status}' "$$package" 2>/dev/null || true); \
	    [ "$$status" = installed ] || missing+=("$$package"); \
	done; \
	if [ $${#missing[@]} -gt 0 ]; then \
	    echo "Debian packages: $${missing[*]}"; \
	    [ "$$(id -u)" = 0 ] || { echo "make: installing them needs root: run sudo make setup" >&2; exit 1; }; \
	    apt-get update -q; \
	    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$${missing[@]}"; \
	fi
endef

.PHONY: guest-image
guest-image: setup ## Build the guest image in build/guest (downloads three packages once; kept).
	@$(BIN)/python -m lab image

# ---- the two commands of the README ---------------------------------------------------------------------------

.PHONY: demo
demo: guest-image ## One real VM from its start to its last freed port, in a lab of its own (root).
	@$(BIN)/python -m lab demo $(SITE_OPTION)

.PHONY: test
test: guest-image ## All tests: unit, real kernel, real libvirt and QEMU (root). ARGS goes to pytest.
	@$(BIN)/pytest -n $(PYTEST_JOBS) --dist loadfile $(ARGS)

.PHONY: test-release
test-release: ## RELEASE=trixie: checks, demo and all tests on another release of Debian, in a chroot (root, mmdebstrap).
	@tests/machines/chroot.sh "$(RELEASE)" make check demo test

.PHONY: docs
docs: $(VENV) ## The documentation as a site in build/site: open build/site/index.html.
	@$(BIN)/mkdocs build --quiet --strict

.PHONY: wheel
wheel: $(VENV) ## A wheel of the committed state in dist, for pip and pipx.
	@rm -rf build/wheel && mkdir -p build/wheel
	@git archive HEAD | tar -x -C build/wheel
	@$(MAKE) -C build/wheel programs
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist build/wheel
	@rm -rf build/wheel && ls -l dist/*.whl

.PHONY: deb
deb: $(addprefix deb-,$(RELEASES)) ## RELEASES="bookworm trixie": Debian packages of the committed state in build/deb/RELEASE (root, mmdebstrap).
	@:

deb-%:
	@debian/deb.sh "$*"

.PHONY: test-deb
test-deb: deb ## RELEASES="bookworm trixie": and the life of each, from its installation to its purge (root, mmdebstrap).
	@for release in $(RELEASES); do debian/test.sh "$$release"; done

# The releases run side by side, each in one process, because all tests of a release use one machine.
MACHINE_TESTS = $(BIN)/pytest -n 2 --dist loadgroup -p no:cacheprovider tests/machines

.PHONY: machine-images
machine-images: setup ## Disks of Debian 12 and 13 for test-machines, in /var/tmp (root; downloads both releases once).
	@$(call install_missing,$(PACKAGES_MACHINES))
	@$(BIN)/python -m tests.machines.image

.PHONY: test-machines
test-machines: guest-image ## The tutorial, and all that happens to a server, on whole machines of Debian 12 and 13 (root).
	@$(call install_missing,$(PACKAGES_MACHINES))
	@$(MAKE) -j 3 machine-images deb
	@$(MACHINE_TESTS) -m machines $(ARGS)

.PHONY: test-kernels
test-kernels: setup ## RELEASES="bookworm trixie": tests marked per_kernel under the kernels 6.1 and 6.12 (root, mmdebstrap).
	@$(call install_missing,$(PACKAGES_MACHINES))
	@$(BIN)/python -m tests.kernels $(RELEASES) -- $(ARGS)

.PHONY: fuzz
fuzz: $(VENV) ## N=1000000 SEED=s: damaged input of every kind, N each; prints the seed.
	@$(BIN)/python -m tests.fuzz $(or $(N),100000) $(if $(SEED),--seed $(SEED))

.PHONY: check
check: setup ## Style, types, import contracts, dead code. Changes nothing.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/vulture

.PHONY: manuals
manuals: $(VENV) ## Man pages, completions and the generated pages of docs/reference, from the code, into the tree.
	@$(BIN)/python -m cpm.cli.completion share
	@$(BIN)/python -m cpm.cli.manual share/man
	@$(BIN)/python -m cpm.cli.reference > docs/reference/cli.md.new && mv docs/reference/cli.md.new docs/reference/cli.md
	@$(BIN)/python -m cpm.api.reference > docs/reference/api.md.new && mv docs/reference/api.md.new docs/reference/api.md
	@$(BIN)/python -m cpm.api.openapi > docs/reference/openapi.json.new && mv docs/reference/openapi.json.new docs/reference/openapi.json
	@$(BIN)/python -m cpm.cli.output_reference docs/reference
	@$(BIN)/python -m cpm.cli.settings_reference > docs/reference/configuration.md.new && mv docs/reference/configuration.md.new docs/reference/configuration.md
	@$(BIN)/python -m cpm.api.event_reference > docs/reference/events.md.new && mv docs/reference/events.md.new docs/reference/events.md

.PHONY: bench
bench: guest-image ## The figures of the README; the last line is one JSON object (root).
	@$(BIN)/python -m bench

.PHONY: chaos
chaos: guest-image ## MINUTES=3 [SEED=n]: disturb a site at random under traffic; fails when anything broke (root).
	@$(BIN)/python -m chaos --minutes "$(MINUTES)" $(if $(SEED),--seed "$(SEED)") $(ARGS)

.PHONY: prove
prove: $(VENV) ## SEEDS=1000 [SEED=s] or MINUTES=3: random stories of a simulated site, each judged after every step.
	@$(BIN)/python -m prove $(STORIES_OPTION) $(if $(SEED),--seed "$(SEED)") $(ARGS)

# ---- the lab --------------------------------------------------------------------------------------------------

.PHONY: lab-up
lab-up: guest-image ## A site on this machine: 2 hosts with libvirtd, 2 edges, manager, router, internet (root).
	@$(LAB_COMMAND) up $(SITE_OPTION)

.PHONY: lab-down
lab-down: $(VENV) ## Remove the whole site, also after a crash (root).
	@$(LAB_COMMAND) down

.PHONY: lab-status
lab-status: $(VENV) ## Show the parts of the lab, and whether all of them run (root).
	@$(LAB_COMMAND) status

.PHONY: lab-guest
lab-guest: need-name ## NAME=a [HOST=host1]: start a light guest in namespace vp-a (root).
	@$(LAB_COMMAND) guest "$(NAME)" $(HOST_OPTION)

.PHONY: lab-guest-rm
lab-guest-rm: need-name ## NAME=a: remove it (root).
	@$(LAB_COMMAND) guest-rm "$(NAME)"

.PHONY: lab-vm
lab-vm: need-name ## NAME=v [HOST=host1]: start a real VM through libvirt (root).
	@$(LAB_COMMAND) vm "$(NAME)" $(HOST_OPTION)

.PHONY: lab-vm-rm
lab-vm-rm: need-name ## NAME=v: shut it down and remove it (root).
	@$(LAB_COMMAND) vm-rm "$(NAME)"

.PHONY: need-name
need-name: $(VENV)
	@[ -n "$(NAME)" ] || { echo "make: which guest? For example: make $(MAKECMDGOALS) NAME=a" >&2; exit 2; }

.PHONY: clean
clean: ## Remove what make made here: .venv, build, caches. Not the Debian packages, not a running lab.
	@[ ! -e /run/virt-ports-lab ] || { echo "make: a lab is up and uses these files: run make lab-down" >&2; exit 1; }
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
