# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""Runs the unit tests against each mutant of a file; goes on where an earlier run stopped.

Once: every test runs, and the lines of the three files that it reaches are noted. Then pytest collects, and a forked
child per mutant gets the changed function's code and runs the tests that reach the statement, the fastest first, until
one fails. What a module does while it is imported cannot be changed afterwards: such a mutant gets a pytest of its own.
Nothing is written to the files under test.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import gc
import hashlib
import importlib
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
import typing as t
from pathlib import Path

import hypothesis
import operators
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
UNITS = ROOT / "tests" / "unit" / "plugins" / "module_utils"
LIBRARY = ROOT / "plugins" / "module_utils"
PACKAGE = "ansible_collections.integrity.ima.plugins.module_utils"
FILES = ("_spool", "_verifier", "_snapshot")
FACTOR, GRACE = 5, 10.0  # a test may take FACTOR times its own time and GRACE seconds more
PATIENCE = 10  # by the clock it may take so many times what it may take of the processor
MOST_LEFT_OUT = 5  # tests that measure memory may fail while each line is noted
SLOW = 3.0  # seconds: a slower test is run only where no other reaches the statement
BUDGET = float(os.environ.get("MUTATION_BUDGET", "inf"))  # seconds of tests for one mutant, by their own time
KILLED, SURVIVED, TIMEOUT, UNREACHED = "killed", "survived", "timeout", "unreached"
Reached = t.Dict[str, t.Dict[str, t.Any]]  # by test: its file, seconds, and lines by file


def arguments(base: str, *more: str) -> list[str]:
    """The arguments of every pytest that is started here."""
    plain = ["-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-p", "no:xdist", "--assert=plain"]
    return [*plain, "--basetemp", base, "-q", "--tb=no", "--no-header", *more]


def quiet() -> None:
    """Send standard output nowhere, in this child."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def sha(*paths: Path) -> str:
    """One digest of some files."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(paths))).hexdigest()


# -- which test reaches what -------------------------------------------------------------------------------------------


class Recorder:
    """A pytest plugin: notes the lines of the files under test that each test reaches, and how long it takes."""

    def __init__(self) -> None:
        self.watched = {str(Path(importlib.import_module(f"{PACKAGE}.{f}").__file__)): f for f in FILES}
        self.tests: Reached = {}
        self.lines: set[tuple[str, int]] = set()
        self.failed: list[str] = []

    def _call(self, frame: types.FrameType, _event: str, _argument: t.Any) -> t.Any:
        return self._line if frame.f_code.co_filename in self.watched else None

    def _line(self, frame: types.FrameType, _event: str, _argument: t.Any) -> t.Any:
        self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> t.Iterator[None]:
        self.lines = set()
        started = time.process_time()
        threading.settrace(self._call)
        sys.settrace(self._call)
        yield
        sys.settrace(None)
        # None ends it, as for sys.settrace; the types of typeshed do not know.
        threading.settrace(None)  # type: ignore[arg-type]
        lines: dict[str, list[int]] = collections.defaultdict(list)
        for path, line in sorted(self.lines):
            lines[self.watched[path]].append(line)
        self.tests[item.nodeid] = {
            "file": str(item.path.relative_to(ROOT)),
            "seconds": round(time.process_time() - started, 4),
            "lines": lines,
        }

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def record(state: Path) -> Reached:
    """Return what each test reaches; only what changed since the last time is run."""
    library = sha(*LIBRARY.glob("*.py"), *(LIBRARY / "_store").glob("*.py"), *UNITS.glob("_*.py"))
    files = {str(path.relative_to(ROOT)): sha(path) for path in sorted(UNITS.glob("test_*.py"))}
    path = state / "reached.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = old.get("files", {}) if old.get("library") == library else {}
    stale = [name for name, digest in files.items() if known.get(name) != digest]
    tests = {n: test for n, test in old.get("tests", {}).items() if test["file"] in files and test["file"] not in stale}
    if stale:
        print(f"recording what the tests in {len(stale)} files reach", flush=True)

        def work() -> dict[str, t.Any]:
            recorder = Recorder()
            pytest.main(arguments(os.environ["MUTATION_TMP"] + "/record", *stale), plugins=[recorder])
            return {"failed": recorder.failed, "tests": recorder.tests}

        done = in_child(work)
        if not done or len(done["failed"]) > MOST_LEFT_OUT:
            sys.exit(f"the tests fail without any mutant: {done and done['failed'][:10]}")
        for name in done["failed"]:
            print(f"left out: it fails while its lines are noted: {name}")
            done["tests"].pop(name, None)
        tests.update(done["tests"])
        path.write_text(json.dumps({"library": library, "files": files, "tests": tests}), encoding="utf-8")
    return tests


