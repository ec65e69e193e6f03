"""Names of diseases in abstracts (NCBI disease corpus): reading, tags at tokens, and the F1 of exact spans.

`data` holds `ncbi_disease/train.tsv`, `devel.tsv` and `test.tsv`: a line is a word, a tab and its tag; an empty line ends a
sentence. They are `data/NCBI-disease-IOB` of github.com/cambridgeltl/MTL-Bioinformatics-2016. The corpus is a work of the
United States government, free to use and in the public domain there; cite Doğan, Leaman and Lu (2014). Not bundled.
"""

from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerBase

TAGS = ("O", "B-Disease", "I-Disease")
FILES = {"train": "train.tsv", "validation": "devel.tsv", "test": "test.tsv"}
LENGTH = 128  # tokens of a sentence
NOT_FIRST = -100  # label of a token that does not begin a word; no loss


def read(data: Path) -> datasets.Dataset:
    """Sentences as `words` and `tags`, and their `split`."""
    rows = {"words": [], "tags": [], "split": []}
    for split, name in FILES.items():
        path = data / "ncbi_disease" / name
        if not path.exists():
            raise FileNotFoundError(
                f"--data: expected {path}. Copy data/NCBI-disease-IOB of github.com/cambridgeltl/MTL-Bioinformatics-2016 "
                "to ncbi_disease."
            )
        for sentence in path.read_text(encoding="utf-8").strip().split("\n\n"):
            words, tags = zip(*(line.split("\t") for line in sentence.split("\n")), strict=True)
            rows["words"].append(words)
            rows["tags"].append(tags)
            rows["split"].append(split)
    return datasets.Dataset.from_dict(rows)


def tokens(sentences: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    """Tokens, and as `labels` the number of a word's tag at its first token."""
    found = tokenizer(sentences["words"], is_split_into_words=True, truncation=True, max_length=LENGTH)
    found["first"] = [first_tokens(found.word_ids(row)) for row in range(len(sentences["words"]))]
    found["labels"] = [
        [NOT_FIRST if word is None else TAGS.index(tags[word]) for word in words]
        for words, tags in zip(found["first"], sentences["tags"], strict=True)
    ]
    return found


def first_tokens(words: list[int | None]) -> list[int | None]:
    """The word of each token that begins one; None at the others."""
    return [None if word == before else word for before, word in pairwise([None, *words])]


def spans(tags: list[str]) -> set[tuple[int, int]]:
    """First word of each entity and the word behind its last. B begins one, and so does I that follows O."""
    found, start = set(), None
    for i, tag in enumerate([*tags, "O"]):
        if start is not None and tag[0] != "I":
            found.add((start, i))
            start = None
        if tag[0] != "O" and start is None:
            start = i
    return found


def scores(sentences: datasets.Dataset, logits: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 of exact spans; words that the encoder does not see are O."""
    right, guessed, both = 0, 0, 0
    for row, guess in zip(sentences, logits.argmax(2), strict=True):
        tags = ["O"] * len(row["tags"])
        for word, tag in zip(row["first"], guess, strict=False):  # rows of logits are padded
            if word is not None:
                tags[word] = TAGS[tag]
        known, named = spans(row["tags"]), spans(tags)
        right, guessed, both = right + len(known), guessed + len(named), both + len(known & named)
    return {
        "f1": 2 * both / max(right + guessed, 1),
        "precision": both / max(guessed, 1),
        "recall": both / max(right, 1),
        "entities": right,
    }
