"""Pairs of tokenised notes to one batch of 2B rows, earlier notes first, with masks."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


Row = tuple[np.ndarray, np.ndarray]  # token ids, and labels


class DensePairCollator:
    """Turn B pairs into one batch of 2B rows: earlier notes in rows 0 … B−1, later notes in rows B … 2B−1.

    The batch holds `input_ids`, `attention_mask`, `labels` (−100 where nothing is predicted), `token_type_ids` where
    the tokenizer has them, `lengths`, the tokens of each row, and `num_pairs`, an int. Rows are padded to the longest.

    Masks are those of `transformers.DataCollatorForLanguageModeling` (80 % mask token, 10 % random token, 10 % left;
    with whole words: all mask token), drawn for each row from (mask_seed, side): they do not depend on the other rows, the
    padding, the worker or the rank. A short row may get no mask at all. Tokens of de-identification marks, where
    `tokenize_notes(marks=True)` kept them, are never predicted, and the share is that of the other tokens.

    With `objective="causal"` labels are shifted: `labels[t]` is the token to be predicted at position t, that is
    `input_ids[t + 1]`, and −100 at the last token. Nothing is masked.

    An empty list, the share of a rank for which no pairs were left, gives two minimal rows without labels and
    `num_pairs` 0, so that the model can run on every rank.

    Args:
        tokenizer: The model's tokenizer.
        objective: "mlm", "causal" or None (no labels at all).
        mlm_probability: Share of tokens to predict, in [0, 1].
        whole_word_mask: Mask all tokens of a word or none; needs `word_ids` from `tokenize_notes`.
        pad_to_multiple_of: Round the padded length up to a multiple of this.
        chunk_length: Cut longer notes, as `tokenize_notes(chunk=True)` gives them, into rows of so many tokens. The batch
            then has at least 2B rows, and `chunk_to_note`, which of the 2B notes each row belongs to.

    Raises:
        ValueError: If the tokenizer has no padding token, or no mask token where masks are asked for.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        objective: Literal["mlm", "causal"] | None = "mlm",
        mlm_probability: float = 0.30,
        whole_word_mask: bool = False,
        pad_to_multiple_of: int | None = None,
        chunk_length: int | None = None,
    ):
        if objective not in ("mlm", "causal", None):
            raise ValueError(f'Expected `objective` "mlm", "causal" or None, got {objective!r}.')
        if tokenizer.pad_token is None:
            raise ValueError(
                "The tokenizer has no padding token, and notes of a batch differ in length. Set one first: "
                "`tokenizer.pad_token = tokenizer.eos_token`."
            )
        if objective == "mlm" and tokenizer.mask_token is None:
            raise ValueError(
                "The tokenizer has no mask token, so masked language modelling cannot work with it. Use "
                '`objective="causal"` for a decoder, or a tokenizer with a mask token.'
            )
        if not 0 <= mlm_probability <= 1:
            raise ValueError(f"Expected `mlm_probability` in [0, 1], got {mlm_probability}.")
        if whole_word_mask and objective != "mlm":
            raise ValueError(f'`whole_word_mask` needs `objective="mlm"`, got {objective!r}.')
        self.tokenizer, self.objective, self.pad_to_multiple_of = tokenizer, objective, pad_to_multiple_of
        self.whole_word_mask, self.chunk_length = whole_word_mask, chunk_length
        self.masking = None
        if objective == "mlm":
            with warnings.catch_warnings():  # it warns that whole words are always replaced; the docstring says so
                warnings.simplefilter("ignore")
                self.masking = _Masking(
                    tokenizer, mlm_probability=mlm_probability, whole_word_mask=whole_word_mask, return_tensors="np"
                )

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of the pairs that `TokenPairs` yields."""
        if pairs:
            rows = [self._row(pair, side) for side in ("earlier", "later") for pair in pairs]
        else:
            ids = self.tokenizer("")["input_ids"] or [self.tokenizer.pad_token_id]
            rows = [(np.array(ids), np.full(len(ids), -100))] * 2
        chunk_to_note = list(range(len(rows)))
        if self.chunk_length:
            rows, chunk_to_note = self._chunks(rows, self.chunk_length)
        longest = max(len(ids) for ids, _ in rows)
        if self.pad_to_multiple_of:
            longest = math.ceil(longest / self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), longest)
        input_ids = torch.full(shape, self.tokenizer.pad_token_id)
        labels, attention_mask = torch.full(shape, -100), torch.zeros(shape, dtype=torch.int64)
        for i, (ids, targets) in enumerate(rows):
            # Decoders read the last token, and position ids count from the left: padding goes to the right.
            input_ids[i, : len(ids)] = torch.from_numpy(ids)
            labels[i, : len(ids)] = torch.from_numpy(targets)
            attention_mask[i, : len(ids)] = 1
        batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if "token_type_ids" in self.tokenizer.model_input_names:
            batch["token_type_ids"] = torch.zeros_like(input_ids)
        if self.chunk_length:
            batch["chunk_to_note"] = torch.tensor(chunk_to_note)
        batch["lengths"] = [len(ids) for ids, _ in rows]
        batch["num_pairs"] = len(pairs)
        return batch

    def _chunks(self, notes: list[Row], length: int) -> tuple[list[Row], list[int]]:
        """Return the rows of all chunks, and the note that each belongs to."""
        rows: list[Row] = []
        chunk_to_note: list[int] = []
        for note, (ids, targets) in enumerate(notes):
            for start in range(0, len(ids), length):
                part = slice(start, start + length)
                rows.append((ids[part], targets[part]))
                chunk_to_note.append(note)
                if self.objective == "causal":
                    rows[-1][1][-1] = -100  # the next chunk's first token is not to be predicted from here
        return rows, chunk_to_note

    def _row(self, pair: dict[str, Any], side: str) -> Row:
        """Return one note's input ids and labels."""
        ids = np.array(pair[side], dtype=np.int64)
        if self.objective == "causal":
            return ids, np.append(ids[1:], -100)
        if self.masking is None:
            return ids, np.full(len(ids), -100)
        words = pair[f"{side}_word_ids"] if self.whole_word_mask else None
        marked = pair.get(f"{side}_marked", [])
        return self.masking.row(ids, words, marked, seed=(pair["mask_seed"], int(side == "later")))


class _Masking(DataCollatorForLanguageModeling):
    """The library's masks for one row from its own generator, with words given by the tokenizer's word ids."""

    def row(
        self, ids: np.ndarray, words: Sequence[int] | None, marked: Sequence[int], seed: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (input ids, labels) of one row of token ids, of which the special and the marked are left alone."""
        self.generator = np.random.default_rng(seed)
        special = np.isin(ids, self.tokenizer.all_special_ids)[None]
        if len(marked):
            special |= np.array(marked, dtype=bool)
        offsets = None if words is None else np.array(words)[None]
        inputs, labels = self.numpy_mask_tokens(ids[None].copy(), special_tokens_mask=special, offset_mapping=offsets)
        return inputs[0], labels[0]

    @staticmethod
    def _calc_word_ids_and_prob_mask(words: Any, special: Any) -> tuple[Any, Any]:
        """Words start where the word id changes; special tokens belong to none."""
        words = np.where(special, -1, words)
        starts = np.diff(words, axis=1, prepend=-1) != 0
        return words, ~starts | (words < 0)

    @staticmethod
    def _whole_word_mask(words: Any, mask: Any) -> Any:
        """The library compares all tokens with all, 64 M comparisons for an 8,192-token note; this is linear."""
        return np.isin(words, words[mask])
