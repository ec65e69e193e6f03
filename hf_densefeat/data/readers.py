"""Files of any common format to one memory-mapped table, with the place every row came from."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from hf_densefeat.data.columns import shown
from hf_densefeat.data.files import EXPECTED, delimiter_of, header_of, kind_of, opened, refuse_spreadsheet
from hf_densefeat.data.layouts import Layout

logger = logging.getLogger(__name__)

BATCH_ROWS = 1000
BLOCK_BYTES = 1 << 23  # a row must fit in a block, and Arrow reads 32 of them ahead
CACHE_VERSION = 2
JSON_TIME = pa.timestamp("s")
READ_ERRORS = (pa.ArrowException, OSError, EOFError, zlib.error, csv.Error, ValueError, OverflowError)


@dataclass(frozen=True)
class SourceTable:
    """A table and what is known about where it came from.

    Attributes:
        data: The rows; memory-mapped where they came from files.
        files: (name, rows) of every file, in the order of the rows; empty if the table came from memory.
        repaired: What was mended while reading: by its name, how many rows and the first of them.
        meds: The files are a MEDS folder, of which only the events with text were read.
        untyped: The files have no types of their own (csv), so patient ids and times arrive as strings.
    """

    data: datasets.Dataset
    files: Sequence[tuple[str, int]] = ()
    repaired: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    meds: bool = False
    untyped: bool = False

    def place(self, row: int) -> str:
        """Name a row as its owner would find it: counted from 1, a header not counted."""
        if not self.files:
            return f"row {row + 1:,}"
        ends = np.cumsum([count for _, count in self.files])
        file = int(np.searchsorted(ends, row, side="right"))
        inside = row - int(ends[file - 1] if file else 0) + 1
        return f"{'event with text' if self.meds else 'row'} {inside:,} of {self.files[file][0]}"


def read_files(path: Path, resolve: Callable[[Sequence[str]], Layout]) -> SourceTable:
    """Convert a file, or a folder of files of one format, to one Arrow file in the `datasets` cache, and map it.

    A file that was converted before, and has not changed since, is only mapped. The cache (under `HF_HOME`) then holds
    what the files hold. Text that is not UTF-8 is read as Windows-1252, NUL bytes are removed; both are counted.

    Args:
        path: The file or folder. A folder with `data/` and `metadata/` is read as MEDS.
        resolve: Given the names of the columns, returns their layout, or raises.

    Raises:
        ValueError: If there is nothing to read, or a file is damaged; it names file and row, and quotes no text.
    """
    meds = path.is_dir() and (path / "data").is_dir() and (path / "metadata").is_dir()
    root = path / "data" if meds else path if path.is_dir() else path.parent
    found = [file for file in sorted(root.rglob("*")) if file.is_file()] if path.is_dir() else [path]
    if path.is_file():
        refuse_spreadsheet(path)
    files = [file for file in found if kind_of(file)]
    details = [file for file in files if len(files) > 1 and "_detail." in file.name]
    if details:
        logger.info("Left out %s: MIMIC's side tables hold no notes.", ", ".join(file.name for file in details))
        files = [file for file in files if file not in details]
    kinds = sorted({kind_of(file) for file in files})
    if not kinds:
        raise ValueError(f"{path.name}: expected files named {EXPECTED}; got {len(found):,} files of other kinds.")
    if len(kinds) > 1:
        raise ValueError(
            f"{path.name} holds {' and '.join(kinds)} files, which may be the same notes twice: pass one of them, or move "
            "the others elsewhere."
        )
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    for (_, size, _), file in zip(stats, files, strict=True):
        if size == 0:
            raise ValueError(
                f"{file.name} is empty (0 bytes): expected a table. Was it written, or copied, to its end?"
            )
    names = _column_names(files[0])
    for file in files[1:] if meds and "text_value" not in names else ():
        names = max(names, _column_names(file), key=lambda found: "text_value" in found)
    if len(set(names)) < len(names):
        raise ValueError(f"{files[0].name} has two columns of one name: {shown(names)}. Rename one.")
    layout = resolve(names)
    roles = layout.roles | ({"fallback": layout.fallback} if layout.fallback else {})
    key = hashlib.sha256(json.dumps([CACHE_VERSION, stats, sorted(roles.items()), meds]).encode()).hexdigest()[:32]
    arrow = Path(datasets.config.HF_DATASETS_CACHE) / "hf_densefeat" / f"{key}.arrow"
    ledger = arrow.with_suffix(".json")
    if not (ledger.exists() and arrow.exists()):
        arrow.parent.mkdir(parents=True, exist_ok=True)
        ledger.write_text(json.dumps(_convert(files, root, arrow, roles, names, meds)))
    record = json.loads(ledger.read_text())
    data = datasets.Dataset.from_file(str(arrow))
    return SourceTable(data, record["files"], record["repaired"], meds, untyped=kinds[0] == "csv")


def damaged(name: str, rows: int, error: Exception) -> ValueError:
    """Say where reading stopped. Arrow's own message is left out: it quotes the row, and the row is patient text."""
    return ValueError(
        f"{name} could not be read after row {rows:,} ({type(error).__name__}): the file is cut short, damaged or not "
        "what its name says. In csv, look for a quote that is never closed; in jsonl, every line must be an object "
        f"whose keys keep their type. Text must be UTF-8, and a row at most {BLOCK_BYTES >> 20} MB."
    )


