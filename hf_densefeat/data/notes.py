"""Any table to notes: rows with a patient, a time and a text, checked and sorted."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_densefeat.data.columns import close_names, column, dense_codes, order_of_notes, shown, time_ticks
from hf_densefeat.data.readers import FORMATS, SourceTable, read_files
from hf_densefeat.data.times import read_times, stripped

logger = logging.getLogger(__name__)

PRESETS = {
    "plain": {"patient_id": "patient_id", "time": "time", "text": "text"},
    "MIMIC-IV-Note": {"patient_id": "subject_id", "time": "charttime", "text": "text"},
    "MEDS": {"patient_id": "subject_id", "time": "time", "text": "text_value"},
}


def load_notes(
    source: str | os.PathLike | datasets.Dataset,
    columns: str | Mapping[str, str] = "auto",
    split: str | None = None,
    on_missing: Literal["error", "drop"] = "error",
) -> datasets.Dataset:
    """Read notes from any table, check them, and sort them by (patient, time, `note_seq`), stably.

    Args:
        source: A parquet, csv, tsv, jsonl or json file (csv, tsv and jsonl also as .gz), a folder of such files, a
            folder written by `datasets` (`save_to_disk`), a MEDS folder (`data/`, `metadata/`), the name of a data
            set on the Hub, or a `datasets.Dataset`. Files are converted once into the `datasets` cache (under
            `HF_HOME`; it then holds patient text) and read memory-mapped.
        columns: "auto", a preset ("plain", "MIMIC-IV-Note", "MEDS"), or the names of your columns, such as
            `{"patient_id": "mrn", "time": "date", "text": "note"}`.
        split: Which split of a `datasets` folder or Hub data set; may be left out where there is only one.
        on_missing: What to do with rows without a patient or a time: refuse the table, or drop and count the rows.

    Returns:
        A dataset with `patient_id` (integers or strings), `time` (timestamps in UTC, or numbers, read as days),
        `text`, and every other column of the table under its own name. Rows without text and exact duplicates
        (patient, time, text) are dropped and counted in a warning. `notes.info.description` holds what was read.

    Raises:
        ValueError: If the source cannot be read, has no rows, lacks a column, has times that cannot be read, rows
            without patient or time (unless dropped), or nothing but empty texts.
    """
    if columns != "auto" and isinstance(columns, str) and columns not in PRESETS:
        raise ValueError(f'Expected `columns` "auto", one of {list(PRESETS)}, or a mapping, got "{columns}".')
    if on_missing not in ("error", "drop"):
        raise ValueError(f'Expected `on_missing` "error" or "drop", got {on_missing!r}.')
    opened = _open(source, columns, split)
    preset, roles = _match_columns(opened.data.column_names, columns, opened.meds)
    return _checked(replace(opened, data=_renamed(opened.data, roles)), preset, on_missing)


def describe_notes(notes: datasets.Dataset) -> str:
    """Return one line of counts: notes, patients, and adjacent pairs before filters, Σ_p (n_p − 1)."""
    counts = np.bincount(dense_codes(notes, "patient_id"))
    return (
        f"{len(notes):,} notes of {len(counts):,} patients (median {np.median(counts):g}, most {counts.max():,} a "
        f"patient), {len(notes) - len(counts):,} adjacent pairs"
    )


def _open(source: object, columns: str | Mapping[str, str], split: str | None) -> SourceTable:
    """Return the rows of any source."""
    if isinstance(source, datasets.DatasetDict):
        source = _one_split(source, split)
    if isinstance(source, datasets.Dataset):
        return SourceTable(source.with_format(None))
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"Expected a path, a Hub name or a datasets.Dataset, got {type(source).__name__}.")
    path = Path(source)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        try:
            return _open(datasets.load_from_disk(str(path)), columns, split)
        except (OSError, pa.ArrowException, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path.name} was written by `save_to_disk`, but cannot be read ({type(error).__name__}): write it "
                "anew."
            ) from None
    if path.exists():
        meds = (path / "data").is_dir() and (path / "metadata").is_dir()
        return read_files(path, lambda names: _match_columns(names, columns, meds)[1])
    if path.name.endswith(FORMATS) or path.is_absolute() or path.parts[:1] == ("..",) or len(path.parts) > 2:
        raise ValueError(f"{path.name}: no such file or folder. Expected {', '.join(FORMATS)}, or a folder of these.")
    try:
        return _open(datasets.load_dataset(str(source)), columns, split)
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f'"{source}" is no file or folder here, and could not be loaded from the Hub ({type(error).__name__}). '
            "Check the name, the network (HF_HUB_OFFLINE) and your login, or pass a path."
        ) from None


def _one_split(parts: datasets.DatasetDict, split: str | None) -> datasets.Dataset:
    """Return the split asked for, or the only one."""
    if split is None and len(parts) == 1:
        split = next(iter(parts))
    if split not in parts:
        raise ValueError(f"Expected `split` to be one of {list(parts)}, got {split!r}.")
    return parts[split]


def _match_columns(
    names: Sequence[str], columns: str | Mapping[str, str], meds: bool = False
) -> tuple[str, dict[str, str]]:
    """Return (preset, {our name: the table's name}), or say which columns were found and which come close."""
    if isinstance(columns, Mapping):
        unknown = sorted(set(columns) - set(PRESETS["plain"]))
        if unknown:
            raise ValueError(f"Expected `columns` to name {list(PRESETS['plain'])}, got {unknown}.")
        tried = {"your columns": PRESETS["MEDS" if meds else "plain"] | dict(columns)}
    elif columns == "auto":
        tried = {"MEDS": PRESETS["MEDS"]} if meds else PRESETS
    else:
        tried = {columns: PRESETS[columns]}
    for preset, roles in tried.items():
        if set(roles.values()) <= set(names):
            return preset, roles
    nearest = min(tried.values(), key=lambda roles: len(set(roles.values()) - set(names)))
    lacking = [f"`{theirs}`{close_names(theirs, names)}" for theirs in nearest.values() if theirs not in names]
    raise ValueError(
        f"Missing column {', '.join(lacking)}: the table has {shown(names)}. Name yours with "
        '`columns={"patient_id": ..., "time": ..., "text": ...}`.'
    )


def _renamed(table: datasets.Dataset, roles: Mapping[str, str]) -> datasets.Dataset:
    """Give the columns our names."""
    names = {theirs: ours for ours, theirs in roles.items() if ours != theirs}
    hidden = sorted(set(names.values()) & set(table.column_names) - set(names))
    if hidden or len(set(roles.values())) < len(roles):
        raise ValueError(
            f"Cannot take {dict(roles)}: {hidden or 'one column'} would be there twice. Rename or remove columns."
        )
    return table.rename_columns(names)


def _checked(source: SourceTable, preset: str, on_missing: str) -> datasets.Dataset:
    """Refuse or drop what is no note, give times one type, and sort."""
    table, total = source.data, len(source.data)
    if total == 0:
        raise ValueError("The table has no rows: expected notes, one a row.")
    patient = _patients(column(table, "patient_id"), source)
    time, unit = read_times(column(table, "time"), source)
    dropped = {"other codes": _other_codes(table, preset), "no text": _no_text(column(table, "text"))}
    if dropped["no text"].all():
        raise ValueError(
            f"All {total:,} texts are empty. Which column holds the text? The table has {shown(table.column_names)}."
        )
    for name, values in {"no patient": patient, "no time": time}.items():
        dropped[name] = values.is_null().to_numpy()
        missing = dropped[name] & ~dropped["no text"] & ~dropped["other codes"]
        if missing.any() and on_missing == "error":
            raise ValueError(
                f"{int(missing.sum()):,} of {total:,} rows have {name}, first {source.place(int(missing.argmax()))}. "
                'Fill them in, or pass `on_missing="drop"` to leave them out.'
            )
    for name, values in {"patient_id": patient, "time": time}.items():
        if not values.equals(column(table, name)):
            table = table.remove_columns(name).add_column(name, values.combine_chunks())
    rows = np.flatnonzero(~np.logical_or.reduce(list(dropped.values())))
    if len(rows) == 0:
        raise ValueError(f"None of {total:,} rows has a patient, a time and a text.")
    table = table.select(rows) if len(rows) < total else table
    order, codes = order_of_notes(table)
    repeated = _repeated(table, order, codes)
    dropped["the same patient, time and text as another"] = np.isin(np.arange(total), rows[order[repeated]])
    order = order[~repeated]
    if len(order) < len(table) or (np.diff(order) != 1).any():
        table = table.select(order)
    table = copy.deepcopy(table)  # shares the data; the description belongs to this one alone
    kept = {f"text with {what}": place for what, place in source.repaired.items()} | _oddities(table, rows[order])
    lines = [f"{len(table):,} notes, columns taken as {preset}, times as {unit}"]
    for verb, reasons in {
        "dropped": {name: (int(mask.sum()), int(mask.argmax())) for name, mask in dropped.items() if mask.any()},
        "kept": kept,
    }.items():
        if reasons:
            counts = [f"{count:,} with {name} (first {source.place(row)})" for name, (count, row) in reasons.items()]
            lines.append(f"{verb} {', '.join(counts)}")
    logger.info("Read %s", lines[0])
    for line in lines[1:]:
        logger.warning("Of %s rows, %s", f"{total:,}", line)
    table.info.description = "; ".join(lines)
    return table


def _other_codes(table: datasets.Dataset, preset: str) -> np.ndarray:
    """Mark the events of a MEDS table that have text but are no notes, where codes tell: NOTE//… beside others."""
    if preset != "MEDS" or "code" not in table.column_names:
        return np.zeros(len(table), dtype=bool)
    notes = pc.starts_with(column(table, "code"), "NOTE").fill_null(False).to_numpy()
    return ~notes if notes.any() else notes


def _oddities(table: datasets.Dataset, rows: np.ndarray) -> dict[str, tuple[int, int]]:
    """Count, of the notes that are kept, those a person may want to look at; with the first row in the source."""
    ticks, per_day = time_ticks(table)
    if per_day > 1:
        low, high = np.array(["1800", "2300"], dtype="datetime64[us]").astype(np.int64)
        found = {"a time before 1800 or after 2300": (ticks < low) | (ticks > high)}
    else:
        found = {"a negative time": ticks < 0, "a time beyond 1,000,000 days": ticks > 1e6}
    if "note_id" in table.column_names and pc.count_distinct(column(table, "note_id")).as_py() < len(table):
        codes = dense_codes(table, "note_id")
        found["a note_id that another note has too"] = np.bincount(codes)[codes] > 1
    return {name: (int(mask.sum()), int(rows[mask].min())) for name, mask in found.items() if mask.any()}


def _patients(values: pa.ChunkedArray, source: SourceTable) -> pa.ChunkedArray:
    """Return patient ids as integers or strings, empty ones null."""
    kind = values.type
    if pa.types.is_integer(kind):
        return values
    if pa.types.is_floating(kind):
        values = pc.if_else(pc.is_finite(values), values, None)
        # Beyond 2⁵³ a float no longer tells neighbouring integers apart.
        odd = (
            pc.or_(pc.not_equal(values, pc.floor(values)), pc.greater(pc.abs(values), 2**53))
            .fill_null(False)
            .to_numpy()
        )
        if odd.any():
            raise ValueError(
                f"Column patient_id holds floats that are no identifiers, first {source.place(int(odd.argmax()))}: "
                "expected integers or strings. Which column holds the patient?"
            )
        return values.cast(pa.int64())
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise ValueError(f"Column patient_id holds {kind}: expected integers or strings. Which one holds the patient?")
    values = stripped(values)
    # A csv file knows no types. Identifiers such as 007 stay what they are.
    numbers = pc.match_substring_regex(values, r"^(0|-?[1-9]\d{0,17})$").fill_null(True)
    return values.cast(pa.int64()) if source.untyped and pc.all(numbers).as_py() else values


def _no_text(values: pa.ChunkedArray) -> np.ndarray:
    """Mark null, empty and blank texts, chunk by chunk, so that no text is copied."""
    kind = values.type
    if pa.types.is_null(kind):
        return np.ones(len(values), dtype=bool)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"Column text holds {kind}: expected strings. Which column holds the text?")
    blank = [pc.or_(pc.equal(pc.binary_length(chunk), 0), pc.utf8_is_space(chunk)) for chunk in values.chunks]
    return pa.chunked_array(blank, pa.bool_()).fill_null(True).to_numpy()


def _repeated(table: datasets.Dataset, order: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Mark, in sorted order, notes that repeat an earlier one of the same patient and time word for word."""
    ticks = time_ticks(table)[0][order]
    same = (codes[order][1:] == codes[order][:-1]) & (ticks[1:] == ticks[:-1])
    group = np.cumsum(np.r_[True, ~same])
    suspects = np.flatnonzero(np.r_[False, same] | np.r_[same, False])
    repeated = np.zeros(len(order), dtype=bool)
    seen: set = set()
    for start in range(0, len(suspects), 1000):
        some = suspects[start : start + 1000]
        for place, text in zip(some, table.select(order[some])["text"], strict=True):
            mark = (group[place], hashlib.blake2b(text.encode(), digest_size=16).digest())
            repeated[place] = mark in seen
            seen.add(mark)
    return repeated