def in_child(work: t.Callable[[], t.Any]) -> t.Any:
    """Run in a forked process, so that what it imports and traces stays there; return what it returns."""
    with tempfile.TemporaryFile() as file:
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                quiet()
                file.write(json.dumps(work()).encode())
                file.flush()
            os._exit(0)
        os.waitpid(pid, 0)
        file.seek(0)
        return json.loads(file.read() or b"null")


# -- which tests a mutant gets -----------------------------------------------------------------------------------------


class Choice:
    """Chooses the tests for a mutant."""

    def __init__(self, reached: Reached, file: str, tree: ast.Module) -> None:
        self.reached, self.file = reached, file
        self.by_line: dict[int, set[str]] = collections.defaultdict(set)
        for name, test in reached.items():
            for line in test["lines"].get(file, ()):
                self.by_line[line].add(name)
        self.tree = tree
        self.killers: dict[str, list[str]] = collections.defaultdict(list)  # by scope: what killed here before

    def _users(self, mutant: operators.Mutant) -> set[int]:
        """The lines that use what a statement of the module or a class defines."""
        owner = next((n for n in ast.walk(self.tree) if getattr(n, "lineno", 0) == mutant.lines[0]), None)
        if isinstance(owner, ast.FunctionDef):  # a default of an argument
            return set(range(owner.body[0].lineno, (owner.end_lineno or owner.lineno) + 1))
        targets = getattr(owner, "targets", None) or [getattr(owner, "target", None)]
        names = {each.id for each in targets if isinstance(each, ast.Name)}
        return {
            node.lineno
            for node in ast.walk(self.tree)
            if (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names)
            or (isinstance(node, ast.Attribute) and node.attr in names)
        }

    def reaching(self, mutant: operators.Mutant) -> set[str]:
        """The tests that reach it, without the slow ones if there are others."""
        lines = set(range(mutant.lines[0], mutant.lines[1] + 1)) if mutant.scope else self._users(mutant)
        names = {name for line in lines for name in self.by_line.get(line, ())}
        if not names and not mutant.scope:
            names = {name for reaching in self.by_line.values() for name in reaching}
        return {name for name in names if self.reached[name]["seconds"] <= SLOW} or names

    def order(self, mutant: operators.Mutant, names: t.Collection[str]) -> list[str]:
        """First what killed in this function before, then the fastest, as far as the budget goes.

        The tests that are named after the file go before the others. Of the others with parameters the fastest case
        has its turn, then all other tests, then its next case.
        """

        turns: collections.Counter[str] = collections.Counter()
        turn: dict[str, int] = {}
        for name in sorted(names, key=lambda each: (self.reached[each]["seconds"], each)):
            test = name.partition("[")[0]
            turn[name] = -1 if self.file in Path(self.reached[name]["file"]).stem else turns[test]
            turns[test] += 1
        first = [name for name in self.killers[mutant.scope] if name in names]
        chosen, spent = [], 0.0
        for name in dict.fromkeys([*first, *sorted(turn, key=lambda each: turn[each])]):
            spent += self.reached[name]["seconds"]
            if chosen and spent > BUDGET:
                break
            chosen.append(name)
        return chosen

    def killed(self, mutant: operators.Mutant, by: str) -> None:
        """Remember what killed it: it goes first in the same function, the newest before the others."""
        killers = self.killers[mutant.scope]
        if by in killers:
            killers.remove(by)
        killers.insert(0, by)
        del killers[10:]


