# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""Canonical JSON and the schemas of the documents that machines exchange; ``docs/*.schema.json`` are these.

The checker knows the part of JSON Schema that the schemas use, so that a managed host needs the standard library
alone; a test compares it with a full implementation.
"""

from __future__ import annotations

import json
import re
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError

Json = t.Any
LIMIT = 1 << 18  # bytes of one document; the largest honest manifest has about 30 KiB


def canonical(document: Json) -> bytes:
    """Return the one encoding of ``document``: sorted keys, no spaces, ASCII, no floats."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError("a number of more than 20 digits")
    return int(text)


def _is_integer(value: Json) -> bool:
    """A boolean is an integer in Python, not in JSON."""
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse(text: str) -> t.NoReturn:
    raise ValueError(f"{text[:20]} is not an integer")


def _pairs(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def parse(
    data: bytes, schema: dict[str, Json], what: str, error: type[ImaError], *, limit: int = LIMIT
) -> dict[str, Json]:
    """Return the document in ``data``: canonical JSON that fits ``schema``.

    Raises ``error`` with reason ``too_large``, ``not_json``, ``not_canonical``, ``newer_version`` or ``schema``.
    """
    if len(data) > limit:
        raise error(f"{what} has {len(data)} bytes, more than the {limit} that any honest one has", reason="too_large")
    try:
        document = json.loads(
            data.decode("ascii"),
            parse_int=_integer,
            parse_float=_refuse,
            parse_constant=_refuse,
            object_pairs_hook=_pairs,
        )
    except (ValueError, RecursionError) as fault:
        raise error(f"{what} is not JSON as we write it: {fault}"[:400], reason="not_json") from None
    version = schema["properties"]["version"]["const"]
    if isinstance(document, dict) and _is_integer(document.get("version")) and document["version"] > version:
        raise error(
            f"{what} has version {document['version']}, this program knows version {version}",
            reason="newer_version",
            hint="update the collection on this machine",
        )
    wrong = check(document, schema)
    if wrong:
        raise error(f"{what} is not what it should be: {wrong}", reason="schema")
    if canonical(document) != data:
        raise error(f"{what} is not in canonical form", reason="not_canonical")
    return t.cast(t.Dict[str, Json], document)


_TYPES: dict[str, t.Callable[[Json], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "integer": _is_integer,
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


def check(value: Json, schema: dict[str, Json], where: str = "$") -> str:
    """Return what is wrong with ``value``, or an empty string."""
    if "$ref" in schema:
        return check(value, _DEFINITIONS[schema["$ref"].rsplit("/", 1)[1]], where)
    kinds = schema.get("type")
    if kinds is not None:
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not any(_TYPES[kind](value) for kind in kinds):
            return f"{where} is not of type {' or '.join(kinds)}"
    if "const" in schema and (value != schema["const"] or type(value) is not type(schema["const"])):
        return f"{where} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} is none of {', '.join(map(repr, schema['enum']))}"
    if "anyOf" in schema and all(check(value, each, where) for each in schema["anyOf"]):
        return f"{where} fits none of the allowed forms"
    return _CHECKERS.get(type(value), _check_nothing)(value, schema, where)


def _check_nothing(_value: Json, _schema: dict[str, Json], _where: str) -> str:
    return ""


def _check_string(value: str, schema: dict[str, Json], where: str) -> str:
    if any("\ud800" <= char <= "\udfff" for char in value):
        return f"{where} has a lone surrogate"
    if len(value) > schema.get("maxLength", len(value)) or len(value) < schema.get("minLength", 0):
        return f"{where} has {len(value)} characters"
    # In Python "$" also matches before a last newline; the schemas mean the very end.
    if "pattern" in schema and not re.search(re.sub(r"\$\Z", r"\\Z", schema["pattern"]), value):
        return f"{where} does not have the form {schema['pattern']}"
    return ""


def _check_integer(value: int, schema: dict[str, Json], where: str) -> str:
    if value < schema.get("minimum", value) or value > schema.get("maximum", value):
        return f"{where} is out of range"
    return ""


def _check_array(value: list[Json], schema: dict[str, Json], where: str) -> str:
    if len(value) > schema.get("maxItems", len(value)):
        return f"{where} has {len(value)} items"
    return next(filter(None, (check(v, schema.get("items", {}), f"{where}[{i}]") for i, v in enumerate(value))), "")


def _check_object(value: dict[str, Json], schema: dict[str, Json], where: str) -> str:
    if len(value) > schema.get("maxProperties", len(value)):
        return f"{where} has {len(value)} members"
    missing = [key for key in schema.get("required", ()) if key not in value]
    if missing:
        return f"{where} lacks {missing[0]}"
    known, other = schema.get("properties", {}), schema.get("additionalProperties", True)
    for key, member in value.items():
        fault = check(key, schema.get("propertyNames", {}), f"{where} key")
        if fault:
            return fault
        if key in known:
            fault = check(member, known[key], f"{where}.{key}")
        elif other is False:
            return f"{where} has an unknown member"
        elif isinstance(other, dict):
            fault = check(member, other, f"{where} member")
        if fault:
            return fault
    return ""


_CHECKERS: dict[type[t.Any], t.Callable[[t.Any, dict[str, Json], str], str]] = {
    str: _check_string,
    int: _check_integer,
    list: _check_array,
    dict: _check_object,
}


def _ref(name: str) -> dict[str, Json]:
    return {"$ref": f"#/$defs/{name}"}


def _or_null(schema: dict[str, Json]) -> dict[str, Json]:
    return {"anyOf": [{"type": "null"}, schema]}


def _hex(digits: int) -> dict[str, Json]:
    return {"type": "string", "pattern": f"^[0-9a-f]{{{digits}}}$", "maxLength": digits}


def _object(required: dict[str, Json], **optional: Json) -> dict[str, Json]:
    return {
        "type": "object",
        "properties": dict(required, **optional),
        "required": sorted(required),
        "additionalProperties": False,
    }


_DEFINITIONS: dict[str, dict[str, Json]] = {
    "sha256": _hex(64),
    "machine_id": _hex(32),
    "boot_id": {
        "type": "string",
        "maxLength": 36,
        "pattern": "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
    },
    "name": {"type": "string", "minLength": 1, "maxLength": 253},
    "text": {"type": "string", "maxLength": 2000},
    "word": {"type": "string", "pattern": "^[a-z0-9_]{1,40}$", "maxLength": 40},
    "release": {"type": "string", "maxLength": 128},
    "time": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$", "maxLength": 20},
    "index": {"type": "integer", "minimum": 0, "maximum": 1 << 53},
    "sequence": {"type": "integer", "minimum": 1, "maximum": 99999999},
    "flavour": {"enum": ["export_only", "delete_n", "staged"]},
    "banks": {
        "type": "object",
        "additionalProperties": False,
        "properties": {"sha1": _hex(40), "sha256": _hex(64), "sha384": _hex(96), "sha512": _hex(128)},
    },
    "pcrs": {
        "type": "object",
        "maxProperties": 24,
        "additionalProperties": _ref("banks"),
        "propertyNames": {"type": "string", "pattern": "^(?:[0-9]|1[0-9]|2[0-3])$"},
    },
    "base64": {"type": "string", "pattern": "^[A-Za-z0-9+/]*={0,2}$", "maxLength": 8192},
    "pem": {
        "type": "string",
        "pattern": "^-----BEGIN PUBLIC KEY-----\n[A-Za-z0-9+/=\n]*-----END PUBLIC KEY-----\n?$",
        "maxLength": 4096,
    },
    "fault": _object(
        {
            "reason": _ref("word"),
            "boot_id": _ref("boot_id"),
            "index": _ref("index"),
            "found": _ref("boot_id"),
            "lost": {"type": "boolean"},
            "message": _ref("text"),
        }
    ),
}


def _document(title: str, body: dict[str, Json]) -> dict[str, Json]:
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, "$defs": _DEFINITIONS}
    return dict(head, **body)


MANIFEST = _document(
    "Manifest of a shard of an IMA measurement list",
    _object(
        {
            "version": {"const": 1},
            "machine_id": _ref("machine_id"),
            "name": _ref("name"),
            "boot_id": _ref("boot_id"),
            "reset_count": _or_null(_ref("index")),
            "release": _ref("release"),
            "flavour": _ref("flavour"),
            "emulated": {"type": "boolean"},
            "sequence": _ref("sequence"),
            "previous": _or_null(_ref("sha256")),
            "first": _ref("index"),
            "count": {"type": "integer", "minimum": 1, "maximum": 1 << 40},
            "byte_order": {"enum": ["big", "little"]},
            "size": _ref("index"),
            "sha256": _ref("sha256"),
            "stored_size": _ref("index"),
            "stored_sha256": _ref("sha256"),
            "pcrs_start": _ref("pcrs"),
            "pcrs_end": _ref("pcrs"),
            "padded": {"type": "array", "maxItems": 3, "items": {"enum": ["sha256", "sha384", "sha512"]}},
            "violations": _ref("index"),
            "observed": _or_null(_object({"pcrs": _ref("pcrs"), "index": _or_null(_ref("index"))})),
            "anchors": {
                "type": "array",
                "maxItems": 100,
                "items": _object(
                    {
                        "index": _ref("index"),
                        "sequence": _ref("sequence"),
                        "sha256": _ref("sha256"),
                    }
                ),
            },
            "faults": {"type": "array", "maxItems": 16, "items": _ref("fault")},
            "time": _ref("time"),
        },
        encryption={"const": "cms"},
    ),
)

ACKNOWLEDGEMENT = _document(
    "A store's word that a shard is durable there",
    _object(
        {
            "version": {"const": 1},
            "sequence": _ref("sequence"),
            "manifest": _ref("sha256"),
            "store": _ref("text"),
            "verdict": {"enum": ["", "attested", "consistent"]},
            "time": _ref("time"),
        }
    ),
)

JOURNAL = _document(
    "What the cycle was about to do: a hint, never evidence",
    _object(
        {
            "version": {"const": 1},
            "boot_id": _or_null(_ref("boot_id")),
            "base": _ref("index"),
            "trim": _or_null(_object({"base": _ref("index"), "target": _ref("index"), "manifest": _ref("sha256")})),
            "seal": _or_null({"type": "object"}),
            "faults": {"type": "array", "maxItems": 16, "items": _ref("fault")},
        },
        # On a kernel with staging: the index of the first record of the live list, or less.
        live=_ref("index"),
    ),
)

RETENTION = _document(
    "For how many days a store keeps shard files; manifests stay for ever",
    _object({"version": {"const": 1}, "shard_days": {"type": "integer", "minimum": 1, "maximum": 36500}}),
)

PRUNED = _document(
    "Up to where the files of a spool's shards were removed, and which store held them then",
    _object(
        {
            "version": {"const": 1},
            "sequence": _ref("sequence"),
            "manifest": _ref("sha256"),
            "store": _ref("text"),
            "time": _ref("time"),
        }
    ),
)

STITCHED = _document(
    "How far the stitched lists on a host were seen to be right: a hint, never evidence",
    _object(
        {
            "version": {"const": 1},
            "files": {
                "type": "object",
                "maxProperties": 2,
                "propertyNames": {"enum": ["ascii_runtime_measurements", "binary_runtime_measurements"]},
                "additionalProperties": _object(
                    {
                        "epoch": _ref("sha256"),
                        "inode": {"type": "string", "pattern": "^[0-9]{1,20}:[0-9]{1,20}$", "maxLength": 41},
                        "sequence": {"type": "integer", "minimum": 0, "maximum": 99999999},
                        "size": _ref("index"),
                        "tail": _ref("sha256"),
                    }
                ),
            },
        }
    ),
)

_OR_UNKNOWN = _or_null(_ref("index"))

STATUS = _document(
    "How far the shards of a host are behind its kernel: what ima-snapshot status --json says",
    _object(
        {
            "version": {"const": 1},
            "name": _ref("name"),
            "boot_id": _ref("boot_id"),
            "flavour": _ref("flavour"),
            "emulated": {"type": "boolean"},
            "count": _ref("index"),
            "cut": _OR_UNKNOWN,
            "base": _OR_UNKNOWN,
            "lag": _OR_UNKNOWN,
            "lag_bytes": _OR_UNKNOWN,
            "sequence": _OR_UNKNOWN,
            "generation": _ref("index"),
            "acknowledged": _OR_UNKNOWN,
            "age": _OR_UNKNOWN,
            "due": {"type": "boolean"},
            "holders": {
                "type": "array",
                "maxItems": 16,
                "items": _object({"pid": _ref("index"), "command": {"type": "string", "maxLength": 256}}),
            },
            "fault": _or_null(
                _object(
                    {
                        "reason": _ref("word"),
                        "message": _ref("text"),
                        "index": _OR_UNKNOWN,
                        "boot_id": _or_null(_ref("boot_id")),
                    }
                )
            ),
        }
    ),
)

# Beside the shard's manifest, not in it: what the TPM signs holds the manifest's digest.
QUOTE = _document(
    "A TPM quote that follows a manifest",
    _object(
        {
            "version": {"const": 1},
            "machine_id": _ref("machine_id"),
            "boot_id": _ref("boot_id"),
            "sequence": _ref("sequence"),
            "manifest": _ref("sha256"),
            "nonce": _hex(64),
            "attest": _ref("base64"),
            "signature": _ref("base64"),
            "pcrs": _ref("pcrs"),
            "time": _ref("time"),
        }
    ),
)

IDENTITY = _document(
    "A host's attestation key, as the controller saw it first",
    _object(
        {
            "version": {"const": 1},
            "machine_id": _ref("machine_id"),
            "ak": _ref("pem"),
            "ak_name": {"type": "string", "pattern": "^[0-9a-f]{8,140}$", "maxLength": 140},
            "ek": _ref("pem"),
            "time": _ref("time"),
        }
    ),
)

CLAIM = _object(
    {
        "status": {"const": "present"},
        "machine_id": _ref("machine_id"),
        "boot_id": _ref("boot_id"),
        "sequence": _ref("sequence"),
        "index": _ref("index"),
        "records": _ref("index"),
        "pcrs": _ref("pcrs"),
        "aggregate_digest": _ref("sha256"),
        "flavour": _ref("flavour"),
        "emulated": {"type": "boolean"},
        "time": _ref("time"),
    }
)

MISSING = _object(
    {"status": {"const": "missing"}, "reason": _ref("word"), "message": _ref("text")},
    boot_id=_ref("boot_id"),
    index=_ref("index"),
)

FLEET = _document(
    "What each host of a fleet claimed at one rotation",
    _object(
        {
            "version": {"const": 1},
            "run": {"type": "string", "pattern": "^[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}$", "maxLength": 25},
            "time": _ref("time"),
            "hosts": {
                "type": "object",
                "maxProperties": 100000,
                "propertyNames": _ref("name"),
                "additionalProperties": {"anyOf": [CLAIM, MISSING]},
            },
        }
    ),
)

_POSITION = _object(
    {
        "sequence": {"type": "integer", "minimum": 0, "maximum": 99999999},
        "cut": _ref("index"),
        "base": _ref("index"),
        "aggregate_digest": {"anyOf": [{"const": ""}, _ref("sha256")]},
    }
)

LEAST_CHUNK = 4096  # bytes of a shard in one answer, but for its last ones

# What the module ima_rotate answers to the controller in one round. Chunks belong to the first manifests, in order.
ANSWER = _object(
    {
        "changed": {"type": "boolean"},
        "exported": _ref("index"),
        "trimmed": _ref("index"),
        "more": {"type": "boolean"},
        "pending": _ref("index"),
        "manifests": {"type": "array", "maxItems": 16, "items": {"type": "string", "maxLength": LIMIT}},
        "chunks": {
            "type": "array",
            "maxItems": 16,
            "items": _object(
                {
                    "sequence": _ref("sequence"),
                    "offset": _ref("index"),
                    "data": {"type": "string", "maxLength": 32 << 20},
                }
            ),
        },
        "fault": _or_null(_ref("fault")),
        "busy": _ref("text"),
        "quote": _or_null({"type": "string", "maxLength": 1 << 16}),
        "warnings_said": {"type": "array", "maxItems": 16, "items": _ref("text")},
        "flavour": _ref("flavour"),
        "trim_after": {"enum": ["local", "central", "verified", "never"]},
        "position": _object({"before": _POSITION, "after": _POSITION}),
        "uploaded": {"type": "integer", "minimum": 0, "maximum": 99999999},
        "upload_fault": _or_null(
            _object({"sequence": _ref("sequence"), "reason": _ref("word"), "message": _ref("text")})
        ),
    }
)

# What the module ima_prune answers to the controller: which shards retention lets go, oldest first.
CANDIDATES = _object(
    {
        "changed": {"type": "boolean"},
        "pruned": _ref("index"),
        "kept": _ref("index"),
        "candidates": {
            "type": "array",
            "maxItems": 1000,
            "items": _object({"sequence": _ref("sequence"), "manifest": _ref("sha256")}),
        },
    }
)
