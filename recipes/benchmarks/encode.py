"""Texts to embeddings, against SentenceTransformer."""

import tempfile
from statistics import median

import numpy as np
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer
from transformers.utils import logging

from benchmarks.data import BUNDLED
from benchmarks.step import minilm
from benchmarks.timing import alternate, measured, spread
from hf_densefeat import AutoDenseModel


def encode(args) -> dict:
    """One folder, a model of MiniLM's size: openings of the bundled notes, 8 to 200 words (log-uniform)."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "encoder")
    notes = pq.read_table(BUNDLED / "cohort" / "notes.parquet", columns=["text"])["text"].to_pylist()
    words = np.exp(rng.uniform(np.log(8), np.log(200), args.texts)).astype(int)
    chosen = rng.choice(len(notes), args.texts, replace=args.texts > len(notes))
    texts = [" ".join(notes[i].split(" ")[:n]) for i, n in zip(chosen, words, strict=True)]
    config = minilm(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    with tempfile.TemporaryDirectory() as folder:
        AutoDenseModel.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        dtype = getattr(torch, args.dtype)
        ours = AutoDenseModel.from_pretrained(folder, dtype=dtype)
        theirs = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": dtype})
        ours.encode(texts[:1])  # finds its tokenizer
    options = {"batch_size": args.batch_size, "convert_to_tensor": True, "show_progress_bar": False}
    functions = {
        "ours": lambda: ours.encode(texts, batch_size=args.batch_size),
        "SentenceTransformer": lambda: theirs.encode(texts, **options),
    }
    mine, memory = measured(functions["ours"])
    other, memory_of_other = measured(functions["SentenceTransformer"])
    difference = (mine - other.float()).abs().max().item()
    seconds = alternate(functions, args.repeats)
    tokens = sum(map(len, tokenizer(texts, truncation=True, max_length=ours.max_length)["input_ids"]))
    return {
        "texts": args.texts,
        "dtype": args.dtype,
        "peak MB above": {"ours": memory["peak MB above"], "SentenceTransformer": memory_of_other["peak MB above"]},
        "tokens": tokens,
        "batch size": args.batch_size,
        "largest difference": difference,
        "tokens per second": {name: round(tokens / median(values)) for name, values in seconds.items()},
        "SentenceTransformer / ours": spread(seconds["SentenceTransformer"] / seconds["ours"]),
    }
