#!/bin/sh
# SPDX-License-Identifier: MIT
# docs/kernel-names.md: every name of ours that it gives exists, and it has every name that a driver can take for the kernel's.
python3 - "${SOURCE_ROOT:?}" <<'PYTHON'
import pathlib, re, sys

root = pathlib.Path(sys.argv[1])
source = "\n".join(p.read_text() for d in ("include", "src") for p in sorted((root / d).rglob("*.[ch]")))
known = set(re.findall(r"\w+", source))
text = (root / "docs/kernel-names.md").read_text()
table = text[text.index("| kernel | here |"):].split("\n\n", 1)[0].splitlines()[2:]


def names(cell):
    """What stands between backticks; `_READ` after `HMM_PFN_WRITE` is HMM_PFN_READ."""
    found, full = [], ""
    for code in re.findall(r"`([^`]*)`", cell):
        for name in re.findall(r"\w{3,}", code):
            if not name.startswith("_"):
                full = name
                found.append(name)
                continue
            stems = [full[:i] for i in range(len(full), 0, -1) if full[i:i + 1] in ("_", "")]
            found.append(next((stem + name for stem in stems if stem + name in known), name))
    return found


ours = set()
for line in table:
    cells = [c.strip() for c in line.strip("|").split("|")]
    for name in names(cells[1]):
        assert name in known, f"docs/kernel-names.md: `{name}` of the row of {cells[0]} is nowhere in include/ or src/"
    for cell in cells if "the same" in cells[1] else cells[1:]:
        ours.update(names(cell))

header = re.sub(r"/\*.*?\*/", "", (root / "include/hmm/driver.h").read_text(), flags=re.S)
wanted = set(re.findall(r"\b(hmm_notifier_\w+|hmm_range_fault\w*|hmm_mirror_\w+)(?=\()", header))
wanted |= set(re.findall(r"\b(?:HMM_EVENT|HMM_PFN)_[A-Z_]+\b", header))
missing = sorted(wanted - ours)
assert len(wanted) > 30, f"only {len(wanted)} names were found in driver.h"
assert not missing, f"docs/kernel-names.md does not have {', '.join(missing)}"
print(f"{len(ours)} names, {len(wanted)} of driver.h")
PYTHON
