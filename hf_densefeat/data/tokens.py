"""Notes to tokens, and adjacent pairs of tokenised notes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_densefeat.data.columns import column
from hf_densefeat.data.inputs import PairDataset
from hf_densefeat.data.marks import marked_tokens
from hf_densefeat.data.pairs import NotePairs

logger = logging.getLogger(__name__)

KEPT = ("word_ids", "marked")  # what masks may need of each token


@dataclass(frozen=True)
class TokenStats:
    """What tokenising did to the notes.

    Attributes:
        notes: Number of notes.
        tokens: Tokens kept, special tokens included.
        truncated: Notes longer than `max_length`.
        cut: Tokens that these notes lost.
        median: Median length in tokens, after truncation.
        longest: Largest length in tokens, after truncation.
        max_length: The limit, or None.
        chunked: Notes longer than `max_length` that were cut into chunks instead; they lost nothing.
        marks: Tokens kept that are part of a de-identification mark, such as MIMIC's ___; 0 with a slow tokenizer.
    """

    notes: int
    tokens: int
    truncated: int
    cut: int
    median: float
    longest: int
    max_length: int | None
    chunked: int = 0
    marks: int = 0

    @classmethod
    def of(cls, tokens: datasets.Dataset, max_length: int | None, chunk: bool) -> TokenStats:
        """Return the counts of tokens with the columns `length` and `cut`."""
        length, cut = column(tokens, "length").to_numpy(), column(tokens, "cut").to_numpy()
        return cls(
            notes=len(tokens),
            tokens=int(length.sum()),
            truncated=int((cut > 0).sum()),
            cut=int(cut.sum()),
            median=float(np.median(length)),
            longest=int(length.max()),
            max_length=max_length,
            chunked=int((length > max_length).sum()) if chunk else 0,
            marks=int(column(tokens, "marks").to_numpy().sum()),
        )

    def counts(self) -> dict[str, int]:
        """Return what the model card says."""
        counts = {"tokens": self.tokens, f"notes cut to {self.max_length} tokens": self.truncated}
        return counts | ({"tokens of de-identification marks": self.marks} if self.marks else {})

    def __str__(self) -> str:
        """Return one line of counts."""
        text = f"{self.tokens:,} tokens in {self.notes:,} notes (median {self.median:.0f}, longest {self.longest:,})"
        if self.marks:
            text += f", {self.marks / self.tokens:.1%} of them de-identification marks"
        if self.chunked:
            return f"{text}; {self.chunked:,} notes ({self.chunked / self.notes:.1%}) in chunks of {self.max_length:,} tokens"
        if not self.truncated:
            return f"{text}; none truncated"
        share, lost = self.truncated / self.notes, self.cut / (self.cut + self.tokens)
        return (
            f"{text}; {self.truncated:,} notes ({share:.1%}) truncated to {self.max_length:,} tokens, "
            f"{self.cut:,} tokens ({lost:.1%}) cut"
        )


def tokenize_notes(
    notes: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    num_proc: int | None = None,
    word_ids: bool = False,
    chunk: bool = False,
    marks: bool = False,
    prompt: str = "",
) -> tuple[datasets.Dataset, TokenStats]:
    """Tokenise every note once, memory-mapped and cached by `datasets`; row i of the result is note i.

    Patient text ends up, as token ids, in the `datasets` cache (under `HF_HOME`).

    Args:
        notes: What `load_notes` returns.
        tokenizer: The model's tokenizer; a fast one where `word_ids` is set.
        max_length: Keep so many tokens of a note, special tokens included; None for the tokenizer's own limit.
        num_proc: Number of processes.
        word_ids: Also keep which word each token belongs to, for whole-word masking.
        chunk: Keep all of a longer note, as chunks of `max_length` tokens one after another, each with its special
            tokens; for a `DensePairCollator` with that `chunk_length`.
        marks: Also keep which tokens are part of a de-identification mark, so that none of them is masked. A slow
            tokenizer does not say where in the text a token stands: none is marked then, with a warning.
        prompt: What stands before every text.

    Returns:
        A dataset with `input_ids`, `length` and, if asked for, `word_ids` (−1 for special tokens) and `marked` (1 for
        tokens of marks); and the counts.

    Raises:
        ValueError: If `max_length` leaves no room beside the special tokens, or word ids need a fast tokenizer.
    """
    if word_ids and not tokenizer.is_fast:
        raise ValueError("Whole-word masking needs a fast tokenizer, got a slow one. Load it with AutoTokenizer.")
    if marks and not tokenizer.is_fast:
        logger.warning("The tokenizer is a slow one: de-identification marks are masked like other tokens.")
    # tokenizers without a limit say 10^30
    if max_length is None and tokenizer.model_max_length < 10**9:
        max_length = tokenizer.model_max_length
    if max_length is None:
        logger.warning(
            "Neither `max_length` nor the tokenizer (model_max_length) limits the length of a note: the longest note "
            "decides the memory a batch takes. Pass the length the model was trained with."
        )
    elif max_length <= tokenizer.num_special_tokens_to_add():
        raise ValueError(
            f"Expected `max_length` above the {tokenizer.num_special_tokens_to_add()} special tokens of every note, "
            f"got {max_length}."
        )
    tokens = notes.map(
        tokenize_texts,
        batched=True,
        input_columns="text",
        remove_columns=notes.column_names,
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length}
        | {"word_ids": word_ids, "chunk": chunk, "marks": marks, "prompt": prompt},
        num_proc=num_proc,
        desc="Tokenising notes",
    )
    return tokens.remove_columns(["cut", "marks"]), TokenStats.of(tokens, max_length, chunk)


def tokenize_texts(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    word_ids: bool,
    chunk: bool,
    marks: bool = False,
    prompt: str = "",
) -> dict[str, list[Any]]:
    """Tokenise without a limit and cut afterwards: what a limit cuts is to be counted, in one pass.

    A tokenizer that truncates also changes its own state, and with it the key under which `datasets` caches.
    """
    texts = [prompt + text for text in texts] if prompt else texts
    encoded = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    # how many special tokens stand before and after the text, whatever the family
    special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    opening, closing = special.index(0), special[::-1].index(0)

    def kept(row: list[int]) -> list[int]:
        if max_length is None or len(row) <= max_length:
            return row
        if chunk:
            first, inner, last = row[:opening], row[opening : len(row) - closing], row[len(row) - closing :]
            step = max_length - opening - closing
            return [token for i in range(0, len(inner), step) for token in (*first, *inner[i : i + step], *last)]
        # the closing token stays: the model has never seen a text without it
        return row[: max_length - closing] + row[len(row) - closing :]

    input_ids = [kept(ids) for ids in encoded["input_ids"]]
    columns: dict[str, list[Any]] = {
        "input_ids": input_ids,
        "length": [len(ids) for ids in input_ids],
        "cut": [max(len(ids) - len(row), 0) for ids, row in zip(encoded["input_ids"], input_ids, strict=True)],
    }
    if word_ids:
        words = [encoded.word_ids(i) for i in range(len(texts))]
        columns["word_ids"] = [kept([-1 if word is None else word for word in row]) for row in words]
    marked = [
        marked_tokens(text, encoded[i]) if tokenizer.is_fast else [0] * len(ids)
        for i, (text, ids) in enumerate(zip(texts, encoded["input_ids"], strict=True))
    ]
    columns["marks"] = [sum(kept(row)) for row in marked]
    if marks:
        columns["marked"] = [kept(row) for row in marked]
    return columns


class TokenPairs(PairDataset):
    """Map-style dataset of pairs, looked up by `(pair, mask_seed)` or by pair.

    An item is `{"earlier": ids, "later": ids, "mask_seed": mask_seed}`, and what else `tokenize_notes` kept of the tokens:
    `earlier_word_ids`, `earlier_marked`, and the same of the later note.

    Args:
        tokens: What `tokenize_notes` returns for the notes the pairs were made from; read memory-mapped.
        pairs: What `adjacent_pairs` returns.
    """

    def __init__(self, tokens: datasets.Dataset, pairs: NotePairs):
        if len(tokens) != pairs.num_notes:
            raise ValueError(
                f"Expected the tokens of the {pairs.num_notes:,} notes the pairs were made from, got {len(tokens):,} rows."
            )
        columns = [name for name in ("input_ids", *KEPT) if name in tokens.column_names]
        self.tokens, self.pairs = tokens.select_columns(columns), pairs
        self.lengths = column(tokens, "length").to_numpy()

    def __getitems__(self, items: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """Return the pairs of one micro-batch, read in one go; an empty list for an empty list."""
        if not items:
            return []
        chosen, mask_seeds = zip(*(item if isinstance(item, tuple) else (item, 0) for item in items), strict=True)
        index = np.array(chosen)
        return pair_tokens(self.tokens[np.r_[self.pairs.earlier[index], self.pairs.later[index]]], mask_seeds)


def pair_tokens(columns: dict[str, list[Any]], mask_seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return one dict a pair, of columns with the earlier notes of all pairs, then the later ones."""
    n, batch = len(mask_seeds), []
    for i, mask_seed in enumerate(mask_seeds):
        pair = {"earlier": columns["input_ids"][i], "later": columns["input_ids"][n + i], "mask_seed": int(mask_seed)}
        for name in set(KEPT) & set(columns):
            pair |= {f"earlier_{name}": columns[name][i], f"later_{name}": columns[name][n + i]}
        batch.append(pair)
    return batch
