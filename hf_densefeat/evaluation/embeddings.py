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


def _accepted(model: Any, **options: Any) -> dict[str, Any]:
    known = inspect.signature(model.encode).parameters
    return {name: value for name, value in options.items() if value is not None and name in known}


def encoder_key(model: Any, tokenizer: Any = None) -> str:
    """SHA-256 over body, dense head, architecture, config and tokenizer: equal keys, equal embeddings."""
    digest = hashlib.sha256(repr(model).encode())
    if hasattr(model, "config"):
        digest.update(model.config.to_json_string().encode())
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if tokenizer is not None:
        digest.update(repr(tokenizer).encode() + repr(sorted(tokenizer.get_vocab().items())).encode())
    # The body only: a language-modelling head has no part in embeddings, and is random where a checkpoint has none.
    weights = dict(getattr(model, "base_model", model).state_dict())
    head = getattr(model, "dense_head", None)
    if head is not None:
        weights |= {"dense_head.mean": head.mean, "dense_head.matrix": head.matrix}
    for name, weight in sorted(weights.items()):
        digest.update(f"{name}{weight.dtype}{tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
) -> np.ndarray:
    """Embeddings (N, d) float32 of the texts, each different text encoded once, longest first; bf16 autocast on CUDA.

    Args:
        model: anything with ``encode(texts, ...)``: one of our encoders or a `SentenceTransformer`.
        texts: N strings.
        tokenizer: passed on where ``encode`` takes one.
        batch_size: passed on.
        max_length: passed on where ``encode`` takes it.
        cache: True for the private folder ``$HF_HOME/hf_densefeat/embeddings``, or a folder; made with mode 0700.
            The file name is a hash of weights, tokenizer, options and texts; the file holds numbers only.
        key: `encoder_key` of the model, where it is known already.
        head: False for the embeddings below the model's dense head, where ``encode`` takes ``head``.
    """
    unique, inverse = np.unique(np.asarray(texts, dtype=object), return_inverse=True)
    options = _accepted(model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
    if not head:
        options |= _accepted(model, head=False)
    path = None
    if cache:
        folder = Path(HF_HOME) / "hf_densefeat" / "embeddings" if cache is True else Path(cache)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        digest = hashlib.sha256(f"{key or encoder_key(model, tokenizer)} {max_length} {head}".encode())
        for text in unique:
            digest.update(hashlib.sha256(text.encode()).digest())
        path = folder / f"{digest.hexdigest()}.npy"
        if path.exists():
            return np.load(path, allow_pickle=False)[inverse]
    # Longest first: batches hold texts of one length, and memory is highest at once.
    order = np.argsort([-len(text) for text in unique], kind="stable")
    device = next(model.parameters()).device.type if isinstance(model, torch.nn.Module) else "cpu"
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        encoded = torch.as_tensor(model.encode([unique[i] for i in order], **options)).float().cpu().numpy()
    z = np.empty_like(encoded)
    z[order] = encoded
    if path is not None:
        # Written beside and renamed, so that another process never reads half a file.
        partial = path.with_suffix(f".{time.monotonic_ns()}.tmp")
        with open(partial, "wb") as file:
            partial.chmod(0o600)
            np.save(file, z)
        partial.rename(path)
    return z[inverse]
