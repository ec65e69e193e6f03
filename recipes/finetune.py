"""Does an encoder that the dense objective has trained fine-tune as well as one of masked-language modelling alone?

    python recipes/finetune.py --data FOLDER --start ENCODER --encoders FOLDER --methods start,mlm,mlm+dense --seeds 5

All weights are trained for classification of MTSamples' sections (specialty, section header, kind of note) from 50, 200 and
1,000 sections of training notes, and tested on those of test notes; or to find the names of diseases (`--labels disease`) from
as many sentences of abstracts. `--encoders` holds `METHOD-SEED`, as `compare.py --encoders` leaves them; seed s takes the
encoder of seed s, or of s less their number. A seed has the same examples, batches and first classifier for every method.
Written to --output: finetuning.json, and the table is printed.
"""

import argparse
import json
from functools import cache
from itertools import product
from pathlib import Path

import datasets
import numpy as np
import torch
from benchmarks.timing import machine
from domains import entities
from domains.documents import LENGTH
from domains.mtsamples import long_enough, read
from domains.rows import frequent, rows_with
from scipy.stats import t as student
from sklearn.metrics import accuracy_score, f1_score
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BatchEncoding,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from hf_densefeat.reporting.formats import markdown

LABELS = {"specialty": 30, "header": 100, "kind": 30}  # a class has at least so many sections
ENTITIES = "disease"  # the label that words have
EPOCHS = {50: 20, 200: 8, 1000: 3}
BATCH, TESTED = 16, 600
OUTPUT = Path(__file__).resolve().parent / "results"


def main(argv: list[str] | None = None) -> dict:
    """Fine-tune what is missing in the JSON, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with mtsamples, ncbi_disease in it")
    parser.add_argument("--start", required=True, help="the encoder that all began from")
    parser.add_argument("--encoders", required=True, type=Path, help="folder of METHOD-SEED")
    parser.add_argument("--methods", default="start,mlm,mlm+dense")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sizes", default="50,200,1000")
    parser.add_argument("--labels", default=",".join(LABELS), help=f"of {', '.join([*LABELS, ENTITIES])}")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--part", default="test", choices=("validation", "test"), help="validation chooses options")
    parser.add_argument("--output", default=OUTPUT, type=Path)
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    methods, labels = arguments.methods.split(","), arguments.labels.split(",")
    sizes = [int(size) for size in arguments.sizes.split(",")]
    path = arguments.output / "finetuning.json"
    found = json.loads(path.read_text()) if path.exists() else {"scores": {}}
    found |= {"machine": machine(), "part": arguments.part}
    examples = {label: labelled(arguments.data, label) for label in labels}
    runs = list(product(range(arguments.seeds), labels, sizes, methods))
    for seed, label, size, method in tqdm(runs, disable=None):
        name = f"{label}, {size}, {method}, {seed}"
        if name not in found["scores"]:
            encoder = arguments.start if method == "start" else encoder_of(arguments.encoders, method, seed)
            found["scores"][name] = tuned(encoder, examples[label], label, size, seed, arguments)
            path.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found["scores"], methods, labels, sizes, arguments.seeds))
    return found


def encoder_of(folder: Path, method: str, seed: int) -> Path:
    """The folder of the method's encoder for a seed."""
    kept = sorted(folder.glob(f"{method}-[0-9]*"))
    if not kept:
        raise FileNotFoundError(f"--encoders: expected folders {method}-0, {method}-1, … in {folder}, found none.")
    return kept[seed % len(kept)]


@cache
def sections_of(data: Path) -> datasets.Dataset:
    """Sections that are long enough, read once."""
    return long_enough(read(data)[1])


def labelled(data: Path, label: str) -> datasets.Dataset:
    """What is labelled, with `split`: sections with `text` and `labels`, or sentences with `words` and `tags`."""
    if label == ENTITIES:
        return entities.read(data)
    sections = sections_of(data)
    kept = frequent(sections[label][:], LABELS[label])
    classes = sorted({name for name in kept if name})
    rows = sections.select([i for i, name in enumerate(kept) if name])
    return rows.add_column("labels", [classes.index(name) for name in kept if name])


