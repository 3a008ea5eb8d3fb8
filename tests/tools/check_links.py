# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Follow every link of the Markdown files that leads to a file of the repository, and to a heading in it."""

from __future__ import annotations

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
# README.md is shown on other sites, too: its links are addresses.
OURS = re.compile(r"https://github\.com/integrity-ima/integrity\.ima/(?:blob|tree)/main/(.*)")
BLOCK = re.compile(r"^\s*```.*?^\s*```", re.MULTILINE | re.DOTALL)


def anchors(path: pathlib.Path) -> set[str]:
    """Return what leads to the headings of a file, as the hosting site makes it."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def problem(path: pathlib.Path, link: str) -> str | None:
    """Return what is wrong with a link in a file, or None."""
    ours = OURS.match(link)
    if not ours and re.match(r"[a-z]+:", link):
        return None
    name, _sharp, anchor = (ours.group(1) if ours else link).partition("#")
    target = (ROOT if ours else path.parent) / name if name else path
    if not target.exists():
        return "there is no such file"
    if anchor and target.suffix == ".md" and anchor not in anchors(target):
        return "there is no such heading"
    return None


def main() -> int:
    """Check all files."""
    count, wrong = 0, 0
    for path in sorted(ROOT.rglob("*.md")):
        inside = path.relative_to(ROOT).parts
        if inside[0] == "build" or any(part.startswith(".") for part in inside):
            continue
        for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", path.read_text("utf-8"))):
            count += 1
            said = problem(path, link)
            if said:
                wrong += 1
                print(f"{path.relative_to(ROOT)}: {link}: {said}")
    print(f"{count} links, {wrong} of them lead nowhere.")
    return 1 if wrong or not count else 0


if __name__ == "__main__":
    sys.exit(main())
