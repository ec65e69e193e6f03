"""Real documents: answers to questions on diseases (MedQuAD), a document as a patient, its answers as notes in order.

`data` holds `medquad/answers.parquet` with the columns document_id, order, text, question, question_type, focus,
semantic_type, split. Text that no method trains on is searched too, where it is there: `pubmedqa`, `mts_dialog` and
`aci_bench`. All labels are the data sets' own; none is used in training.
"""

import re
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from domains import Domain, features
from domains.rows import rows_with, training
from domains.text import seen
from hf_densefeat import AutoDenseModel, DensePairCollator, SimilarityTask, adjacent_pairs, load_notes
from hf_densefeat.commands.measuring import sample
from hf_densefeat.data.pairs import NotePairs, pair_notes
from hf_densefeat.data.tokens import TextProcessor, TokenPairs
from hf_densefeat.evaluation.embeddings import encoder_key

LENGTH = 96
SEARCHED = {"validation": 1500, "test": 2000}  # answers, of whole documents
FITTED = 2500  # training notes, of whole patients, that maps are fitted on
ANSWERS = ["patient_id", "text", "question", "kind", "disease", "type"]
FORM = ("kind of question", "kind of question, few labels", "section header")  # the other tasks ask for content
SPECIALTIES = {  # from the MeSH headings of an abstract; abstracts that match none or several have no specialty
    "oncology": "Neoplasm|Carcinoma|Lymphoma|Leukemia",
    "cardiovascular": "Heart|Cardi|Coronary|Myocard|Hypertension|Aort|Vascular|Stroke",
    "obstetrics": "Pregnan|Labor, Obstetric|Infant, Newborn|Cesarean",
    "mental": "Depress|Anxiety|Psych|Mental|Alcohol|Suicid",
    "musculoskeletal": "Fracture|Arthroplasty|Knee|Hip|Bone|Spine|Orthop",
}


def load(data: Path, model_name_or_path: str) -> Domain:
    """The domain, from a folder of data sets and an encoder to start from."""
    folder = Path(data)
    parts, searched = read_parts(folder)
    similarity = searched_tasks(searched)
    for read in (abstracts, dialogues, visits):
        similarity += read(folder)
    total = sum(map(len, parts.values()))
    facts = f"MedQuAD (CC BY 4.0): {total:,} answers, a document as a patient, a disease in one part alone."
    held_out = (searched["validation"], searched["test"])
    return domain_of("documents", facts, "answers", parts["train"], *held_out, similarity, FORM, model_name_or_path)


def open_encoder(folder: Path | str):
    """An encoder that reads the first tokens of a note."""
    return AutoDenseModel.from_pretrained(folder, max_length=LENGTH)


def read_parts(folder: Path) -> tuple[dict[str, datasets.Dataset], dict[str, datasets.Dataset]]:
    """MedQuAD's answers by split, and those of validation and test that are searched: whole documents."""
    answers = read_answers(folder / "medquad" / "answers.parquet")
    parts = {name: rows_with(answers, "split", name) for name in ("train", "validation", "test")}
    return parts, {name: sample(parts[name], count, seed=0) for name, count in SEARCHED.items()}


def domain_of(
    name: str,
    facts: str,
    unit: str,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    test: datasets.Dataset,
    similarity: list[SimilarityTask],
    form: tuple[str, ...],
    model_name_or_path: str,
) -> Domain:
    """Training on the adjacent notes of `train`, each a `unit`; choices are by validation notes, geometry is of test notes."""
    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path)
    tokens = TextProcessor(tokenizer, predict_marks=True).tokens(train, LENGTH)[0]
    pairs = adjacent_pairs(train)
    again = NotePairs(pairs.earlier, pairs.earlier, pairs.patient, pairs.num_notes, pairs.num_patients)
    held_out, texts = adjacent_pairs(test), np.array(test["text"][:], dtype=object)
    chosen = np.random.default_rng(0).permutation(len(train))[:FITTED]
    return Domain(
        name=name,
        facts=(
            f"{facts} Trained on {len(train):,} {unit} ({len(pairs):,} pairs, {LENGTH} tokens) without any label; measured on "
            f"{len(test):,} held-out notes and on the tasks, which no method was trained on. "
            f"Start: {Path(model_name_or_path).name}."
        ),
        make_model=lambda seed: open_encoder(model_name_or_path),
        open=open_encoder,
        processor=tokenizer,
        train=TokenPairs(tokens, pairs),
        self_pairs=TokenPairs(tokens, again),
        collator=lambda objective: DensePairCollator(tokenizer, objective=objective, mlm_probability=0.3),
        encode=lambda model, inputs: model.encode(inputs, batch_size=256, view=None, input_layer=True),
        features=partial(features.of_all_words, cut=partial(seen, tokenizer=tokenizer, length=LENGTH)),
        train_inputs=train.select(chosen)["text"][:],
        earlier=texts[held_out.earlier].tolist(),
        later=texts[held_out.later].tolist(),
        patient=held_out.patient,
        similarity=similarity,
        pairs=paired_texts(sample(train, FITTED, seed=0)),
        judged=paired_texts(validation),
        training=training(1e-4),
        form=form,
        key=encoder_key(AutoDenseModel.from_pretrained(model_name_or_path), tokenizer),
    )