# -- one mutant --------------------------------------------------------------------------------------------------------


def function_of(module: types.ModuleType, scope: str) -> types.FunctionType | None:
    """The live function of that qualified name, without what is wrapped around it."""
    place: t.Any = module
    for part in scope.split("."):
        place = vars(place).get(part)
    place = getattr(place, "fget", None) or getattr(place, "__func__", None) or place
    return place if isinstance(place, types.FunctionType) else None


def code_of(code: types.CodeType, scope: str) -> types.CodeType | None:
    """The code object of that qualified name."""
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            if each.co_qualname == scope:
                return each
            found = code_of(each, scope) if scope.startswith(each.co_qualname + ".") else None
            if found:
                return found
    return None


def change(mutant: operators.Mutant, tree: ast.Module) -> bool:
    """Give the live function its changed code. False: it cannot be had this way."""
    module = importlib.import_module(f"{PACKAGE}.{mutant.file}")
    function = function_of(module, mutant.scope) if mutant.scope else None
    new = code_of(compile(mutant.tree(tree), str(module.__file__), "exec"), mutant.scope) if function else None
    if function is None or new is None or new.co_freevars != function.__code__.co_freevars:
        return False
    function.__code__ = new
    return True


def replace_module(mutant: operators.Mutant, tree: ast.Module) -> None:
    """Import the changed file in the place of the real one, before anything else imports it."""
    name = f"{PACKAGE}.{mutant.file}"
    assert not any(each.startswith(f"{PACKAGE}._") for each in sys.modules), "it is imported already"
    spec = importlib.util.find_spec(name)
    assert spec and spec.origin
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    exec(compile(mutant.tree(tree), spec.origin, "exec"), module.__dict__)
    setattr(importlib.import_module(PACKAGE), mutant.file, module)


class FirstFailure:
    """A pytest plugin in the child: tells which test runs, and ends the process at the first that fails."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        os.write(self.pipe, nodeid.encode() + b"\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os._exit(1)


def limits() -> None:
    """Keep a mutant that runs wild from the machine."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 29, 1 << 29))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def cpu_of(pid: int) -> float:
    """Seconds of the processor that a child and its own children, those that ended, have used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def judge(work: t.Callable[[int], int], seconds: t.Callable[[str], float], start: float) -> tuple[str, str]:
    """Fork; ``work`` writes the name of each test that it begins to a pipe. Return the outcome and the last name."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        with contextlib.suppress(BaseException):
            os.close(reader)
            limits()
            quiet()
            code = work(writer)
        os._exit(code)
    os.close(writer)
    last, allowed, text = "", start, b""
    began = time.monotonic(), cpu_of(pid)
    try:
        while True:
            if not select.select([reader], [], [], GRACE)[0]:
                # Its own time counts, as others are at work here, too; an endless wait ends in the end.
                if cpu_of(pid) - began[1] > allowed or time.monotonic() - began[0] > PATIENCE * allowed:
                    return TIMEOUT, last
                continue
            data = os.read(reader, 1 << 16)
            if not data:
                break
            began = time.monotonic(), cpu_of(pid)
            text = (text + data)[-4096:]
            names = [name for name in text.split(b"\n")[:-1] if name]
            last = names[-1].decode(errors="replace") if names else last
            allowed = FACTOR * seconds(last) + GRACE
        ended_by = time.monotonic() + GRACE
        while time.monotonic() < ended_by:
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended:
                return (KILLED if ended.si_status else SURVIVED), last
            time.sleep(0.005)
        return TIMEOUT, last
    finally:
        os.close(reader)
        # What its tests started goes, too; until it is waited for, its number is nobody else's.
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# -- all mutants -------------------------------------------------------------------------------------------------------


class Results:
    """What is known of each mutant: one line each in a file, so that a run can stop at any time."""

    def __init__(self, state: Path, file: str) -> None:
        self.path = state / f"{file}.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.known = {each["name"]: each for each in map(json.loads, lines)}

    def add(self, mutant: operators.Mutant, outcome: str, key: str, by: str, seconds: float) -> None:
        word = {"name": mutant.name, "outcome": outcome, "key": key, "by": by, "seconds": round(seconds, 2)}
        self.known[mutant.name] = word
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(word) + "\n")


