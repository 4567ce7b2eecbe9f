# SPDX-License-Identifier: MIT
# A thin front of the Meson build: `make help` says what there is. Everything is built in build/.

BUILD  ?= build
PREFIX ?= /usr/local
MESON  ?= meson

.PHONY: all demo test bench install check-layers format clean help setup configured

all: configured
	@$(MESON) compile -C $(BUILD)

setup:
	@scripts/setup

# Meson gathers the sources when it configures, so a file that came or went makes it do so again.
configured:
	@now=$$(find src drivers tools bench examples tests -name '*.c' -o -name '*.sh' | sort); \
	if [ ! -f $(BUILD)/build.ninja ]; then \
	    command -v $(MESON) >/dev/null || { echo "meson is not installed: run scripts/setup" >&2; exit 1; }; \
	    $(MESON) setup $(BUILD) --prefix $(PREFIX) || exit 1; \
	elif [ "$$now" != "$$(cat $(BUILD)/sources 2>/dev/null)" ]; then \
	    $(MESON) setup --reconfigure $(BUILD) >/dev/null || exit 1; \
	fi; \
	echo "$$now" >$(BUILD)/sources

demo: setup
	@$(MAKE) --no-print-directory all
	@$(BUILD)/hmm demo

test: setup
	@$(MAKE) --no-print-directory all
	@$(MESON) test -C $(BUILD) --no-rebuild --print-errorlogs

bench: all
	@$(BUILD)/hmm bench

# The prefix is written into the pkg-config file, so a changed one is configured first.
install: configured
	@$(MESON) configure $(BUILD) -Dprefix=$(PREFIX)
	@$(MESON) compile -C $(BUILD)
	@DESTDIR=$(DESTDIR) $(MESON) install -C $(BUILD) --no-rebuild

check-layers: all
	@scripts/check-layers . $(BUILD)

format:
	@git ls-files --cached --others --exclude-standard '*.c' '*.h' | xargs clang-format -i

clean:
	rm -rf $(BUILD)

help:
	@echo 'make               build the library and the command into $(BUILD)/'
	@echo 'make demo          install what is missing, build, and run $(BUILD)/hmm demo'
	@echo 'make test          install what is missing, build, and run all tests'
	@echo 'make bench         run all benchmarks: $(BUILD)/hmm bench'
	@echo 'make install       install below PREFIX (default /usr/local), staged in DESTDIR'
	@echo 'make check-layers  check the direction of includes and the exported names'
	@echo 'make format        run clang-format over all sources'
	@echo 'make clean         remove $(BUILD)/'
	@echo 'scripts/setup --ci installs what .ci/run needs in addition'
