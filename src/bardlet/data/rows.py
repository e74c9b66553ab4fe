"""Read a file as rows: JSON values (one per line, a list, or one after the other), CSV, TSV and Parquet.

The content of a JSON file decides, not its name: people save lists as .jsonl, and lines as .json. A row that cannot be
read is yielded as `Unusable`, so that the caller can count it and go on.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bardlet.data import formats
from bardlet.data.blocks import decoded, repair
from bardlet.data.forms import Unusable, kind
from bardlet.data.text import Notice, Source, inner_suffix, not_utf8, open_raw
from bardlet.errors import BardletError, printable

JSON_SUFFIXES, TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv", ".parquet")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES)

Row = tuple[str, Any]
"""(location, value): the location in words, and a JSON value or `Unusable`."""


def rows(source: Source, notice: Notice) -> Iterator[Row]:
    """Yield the rows of a file, one in memory at a time where its form allows it.

    Raises:
        BardletError: a file that is not UTF-8, damaged, or not in the form that its name says.
    """
    suffix = inner_suffix(source.path)
    if suffix == ".parquet":
        yield from _parquet(source.path)
    elif suffix in TABLE_SUFFIXES:
        yield from _table(source, notice)
    else:
        yield from _json(source, notice)


# ------------------------------------------------------------------------------------ JSON


def _json(source: Source, notice: Notice) -> Iterator[Row]:
    """Yield the values of a JSON file in any of its three forms."""
    lines = _lines(source, notice)
    beginning: list[tuple[int, str]] = []  # up to the second line that is not blank
    for number, line in lines:
        beginning += [(number, line)] * bool(line.strip())
        if len(beginning) == 2:
            break
    values = [_parsed(line) for _, line in beginning]
    several_lines = len(values) == 2 and all(isinstance(value, Unusable) for value in values)
    if several_lines or (len(values) == 1 and (isinstance(values[0], list) or _inside(values[0]))):
        yield from _whole(source, "".join(line for _, line in itertools.chain(beginning, lines)))
        return
    for number, line in itertools.chain(beginning, lines):
        if line.strip():
            yield f"{source.path}, line {number}", _parsed(line)


def _lines(source: Source, notice: Notice) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of a text file, with one line in memory at a time."""
    offset = 0
    with open_raw(source.path) as file:
        lines: Iterator[bytes] = iter(file)
        beginning = file.peek(4096)  # type: ignore[attr-defined]
        if sentence := formats.identify(beginning, source.path):
            raise BardletError(f"{source.path}: {sentence}")
        if beginning[:2] in (b"\xff\xfe", b"\xfe\xff"):
            lines = (line.encode() for line in _split_lines(decoded(file, source, notice, newline=False), _LF))
        elif sentence := formats.without_mark(beginning[:4096], source.path, source.convert_in_place):
            raise BardletError(f"{source.path}: {sentence}")
        for number, line in enumerate(lines, 1):
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                notice(source, "starts with a byte order mark; ignoring it")
                line, offset = line[3:], 3
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(source, offset + error.start, number, line + file.read(1 << 18), error.start) from None
            offset += len(line)
            yield number, text


def _parsed(text: str) -> Any:
    """Return the value of a JSON text, or `Unusable`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: JSON's own, or a number of 5,000 digits
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return Unusable(f"is not JSON{column}{' (NUL: this is binary)' if chr(0) in text else ''}")
    return _without_surrogates(value) if "\\u" in text else value


def _without_surrogates(value: Any) -> Any:
    """Return a value, or `Unusable` if one of its strings has half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Unusable("has half of a surrogate pair in it; write the character as UTF-8")
    return value


def _whole(source: Source, text: str) -> Iterator[Row]:
    """Yield the elements of a list, or values that follow each other over several lines."""
    decoder, position, number, escaped = json.JSONDecoder(), 0, 0, "\\u" in text
    while position < len(text):
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            line, column = getattr(error, "lineno", 0), getattr(error, "colno", 0)
            place = f" at line {line}, column {column}" if line else ""
            raise BardletError(f"{source.path}: is not JSON{place}; write one object per line, or a list of objects") \
                from None
        elements = value if isinstance(value, list) else _inside(value)
        for element in [value] if elements is None else elements:
            number += 1
            yield f"{source.path}, record {number}", _without_surrogates(element) if escaped else element
        position = end
        while position < len(text) and text[position].isspace():
            position += 1


def _inside(value: Any) -> list[Any] | None:
    """Return the records of an object that only wraps a list of objects, as {"data": [...]}; None for another one."""
    if not isinstance(value, dict) or any(isinstance(field, str) and len(field) > 100 for field in value.values()):
        return None
    lists = [field for field in value.values() if isinstance(field, list) and len(field) > 1]
    if len(lists) != 1 or not all(isinstance(each, dict) and "role" not in each and "from" not in each
                                  for each in lists[0]):
        return None
    return lists[0]


