# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""IMA measurement lists: bytes in, records out; the kernel's ASCII out.

A record of a binary list, integers in the kernel's byte order, no separator, no magic, no length of the digest::

    u32 pcr | u8 digest[L] | u32 name_len | u8 name[name_len] | template data

    template data of "ima":     u8 d[20] | u32 n_len | u8 n[n_len]
    of every other template:    u32 data_len | { u32 len | u8 field[len] } ...

``L`` is the digest size of the list's bank: 20 in ``binary_runtime_measurements``, which every kernel has.
Source: ``ima_measurements_show``, ``ima_ascii_measurements_show`` in security/integrity/ima/ima_fs.c, the field formats
in ima_template_lib.c, the templates in ima_template.c, the hashes in ima_crypto.c.
"""

from __future__ import annotations

import functools
import hashlib
import re
import struct
import sys
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils._errors import ListError

DIGEST_SIZES = {20: "sha1", 32: "sha256", 48: "sha384", 64: "sha512"}

# Field identifiers of each built-in template (ima_template.c: builtin_templates).
TEMPLATES: dict[str, tuple[str, ...]] = {
    "ima": ("d", "n"),
    "ima-ng": ("d-ng", "n-ng"),
    "ima-sig": ("d-ng", "n-ng", "sig"),
    "ima-ngv2": ("d-ngv2", "n-ng"),
    "ima-sigv2": ("d-ngv2", "n-ng", "sig"),
    "ima-buf": ("d-ng", "n-ng", "buf"),
    "ima-modsig": ("d-ng", "n-ng", "sig", "d-modsig", "modsig"),
    "evm-sig": ("d-ng", "n-ng", "evmsig", "xattrnames", "xattrlengths", "xattrvalues", "iuid", "igid", "imode"),
}
_DIGESTS = frozenset(("d-ng", "d-ngv2", "d-modsig"))
_STRINGS = frozenset(("n", "n-ng", "xattrnames"))
_UINTS = {"iuid": 4, "igid": 4, "imode": 2}
_HEX = frozenset(("d", "sig", "buf", "modsig", "evmsig", "xattrlengths", "xattrvalues"))
_FIELD_IDS = _DIGESTS | _STRINGS | frozenset(_UINTS) | _HEX

MAX_PCR = 23
MAX_NAME = 255  # template name, and the event name of "ima" (IMA_EVENT_NAME_LEN_MAX)
MAX_DATA = 8 << 20  # far above what a kernel allocates for one record
MAX_FIELDS = 15  # IMA_TEMPLATE_NUM_FIELDS_MAX
_CHUNK = 65536
_MAX_JOIN = 65536  # text of one record in an ASCII list that goes on over several lines
_MAX_JOINED_LINES = 4096  # PATH_MAX bounds the newlines in a path
_MAX_LINE = 2 * MAX_DATA + _MAX_JOIN
_PREFIX = {"little": "<", "big": ">"}
_ZEROS = {size: bytes(size) for size in DIGEST_SIZES}
_DETECT_RECORDS = 8

Source = t.Callable[[int], bytes]


class Layout(t.NamedTuple):
    """What a binary list does not say of itself: bytes per template digest, and ``"little"`` or ``"big"``."""

    digest_size: int
    byte_order: str


SHA1 = Layout(20, sys.byteorder)


class Record(t.NamedTuple):
    """One record.

    ``index``     its number in the list, ``offset`` the byte where it starts in what was read.
    ``digest``    the template digest as the list shows it, 20 to 64 bytes.
    ``template``  name, or format string of a custom template (``d-ng|n-ng|iuid``).
    ``data``      template data as stored, without ``data_len``: what is hashed. For ``ima``: ``d[20] n_len n``.
    ``raw``       the record's exact bytes in the binary list.
    """

    index: int  # type: ignore[assignment]  # instead of tuple.index
    offset: int
    pcr: int
    digest: bytes
    template: str
    data: bytes
    raw: bytes

    @property
    def violation(self) -> bool:
        """The template digest is all zeros: the PCR was extended with 0xff (ima_add_violation)."""
        return not self.digest.strip(b"\0")


def read(
    source: Source, layout: Layout = SHA1, *, first_index: int = 0, first_offset: int = 0, verify: bool = True
) -> t.Iterator[Record]:
    """The records of a binary list, in order, in constant memory.

    ``source(size)`` gives at most ``size`` bytes, ``b""`` at the end; its pieces may split a record anywhere.
    ``verify=False`` walks the headers only: for bytes that are known to be the kernel's or ours.
    Raises ``ListError`` with ``index`` and ``offset`` of the record; reasons ``truncated``, ``malformed_list``,
    ``wrong_byte_order``, ``digest_mismatch``. Records before a bad one have been given by then.
    """
    walk = _Walk(layout, first_index, first_offset, verify)
    pieces: list[bytes] = []
    held = 0
    while True:
        piece = source(_CHUNK)
        pieces.append(piece)
        held += len(piece)
        if piece and held < walk.need:
            continue
        buffer = b"".join(pieces)
        if not piece:
            break
        yield from walk.whole(buffer)
        pieces = [buffer[walk.used :]]
        held -= walk.used
    if buffer:
        raise walk.error(
            "truncated", f"the list ends inside this record, after {len(buffer)} of at least {walk.need} bytes"
        )


class _Walk:
    """Takes whole records off the front of a buffer: its own place in the list is the only state."""

    def __init__(self, layout: Layout, index: int = 0, offset: int = 0, verify: bool = True) -> None:
        self.layout = layout
        self.index = index
        self.offset = offset
        self.verify = verify
        self.used = 0
        self.need = 1  # bytes that the next record is known to have
        size, order = layout
        self._bank = DIGEST_SIZES[size]
        self._head = struct.Struct(f"{_PREFIX[order]}I{size}sI")
        self._word = struct.Struct(f"{_PREFIX[order]}I")

    def error(self, reason: str, what: str, **details: t.Any) -> ListError:
        """About the record that the walk stands at."""
        return _error(reason, what, self.index, self.offset, **details)

    def whole(self, buffer: bytes) -> t.Iterator[Record]:
        """Every record that is whole in ``buffer``; then ``used`` and ``need`` say how to go on."""
        head, head_size, word = self._head.unpack_from, self._head.size, self._word.unpack_from
        hasher, new, verify = getattr(hashlib, self._bank), tuple.__new__, self.verify
        total, position = len(buffer), 0
        while True:
            name_at = position + head_size
            self.need = head_size
            if name_at > total:
                break
            pcr, digest, name_len = head(buffer, position)
            if pcr > MAX_PCR or not 0 < name_len <= MAX_NAME:
                raise self._bad_head(buffer[position:], pcr, name_len)
            start = name_at + name_len + 4
            self.need = start - position
            if start > total:
                break
            name, count = _template(buffer[name_at : start - 4])
            if count > 0:
                (length,) = word(buffer, start - 4)
            else:
                start, length = self._odd(buffer, position, start, name)
            end = start + length
            self.need = end - position
            if length > MAX_DATA:
                raise self.error("malformed_list", f"{length} bytes of template data")
            if end > total:
                break
            data = buffer[start:end]
            record: Record = new(Record, (self.index, self.offset, pcr, digest, name, data, buffer[position:end]))
            if verify and (hasher(data).digest() != digest or _count(data, word) != count):
                self._check(record)
            yield record
            self.offset += end - position
            self.index += 1
            position = end
        self.used = position

    def _odd(self, buffer: bytes, position: int, start: int, name: str) -> tuple[int, int]:
        """Where the template data starts and how long it is: ``ima``, and names that no kernel writes."""
        if not name:
            raise self.error("malformed_list", "the template name is not printable ASCII")
        if name != "ima":
            return start, self._word.unpack_from(buffer, start - 4)[0]
        start -= 4
        if len(buffer) < start + 24:
            return start, 24
        (length,) = self._word.unpack_from(buffer, start + 20)
        if length > MAX_NAME:
            at = self.offset + start - position + 20
            raise self.error("malformed_list", f'an event name of {length} bytes in template "ima"', field_offset=at)
        return start, 24 + length

    def _bad_head(self, rest: bytes, pcr: int, name_len: int) -> ListError:
        """The header is absurd: say so, and whether it would not be in the other byte order."""
        other = _other(self.layout.byte_order)
        pcr2, _digest, name_len2 = struct.unpack_from(f"{_PREFIX[other]}I{self.layout.digest_size}sI", rest)
        name = rest[self._head.size : self._head.size + name_len2]
        if pcr2 <= MAX_PCR and 0 < name_len2 <= MAX_NAME and _printable(name):
            what = f"the list is {other}-endian, and was read as {self.layout.byte_order}-endian"
            return self.error("wrong_byte_order", what, byte_order=other)
        what = f"PCR {pcr}" if pcr > MAX_PCR else f"a template name of {name_len} bytes"
        return self.error("malformed_list", f"{what} cannot be: this is not the start of a record")

    def _check(self, record: Record) -> None:
        """What the fast comparison in ``whole`` did not pass: fine after all, or which error."""
        names = field_ids(record.template)
        values = fields(record, self.layout.byte_order)
        if record.violation:
            _check_violation(record, names, values)
        else:
            _check_digest(record, self._bank)


def _count(data: bytes, word: t.Callable[[bytes, int], tuple[t.Any, ...]]) -> int:
    """How many fields the template data has; 0 if their lengths do not add up."""
    at, end, count = 0, len(data), 0
    try:
        while at < end:
            at += 4 + word(data, at)[0]
            count += 1
    except struct.error:
        return 0
    return count if at == end else 0


def _error(reason: str, what: str, index: int, offset: int, **details: t.Any) -> ListError:
    return ListError(f"record {index} at byte {offset}: {what}", reason=reason, index=index, offset=offset, **details)


def _other(byte_order: str) -> str:
    return "big" if byte_order == "little" else "little"


def _printable(name: bytes) -> bool:
    return all(0x20 < byte < 0x7F for byte in name)


@functools.lru_cache(maxsize=256)
def _template(name: bytes) -> tuple[str, int]:
    """Name as text and how many fields it has: -1 for ``ima`` and unknown names; no text for what is no name."""
    if not _printable(name):
        return "", -1
    text = name.decode("latin-1")
    names = field_ids(text)
    return text, -1 if text == "ima" or names is None else len(names)


@functools.lru_cache(maxsize=256)
def field_ids(template: str) -> tuple[str, ...] | None:
    """The field identifiers of a built-in template or of a format string; None if a newer kernel's."""
    if template in TEMPLATES:
        return TEMPLATES[template]
    names = tuple(template.split("|"))
    return names if len(names) <= MAX_FIELDS and _FIELD_IDS.issuperset(names) else None


