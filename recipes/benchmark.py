"""What the objective costs and whether it is stable: each command prints JSON with the machine, versions and spread.

    python recipes/benchmark.py objective                  # against autograd through SVD, and against VICReg's loss
    python recipes/benchmark.py step [--device cuda]       # the dense step against the same MLM step
    python recipes/benchmark.py running                    # no window of the running covariance runs away
    python recipes/benchmark.py data [--notes 3000000]     # notes to batches, at the size of MIMIC-IV-Note
    python recipes/benchmark.py encode                     # embeddings, against SentenceTransformer on the same folder

Timings are ratios of alternating runs in one process: medians, with the 10th and 90th percentile.
"""

import argparse
import ctypes
import json
import platform
import tempfile
import threading
import time
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import accelerate
import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, BertConfig, ModernBertConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from hf_densefeat import (
    AutoDenseModel,
    DenseObjective,
    DensePairCollator,
    DenseTrainer,
    DenseTrainingArguments,
    adjacent_pairs,
    effective_rank,
    load_notes,
    split_by_patient,
)
from hf_densefeat.collator import tokenize_notes
from hf_densefeat.notes import column, order_of_notes
from hf_densefeat.pairs import PairBatchSampler, TokenPairs

BUNDLED = Path(__file__).resolve().parent / "data"
KEYS = ["subject_id", "charttime", "note_seq"]


