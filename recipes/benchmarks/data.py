"""Tables to batches, at the size of MIMIC-IV-Note."""

import tempfile
import time
from pathlib import Path
from statistics import median

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer
from transformers.utils import logging

from benchmarks.step import minilm, one_update
from benchmarks.timing import alternate, measured, spread
from hf_densefeat import (
    AutoDenseModel,
    DensePairCollator,
    DenseTrainer,
    DenseTrainingArguments,
    adjacent_pairs,
    load_notes,
    split_by_patient,
)
from hf_densefeat.data.columns import column, order_of_notes
from hf_densefeat.data.sampling import PairBatchSampler
from hf_densefeat.data.tokens import TextProcessor, TokenPairs

BUNDLED = Path(__file__).resolve().parents[1] / "data"
KEYS = ["subject_id", "charttime", "note_seq"]


def data(args) -> dict:
    """Notes with the columns of MIMIC-IV-Note and the texts of the bundled cohort, ten a patient, in no order.

    Every stage: wall-clock and processor seconds, and the largest anonymous memory above what the process had before,
    which the memory-mapped table is no part of. Files go to a temporary folder that is removed.
    """
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "encoder")
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        path, stages = Path(folder) / "notes.parquet", {}
        write_notes(path, args.notes)

        def stage(name, function):
            result, stages[name] = measured(function)
            return result

        notes = stage("load, first time", lambda: load_notes(path))
        del notes
        notes = stage("load, converted before", lambda: load_notes(path))
        keys = pq.read_table(path, columns=KEYS).rename_columns(["patient_id", "time", "note_seq"])
        stage("sort", lambda: order_of_notes(datasets.Dataset(keys)))
        stage("split", lambda: split_by_patient(notes))
        against_pandas = {}
        for name, table in {"unsorted": datasets.Dataset(keys), "sorted": notes}.items():
            pairs = stage(f"pairs, {name}", lambda table=table: adjacent_pairs(table))
            theirs = stage(f"pairs, {name}, by pandas", lambda table=table: pandas_pairs(table, table is not notes))
            if not (np.array_equal(pairs.earlier, theirs[0]) and np.array_equal(pairs.later, theirs[1])):
                raise SystemExit("pandas finds other pairs")
            seconds = alternate(
                {
                    "ours": lambda table=table: adjacent_pairs(table),
                    "pandas": lambda table=table: pandas_pairs(table, table is not notes),
                },
                args.repeats,
            )
            against_pandas[name] = spread(seconds["pandas"] / seconds["ours"])
        mapped = stage("pairs, sorted, by naive datasets.map, with the text", lambda: mapped_pairs(notes))
        lengths = np.random.default_rng(0).integers(16, 513, pairs.num_notes)
        stage("sampler to its first batch", lambda: next(iter(PairBatchSampler(pairs, lengths, 32))))
        some = notes.select(range(min(len(notes), 100_000)))
        tokens, counts = stage("tokenise", lambda: TextProcessor(tokenizer, predict_marks=True).tokens(some, 512))
        stage("pairs, sampler and first batch of these", lambda: first_batch(some, tokens, tokenizer))
        seconds = stages["tokenise"]["seconds"]
        cohort = input_path(tokenizer, args.repeats)
    return {
        "notes": args.notes,
        "pairs": len(pairs),
        "stages": stages,
        "pairs by pandas / ours": against_pandas,
        "pairs lost at the borders of datasets.map's batches": len(pairs) - mapped,
        "tokenise": {
            "notes": counts.notes,
            "tokens": counts.tokens + counts.cut,
            "notes per second": round(counts.notes / seconds),
            "tokens per second": round((counts.tokens + counts.cut) / seconds),
        },
        "bundled cohort": cohort,
    }


def write_notes(path: Path, notes: int) -> None:
    """A table in no order, 50,000 rows at a time."""
    rng = np.random.default_rng(0)
    texts = pq.read_table(BUNDLED / "cohort" / "notes.parquet", columns=["text"])["text"].to_pylist()
    with pq.ParquetWriter(path, some_notes(rng, texts, 1, 1).schema) as writer:
        for start in range(0, notes, 50_000):
            writer.write_table(some_notes(rng, texts, min(50_000, notes - start), notes))