def _check_digest(record: Record, bank: str) -> None:
    if record.digest == template_digest(bank, record.template, record.data):
        return
    # A bank whose hash the kernel could not allocate shows the SHA-1 digest, padded.
    padded = template_digest("sha1", record.template, record.data).ljust(len(record.digest), b"\0")
    if record.digest != padded:
        what = f"the template digest {record.digest.hex()} is not the {bank} of the template data"
        raise _error("digest_mismatch", what, record.index, record.offset)


def _check_violation(record: Record, names: tuple[str, ...] | None, values: list[bytes]) -> None:
    """The kernel writes zeros for the digest that it does not have: else somebody blanked the template digest."""
    for number, (name, value) in enumerate(zip(names or (), values)):
        if name in ("d", "d-ng", "d-ngv2"):
            digest = value if name == "d" else _split_digest(record, number, value)[1]
            if digest.strip(b"\0"):
                what = f"a violation (template digest all zeros) with a digest in field {number} ({name})"
                raise _error("malformed_list", what, record.index, record.offset, field=number)


def fields(record: Record, byte_order: str) -> list[bytes]:
    """The template's fields as stored, in order (for ``ima``: ``d`` and ``n``).

    Raises ``ListError`` ``malformed_list`` with ``field`` and ``field_offset`` where lengths do not add up, or where
    there are more fields, or other than the template has.
    """
    data = record.data
    word = struct.Struct(_PREFIX[byte_order] + "I").unpack_from
    if record.template == "ima":
        if len(data) < 24 or word(data, 20)[0] != len(data) - 24 or len(data) > 24 + MAX_NAME:
            raise _error("malformed_list", 'the data of template "ima" is cut', record.index, record.offset, field=1)
        return [data[:20], data[24:]]
    values: list[bytes] = []
    at = 0
    while at < len(data):
        length = word(data, at)[0] if at + 4 <= len(data) else MAX_DATA
        if at + 4 + length > len(data) or len(values) == MAX_FIELDS:
            raise _bad_field(record, len(values), at, "is longer than the template data or one too many")
        values.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    names = field_ids(record.template)
    if not values or (names and len(names) != len(values)):
        raise _bad_field(record, len(values), at, f"is where the data of template {record.template} ends or goes on")
    return values


