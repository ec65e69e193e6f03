"""Files of any common format to one memory-mapped table, with the place every row came from."""

import csv
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from hf_densefeat.data.columns import Layout, shown
from hf_densefeat.data.files import EXPECTED, decoded, header_of, kind_of, opened

logger = logging.getLogger(__name__)

BATCH_ROWS = 1000
BLOCK_BYTES = 1 << 23  # a row must fit in a block, and Arrow reads 32 of them ahead
CACHE_VERSION = 3
JSON_TIME = pa.timestamp("s")
READ_ERRORS = (pa.ArrowException, OSError, EOFError, zlib.error, csv.Error, ValueError, OverflowError)


@dataclass(frozen=True)
class SourceTable:
    """A table and what is known about where it came from.

    Attributes:
        data: The rows; memory-mapped where they came from files.
        layout: Which of its columns are what.
        files: (name, rows) of every file, in the order of the rows; empty if the table came from memory.
        repaired: What was mended while reading: by its name, how many rows and the first of them.
        meds: The files are a MEDS folder, of which only the events with text were read.
        untyped: The files have no types of their own (csv), so patient ids and times arrive as strings.
    """

    data: datasets.Dataset
    layout: Layout
    files: Sequence[tuple[str, int]] = ()
    repaired: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    meds: bool = False
    untyped: bool = False

    def place(self, row: int) -> str:
        """Name a row as its owner would find it: counted from 1, a header not counted."""
        for name, count in self.files:
            if row < count:
                return f"{'event with text' if self.meds else 'row'} {row + 1:,} of {name}"
            row -= count
        return f"row {row + 1:,}"


def read_files(path: Path, resolve: Callable[[Sequence[str], bool], Layout]) -> SourceTable:
    """Convert a file, or a folder of files of one format, to one Arrow file in the `datasets` cache, and map it.

    A file that was converted before, and has not changed since, is only mapped. The cache (under `HF_HOME`) then holds
    what the files hold. Text that is not UTF-8 is read as Windows-1252, NUL bytes are removed; both are counted. A folder
    with `data/` and `metadata/` is MEDS; `resolve(names, meds)` gives the layout of columns of these names, or raises.

    ValueError, which names file and row and quotes no text, if there is nothing to read, or a file is damaged.
    """
    meds = path.is_dir() and (path / "data").is_dir() and (path / "metadata").is_dir()
    root = path / "data" if meds else path if path.is_dir() else path.parent
    files, kind = _tables(path, root)
    headers = map(_column_names, files if meds else files[:1])
    layout = resolve(max(headers, key=lambda names: "text_value" in names), meds)
    roles = layout.roles | ({"fallback": layout.fallback} if layout.fallback else {})
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([CACHE_VERSION, stats, sorted(roles.items()), meds]).encode()).hexdigest()[:32]
    arrow = Path(datasets.config.HF_DATASETS_CACHE) / "hf_densefeat" / f"{key}.arrow"
    try:
        record = json.loads(arrow.with_suffix(".json").read_text()) if arrow.exists() else None
    except (FileNotFoundError, ValueError):  # no ledger, or not a whole one
        record = None
    if record is None:
        arrow.parent.mkdir(parents=True, exist_ok=True)
        arrow.parent.chmod(0o700)  # it is patient text, and so is what `datasets` keeps beside it
        record = _convert(files, root, arrow, roles, meds)
        with _unfinished(arrow.with_suffix(".json")) as ledger:
            ledger.write_text(json.dumps(record))
    data = datasets.Dataset.from_file(str(arrow))
    return SourceTable(data, layout, record["files"], record["repaired"], meds, untyped=kind == "csv")


@contextmanager
def _unfinished(file: Path) -> Iterator[Path]:
    """A file for the user alone, which gets its name when it is whole: one cut short would be read for ever."""
    part = file.with_suffix(f".{os.getpid()}.tmp")
    part.touch(mode=0o600)
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def damaged(name: str, rows: int, error: Exception) -> ValueError:
    """Say where reading stopped. Arrow's own message is left out: it quotes the row, and the row is patient text."""
    return ValueError(
        f"{name} could not be read after row {rows:,} ({type(error).__name__}): the file is cut short, damaged or not "
        "what its name says. In csv, look for a quote that is never closed; in jsonl, every line must be an object "
        f"whose keys keep their type. Text must be UTF-8, and a row at most {BLOCK_BYTES >> 20} MB."
    )


