# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The mutants of a Python file: each is its syntax tree with one small change.

What only words messages is left alone: f-strings, docstrings, texts with blanks, ``WORDS`` and what
``SAYING`` calls say.
"""

from __future__ import annotations

import ast
import collections
import copy
import hashlib
import re
import typing as t

WORDS = frozenset(("kept", "hint", "path"))  # error details that are for people
SAYING = frozenset(("failing", "warn"))  # calls whose arguments are words for people
WORD = re.compile(r"[A-Za-z0-9_.,:/+-]{1,40}\Z")

COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
NEGATED = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)  # swapping these negates the comparison
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.Mod: ast.Mult,
}
CALLED = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}

Step = t.Union[str, int]
Steps = t.Tuple[Step, ...]
Change = t.Tuple[str, ast.AST]  # what the operator is called, and what stands there instead


class Mutant(t.NamedTuple):
    """One change. ``name`` stays the same as long as the function around it does."""

    name: str
    file: str
    scope: str  # qualified name of the outermost function; "" in the module's or a class's own code
    lines: tuple[int, int]  # of the statement (its head, if it has a body)
    before: str
    after: str
    steps: Steps
    new: ast.AST

    def tree(self, module: ast.Module) -> ast.Module:
        """Return the file's tree with the change."""
        tree = copy.deepcopy(module)
        put(tree, self.steps, self.new)
        return ast.fix_missing_locations(tree)


def put(root: ast.AST, steps: Steps, new: ast.AST) -> None:
    """Replace what is at the end of ``steps``."""
    place: t.Any = root
    for step in steps[:-1]:
        place = getattr(place, step) if isinstance(step, str) else place[step]
    new = copy.deepcopy(new)
    if isinstance(steps[-1], str):
        old = getattr(place, steps[-1])
        setattr(place, steps[-1], new)
    else:
        old = place[steps[-1]]
        place[steps[-1]] = new
    for node in ast.walk(new):
        if "lineno" in node._attributes and not hasattr(node, "lineno"):
            ast.copy_location(node, old)


# -- the operators -----------------------------------------------------------------------------------------------------


def _not(node: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), node)


