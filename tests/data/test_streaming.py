"""Streams: every pair once a pass, whatever the shards and the cut, and on from where a checkpoint left them."""

import datetime
import itertools
import json
import logging
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_densefeat import DenseTrainer, DenseTrainingArguments
from hf_densefeat.data.streaming import PairStream

pytestmark = pytest.mark.slow

START = datetime.datetime(2020, 1, 1)


def tokenize(texts):
    """The text, a number, is the only token."""
    return {"input_ids": [[int(text)] for text in texts], "cut": [0] * len(texts)}


def collate(pairs):
    return {
        "pairs": [
            (pair["earlier"]["input_ids"][0], pair["later"]["input_ids"][0], pair["mask_seed"]) for pair in pairs
        ]
    }


def table(counts, day=1):
    """So many notes of each patient; the text is the number of the row."""
    rows = {"patient_id": [], "time": [], "text": []}
    for patient, count in enumerate(counts):
        for visit in range(count):
            rows["patient_id"].append(patient)
            rows["time"].append(START + datetime.timedelta(days=visit * day))
            rows["text"].append(str(len(rows["text"])))
    return rows


def shards(folder, rows, borders):
    """A stream of parquet files, cut at the borders."""
    whole = pa.table(rows)
    cuts = [0, *sorted(borders), len(whole)]
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        pq.write_table(whole.slice(start, stop - start), folder / f"{number:02}.parquet", row_group_size=3)
    files = sorted(str(file) for file in folder.glob("*.parquet"))
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=str(folder))


def stream_of(rows, **options):
    return PairStream(datasets.Dataset.from_dict(rows).to_iterable_dataset(), tokenize, collate, **options)


def expected_pairs(counts):
    starts = [0, *itertools.accumulate(counts)]
    return [
        (row, row + 1) for start, count in zip(starts, counts, strict=False) for row in range(start, start + count - 1)
    ]


counts = st.lists(st.integers(1, 7), min_size=2, max_size=25).filter(lambda found: max(found) > 1)