def tokens(sections: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    """Tokens of a section's beginning."""
    return tokenizer(sections["text"], truncation=True, max_length=LENGTH)


def tuned(
    encoder: str | Path, examples: datasets.Dataset, label: str, size: int, seed: int, arguments: argparse.Namespace
) -> dict[str, float]:
    """Accuracy and mean F1 over classes of one fine-tuned encoder, or the F1 of entities."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    if label == ENTITIES:
        model, collator = AutoModelForTokenClassification, DataCollatorForTokenClassification(tokenizer)
        tokenize, score, classes = entities.tokens, entities.scores, len(entities.TAGS)
    else:
        model, collator = AutoModelForSequenceClassification, DataCollatorWithPadding(tokenizer)
        tokenize, score, classes = tokens, scores, len(set(examples["labels"][:]))
    train, test = (rows_with(examples, "split", part) for part in ("train", arguments.part))
    train = train.select(np.random.default_rng(seed).permutation(len(train))[:size])
    test = test.select(np.random.default_rng(0).permutation(len(test))[:TESTED])
    train, test = (rows.map(tokenize, batched=True, fn_kwargs={"tokenizer": tokenizer}) for rows in (train, test))
    options = TrainingArguments(
        output_dir=str(arguments.output / "trainer"),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=64,
        num_train_epochs=EPOCHS.get(size, 5),
        learning_rate=arguments.learning_rate,
        warmup_steps=0.1,
        weight_decay=0.01,
        seed=seed,
        bf16=arguments.bf16,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )

    def make_model():
        return model.from_pretrained(encoder, num_labels=classes, dtype=torch.float32)

    trainer = Trainer(model_init=make_model, args=options, train_dataset=train, data_collator=collator)
    trainer.train()
    found = score(test, trainer.predict(test).predictions)
    return found | {"classes": classes, "tested": len(test), "learning_rate": arguments.learning_rate}


def scores(sections: datasets.Dataset, logits: np.ndarray) -> dict[str, float]:
    """Accuracy, and the mean over classes of F1."""
    right, guessed = np.array(sections["labels"][:]), logits.argmax(1)
    return {
        "accuracy": float(accuracy_score(right, guessed)),
        "f1": float(f1_score(right, guessed, average="macro")),
    }


def interval(values: np.ndarray, signed: bool = False) -> str:
    """Mean ± half the 95 % interval of Student's t over seeds; of one seed the value alone."""
    mean = f"{values.mean():{'+' if signed else ''}.3f}"
    if len(values) == 1:
        return mean
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{mean} ± {half:.3f}"


def cells(values: np.ndarray) -> list[str]:
    """Measures of each method, from (methods, measures, seeds); the last method less the one before it, seed by seed."""
    found = ["; ".join(map(interval, own)) for own in values]
    differences = values[-1] - values[-2] if len(values) > 1 else []
    return [*found, "; ".join(interval(own, signed=True) for own in differences)]


def table(
    scores: dict[str, dict[str, float]], methods: list[str], labels: list[str], sizes: list[int], seeds: int
) -> str:
    """Accuracy and mean F1 over classes of every task and size, or the F1 of entities; last the mean of the first."""
    rows = [["Task, examples", *methods, f"{methods[-1]} − {methods[-2]}" if len(methods) > 1 else ""]]
    everything = []
    for label, size in product(labels, sizes):
        measures = ["f1"] if label == ENTITIES else ["accuracy", "f1"]
        found = [[scores[f"{label}, {size}, {method}, {seed}"] for seed in range(seeds)] for method in methods]
        values = np.array([[[run[name] for run in runs] for name in measures] for runs in found])
        everything.append(values[:, :1])
        rows.append([f"{label}, {size:,}", *cells(values)])
    return markdown([*rows, ["mean", *cells(np.mean(everything, axis=0))]])


if __name__ == "__main__":
    main()
