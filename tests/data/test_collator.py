"""Tokens against the tokenizer's own, masks that belong to the row, and batches of 2B rows."""

import copy
import logging

import datasets
import numpy as np
import pytest
import torch

from hf_densefeat.data.collator import DensePairCollator
from hf_densefeat.data.tokens import TextProcessor


def make_pair(rng, tokenizer, draw):
    """Two random notes of 5 to 40 tokens."""

    def ids():
        return [tokenizer.cls_token_id, *rng.integers(5, len(tokenizer), rng.integers(3, 39)), tokenizer.sep_token_id]

    return {"earlier": {"input_ids": ids()}, "later": {"input_ids": ids()}, "mask_seed": draw}


@pytest.fixture(scope="module")
def pairs(tokenizer):
    rng = np.random.default_rng(0)
    return [make_pair(rng, tokenizer, draw) for draw in range(200)]


def test_rows_padding_and_labels(tokenizer, pairs):
    """Earlier notes first, padded on the right to the longest; labels are the tokens that were there."""
    batch = DensePairCollator(tokenizer)(pairs[:7])
    rows = [pair[side]["input_ids"] for side in ("earlier", "later") for pair in pairs[:7]]
    longest = max(map(len, rows))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "lengths", "num_pairs"}
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape == (14, longest)
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "attention_mask", "labels"))
    assert batch["num_pairs"] == 7
    assert batch["lengths"] == [len(row) for row in rows]
    for i, row in enumerate(rows):
        assert batch["attention_mask"][i].tolist() == [1] * len(row) + [0] * (longest - len(row))
        predicted = batch["labels"][i] != -100
        restored = torch.where(predicted, batch["labels"][i], batch["input_ids"][i])
        assert restored[: len(row)].tolist() == row
        assert (restored[len(row) :] == tokenizer.pad_token_id).all()
        assert not predicted[[0, *range(len(row) - 1, longest)]].any()


