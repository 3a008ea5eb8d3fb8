# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Canonical JSON, what the parser refuses, and that the little checker says what a full implementation says."""

from __future__ import annotations

import copy
import json
import re
import typing as t
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ansible_collections.integrity.ima.plugins.module_utils import _schema
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError, ManifestError, printable
from ansible_collections.integrity.ima.plugins.module_utils._schema import (
    ACKNOWLEDGEMENT,
    FLEET,
    JOURNAL,
    LIMIT,
    MANIFEST,
    canonical,
    check,
    parse,
)
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import Host

DOCS = Path(__file__).resolve().parents[4] / "docs"
BOOT = "01234567-89ab-cdef-0123-456789abcdef"
PCRS = {"10": {"sha1": "0" * 40, "sha256": "1" * 64}, "11": {"sha512": "f" * 128}}
FAULT = {"reason": "foreign_trim", "boot_id": BOOT, "index": 3, "found": BOOT, "lost": True, "message": "gone"}
WORD = {
    "version": 1,
    "sequence": 1,
    "manifest": "a" * 64,
    "store": "directory:/store",
    "verdict": "attested",
    "time": "2026-11-21T00:00:00Z",
}
SHARD = {
    "version": 1,
    "machine_id": "0" * 32,
    "name": "h\u00f6st.example",
    "boot_id": BOOT,
    "reset_count": None,
    "release": "7.3.4",
    "flavour": "staged",
    "emulated": False,
    "sequence": 7,
    "previous": "b" * 64,
    "first": 100,
    "count": 20,
    "byte_order": "little",
    "size": 2000,
    "sha256": "c" * 64,
    "stored_size": 900,
    "stored_sha256": "d" * 64,
    "pcrs_start": PCRS,
    "pcrs_end": PCRS,
    "padded": ["sha384"],
    "violations": 0,
    "observed": {"pcrs": PCRS, "index": 120},
    "anchors": [{"index": 100, "sequence": 6, "sha256": "e" * 64}],
    "faults": [FAULT],
    "time": "2026-11-21T00:00:00Z",
}
CLAIM = {
    "status": "present",
    "machine_id": "0" * 32,
    "boot_id": BOOT,
    "sequence": 7,
    "index": 120,
    "records": 400,
    "pcrs": PCRS,
    "aggregate_digest": "f" * 64,
    "flavour": "delete_n",
    "emulated": True,
    "time": "2026-11-21T00:00:00Z",
}
RUN = {
    "version": 1,
    "run": "20261121T000000Z-0123abcd",
    "time": "2026-11-21T00:00:00Z",
    "hosts": {"a": CLAIM, "b": {"status": "missing", "reason": "unreachable", "message": "no route", "index": 4}},
}
HINT = {
    "version": 1,
    "boot_id": BOOT,
    "base": 4,
    "trim": {"base": 4, "target": 9, "manifest": "a" * 64},
    "seal": None,
    "faults": [FAULT],
}
DOCUMENTS = {
    "manifest": (MANIFEST, SHARD),
    "ack": (ACKNOWLEDGEMENT, WORD),
    "fleet": (FLEET, RUN),
    "journal": (JOURNAL, HINT),
}


def reason(data: bytes, schema: dict[str, t.Any] | None = None, **arguments: t.Any) -> str:
    with pytest.raises(ManifestError) as caught:
        parse(data, schema or ACKNOWLEDGEMENT, "it", ManifestError, **arguments)
    assert "it " in str(caught.value) and len(str(caught.value)) < 1000
    return caught.value.reason


# --- canonical form ---------------------------------------------------------------------------------------------------


def test_canonical() -> None:
    document = {"b": [1, True, None, "\u00f6\n\U0001f600"], "a": {"z": -5, "A": ""}}
    assert canonical(document) == b'{"a":{"A":"","z":-5},"b":[1,true,null,"\\u00f6\\n\\ud83d\\ude00"]}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_canonical_refuses_nan(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical({"a": value})


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(values)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_canonical_goes_there_and_back(value: t.Any) -> None:
    data = canonical(value)
    assert json.loads(data) == value and canonical(json.loads(data)) == data
    assert not re.search(rb"[^ -~]", data)


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_documents_parse(kind: str) -> None:
    schema, document = DOCUMENTS[kind]
    assert parse(canonical(document), schema, "it", ImaError) == document


