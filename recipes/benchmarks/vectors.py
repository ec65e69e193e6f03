"""`densefeat encode` at size: memory, runs that are killed, two processes, and sentence-transformers beside it."""

import hashlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, BertConfig
from transformers.utils import logging

from benchmarks.data import BUNDLED
from benchmarks.step import minilm
from benchmarks.timing import alternate, spread
from hf_densefeat import AutoDenseModel
from hf_densefeat.commands.encode import Settings
from hf_densefeat.commands.encoding import encode_table, packed

BATCH = {"tiny": "256", "minilm": "32"}  # notes at once
PEER = """
import sys
import numpy as np
import pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer

if __name__ == "__main__":
    folder, notes, output = sys.argv[1:]
    texts = pq.read_table(notes, columns=["text"])["text"].to_pylist()
    model = SentenceTransformer(folder, device="cpu")
    np.save(output, model.encode(texts, device=["cpu", "cpu"], batch_size=32))
"""


def vectors(args) -> dict:
    """On tables of notes made here; the tiny encoder has 1 layer of width 32, the other is of MiniLM's size."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        work = Path(folder)
        tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "encoder")
        sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        tiny = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, **sizes)
        for name, config in (("tiny", tiny), ("minilm", minilm(**sizes))):
            AutoDenseModel.from_config(config).save_pretrained(work / name)
            tokenizer.save_pretrained(work / name)
        found = {"notes": args.notes}
        for part in args.parts:
            found[part] = {
                "memory": memory,
                "kills": kills,
                "processes": processes,
                "speed": speed,
                "hospital": hospital,
            }[part](work, args)
        return found


def memory(work: Path, args) -> list[dict]:
    """Peak memory of the whole command at each number of notes."""
    found = []
    for notes in args.notes:
        output = work / f"vectors-{notes}"
        found.append({"notes": notes} | watched(command(work, "tiny", table(work, notes), output)))
        found[-1]["MB of vectors"] = round(sum(path.stat().st_size for path in output.iterdir()) / 1e6, 1)
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def kills(work: Path, args) -> dict:
    """SIGKILL at random moments while files are written; then the run ends, and is compared with one left alone."""
    notes = args.notes[-1]
    path, whole, output = table(work, notes), work / f"vectors-{notes}", work / "killed"
    if not whole.exists():
        watched(command(work, "tiny", path, whole))
    draw, there = random.Random(0), []
    files = len(list(whole.glob("*.parquet")))
    for kill in range(args.kills):
        run = subprocess.Popen(command(work, "tiny", path, output), stdout=subprocess.DEVNULL)
        before = there[-1] if there else 0
        while len(list(output.glob("*.parquet"))) <= before and run.poll() is None:
            time.sleep(0.005)  # until it has written a file: it is then at work
        time.sleep(draw.uniform(0, args.kill_seconds))
        assert run.poll() is None, "the run ended before it was killed: fewer --kills, or more notes"
        run.send_signal(signal.SIGKILL)
        run.wait()
        there.append(len(list(output.glob("*.parquet"))))
        print(f"kill {kill + 1}: {there[-1]} of {files} files", file=sys.stderr, flush=True)
    half = sum(1 for _ in (output / ".unfinished").glob("*"))
    watched(command(work, "tiny", path, output))
    rows = np.concatenate(
        [pq.read_table(file, columns=["row"])["row"].to_numpy() for file in sorted(output.glob("*.parquet"))]
    )
    return {
        "notes": notes,
        "files there after each kill": there,
        "half-written files left by kills": half,
        "rows lost": notes - len(np.unique(rows)),
        "rows twice": len(rows) - len(np.unique(rows)),
        "files that differ from the run that was left alone": differing(output, whole),
    }


def processes(work: Path, args) -> dict:
    """One process with one thread, one with two, two processes: which files differ."""
    path, notes = table(work, args.compared), args.compared
    runs = {}
    for name, threads, several in (
        ("1 process", "1", ()),
        ("1 process, 2 threads", "2", ()),
        ("2 processes", "1", ("--num_processes", "2")),
    ):
        runs[name] = work / name
        watched([*command(work, "minilm", path, runs[name], "--shard_size", "200"), *several], OMP_NUM_THREADS=threads)
    first = runs["1 process"]
    return {
        "notes": notes,
        "files that differ from 1 process": {name: differing(folder, first) for name, folder in runs.items()},
    }


def speed(work: Path, args) -> dict:
    """On a model of MiniLM's size, processor seconds: calls in turns in one process; programs of two, above their start.

    Ours reads the table and writes the shards, sentence-transformers has the texts in memory and returns the vectors.
    """
    path, start = table(work, args.texts, long=True), table(work, 64, long=True)
    texts = pq.read_table(path, columns=["text"])["text"].to_pylist()
    torch.set_num_threads(1)
    theirs = SentenceTransformer(str(work / "minilm"), device="cpu")
    folders = (str(work / f"one-{i}") for i in count())
    shard = -(-args.texts // 4)

    def ours() -> None:
        with redirect_stdout(io.StringIO()):
            encode_table(Settings(model=str(work / "minilm"), notes=str(path), output=next(folders)))

    functions = {
        "densefeat encode": ours,
        "SentenceTransformer.encode": lambda: theirs.encode(texts, batch_size=32, show_progress_bar=False),
    }
    seconds = alternate(functions, args.repeats)
    (work / "peer.py").write_text(PEER)
    took: dict[str, list[float]] = {"densefeat encode": [], "encode_multi_process": []}
    for repeat in range(args.programs):
        net = dict.fromkeys(took, 0.0)
        for notes, sign in ((start, -1), (path, 1)):
            out = work / f"two-{notes.stem}-{repeat}"
            mine = [*command(work, "minilm", notes, out, "--shard_size", str(shard)), "--num_processes", "2"]
            peer = [sys.executable, *(str(work / name) for name in ("peer.py", "minilm", notes.name, "peer.npy"))]
            for name, words in (("densefeat encode", mine), ("encode_multi_process", peer)):
                net[name] += sign * watched(words, OMP_NUM_THREADS="1")["processor seconds"]
        for name, value in net.items():
            took[name].append(round(value, 1))
    ratios = np.array(took["encode_multi_process"]) / np.array(took["densefeat encode"])
    return {
        "notes": args.texts,
        "one process": {name: spread(values) for name, values in seconds.items()},
        "two processes": took,
        "SentenceTransformer / densefeat, one process": spread(
            seconds["SentenceTransformer.encode"] / seconds["densefeat encode"]
        ),
        "encode_multi_process / densefeat, two processes": ratios.round(3).tolist(),
    }


ASSUMED = {  # what is not measured here, said beside the estimate
    "notes": 50_000_000,
    "tokens a note": 361,
    "characters a note": 2000,
    "H100: bf16 TFLOP/s of its data sheet, dense": 989,
    "share of that a forward reaches": 0.3,
    "cores beside an H100": 8,
    "share of 64 cores that 64 processes use": 0.8,
    "price of an hour in dollars": {"1 H100": 3.0, "8 H100": 24.0, "64 cores": 3.0},
}


def hospital(work: Path, args) -> dict:
    """What 50 million notes take with 110 M parameters, from what a token and a vector cost here, and from what is assumed."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "encoder")
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    config.vocab_size = 30522
    texts = pq.read_table(BUNDLED / "cohort" / "notes.parquet", columns=["text"])["text"].to_pylist()[
        : args.texts // 32
    ]
    tokens = sum(map(len, tokenizer(texts, truncation=True, max_length=512)["input_ids"]))
    torch.set_num_threads(1)
    rates = {}
    for dtype in ("float32", "bfloat16"):
        model = AutoDenseModel.from_config(config).to(getattr(torch, dtype))
        body = sum(value.numel() for name, value in model.base_model.named_parameters() if "embeddings" not in name)
        model.encode(texts[:8], tokenizer)
        start = time.process_time()
        model.encode(texts, tokenizer)
        rates[dtype] = tokens / (time.process_time() - start)
    start = time.process_time()
    tokenizer(texts * 80, truncation=True, max_length=512)
    rates["tokenizer"] = 80 * tokens / (time.process_time() - start)
    width = config.hidden_size
    z = torch.randn(10_000, width, generator=torch.Generator().manual_seed(0))
    ranges = [value.tolist() for value in torch.aminmax(z, dim=0)]
    sizes = {}
    for precision in ("float32", "float16", "int8", "bits"):
        values = packed(z, precision, ranges)
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        rows = pa.table(
            {
                "row": np.arange(len(z)),
                "patient_id": np.arange(len(z)) // 10,
                "time": np.arange(len(z)),
                "vector": column,
            }
        )
        pq.write_table(rows, work / "size.parquet")
        sizes[precision] = (work / "size.parquet").stat().st_size / len(z)
    return estimate({name: round(rate) for name, rate in rates.items()}, body, sizes)


