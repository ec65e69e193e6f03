"""Texts as an input kind: a tokenizer, what is done with notes that are too long, and the pairs of tokenised notes."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_densefeat.data.collator import DensePairCollator
from hf_densefeat.data.columns import column
from hf_densefeat.data.inputs import PairDataset, Row, rows_of
from hf_densefeat.data.pairs import NotePairs

logger = logging.getLogger(__name__)

# MIMIC-III's [**2151-7-16**], MIMIC-IV's ___, and names of kinds such as <DATE>; of bounded length, because a mark that is
# never closed would take the rest of the note with it
MARKS = re.compile(r"\[\*\*.{0,100}?\*\*\]|_{3,}|<[A-Z][A-Z0-9_ -]{2,29}>", re.DOTALL)


@dataclass(frozen=True)
class TokenStats:
    """What tokenising did to the notes.

    `truncated` notes were longer than `max_length` and lost `cut` tokens; `chunked` ones were longer and lost nothing. Of the
    `tokens` that were kept, special tokens included, `marks` are part of de-identification marks. `median` and `longest`
    are lengths after truncation.
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


class TextProcessor:
    """The `PairProcessor` of texts, each after the `prompt`; also of a stream.

    A note longer than `max_length` is cut, or with `chunk` kept, as chunks of so many tokens one after another, each with its
    special tokens. `whole_words` masks all tokens of a word or none. De-identification marks are masked with `predict_marks`
    alone, but with a slow tokenizer, which does not say where in the text a token stands, always.
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
        if whole_words and not tokenizer.is_fast:
            raise ValueError("Whole-word masking needs a fast tokenizer, got a slow one. Load it with AutoTokenizer.")
        if not (predict_marks or tokenizer.is_fast):
            logger.warning("The tokenizer is a slow one: de-identification marks are masked like other tokens.")
        self.tokenizer, self.chunk, self.num_proc = tokenizer, chunk, num_proc
        self.whole_words, self.predict_marks, self.prompt = whole_words, predict_marks, prompt

    def pairs(
        self, notes: datasets.Dataset, pairs: NotePairs, *, max_length: int | None = None
    ) -> tuple[TokenPairs, TokenStats]:
        """See `PairProcessor`; `tokens` says how notes are read."""
        tokens, stats = self.tokens(notes, max_length)
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

    def save_pretrained(self, save_directory: str | Path) -> Any:
        """Save the tokenizer."""
        return self.tokenizer.save_pretrained(save_directory)

    def tokens(self, notes: datasets.Dataset, max_length: int | None = None) -> tuple[datasets.Dataset, TokenStats]:
        """Tokenise every note once: `input_ids`, `length`, and `word_ids` or `marked` where masks need them; and the counts.

        Row i of the result is note i, cut to `max_length` tokens, special ones included, or to the tokenizer's own limit. It
        is memory-mapped: patient text ends up, as token ids, in the `datasets` cache (under `HF_HOME`).
        """
        # tokenizers without a limit say 10^30
        if max_length is None and self.tokenizer.model_max_length < 10**9:
            max_length = self.tokenizer.model_max_length
        special = self.tokenizer.num_special_tokens_to_add()
        if max_length is None:
            logger.warning(
                "Neither `max_length` nor the tokenizer (model_max_length) limits the length of a note: the longest note "
                "decides the memory a batch takes. Pass the length the model was trained with."
            )
        elif max_length <= special:
            raise ValueError(
                f"Expected `max_length` above the {special} special tokens of every note, got {max_length}."
            )
        tokens = notes.map(
            self.columns,
            batched=True,
            input_columns="text",
            remove_columns=notes.column_names,
            fn_kwargs={"max_length": max_length},
            num_proc=self.num_proc,
            desc="Tokenising notes",
        )
        stats = TokenStats.of(tokens, max_length, self.chunk)
        # where nothing is to be left out, no column is to be read with every batch
        left = {"cut", "marks"} | (set() if stats.marks else {"marked"})
        return tokens.select_columns([name for name in tokens.column_names if name not in left]), stats

    def columns(self, texts: list[str], *, max_length: int | None = None) -> dict[str, list[Any]]:
        """See `StreamProcessor`; texts are tokenised without a limit and cut afterwards, so that what is cut is counted.

        A tokenizer that truncates also changes its own state, and with it the key under which `datasets` caches. Columns are
        `input_ids`, `length`, `cut` (tokens that were left out), `marks` (tokens of de-identification marks) and what masks
        need: `word_ids`, −1 for special tokens, and `marked`, 1 for tokens of marks.
        """
        texts, tokenizer = [self.prompt + text for text in texts], self.tokenizer
        encoded = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        # how many special tokens stand before and after the text, whatever the family
        special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        opening, closing = special.index(0), special[::-1].index(0)

        def kept(row: list[int]) -> list[int]:
            if max_length is None or len(row) <= max_length:
                return row
            if self.chunk:
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
        if self.whole_words:
            words = [encoded.word_ids(i) for i in range(len(texts))]
            columns["word_ids"] = [kept([-1 if word is None else word for word in row]) for row in words]
        marked = [
            kept(marked_tokens(text, encoded[i]) if tokenizer.is_fast else [0] * len(ids))
            for i, (text, ids) in enumerate(zip(texts, encoded["input_ids"], strict=True))
        ]
        columns["marks"] = [sum(row) for row in marked]
        return columns if self.predict_marks else columns | {"marked": marked}


def marked_tokens(text: str, encoding: Any) -> list[int]:
    """1 for each token of a text (a `tokenizers.Encoding`) of which a part stands in a de-identification mark, else 0."""
    marked = [0] * len(encoding)
    for match in MARKS.finditer(text):
        places = range(match.start(), match.end())
        # a tokenizer may drop characters, spaces for one
        first = next((token for token in map(encoding.char_to_token, places) if token is not None), None)
        last = next((token for token in map(encoding.char_to_token, reversed(places)) if token is not None), None)
        if first is not None and last is not None:
            marked[first : last + 1] = [1] * (last + 1 - first)
    return marked


class TokenPairs(PairDataset):
    """Pairs of notes whose tokens `TextProcessor.tokens` returned; they are read memory-mapped."""

    def __init__(self, tokens: datasets.Dataset, pairs: NotePairs):
        super().__init__(pairs, column(tokens, "length").to_numpy())
        self.tokens = tokens.remove_columns("length")

    def read(self, notes: np.ndarray) -> list[Row]:
        """Return the tokens of these notes."""
        return rows_of(self.tokens[notes])