# --- refusals ---------------------------------------------------------------------------------------------------------


DATA = canonical(WORD)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        DATA + DATA,
        DATA + b"x",
        DATA.replace(b'"sequence":1', b'"sequence":1.0'),
        DATA.replace(b'"sequence":1', b'"sequence":1e0'),
        DATA.replace(b'"sequence":1', b'"sequence":NaN'),
        DATA.replace(b'"sequence":1', b'"sequence":Infinity'),
        DATA.replace(b'"sequence":1', b'"sequence":-Infinity'),
        DATA.replace(b'"sequence":1', b'"sequence":' + b"1" * 21),
        DATA.replace(b'"sequence":1', b'"sequence":' + b"1" * 5000),
        DATA.replace(b'"sequence":1', b'"sequence":1,"sequence":1'),
        DATA.replace(b'"version":1', b'"version":1,"version":2'),
        DATA.replace(b"/store", "/st\u00f6re".encode()),
        DATA.replace(b"/store", b"/st\xffre"),
        b"\xef\xbb\xbf" + DATA,
        DATA.decode().encode("utf-16"),
        b"[" * 50000,
        b'{"a":' * 20000,
        DATA.replace(b'"sequence":1', b'"sequence":01'),
        DATA.replace(b"/store", b"/st\x00re"),
    ],
)
def test_not_json(data: bytes) -> None:
    assert reason(data) == "not_json"


@pytest.mark.parametrize(
    "data",
    [
        DATA + b"\n",
        b" " + DATA,
        DATA.replace(b",", b", "),
        json.dumps(WORD).encode(),
        json.dumps(dict(reversed(list(WORD.items()))), separators=(",", ":")).encode(),
        DATA.replace(b"/store", b"\\/store"),
        DATA.replace(b":/store", b":/\\u0073tore"),
        DATA.replace(b"/store", b"/\\u00F6"),
    ],
)
def test_not_canonical(data: bytes) -> None:
    # One that changes nothing would prove nothing.
    assert data != DATA
    assert reason(data) == "not_canonical"


@pytest.mark.parametrize("depth", [1, 100, 900, 990, 1500])
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_deep_nesting_where_it_fits(kind: str, depth: int) -> None:
    """Whatever the depth: a reason, not a RecursionError."""
    schema, document = DOCUMENTS[kind]
    deep: bytes = b'{"a":' * depth + b"1" + b"}" * depth
    data = canonical(dict(document, extra="here")).replace(b'"here"', deep)
    assert reason(data, schema) in ("schema", "not_json")
    data = canonical(dict(HINT, seal="here")).replace(b'"here"', deep)
    try:
        parse(data, JOURNAL, "it", ManifestError)
    except ManifestError as error:
        assert error.reason in ("not_json", "schema")


@pytest.mark.parametrize("data", [b"[" * 50000 + b"]" * 50000, b'{"a":' * 10000 + b"1" + b"}" * 10000])
def test_far_too_deep(data: bytes) -> None:
    """How deep the standard library reads differs between Pythons; that it ends with a reason does not."""
    assert reason(data) in ("not_json", "schema")


def test_too_large() -> None:
    assert reason(b" " * (LIMIT + 1)) == "too_large"
    assert reason(DATA, limit=len(DATA) - 1) == "too_large"
    assert parse(DATA, ACKNOWLEDGEMENT, "it", ManifestError, limit=len(DATA)) == WORD


def test_newer_version() -> None:
    assert reason(canonical(dict(WORD, version=2))) == "newer_version"
    assert reason(canonical({"version": 3, "whatever": []})) == "newer_version"
    for version in (0, -1, True, "2", None, [2], {"2": 2}):
        assert reason(canonical(dict(WORD, version=version))) == "schema"


