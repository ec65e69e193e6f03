"""Any table to notes: rows with a patient, a time and a text, checked and sorted."""

import copy
import hashlib
import logging
from collections.abc import Mapping
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_densefeat.data.columns import PRESETS, column, dense_codes, order_of_notes, place_in_run, shown, time_ticks
from hf_densefeat.data.identity import NONE_WORDS, identities
from hf_densefeat.data.readers import SourceTable
from hf_densefeat.data.sources import open_source
from hf_densefeat.data.times import TIME_UNITS, read_times

logger = logging.getLogger(__name__)

COPIED = "a text that the same patient has at another time"
DIGEST_ROWS = 10_000
FLAGGED = {"MIMIC-III": "iserror"}  # rows in which this column is 1 are no notes: a physician called them an error
WHITE = " \t\n\r\v\f"  # makes no difference between two texts
PLACEHOLDERS = ("0001-01-01", "1900-01-01", "9999-12-31")  # what they write for a missing date


def load_notes(
    source: Any,
    columns: str | Mapping[str, str] = "auto",
    *,
    split: str | None = None,
    on_missing: Literal["error", "drop"] = "error",
    time_unit: str | None = None,
    time_format: str | None = None,
    drop_copies: bool = False,
) -> datasets.Dataset:
    """Read notes from any table, check them, and sort them by (patient, time, `note_seq`), stably.

    Args:
        source: A parquet, csv, tsv, txt, jsonl, ndjson or json file (but parquet also packed as .gz, .zst, .bz2, or as a
            .zip of one file; UTF-8 or UTF-16; cells separated by commas, semicolons, pipes or tabs), a folder of such
            files, a folder written by `datasets` (`save_to_disk`), a MEDS folder (`data/`, `metadata/`), the name of a
            data set on the Hub, a `datasets.Dataset`, a pandas or polars frame, an Arrow table, a dict of columns or a
            list of dicts. Files are converted once into the `datasets` cache (under `HF_HOME`; it then holds patient
            text) and read memory-mapped.
        columns: "auto", a preset (one of `PRESETS`), or the names of your columns, such as
            `{"patient_id": "mrn", "time": "date", "text": "note"}`. Case and spaces around names do not matter.
        split: Which split of a `datasets` folder or Hub data set; may be left out where there is only one.
        on_missing: What to do with rows without a patient or a time: refuse the table, or drop and count the rows.
            Events of a MEDS folder without a time are static, and are always dropped and counted.
        time_unit: What numbers in the column of times count: "days", "seconds" or "milliseconds" since 1970, or
            "yyyymmdd" (also with HHMMSS). Without it they are days, and what looks like anything else, or is more than a
            million days, is refused.
        time_format: How strings in the column of times are written, as for `strptime`: "%d/%m/%Y".
        drop_copies: Leave out a note whose text an earlier note of the same patient has, white space aside: what is copied
            forward is found again without any understanding of it.

    Returns:
        A dataset with `patient_id` (integers or strings), `time` (timestamps in UTC, or numbers, read as days),
        `text`, and every other column of the table under its own name. Rows without text and duplicates (patient, time, and
        text but for white space) are dropped and counted in a warning. `notes.info.description` holds what was read.

        Two ids are one patient if they are equal in the form of `identities`: numbers as numbers (floats must be whole and
        below 2^53), strings letter by letter, without spaces around them, `1.0` as `1`. So `007` and `7` are two patients,
        and a UUID in another case is another patient. Words for nothing (NULL, nan, None) are no patient.

    Raises:
        ValueError: If the source cannot be read, has no rows, lacks a column, has times that cannot be read, rows
            without patient or time (unless dropped), or nothing but empty texts.
    """
    if columns != "auto" and isinstance(columns, str) and columns not in PRESETS:
        raise ValueError(f'Expected `columns` "auto", one of {list(PRESETS)}, or a mapping, got "{columns}".')
    if on_missing not in ("error", "drop"):
        raise ValueError(f'Expected `on_missing` "error" or "drop", got {on_missing!r}.')
    if time_unit not in (None, *TIME_UNITS):
        raise ValueError(f"Expected `time_unit` to be one of {', '.join(TIME_UNITS)}, got {time_unit!r}.")
    opened = open_source(source, columns, split)
    table, layout = opened.layout.renamed(opened.data), opened.layout
    how: dict[str, Any] = {"unit": time_unit, "pattern": time_format}
    time, unit = read_times(column(table, "time"), opened.place, **how)
    if layout.fallback:  # a time of day where there is one, else the date
        date, other = read_times(column(table, layout.fallback), opened.place, **how)
        time, unit = (pc.coalesce(time, date), unit) if time.null_count < len(time) else (date, other)
    if len(table) == 0:
        raise ValueError("The table has no rows: expected notes, one a row.")
    return _checked(opened, table, time, f"times as {unit}", on_missing == "drop", drop_copies)


