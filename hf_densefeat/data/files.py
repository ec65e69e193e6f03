"""Files of tables as streams of bytes: which format, how packed, how encoded, how separated."""

from __future__ import annotations

import csv
import io
import logging
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa

logger = logging.getLogger(__name__)

# Name's end to kind; the kinds are what `readers` knows how to read.
FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
}
PACKED = (".gz", ".zst", ".bz2", ".zip")  # a zip holds one table
DELIMITERS = (",", ";", "|", "\t")
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
EXPECTED = f"{', '.join(FORMATS)}, the text formats also as {', '.join(PACKED)}"


def kind_of(file: Path) -> str:
    """Return the kind by the file's name, or an empty string; ValueError for a zip that does not hold one table."""
    name = file.name.lower()
    if name.endswith(".zip"):
        return _kind_by_name(_member(file).lower())
    for end in PACKED:
        name = name.removesuffix(end)
    kind = _kind_by_name(name)
    return kind if kind != "parquet" or name == file.name.lower() else ""


def refuse_spreadsheet(file: Path) -> None:
    """ValueError for a spreadsheet, with the cure."""
    if file.suffix.lower() in (".xlsx", ".xls", ".ods"):
        raise ValueError(
            f"{file.name} is a spreadsheet: save it as csv (UTF-8), or pass what pandas.read_excel gives to load_notes."
        )


def opened(file: Path) -> Any:
    """A binary stream of UTF-8, whatever the file is packed and encoded in; `read(size)` is all that it needs."""
    stream = _unpacked(file)
    encoding = MARKS.get(bytes(stream.read(2)))
    stream.close()
    return _Recoded(_unpacked(file), encoding) if encoding else _unpacked(file)


def delimiter_of(file: Path) -> str:
    """What separates the cells of a text table: the one of , ; | and tab that is most frequent in its first line."""
    stream = opened(file)
    with io.TextIOWrapper(io.BufferedReader(_Raw(stream)), "utf-8-sig", errors="replace", newline="") as lines:
        first = next((line for line in lines if line.strip()), "")
    outside = "".join(first.split('"')[::2])  # a quoted name may hold any of them
    usual = "\t" if ".tsv" in file.name.lower() else ","
    found = max(DELIMITERS, key=lambda mark: (outside.count(mark), mark == usual))
    return found if outside.count(found) else usual


def header_of(file: Path) -> list[str]:
    """The cells of the first line; UnicodeError where it is not UTF-8, StopIteration where there is none."""
    delimiter = delimiter_of(file)
    logger.info("%s is separated by %r.", file.name, delimiter)
    with io.TextIOWrapper(io.BufferedReader(_Raw(opened(file))), "utf-8-sig", errors="replace", newline="") as lines:
        names = next(row for row in csv.reader(lines, delimiter=delimiter) if row)
    if "\ufffd" in "".join(names):
        raise UnicodeError
    return names


def _kind_by_name(name: str) -> str:
    return next((kind for end, kind in FORMATS.items() if name.endswith(end)), "")


def _member(file: Path) -> str:
    """The name of the only table in a zip."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if _kind_by_name(name.lower()) and "__MACOSX" not in name]
    except zipfile.BadZipFile:
        raise ValueError(f"{file.name} is no zip archive, or is cut short: pack it anew.") from None
    if len(names) != 1:
        raise ValueError(f"{file.name} holds {len(names)} tables: expected one. Unpack it, and pass the folder.")
    if _kind_by_name(names[0].lower()) == "parquet":
        raise ValueError(f"{file.name} holds a parquet file, which is packed already: unpack it.")
    return names[0]


def _unpacked(file: Path) -> Any:
    if file.name.lower().endswith(".zip"):
        return zipfile.ZipFile(file).open(_member(file))
    return pa.input_stream(str(file), compression="detect")


class _Recoded:
    """A stream in another encoding, as UTF-8."""

    def __init__(self, stream: Any, encoding: str):
        self.lines = io.TextIOWrapper(io.BufferedReader(_Raw(stream)), encoding, newline="")

    def read(self, size: int = -1) -> bytes:
        """Characters, so at least as many bytes as are asked for would be too many: a quarter of them."""
        return self.lines.read(size // 4 if size > 3 else size).encode("utf-8")

    def close(self) -> None:
        """Close the stream below."""
        self.lines.close()


class _Raw(io.RawIOBase):
    """Any object with `read(size)` as a raw stream of Python."""

    def __init__(self, stream: Any):
        self.stream = stream

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as there is something."""
        block = self.stream.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)