def _bad_field(record: Record, number: int, at: int, what: str) -> ListError:
    offset = record.offset + len(record.raw) - len(record.data) + at
    text = f"field {number} at byte {offset} {what}"
    return _error("malformed_list", text, record.index, record.offset, field=number, field_offset=offset)


def event_name(record: Record, byte_order: str) -> bytes:
    """Path or event name (``n`` or ``n-ng``) without its NUL; ``b""`` if the template has none."""
    for name, value in zip(field_ids(record.template) or (), fields(record, byte_order)):
        if name in ("n", "n-ng"):
            return value[:-1] if value.endswith(b"\0") else value
    return b""


def starts_boot(record: Record, byte_order: str) -> bool:
    """Whether this is the first record of a kernel's start (``ima_add_boot_aggregate``; ``_late`` since 7.3)."""
    return event_name(record, byte_order) in (b"boot_aggregate", b"boot_aggregate_late")


def file_digest(record: Record, byte_order: str) -> tuple[str, bytes]:
    """Hash algorithm and digest of the first ``d``, ``d-ng`` or ``d-ngv2`` field; ``("", b"")`` if there is none.

    The algorithm is bare (``sha256``) for the hash of a file, and ``verity:sha256`` for an fs-verity digest. ``d`` does
    not name it: ``sha1`` (the kernel recomputes any other).
    """
    for number, (name, value) in enumerate(zip(field_ids(record.template) or (), fields(record, byte_order))):
        if name == "d":
            return "sha1", value
        if name in ("d-ng", "d-ngv2"):
            algo, digest = _split_digest(record, number, value)
            text = algo.rstrip(b":").decode("latin-1")
            return text[4:] if text.startswith("ima:") else text, digest
    return "", b""