def describe_notes(notes: datasets.Dataset) -> str:
    """Return one line of counts: notes, patients, and adjacent pairs before filters, Σ_p (n_p − 1)."""
    counts = np.bincount(dense_codes(notes, "patient_id"))
    return (
        f"{len(notes):,} notes of {len(counts):,} patients (median {np.median(counts):g}, most {counts.max():,} a "
        f"patient), {len(notes) - len(counts):,} adjacent pairs"
    )


def _checked(
    source: SourceTable,
    table: datasets.Dataset,
    time: pa.ChunkedArray,
    times: str,
    drop_missing: bool,
    drop_copies: bool,
) -> datasets.Dataset:
    """The notes of a table, with times of one type, sorted; what was done stands in `info.description`."""
    total, preset = len(table), source.layout.preset
    ids = _patients(column(table, "patient_id"), source)
    dropped = _unusable(source, table, ids, time, drop_missing)
    hashes = _hashes(column(table, "text"))  # before rows are selected, which would copy the texts
    for name, values in (("patient_id", ids), ("time", time)):
        if not values.equals(column(table, name)):
            table = table.remove_columns(name).add_column(name, values.combine_chunks())
    rows = np.flatnonzero(~np.logical_or.reduce(list(dropped.values())))
    if len(rows) == 0:
        raise ValueError(f"None of {total:,} rows has a patient, a time and a text.")
    kept = table.select(rows) if len(rows) < total else table
    order, codes = order_of_notes(kept)
    rows, codes = rows[order], codes[order]
    again = _again(hashes[rows], time_ticks(kept)[0][order], codes)
    copies = _again(hashes[rows], codes) & ~again & drop_copies
    dropped["the same patient, time and text as another"] = np.isin(np.arange(total), rows[again])
    dropped["a text that the patient had before"] = np.isin(np.arange(total), rows[copies])
    rows = rows[~(again | copies)]
    if len(rows) < total or (np.diff(rows) != 1).any():
        table = table.select(rows)
    table = copy.deepcopy(table)  # shares the data; the description belongs to this one alone
    mended = {f"text with {what}": place for what, place in source.repaired.items()}
    reasons = {
        "dropped": {what: (int(mask.sum()), int(mask.argmax())) for what, mask in dropped.items() if mask.any()},
        "kept": mended | _oddities(table, rows, hashes[rows]),
    }
    lines = [f"{len(table):,} notes, columns taken as {preset}, {times}"]
    for verb, found in reasons.items():
        counts = [f"{count:,} with {what} (first {source.place(row)})" for what, (count, row) in found.items()]
        lines += [f"{verb} {', '.join(counts)}"] if counts else []
    logger.info("Read %s", lines[0])
    for line in lines[1:]:
        logger.warning("Of %s rows, %s", f"{total:,}", line)
    table.info.description = "; ".join(lines)
    return table


