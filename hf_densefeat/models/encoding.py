"""Texts to pooled embeddings, a slice at a time: memory is that of the texts and the result, however many there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_densefeat.models.pooling import over_chunks

NO_LIMIT = 10**9  # tokenizers without a limit say 1e30
SLICE, CHARACTERS = 1000, 4_000_000  # texts, and characters, whose tokens are in memory at once
CACHED_TOKENS = 2048  # tokens of a batch whose hidden states stay in a processor's cache; by `benchmark.py encode`


class Rows(NamedTuple):
    """Token rows of some texts."""

    tokens: dict[str, list]  # columns of rows, not padded
    chunk_to_note: list[int] | None = None  # which text each row is of, where long ones are read in chunks
    cut: list[bool] | None = None  # of each text, whether it lost tokens; None for inputs of which nothing is counted


def token_rows(texts: Sequence[str], tokenizer: Any, limit: int, *, chunk: bool) -> Rows:
    """Tokens of texts, at most `limit` a row: a longer text is cut, or is several rows; whole from `NO_LIMIT` on."""
    limited = limit < NO_LIMIT
    chunk = chunk and limited
    how: dict[str, Any] = {"truncation": limited, "max_length": limit if limited else None}
    encoded = tokenizer(list(texts), return_overflowing_tokens=chunk, **how)
    tokens = dict(encoded)
    owner = tokens.pop("overflow_to_sample_mapping", None)
    cut = [False] * len(texts)
    # only a row of the full length can be of a text that was longer
    for i in [] if chunk else [i for i, ids in enumerate(tokens["input_ids"]) if len(ids) == limit]:
        if tokenizer.is_fast:
            cut[i] = bool(encoded.encodings[i].overflowing)
        else:
            cut[i] = len(tokenizer(texts[i], verbose=False)["input_ids"]) > len(tokens["input_ids"][i])
    return Rows(tokens, owner, cut)


def batches_by_length(lengths: Sequence[int], most: int, total: int | None = None) -> Iterator[list[int]]:
    """Yield batches of indices, longest first: at most `most` rows, and `total` positions unless one row has more."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        rows = most if total is None else min(most, max(1, total // max(lengths[order[start]], 1)))
        yield order[start : start + rows]
        start += rows


def pooled_texts(
    model: Any,
    texts: list[str],
    tokenizer: Any,
    *,
    batch_size: int,
    max_length: int | None,
    excluded: int,
    progress: bool,
    input_layer: bool,
) -> tuple[Tensor, Tensor]:
    """Pooled states (N, d), float32 on the CPU, and whether each text was cut (N,).

    Texts are sorted by characters, tokenised 1,000 at a time, and each slice is sorted by tokens: little is padded. On a CPU
    a batch has no more than 2,048 positions. Arguments are as of `DenseFeatureMixin.encode`, of texts with their prompt, of
    which `excluded` tokens are not pooled; with `input_layer` the mean of the input embeddings stands beside, (N, 2 d).
    """
    z = torch.empty(len(texts), model.config.hidden_size * (1 + input_layer))
    cut = torch.zeros(len(texts), dtype=torch.bool)
    positions = CACHED_TOKENS if model.device.type == "cpu" else None
    with tqdm(total=len(texts), desc="Encoding", disable=None if progress else True) as bar:
        for part in batches_by_length([len(text) for text in texts], SLICE, CHARACTERS):
            rows = model._rows([texts[i] for i in part], tokenizer, max_length)
            lengths = [len(ids) for ids in rows.tokens["input_ids"]]
            found = torch.empty(len(lengths), z.shape[1])
            for some in batches_by_length(lengths, batch_size, positions):
                batch = {name: [values[i] for i in some] for name, values in rows.tokens.items()}
                found[some] = model._embed(model._padded(batch, tokenizer), excluded, input_layer)
                bar.update(len(some) * len(part) / len(lengths))
            if rows.chunk_to_note is not None:
                found = over_chunks(found, torch.tensor(lengths), torch.tensor(rows.chunk_to_note), len(part))
            z[part] = found
            if rows.cut is not None:
                cut[part] = torch.tensor(rows.cut)
    return z, cut


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every module is in evaluation mode; afterwards each is in its own again, also after an error."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def capturing(body: Any, chosen: Tensor | None) -> Iterator[None]:
    """Inside, a forward leaves its last hidden states in `body._densefeat_hidden`; see `DenseFeatureMixin.capture_hidden`."""
    if not hasattr(body, "_densefeat_hook"):
        body._densefeat_hook = body.register_forward_hook(_keep_hidden)
    body._densefeat_capture, body._densefeat_chosen = True, chosen
    try:
        yield
    finally:
        body._densefeat_capture, body._densefeat_hidden, body._densefeat_chosen = False, None, None


def _keep_hidden(module: Any, args: Any, output: Any) -> Any:
    """Keep the last hidden states for the pooling, and hand on the chosen positions alone where some are chosen."""
    if not module._densefeat_capture:
        return None
    module._densefeat_hidden = output[0]
    if module._densefeat_chosen is None:
        return None
    chosen = output[0][module._densefeat_chosen][None]
    if isinstance(output, tuple):
        return (chosen, *output[1:])
    return type(output)(**(dict(output) | {next(iter(output)): chosen}))