def _split_digest(record: Record, number: int, value: bytes) -> tuple[bytes, bytes]:
    """``<algo>:`` and the digest behind its NUL (DATA_FMT_DIGEST_WITH_ALGO, ..._WITH_TYPE_AND_ALGO)."""
    if not value:
        return b"", b""
    algo, nul, digest = value.partition(b"\0")
    if not nul or not algo.endswith(b":"):
        what = f"field {number} is not <algorithm>:, NUL, digest"
        raise _error("malformed_list", what, record.index, record.offset, field=number)
    return algo, digest


def to_ascii(record: Record, byte_order: str) -> bytes:
    r"""The line of ``ascii_runtime_measurements`` of the same bank, with its ``\n``; a path may hold more of them.

    Raises ``ListError``: ``unknown_template`` where nothing says how the fields are shown, ``malformed_list``.
    """
    names = field_ids(record.template)
    if names is None:
        what = f"template {record.template} is not known here: its fields cannot be shown"
        raise _error("unknown_template", what, record.index, record.offset, template=record.template)
    texts = [
        _show(record, number, name, value, byte_order)
        for number, (name, value) in enumerate(zip(names, fields(record, byte_order)))
    ]
    head = f"{record.pcr:2d} {record.digest.hex()} {record.template}".encode("latin-1")
    return b" ".join([head] + texts) + b"\n"