def _unusable(
    source: SourceTable, table: datasets.Dataset, ids: pa.ChunkedArray, time: pa.ChunkedArray, drop_missing: bool
) -> dict[str, np.ndarray]:
    """Mark the rows that cannot be used, by reason; ValueError where dropping them would mislead."""
    total, preset = len(table), source.layout.preset
    dropped = {"other codes": other_codes(table, preset)} | no_notes(table, preset)
    if dropped["no text"].all():
        raise ValueError(
            f"All {total:,} texts are empty. Which column holds the text? The table has {shown(table.column_names)}."
        )
    for what, values in (("no patient", ids), ("no time", time)):
        absent = values.is_null().to_numpy()
        missing = absent & ~np.logical_or.reduce(list(dropped.values()))
        static = preset == "MEDS" and what == "no time"
        if missing.any() and not (drop_missing or static):
            raise ValueError(
                f"{int(missing.sum()):,} of {total:,} rows have {what}, first {source.place(int(missing.argmax()))}. "
                'Fill them in, or leave them out (`on_missing="drop"`).'
            )
        dropped[what] = absent
    return dropped


def no_notes(table: datasets.Dataset, preset: str) -> dict[str, np.ndarray]:
    """Mark the rows that are no notes, by reason; each reason shows in the row alone."""
    blank, word = _no_texts(column(table, "text"))
    flagged = np.zeros(len(table), dtype=bool)
    for name in table.column_names:
        if name.strip().lower() == FLAGGED.get(preset):
            flagged |= pc.equal(column(table, name).cast(pa.string()), "1").fill_null(False).to_numpy()
    return {
        "a mark that they are errors": flagged,
        "no text": blank,
        "a word for no text (NULL, nan, None)": word,
    }


def other_codes(table: datasets.Dataset, preset: str) -> np.ndarray:
    """Mark the events of a MEDS table that have a text but are no notes: codes other than NOTE//…, if any code is one."""
    if preset != "MEDS" or "code" not in table.column_names:
        return np.zeros(len(table), dtype=bool)
    notes: np.ndarray = pc.starts_with(column(table, "code"), pattern="NOTE").fill_null(False).to_numpy()
    return ~notes if notes.any() else notes