def paired_texts(notes: datasets.Dataset) -> dict[str, tuple[list[str], list[str]]]:
    """Both sides of adjacent notes, and of the two halves of a note where any is long enough."""
    found = {}
    for kind in ("adjacent", "halves"):
        try:
            rows, pairs = pair_notes(notes, kind)
        except ValueError:
            if kind == "adjacent":
                raise
            continue
        texts = np.array(rows["text"][:], dtype=object)
        found[kind] = (texts[pairs.earlier].tolist(), texts[pairs.later].tolist())
    return found


def read_answers(path: Path) -> datasets.Dataset:
    """MedQuAD's answers as notes: `patient_id` is the document, `time` the order, and the labels by short names."""
    table = pq.read_table(path)
    parts = table.group_by("document_id").aggregate([("split", "count_distinct")])
    whole = parts.filter(pc.equal(parts["split_count_distinct"], 1))["document_id"]
    table = table.filter(pc.is_in(table["document_id"], whole))  # one document is about diseases of two parts
    table = table.rename_columns(
        [{"focus": "disease", "question_type": "kind", "semantic_type": "type"}.get(n, n) for n in table.column_names]
    )
    notes = datasets.Dataset(table).cast_column("order", datasets.Value("int64"))
    disease = [name or document for name, document in zip(notes["disease"][:], notes["document_id"][:], strict=True)]
    notes = notes.remove_columns("disease").add_column("disease", disease)
    return load_notes(notes, columns={"patient_id": "document_id", "time": "order", "text": "text"})


def searched_tasks(searched: dict[str, datasets.Dataset]) -> list[SimilarityTask]:
    """Those of the test answers, and those of the validation answers, which only choose."""
    return answer_tasks(searched["test"]) + answer_tasks(searched["validation"], "validation ")


def answer_tasks(notes: datasets.Dataset, prefix: str = "") -> list[SimilarityTask]:
    """Search, neighbours, clusters and few labels on answers; a disease groups documents, so that none is found by itself."""
    table = {name: notes[name][:] for name in ANSWERS}
    common = {"notes": table, "group": "disease"}
    tasks = [
        SimilarityTask(name="question → answer", kind="retrieval", question="question", **common),
        SimilarityTask(name="same disease", kind="retrieval", label="disease", **common),
        SimilarityTask(name="type of disease", kind="neighbours", label="type", **common),
        SimilarityTask(name="type of disease, few labels", kind="few_labels", label="type", **common),
        SimilarityTask(name="kind of question", kind="neighbours", label="kind", **common),
        SimilarityTask(name="kind of question, few labels", kind="few_labels", label="kind", **common),
    ]
    return [SimilarityTask(**(vars(task) | {"name": prefix + task.name})) for task in tasks]


def abstracts(folder: Path) -> list[SimilarityTask]:
    """PubMedQA's abstracts: the question finds its abstract; specialties among neighbours, clusters, few labels."""
    path = folder / "pubmedqa" / "abstracts.parquet"
    if not path.exists():
        return []
    table = pq.read_table(path).to_pydict()
    specialty = []
    for headings in table["meshes"]:
        matched = [name for name, words in SPECIALTIES.items() if re.search(words, headings)]
        specialty.append(matched[0] if len(matched) == 1 else None)
    notes = {"text": table["context"], "question": table["question"], "specialty": specialty}
    common = {"notes": notes, "group": None}
    return [
        SimilarityTask(name="question → abstract", kind="retrieval", question="question", **common),
        SimilarityTask(name="specialty", kind="neighbours", label="specialty", **common),
        SimilarityTask(name="specialty, clusters", kind="clusters", label="specialty", **common),
        SimilarityTask(name="specialty, few labels", kind="few_labels", label="specialty", **common),
    ]


def dialogues(folder: Path) -> list[SimilarityTask]:
    """MTS-Dialog: a conversation finds the section that was written of it; sections' headers among neighbours."""
    path = folder / "mts_dialog" / "sections.parquet"
    if not path.exists():
        return []
    rows = {row["section_text"]: row for row in pq.read_table(path).to_pylist() if len(row["section_text"]) >= 60}
    notes = {
        "text": list(rows),
        "question": [row["dialogue"] for row in rows.values()],
        "header": [row["section_header"] for row in rows.values()],
    }
    return [
        SimilarityTask(name="dialogue → section", kind="retrieval", question="question", notes=notes, group=None),
        SimilarityTask(name="section header", kind="neighbours", label="header", notes=notes, group=None),
    ]


def visits(folder: Path) -> list[SimilarityTask]:
    """ACI-Bench: a visit's conversation finds its note."""
    path = folder / "aci_bench" / "encounters.parquet"
    if not path.exists():
        return []
    table = pq.read_table(path).to_pydict()
    notes = {"text": table["note"], "question": table["dialogue"]}
    return [SimilarityTask(name="dialogue → note", kind="retrieval", question="question", notes=notes, group=None)]
