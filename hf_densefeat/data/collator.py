"""Notes to tokens, and pairs of tokenised notes to one batch of 2B rows, earlier notes first, with masks."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import datasets
import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from hf_densefeat.data.columns import column

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
    """

    notes: int
    tokens: int
    truncated: int
    cut: int
    median: float
    longest: int
    max_length: int | None
    chunked: int = 0

    def __str__(self) -> str:
        """Return one line of counts."""
        text = f"{self.tokens:,} tokens in {self.notes:,} notes (median {self.median:.0f}, longest {self.longest:,})"
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

    Returns:
        A dataset with `input_ids`, `length` and, if asked for, `word_ids` (−1 for special tokens); and the counts.

    Raises:
        ValueError: If `max_length` leaves no room beside the special tokens, or word ids need a fast tokenizer.
    """
    if word_ids and not tokenizer.is_fast:
        raise ValueError("Whole-word masking needs a fast tokenizer, got a slow one. Load it with AutoTokenizer.")
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
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length, "word_ids": word_ids, "chunk": chunk},
        num_proc=num_proc,
        desc="Tokenising notes",
    )
    length, cut = column(tokens, "length").to_numpy(), column(tokens, "cut").to_numpy()
    stats = TokenStats(
        notes=len(tokens),
        tokens=int(length.sum()),
        truncated=int((cut > 0).sum()),
        cut=int(cut.sum()),
        median=float(np.median(length)),
        longest=int(length.max()),
        max_length=max_length,
        chunked=int((length > max_length).sum()) if chunk else 0,
    )
    return tokens.remove_columns("cut"), stats


def tokenize_texts(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None, word_ids: bool, chunk: bool
) -> dict:
    """Tokenise without a limit and cut afterwards: what a limit cuts is to be counted, in one pass.

    A tokenizer that truncates also changes its own state, and with it the key under which `datasets` caches.
    """
    encoded = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    opening, closing = special.index(0), special[::-1].index(0)

    def kept(row: list[int]) -> list[int]:
        if max_length is None or len(row) <= max_length:
            return row
        if chunk:
            first, inner, last = row[:opening], row[opening : len(row) - closing], row[len(row) - closing :]
            step = max_length - opening - closing
            return [token for i in range(0, len(inner), step) for token in (*first, *inner[i : i + step], *last)]
        return row[: max_length - closing] + row[len(row) - closing :]

    input_ids = [kept(ids) for ids in encoded["input_ids"]]
    columns = {
        "input_ids": input_ids,
        "length": [len(ids) for ids in input_ids],
        "cut": [max(len(ids) - len(row), 0) for ids, row in zip(encoded["input_ids"], input_ids, strict=True)],
    }
    if word_ids:
        words = [encoded.word_ids(i) for i in range(len(texts))]
        columns["word_ids"] = [kept([-1 if word is None else word for word in row]) for row in words]
    return columns


class DensePairCollator:
    """Turn B pairs into one batch of 2B rows: earlier notes in rows 0 … B−1, later notes in rows B … 2B−1.

    The batch holds `input_ids`, `attention_mask`, `labels` (−100 where nothing is predicted), `token_type_ids` where
    the tokenizer has them, and `num_pairs`, an int. Rows are padded to the longest of the batch.

    Masks are those of `transformers.DataCollatorForLanguageModeling` (80 % mask token, 10 % random token, 10 % left;
    with whole words: all mask token), drawn for each row from (draw, side): they do not depend on the other rows, the
    padding, the worker or the rank. A short row may get no mask at all.

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
            then has at least 2B rows, and `owner`, which of the 2B notes each row belongs to.

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

    def __call__(self, pairs: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Return the batch of the pairs that `TokenPairs` yields."""
        if pairs:
            rows = [self._row(pair, side) for side in ("earlier", "later") for pair in pairs]
        else:
            ids = self.tokenizer("")["input_ids"] or [self.tokenizer.pad_token_id]
            rows = [(np.array(ids), np.full(len(ids), -100))] * 2
        owner = range(len(rows))
        if self.chunk_length:
            rows, owner = self._chunks(rows)
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
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if "token_type_ids" in self.tokenizer.model_input_names:
            batch["token_type_ids"] = torch.zeros_like(input_ids)
        if self.chunk_length:
            batch["owner"] = torch.tensor(owner)
        batch["num_pairs"] = len(pairs)
        return batch

    def _chunks(self, notes: list[tuple[np.ndarray, np.ndarray]]) -> tuple[list, list[int]]:
        """Return the rows of all chunks, and the note that each belongs to."""
        rows, owner = [], []
        for note, (ids, targets) in enumerate(notes):
            for start in range(0, len(ids), self.chunk_length):
                part = slice(start, start + self.chunk_length)
                rows.append((ids[part], targets[part]))
                owner.append(note)
                if self.objective == "causal":
                    rows[-1][1][-1] = -100  # the next chunk's first token is not to be predicted from here
        return rows, owner

    def _row(self, pair: dict, side: str) -> tuple[np.ndarray, np.ndarray]:
        """Return one note's input ids and labels."""
        ids = np.array(pair[side], dtype=np.int64)
        if self.objective == "causal":
            return ids, np.append(ids[1:], -100)
        if self.objective is None:
            return ids, np.full(len(ids), -100)
        words = pair[f"{side}_word_ids"] if self.whole_word_mask else None
        return self.masking.row(ids, words, seed=(pair["draw"], int(side == "later")))


class _Masking(DataCollatorForLanguageModeling):
    """The library's masks for one row from its own generator, with words given by the tokenizer's word ids."""

    def row(
        self, ids: np.ndarray, words: Sequence[int] | None, seed: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (input ids, labels) of one row of token ids."""
        self.generator = np.random.default_rng(seed)
        special = np.isin(ids, self.tokenizer.all_special_ids)[None]
        words = None if words is None else np.array(words)[None]
        inputs, labels = self.numpy_mask_tokens(ids[None].copy(), special_tokens_mask=special, offset_mapping=words)
        return inputs[0], labels[0]

    @staticmethod
    def _calc_word_ids_and_prob_mask(words: np.ndarray, special: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Words start where the word id changes; special tokens belong to none."""
        words = np.where(special, -1, words)
        starts = np.diff(words, axis=1, prepend=-1) != 0
        return words, ~starts | (words < 0)

    @staticmethod
    def _whole_word_mask(words: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The library compares all tokens with all, 64 M comparisons for an 8,192-token note; this is linear."""
        return np.isin(words, words[mask])
