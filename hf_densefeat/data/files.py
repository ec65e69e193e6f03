"""Files of tables as streams of bytes: which format, how packed, how encoded, how separated."""

import csv
import io
import zipfile
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

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
EXPECTED = f"{', '.join(FORMATS)}, the text formats also as {', '.join(PACKED)}"


def kind_of(file: Path) -> str:
    """Return the kind by the file's name, or an empty string; ValueError for a zip that does not hold one table."""
    name = (_member(file) if file.name.lower().endswith(".zip") else file.name).lower()
    for end in PACKED:
        name = name.removesuffix(end)
    kind = _kind_by_name(name)
    return kind if kind != "parquet" or name == file.name.lower() else ""


def opened(file: Path) -> Any:
    """A stream of bytes in UTF-8, whatever the file is packed in, from UTF-8 or UTF-16; cells may still hold others."""
    with _unpacked(file) as stream:
        recoded = stream.read(2) in (b"\xff\xfe", b"\xfe\xff")
    return pa.transcoding_input_stream(_unpacked(file), "utf-16", "utf-8") if recoded else _unpacked(file)


def header_of(file: Path) -> tuple[list[str], str, int]:
    """The cells of the first line of a text table that has any, what separates them, and how many empty lines precede it.

    The separator is the one of , ; | and tab that is most frequent in that line; StopIteration where there is none.
    """
    with io.TextIOWrapper(opened(file), "utf-8-sig", errors="surrogateescape", newline="") as lines:
        empty, first = next((i, line) for i, line in enumerate(lines) if line.strip())
        outside = "".join(first.split('"')[::2])  # a quoted name may hold any of them
        usual = "\t" if ".tsv" in file.name.lower() else ","
        delimiter = max(DELIMITERS, key=lambda mark: (outside.count(mark), mark == usual))
        names = next(csv.reader(chain([first], lines), delimiter=delimiter))
    return [str(decoded(name.encode("utf-8", "surrogateescape"))) for name in names], delimiter, empty


def decoded(cell: bytes | None) -> str | None:
    """A cell or a name as text: UTF-8, or else Windows-1252, which is what most old exports are in."""
    if cell is None:
        return None
    try:
        return cell.decode("utf-8")
    except UnicodeDecodeError:
        return cell.decode("cp1252", errors="replace")


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
        return pa.PythonFile(zipfile.ZipFile(file).open(_member(file)), "r")
    return pa.input_stream(str(file), compression="detect")