class Loop:
    """A pytest plugin: instead of running the tests once, runs some of them for each mutant."""

    def __init__(self, run: Run, failure: FirstFailure) -> None:
        self.run, self.failure = run, failure

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        gc.collect()
        gc.freeze()
        for mutant, names in self.run.todo:
            if mutant.scope:
                chosen = [items[name] for name in self.run.choice.order(mutant, names)]
                self.run.one(mutant, names, lambda pipe, m=mutant, c=chosen: self._child(session, m, c, pipe))
        return True

    def _child(self, session: pytest.Session, mutant: operators.Mutant, items: list[pytest.Item], pipe: int) -> int:
        session.config._tmp_path_factory._basetemp = self.run.fresh()
        session.config.get_terminal_writer()._file = open(os.devnull, "w", encoding="utf-8")
        self.failure.pipe = pipe
        if not change(mutant, self.run.tree):
            raise AssertionError("the change does not fit the function")
        for item, following in zip(items, [*items[1:], None]):
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
        return 0


class Run:
    """The mutants of one file."""

    def __init__(self, file: str, state: Path, reached: Reached, only: t.Collection[str], again: bool) -> None:
        source = (LIBRARY / f"{file}.py").read_text(encoding="utf-8")
        self.file, self.tree = file, ast.parse(source)
        self.mutants = operators.mutants(source, file)
        self.results = Results(state, file)
        self.choice = Choice(reached, file, self.tree)
        self.seconds = lambda name: reached[name]["seconds"] if name in reached else 0.0
        self.digests = {str(path.relative_to(ROOT)): sha(path)[:16] for path in UNITS.glob("*.py")}
        self.reached = reached
        self.listed = explained(file)
        self.todo: list[tuple[operators.Mutant, set[str]]] = []
        for mutant in self.mutants:
            names = self.choice.reaching(mutant)
            if mutant.name in only or (not only and self._open(mutant, names, again)):
                self.todo.append((mutant, names))

    def _key(self, names: t.Collection[str]) -> str:
        """What a survivor survived: which tests, in which files, within which budget."""
        files = sorted({self.digests[self.reached[name]["file"]] for name in names})
        return hashlib.sha256("\0".join([str(BUDGET), *sorted(names), *files]).encode()).hexdigest()[:16]

    def _open(self, mutant: operators.Mutant, names: t.Collection[str], again: bool) -> bool:
        known = self.results.known.get(mutant.name)
        if known is None:
            return True
        if known["outcome"] in (KILLED, TIMEOUT):
            return False
        return known["key"] != self._key(names) and (again or mutant.name not in self.listed)

    @staticmethod
    def fresh() -> Path:
        """An empty directory for the tests of one child."""
        path = Path(os.environ["MUTATION_TMP"], "mutant")
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def one(self, mutant: operators.Mutant, names: set[str], work: t.Callable[[int], int], start: float = 0) -> None:
        """Judge one mutant, and note it."""
        began = time.monotonic()
        outcome, last = judge(work, self.seconds, GRACE + start)
        if outcome != SURVIVED and last:
            self.choice.killed(mutant, last)
        self.results.add(mutant, outcome, self._key(names), last, time.monotonic() - began)
        if outcome == SURVIVED:
            print(f"  {shown(mutant)}", flush=True)

    def go(self) -> None:
        """Run what is open."""
        for mutant, names in self.todo:
            if not names:
                self.results.add(mutant, UNREACHED, self._key(names), "", 0.0)
        self.todo = [(mutant, names) for mutant, names in self.todo if names]
        print(f"{self.file}.py: {len(self.mutants)} mutants, {len(self.todo)} to run", flush=True)
        # First, while nothing of the collection is imported.
        for mutant, names in self.todo:
            if not mutant.scope:
                ordered = self.choice.order(mutant, names)
                self.one(mutant, names, lambda pipe, m=mutant, n=ordered: self._alone(m, n, pipe), start=60)
        base = os.environ["MUTATION_TMP"]
        files = sorted({self.reached[name]["file"] for m, names in self.todo if m.scope for name in names})
        if files:
            failure = FirstFailure(-1)
            pytest.main(arguments(base + "/collect", *files), plugins=[failure, Loop(self, failure)])

    def _alone(self, mutant: operators.Mutant, names: list[str], pipe: int) -> int:
        replace_module(mutant, self.tree)
        return int(pytest.main(arguments(str(self.fresh()), *names), plugins=[FirstFailure(pipe)]))

    def report(self) -> tuple[collections.Counter[str], list[operators.Mutant], set[str]]:
        """Return the counts, who lives, and the names in survivors.md that are not among them."""
        outcomes = {each.name: self.results.known.get(each.name, {}).get("outcome", "open") for each in self.mutants}
        alive = [each for each in self.mutants if outcomes[each.name] in (SURVIVED, UNREACHED)]
        return collections.Counter(outcomes.values()), alive, set(self.listed) - {each.name for each in alive}


