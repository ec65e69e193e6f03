"""Pairs against a brute-force reference, and batches that do not depend on how they are cut."""

import itertools
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_densefeat.data.notes import load_notes
from hf_densefeat.data.pairs import NotePairs, adjacent_pairs
from hf_densefeat.data.sampling import PairBatchSampler, _spread
from hf_densefeat.data.tokens import TokenPairs

note = st.tuples(st.integers(0, 6), st.integers(-3, 3), st.integers(0, 2), st.sampled_from(["DS", "RR", None]))


def make_notes(rows):
    """Notes from (patient, time, sequence, type) rows; the text is the row number."""
    patient, time, sequence, kind = zip(*rows, strict=True)
    return datasets.Dataset.from_dict(
        {
            "patient_id": patient,
            "time": time,
            "note_seq": sequence,
            "note_type": kind,
            "text": [str(i) for i in range(len(rows))],
        }
    )


def make_pairs(counts):
    """Pairs of patients with so many pairs each, notes numbered in order."""
    rows, patient, start = [], [], 0
    for code, count in enumerate(counts):
        rows += range(start, start + count)
        patient += [code] * count
        start += count + 1
    earlier = np.array(rows, dtype=np.int64)
    return NotePairs(earlier, earlier + 1, np.array(patient, dtype=np.int64), start, len(counts))


@given(rows=st.lists(note, min_size=1, max_size=40), gap=st.none() | st.integers(0, 4), same=st.booleans())
@settings(max_examples=150, deadline=None)
def test_pairs_equal_brute_force(rows, gap, same):
    """Each note with the next of the same patient by (time, sequence, row), before and after filters."""
    expected, adjacent = set(), 0
    for patient in {row[0] for row in rows}:
        own = sorted((i for i, row in enumerate(rows) if row[0] == patient), key=lambda i: (rows[i][1], rows[i][2], i))
        for a, b in itertools.pairwise(own):
            adjacent += 1
            near = gap is None or rows[b][1] - rows[a][1] <= gap
            alike = not same or (rows[a][3] is not None and rows[a][3] == rows[b][3])
            if near and alike:
                expected.add((a, b))
    notes, options = make_notes(rows), {"max_gap": gap, "same": ["note_type"] if same else ()}
    if not expected:
        with pytest.raises(ValueError, match=f"got {len(rows)} notes of {len({row[0] for row in rows})} patients"):
            adjacent_pairs(notes, **options)
        return
    pairs = adjacent_pairs(notes, **options)
    found = list(zip(pairs.earlier.tolist(), pairs.later.tolist(), strict=True))
    assert set(found) == expected
    assert len(found) == len(pairs) == len(expected) == adjacent - sum(pairs.removed.values())
    assert pairs.earlier.dtype == pairs.later.dtype == pairs.patient.dtype == np.int64
    codes = {}
    for (a, b), code in zip(found, pairs.patient.tolist(), strict=True):
        assert rows[a][0] == rows[b][0] == codes.setdefault(code, rows[a][0])
    assert len(set(codes.values())) == len(codes)


@given(rows=st.lists(note, min_size=1, max_size=30), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_pairs_do_not_depend_on_the_order_of_rows(rows, seed):
    """Where times and sequences have no ties, any order of rows gives the same pairs of texts."""
    rows = [(patient, time, i, kind) for i, (patient, time, _, kind) in enumerate(rows)]
    notes = make_notes(rows)
    shuffled = notes.select(np.random.default_rng(seed).permutation(len(rows)))

    def texts(table):
        try:
            pairs = adjacent_pairs(table)
        except ValueError:
            return None
        return [
            (table[int(a)]["text"], table[int(b)]["text"]) for a, b in zip(pairs.earlier, pairs.later, strict=True)
        ]

    assert texts(notes) == texts(shuffled) == texts(load_notes(shuffled))


def test_pairing_reads_no_text():
    """Pairs come from the small columns alone, so that a table of any size is paired in memory for its rows only."""
    notes = make_notes([(1, 0, 0, "DS"), (1, 1, 0, "DS"), (2, 0, 0, "RR")]).remove_columns("text")
    assert len(adjacent_pairs(notes, max_gap=1, same="note_type")) == 1


def test_copied_notes_are_left_out():
    """The overlap is the share of the later note's five-word runs that the earlier one has."""
    first = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    notes = datasets.Dataset.from_dict(
        {"patient_id": [1] * 5, "time": range(5), "text": [first, first + " fifteen", "other", "other", first[::-1]]}
    )
    assert len(adjacent_pairs(notes)) == 4
    assert len(adjacent_pairs(notes, max_overlap=10 / 11)) == 3
    pairs = adjacent_pairs(notes, max_overlap=0.9)
    assert pairs.earlier.tolist() == [1, 3]
    assert str(pairs) == "2 pairs of 1 patients, from 5 notes of 1 patients; removed: 2 by max_overlap"


def test_no_pairs_says_what_to_do():
    """Patients with one note each: the error counts them and names the way out."""
    notes = datasets.Dataset.from_dict({"patient_id": [1, 2, 3], "time": [0, 1, 2], "text": list("abc")})
    with pytest.raises(ValueError, match=r"3 notes of 3 patients, 0 adjacent pairs.*pair_notes"):
        adjacent_pairs(notes)
    with pytest.raises(ValueError, match=r"Expected a column `note_tipe`"):
        adjacent_pairs(notes, same="note_tipe")


counts = st.lists(st.integers(1, 9), min_size=1, max_size=25)
cuts = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))


