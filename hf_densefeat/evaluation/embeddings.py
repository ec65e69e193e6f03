"""Embeddings of texts by a frozen encoder, each different text once, kept in a private cache on disk."""

import hashlib
import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from scipy.sparse import issparse


def encoder_key(model: Any, tokenizer: Any = None) -> str:
    """SHA-256 over body, architecture, config, tokenizer, and what follows pooling: equal keys, equal embeddings."""
    digest = hashlib.sha256(repr(model).encode())
    if hasattr(model, "config"):
        digest.update(model.config.to_json_string().encode())
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if tokenizer is not None:
        digest.update(repr(tokenizer).encode() + repr(sorted(tokenizer.get_vocab().items())).encode())
    # The body only: a language-modelling head has no part in embeddings, and is random where a checkpoint has none.
    weights = dict(getattr(model, "base_model", model).state_dict())
    for name, head in getattr(model, "views", {}).items():
        weights |= {f"{name}.mean": head.mean, f"{name}.matrix": head.matrix}
    digest.update(repr(getattr(model, "sentence", "")).encode())  # prompts, and modules without their weights
    for place, module in enumerate(getattr(model, "tail", ())):
        weights |= {f"{place}.{name}": weight for name, weight in module.weights.items()}
    for name, weight in sorted(weights.items()):
        digest.update(f"{name}{weight.dtype}{tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def precision_of(model: Any) -> str:
    """The precision of `embed`: bfloat16 where the model is on a CUDA device, else that of its weights."""
    on_cuda = isinstance(model, torch.nn.Module) and next(model.parameters()).is_cuda
    return "bfloat16" if on_cuda else "that of the weights"


def embed(
    model: Any,
    texts: Sequence[str],
    tokenizer: Any = None,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    cache: str | Path | bool = False,
    key: str | None = None,
    head: bool = True,
    return_cut: bool = False,
) -> Any:
    """Embeddings (N, d) float32 of the texts, each different text encoded once; bf16 autocast on CUDA.

    The model is anything with ``encode(texts, ...)``, which gets those of the options that it takes: one of our encoders, a
    `SentenceTransformer`, or `Words`, whose rows are a sparse matrix and are not cached. ``head=False`` gives the embeddings
    below the model's views. With ``return_cut`` a second array says of each text whether it was cut, as far as the model does.

    ``cache`` is True for the private folder ``$HF_HOME/hf_densefeat/embeddings``, or a folder; made with mode 0700. The file
    name is a hash of weights, tokenizer, options, precision and texts; the file holds numbers only. ``key`` is `encoder_key`
    of the model, where it is known already.
    """
    unique, inverse = np.unique(np.asarray(texts, dtype=object), return_inverse=True)
    given = {"tokenizer": tokenizer, "batch_size": batch_size, "max_length": max_length, "return_cut": True}
    given["head"] = None if head else False
    known = inspect.signature(model.encode).parameters
    options = {name: value for name, value in given.items() if value is not None and name in known}
    precision, path = precision_of(model), None
    if cache and isinstance(model, torch.nn.Module):
        folder = Path(HF_HOME) / "hf_densefeat" / "embeddings" if cache is True else Path(cache)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        digest = hashlib.sha256(f"{key or encoder_key(model, tokenizer)} {max_length} {head} {precision}".encode())
        for text in unique:
            digest.update(hashlib.sha256(text.encode()).digest())
        path = folder / f"{digest.hexdigest()}.npz"
    if path is not None and path.exists():
        with np.load(path, allow_pickle=False) as kept:
            z, cut = kept["z"], kept["cut"]
    else:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
            found = model.encode(unique.tolist(), **options)
        z, cut = found if "return_cut" in options else (found, np.zeros(len(unique), dtype=bool))
        if issparse(z):
            return z[inverse]
        z, cut = torch.as_tensor(z).float().cpu().numpy(), np.asarray(cut)
        if path is not None:
            # Written beside and renamed, so that another process never reads half a file.
            partial = path.with_suffix(f".{time.monotonic_ns()}.tmp")
            with open(partial, "wb") as file:
                partial.chmod(0o600)
                np.savez(file, z=z, cut=cut)
            partial.rename(path)
    return (z[inverse], cut[inverse]) if return_cut else z[inverse]
