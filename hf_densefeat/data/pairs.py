"""Notes to pairs, as row indices: a note and the next one, two sections of a note, the two halves of a note."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np

from hf_densefeat.data.columns import column, dense_codes, order_of_notes, time_ticks

SECTION_HEADER = re.compile(
    r"^(?:#+ *\S.*|[A-Z][A-Z0-9 /&,()'-]{2,60}:?|[A-Z][A-Za-z0-9 /&,()'-]{2,60}:)[ \t]*$", re.MULTILINE
)
BORDERS = (re.compile(r"[.!?;:]\s+|\s*\n\s*|[。！？；]"), re.compile(r"\s+"))  # of sentences and lines, of words
SHORTEST_HALF = 40  # characters: a clause. A half of a few words says too little to be found by


def sections(text: str) -> list[str]:
    """Cut a text before its header lines; one without headers is one section.

    A header is a markdown heading, a line in capitals, or a short line that ends in a colon. A header without a text of
    its own goes with the section that follows.
    """
    pieces, start = [], 0
    for match in SECTION_HEADER.finditer(text):
        before = text[start : match.start()].strip()
        if before and not SECTION_HEADER.fullmatch(before):
            pieces.append(before)
            start = match.start()
    return [*pieces, text[start:].strip()]


def halves(text: str) -> list[str]:
    """Cut a text in two near its middle; [] for one that is too short.

    The cut is the end of a sentence or line in the middle third that is nearest to the middle, or else the nearest space
    there. Each half has at least `SHORTEST_HALF` characters.
    """
    text = text.strip()
    size = len(text)
    for border in BORDERS:
        cuts = [match.end() for match in border.finditer(text, size // 3, size - size // 3)]
        if cuts:
            cut = min(cuts, key=lambda place: abs(2 * place - size))
            both = [text[:cut].rstrip(), text[cut:].lstrip()]
            return both if min(map(len, both)) >= SHORTEST_HALF else []
    return []


SPANS: dict[str, Callable[[str], list[str]]] = {"sections": sections, "halves": halves}
PAIRS = ("adjacent", *SPANS)


@dataclass(frozen=True)
class NotePairs:
    """Pairs (note, the same patient's next note, or two spans of a note) as row indices into their notes or spans.

    Attributes:
        earlier: (P,) int64, rows of the earlier notes. Pairs are ordered by patient, then kind, then time.
        later: (P,) int64, rows of the notes that follow them.
        patient: (P,) int64, a dense code per patient, 0 … num_patients − 1; equal codes mean the same patient.
        num_notes: Number of rows that the indices count: notes, or with spans these too.
        num_patients: Number of patients among these notes.
        removed: Number of adjacent pairs each filter took away, by the filter's name.
        kinds: Number of pairs of each kind, where they are not all adjacent notes.
        whole: Number of notes in which a kind found no two spans, by the kind.
    """

    earlier: np.ndarray
    later: np.ndarray
    patient: np.ndarray
    num_notes: int
    num_patients: int
    removed: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.earlier)

    def __str__(self) -> str:
        paired = len(np.unique(self.patient))
        kinds = ", ".join(f"{count:,} {name}" for name, count in self.kinds.items())
        what = f"{self.num_notes:,} {'texts' if kinds else 'notes'} of {self.num_patients:,} patients"
        text = f"{len(self):,} pairs {f'({kinds}) ' if kinds else ''}of {paired:,} patients, from {what}"
        gone = ", ".join(f"{count:,} by {name}" for name, count in self.removed.items())
        uncut = "".join(f"; {count:,} notes have no {name}" for name, count in self.whole.items() if count)
        return f"{text}; removed: {gone}{uncut}" if gone else text + uncut


def pair_notes(
    notes: datasets.Dataset,
    kinds: str | Sequence[str] = "adjacent",
    *,
    max_gap: float | None = None,
    same: str | Sequence[str] = (),
) -> tuple[datasets.Dataset, NotePairs]:
    """Pair notes, or spans of notes, in one way or in several at once.

    * `adjacent`: a note and the same patient's next note (`adjacent_pairs`).
    * `sections`: a section and the next one of its note.
    * `halves`: the two halves of a note, as the inverse cloze task (Lee et al., 2019) and the independent
      crops of Contriever (Izacard et al., 2022) pair two spans of one text. Here no two spans share a token.

    Sections and halves need no second note of a patient, and are of one matter even where adjacent notes share nothing
    but their author. Several kinds give the pairs of each, as many as there are, none of some kinds included.

    Args:
        notes: What `load_notes` returns.
        kinds: One of these names or several.
        max_gap: As for `adjacent_pairs`, of adjacent notes alone.
        same: As `max_gap`.

    Returns:
        The texts to read, and the pairs, which count their rows: the notes themselves where all pairs are adjacent notes,
        else a table `patient_id, time, text` of notes and spans.

    Raises:
        ValueError: For another name, and if no pair is left.
    """
    kinds = check_kinds(kinds)
    if kinds == ["adjacent"]:
        return notes, adjacent_pairs(notes, max_gap=max_gap, same=same)
    patient, plain = dense_codes(notes, "patient_id"), notes.select_columns(["patient_id", "time", "text"])
    features = datasets.Features(plain.features | {"note": datasets.Value("int64")})
    tables, sides, removed, counts, whole = list[datasets.Dataset](), list[np.ndarray](), dict[str, int](), {}, {}
    for kind in kinds:
        if kind == "adjacent":
            table, found = plain, pairs_if_any(notes, max_gap=max_gap, same=same)  # without any the spans may serve
            removed, made = found.removed, np.stack([found.earlier, found.later, found.patient])
        else:
            options = {"batched": True, "with_indices": True, "features": features, "desc": f"Cutting {kind}"}
            table = plain.map(_cut, fn_kwargs={"kind": kind}, **options)
            note = column(table, "note").to_numpy()
            # spans of a note stand together: one and the next one are a pair where they are of one note
            first = np.flatnonzero(note[1:] == note[:-1])
            table, made = table.remove_columns("note"), np.stack([first, first + 1, patient[note[first]]])
            whole[kind] = len(notes) - len(np.unique(note))
        made[:2] += sum(map(len, tables))
        tables.append(table)
        sides.append(made)
        counts[kind] = made.shape[1]
    earlier, later, owner = np.concatenate(sides, axis=1)
    if not len(earlier):
        raise ValueError(
            f"No pair of {' or '.join(kinds)} in {len(notes):,} notes: the header of a section is a line in capitals or one "
            "that ends in a colon, and a note is cut in halves from some 100 characters on. Pair in another way: "
            f"{', '.join(name for name in PAIRS if name not in kinds)}."
        )
    order = np.argsort(owner, kind="stable")  # pairs of a patient stand together, as the sampler expects
    rows, patients = sum(map(len, tables)), int(patient.max()) + 1
    pairs = NotePairs(earlier[order], later[order], owner[order], rows, patients, removed, counts, whole)
    return datasets.concatenate_datasets(tables), pairs


def pairs_by_kind(notes: datasets.Dataset, kinds: Sequence[str]) -> dict[str, tuple[datasets.Dataset, NotePairs]]:
    """`pair_notes` of each of the kinds; those of which the notes have no pair are left out."""
    found = {}
    for kind in check_kinds(kinds):
        try:
            found[kind] = pair_notes(notes, kind)
        except ValueError:  # no patient has two notes, or no note is long enough
            continue
    return found


def pair_texts(notes: datasets.Dataset, kinds: str | Sequence[str] = "adjacent", **options: Any) -> datasets.Dataset:
    """The texts of `pair_notes`, with its options, as a table `earlier, later`: what sentence-transformers' trainer takes."""
    table, pairs = pair_notes(notes, kinds, **options)
    sides = {"earlier": pairs.earlier, "later": pairs.later}
    columns = [table.select_columns("text").select(rows).rename_column("text", name) for name, rows in sides.items()]
    return datasets.concatenate_datasets(columns, axis=1)


def check_kinds(kinds: str | Sequence[str]) -> list[str]:
    """The names of kinds of pairs as a list, each once; ValueError for none or another name."""
    named = list(dict.fromkeys([kinds] if isinstance(kinds, str) else kinds))
    if not named or set(named) - set(PAIRS):
        raise ValueError(f"Expected pairs to be one or several of {', '.join(PAIRS)}, but got {kinds!r}.")
    return named


def _cut(batch: dict[str, list[Any]], rows: list[int], kind: str) -> dict[str, list[Any]]:
    """Spans of the notes that have two or more, and the row of the note of each."""
    found = [spans if len(spans) > 1 else [] for spans in map(SPANS[kind], batch["text"])]
    columns = {
        name: [value for value, spans in zip(values, found, strict=True) for _ in spans]
        for name, values in {**batch, "note": rows}.items()
    }
    return columns | {"text": [span for spans in found for span in spans]}


def adjacent_pairs(
    notes: datasets.Dataset,
    *,
    max_gap: float | None = None,
    same: str | Sequence[str] = (),
    max_overlap: float | None = None,
) -> NotePairs:
    """Pair every note with the same patient's next note: Σ_p (n_p − 1) pairs before filters.

    Only the small columns are read; the notes may lie in any order. Ties in time are broken by `note_seq` where the
    table has it, then by row. Split by patient *before* pairing, so that no pair spans two splits.

    Args:
        notes: What `load_notes` returns.
        max_gap: Largest time between the two notes, in days (a fraction is fine); pairs further apart are left out.
        same: Names of columns in which the two notes must agree, such as `note_type` or `hadm_id`. An empty cell
            agrees with nothing.
        max_overlap: Largest share, in [0, 1], of the later note's runs of five words that the earlier note has too;
            pairs above it, notes copied forward, are left out. Reads the texts of the pairs that are left so far.

    Returns:
        The pairs, with the number that each filter removed; filters act in the order of the arguments.

    Raises:
        ValueError: If no pair is left, or a column named in `same` does not exist.
    """
    order, patient = order_of_notes(notes)
    patients = int(patient.max()) + 1 if len(patient) else 0
    sorted_patient = patient[order]
    # a note and the next one in the order are a pair where they are of one patient
    first = np.flatnonzero(sorted_patient[1:] == sorted_patient[:-1])
    earlier, later = order[first], order[first + 1]
    adjacent, removed = len(first), {}

    def keep(name: str, mask: np.ndarray) -> None:
        nonlocal earlier, later
        removed[name] = int(len(mask) - mask.sum())
        earlier, later = earlier[mask], later[mask]

    if max_gap is not None:
        ticks, ticks_per_day = time_ticks(notes)
        keep("max_gap", ticks[later] - ticks[earlier] <= max_gap * ticks_per_day)
    for name in [same] if isinstance(same, str) else same:
        codes, known = dense_codes(notes, name), column(notes, name).is_valid().to_numpy()
        keep(f"same {name}", (codes[earlier] == codes[later]) & known[earlier])
    if max_overlap is not None:
        keep("max_overlap", _overlap(notes, earlier, later) <= max_overlap)
    pairs = NotePairs(earlier, later, patient[earlier], len(notes), patients, removed)
    if len(pairs) == 0:
        gone = ", ".join(f"{count:,} by {name}" for name, count in removed.items()) or "none by filters"
        raise ValueError(
            f"No pair of adjacent notes: expected patients with at least two notes, got {len(notes):,} notes of "
            f"{patients:,} patients, {adjacent:,} adjacent pairs of which were removed: {gone}. Loosen the filters, "
            "add notes, or, where patients have one note each, pair its sections or halves: `pairs` (`pair_notes`)."
        )
    return pairs


def pairs_if_any(notes: datasets.Dataset, **filters: Any) -> NotePairs:
    """`adjacent_pairs`, or none where every patient has one note; ValueError still where filters leave none."""
    patients = len(np.unique(dense_codes(notes, "patient_id")))
    if patients < len(notes):
        return adjacent_pairs(notes, **filters)
    none = np.empty(0, dtype=np.int64)
    return NotePairs(none, none, none, len(notes), patients)


def _overlap(notes: datasets.Dataset, earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
    """Return the share of each later note's five-word shingles that its earlier note has too."""
    texts, shares = notes.select_columns("text"), []
    for start in range(0, len(earlier), 1000):
        sides = [texts[rows[start : start + 1000]]["text"] for rows in (earlier, later)]
        shares += [np.isin(_shingles(after), _shingles(before)).mean() for before, after in zip(*sides, strict=True)]
    return np.array(shares)


def _shingles(text: str) -> np.ndarray:
    """Return the hashes of all runs of five words; a shorter text is one run."""
    words = np.array([hash(word) for word in text.split()], dtype=np.int64).view(np.uint64)
    size = min(5, len(words))
    runs = np.lib.stride_tricks.sliding_window_view(words, size)
    return np.unique(runs @ (np.uint64(0x9E3779B97F4A7C15) ** np.arange(size, dtype=np.uint64)))
