"""A stream of notes, sorted by patient and time, to batches of adjacent pairs, in bounded memory."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import chain, count, islice, pairwise, repeat
from typing import Any, NamedTuple

import datasets
import numpy as np
from torch.utils.data import IterableDataset

from hf_densefeat.data.inputs import Batch, paired, rows_of
from hf_densefeat.data.pairs import SPANS, NotePairs, check_kinds
from hf_densefeat.data.sampling import PairBatchSampler

logger = logging.getLogger(__name__)


class _Note(NamedTuple):
    """A note, the run of notes of one patient it stands in, and where the stream stood before it was read."""

    run: int
    time: datetime | float
    text: str
    position: dict[str, Any]


class PairStream(IterableDataset[Batch]):
    """The micro-batches of one rank, without end: after the last note the stream is read again.

    Notes have `patient_id`, `time` (timestamps, dates, or numbers of days) and `text`. Those of a patient follow each other,
    in the order of time; shards are read one after another, so that pairs across their borders are kept. Of the stream's
    pairs, which are as `kinds` and `max_gap` of `pair_notes` say, `buffer` at a time are held, in whole step batches of
    `batch_size · ranks · accumulation` pairs, and `PairBatchSampler`, to which `sampling` goes, mixes them: a step batch
    depends on (seed, number of the buffer) alone, not on how it is cut. A stream with fewer pairs than `buffer` has a smaller
    one, so that no buffer holds a pair twice. Lengths are those of the texts, in characters. All ranks read all notes, and
    `tokenize` (`StreamProcessor.columns`) and `collate` what is theirs.

    Every batch brings `stream`, the JSON of where reading is to go on after it, the same on every rank; it holds no
    text and no id. Reading goes on with the shard and the buffer it was in, not at the beginning.

    Iterating raises ValueError, naming the row, for a note without patient or time, for times that decrease, and for a
    patient who comes back after another's notes. The latter costs some 60 bytes a patient, and is noticed for patients
    who were read since the last start or resume. Notes without text are left out, and counted in a warning.
    """

    def __init__(
        self,
        notes: datasets.IterableDataset,
        tokenize: Callable[[list[str]], dict[str, list[Any]]],
        collate: Callable[[list[dict[str, Any]]], Batch],
        batch_size: int,
        *,
        ranks: int = 1,
        accumulation: int = 1,
        kinds: str | Sequence[str] = "adjacent",
        max_gap: float | None = None,
        buffer: int = 8192,
        **sampling: Any,
    ):
        names = ["patient_id", "time", "text"]
        if missing := [name for name in names if name not in (notes.column_names or names)]:
            raise ValueError(f"The stream lacks the columns {missing}. Rename yours: `notes.rename_columns(...)`.")
        self.notes, self.tokenize, self.collate = notes.select_columns(names), tokenize, collate
        self.sampling = {"batch_size": batch_size, "ranks": ranks, "accumulation": accumulation, **sampling}
        self.kinds, self.max_gap, self.accumulation = check_kinds(kinds), max_gap, accumulation
        self.step_size = batch_size * ranks * accumulation
        self.buffer = max(1, buffer // self.step_size) * self.step_size
        self.start = {"row": 0, "notes": self.notes.state_dict()}
        self.state: dict[str, Any] = {"position": self.start, "number": 0, "steps": 0}
        self.position = ""  # `stream` of the last batch that was trained on, which checkpoints keep
        self.said_cut = False

    def load_state(self, state: str) -> None:
        """Go on after the batch that brought this `stream`."""
        self.state, self.position = json.loads(state), state

    def __iter__(self) -> Iterator[Batch]:
        position, number, done = self.state["position"], self.state["number"], self.state["steps"]
        runs = count()
        first = self._pass(position, runs)
        # a stream that ends before its first buffer is full has a smaller one: no buffer may hold a pair twice
        read = [] if "size" in self.state else list(islice(first, self.buffer))
        size = self.state.get("size") or len(read) // self.step_size * self.step_size
        if not size:
            raise ValueError(
                f"The stream has {len(read):,} pairs, fewer than the {self.step_size:,} of one update, which would hold "
                "copies of a pair. Lower the batch size or accumulation, or bring more notes."
            )
        pairs = chain(read, first, chain.from_iterable(self._pass(start, runs) for start in repeat(self.start)))
        while True:
            earlier, later = zip(*islice(pairs, size), strict=True)
            rows, texts = np.arange(2 * size), [note.text for note in (*earlier, *later)]
            patient = np.array([note.run for note in earlier])
            indices = NotePairs(rows[:size], rows[size:], patient, len(rows), len(np.unique(patient)))
            sampler = PairBatchSampler(indices, [len(text) for text in texts], **self.sampling)
            # the number of the buffer stands for the epoch: each is mixed in its own way
            sampler.set_epoch(number)
            for micro_step, items in enumerate(sampler):
                steps, rest = divmod(micro_step + 1, self.accumulation)
                # what was trained on before the checkpoint is drawn again, and left out
                if steps + (rest > 0) > done:
                    state = {"position": position, "number": number, "steps": steps, "size": size}
                    yield self._batch(items, texts) | {"stream": json.dumps(state)}
            position, number, done = later[-1].position, number + 1, 0

    def _batch(self, items: list[tuple[int, int]], texts: list[str]) -> Batch:
        """Tokenise and collate one micro-batch."""
        if not items:
            return self.collate([])
        n = len(texts) // 2
        columns = self.tokenize([texts[pair + side] for side in (0, n) for pair, _ in items])
        if any(columns["cut"]) and not self.said_cut:
            self.said_cut = True
            logger.warning("The stream has notes longer than the limit on tokens: they are cut, and not counted.")
        return self.collate(paired(rows_of(columns), [mask_seed for _, mask_seed in items]))

    def _pass(self, position: dict[str, Any], runs: Iterator[int]) -> Iterator[tuple[_Note, _Note]]:
        """Yield the pairs from a position to the end: of a note and the one before, then those inside the note."""
        found, done = False, position.get("done", 0)  # pairs inside the first note that were yielded before
        before: _Note | None = None
        for note in self._read(position, runs):
            if before and "adjacent" in self.kinds and before.run == note.run and self._near(before, note):
                found = True
                yield before, note
            inside = [pair for kind in self.kinds if kind in SPANS for pair in pairwise(SPANS[kind](note.text))]
            for place, (first, second) in enumerate(inside[done:], done + 1):
                found = True
                yield note._replace(text=first), note._replace(text=second, position=note.position | {"done": place})
            before, done = note, 0
        if not found and position is self.start:
            gap = f", at most {self.max_gap} days apart" if self.max_gap is not None else ""
            raise ValueError(
                f"The stream has no pair of {' or '.join(self.kinds)} notes: expected patients with at least two notes in "
                f"a row{gap}, or notes that can be cut."
            )

    def _near(self, earlier: _Note, later: _Note) -> bool:
        gap: Any = later.time - earlier.time  # type: ignore[operator]
        days: float = gap / timedelta(days=1) if isinstance(gap, timedelta) else gap
        return self.max_gap is None or days <= self.max_gap

    def _read(self, position: dict[str, Any], runs: Iterator[int]) -> Iterator[_Note]:
        """Yield the notes from a position to the end."""
        row, run, blank = position["row"], 0, 0
        last: dict[str, Any] | None = None
        begun: set[int] = set()
        # Not `set_epoch`: it has `datasets` shuffle the shards, and patients who stand in two would be torn apart.
        self.notes.load_state_dict(position["notes"])
        before = position
        for note in self.notes:
            row += 1
            if not (note["text"] or "").strip():
                blank += 1
            else:
                patient = hash(note["patient_id"])
                new = last is None or note["patient_id"] != last["patient_id"]
                _check(row, note, None if new else last, new and patient in begun)
                if new:
                    begun.add(patient)
                    run = next(runs)
                last = note
                yield _Note(run, note["time"], note["text"], before)
            before = {"row": row, "notes": self.notes.state_dict()}
        if blank:
            logger.warning("Of %s rows of the stream, %s had no text: left out.", f"{row:,}", f"{blank:,}")


def _check(row: int, note: dict[str, Any], before: dict[str, Any] | None, again: bool) -> None:
    """Refuse a note that cannot follow the same patient's one before, or one of a patient who comes again."""
    if note["patient_id"] is None or note["time"] is None:
        what = "patient" if note["patient_id"] is None else "time"
        raise ValueError(f"Row {row:,} of the stream has no {what}. Fill it in, or leave the row out by `filter`.")
    if isinstance(note["time"], str):
        raise ValueError(
            "Column time of the stream holds strings: expected timestamps, dates or days. Cast it: "
            '`notes.cast_column("time", datasets.Value("timestamp[us]"))`.'
        )
    if again:
        raise ValueError(
            f"Row {row:,} of the stream is of a patient whose notes had ended before: the notes of a patient must follow "
            "each other. Sort the table by patient and time, and do not shuffle the stream."
        )
    if before and note["time"] < before["time"]:
        raise ValueError(
            f"Row {row:,} of the stream is earlier than the same patient's note before it. Sort the table by patient and "
            "time."
        )