@given(
    counts=counts,
    cut=cuts,
    grouped=st.integers(1, 4),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
    drop=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_every_pair_once_and_the_same_on_every_rank(counts, cut, grouped, seed, shuffle, drop):
    """Over all ranks every pair comes once an epoch, in equally many lists; slices differ by at most one pair."""
    batch_size, ranks, accumulation = cut
    pairs, step = make_pairs(counts), batch_size * ranks * accumulation
    lengths = np.random.default_rng(seed).integers(3, 99, pairs.num_notes)
    options = {"accumulation": accumulation, "pairs_per_patient": min(grouped, step), "seed": seed, "shuffle": shuffle}
    drop = drop and len(pairs) >= step
    samplers = [
        PairBatchSampler(pairs, lengths, batch_size, ranks=ranks, rank=rank, drop_last=drop, **options)
        for rank in range(ranks)
    ]
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        batches = [list(sampler) for sampler in samplers]
        assert {len(batch) for batch in batches} == {len(samplers[0])}
        seen = [pair for batch in batches for micro in batch for pair, _ in micro]
        assert len(seen) == len(set(seen)) == (len(pairs) // step * step if drop else len(pairs))
        for micros in zip(*batches, strict=True):
            sizes = [len(micro) for micro in micros]
            assert max(sizes) - min(sizes) <= 1
            assert 0 < max(sizes) <= batch_size
            assert sizes == sorted(sizes, reverse=True)


@given(
    counts=counts, grouped=st.integers(1, 4), seed=st.integers(0, 3), epoch=st.integers(0, 3), shuffle=st.booleans()
)
@settings(max_examples=100, deadline=None)
def test_step_batches_do_not_depend_on_the_cut(counts, grouped, seed, epoch, shuffle):
    """12 pairs at once, 2 ranks × 2 × 3, 3 ranks × 4 and 12 × 1 see the same pairs and draws in the same steps."""
    pairs = make_pairs(counts)
    lengths = np.random.default_rng(seed).integers(3, 99, pairs.num_notes)

    def steps(batch_size, ranks, accumulation):
        options = {"accumulation": accumulation, "pairs_per_patient": grouped, "seed": seed, "shuffle": shuffle}
        found = []
        for rank in range(ranks):
            sampler = PairBatchSampler(pairs, lengths, batch_size, ranks=ranks, rank=rank, **options)
            sampler.set_epoch(epoch)
            for number, micro in enumerate(sampler):
                found += [(number // accumulation, item) for item in micro]
        return sorted(found)

    whole = steps(12, 1, 1)
    assert whole == steps(3, 2, 2) == steps(4, 3, 1) == steps(1, 1, 12)


@given(counts=counts, seed=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_runs_of_a_patient_stay_together(counts, seed):
    """Consecutive pairs of a patient share a step batch; at most one run is cut for every border."""
    grouped, size = 4, 8
    pairs = make_pairs(counts)
    sampler = PairBatchSampler(pairs, np.ones(pairs.num_notes), size, pairs_per_patient=grouped, seed=seed)
    batches = sampler.step_batches()
    step_of = {pair: number for number, batch in enumerate(batches) for pair in batch.tolist()}
    cut = start = 0
    for count in counts:
        for first in range(start, start + count, grouped):
            run = range(first, min(first + grouped, start + count))
            cut += len({step_of[pair] for pair in run}) > 1
        start += count
    assert cut <= len(batches)
    if all(count % grouped == 0 for count in counts):
        assert cut == 0


@given(counts=counts, size=st.integers(1, 8), seed=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_patients_are_spread_over_steps(counts, size, seed):
    """Every pair comes once; in a bucket of b steps a patient with c pairs is at most ⌈c/b⌉ times in each."""
    pairs = make_pairs(counts)
    lengths = np.random.default_rng(seed).integers(3, 99, pairs.num_notes)
    steps = len(pairs) // size
    bucket = np.random.default_rng(seed).permutation(len(pairs))[: steps * size]
    spread = _spread(bucket, pairs.patient[bucket], size)
    assert sorted(spread) == sorted(bucket)
    most = np.bincount(pairs.patient[bucket], minlength=len(counts)) / max(steps, 1)
    for step in range(steps):
        held = np.bincount(pairs.patient[spread[step * size : (step + 1) * size]], minlength=len(counts))
        assert (held <= np.ceil(most)).all()
    sampler = PairBatchSampler(pairs, lengths, size, seed=seed, spread_patients=True)
    assert sorted(itertools.chain(*sampler.step_batches())) == list(range(len(pairs)))


def test_no_patient_comes_twice_where_that_can_be():
    """300 patients with up to 12 pairs, 32 a step: without spreading patients meet themselves, with it never."""
    rng = np.random.default_rng(0)
    pairs = make_pairs(rng.integers(1, 13, 300))
    lengths = rng.integers(3, 99, pairs.num_notes)

    def twice(spread):
        sampler = PairBatchSampler(pairs, lengths, 32, spread_patients=spread, drop_last=True)
        return sum(len(batch) - len(np.unique(pairs.patient[batch])) for batch in sampler.step_batches())

    assert twice(False) > 50
    assert twice(True) == 0


def test_epochs_and_seeds_differ_and_repeat():
    """Batches and draws change with epoch and seed, and are the same again for the same ones."""
    pairs, lengths = make_pairs([3] * 200), np.arange(800) % 50 + 5

    def epoch(number, seed=0, **options):
        sampler = PairBatchSampler(pairs, lengths, 8, seed=seed, **options)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(0) == epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=1)
    draws = [dict(itertools.chain(*epoch(number))) for number in (0, 1)]
    assert sum(draws[0][pair] == draws[1][pair] for pair in range(600)) < 3
    assert len(set(draws[0].values())) > 595
    assert all(0 <= draw < 2**31 for draw in draws[0].values())
    assert draws[0] == dict(itertools.chain(*epoch(0, accumulation=3)))
    together = [Counter(frozenset(pair for pair, _ in batch) for batch in epoch(number)) for number in (0, 1)]
    assert not together[0] & together[1]
    assert epoch(0, shuffle=False) == epoch(1, shuffle=False)
    longest = [max(lengths[pairs.later[pair]] for pair, _ in batch) for batch in epoch(0, shuffle=False)]
    assert longest == sorted(longest, reverse=True)


def test_lengths_are_bucketed():
    """Padding waste of shuffled batches is a fraction of that of random ones, also when patients are grouped."""
    rng = np.random.default_rng(0)
    pairs = make_pairs(rng.integers(1, 12, 2000))
    lengths = rng.integers(10, 512, pairs.num_notes)
    real = (lengths[pairs.earlier] + lengths[pairs.later]).sum()

    def waste(batches):
        padded = sum(
            2 * len(batch) * max(lengths[pairs.earlier[batch]].max(), lengths[pairs.later[batch]].max())
            for batch in batches
        )
        return 1 - real / padded

    chance = waste(np.array_split(rng.permutation(len(pairs)), len(pairs) // 16))
    for grouped, bound in ((1, 0.6), (4, 0.9)):
        batches = [
            np.array([pair for pair, _ in batch])
            for batch in PairBatchSampler(pairs, lengths, 16, pairs_per_patient=grouped)
        ]
        # The two notes of a pair differ in length whatever the sampler does: this part of the waste is not its own.
        floor = 1 - real / (2 * np.maximum(lengths[pairs.earlier], lengths[pairs.later])).sum()
        assert waste(batches) - floor < bound * (chance - floor) - (0.1 if grouped == 1 else 0)


def test_sampler_arguments_are_checked():
    """Each wrong argument is named with what came and what would be right."""
    pairs = make_pairs([3, 3])
    for options, words in (
        ({"lengths": [1] * 6}, "one length per note, 8, got 6"),
        ({"batch_size": 0}, "`batch_size` of at least 1"),
        ({"ranks": 2, "rank": 2}, r"`rank` in \[0, 2\)"),
        ({"batch_size": 2, "pairs_per_patient": 3}, "`pairs_per_patient` between 1 and the 2 pairs"),
        ({"batch_size": 7, "drop_last": True}, "at least the 7 pairs"),
        ({"pairs_per_patient": 2, "spread_patients": True}, "pairs_per_patient=2"),
    ):
        with pytest.raises(ValueError, match=words):
            PairBatchSampler(pairs, **({"lengths": [1] * 8, "batch_size": 4} | options))


def test_loading_skips_and_reads_empty_slices():
    """Through a DataLoader: skipped batches are the same ones, and an empty slice is an empty batch."""
    pairs = make_pairs([3, 2])
    tokens = datasets.Dataset.from_dict(
        {"input_ids": [[i] * (i + 1) for i in range(pairs.num_notes)], "length": range(1, pairs.num_notes + 1)}
    )
    data = TokenPairs(tokens, pairs)
    assert len(data) == 5
    assert data[4] == {"earlier": {"input_ids": [5] * 6}, "later": {"input_ids": [6] * 7}, "mask_seed": 0}
    assert data[(4, 9)]["mask_seed"] == 9
    sampler = PairBatchSampler(pairs, tokens["length"][:], 1, ranks=3, rank=2)
    loader = torch.utils.data.DataLoader(data, batch_sampler=sampler, collate_fn=list)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [1, 0]
    assert list(skip_first_batches(loader, 1)) == batches[1:]
    with pytest.raises(ValueError, match="tokens of the 7 notes"):
        TokenPairs(tokens.select(range(5)), pairs)