def main():
    """Run one benchmark and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    objective_parser = commands.add_parser("objective", help="loss and gradient of the objective alone")
    objective_parser.add_argument("--rows", type=int, default=256)
    objective_parser.add_argument("--width", type=int, default=768)
    objective_parser.add_argument("--repeats", type=int, default=30)
    step_parser = commands.add_parser("step", help="a training step, with and without the dense terms")
    step_parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    step_parser.add_argument("--repeats", type=int, default=10)
    running_parser = commands.add_parser("running", help="a small network trained by L_spec alone")
    running_parser.add_argument("--steps", type=int, default=1500)
    running_parser.add_argument("--seeds", type=int, default=3)
    data_parser = commands.add_parser("data", help="tables to notes, pairs, tokens and batches")
    data_parser.add_argument("--notes", type=int, default=1_000_000)
    data_parser.add_argument("--repeats", type=int, default=5)
    encode_parser = commands.add_parser("encode", help="texts to embeddings, against SentenceTransformer.encode")
    encode_parser.add_argument("--texts", type=int, default=128)
    encode_parser.add_argument("--batch_size", type=int, default=32)
    encode_parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    result = {"encode": encode, "objective": objective, "step": step, "running": running, "data": data}[args.command](
        args
    )
    print(json.dumps({"command": args.command, **machine(), **result}, indent=1))


def machine() -> dict:
    """Where and with what this ran."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate, datasets, np)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gpu": device,
        "python": platform.python_version(),
        "versions": versions,
    }


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def alternate(functions: dict, repeats: int, device: str = "cpu") -> dict[str, np.ndarray]:
    """Seconds of each function, the functions in turn, so that a drifting machine drifts for all."""
    seconds = {name: [] for name in functions}
    for i in tqdm(range(repeats + 2), desc="measuring", leave=False):
        for name, function in functions.items():
            synchronise(device)
            start = time.perf_counter()
            function()
            synchronise(device)
            if i >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def synchronise(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def spread(values) -> dict[str, float]:
    """Median and the 10th and 90th percentile."""
    low, high = np.percentile(values, [10, 90])
    return {"median": round(float(np.median(values)), 5), "p10": round(float(low), 5), "p90": round(float(high), 5)}


# ---- The objective alone --------------------------------------------------------------------------------------------


def objective(args) -> dict:
    """Forward and backward on (rows, width) embeddings of each side, k = 20."""
    torch.manual_seed(0)
    decay = torch.arange(1, args.width + 1) ** -0.5
    z_a, z_b = ((torch.randn(args.rows, args.width) * decay).requires_grad_() for _ in range(2))
    tracked = DenseObjective(1.0, 1.0, 20, center=True, power_iterations=2)
    windowed = DenseObjective(1.0, 1.0, 20, center=True, window="auto", power_iterations=2)
    exact = DenseObjective(1.0, 1.0, 20, center=True)

    def run(loss):
        return lambda: torch.autograd.grad(loss(z_a, z_b), (z_a, z_b))

    seconds = alternate(
        {
            "tracked": run(lambda a, b: tracked(a, b)["loss"]),
            "tracked, running window": run(lambda a, b: windowed(a, b)["loss"]),
            "exact eigenspaces": run(lambda a, b: exact(a, b)["loss"]),
            "literal SVD": run(literal_loss),
            "VICReg": run(vicreg_loss),
        },
        args.repeats,
    )
    ours = seconds["tracked"]
    return {
        "rows": args.rows,
        "width": args.width,
        "milliseconds": {name: spread(1000 * values) for name, values in seconds.items()},
        "literal SVD / tracked": spread(seconds["literal SVD"] / ours),
        "tracked / VICReg": spread(ours / seconds["VICReg"]),
        "tracked, running window / VICReg": spread(seconds["tracked, running window"] / seconds["VICReg"]),
    }


def literal_loss(z_a, z_b, k=20):
    """The paper's formulas as they stand, centred, differentiated through SVD."""
    sides = [z - z.mean(0) for z in (z_a, z_b)]
    z = torch.cat(sides)
    covariance = z.T @ z / len(z)
    identity = torch.eye(z.shape[1])
    spread_term = torch.linalg.norm(covariance / covariance.trace() - identity / z.shape[1]) ** 2
    bases = [torch.linalg.svd(side, full_matrices=False).Vh[:k].T for side in sides]
    subspace_term = torch.linalg.norm(bases[0] @ bases[0].T - bases[1] @ bases[1].T) ** 2
    standard = z / z.std(0, unbiased=False)
    return spread_term + subspace_term + torch.linalg.norm(standard.T @ standard / len(z) - identity) ** 2


def vicreg_loss(x, y):
    """VICReg (Bardes et al., 2022, algorithm 1), weights 25, 25, 1."""

    def off_diagonal(c):
        return c.square().sum() - c.diagonal().square().sum()

    n, d = x.shape
    invariance = nn.functional.mse_loss(x, y)
    x, y = x - x.mean(0), y - y.mean(0)
    variance = sum(torch.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (x, y)) / 2
    covariance = sum(off_diagonal(z.T @ z / (n - 1)) for z in (x, y)) / d
    return 25 * invariance + 25 * variance + covariance


# ---- A training step ------------------------------------------------------------------------------------------------


def step(args) -> dict:
    """The same batch through the Trainer: MLM alone and MLM + dense, whole and accumulated."""
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    cuda = args.device == "cuda"
    # MiniLM size on a CPU, ModernBERT-base on a GPU: random weights, the published shapes
    length, pairs, cut = (512, 128, 8) if cuda else (128, 32, 4)
    results = {}
    for accumulation in (1, cut):
        trainers = {
            name: make_trainer(weight, length, pairs // accumulation, accumulation, cuda)
            for name, weight in (("MLM", 0.0), ("MLM + dense", 1.0))
        }
        seconds, memory = {}, {}
        for trainer in trainers.values():
            trainer.run = one_update(trainer)
        seconds = alternate({name: trainer.run for name, trainer in trainers.items()}, args.repeats, args.device)
        if cuda:
            for name, trainer in trainers.items():
                torch.cuda.reset_peak_memory_stats()
                trainer.run()
                memory[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        tokens = 2 * pairs * length
        results["whole batch" if accumulation == 1 else f"accumulated x {accumulation}"] = {
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "tokens per second": {name: round(tokens / median(values)) for name, values in seconds.items()},
            "MLM + dense / MLM": spread(seconds["MLM + dense"] / seconds["MLM"]),
            **({"peak GiB": memory} if memory else {}),
        }
        del trainers
    return {"device": args.device, "rows": 2 * pairs, "tokens a row": length, **results}


def make_trainer(dense_weight, length, batch_size, accumulation, cuda) -> DenseTrainer:
    """A trainer on notes that all have `length` tokens."""
    config = (
        ModernBertConfig()
        if cuda
        else BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    )
    tokenizer = number_tokenizer(config.vocab_size, config.pad_token_id, length)
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(10, config.vocab_size, length - 2))) for _ in range(600)]
    notes = datasets.Dataset.from_dict(
        {"patient_id": np.repeat(np.arange(200), 3), "time": list(range(3)) * 200, "text": texts}
    )
    args = DenseTrainingArguments(
        output_dir="outputs/benchmark",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        dense_weight=dense_weight,
        max_length=length,
        bf16=cuda,
        use_cpu=not cuda,
        save_strategy="no",
        disable_tqdm=True,
        max_steps=10**6,
    )
    return DenseTrainer(AutoDenseModel.from_config(config), args, train_dataset=notes, processing_class=tokenizer)