@pytest.mark.parametrize("data", [b"null", b"[]", b"{}", b"1", b"true", b'"x"'])
def test_another_document(data: bytes) -> None:
    for schema, _document in DOCUMENTS.values():
        assert reason(data, schema) == "schema"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("ack", {"sequence": True}),
        ("ack", {"sequence": 0}),
        ("ack", {"sequence": 100000000}),
        ("ack", {"manifest": "a" * 64 + "\n"}),
        ("ack", {"manifest": "A" * 64}),
        ("ack", {"time": "2026-11-21T00:00:00Z\n"}),
        ("ack", {"time": "2026-11-21 00:00:00Z"}),
        ("ack", {"time": "\u0662026-11-21T00:00:00Z"}),
        ("ack", {"verdict": "broken"}),
        ("ack", {"more": 1}),
        ("manifest", {"boot_id": BOOT + "\n"}),
        ("manifest", {"boot_id": "../" + BOOT[3:]}),
        ("manifest", {"first": -1}),
        ("manifest", {"first": (1 << 53) + 1}),
        ("manifest", {"count": 0}),
        ("manifest", {"name": ""}),
        ("manifest", {"name": "x" * 254}),
        ("manifest", {"emulated": 0}),
        ("manifest", {"pcrs_end": {"24": {}}}),
        ("manifest", {"pcrs_end": {"010": {}}}),
        ("manifest", {"pcrs_end": {"10\n": {}}}),
        ("manifest", {"pcrs_end": {"10": {"md5": ""}}}),
        ("manifest", {"pcrs_end": {"10": {"sha1": "0" * 64}}}),
        ("manifest", {"padded": ["sha1"]}),
        ("manifest", {"padded": ["sha256"] * 4}),
        ("manifest", {"faults": [FAULT] * 101}),
        ("manifest", {"faults": [dict(FAULT, reason="Not A Word")]}),
        ("manifest", {"faults": [dict(FAULT, message="x" * 2001)]}),
        ("manifest", {"quote": {}}),
        ("manifest", {"emulated": None}),
        ("manifest", {"observed": {"pcrs": {}}}),
        ("fleet", {"hosts": {"": CLAIM}}),
        ("fleet", {"hosts": {"a": {}}}),
        ("fleet", {"hosts": {"a": dict(CLAIM, status="missing")}}),
        ("fleet", {"hosts": []}),
        ("fleet", {"run": "20261121T000000Z-0123ABCD"}),
    ],
)
def test_outside_of_the_schema(kind: str, change: dict[str, t.Any]) -> None:
    schema, document = DOCUMENTS[kind]
    assert reason(canonical(dict(document, **change)), schema) == "schema"


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_no_member_may_be_missing(kind: str) -> None:
    schema, document = DOCUMENTS[kind]
    for key in document:
        rest = {name: value for name, value in document.items() if name != key}
        with pytest.raises(ManifestError) as caught:
            parse(canonical(rest), schema, "it", ManifestError)
        assert caught.value.reason == "schema" and f"lacks {key}" in str(caught.value)


# --- agreement with a full implementation -----------------------------------------------------------------------------


def strict(schema: t.Any) -> t.Any:
    """The schema for Python's ``re``, in which ``$`` also matches before a last newline (ECMA-262 does not)."""
    if isinstance(schema, dict):
        return {
            key: re.sub(r"\$\Z", r"\\Z", value) if key == "pattern" and isinstance(value, str) else strict(value)
            for key, value in schema.items()
        }
    return [strict(each) for each in schema] if isinstance(schema, list) else schema


VALIDATORS = {kind: jsonschema.Draft202012Validator(strict(schema)) for kind, (schema, _doc) in DOCUMENTS.items()}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_the_schemas_are_schemas(kind: str) -> None:
    schema, document = DOCUMENTS[kind]
    jsonschema.Draft202012Validator.check_schema(schema)
    VALIDATORS[kind].validate(document)
    assert check(document, schema) == ""


