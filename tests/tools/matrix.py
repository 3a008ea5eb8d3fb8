# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the tests with every ansible-core that the collection supports, and a cycle with old and new managed Pythons.

usage: matrix.py DIRECTORY [--core VERSION,...] [--only STEP,...]    (make matrix MATRIX="--core 2.20 --only sanity")

The controllers are those of requirements/matrix.txt. Each has an environment and a copy of the collection of its own in
DIRECTORY, where the logs lie, too. A Python that this machine lacks is skipped, counted and printed; REQUIRE_ALL=1
makes that a failure.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import typing as t

TOOLS = pathlib.Path(__file__).resolve().parent
ROOT = TOOLS.parents[1]
MANAGED = ("3.8", "3.9", "3.11", "3.13")
STEPS = ("sanity", "units", "units-oldest", "integration", *(f"cycle {version}" for version in MANAGED))
# What the steps need beside ansible-core; the linters, which do not depend on it, run in make lint.
PACKAGES = ("boto3", "hypothesis", "jsonschema", "mock", "paramiko", "pytest", "pytest-mock", "pytest-xdist")


class Row(t.NamedTuple):
    """What became of one step of one controller."""

    core: str
    python: str
    step: str
    outcome: str
    seconds: int
    note: str


def python_of(version: str) -> str | None:
    """Return the path of an interpreter of that version, on the PATH or among those of pyenv."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"), "versions")
    places = [pathlib.Path(each) for each in os.environ["PATH"].split(":") if each]
    test = "import ssl, sys, venv; print(sys.executable); sys.exit('%d.%d' % sys.version_info[:2] != sys.argv[1])"
    for place in [*places, *sorted(pyenv.glob(f"{version}.*/bin"))]:
        path = place / f"python{version}"
        if os.access(path, os.X_OK):
            said = subprocess.run([path, "-c", test, version], capture_output=True, text=True, check=False)
            if said.returncode == 0:
                return said.stdout.strip()
    return None


def controllers() -> list[tuple[str, str]]:
    """Return the versions of ansible-core and of Python."""
    text = (ROOT / "requirements" / "matrix.txt").read_text("utf-8")
    return re.findall(r'^ansible-core==([\w.]+) ; python_version == "([\d.]+)"$', text, re.M)


def call(log: pathlib.Path, *command: str | pathlib.Path, **environment: str | pathlib.Path) -> bool:
    """Run a command with its output in a file."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "PYTHON"))}
    variables.update({name: str(value) for name, value in environment.items()}, ANSIBLE_NOCOWS="1")
    with log.open("ab") as file:
        return subprocess.run(command, stdout=file, stderr=file, env=variables, check=False).returncode == 0


class Controller:
    """One ansible-core on one Python."""

    def __init__(self, directory: pathlib.Path, core: str, version: str) -> None:
        self.core, self.version = core, version
        self.directory = directory / ".".join(core.split(".")[:2])
        self.stage = self.directory / "ansible_collections" / "integrity" / "ima"
        self.venv = self.directory / "venv"
        self.bin = self.venv / "bin"
        self.installed = self.directory / "collections"
        self.directory.mkdir(parents=True, exist_ok=True)

    def log(self, step: str) -> pathlib.Path:
        """Return the file for a step's output, empty."""
        path = self.directory / f"{step.replace(' ', '-')}.log"
        path.write_bytes(b"")
        return path

    def prepare(self, python: str) -> bool:
        """Make the environment and the copy of the collection, and install the built collection."""
        log, pins = self.log("prepare"), self.directory / "requirements.txt"
        texts = [(ROOT / "requirements" / name).read_text("utf-8") for name in ("demo.txt", "test.txt")]
        pinned = re.findall(r"^([\w.-]+)(==.*)$", "\n".join(texts), re.M)
        chosen = [f"{name}{rest}" for name, rest in pinned if name != "ansible-core"]
        constraints = self.directory / "constraints.txt"
        constraints.write_text("\n".join([*chosen, f"ansible-core=={self.core}", ""]), "utf-8")
        pins.write_text("\n".join([f"-c {constraints}", "ansible-core", *PACKAGES, ""]), "utf-8")
        galaxy, artefact = self.bin / "ansible-galaxy", self.directory / "artefact"
        shutil.rmtree(artefact, ignore_errors=True)
        shutil.rmtree(self.installed, ignore_errors=True)
        return (
            call(log, TOOLS / "venv.sh", python, self.venv, pins)
            and call(log, TOOLS / "stage.sh", self.stage)
            and call(log, galaxy, "collection", "build", self.stage, "--output-path", artefact)
            and call(
                log, galaxy, "collection", "install", "--offline", "-p", self.installed, *artefact.glob("*.tar.gz")
            )
            and call(log, TOOLS / "pythons.sh", self.bin / "python", self.directory / "pythons")
        )

    def targets(self) -> list[str]:
        """Return the Pythons that this ansible-core can manage, by its own word."""
        code = "import ansible_test; print(ansible_test.__path__[0])"
        said = subprocess.run([self.bin / "python", "-c", code], capture_output=True, text=True, check=True)
        file = pathlib.Path(said.stdout.strip(), "_util", "target", "common", "constants.py")
        return re.findall(r"'(3\.\d+)'", file.read_text("utf-8"))

    def oldest(self) -> pathlib.Path:
        """Return the link to the oldest Python that this ansible-core can manage and this machine has."""
        return min((self.directory / "pythons").iterdir(), key=lambda each: int(each.name[8:]))

    def run(self, step: str) -> tuple[str, str]:
        """Run one step; return its outcome and a note."""
        if step.startswith("cycle"):
            version = step.split()[1]
            if version not in self.targets():
                return "not supported", f"ansible-core {self.core} cannot manage Python {version}"
            python = python_of(version)
            if python is None:
                return "SKIPPED", f"no Python {version} on this machine"
            work = self.directory / f"cycle-{version}"
            shutil.rmtree(work, ignore_errors=True)
            arguments = [f"work={work}", f"ansible_python_interpreter={python}", f"controller_python={self.bin}/python"]
            command = [self.bin / "ansible-playbook", "-i", "localhost,", self.stage / "tests" / "tools" / "matrix.yml"]
            done = call(
                self.log(step),
                *command,
                *(part for each in arguments for part in ("-e", each)),
                ANSIBLE_COLLECTIONS_PATH=self.installed,
            )
        elif step == "integration":
            done = call(
                self.log(step),
                self.stage / "tests" / "integration" / "run.sh",
                PATH=f"{self.bin}:{os.environ['PATH']}",
                ANSIBLE_COLLECTIONS_PATH=self.installed,
                ANSIBLE_PYTHON_INTERPRETER=self.bin / "python",
                MANAGED_PYTHON=self.oldest(),
            )
        else:
            done = call(self.log(step), TOOLS / "ansible_test.sh", self.venv, self.stage, step)
        return ("passed" if done else "FAILED"), self.note(step)

    def note(self, step: str) -> str:
        """Return what a step said of itself."""
        text = (self.directory / f"{step.replace(' ', '-')}.log").read_text("utf-8", "replace")
        last = re.findall(r"^=+ (.*(?:passed|failed|error).*?) in .*=+$|^(SKIPPED target.*)$", text, re.M)
        pythons = re.findall(r"managed Python Python (\S+)", text)
        return "; ".join([*(one or other for one, other in last), *(f"managed Python {each}" for each in pythons)])