def _show(record: Record, number: int, name: str, value: bytes, byte_order: str) -> bytes:
    """One field as text (ima_show_template_data_ascii)."""
    if name in _STRINGS:
        return value.partition(b"\0")[0]
    if name in _UINTS:
        return b"%d" % _uint(value, byte_order) if len(value) in (1, 2, 4, 8) else b""
    if name in _DIGESTS:
        algo, digest = _split_digest(record, number, value)
        return (b"" if algo == b":" else algo) + digest.hex().encode()
    return value.hex().encode()


def _uint(value: bytes, byte_order: str) -> int:
    return int.from_bytes(value, "little" if byte_order == "little" else "big")


def template_data(template: str, field_list: t.Sequence[bytes], byte_order: str) -> bytes:
    """Template data as stored: what ``Record.data`` is. Fields as in :func:`fields`."""
    word = struct.Struct(_PREFIX[byte_order] + "I").pack
    if template == "ima":
        digest, name = field_list
        return digest + word(len(name)) + name
    return b"".join(word(len(value)) + value for value in field_list)


def template_digest(bank: str, template: str, data: bytes) -> bytes:
    """The hash of the template data: one bank's template digest (ima_calc_field_array_hash_tfm)."""
    return t.cast(bytes, getattr(hashlib, bank)(hashed_data(template, data)).digest())


def hashed_data(template: str, data: bytes) -> bytes:
    """What the template digest is the hash of: ``data``; for ``ima`` the digest and the name padded to 256 bytes."""
    return data[:20] + data[24:].ljust(MAX_NAME + 1, b"\0") if template == "ima" else data


def encode(pcr: int, template: str, field_list: t.Sequence[bytes], layout: Layout, *, violation: bool = False) -> bytes:
    """A binary record with its computed template digest (zeros for a violation)."""
    data = template_data(template, field_list, layout.byte_order)
    digest = bytes(layout.digest_size)
    if not violation:
        digest = template_digest(DIGEST_SIZES[layout.digest_size], template, data)
    return _raw(pcr, digest, template, data, layout.byte_order)


def _raw(pcr: int, digest: bytes, template: str, data: bytes, byte_order: str) -> bytes:
    word = struct.Struct(_PREFIX[byte_order] + "I").pack
    name = template.encode("latin-1")
    length = b"" if template == "ima" else word(len(data))
    return b"".join((word(pcr), digest, word(len(name)), name, length, data))


def convert(record: Record, byte_order: str, digest_size: int) -> bytes:
    """The same record as the list of the bank with ``digest_size`` shows it (binary_runtime_measurements_<bank>)."""
    digest = bytes(digest_size)
    if not record.violation:
        digest = template_digest(DIGEST_SIZES[digest_size], record.template, record.data)
    return _raw(record.pcr, digest, record.template, record.data, byte_order)


_ASCII_HEAD = re.compile(rb"(?:[ 1][0-9]|2[0-3]) [0-9a-f]{40}")
_ASCII_START = re.compile(rb"([ 1][0-9]|2[0-3]) ((?:[0-9a-f]{40}|[0-9a-f]{64}|[0-9a-f]{96}|[0-9a-f]{128})) ([!-~]+) ")


def detect(head: bytes) -> Layout | None:
    """Which list ``head`` (its first bytes; 64 KiB are plenty, and may end inside a record) starts: None for ASCII.

    A binary list says neither its digest size nor its byte order: the first complete records are parsed and re-hashed
    in each layout; where no digest can tell (violations, forgeries), the structure decides.
    Raises ``ListError`` ``empty_list`` or ``not_a_list``.
    """
    if not head:
        raise ListError("the measurement list is empty", reason="empty_list", index=0, offset=0)
    if _ASCII_HEAD.match(head):
        return None
    layouts = [Layout(size, order) for order in (sys.byteorder, _other(sys.byteorder)) for size in DIGEST_SIZES]
    for fits in (_fits_digest, _fits_structure, _fits_head):
        for layout in layouts:
            if fits(head, layout):
                return layout
    raise ListError("this is not an IMA measurement list", reason="not_a_list", index=0, offset=0)


def _fits_digest(head: bytes, layout: Layout) -> bool:
    """One of the first records has its digest in this layout, and none before it is bad."""
    try:
        for number, record in enumerate(_Walk(layout).whole(head)):
            if not record.violation:
                return True
            if number == _DETECT_RECORDS:
                break
    except ListError:
        pass
    return False