def number_tokenizer(vocabulary: int, pad: int, length: int) -> PreTrainedTokenizerFast:
    """A token a number: texts of any length in tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {str(i): i for i in range(vocabulary)}
    special = {"pad_token": pad, "cls_token": 1 if pad != 1 else 2, "sep_token": 3, "mask_token": 4, "unk_token": 5}
    backend = Tokenizer(models.WordLevel(ids, unk_token="5"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    cls, sep = special["cls_token"], special["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", special_tokens=[(str(cls), cls), (str(sep), sep)]
    )
    names = {name: str(i) for name, i in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, **names)


def one_update(trainer: DenseTrainer):
    """A function that does one optimizer update as `train` does."""
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer._initial_global_step = -1  # no replay check: that is done in a run's first update alone
    loader = cycle(list(islice(trainer.get_train_dataloader(), 4 * trainer.args.gradient_accumulation_steps)))

    def update():
        batches, items = trainer.get_batch_samples(
            loader, trainer.args.gradient_accumulation_steps, trainer.args.device
        )
        for batch in batches:
            trainer.training_step(model, batch, items)
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        model.zero_grad()

    return update


# ---- Stability of the running covariance ----------------------------------------------------------------------------


def running(args) -> dict:
    """Effective rank, of 128, that a 3-layer MLP reaches when trained by L_spec alone (Adam, 1e-3), by batch and window.

    The last two columns are the field's usual exponential averages, for contrast: of the covariance as it is, and of the
    trace-normalised one. `runaway` counts runs whose rank fell below half of that of the batch alone.
    """
    torch.set_num_threads(1)
    windows = {"batch alone": None, "auto (128)": "auto", "256": 256, "2048": 2048}
    rows, runaway = {}, dict.fromkeys(windows, 0)
    for batch in (16, 32, 128, 1024):
        ranks = {name: [] for name in (*windows, "plain average 0.99", "normalised average 0.99")}
        for seed in tqdm(range(args.seeds), desc=f"batch {batch}"):
            for name, window in windows.items():
                loss = DenseObjective(0.0, 0.0, 4, window=window, center=True, power_iterations=1)
                ranks[name].append(train_toy(lambda z, loss=loss: loss(*z.chunk(2))["loss"], batch, args.steps, seed))
            for name, normalise in (("plain average 0.99", False), ("normalised average 0.99", True)):
                ranks[name].append(train_toy(exponential_average(normalise), batch, args.steps, seed))
        for name in windows:
            runaway[name] += sum(r < b / 2 for r, b in zip(ranks[name], ranks["batch alone"], strict=True))
        rows[f"batch {batch}"] = {name: [round(r, 1) for r in values] for name, values in ranks.items()}
    return {"steps": args.steps, "dimension": 128, "effective rank by seed": rows, "runaway": runaway}


def exponential_average(normalise: bool, beta: float = 0.99):
    """L_spec of beta C + (1 - beta) C_t, the gradient through C_t."""
    state = {}

    def loss(z):
        z = z - z.mean(0)
        covariance = z.T @ z / len(z)
        if normalise:
            covariance = covariance / covariance.trace()
        average = beta * state.get("C", covariance.detach()) + (1 - beta) * covariance
        state["C"] = average.detach()
        return average.square().sum() / average.trace().square()

    return loss


def train_toy(loss, batch: int, steps: int, seed: int, inputs: int = 64, width: int = 128) -> float:
    """Centred effective rank on 4,096 fresh rows after training on Gaussian inputs with a 1/i spectrum."""
    torch.manual_seed(seed)
    mixing = torch.randn(inputs, inputs) / torch.arange(1, inputs + 1)[:, None]
    layers = [nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, width)]
    network = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network(torch.randn(batch, inputs) @ mixing)).backward()
        optimizer.step()
    with torch.no_grad():
        return effective_rank(network(torch.randn(4096, inputs) @ mixing), center=True)


# ---- Tables to batches ----------------------------------------------------------------------------------------------


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
        lengths = np.random.default_rng(0).integers(16, 513, pairs.notes)
        stage("sampler to its first batch", lambda: next(iter(PairBatchSampler(pairs, lengths, 32))))
        some = notes.select(range(min(len(notes), 100_000)))
        tokens, counts = stage("tokenise", lambda: tokenize_notes(some, tokenizer, 512))
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


def measured(function):
    """A function's result, and what it took."""
    pa.default_memory_pool().release_unused()
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)  # memory that is kept for later would hide what comes next
    before, peak, done = anonymous_megabytes(), [0], threading.Event()

    def watch():
        while not done.wait(0.003):
            peak[0] = max(peak[0], anonymous_megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        result = function()
        took = {
            "seconds": round(time.perf_counter() - wall, 3),
            "processor seconds": round(time.process_time() - cpu, 3),
        }
    finally:
        done.set()
        watcher.join()
    return result, took | {"peak MB above": round(max(0, max(peak[0], anonymous_megabytes()) - before))}


def anonymous_megabytes() -> float:
    """Memory of this process that belongs to no file (Linux)."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * 4096 / 1e6


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
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        pad_token_id=tokenizer.pad_token_id,
    )
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


# ---- Texts to embeddings --------------------------------------------------------------------------------------------


def encode(args) -> dict:
    """One thread, one folder, a model of MiniLM's size: openings of the bundled notes, 8 to 200 words (log-uniform)."""
    from sentence_transformers import SentenceTransformer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "encoder")
    notes = pq.read_table(BUNDLED / "cohort" / "notes.parquet", columns=["text"])["text"].to_pylist()
    words = np.exp(rng.uniform(np.log(8), np.log(200), args.texts)).astype(int)
    chosen = rng.choice(len(notes), args.texts, replace=False)
    texts = [" ".join(notes[i].split(" ")[:n]) for i, n in zip(chosen, words, strict=True)]
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        pad_token_id=tokenizer.pad_token_id,
    )
    with tempfile.TemporaryDirectory() as folder:
        AutoDenseModel.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        ours, theirs = AutoDenseModel.from_pretrained(folder), SentenceTransformer(folder, device="cpu")
        ours.encode(texts[:1])  # finds its tokenizer
    options = {"batch_size": args.batch_size, "convert_to_tensor": True, "show_progress_bar": False}
    functions = {
        "ours": lambda: ours.encode(texts, batch_size=args.batch_size),
        "SentenceTransformer": lambda: theirs.encode(texts, **options),
    }
    difference = (functions["ours"]() - functions["SentenceTransformer"]()).abs().max().item()
    seconds = alternate(functions, args.repeats)
    tokens = sum(map(len, tokenizer(texts, truncation=True, max_length=ours.max_length)["input_ids"]))
    return {
        "texts": args.texts,
        "tokens": tokens,
        "batch size": args.batch_size,
        "largest difference": difference,
        "tokens per second": {name: round(tokens / median(values)) for name, values in seconds.items()},
        "SentenceTransformer / ours": spread(seconds["SentenceTransformer"] / seconds["ours"]),
    }


if __name__ == "__main__":
    main()