@pytest.mark.parametrize("whole", [False, True])
def test_masks_belong_to_the_row(tokenizer, pairs, whole):
    """A row's masks follow from its draw and side, whatever stands beside it, and differ between draws and sides."""
    pairs = [
        pair
        | {
            side: pair[side] | {"word_ids": [-1, *np.arange(len(pair[side]["input_ids"]) - 2) // 2, -1]}
            for side in ("earlier", "later")
        }
        for pair in pairs
    ]
    collator = DensePairCollator(tokenizer, whole_word_mask=whole)
    both = collator(pairs[:8])
    for start in range(0, 8, 3):
        some = pairs[start : min(start + 3, 8)]
        part = copy.deepcopy(collator)(some)
        width = part["input_ids"].shape[1]
        rows = [*range(start, start + len(some)), *range(8 + start, 8 + start + len(some))]
        for name in ("input_ids", "labels"):
            assert torch.equal(both[name][rows, :width], part[name])
    twin = pairs[0] | {"later": pairs[0]["earlier"]}
    labels = collator([twin, twin | {"mask_seed": 10**9}])["labels"]
    assert len({tuple(row.tolist()) for row in labels}) == 4


def test_masks_have_the_stated_shares(tokenizer, pairs):
    """30 % are predicted; of these 80 % show the mask, 10 % a random token, 10 % themselves: to 5 standard errors."""
    batch = DensePairCollator(tokenizer)(pairs)
    inside = batch["attention_mask"].sum() - 2 * len(batch["labels"])
    predicted = batch["labels"] != -100
    n = int(predicted.sum())
    assert abs(n / inside - 0.3) < 5 * (0.21 / inside) ** 0.5
    shown, truth = batch["input_ids"][predicted], batch["labels"][predicted]
    masked, same = (shown == tokenizer.mask_token_id).sum() / n, (shown == truth).sum() / n
    assert abs(masked - 0.8 - 0.1 / len(tokenizer)) < 5 * (0.16 / n) ** 0.5
    assert abs(same - 0.1 - 0.1 / len(tokenizer)) < 5 * (0.09 / n) ** 0.5
    none = DensePairCollator(tokenizer, mlm_probability=0)(pairs[:3])
    off = DensePairCollator(tokenizer, objective=None)(pairs[:3])
    assert all(torch.equal(none[name], off[name]) for name in ("input_ids", "attention_mask", "labels"))
    assert (off["labels"] == -100).all()


def test_whole_words_are_masked_whole(tokenizer):
    """All tokens of a word are masked or none, 30 % of the words, always by the mask token; specials never."""
    words = [-1, *np.repeat(np.arange(300), 3), -1]
    ids = [tokenizer.cls_token_id, *([7, 8, 9] * 300), tokenizer.sep_token_id]
    row = {"input_ids": ids, "word_ids": words}
    pair = {"earlier": row, "later": row, "mask_seed": 4}
    batch = DensePairCollator(tokenizer, whole_word_mask=True)([pair])
    predicted = (batch["labels"] != -100)[:, 1:-1].reshape(2, 300, 3)
    assert (predicted.all(-1) == predicted.any(-1)).all()
    assert abs(predicted.float().mean() - 0.3) < 5 * (0.21 / 600) ** 0.5
    assert (batch["input_ids"][batch["labels"] != -100] == tokenizer.mask_token_id).all()


def test_causal_labels_are_the_next_tokens(tokenizer, pairs):
    """Position t is to predict token t + 1; nothing is masked; the last token and the padding predict nothing."""
    batch = DensePairCollator(tokenizer, objective="causal")(pairs[:2])
    for i, row in enumerate(pair[side]["input_ids"] for side in ("earlier", "later") for pair in pairs[:2]):
        assert batch["input_ids"][i, : len(row)].tolist() == row
        assert batch["labels"][i, : len(row)].tolist() == [*row[1:], -100]
        assert (batch["labels"][i, len(row) :] == -100).all()


@pytest.mark.parametrize("objective", ["mlm", "causal", None])
def test_an_empty_list_still_runs(tokenizer, objective):
    """Two minimal rows, nothing to predict, no pairs."""
    batch = DensePairCollator(tokenizer, objective)([])
    assert batch["input_ids"].tolist() == [[tokenizer.cls_token_id, tokenizer.sep_token_id]] * 2
    assert (batch["labels"] == -100).all()
    assert (batch["attention_mask"] == 1).all()
    assert batch["num_pairs"] == 0


def test_token_types_where_the_tokenizer_has_them(tokenizer, pairs):
    """Only tokenizers whose models take segment ids get them."""
    typed = copy.deepcopy(tokenizer)
    typed.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    batch = DensePairCollator(typed)(pairs[:2])
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    assert not batch["token_type_ids"].any()


def test_unfit_tokenizers_are_refused(tokenizer):
    """No padding token, no mask token, odd options: an error at construction that says what to do."""
    bare = copy.deepcopy(tokenizer)
    bare.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        DensePairCollator(bare)
    DensePairCollator(bare, objective="causal")
    bare.pad_token = None
    with pytest.raises(ValueError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        DensePairCollator(bare, objective="causal")
    with pytest.raises(ValueError, match="`mlm_probability` in"):
        DensePairCollator(tokenizer, mlm_probability=1.5)
    with pytest.raises(ValueError, match='"mlm", "causal" or None'):
        DensePairCollator(tokenizer, objective="nsp")
    with pytest.raises(ValueError, match="`whole_word_mask` needs"):
        DensePairCollator(tokenizer, objective="causal", whole_word_mask=True)


@pytest.mark.parametrize("max_length", [None, 8, 64])
def test_tokens_equal_the_tokenizers_own(tokenizer, notes, max_length):
    """Truncation afterwards gives what the tokenizer's own gives, row by row, and counts what it cut."""
    tokens, stats = TextProcessor(tokenizer, whole_words=True).tokens(notes, max_length)
    limit = max_length or tokenizer.model_max_length
    texts = notes["text"][:]
    own = tokenizer(texts, truncation=True, max_length=limit)
    whole = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert tokens["input_ids"][:] == own["input_ids"]
    assert tokens["length"][:] == [len(ids) for ids in own["input_ids"]]
    assert tokens["word_ids"][:] == [
        [-1 if word is None else word for word in own.word_ids(i)] for i in range(len(texts))
    ]
    assert stats.truncated == sum(length > limit for length in whole)
    assert stats.cut == sum(max(0, length - limit) for length in whole)
    assert stats.tokens + stats.cut == sum(whole)
    assert (stats.notes, stats.longest) == (len(texts), min(limit, max(whole)))
    assert ("none truncated" in str(stats)) == (stats.cut == 0)


def test_tokenising_again_reads_the_cache(tokenizer, tmp_path):
    """The same notes and tokenizer give the same cache key, also after the tokenizer was used to truncate."""
    datasets.Dataset.from_dict({"text": ["chest pain " * 30] * 5}).save_to_disk(str(tmp_path / "n"))
    notes = datasets.load_from_disk(str(tmp_path / "n"))
    first, _ = TextProcessor(tokenizer).tokens(notes, 16)
    again, _ = TextProcessor(tokenizer).tokens(notes, 16)
    assert first._fingerprint == again._fingerprint


def test_lengths_without_a_limit(tokenizer, notes, caplog):
    """No limit anywhere is warned of; a limit without room for a token is refused."""
    endless = copy.deepcopy(tokenizer)
    endless.model_max_length = int(1e30)
    with caplog.at_level(logging.WARNING):
        _, stats = TextProcessor(endless).tokens(notes)
    assert "`max_length`" in caplog.text
    assert stats.max_length is None
    with pytest.raises(ValueError, match="above the 2 special tokens"):
        TextProcessor(tokenizer).tokens(notes, 2)