def shown(mutant: operators.Mutant) -> str:
    """One line that tells a mutant."""
    before, after = mutant.before, mutant.after
    if len(before) + len(after) > 300:
        before, after = before[:300], after[:300]
    return f"{mutant.name} {mutant.file}.py:{mutant.lines[0]} {mutant.scope or '(module)'} {before} -> {after}"


def explained(file: str) -> dict[str, str]:
    """The survivors with a reason why they may live: name to reason."""
    path = HERE / "survivors.md"
    rows = re.findall(r"^\| `([0-9a-f]{8})` \| `(\w+)\.py` \|.*\| ([^|]+) \|$", path.read_text(encoding="utf-8"), re.M)
    return {name: reason for name, where, reason in rows if where == file}


def summary(runs: t.Sequence[Run]) -> int:
    """Print the table and the survivors; return 1 when one has no reason, or a mutant was not run."""
    open_ones = 0
    table = []
    for run in runs:
        counts, alive, gone = run.report()
        total = len(run.mutants)
        ran = total - counts["open"]
        dead = counts[KILLED] + counts[TIMEOUT]
        unlisted = [each for each in alive if each.name not in run.listed]
        for mutant in unlisted:
            print(f"survivor without a reason: {shown(mutant)}")
        for name in sorted(gone) if not counts["open"] else ():
            print(f"survivors.md names {name} of {run.file}.py, which does not live (any more)")
        score = f"{100 * dead / ran:.1f} %" if ran else "-"
        table.append(
            f"{run.file + '.py':14} {total:7} {ran:7} {counts[KILLED]:7} {counts[TIMEOUT]:9} {len(alive):9} "
            f"{len(alive) - len(unlisted):11} {score:>7}"
        )
        open_ones += len(unlisted) + counts["open"] + (0 if counts["open"] else len(gone))
    heads = ("mutants", "run", "killed", "timed out", "survived", "with reason", "score")
    print(f"{'file':14} " + " ".join(f"{head:>{max(7, len(head))}}" for head in heads))
    print("\n".join(table))
    return int(open_ones > 0)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", default=list(FILES), help="_spool, _verifier, _snapshot")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--report", action="store_true", help="print what is known; run nothing")
    parser.add_argument("--again", action="store_true", help="the survivors that have a reason, too")
    parser.add_argument("--only", default="", help="names of mutants, with commas between them")
    options = parser.parse_args()
    files = [Path(name).stem for name in options.files]
    options.state.mkdir(parents=True, exist_ok=True)
    hypothesis.settings.register_profile(
        "mutation",
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("mutation")
    os.chdir(ROOT)
    if options.report:
        reached: Reached = {}
    else:
        reached = record(options.state)
    runs = []
    for file in files:
        if not options.report:
            # The mutants of a file run in a child: pytest and the changed modules leave nothing behind.
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    Run(file, options.state, reached, set(filter(None, options.only.split(","))), options.again).go()
                    code = 0
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            if os.waitpid(pid, 0)[1]:
                return 1
        runs.append(Run(file, options.state, reached, {"none"}, False))
    return summary(runs)


if __name__ == "__main__":
    sys.exit(main())