def _fits_structure(head: bytes, layout: Layout) -> bool:
    try:
        record = next(_Walk(layout, verify=False).whole(head), None)
        return record is not None and len(fields(record, layout.byte_order)) > 0
    except ListError:
        return False


def _fits_head(head: bytes, layout: Layout) -> bool:
    """No record is complete: a header and a name that the kernel knows."""
    try:
        pcr, _digest, name_len = struct.unpack_from(f"{_PREFIX[layout.byte_order]}I{layout.digest_size}sI", head)
    except struct.error:
        return False
    at = 8 + layout.digest_size
    name = head[at : at + name_len].decode("latin-1")
    return pcr <= MAX_PCR and len(name) == name_len and field_ids(name) is not None


def read_ascii(source: Source, *, first_index: int = 0, byte_order: str = sys.byteorder) -> t.Iterator[Record]:
    """The records of an ASCII list, with ``data`` and ``raw`` rebuilt; ``offset`` counts bytes of the text.

    The text hides two things, and the template digest tells both: the byte order (``byte_order`` is tried first, then
    the other one; the first record that tells binds the rest, and before it ``byte_order`` is taken), and where a
    record ends whose path holds a newline.
    A violation cannot be verified: it ends where the next line looks like the start of a record.
    Raises ``ListError``: ``malformed_list``, ``unknown_template``, ``digest_mismatch``, ``truncated``.
    """
    lines = _lines(source)
    line = next(lines, None)
    index, offset = first_index, 0
    orders = [byte_order, _other(byte_order)]
    while line is not None:
        text = _Text(line, index, offset)
        line = next(lines, None)
        record = text.record(orders, line)
        while record is None:
            text.join(line)
            line = next(lines, None)
            record = text.record(orders, line)
        if text.bound:
            orders = [text.bound]
        yield record
        index += 1
        offset += len(text.line)


def _lines(source: Source) -> t.Iterator[bytes]:
    r"""Lines with their ``\n``; the last one may lack it."""
    rest = b""
    while True:
        piece = source(_CHUNK)
        if not piece:
            break
        lines = (rest + piece).split(b"\n")
        rest = lines.pop()
        for line in lines:
            yield line + b"\n"
        if len(rest) > _MAX_LINE:
            break
    if rest:
        yield rest