def _condition(node: ast.expr) -> list[Change]:
    """Negate a condition, unless another operator does the same."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], NEGATED):
        return []
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return []
    return [("negate", _not(node))]


def _compare(node: ast.Compare) -> t.Iterator[Change]:
    for number, op in enumerate(node.ops):
        other = COMPARED[type(op)]()
        yield (
            "compare",
            ast.Compare(node.left, [*node.ops[:number], other, *node.ops[number + 1 :]], node.comparators),
        )


def _boolean(node: ast.BoolOp) -> t.Iterator[Change]:
    yield "and/or", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    for number in range(len(node.values)):
        rest = node.values[:number] + node.values[number + 1 :]
        yield "drop operand", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)


def _constant(node: ast.Constant) -> t.Iterator[Change]:
    value = node.value
    if isinstance(value, bool):
        yield "constant", ast.Constant(not value)
    elif isinstance(value, (int, float)):
        yield "constant", ast.Constant(value + 1)
    elif isinstance(value, bytes):
        yield "constant", ast.Constant(b"X" + value)
    elif isinstance(value, str) and (not value or WORD.match(value)):
        yield "constant", ast.Constant("X" + value)


def _call(node: ast.Call) -> t.Iterator[Change]:
    if isinstance(node.func, ast.Name) and node.func.id in CALLED:
        name = CALLED[node.func.id]
        plain = [] if name == "list" else node.keywords
        yield "call", ast.Call(ast.Name(name, ast.Load()), node.args, plain)
    for number, keyword in enumerate(node.keywords):
        if keyword.arg not in WORDS:
            yield (
                "drop argument",
                ast.Call(node.func, node.args, node.keywords[:number] + node.keywords[number + 1 :]),
            )


def _slice(node: ast.Slice) -> t.Iterator[Change]:
    if node.lower:
        yield "slice", ast.Slice(None, node.upper, node.step)
    if node.upper:
        yield "slice", ast.Slice(node.lower, None, node.step)


def _handler(node: ast.ExceptHandler) -> t.Iterator[Change]:
    if isinstance(node.type, ast.Tuple):
        for number in range(len(node.type.elts)):
            rest = node.type.elts[:number] + node.type.elts[number + 1 :]
            yield "except", ast.ExceptHandler(ast.Tuple(rest, ast.Load()), node.name, node.body)
    if not isinstance(node.body[0], ast.Raise):
        yield "except", ast.ExceptHandler(node.type, node.name, [ast.Raise()])


def _statement(node: ast.stmt) -> t.Iterator[Change]:
    if isinstance(node, ast.Return) and node.value and ast.unparse(node.value) != "None":
        yield "return", ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Raise):
        yield "remove", ast.Pass()
    elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
        yield "remove", ast.Pass()
    elif isinstance(node, ast.Assign) and all(isinstance(e, (ast.Attribute, ast.Subscript)) for e in node.targets):
        yield "remove", ast.Pass()
    elif isinstance(node, ast.Break):
        yield "break", ast.Continue()
    elif isinstance(node, ast.Continue):
        yield "break", ast.Break()
    elif isinstance(node, ast.For):
        yield "never", ast.For(node.target, ast.Tuple([], ast.Load()), node.body, node.orelse)
    elif isinstance(node, ast.AugAssign):
        yield "remove", ast.Pass()
        other = COMPUTED.get(type(node.op))
        if other:
            yield "compute", ast.AugAssign(node.target, other(), node.value)


def changes(node: ast.AST) -> t.Iterator[Change]:
    """Yield what can stand in place of a node."""
    if isinstance(node, ast.stmt):
        yield from _statement(node)
    elif isinstance(node, ast.Compare):
        yield from _compare(node)
    elif isinstance(node, ast.BoolOp):
        yield from _boolean(node)
    elif isinstance(node, ast.UnaryOp):
        yield "drop sign", node.operand
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
        yield "compute", ast.BinOp(node.left, COMPUTED[type(node.op)](), node.right)
    elif isinstance(node, ast.Constant):
        yield from _constant(node)
    elif isinstance(node, ast.Call):
        yield from _call(node)
    elif isinstance(node, ast.Slice):
        yield from _slice(node)
    elif isinstance(node, ast.ExceptHandler):
        yield from _handler(node)
    elif isinstance(node, ast.comprehension):
        for number in range(len(node.ifs)):
            rest = node.ifs[:number] + node.ifs[number + 1 :]
            yield "drop condition", ast.comprehension(node.target, node.iter, rest, node.is_async)


# -- the walk ----------------------------------------------------------------------------------------------------------


def _skipped(parent: ast.AST, field: str, node: t.Any) -> bool:
    if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom)) or field in (
        "annotation",
        "returns",
        "decorator_list",
    ):
        return True
    if isinstance(parent, ast.keyword) and parent.arg in WORDS:
        return True
    if isinstance(parent, ast.Call) and field == "args" and isinstance(parent.func, ast.Attribute):
        if parent.func.attr in SAYING and isinstance(node, ast.Constant):
            return True
    if isinstance(parent, ast.Expr):  # a docstring
        return isinstance(node, ast.Constant)
    # Types in the code: t.cast("T", ...), aliases, and base classes.
    return isinstance(parent, ast.ClassDef) and field == "bases"


def _typing(node: ast.AST) -> bool:
    return ast.unparse(node).startswith(("t.Dict[", "t.TypeVar(")) if isinstance(node, ast.expr) else False


def _head(node: ast.stmt) -> tuple[int, int]:
    body = getattr(node, "body", None)
    return node.lineno, max(node.lineno, body[0].lineno - 1) if body else (node.end_lineno or node.lineno)


class _Walk:
    def __init__(self, source: str, file: str) -> None:
        self.file = file
        self.found: list[Mutant] = []
        self._seen: collections.Counter[str] = collections.Counter()
        self._dump = ""
        self._visit(ast.parse(source), (), [], "", (1, 1))

    def _visit(self, node: ast.AST, steps: Steps, names: list[str], scope: str, lines: tuple[int, int]) -> None:
        if isinstance(node, ast.stmt):
            lines = _head(node)
        elif isinstance(node, ast.ExceptHandler):
            lines = (node.lineno, node.body[-1].end_lineno or node.lineno)
        for what, new in changes(node) if steps else ():
            self._add(node, steps, what, new, scope, lines)
        for field, value in ast.iter_fields(node):
            for number, each in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(each, ast.AST) and not _skipped(node, field, each) and not _typing(each):
                    at = (*steps, field) if number is None else (*steps, field, number)
                    self._enter(node, field, each, at, names, scope, lines)

    def _enter(
        self,
        parent: ast.AST,
        field: str,
        node: ast.AST,
        steps: Steps,
        names: list[str],
        scope: str,
        lines: tuple[int, int],
    ) -> None:
        if field == "test" and isinstance(node, ast.expr):
            for what, new in _condition(node):
                self._add(node, steps, what, new, scope, lines)
        if isinstance(parent, (ast.FunctionDef, ast.ClassDef)) and field in ("body", "args"):
            names = [*names, parent.name]
            if isinstance(parent, ast.FunctionDef) and not scope and field == "body":
                scope = ".".join(names)
        if not scope:
            self._dump = ast.dump(node) if isinstance(node, ast.stmt) else self._dump
        if isinstance(node, ast.FunctionDef) and not scope:
            self._dump = ast.dump(node)
        self._visit(node, steps, names, scope, lines)

    def _add(self, node: ast.AST, steps: Steps, what: str, new: ast.AST, scope: str, lines: tuple[int, int]) -> None:
        ast.fix_missing_locations(new)
        before, after = (" ".join(ast.unparse(each).split()) for each in (_shown(node), _shown(new)))
        key = f"{self.file}\0{scope}\0{self._dump}\0{what}\0{before}\0{after}"
        self._seen[key] += 1
        name = hashlib.sha256(f"{key}\0{self._seen[key]}".encode()).hexdigest()[:8]
        self.found.append(Mutant(name, self.file, scope, lines, f"{what}: {before}", after, steps, new))


def _shown(node: ast.AST) -> ast.AST:
    """The node without the statements in it."""
    if isinstance(node, ast.For):
        node = copy.copy(node)
        node.body, node.orelse = [ast.Pass()], []
    return node


def mutants(source: str, file: str) -> list[Mutant]:
    """Return all mutants of a file, in the order of their lines."""
    found = _Walk(source, file).found
    names = [each.name for each in found]
    assert len(set(names)) == len(names), "two mutants have one name"
    return sorted(found, key=lambda each: each.lines)
