#!/bin/sh
# SPDX-License-Identifier: MIT
# docs/locking.md names every rank in its order, every file that makes a lock in the row of its rank, and who changes a page's state by
# the functions that do.
python3 - "${SOURCE_ROOT:?}" <<'PYTHON'
import pathlib, re, sys

root = pathlib.Path(sys.argv[1])
text = (root / "docs/locking.md").read_text()
table = text[text.index("| rank | lock |"):].split("\n\n", 1)[0].splitlines()[2:]
rows, rank = {}, None
order = []
for line in table:
    cells = [c.strip() for c in line.strip("|").split("|")]
    if cells[0]:
        rank = cells[0].strip("`")
        order.append(rank)
    for name in cells[2].split(", "):
        rows.setdefault(rank, set()).add(name)

header = (root / "src/base/lock.h").read_text()
ranks = re.findall(r"^    (RANK_[A-Z]+)", header[header.index("enum lock_rank"):], re.M)
assert order == ranks, f"the page has {order}, lock.h has {ranks}"

for path in sorted((root / "src").rglob("*.c")):
    name = str(path.relative_to(root))
    if name == "src/base/lock.c":
        continue
    for rank in re.findall(r"(?:mutex_init|rwlock_init|MUTEX_INITIALIZER)\([^;]*?(RANK_[A-Z]+)\)", path.read_text()):
        assert name in rows[rank], f"{name} makes a lock of {rank}; docs/locking.md does not say so"
        rows.setdefault("seen", set()).add((rank, name))
seen = rows.pop("seen")
for rank, names in rows.items():
    for name in names:
        assert (rank, name) in seen, f"docs/locking.md: {name} makes no lock of {rank}"

table = text[text.index("| transition | by | held |"):].split("\n\n", 1)[0].splitlines()[2:]
sources = "\n".join(p.read_text() for p in sorted((root / "src").rglob("*.c")))
functions = set(re.findall(r"^[a-z][\w *]*?\b(\w+)\([^;{]*\)\n\{", sources, re.M))
by = [name for line in table for name in re.findall(r"`(\w+)\(\)`", line.strip("|").split("|")[1])]
assert len(by) >= 6, f"only {by} were found in the table of transitions"
for name in by:
    assert name in functions, f"docs/locking.md: no function {name}() is defined in src/"
print(f"{len(seen)} locks of {len(ranks)} ranks, {len(set(by))} functions")
PYTHON