class _Text:
    """The lines of one record of an ASCII list, as far as they were read."""

    def __init__(self, line: bytes, index: int, offset: int) -> None:
        self._line = line
        self._tail: list[bytes] = []  # lines that were joined and not looked at yet
        self.index = index
        self.offset = offset
        self.joined = self.joined_bytes = 0
        self.bound = ""  # the byte order that the digest told
        start = _ASCII_START.match(line)
        if not start:
            raise self.error("malformed_list", "the line does not start with PCR, lower-case hex digest and template")
        self.pcr = int(start.group(1))
        self.digest = bytes.fromhex(start.group(2).decode())
        self.template = start.group(3).decode()
        self._fields_at = start.end()
        names = field_ids(self.template)
        if names is None:
            what = f"template {self.template} is not known here: its fields cannot be read"
            raise self.error("unknown_template", what, template=self.template)
        self.names = names
        self.stuck = ("malformed_list", f"more than {len(names)} fields")

    @property
    def line(self) -> bytes:
        """The text so far."""
        if self._tail:
            self._line += b"".join(self._tail)
            self._tail = []
        return self._line

    def error(self, reason: str, what: str, **details: t.Any) -> ListError:
        return _error(reason, what, self.index, self.offset, **details)

    def record(self, orders: t.Sequence[str], following: bytes | None) -> Record | None:
        """The record if the text is all of it, None if the next line must be joined."""
        if self.joined and following is not None and not _ASCII_START.match(following):
            # It cannot end here: what follows begins no record. To look again at each line is work without a bound.
            self._go_on(following, *self.stuck)
            return None
        if not self.line.endswith(b"\n"):
            if len(self.line) > _MAX_LINE:
                raise self.error("malformed_list", f"a line of more than {_MAX_LINE} bytes")
            raise self.error("truncated", "the list ends inside this line")
        texts = self.line[self._fields_at : -1].split(b" ")
        if len(texts) < len(self.names):
            self._go_on(following, "malformed_list", f"{len(texts)} fields of {len(self.names)}")
            return None
        if len(texts) > len(self.names):
            # No path holds a space: what was joined is the next record, and the error is an earlier one.
            raise self.error(*self.stuck)
        for order in orders:
            record = self._build(texts, order)
            if record.violation:
                return self._end_violation(record, order, following)
            if _digest_holds(record):
                # The hash of template "ima" has no lengths in it: it does not tell.
                self.bound = "" if self.template == "ima" else order
                return record
        if self.names[-1] not in _STRINGS:
            following = None
        self._go_on(following, "digest_mismatch", "the template digest is not that of the fields")
        return None

    def _build(self, texts: list[bytes], order: str) -> Record:
        values = [self._parse(number, name, text, order) for number, (name, text) in enumerate(zip(self.names, texts))]
        if self.template == "ima" and (len(values[0]) != 20 or len(values[1]) > MAX_NAME):
            raise self.error("malformed_list", 'not a digest of 20 and a name of up to 255 bytes in template "ima"')
        data = template_data(self.template, values, order)
        raw = _raw(self.pcr, self.digest, self.template, data, order)
        return Record(self.index, self.offset, self.pcr, self.digest, self.template, data, raw)

    def _end_violation(self, record: Record, order: str, following: bytes | None) -> Record | None:
        _check_violation(record, self.names, fields(record, order))
        if following is None or _ASCII_START.match(following):
            return record
        self._go_on(following, "malformed_list", "the path of a violation does not end")
        return None

    def _go_on(self, following: bytes | None, reason: str, what: str) -> None:
        """Let ``following`` be joined; the error once there is none, or too much was joined already."""
        if following is None or self.joined == _MAX_JOINED_LINES or self.joined_bytes + len(following) > _MAX_JOIN:
            raise self.error(reason, what)
        self.stuck = (reason, what)

    def join(self, following: bytes | None) -> None:
        self._tail.append(following or b"")
        self.joined += 1
        self.joined_bytes += len(following or b"")

    def _parse(self, number: int, name: str, text: bytes, order: str) -> bytes:
        """The field's bytes from its text: the reverse of :func:`_show`."""
        try:
            return _PARSERS.get(name, _parse_hex)(name, text, order, self.template)
        except (ValueError, OverflowError) as error:
            what = f"field {number} ({name}) is not what the kernel writes"
            raise self.error("malformed_list", what, field=number) from error


def _digest_holds(record: Record) -> bool:
    try:
        _check_digest(record, DIGEST_SIZES[len(record.digest)])
    except ListError:
        return False
    return True


def _parse_hex(name: str, text: bytes, order: str, template: str) -> bytes:
    value = bytes.fromhex(text.decode("ascii"))
    if value.hex().encode() != text:
        raise ValueError("upper case or white space")
    return value


def _parse_digest(name: str, text: bytes, order: str, template: str) -> bytes:
    if not text:
        return b""
    algo, colon, digest = text.rpartition(b":")
    if b"\0" in algo:
        raise ValueError("NUL")
    return algo + b":\0" + _parse_hex(name, digest, order, template)


def _parse_string(name: str, text: bytes, order: str, template: str) -> bytes:
    if b"\0" in text:
        raise ValueError("NUL")
    if template == "ima" or (name == "xattrnames" and not text):
        return text
    return text + b"\0"


def _parse_uint(name: str, text: bytes, order: str, template: str) -> bytes:
    if not text:
        return b""
    value = int(text[:20])
    if b"%d" % value != text:
        raise ValueError("not a plain decimal number")
    return value.to_bytes(_UINTS[name], "little" if order == "little" else "big")


_PARSERS: dict[str, t.Callable[[str, bytes, str, str], bytes]] = {
    **dict.fromkeys(_DIGESTS, _parse_digest),
    **dict.fromkeys(_STRINGS, _parse_string),
    **dict.fromkeys(_UINTS, _parse_uint),
}