def some_notes(rng, texts: list[str], rows: int, notes: int) -> pa.Table:
    """Rows of random patients; times are days, as MIMIC's discharge notes have them, so that some tie."""
    seconds = rng.integers(4_000_000_000, 5_000_000_000, rows) // 86400 * 86400
    numbers = rng.integers(10**9, size=rows)
    return pa.table(
        {
            "note_id": [f"{number}-DS" for number in numbers],
            "subject_id": rng.integers(10_000_000, 10_000_000 + max(1, notes // 10), rows),
            "note_type": rng.choice(["DS", "RR"], rows),
            "note_seq": rng.integers(0, 50, rows),
            "charttime": pa.array(seconds, pa.int64()).cast(pa.timestamp("s")),
            "text": [f"{texts[number % len(texts)]} {number}" for number in numbers],
        }
    )


def pandas_pairs(notes, sort: bool) -> tuple[np.ndarray, np.ndarray]:
    """What one would write: sort, then shift within each patient."""
    keys = ["patient_id", "time", "note_seq"]
    table = pd.DataFrame({name: column(notes, name).to_pandas() for name in keys})
    table["row"] = np.arange(len(table))
    if sort:
        table = table.sort_values(keys, kind="stable")
    table["next"] = table.groupby("patient_id")["row"].shift(-1)
    table = table.dropna(subset="next")
    return table["row"].to_numpy(), table["next"].to_numpy().astype(np.int64)


def mapped_pairs(notes) -> int:
    """What tutorials do: each batch of the sorted table to pairs of texts. Returns how many it finds."""

    def to_pairs(batch):
        patient, text = batch["patient_id"], batch["text"]
        places = [i for i in range(len(text) - 1) if patient[i] == patient[i + 1]]
        return {"earlier": [text[i] for i in places], "later": [text[i + 1] for i in places]}

    return len(notes.map(to_pairs, batched=True, remove_columns=notes.column_names))


def first_batch(notes, tokens, tokenizer) -> dict:
    """From tokens to the first batch of 32 pairs."""
    pairs = adjacent_pairs(notes)
    rows = TokenPairs(tokens, pairs)
    return DensePairCollator(tokenizer)(rows.__getitems__(next(iter(PairBatchSampler(pairs, rows.lengths, 32)))))


def input_path(tokenizer, repeats: int) -> dict:
    """Tokens per second that the loader gives and that a model of MiniLM's size takes, batches of 32 pairs.

    One process: with `dataloader_num_workers` the loader works beside the model. `padding` is the share of the slots
    that hold no token.
    """
    notes = split_by_patient(load_notes(BUNDLED / "cohort" / "notes.parquet"))["train"]
    config = minilm(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    results = {}
    for length, together in ((512, 1), (512, 4), (128, 4), (128, 1)):
        args = DenseTrainingArguments(
            output_dir="outputs/benchmark",
            per_device_train_batch_size=32,
            max_length=length,
            pairs_per_patient=together,
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            max_steps=10**6,
        )
        trainer = DenseTrainer(
            AutoDenseModel.from_config(config), args, train_dataset=notes, processing_class=tokenizer
        )
        start = time.perf_counter()
        batches = list(trainer.get_train_dataloader())
        loaded = time.perf_counter() - start
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        slots = sum(batch["attention_mask"].numel() for batch in batches)
        results[f"max_length {length}, pairs_per_patient {together}"] = {
            "padding": round(1 - tokens / slots, 4),
            "tokens per second, loader": round(tokens / loaded),
        }
    update = one_update(trainer)
    update()
    seconds = [measured(update)[1]["seconds"] for _ in range(repeats)]
    results["tokens per second, model, max_length 128"] = round(tokens / len(batches) / median(seconds))
    return results