@given(counts=counts, data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_pair_once_a_pass_across_shard_borders(tmp_path_factory, counts, data):
    """In the order of the buffers each pair comes once a pass, wherever the shards are cut, and passes join."""
    rows, expected = table(counts), expected_pairs(counts)
    borders = data.draw(st.sets(st.integers(1, len(rows["text"]) - 1), max_size=4))
    notes = shards(tmp_path_factory.mktemp("shards"), rows, borders)
    stream = PairStream(notes, tokenize, collate, batch_size=1, buffer=1)
    found = [batch["pairs"][0][:2] for batch in itertools.islice(stream, 2 * len(expected))]
    assert found == expected * 2


@given(
    counts=counts.filter(lambda found: sum(found) - len(found) >= 12),
    grouped=st.integers(1, 3),
    seed=st.integers(0, 3),
    resumed=st.integers(0, 8),
)
@settings(max_examples=12, deadline=None)
def test_steps_do_not_depend_on_the_cut_nor_on_a_resume(counts, grouped, seed, resumed):
    """12 pairs at once, and 3 or 4 a rank and micro-batch, are the same pairs in the same steps, resumed or not.

    No step has a pair twice, however short the stream.
    """
    rows, steps = table(counts), 10

    def read(batch_size, ranks, accumulation, states=None):
        batches = {number: [] for number in range(steps)}
        for rank in range(ranks):
            options = {"ranks": ranks, "rank": rank, "accumulation": accumulation, "pairs_per_patient": grouped}
            stream = stream_of(rows, batch_size=batch_size, buffer=24, seed=seed, **options)
            first = 0
            if states:
                stream.load_state(states[resumed])
                first = resumed + 1
            micro_batches = list(itertools.islice(stream, (steps - first) * accumulation))
            for number, batch in enumerate(micro_batches):
                batches[first + number // accumulation] += batch["pairs"]
        last = [batch["stream"] for batch in micro_batches[accumulation - 1 :: accumulation]]
        return {number: sorted(batch) for number, batch in batches.items()}, last

    whole, states = read(12, 1, 1)
    assert all(len({pair[:2] for pair in batch}) == 12 for batch in whole.values())
    assert read(3, 2, 2) == (whole, states)
    assert read(4, 3, 1) == (whole, states)
    for cut in ((12, 1, 1), (3, 2, 2)):
        after, _ = read(*cut, states=states)
        assert {number: after[number] for number in range(resumed + 1, steps)} == {
            number: whole[number] for number in range(resumed + 1, steps)
        }


def test_a_resume_reads_neither_from_the_start_nor_text_from_the_checkpoint(tmp_path):
    """Of eight shards the stream opens those from its buffer on; what is saved is numbers."""
    rows = table([10] * 80)
    notes = shards(tmp_path, rows, range(100, 800, 100))
    stream = PairStream(notes, tokenize, collate, batch_size=9, buffer=90)
    batches = list(itertools.islice(stream, 75))
    state = batches[70]["stream"]
    for number in range(6):
        (tmp_path / f"{number:02}.parquet").unlink()
    resumed = PairStream(notes, tokenize, collate, batch_size=9, buffer=90)
    resumed.load_state(state)
    after = list(itertools.islice(resumed, 4))
    assert [batch["pairs"] for batch in after] == [batch["pairs"] for batch in batches[71:75]]
    assert len(state) < 700
    assert set(json.loads(state)) == {"position", "number", "steps", "size"}


def test_patients_are_mixed():
    """A buffer's pairs are spread over its steps; the next pass has other batches."""
    rows = table([11] * 48)
    stream = stream_of(rows, batch_size=24, buffer=480)
    found = [batch["pairs"] for batch in itertools.islice(stream, 40)]
    patients = [len({earlier // 11 for earlier, _, _ in batch}) for batch in found]
    assert sum(patients) / len(patients) > 15
    assert Counter(pair[:2] for batch in found for pair in batch) == dict.fromkeys(expected_pairs([11] * 48), 2)
    assert {frozenset(p[:2] for p in b) for b in found[:20]}.isdisjoint(
        frozenset(p[:2] for p in b) for b in found[20:]
    )


def test_a_gap_that_is_too_large():
    """Pairs further apart than max_gap are left out; numbers are days."""
    rows = table([3, 3], day=2)
    rows["time"][2] = START + datetime.timedelta(days=30)
    for times in (rows["time"], [(time - START).days for time in rows["time"]]):
        stream = stream_of(rows | {"time": times}, batch_size=3, max_gap=2, buffer=3)
        assert sorted(pair[:2] for pair in next(iter(stream))["pairs"]) == [(0, 1), (3, 4), (4, 5)]
    with pytest.raises(ValueError, match=r"no pair of adjacent notes.*at most 1 days"):
        next(iter(stream_of(rows, batch_size=3, max_gap=1)))


def change(column, row, value):
    rows = table([2, 2, 2])
    rows[column][row] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (change("patient_id", 4, 0), "Row 5 of the stream is of a patient whose notes had ended"),
        (change("patient_id", 2, None), "Row 3 of the stream has no patient"),
        (change("time", 5, None), "Row 6 of the stream has no time"),
        (change("time", 3, START - datetime.timedelta(days=1)), "Row 4 of the stream is earlier"),
        (table([1, 1]), "no pair of adjacent notes"),
        (table([2, 2]) | {"time": ["2020-01-01"] * 4}, "holds strings"),
        ({"patient_id": [1], "time": [0], "note": ["a"]}, r"lacks the columns \['text'\]"),
    ],
)
def test_what_cannot_be_streamed_is_refused(rows, words):
    """A patient who comes back, times that go back, and missing values: each by its row, without a value."""
    with pytest.raises(ValueError, match=words):
        next(iter(stream_of(rows, batch_size=30, buffer=30)))


def test_notes_without_text_are_counted(caplog):
    """Blank notes are left out, and their neighbours are adjacent."""
    rows = change("text", 1, " ")
    rows["patient_id"][2] = 0
    rows["time"][2:4] = [START + datetime.timedelta(days=5)] * 2
    with caplog.at_level(logging.WARNING):
        found = next(iter(stream_of(rows, batch_size=2, buffer=4)))["pairs"]
    assert {pair[:2] for pair in found} == {(0, 2), (4, 5)}
    assert "Of 6 rows of the stream, 1 had no text" in caplog.text


def trained(folder, tokenizer, notes, resume=None, workers=0, accumulation=2, **kwargs):
    args = DenseTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=accumulation,
        dataloader_num_workers=workers,
        subspace_dim=3,
        logging_steps=1,
        save_steps=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_length=16,
        **kwargs,
    )
    trainer = DenseTrainer(make_model("bert", tokenizer), args, train_dataset=notes, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=resume)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_and_resume(tmp_path, tokenizer, notes, workers, caplog):
    """Several passes of a stream; resumed from a checkpoint, later losses and gradients are equal to the bit."""
    stream = notes.to_iterable_dataset(num_shards=3)
    with caplog.at_level(logging.WARNING):
        whole = trained(tmp_path / "a", tokenizer, stream, workers=workers, max_steps=8)
    assert workers or "longer than the limit on tokens" in caplog.text
    assert len(whole) == 8
    resumed = trained(
        tmp_path / "b", tokenizer, stream, str(tmp_path / "a" / "checkpoint-3"), workers=workers, max_steps=8
    )
    found = {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in resumed}
    for entry in whole[3:]:
        assert found[entry["step"]] == (entry["loss"], entry["grad_norm"])
    assert {path.name for path in (tmp_path / "b").iterdir()} >= {"checkpoint-6", "checkpoint-8"}


def test_a_stream_needs_steps_one_reader_and_its_own_checkpoint(tmp_path, tokenizer, notes):
    """What the Trainer cannot do with a stream is said before it starts."""
    stream = notes.to_iterable_dataset()
    with pytest.raises(ValueError, match="max_steps"):
        trained(tmp_path, tokenizer, stream)
    with pytest.raises(ValueError, match="one process a rank"):
        trained(tmp_path, tokenizer, stream, workers=2, max_steps=3)
    trained(tmp_path / "map", tokenizer, notes, max_steps=3)
    with pytest.raises(ValueError, match="not of a run on a stream"):
        trained(tmp_path, tokenizer, stream, str(tmp_path / "map" / "checkpoint-3"), max_steps=4)


def test_spans_of_a_stream_go_on_within_a_note():
    """Pairs of both kinds come in the order of the notes, and a stream goes on between two pairs of one note."""
    text = "Chest pain since two days, no fever was seen. Aspirin was given at once, then home on Monday."
    rows = {"patient_id": [1, 1, 2], "time": [0, 1, 0], "text": [text, "PAST:\nb\nNOW:\nd\nPLAN:\nf", text]}
    kinds = ["adjacent", "sections", "halves"]

    def batches(state=None):
        stream = PairStream(
            datasets.Dataset.from_dict(rows).to_iterable_dataset(),
            lambda texts: {"input_ids": [[text] for text in texts], "cut": [0] * len(texts)},
            lambda pairs: {
                "pairs": [tuple(pair[side]["input_ids"][0] for side in ("earlier", "later")) for pair in pairs]
            },
            batch_size=1,
            buffer=1,
            kinds=kinds,
        )
        if state:
            stream.load_state(state)
        return list(itertools.islice(stream, 12))

    halves = (text[:46].strip(), text[46:])
    whole, pieces = (text, rows["text"][1]), ["PAST:\nb", "NOW:\nd", "PLAN:\nf"]
    once = [halves, whole, *itertools.pairwise(pieces), halves]
    found = batches()
    assert [batch["pairs"][0] for batch in found] == (once * 3)[:12]
    for done in range(1, 6):
        assert [batch["pairs"][0] for batch in batches(found[done - 1]["stream"])] == (once * 4)[done : done + 12]
