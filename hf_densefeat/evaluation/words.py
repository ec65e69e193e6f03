"""Words as a peer of every encoder: TF-IDF, sparse, fitted on training notes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer

NAME = "words"
_SLICE = 1000  # texts that are tokenized at a time


@dataclass(frozen=True)
class Words:
    """TF-IDF of words in the shape of an encoder: ``encode(texts)`` gives sparse rows (N, words) of length 1.

    A word w that occurs f times in a text has the weight ``(1 + ln f) · (1 + ln((1 + n)/(1 + n_w)))``, n training texts
    of which n_w have it: scikit-learn's `TfidfVectorizer(sublinear_tf=True)`. Words that no training text has are not
    seen. The vocabulary is of patient text: it is kept in memory alone.
    """

    vectorizer: TfidfVectorizer
    beginning: Callable[[Sequence[str]], Iterator[str]]  # of texts what is read

    @classmethod
    def fit(cls, texts: Sequence[str], tokenizer: Any = None, max_length: int | None = None) -> Words:
        """Count the words of training texts, of patients who are not tested.

        With a limit words read what the encoder of this tokenizer reads, the first so many of its tokens; all of a text
        where the tokenizer does not say which letters a token stands for.
        """

        def beginning(texts: Sequence[str]) -> Iterator[str]:
            if max_length is None or not getattr(tokenizer, "is_fast", False):
                yield from texts
                return
            for start in range(0, len(texts), _SLICE):
                part = list(texts[start : start + _SLICE])
                options = {"truncation": True, "max_length": max_length, "return_offsets_mapping": True}
                for text, places in zip(part, tokenizer(part, **options)["offset_mapping"], strict=True):
                    yield text[: max((end for _, end in places), default=0)]

        return cls(TfidfVectorizer(sublinear_tf=True, dtype=np.float32).fit(beginning(texts)), beginning)

    def encode(self, texts: Sequence[str]) -> csr_matrix:
        """Rows (N, words) of length 1, float32; zeros where no word is known."""
        return self.vectorizer.transform(self.beginning(texts))

    def known(self, texts: Sequence[str]) -> WordRows:
        """The rows of these texts, computed once, in the shape of an encoder."""
        return WordRows({text: row for row, text in enumerate(texts)}, self.encode(texts))


@dataclass(frozen=True)
class WordRows:
    """Sparse rows of texts that are already there, in the shape of an encoder."""

    place: dict[str, int]
    rows: csr_matrix

    def encode(self, texts: Sequence[str]) -> csr_matrix:
        """Rows of some of the texts."""
        return self.rows[[self.place[text] for text in texts]]