# ------------------------------------------------------------------------------------ tables


def _table(source: Source, notice: Notice) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file as objects, by the names in its first row."""
    with open_raw(source.path) as file:
        lines = _split_lines(decoded(file, source, notice, newline=False), _ANY)
        header = next(lines, "")
        mark = "\t" if inner_suffix(source.path) == ".tsv" else max(",;\t", key=header.count)
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        reader = csv.DictReader(itertools.chain((header,), lines), delimiter=mark)
        try:
            for row in reader:
                location = f"{source.path}, line {reader.line_num}"
                if None in row:
                    values = len(reader.fieldnames or ())
                    yield location, Unusable(f"has more than the {values} values of the first line")
                else:
                    yield location, {name: value for name, value in row.items() if value is not None}
        except csv.Error as error:
            raise BardletError(f"{source.path}, line {reader.line_num}: is not CSV ({error}); "
                               "export it again") from None


_LF, _ANY = re.compile("\n"), re.compile("\r\n?|\n")
"""The end of a line: LF; LF, CR LF or CR. A pattern of the whole line would be tried at each character of the last."""


def _split_lines(blocks: Iterable[str], ending: re.Pattern[str]) -> Iterator[str]:
    """Yield the lines of a text in blocks, with their ends."""
    rest: list[str] = []
    for block in blocks:
        if "\n" not in block and "\r" not in block:
            rest.append(block)  # a long line is joined once
            continue
        text, end = "".join((*rest, block)), 0
        # the LF of CR LF may be in the next block
        for match in ending.finditer(text, 0, len(text) - text.endswith("\r")):
            yield text[end:match.end()]
            end = match.end()
        rest = [text[end:]]
    text, end = "".join(rest), 0
    for match in ending.finditer(text):
        yield text[end:match.end()]
        end = match.end()
    if text[end:]:
        yield text[end:]


def _parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file as objects."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise BardletError(f"{path}: reading Parquet needs pyarrow; run pip install 'bardlet[documents]'") from None
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", value
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BardletError(f"{path}: not a Parquet file that can be read ({reason}); get the file again") from None


# ------------------------------------------------------------------------------------ documents


def read_documents(source: Source, notice: Notice) -> Iterator[tuple[str, str]]:
    """Yield (location, text) of each row: the text of the field `source.field`, which may be a path as data.text.

    A row whose text is null is left out, with a notice.
    """
    without, first = 0, []
    for location, value in rows(source, notice):
        if isinstance(value, Unusable):
            remedy = "; write one object per line, or rename the file to .txt" * ("is not JSON" in str(value))
            raise BardletError(f"{location}: {value}{remedy}")
        if isinstance(value, str) and inner_suffix(source.path) in JSON_SUFFIXES:
            text: Any = value
        elif isinstance(value, dict):
            text = _field(value, source.field, location)
        else:
            raise BardletError(f'{location}: is {kind(value)}, not an object like {{"{source.field}": "..."}}; '
                               "write one per line, or rename the file to .txt")
        if text is None:
            without += 1
            if without <= 3:
                first.append(location.removeprefix(f"{source.path}, "))
            continue
        if not isinstance(text, str):
            raise BardletError(f'{location}: "{source.field}" is {kind(text)}, not text; choose another field with '
                               "--field")
        yield location, repair(text, source, notice)
    if without:
        more = f" and {without - 3:,} more" if without > 3 else ""
        notice(source, f'left out, because "{source.field}" is null: {", ".join(first)}{more}')


def _field(value: dict[str, Any], path: str, location: str) -> Any:
    """Return a field by name or by dotted path. BardletError, with the fields that have text, if it is missing."""
    if path in value:
        return value[path]
    field: Any = value
    for name in path.split("."):
        if not isinstance(field, dict) or name not in field:
            candidates = list(itertools.islice(_paths(value), 8))
            remedy = (f"choose one with --field: {', '.join(candidates)}" if candidates else
                      "these are conversations: `bardlet sft RUN FILE` teaches a trained model to answer"
                      if isinstance(value.get("messages", value.get("conversations")), list) else
                      "no field of the record is text: add one")
            raise BardletError(f'{location}: has no field "{printable(path)[1:-1]}"; {remedy}')
        field = field[name]
    return field


def _paths(value: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the paths of all fields with text."""
    for name, field in value.items():
        if isinstance(field, str):
            yield prefix + name
        elif isinstance(field, dict):
            yield from _paths(field, f"{prefix}{name}.")