def estimate(rates: dict[str, float], body: int, sizes: dict[str, float]) -> dict:
    """Hours, dollars and disk, from tokens a second of one thread, parameters of the body, and bytes a vector."""
    total = ASSUMED["notes"] * ASSUMED["tokens a note"]
    reached = ASSUMED["H100: bf16 TFLOP/s of its data sheet, dense"] * ASSUMED["share of that a forward reaches"]
    forward, beside = reached * 1e12 / (2 * body), rates["tokenizer"] * ASSUMED["cores beside an H100"]
    seconds = {"1 H100": total / forward + total / beside}  # the texts of a slice are tokenised, then encoded
    seconds["8 H100"] = seconds["1 H100"] / 8
    for dtype in ("float32", "bfloat16"):
        cores = 64 * ASSUMED["share of 64 cores that 64 processes use"]
        seconds[f"64 cores, {dtype}"] = total / (cores * rates[dtype])
    prices = ASSUMED["price of an hour in dollars"]
    return {
        "measured, one thread, tokens a second": rates,
        "parameters of the body": body,
        "measured bytes a row with a vector of 768": {name: round(value, 1) for name, value in sizes.items()},
        "assumed": ASSUMED,
        "hours": {name: round(value / 3600, 1) for name, value in seconds.items()},
        "dollars": {name: round(value / 3600 * prices[name.split(",")[0]]) for name, value in seconds.items()},
        "share of an H100's hours that is tokenising": round(total / beside / seconds["1 H100"], 2),
        "GB of vectors": {name: round(value * ASSUMED["notes"] / 1e9, 1) for name, value in sizes.items()},
        "GB of the notes, mapped under HF_HOME": round(ASSUMED["notes"] * ASSUMED["characters a note"] / 1e9),
    }