def places(value: t.Any, path: tuple[t.Any, ...] = ()) -> t.Iterator[tuple[t.Any, ...]]:
    """The path of every value in a document."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from places(each, (*path, number))


odd = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 2, 23, 24, 1 << 40, 1 << 53, (1 << 53) + 1, 99999999, 100000000),
        *("", "x", "0" * 40, "0" * 64, "0" * 64 + "\n", "G" * 64, "0" * 96, "attested", "missing", "present", "staged"),
        *(BOOT, BOOT + "\n", "2026-11-21T00:00:00Z", "x" * 254, "x" * 2001, "sha256", "\u0661", "\ud800", "10", "11\n"),
        *([], {}, [None], [[]], {"10": {}}, {"10": {"sha1": "0" * 40}}, PCRS, FAULT, [FAULT], CLAIM, [FAULT] * 101),
    ]
)


@st.composite
def mutated(draw: st.DrawFn, document: dict[str, t.Any]) -> t.Any:
    """The document with one to three values replaced, removed, doubled, or put under another key."""
    result: t.Any = copy.deepcopy(document)
    for _time in range(draw(st.integers(0, 2))):
        path = draw(st.sampled_from(list(places(result))))
        if not path:
            continue
        parent = result
        for step in path[:-1]:
            parent = parent[step]
        step = path[-1]
        how = draw(st.sampled_from(["odd", "any", "remove", "add", "key"]))
        if how == "odd":
            parent[step] = copy.deepcopy(draw(odd))
        elif how == "any":
            parent[step] = draw(values)
        elif how == "remove":
            del parent[step]
        elif how == "add" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[step]))
        elif isinstance(parent, dict):
            key = draw(st.sampled_from(["", "10", "23", "24", "7", "sha384", "index", "boot_id", "x" * 254, "a\n"]))
            parent[key] = parent.pop(step) if how == "key" else copy.deepcopy(parent[step])
    return result


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_the_checker_agrees(kind: str) -> None:
    schema, document = DOCUMENTS[kind]
    seen = {True: 0, False: 0}

    @given(mutated(document))
    @settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def agree(changed: t.Any) -> None:
        ours = check(changed, schema)
        assert (ours == "") == VALIDATORS[kind].is_valid(changed), ours
        assert len(ours) < 1000
        seen[ours == ""] += 1

    agree()
    assert min(seen.values()) > 2, "too few documents of one kind"


def test_real_manifests_are_valid(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", count=9, banks=["sha1", "sha256", "sha384"], padded=["sha384"])
    host.run()
    host.anchor()
    host.violation(2)
    host.run()
    host.acknowledge("consistent")
    spool = Spool(host.spool)
    for entry in spool.entries:
        VALIDATORS["manifest"].validate(spool.manifest(entry))
        VALIDATORS["ack"].validate(spool.acknowledgement(entry))
    VALIDATORS["journal"].validate(spool.journal())


def test_every_keyword_is_known_to_the_checker() -> None:
    """A keyword that the checker does not know would be a rule that only others keep."""
    known = {
        *("type", "const", "enum", "anyOf", "$ref", "maxLength", "minLength", "pattern", "minimum", "maximum"),
        *("maxItems", "items", "maxProperties", "required", "properties", "additionalProperties", "propertyNames"),
    }

    def keywords(schema: t.Any) -> set[str]:
        found = set(schema)
        for key in ("items", "additionalProperties", "propertyNames"):
            if isinstance(schema.get(key), dict):
                found |= keywords(schema[key])
        for each in [*schema.get("properties", {}).values(), *schema.get("anyOf", [])]:
            found |= keywords(each)
        return found

    for schema in (*(schema for schema, _document in DOCUMENTS.values()), _schema.ANSWER):
        assert keywords(schema) - {"$schema", "$defs", "$id", "title", "description"} <= known
    for schema in _schema._DEFINITIONS.values():
        assert keywords(schema) - {"description"} <= known


@pytest.mark.parametrize("name", ["manifest", "acknowledgement", "journal", "fleet"])
def test_the_documented_schemas_are_these(name: str) -> None:
    schema = {"manifest": MANIFEST, "acknowledgement": ACKNOWLEDGEMENT, "journal": JOURNAL, "fleet": FLEET}[name]
    paths = [path for path in DOCS.glob("*.schema.json") if path.name.split(".")[0] in (name, name[:3])]
    for path in paths:
        assert json.loads(path.read_text(encoding="utf-8")) == schema, path.name


def test_every_documented_schema_is_one_of_ours() -> None:
    ours = [value for value in vars(_schema).values() if isinstance(value, dict) and "$schema" in value]
    for path in DOCS.glob("*.schema.json"):
        assert json.loads(path.read_text(encoding="utf-8")) in ours, path.name


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain \u00f6", "plain \u00f6"),
        (b"\xff\x00a", "\\xff\\x00a"),
        ("\udcff", "\\udcff"),
        ("\x1b[31m\n", "\\x1b[31m\\n"),
        ("\u202e", "\\u202e"),
        ("\ud800", "\\ud800"),
    ],
)
def test_printable(raw: str | bytes, shown: str) -> None:
    """What a host sent, a lone surrogate in JSON too, can stand in a message."""
    assert printable(raw) == shown
    assert str(ImaError(raw if isinstance(raw, str) else "x")) != ""