def _column_names(file: Path) -> list[str]:
    """Read the names of the columns, and as little else as possible."""
    try:
        if kind_of(file) == "parquet":
            return [str(name) for name in pq.read_schema(file).names]
        if kind_of(file) == "csv":
            return header_of(file)
        return [str(name) for name in next(_batches(file, (), {})).schema.names]
    except StopIteration:
        raise ValueError(f"{file.name} has no rows: expected a table of notes.") from None
    except READ_ERRORS as error:
        raise damaged(file.name, 0, error) from None


def _convert(
    files: list[Path], root: Path, arrow: Path, roles: Mapping[str, str], names: list[str], meds: bool
) -> dict[str, object]:
    """Write the rows of all files to `arrow`; return how many came from each, and what was mended."""
    unfinished = arrow.with_suffix(f".{os.getpid()}.tmp")
    try:
        # types that Arrow infers from the first block may not hold for a later one: then all is read again as strings
        for infer in (True, False):
            try:
                record = _write(files, root, unfinished, roles, names, meds, infer)
                break
            except _TypeChanged:
                logger.info("Columns besides patient, time and text change their type: read as strings.")
        unfinished.replace(arrow)
    finally:
        unfinished.unlink(missing_ok=True)
    return record


class _TypeChanged(Exception):
    """A csv column looked like numbers at first, and was not."""


def _check_same(found: list[str], names: list[str], name: str, first: str) -> None:
    if sorted(found) != sorted(names):
        raise ValueError(
            f"{name} has the columns {shown(found)}, but {first} has {shown(names)}: expected the same in every file of a "
            "folder. Pass the file that holds the notes, or move the other tables elsewhere."
        )


def _write(
    files: list[Path],
    root: Path,
    target: Path,
    roles: Mapping[str, str],
    names: list[str],
    meds: bool,
    infer: bool,
) -> dict[str, object]:
    """Write all rows once, with the types of csv columns inferred or all of them strings."""
    counts, total, schema, repaired = [], 0, None, dict[str, tuple[int, int]]()
    with pa.OSFile(str(target), "wb") as sink:
        for file in files:
            name, rows = str(file.relative_to(root)), 0
            batches = _batches(file, names, roles, infer)
            while True:
                try:
                    batch = next(batches, None)
                    found = [] if batch is None else batch.schema.names
                except _UnclosedQuote as error:
                    raise ValueError(
                        f"{name}: a quote is opened and never closed, so that its last row, row {rows:,}, runs to the "
                        "end of the file. Close the quote, and write quotes within a text twice."
                    ) from error
                except READ_ERRORS as error:
                    if infer and "conversion error" in str(error):
                        raise _TypeChanged from None
                    raise damaged(name, rows, error) from None
                if batch is None:
                    break
                if meds and roles["text"] not in found:
                    break
                _check_same(found, names, name, files[0].name)
                if meds:
                    batch = batch.filter(pc.is_valid(batch[roles["text"]]))
                batch = _mended(batch.select(names), roles, total, repaired)
                if schema is None:
                    schema = batch.schema
                    writer = pa.ipc.new_stream(sink, schema)
                try:
                    batch = batch.cast(schema)
                except (pa.ArrowException, ValueError):
                    if infer:
                        raise _TypeChanged from None
                    raise ValueError(
                        f"{name}: columns change their type from {files[0].name}, or from the first rows: expected "
                        f"{dict(zip(names, map(str, schema.types), strict=True))}."
                    ) from None
                for start in range(0, len(batch), BATCH_ROWS):
                    writer.write_batch(batch.slice(start, BATCH_ROWS))
                rows, total = rows + len(batch), total + len(batch)
            counts.append((name, rows))
        if total == 0:
            what, others = "events with text" if meds else "rows", " and the others" * (len(files) > 1)
            raise ValueError(f"{files[0].name}{others}: no {what}. Expected a table of notes.")
        writer.close()
    return {"files": counts, "repaired": repaired}