def table(work: Path, notes: int, *, long: bool = False) -> Path:
    """A parquet file of notes made of the words of the bundled ones: 4 to 16 words, or with `long` 8 to 200 (log-uniform)."""
    path = work / f"notes-{notes}{'-long' if long else ''}.parquet"
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    words = " ".join(
        pq.read_table(BUNDLED / "cohort" / "notes.parquet", columns=["text"])["text"].to_pylist()[:200]
    ).split()
    with pq.ParquetWriter(
        path, pa.schema({"patient_id": pa.int64(), "time": pa.float64(), "text": pa.string()})
    ) as writer:
        for start in range(0, notes, 50_000):
            rows = np.arange(start, min(start + 50_000, notes))
            lengths = (
                np.exp(rng.uniform(np.log(8), np.log(200), len(rows))).astype(int)
                if long
                else rng.integers(4, 17, len(rows))
            )
            places = rng.integers(0, len(words) - 200, len(rows))
            texts = [" ".join(words[place : place + length]) for place, length in zip(places, lengths, strict=True)]
            writer.write_table(pa.table({"patient_id": rows // 10, "time": (rows % 10).astype(float), "text": texts}))
    return path


def command(work: Path, model: str, notes: Path, output: Path, *more: str) -> list[str]:
    """`densefeat encode` as a child."""
    words = [
        "--model",
        str(work / model),
        "--notes",
        str(notes),
        "--output",
        str(output),
        "--batch_size",
        BATCH[model],
        *more,
    ]
    return [sys.executable, "-m", "hf_densefeat.commands.main", "encode", *words]


def watched(words: list[str], **environment: str) -> dict:
    """Run to the end: seconds, and the peak of memory, that of files that are mapped apart (Linux)."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | environment, text=True
    )
    anonymous = mapped = 0
    while run.poll() is None:
        try:
            lines = dict(line.split(":") for line in Path(f"/proc/{run.pid}/status").read_text().splitlines())
            anonymous = max(anonymous, int(lines["RssAnon"].split()[0]))
            mapped = max(mapped, int(lines["RssFile"].split()[0]))
        except (OSError, KeyError):
            continue
        time.sleep(0.02)
    assert run.returncode == 0, run.stderr.read()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "peak MB": round(anonymous / 1e3),
        "peak MB of mapped files": round(mapped / 1e3),
        "seconds": round(time.perf_counter() - began, 1),
        "processor seconds": round(used, 1),
    }


def differing(one: Path, other: Path) -> int:
    """Files that are not the same in both folders, to the bit."""
    sums = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}
        for folder in (one, other)
    ]
    return len({name for name in sums[0] | sums[1] if sums[0].get(name) != sums[1].get(name)})
