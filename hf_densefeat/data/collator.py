"""Pairs of tokenised notes to one batch of 2B rows, earlier notes first, with masks."""

import warnings
from typing import Any, Literal

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from hf_densefeat.data.inputs import Batch, PairCollator, Row, pad_rows


class DensePairCollator(PairCollator):
    """Turn B pairs into one batch of 2B rows: earlier notes in rows 0 … B−1, later notes in rows B … 2B−1.

    The batch holds `input_ids`, `attention_mask`, `labels` (−100 where nothing is predicted), `token_type_ids` where
    the tokenizer has them, `lengths`, the tokens of each row, and `num_pairs`, an int. Rows are padded to the longest.

    Masks are those of `transformers.DataCollatorForLanguageModeling` (80 % mask token, 10 % random token, 10 % left;
    with whole words: all mask token), drawn for each row from (mask_seed, side): they do not depend on the other rows, the
    padding, the worker or the rank. A short row may get no mask at all. Tokens of de-identification marks, where
    a row has `marked`, are never predicted, and the share is that of the other tokens.

    With `objective="causal"` labels are shifted: `labels[t]` is the token to be predicted at position t, that is
    `input_ids[t + 1]`, and −100 at the last token. Nothing is masked.

    Args:
        tokenizer: The model's, with a padding token, and with a mask token where masks are asked for.
        objective: "mlm", "causal" or None (no labels at all).
        mlm_probability: Share of tokens to predict, in [0, 1].
        whole_word_mask: Mask all tokens of a word or none; needs rows with `word_ids`.
        chunk_length: Cut longer notes, as `TextProcessor(chunk=True)` reads them, into rows of so many tokens. The batch
            then has at least 2B rows, and `chunk_to_note`, which of the 2B notes each row belongs to.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        objective: Literal["mlm", "causal"] | None = "mlm",
        *,
        mlm_probability: float = 0.30,
        whole_word_mask: bool = False,
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
        self.tokenizer, self.objective, self.chunk_length = tokenizer, objective, chunk_length
        self.masking = None
        if objective == "mlm":
            with warnings.catch_warnings():  # it warns that whole words are always replaced; the docstring says so
                warnings.simplefilter("ignore")
                self.masking = _Masking(
                    tokenizer, mlm_probability=mlm_probability, whole_word_mask=whole_word_mask, return_tensors="np"
                )

    def row(self, row: Row, seed: tuple[int, int]) -> Row:
        """The note's token ids with masks, and its labels."""
        ids = np.array(row["input_ids"], dtype=np.int64)
        if self.masking is not None:
            ids, labels = self.masking.row(row | {"input_ids": ids}, seed)
        else:
            labels = np.append(ids[1:], -100) if self.objective == "causal" else np.full(len(ids), -100)
        return {"input_ids": ids, "labels": labels}

    def nothing(self) -> Row:
        """What the tokenizer makes of no text."""
        ids = np.array(self.tokenizer("")["input_ids"] or [self.tokenizer.pad_token_id])
        return {"input_ids": ids, "labels": np.full(len(ids), -100)}

    def batch(self, rows: list[Row]) -> Batch:
        """The rows, or their chunks, as padded tensors."""
        batch: Batch = {}
        if self.chunk_length:
            rows, batch["chunk_to_note"] = self._chunks(rows, self.chunk_length)
        columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
        batch |= pad_rows(columns, {"input_ids": self.tokenizer.pad_token_id})
        if "token_type_ids" in self.tokenizer.model_input_names:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        return batch | {"lengths": [len(row["input_ids"]) for row in rows]}

    def _chunks(self, notes: list[Row], length: int) -> tuple[list[Row], torch.Tensor]:
        """The chunks of all notes, and the note that each belongs to."""
        starts = [(note, start) for note, row in enumerate(notes) for start in range(0, len(row["input_ids"]), length)]
        rows = [
            {name: values[start : start + length] for name, values in notes[note].items()} for note, start in starts
        ]
        for row in rows if self.objective == "causal" else ():
            row["labels"][-1] = -100  # the next chunk's first token is not to be predicted from here
        return rows, torch.tensor([note for note, _ in starts])


class _Masking(DataCollatorForLanguageModeling):
    """The library's masks for one row from its own generator, with words given by the tokenizer's word ids."""

    def row(self, row: Row, seed: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return (input ids, labels) of one row, of which special and `marked` tokens are left alone."""
        self.generator = np.random.default_rng(seed)
        special = np.isin(row["input_ids"], self.tokenizer.all_special_ids)[None]
        if "marked" in row:
            special |= np.array(row["marked"], dtype=bool)
        words = np.array(row["word_ids"])[None] if self.whole_word_mask else None
        inputs, labels = self.numpy_mask_tokens(
            row["input_ids"][None].copy(), special_tokens_mask=special, offset_mapping=words
        )
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