def _oddities(table: datasets.Dataset, rows: np.ndarray, hashes: np.ndarray) -> dict[str, tuple[int, int]]:
    """Count, of the notes that are kept, those a person may want to look at; with the first row in the source."""
    ticks, per_day = time_ticks(table)
    if per_day > 1:
        low, high = np.array(["1800", "2300"], dtype="datetime64[us]").astype(np.int64)
        none = np.isin(ticks // int(per_day), np.array(PLACEHOLDERS, dtype="datetime64[D]").astype(np.int64))
        found = {
            f'a date that often stands for none ({", ".join(PLACEHOLDERS)}; make it null, and pass on_missing="drop")': none,
            "a time before 1800 or after 2300": ((ticks < low) | (ticks > high)) & ~none,
        }
    else:
        found = {"a negative time": ticks < 0}
    if "note_id" in table.column_names and pc.count_distinct(column(table, "note_id")).as_py() < len(table):
        codes = dense_codes(table, "note_id")
        found["a note_id that another note has too"] = np.bincount(codes)[codes] > 1
    found |= _copies(hashes, dense_codes(table, "patient_id"))
    return {name: (int(mask.sum()), int(rows[mask].min())) for name, mask in found.items() if mask.any()}


def _hashes(texts: pa.ChunkedArray) -> np.ndarray:
    """A 64-bit hash of each text without its white space: of 10^7 notes, two different ones agree once in 10^5 tables."""

    def hashed(text: str | None) -> int:
        for space in WHITE:  # two to four times as fast as a regular expression
            text = (text or "").replace(space, "")
        return hash(text)

    few = pa.table({"text": texts}).to_batches(max_chunksize=1000)  # copied at once
    return np.concatenate([np.fromiter(map(hashed, batch["text"].to_pylist()), np.int64) for batch in few])


def _copies(hashes: np.ndarray, patient: np.ndarray) -> dict[str, np.ndarray]:
    """Mark texts that stand in the table more than once: copied forward in one patient, or in two patients' names."""
    code = np.unique(hashes, return_inverse=True)[1]
    # (text, patient) as one number: how often each occurs, and in how many patients' names a text stands
    own, which, count = np.unique(code * (patient.max() + 1) + patient, return_inverse=True, return_counts=True)
    patients = np.bincount(own // (patient.max() + 1))
    return {COPIED: count[which] > 1, "a text that another patient has too": patients[code] > 1}


def _again(*keys: np.ndarray) -> np.ndarray:
    """Mark rows that agree with an earlier one in every key."""
    order = np.lexsort(keys)
    again = np.zeros(len(order), dtype=bool)
    again[order] = place_in_run(*(key[order] for key in keys)) > 0
    return again


def copied(notes: datasets.Dataset) -> int:
    """How many notes have a text that the same patient has at another time, white space aside."""
    return int(_copies(_hashes(column(notes, "text")), dense_codes(notes, "patient_id"))[COPIED].sum())


def _patients(values: pa.ChunkedArray, source: SourceTable) -> pa.ChunkedArray:
    """Patient ids as integers or strings, empty ones null."""
    values = identities(values, place=source.place)
    # A csv file knows no types. Identifiers such as 007 stay what they are.
    if source.untyped and not pa.types.is_integer(values.type):
        numbers = pc.match_substring_regex(values, r"^(0|-?[1-9]\d{0,17})$").fill_null(True)
        return values.cast(pa.int64()) if pc.all(numbers).as_py() else values
    return values


def _no_texts(values: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Mark null and blank texts, and those that are nothing but a word that exports write for none."""
    kind = values.type
    if pa.types.is_null(kind):
        return np.ones(len(values), dtype=bool), np.zeros(len(values), dtype=bool)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"Column text holds {kind}: expected strings. Which column holds the text?")
    blank, word = [], []
    for chunk in values.chunks:  # one after another, so that no long text is copied
        length = pc.binary_length(chunk)
        blank.append(pc.or_(pc.equal(length, 0), pc.utf8_is_space(chunk)).fill_null(True))
        short = pc.utf8_lower(pc.utf8_trim_whitespace(pc.if_else(pc.less(length, 12), chunk, None)))
        word.append(pc.is_in(short, value_set=pa.array(NONE_WORDS, short.type), skip_nulls=True))
    return tuple(pa.chunked_array(marks, pa.bool_()).to_numpy() for marks in (blank, word))


class NoteTable:
    """A table of notes of any size; files are memory-mapped.

    Patients and times stand as they do in the table, because reading them all would take memory that grows with the notes.
    Source and columns are those of `load_notes`.
    """

    def __init__(self, source: Any, columns: str | Mapping[str, str] = "auto"):
        opened = open_source(source, columns, None)
        self.preset, self.data = opened.layout.preset, opened.layout.renamed(opened.data)
        self.others = other_codes(self.data, self.preset)  # of a MEDS table, a byte an event
        extra = [name for name in self.data.column_names if name.lower() == "note_id"]
        self.names = ["patient_id", "time", *extra]

    def __len__(self) -> int:
        """Rows, with those that are no notes."""
        return len(self.data)

    def slice(self, start: int, stop: int) -> tuple[pa.Table, list[str]]:
        """The notes among these rows: a table of `row` (from 0), patient_id, time and note_id if there is one; the texts."""
        some = self.data.select(range(start, min(stop, len(self))))
        dropped = [self.others[start:stop], *no_notes(some, self.preset).values()]
        kept = np.flatnonzero(~np.logical_or.reduce(dropped))
        columns = {"row": pa.chunked_array([pa.array(kept + start)])}
        columns |= {name: column(some, name).take(pa.array(kept)) for name in self.names}
        return pa.table(columns), column(some, "text").take(pa.array(kept)).to_pylist()

    def digest(self) -> str:
        """SHA-256 of the patients, times and texts of all rows, in order."""
        found = hashlib.sha256()
        for start in range(0, len(self), DIGEST_ROWS):
            some = self.data.select(range(start, min(start + DIGEST_ROWS, len(self))))
            for name in ("patient_id", "time", "text"):
                values = column(some, name).combine_chunks()
                found.update(pa.record_batch([values], [name]).serialize())
        return found.hexdigest()
