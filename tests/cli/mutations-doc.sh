#!/bin/sh
# SPDX-License-Identifier: MIT
# Every mutation in the source is run by scripts/run-mutations and has a row in tests/MUTATIONS.md, which names tests that there are.
exec "${SOURCE_ROOT:?}/scripts/run-mutations" --check