def _tables(path: Path, root: Path) -> tuple[list[Path], str]:
    """The files that hold the table, and their kind; ValueError for none, two kinds, a spreadsheet or an empty file."""
    found = [file for file in sorted(root.rglob("*")) if file.is_file()] if path.is_dir() else [path]
    if path.suffix.lower() in (".xlsx", ".xls", ".ods"):
        raise ValueError(
            f"{path.name} is a spreadsheet: save it as csv (UTF-8), or pass what pandas.read_excel gives to load_notes."
        )
    kinds = {file: kind for file in found if (kind := kind_of(file))}
    details = [file for file in kinds if len(kinds) > 1 and "_detail." in file.name]
    if details:
        logger.info("Left out %s: MIMIC's side tables hold no notes.", ", ".join(file.name for file in details))
    files = [file for file in kinds if file not in details]
    several = sorted({kinds[file] for file in files})
    if not several:
        raise ValueError(f"{path.name}: expected files named {EXPECTED}; got {len(found):,} files of other kinds.")
    if len(several) > 1:
        raise ValueError(
            f"{path.name} holds {' and '.join(several)} files, which may be the same notes twice: pass one of them, or move "
            "the others elsewhere."
        )
    if empty := [file.name for file in files if file.stat().st_size == 0]:
        raise ValueError(f"{empty[0]} is empty (0 bytes): expected a table. Was it written, or copied, to its end?")
    return files, several[0]


def _column_names(file: Path) -> list[str]:
    """Read the names of the columns, and as little else as possible."""
    try:
        if kind_of(file) == "parquet":
            names = list(map(str, pq.read_schema(file).names))
        elif kind_of(file) == "csv":
            names = header_of(file)[0]
        else:
            names = list(map(str, next(_batches(file, set(), True)).schema.names))
    except StopIteration:
        raise ValueError(f"{file.name} has no rows: expected a table of notes.") from None
    except READ_ERRORS as error:
        raise damaged(file.name, 0, error) from None
    if len(set(names)) < len(names):
        raise ValueError(f"{file.name} has two columns of one name: {shown(names)}. Rename one.")
    return names


class _TypeChanged(Exception):
    """A column was of one type at first, and of another later."""


def _convert(files: list[Path], root: Path, arrow: Path, roles: Mapping[str, str], meds: bool) -> dict[str, Any]:
    """Write the rows of all files to `arrow`; return how many came from each, and what was mended."""
    needed, columns = set(roles.values()), {file: _column_names(file) for file in files}
    if meds:
        columns = {file: names for file, names in columns.items() if roles["text"] in names}
    for file, names in columns.items():
        if not needed <= set(names):
            raise ValueError(
                f"{file.relative_to(root)} has the columns {shown(names)}: expected {sorted(needed)} in every "
                "file of a folder. Pass the file that holds the notes, or move the other tables elsewhere."
            )
    types: dict[str, pa.DataType | None] = {name: None for names in columns.values() for name in names}
    lacking = [name for name in types if any(name not in names for names in columns.values())]
    if lacking:
        logger.warning("Some files lack the columns %s: these cells are empty.", shown(lacking))
    if kind_of(files[0]) == "parquet":  # a column may be empty in the first file, and of no type there
        with suppress(pa.ArrowException, TypeError):  # no type fits all: the first file's is tried, and then strings
            schemas = [pq.read_schema(file) for file in columns]
            types |= {one.name: _plain(one.type) for one in pa.unify_schemas(schemas, promote_options="permissive")}
    places, events = {file: str(file.relative_to(root)) for file in columns}, roles["text"] if meds else None
    with _unfinished(arrow) as target:
        try:
            return _write(places, target, needed, types, events, infer=True)
        except _TypeChanged:  # types of the first rows do not hold for later ones
            logger.info("Columns besides patient, time and text change their type: read as strings.")
            types = {name: None if name in needed else pa.string() for name in types}
            return _write(places, target, needed, types, events, infer=False)


def _write(
    files: dict[Path, str], target: Path, needed: set[str], types: dict[str, Any], events: str | None, infer: bool
) -> dict[str, Any]:
    """Write the rows (of `events`, those with a text) with columns of these types, where None with the first rows'."""
    counts, total, writer, repaired = [], 0, None, dict[str, tuple[int, int]]()
    with pa.OSFile(str(target), "wb") as sink:
        for file, name in files.items():
            before = total
            for batch in _helpful(file, name, needed, infer):
                some = batch.filter(pc.is_valid(batch[events])) if events else batch
                found = _mended(some, needed, total, repaired)
                if writer is None:
                    first = {one: values.type for one, values in found.items()}
                    kinds = {one: kind or first.get(one, pa.string()) for one, kind in types.items()}
                    writer = pa.ipc.new_stream(sink, pa.schema(list(kinds.items())))
                try:
                    cells = [
                        found[one].cast(kind) if one in found else pa.nulls(len(some), kind)
                        for one, kind in kinds.items()
                    ]
                except (pa.ArrowException, ValueError):
                    if infer:
                        raise _TypeChanged from None
                    raise ValueError(
                        f"{name}: a column changes its type from {next(iter(files)).name}, or from the first rows: expected "
                        f"{ {one: str(kinds[one]) for one in sorted(needed)} }."
                    ) from None
                writer.write_table(pa.table(cells, names=list(kinds)), max_chunksize=BATCH_ROWS)
                total += len(some)
            counts.append((name, total - before))
        if total == 0 or writer is None:
            what, others = "events with text" if events else "rows", " and the others" * (len(files) > 1)
            raise ValueError(f"{next(iter(files)).name}{others}: no {what}. Expected a table of notes.")
        writer.close()
    return {"files": counts, "repaired": repaired}


