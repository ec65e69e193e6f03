"""What masks spent on de-identification marks cost: the same training with and without `predict_marks`."""

import math
import re

import datasets
import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PrinterCallback
from transformers.utils import logging

from benchmarks.data import BUNDLED
from benchmarks.timing import spread
from hf_densefeat import AutoDenseModel, DenseTrainer, DenseTrainingArguments, load_notes
from hf_densefeat.data.tokens import TextProcessor

LENGTH, ENCODER = 96, BUNDLED / "medquad" / "encoder"


def marks(args) -> dict:
    """Answers of the bundled documents in which one word of fifty is a mark as MIMIC-III has them; MLM from random weights.

    The loss is that of held-out words alone, under the same masks for both.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    columns = {"patient_id": "document_id", "time": "order", "text": "text"}
    notes = load_notes(BUNDLED / "medquad" / "answers.parquet", columns=columns)
    rng = np.random.default_rng(0)

    def hidden(word: re.Match) -> str:
        if rng.random() > 1 / 50:
            return word[0]
        kind, number = rng.integers(3), rng.integers(10, 99)
        return (f"[**21{number}-7-{number % 28}**]", f"[**Hospital1 {number}**]", f"[**Last Name (un) {number}**]")[
            kind
        ]

    texts = [re.sub(r"\S+", hidden, text) for text in notes["text"][:]]
    notes = notes.remove_columns("text").add_column("text", texts)
    split = np.array(notes["split"][:])
    train, held_out = (notes.select(np.flatnonzero(split == name)) for name in ("train", "validation"))
    stats = TextProcessor(AutoTokenizer.from_pretrained(ENCODER)).tokens(train, LENGTH)[1]
    losses = {"with marks": [], "without": []}
    for seed in range(args.seeds):
        for name, predict in (("with marks", True), ("without", False)):
            losses[name].append(_held_out_loss(train, held_out, predict, seed, args.steps))
    saved = np.array(losses["with marks"]) - np.array(losses["without"])
    return {
        "updates": args.steps,
        "seeds": args.seeds,
        "share of tokens": round(stats.marks / stats.tokens, 4),
        "loss of held-out words": {name: spread(values) for name, values in losses.items()},
        "difference": spread(saved),
        "perplexity, ratio": round(math.exp(float(saved.mean())), 4),
    }


def _held_out_loss(train, held_out, predict: bool, seed: int, steps: int) -> float:
    torch.manual_seed(seed)
    model = AutoDenseModel.from_config(AutoConfig.from_pretrained(ENCODER))
    tokenizer = AutoTokenizer.from_pretrained(ENCODER)

    def trainer(predict_marks: bool) -> DenseTrainer:
        options = DenseTrainingArguments(
            output_dir="outputs/benchmark",
            dense_weight=0.0,
            predict_marks=predict_marks,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            max_steps=steps,
            max_length=LENGTH,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        )
        data = {"train_dataset": train, "eval_dataset": held_out}
        made = DenseTrainer(model, options, processing_class=tokenizer, **data)
        made.remove_callback(PrinterCallback)  # what a benchmark prints is its JSON
        return made

    trainer(predict).train()
    return trainer(predict_marks=False).evaluate()["eval_mlm_loss"]
