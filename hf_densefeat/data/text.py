"""Texts as an input kind: a tokenizer, and what is done with notes that are too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import datasets
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_densefeat.data.collator import DensePairCollator
from hf_densefeat.data.pairs import NotePairs
from hf_densefeat.data.tokens import TokenPairs, TokenStats, tokenize_notes, tokenize_texts


class TextProcessor:
    """The `PairProcessor` of texts, also of a stream.

    Args:
        tokenizer: the model's tokenizer.
        chunk: read a note longer than `max_length` in chunks; False: cut it.
        whole_words: mask all tokens of a word or none; needs a fast tokenizer.
        predict_marks: mask de-identification marks too.
        prompt: what stands before every text.
        num_proc: processes that tokenise.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chunk: bool = False,
        whole_words: bool = False,
        predict_marks: bool = False,
        prompt: str = "",
        num_proc: int | None = None,
    ):
        self.tokenizer, self.chunk, self.whole_words, self.num_proc = tokenizer, chunk, whole_words, num_proc
        self.options: dict[str, Any] = {"chunk": chunk, "word_ids": whole_words, "marks": not predict_marks}
        self.options["prompt"] = prompt

    def pairs(
        self, notes: datasets.Dataset, pairs: NotePairs, *, max_length: int | None = None
    ) -> tuple[TokenPairs, TokenStats]:
        """See `PairProcessor`; notes are tokenised once, and `datasets` caches the tokens."""
        tokens, stats = tokenize_notes(notes, self.tokenizer, max_length, num_proc=self.num_proc, **self.options)
        if not stats.marks and "marked" in tokens.column_names:
            tokens = tokens.remove_columns("marked")  # nothing to be left out: no column to be read with every batch
        return TokenPairs(tokens, pairs), stats

    def collator(
        self, objective: str | None, *, mlm_probability: float, max_length: int | None = None
    ) -> DensePairCollator:
        """See `PairProcessor`; ValueError for chunks of no known length."""
        if self.chunk and max_length is None:
            raise ValueError("long_notes is chunk, but nothing says how long a chunk is: set max_length.")
        return DensePairCollator(
            self.tokenizer,
            objective=cast("Literal['mlm', 'causal'] | None", objective),
            mlm_probability=mlm_probability,
            whole_word_mask=self.whole_words and objective == "mlm",
            chunk_length=max_length if self.chunk else None,
        )

    def pad(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
        """See `PairProcessor`."""
        columns: Any = dict(rows)
        return dict(self.tokenizer.pad(columns, padding_side="right", return_tensors="pt"))

    def columns(self, texts: list[str], *, max_length: int | None = None) -> dict[str, list[Any]]:
        """See `StreamProcessor`: `input_ids`, `length`, `cut`, `marks`, and what masks need of `word_ids` and `marked`."""
        return tokenize_texts(texts, self.tokenizer, max_length, **self.options)

    def save_pretrained(self, save_directory: str | Path) -> Any:
        """Save the tokenizer."""
        return self.tokenizer.save_pretrained(save_directory)
