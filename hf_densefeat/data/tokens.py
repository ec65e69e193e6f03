"""Notes to tokens, and adjacent pairs of tokenised notes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_densefeat.data.columns import column
from hf_densefeat.data.inputs import PairDataset, Row, rows_of
from hf_densefeat.data.marks import marked_tokens
from hf_densefeat.data.pairs import NotePairs

logger = logging.getLogger(__name__)


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
    *,
    num_proc: int | None = None,
    **options: Any,
) -> tuple[datasets.Dataset, TokenStats]:
    """Tokenise every note once, memory-mapped and cached by `datasets`; row i of the result is note i.

    Patient text ends up, as token ids, in the `datasets` cache (under `HF_HOME`).

    Args:
        notes: What `load_notes` returns.
        tokenizer: The model's tokenizer.
        max_length: As for `tokenize_texts`; None for the tokenizer's own limit.
        num_proc: Number of processes.
        options: What else `tokenize_texts` takes.

    Returns:
        A dataset with `input_ids`, `length` and, if asked for, `word_ids` and `marked`; and the counts.

    Raises:
        ValueError: If `max_length` leaves no room beside the special tokens, or word ids need a fast tokenizer.
    """
    if options.get("word_ids") and not tokenizer.is_fast:
        raise ValueError("Whole-word masking needs a fast tokenizer, got a slow one. Load it with AutoTokenizer.")
    if options.get("marks") and not tokenizer.is_fast:
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
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length, **options},
        num_proc=num_proc,
        desc="Tokenising notes",
    )
    stats = TokenStats.of(tokens, max_length, options.get("chunk", False))
    return tokens.remove_columns(["cut", "marks"]), stats


def tokenize_texts(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    word_ids: bool = False,
    chunk: bool = False,
    marks: bool = False,
    prompt: str = "",
) -> dict[str, list[Any]]:
    """Tokenise without a limit and cut afterwards: what a limit cuts is to be counted, in one pass.

    A tokenizer that truncates also changes its own state, and with it the key under which `datasets` caches.

    Args:
        texts: Notes.
        tokenizer: The model's tokenizer; a fast one where `word_ids` is set.
        max_length: Keep so many tokens of a note, special tokens included; None for all.
        word_ids: Also keep which word each token belongs to (−1 for special tokens), for whole-word masking.
        chunk: Keep all of a longer note, as chunks of `max_length` tokens one after another, each with its special
            tokens; for a `DensePairCollator` with that `chunk_length`.
        marks: Also keep, as `marked`, which tokens are part of a de-identification mark, so that none of them is masked. A
            slow tokenizer does not say where in the text a token stands: none is marked then.
        prompt: What stands before every text.

    Returns:
        Columns `input_ids`, `length`, `cut` (tokens that were left out), `marks` (tokens of marks) and what was asked for.
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
    """Pairs of tokenised notes; a row has `input_ids`, and `word_ids` and `marked` where `tokenize_notes` kept them.

    Args:
        tokens: What `tokenize_notes` returns for the notes the pairs were made from; read memory-mapped.
        pairs: What `adjacent_pairs` returns.
    """

    def __init__(self, tokens: datasets.Dataset, pairs: NotePairs):
        super().__init__(pairs, column(tokens, "length").to_numpy())
        self.tokens = tokens.remove_columns("length")

    def read(self, notes: np.ndarray) -> list[Row]:
        """Return the tokens of these notes."""
        return rows_of(self.tokens[notes])