def _helpful(file: Path, name: str, needed: set[str], infer: bool) -> Iterator[pa.RecordBatch]:
    """The batches of a file, and ValueError with help where reading fails."""
    rows = 0
    try:
        for batch in _batches(file, needed, infer):
            yield batch
            rows += len(batch)
    except READ_ERRORS as error:
        if infer and "conversion error" in str(error):
            raise _TypeChanged from None
        raise damaged(name, rows, error) from None


def _batches(file: Path, needed: set[str], infer: bool) -> Iterator[pa.RecordBatch]:
    """Yield the rows of one file; of a file without rows an empty batch, or nothing."""
    kind = kind_of(file)
    if kind == "parquet":
        # Arrow would read a whole row group ahead, which may be the whole file, and keep it
        yield from pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20).iter_batches(batch_size=BATCH_ROWS)
    elif kind == "csv":
        yield from _csv_batches(file, needed, infer)
    elif kind == "json" and opened(file).read(1000).decode("utf-8-sig", errors="ignore").lstrip()[:1] == "[":
        rows = json.loads(opened(file).read().decode("utf-8-sig"))
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("Expected a list of objects.")
        keys = dict.fromkeys(name for row in rows for name in row)  # `from_pylist` takes those of the first row
        table = pa.table({name: [row.get(name) for row in rows] for name in keys})
        yield from table.to_batches(max_chunksize=BATCH_ROWS)
    else:
        read = pa_json.ReadOptions(block_size=BLOCK_BYTES)
        schema = pa_json.open_json(opened(file), read).schema
        # Arrow takes a string for a time as long as it looks like one; the first that does not would end the reading.
        strings = [(name, pa.string()) for name, of in zip(schema.names, schema.types, strict=True) if of == JSON_TIME]
        parse = pa_json.ParseOptions(explicit_schema=pa.schema(strings))
        yield from pa_json.open_json(opened(file), read, parse)


class UnclosedQuote(csv.Error):
    """The last field of a csv file runs to the end of the file."""


def _csv_batches(file: Path, needed: set[str], infer: bool) -> Iterator[pa.RecordBatch]:
    names, delimiter, empty = header_of(file)
    # Bytes, not strings: one row that is not UTF-8 must not lose the file. And 007 is a patient, not the number 7.
    types = dict.fromkeys(needed if infer else names, pa.binary())
    # The names are given, because Arrow takes no header that is not UTF-8.
    how = {"column_names": names, "skip_rows_after_names": empty + 1, "use_threads": False}
    read = pa_csv.ReadOptions(block_size=BLOCK_BYTES, **how)
    parse = pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    last = None
    with pa_csv.open_csv(opened(file), read, parse, pa_csv.ConvertOptions(column_types=types)) as reader:
        for batch in reader:
            last = batch if len(batch) else last
            yield batch
    # Arrow does not notice that the last quote is missing: the row that it opens then runs over lines, to the end.
    cells = [] if last is None else [last[name][-1].as_py() or b"" for name in types]
    if any(b"\n" in cell for cell in cells):
        stream = opened(file)
        if sum(block.count(b'"') for block in iter(partial(stream.read, BLOCK_BYTES), b"")) % 2:
            raise UnclosedQuote


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries and views, and text as text."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    name = str(kind)
    if name.removeprefix("large_").removesuffix("_view") in ("string", "binary"):
        return pa.large_string() if "large" in name else pa.string()
    return kind


def _mended(
    batch: pa.RecordBatch, needed: set[str], offset: int, repaired: dict[str, tuple[int, int]]
) -> dict[str, pa.Array]:
    """Every column, text as a plain string without NUL, counting in which rows that changed something."""
    columns = {}
    for name, values in zip(batch.schema.names, batch.columns, strict=True):
        kind = _plain(values.type)
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if kind in (pa.string(), pa.large_string()):
            # By way of bytes: Arrow checks that they are UTF-8 then, and only then.
            values = values.cast(pa.large_binary() if kind == pa.large_string() else pa.binary())
            try:
                values = values.cast(kind)
            except pa.ArrowInvalid:
                cells = values.to_pylist()
                values = pa.array(map(decoded, cells), kind)
                odd = [cell is not None and cell.decode(errors="ignore").encode() != cell for cell in cells]
                _count(repaired, "bytes that are not UTF-8, read as Windows-1252", odd, offset)
            text = values.buffers()[2] if name in needed else None
            # A look at the bytes is ten times faster than a search in every row, and nearly always enough.
            if text and not np.frombuffer(text, np.uint8).all():
                nul = pc.match_substring(values, "\0")
                _count(repaired, "NUL bytes, removed", nul.fill_null(False).to_pylist(), offset)
                values = pc.replace_substring(values, "\0", "")
        columns[name] = values
    return columns


def _count(repaired: dict[str, tuple[int, int]], name: str, rows: list[bool], offset: int) -> None:
    if any(rows):
        count, first = repaired.get(name, (0, offset + rows.index(True)))
        repaired[name] = (count + sum(rows), first)
