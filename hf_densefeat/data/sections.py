"""Notes cut into their sections, or joined in windows: other units to pair than the note."""

from __future__ import annotations

import re
from typing import Any

import datasets
import numpy as np

from hf_densefeat.data.columns import dense_codes, order_of_notes

SECTION_HEADER = r"^(?:#+ *\S.*|[A-Z][A-Z0-9 /&,()'-]{2,60}:?|[A-Z][A-Za-z0-9 /&,()'-]{2,60}:)[ \t]*$"


def split_into_sections(notes: datasets.Dataset, header: str = SECTION_HEADER) -> datasets.Dataset:
    """Cut the note of every patient who has one note only into its sections, so that these make adjacent pairs.

    A section begins at a line that is a header and runs to the next one; a header without a text of its own goes with
    the section that follows. The notes of other patients stay whole. Sections keep their note's other columns.

    Args:
        notes: What `load_notes` returns.
        header: Regular expression of a header line: by default a markdown heading, a line in capitals, or a short
            line that ends in a colon.

    Returns:
        The notes and sections with a column `section_index`, sorted by (patient, time, section).
    """
    patient = dense_codes(notes, "patient_id")
    single = np.bincount(patient)[patient] == 1
    return notes.map(
        _sections,
        batched=True,
        with_indices=True,
        fn_kwargs={"single": single, "header": re.compile(header, re.MULTILINE)},
        desc="Cutting sections",
    )


def _sections(
    batch: dict[str, list[Any]], rows: list[int], single: np.ndarray, header: re.Pattern[str]
) -> dict[str, list[Any]]:
    """Cut the texts of single notes, and repeat the other columns."""
    found = [_cut(text, header) if single[row] else [text] for text, row in zip(batch["text"], rows, strict=True)]
    columns = {
        name: [value for value, pieces in zip(values, found, strict=True) for _ in pieces]
        for name, values in batch.items()
    }
    return columns | {
        "text": [piece for pieces in found for piece in pieces],
        "section_index": [place for pieces in found for place in range(len(pieces))],
    }


def _cut(text: str, header: re.Pattern[str]) -> list[str]:
    """Cut a text before its header lines."""
    pieces, start = [], 0
    for match in header.finditer(text):
        before = text[start : match.start()].strip()
        if before and not header.fullmatch(before):
            pieces.append(before)
            start = match.start()
    return [*pieces, text[start:].strip()]


def join_windows(notes: datasets.Dataset, size: int) -> datasets.Dataset:
    """Join every `size` consecutive notes of a patient to one, so that adjacent windows make the pairs.

    Windows do not overlap; a patient's last one may be shorter. A window has its first note's other columns.

    Raises:
        ValueError: If `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"Expected `size` of at least 1 note, got {size}.")
    order, patient = order_of_notes(notes)
    patient = patient[order]
    begins = np.flatnonzero(np.r_[True, patient[1:] != patient[:-1]])
    place = np.arange(len(order)) - np.repeat(begins, np.diff(np.r_[begins, len(order)]))
    starts = np.flatnonzero(place % size == 0)
    stops = np.r_[starts[1:], len(order)]
    texts = notes.select_columns("text").select(order)
    return notes.select(order[starts]).map(
        lambda _, window: {"text": "\n\n".join(texts[int(starts[window]) : int(stops[window])]["text"])},
        with_indices=True,
        desc="Joining windows",
    )