def table(rows: t.Sequence[Row]) -> str:
    """Return all that ran as lines."""
    head = Row("ansible-core", "Python", "step", "outcome", 0, "")
    widths = [max(len(str(row[column])) for row in [head, *rows]) for column in range(4)]
    lines = []
    for row in [head, *rows]:
        cells = "  ".join(str(row[column]).ljust(widths[column]) for column in range(4))
        seconds = "seconds" if row is head else f"{row.seconds:7}"
        lines.append(f"{cells}  {seconds}  {row.note}".rstrip())
    return "\n".join(lines)


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--core", default="", help="2.19,2.20")
    parser.add_argument("--only", default="", help="first words of steps")
    options = parser.parse_args()
    cores, only = options.core.split(","), tuple(options.only.split(","))
    rows: list[Row] = []
    oldest: dict[str, str] = {}  # the ansible-core with which that Python has passed

    def add(*row: t.Any) -> None:
        rows.append(Row(*row))
        print(f"{rows[-1].outcome}: ansible-core {row[0]} on {row[1]}, {row[2]} ({row[4]} s) {row[5]}", flush=True)

    for core, version in controllers():
        if not core.startswith(tuple(cores)):
            continue
        steps = [step for step in STEPS if step.startswith(only)]
        controller = Controller(options.directory.resolve(), core, version)
        python = python_of(version)
        if python is None:
            for step in steps:
                add(core, version, step, "SKIPPED", 0, f"no Python {version} on this machine")
            continue
        start = time.monotonic()
        if not controller.prepare(python):
            add(core, version, "prepare", "FAILED", int(time.monotonic() - start), "")
            print((controller.directory / "prepare.log").read_text("utf-8", "replace")[-4000:])
            continue
        for step in steps:
            start, target = time.monotonic(), controller.oldest().name
            # what these tests import holds nothing of ansible-core: with another one the same would run again
            if step == "units-oldest" and target in oldest:
                add(core, version, step, "not repeated", 0, f"{target} passed with ansible-core {oldest[target]}")
                continue
            outcome, note = controller.run(step)
            if step == "units-oldest" and outcome == "passed":
                oldest[target] = core
            add(core, version, step, outcome, int(time.monotonic() - start), note)
            if outcome == "FAILED":
                log = controller.directory / f"{step.replace(' ', '-')}.log"
                print(f"{log}\n{log.read_text('utf-8', 'replace')[-6000:]}", flush=True)

    counts = {
        word: sum(row.outcome == word for row in rows)
        for word in ("passed", "FAILED", "SKIPPED", "not supported", "not repeated")
    }
    print(f"\n{table(rows)}\n\nmatrix: " + ", ".join(f"{count} {word}" for word, count in counts.items()))
    return int(not rows or counts["FAILED"] > 0 or (os.environ.get("REQUIRE_ALL") == "1" and counts["SKIPPED"] > 0))


if __name__ == "__main__":
    sys.exit(main())
