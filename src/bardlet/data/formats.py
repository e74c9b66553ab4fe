"""Recognise files that are not text by their first bytes, and the encoding of text that is not UTF-8.

A message names the format and the command that converts it. Nothing here converts a file.
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

from bardlet.errors import quoted

SAMPLE = 1 << 18
"""Bytes from which an encoding is identified."""

ENCODINGS = {
    "cp1252": "Windows-1252 (Western European)", "cp1250": "Windows-1250 (Central European)",
    "cp1251": "Windows-1251 (Cyrillic)", "koi8_r": "KOI8-R (Cyrillic)", "cp866": "CP866 (Cyrillic)",
    "cp1253": "Windows-1253 (Greek)", "cp1254": "Windows-1254 (Turkish)", "cp1255": "Windows-1255 (Hebrew)",
    "cp1256": "Windows-1256 (Arabic)", "cp932": "Shift-JIS (Japanese)", "euc_jp": "EUC-JP (Japanese)",
    "gb18030": "GB18030 (Chinese)", "big5": "Big5 (Chinese)", "cp949": "CP949 (Korean)",
    "mac_roman": "Mac Roman", "cp437": "CP437 (DOS)",
}  # fmt: skip
"""Python's name and the display name of each encoding that can be identified."""
ICONV = {"koi8_r": "KOI8-R", "euc_jp": "EUC-JP", "mac_roman": "MACINTOSH"}
"""The name that iconv uses, where it is not Python's in capitals."""
UNPACK = {".gz": ("gzip -d", "gzip -dk"), ".xz": ("xz -d", "xz -dk"), ".bz2": ("bzip2 -d", "bzip2 -dk"),
          ".zst": ("zstd -d --rm", "zstd -d")}
"""The commands that decompress a file: without and with the compressed file left beside it."""

MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"%PDF", "a PDF document", "pdftotext {file} {text}"),
    (b"{\\rtf", "an RTF document", "pandoc {file} -t plain -o {text}"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "soffice --convert-to txt:Text {file}"),
    (b"\x1f\x8b", "compressed by gzip", "gzip -dc {file} > {text}"),
    (b"\xfd7zXZ\0", "compressed by xz", "xz -dc {file} > {text}"),
    (b"BZh", "compressed by bzip2", "bzip2 -dc {file} > {text}"),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard", "zstd -dc {file} > {text}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "7z x {file}"),
    (b"Rar!", "a RAR archive", "unrar x {file}"),
    (b"PAR1", "a Parquet table", "mv {file} {stem}.parquet"),
    (b"SQLite format 3", "an SQLite database", "sqlite3 {file} .dump > {text}"),
)
"""(first bytes, what the file is, the command that makes it readable)."""
AFTER_BLANKS = (b"%PDF", b"{\\rtf")
"""Beginnings that programs also recognise after white space and a byte order mark."""
ZIPPED: tuple[tuple[bytes, str, str], ...] = (
    (b"word/", "a Word document", "pandoc {file} -t plain -o {text}"),
    (b"application/epub+zip", "an EPUB book", "pandoc {file} -t plain -o {text}"),
    (b"application/vnd.oasis", "an OpenDocument file", "pandoc {file} -t plain -o {text}"),
    (b"xl/", "an Excel workbook", "in2csv {file} > {stem}.csv"),
    (b"ppt/", "a PowerPoint presentation", "soffice --convert-to pdf {file}"),
)
"""The same for zip archives, by a name in the archive."""


def identify(beginning: bytes, path: Path) -> str | None:
    """Return what a file is and how to convert it, as a sentence; None for text and unknown formats.

    Args:
        beginning: the first bytes of the file, at least 4 kB if it has them.
    """
    for magic, name, command in MAGIC:
        if (beginning.lstrip(b"\xef\xbb\xbf \t\r\n") if magic in AFTER_BLANKS else beginning).startswith(magic):
            return _sentence(name, command, path)
    if beginning.startswith(b"PK\x03\x04"):
        for part, name, command in ZIPPED:
            if part in beginning:
                return _sentence(name, command, path)
        return _sentence("a zip archive", "unzip {file} -d {stem}", path)
    if beginning[257:262] == b"ustar":
        return _sentence("a tar archive", "tar xf {file}", path)
    return None