def _batches(
    file: Path, names: Sequence[str], roles: Mapping[str, str], infer: bool = True
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of one file; of a file without rows an empty batch, or nothing."""
    kind = kind_of(file)
    if kind == "parquet":
        # Arrow would read a whole row group ahead, which may be the whole file, and keep it
        yield from pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20).iter_batches(batch_size=BATCH_ROWS)
    elif kind == "csv":
        yield from _csv_batches(file, names, roles, infer)
    elif kind == "json" and _first_character(file) == "[":
        rows = json.loads(_all_text(file))
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("Expected a list of objects.")
        keys = dict.fromkeys(name for row in rows for name in row)
        table = pa.table({name: [row.get(name) for row in rows] for name in keys})
        yield from table.to_batches(max_chunksize=BATCH_ROWS)
    else:
        read = pa_json.ReadOptions(block_size=BLOCK_BYTES)
        schema = pa_json.open_json(pa.PythonFile(opened(file), "r"), read).schema
        # Arrow takes a string for a time as long as it looks like one; the first that does not would end the reading.
        strings = [(name, pa.string()) for name, of in zip(schema.names, schema.types, strict=True) if of == JSON_TIME]
        parse = pa_json.ParseOptions(explicit_schema=pa.schema(strings))
        yield from pa_json.open_json(pa.PythonFile(opened(file), "r"), read, parse)


def _all_text(file: Path) -> str:
    return b"".join(iter(partial(opened(file).read, BLOCK_BYTES), b"")).decode("utf-8-sig")


def _first_character(file: Path) -> str:
    return bytes(opened(file).read(1000)).decode("utf-8-sig", errors="ignore").lstrip()[:1]


class _UnclosedQuote(Exception):
    """The last field of a csv file runs to the end of the file."""


class _QuoteCounter:
    """Counts the quotes of a stream as they pass: Arrow does not notice that the last one is missing."""

    def __init__(self, file: Path):
        self.stream, self.quotes, self.closed = opened(file), 0, False

    def read(self, size: int = -1) -> bytes:
        block: bytes = self.stream.read(size)
        self.quotes += block.count(b'"')
        return block


def _csv_batches(file: Path, names: Sequence[str], roles: Mapping[str, str], infer: bool) -> Iterator[pa.RecordBatch]:
    types = {} if infer else dict.fromkeys(names, pa.binary())
    # Bytes, not strings: one row that is not UTF-8 must not lose the file. And 007 is a patient, not the number 7.
    types |= dict.fromkeys(roles.values(), pa.binary())
    read = pa_csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
    parse = pa_csv.ParseOptions(delimiter=delimiter_of(file), newlines_in_values=True)
    convert = pa_csv.ConvertOptions(column_types=types)
    counter, last = _QuoteCounter(file), None
    with pa_csv.open_csv(pa.PythonFile(counter, "r"), read, parse, convert) as reader:
        for batch in reader:
            last = batch if len(batch) else last
            yield batch
    if counter.quotes % 2 and last is not None and any(b"\n" in (cell or b"") for cell in _bytes_of_last_row(last)):
        raise _UnclosedQuote


def _bytes_of_last_row(batch: pa.RecordBatch) -> list[bytes | None]:
    return [column[-1].cast(pa.binary()).as_py() for column in batch if _is_text(column.type)]


def _is_text(kind: pa.DataType) -> bool:
    return str(kind).removeprefix("large_").removesuffix("_view") in ("string", "binary")


def _mended(
    batch: pa.RecordBatch, roles: Mapping[str, str], offset: int, repaired: dict[str, tuple[int, int]]
) -> pa.RecordBatch:
    """Make every column of text a plain string, without NUL, and count in which rows that changed something."""
    columns = []
    for name, values in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if not _is_text(values.type):
            columns.append(values)
            continue
        large = "large" in str(values.type)
        try:
            # By way of bytes: Arrow checks that they are UTF-8 then, and only then.
            values = values.cast(pa.large_binary() if large else pa.binary())
            values = values.cast(pa.large_string() if large else pa.string())
        except pa.ArrowInvalid:
            texts = [_decoded(cell) for cell in values.to_pylist()]
            _count(repaired, "bytes that are not UTF-8, read as Windows-1252", [odd for _, odd in texts], offset)
            values = pa.array([text for text, _ in texts], pa.large_string() if large else pa.string())
        if name in roles.values():
            text = values.buffers()[2]
            # A look at the bytes is ten times faster than a search in every row, and nearly always enough.
            if text and not np.frombuffer(text, np.uint8).all():
                nul = pc.match_substring(values, "\0")
                _count(repaired, "NUL bytes, removed", nul.fill_null(False).to_pylist(), offset)
                values = pc.replace_substring(values, "\0", "")
        columns.append(values)
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _decoded(cell: bytes | None) -> tuple[str | None, bool]:
    if cell is None:
        return None, False
    try:
        return cell.decode("utf-8"), False
    except UnicodeDecodeError:
        return cell.decode("cp1252", errors="replace"), True


def _count(repaired: dict[str, tuple[int, int]], name: str, rows: list[bool], offset: int) -> None:
    if any(rows):
        count, first = repaired.get(name, (0, offset + rows.index(True)))
        repaired[name] = (count + sum(rows), first)
