# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the commands of a page as they are written, in one shell, and compare what they print with what the page shows.

usage: tutorial.py PAGE    (the environment, HOME above all, is the caller's)

A comment before each fenced block says what it is: `run`, `run, exit N`, or `shows` (lines of the output of the block
before, in this order; `...` stands for anything, blanks count as one). A block without such a comment is an error, so
none is forgotten.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import typing as t

BLOCK = re.compile(r"^(?:<!-- (?P<mark>run(?:, exit (?P<exit>\d+))?|shows) -->\n)?```(?P<body>.*?)^```$", re.M | re.S)
MARK = "=====tutorial====="


class Step(t.NamedTuple):
    """A block to run, and the lines that it must print."""

    line: int
    commands: str
    status: int
    shows: list[str]


def steps(page: str) -> list[Step]:
    """Return the blocks of a page in order."""
    found: list[Step] = []
    for block in BLOCK.finditer(page):
        line = page.count("\n", 0, block.start()) + 1
        text = block["body"].partition("\n")[2]
        if block["mark"] is None:
            raise SystemExit(f"error: line {line}: a block without a comment that says run or shows")
        if block["mark"] != "shows":
            found.append(Step(line, text, int(block["exit"] or 0), []))
        elif not found or found[-1].shows:
            raise SystemExit(f"error: line {line}: shows the output of no block")
        else:
            found[-1].shows.extend(text.splitlines())
    if len(found) < 2:
        raise SystemExit("error: the page has no commands")
    return found


def script(found: t.Iterable[Step]) -> str:
    """Return one script for one shell. Only the last command of a block may fail, and only where the page says so."""
    parts = ["set -o pipefail\n"]
    for number, step in enumerate(found):
        if step.status == 0:
            parts.append(f"set -e\n{step.commands}set +e\n")
        else:
            first, last = step.commands.rstrip("\n").rpartition("\n")[::2]
            parts.append(f"set -e\n{first}\nset +e\n{last}\n")
            parts.append(f'status=$?; [ $status = {step.status} ] || {{ echo "exit code $status"; exit 1; }}\n')
        parts.append(f"printf '\\n%s\\n' '{MARK}{number}'\n")
    return "".join(parts)


def missing(shows: t.Iterable[str], output: str) -> str | None:
    """Return the first line of what a page shows that is not in the output behind the lines before it."""
    lines = iter([" ".join(line.split()) for line in output.splitlines()])
    for line in shows:
        pattern = re.compile(".*".join(re.escape(part) for part in " ".join(line.split()).split("...")))
        if not any(pattern.search(each) for each in lines):
            return line
    return None


def main() -> int:
    """Run the page that is named."""
    page = pathlib.Path(sys.argv[1])
    found = steps(page.read_text("utf-8"))
    done = subprocess.run(
        ["/bin/bash", "-s"],
        input=script(found),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    rest = done.stdout
    for number, step in enumerate(found):
        output, mark, rest = rest.partition(f"\n{MARK}{number}\n")
        where = f"{page.name}, line {step.line}"
        if not mark:
            print(f"{output}\nerror: {where}: the commands did not end as the page says")
            return 1
        gone = missing(step.shows, output)
        if gone is not None:
            print(f"{output}\nerror: {where}: the output lacks what the page shows: {gone}")
            return 1
    print(f"{page.name}: {len(found)} blocks ran as written, {sum(len(step.shows) for step in found)} lines as shown")
    return 0


if __name__ == "__main__":
    sys.exit(main())