def _sentence(name: str, command: str, path: Path) -> str:
    stem = quoted(path.stem)
    text = quoted(path.stem + ("" if Path(path.stem).suffix else ".txt"))
    return f"is {name}; make it text: {command.format(file=quoted(path), text=text, stem=stem)}"


NO_TEXT = ("Cc", "Cn", "Co", "Cs")
"""Unicode categories of what is not in a text: controls, unassigned and private characters, surrogates."""


def without_mark(beginning: bytes, path: Path, in_place: bool = False) -> str | None:
    """Return what UTF-16 or UTF-32 without a byte order mark is and how to convert it, as a sentence; None for others.

    Its zero bytes are all at even or all at odd places, and what it decodes to is text. in_place: see `conversion`.
    """
    if b"\0" not in beginning:
        return None
    for encoding in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        width = 4 if "32" in encoding else 2
        part = beginning[: len(beginning) // width * width]
        zeros = [part[place::width].count(0) for place in range(width)]
        high = zeros[-1] if encoding.endswith("le") else zeros[0]
        low = zeros[0] if encoding.endswith("le") else zeros[-1]
        if width == 2 and (low or (len(part) < 64 and high < 0.3 * len(part))):
            continue  # a NUL in a few other bytes
        text = part.decode(encoding, "replace")[:-1]  # the last character may be incomplete
        if text and high and all(c in "\n\r\t\f" or (c != "\ufffd" and unicodedata.category(c) not in NO_TEXT)
                                 for c in text):
            name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
            return f"looks like {name[:6]} without a byte order mark; convert it: {_iconv(name, path, in_place)}"
    return None


HTML = re.compile(r"(?:\s|<\?xml[^>]*>|<!--.*?-->)*(?:<!doctype\s+html|<html[\s>])", re.IGNORECASE | re.DOTALL)


def is_html(text: str) -> bool:
    """Return True if a text begins like an HTML page, perhaps after an XML declaration and comments."""
    return HTML.match(text[:1000]) is not None


def encoding_of(raw: bytes) -> str | None:
    """Return Python's name of the encoding of a text that is not UTF-8; None if none fits."""
    import charset_normalizer

    sample = raw[:SAMPLE]
    matches = charset_normalizer.from_bytes(sample, cp_isolation=list(ENCODINGS), threshold=0.3)
    best = matches.best()
    if best is None:
        return None
    for match in matches:  # Western and Central European text look alike: the more common encoding wins a draw
        if ("cp1252" in match.could_be_from_charset and match.chaos <= best.chaos + 0.01
                and match.coherence >= best.coherence - 0.05):
            return "cp1252"
    return best.encoding


def origin(sample: str) -> str:
    """Return iconv's name of the encoding that a text was in before it was converted as if it were Latin-1."""
    encoding = encoding_of(sample.encode("latin-1", "ignore")) or "cp1252"
    return ICONV.get(encoding, encoding.upper())


def conversion(raw: bytes, path: Path, in_place: bool = False) -> str:
    """Return a sentence on the encoding of a text that is not UTF-8, with the command that converts it.

    in_place: the command replaces the file, because only its folder or a pattern was named: a second file beside it
        would leave the first one in the text.
    """
    encoding = encoding_of(raw)
    if encoding is None:
        return "its encoding was not identified; open it in the program that wrote it and save it as UTF-8"
    if os.name == "nt":
        new = str(path) if in_place else f"{path.stem}-utf8{path.suffix}"
        command = (f'python -c "text = open({str(path)!r}, encoding=\'{encoding}\').read(); '
                   f"open({new!r}, 'w', encoding='utf-8').write(text)\"")
    else:
        command = _iconv(ICONV.get(encoding, encoding.upper()), path, in_place)
    return f"it looks like {ENCODINGS.get(encoding, encoding)}; convert it: {command}"


def _iconv(name: str, path: Path, in_place: bool) -> str:
    """Return the command that converts a file from the encoding `name`; a compressed one is decompressed first."""
    unpack = ""
    if packer := UNPACK.get(path.suffix.lower()):
        unpack = f"{packer[0 if in_place else 1]} {quoted(path)} && "
        path = path.with_suffix("")
    new = Path(f"{path}.tmp") if in_place else Path(f"{path.stem}-utf8{path.suffix}")
    replace = f" && mv {quoted(new)} {quoted(path)}" if in_place else ""
    return f"{unpack}iconv -f {name} -t UTF-8 {quoted(path)} > {quoted(new)}{replace}"
