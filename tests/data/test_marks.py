"""De-identification marks: found by their characters, counted in tokens, and left out of the masks where that is asked for."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from transformers import BertTokenizer, DataCollatorForLanguageModeling

from hf_densefeat import DensePairCollator, DenseTrainingArguments
from hf_densefeat.data.pairs import pair_notes
from hf_densefeat.data.tokens import MARKS, TextProcessor
from hf_densefeat.training.preparation import pair_processor

TEXTS = {
    "Admitted on [**2151-7-16**] to Dr. [**Last Name (STitle) 1234**] with chest pain.": [(12, 27), (35, 64)],
    "Mr. ___ is a ___ year old man, seen ____ at ___.": [(4, 7), (13, 16), (36, 40), (44, 47)],
    "<NAME> was seen on <DATE> by <HOSPITAL STAFF_2>.": [(0, 6), (19, 25), (29, 47)],
    "Line [**one\ntwo**] goes on; snake_case and a < b > c, <br> <P> [** never closed": [(5, 18)],
    "no mark at all": [],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """BERT's, with a vocabulary in which every character is a piece, those of marks too."""
    letters = sorted(set("".join(TEXTS).lower()) - set(" \n"))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "chest", "pain", "and", "cough"]
    vocabulary += [*letters, *(f"##{letter}" for letter in letters if letter.isalnum())]
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(vocabulary))
    return BertTokenizer(str(path), model_max_length=512)


@pytest.mark.parametrize(("text", "places"), TEXTS.items())
def test_marks_are_found(text, places):
    """The three kinds, also across lines; what only looks like one is text."""
    assert [match.span() for match in MARKS.finditer(text)] == places


def test_an_unclosed_mark_does_not_swallow_the_note():
    assert not MARKS.search("[** " + "word " * 100 + "**]")


@pytest.mark.parametrize(("max_length", "chunk"), [(None, False), (12, False), (12, True)])
def test_the_tokens_of_marks(tokenizer, max_length, chunk):
    """A token is marked where its characters, by the tokenizer's own offsets, meet a mark; cut and chunked like the ids."""
    texts = [*TEXTS, ""]
    columns = TextProcessor(tokenizer, chunk=chunk).columns(texts, max_length=max_length)
    for text, places, ids, marked, count in zip(
        texts, [*TEXTS.values(), []], columns["input_ids"], columns["marked"], columns["marks"], strict=True
    ):
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        expected = [any(start < b and end > a for a, b in places) and end > start for start, end in offsets]
        if max_length and len(expected) > max_length and not chunk:
            expected = [*expected[: max_length - 1], False]
        if max_length and len(expected) > max_length:
            inner = expected[1:-1]
            parts = [inner[i : i + max_length - 2] for i in range(0, len(inner), max_length - 2)]
            expected = [flag for part in parts for flag in (False, *part, False)]
        assert len(marked) == len(ids)
        assert marked == [int(flag) for flag in expected]
        assert count == sum(expected)


def test_their_share_is_said(tokenizer):
    """In the line for the log and in the counts for the card; nothing is said where there is none."""
    notes = datasets.Dataset.from_dict({"text": list(TEXTS)})
    tokens, stats = TextProcessor(tokenizer, predict_marks=True).tokens(notes)
    assert tokens.column_names == ["input_ids", "length"]
    ours = sum(TextProcessor(tokenizer).columns(list(TEXTS))["marks"])
    assert stats.marks == ours > 0
    assert f"{ours / stats.tokens:.1%} of them de-identification marks" in str(stats)
    assert stats.counts()["tokens of de-identification marks"] == ours
    _, none = TextProcessor(tokenizer).tokens(datasets.Dataset.from_dict({"text": ["no mark at all"]}))
    assert "marks" not in str(none)
    assert "tokens of de-identification marks" not in none.counts()


@pytest.mark.parametrize("whole", [False, True])
def test_masks_are_not_spent_on_marks(tokenizer, whole):
    """Half of the tokens are marks: with `predict_marks=False` none is predicted, and 30 % of the others still are."""
    text = "chest pain ___ and cough [**2151-7-16**] " * 200
    notes = datasets.Dataset.from_dict({"patient_id": [1, 1], "time": [0, 1], "text": [text, text + "again"]})
    shares = {}
    for predict in (True, False):
        processor = TextProcessor(tokenizer, whole_words=whole, predict_marks=predict)
        pairs, stats = processor.pairs(*pair_notes(notes), max_length=4000)
        rows = pairs.__getitems__([(0, seed) for seed in range(4)])
        batch = processor.collator("mlm", mlm_probability=0.3)(rows)
        marked = TextProcessor(tokenizer).columns(notes["text"][:], max_length=4000)["marked"]
        predicted = (batch["labels"] != -100).numpy()
        for side, row in enumerate(marked):
            is_mark, width = np.array(row, dtype=bool), len(row)
            chosen = predicted[4 * side : 4 * side + 4, :width]
            shares[predict, side] = chosen[:, is_mark].mean(), chosen[:, ~is_mark].mean()
        assert stats.marks == sum(map(sum, marked))
    for side in (0, 1):
        assert shares[True, side] == pytest.approx((0.3, 0.3), abs=0.05)
        assert shares[False, side][0] == 0
        assert shares[False, side][1] == pytest.approx(0.3, abs=0.05)


def test_masks_are_the_librarys_own_with_marks_as_special_tokens(tokenizer):
    """The same generator, the same choice: the marked tokens are to it what [CLS] is."""
    columns = TextProcessor(tokenizer).columns(list(TEXTS)[:2])
    earlier, later = ({"input_ids": columns["input_ids"][i], "marked": columns["marked"][i]} for i in (0, 1))
    pair = {"earlier": earlier, "later": later, "mask_seed": 3}
    batch = DensePairCollator(tokenizer)([pair])
    for side in (0, 1):
        ids, marked = np.array(columns["input_ids"][side]), np.array(columns["marked"][side], dtype=bool)
        library = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, return_tensors="np")
        library.generator = np.random.default_rng((3, side))
        special = np.isin(ids, tokenizer.all_special_ids) | marked
        inputs, labels = library.numpy_mask_tokens(ids[None].copy(), special_tokens_mask=special[None])
        assert batch["input_ids"][side, : len(ids)].tolist() == inputs[0].tolist()
        assert batch["labels"][side, : len(ids)].tolist() == labels[0].tolist()


def test_a_stream_leaves_them_out_too(tokenizer):
    columns = TextProcessor(tokenizer).columns(list(TEXTS))
    assert [sum(row) for row in columns["marked"]] == columns["marks"]
    assert "marked" not in TextProcessor(tokenizer, predict_marks=True).columns(list(TEXTS))


def test_notes_without_marks_are_read_as_before(tokenizer):
    notes = datasets.Dataset.from_dict({"patient_id": [1, 1], "time": [0, 1], "text": ["chest pain", "and cough"]})
    pairs, _ = TextProcessor(tokenizer).pairs(*pair_notes(notes))
    assert set(pairs[0]["earlier"]) == {"input_ids"}


def test_a_slow_tokenizer_cannot_say_where_a_token_stands(tmp_path, tokenizer, caplog):
    """It reads notes as before, marks no token, and says so."""

    class Slow(type(tokenizer)):
        is_fast = False

    tokenizer.save_pretrained(tmp_path)
    slow = Slow.from_pretrained(tmp_path)
    notes = datasets.Dataset.from_dict({"patient_id": [1, 1], "time": [0, 1], "text": list(TEXTS)[:2]})
    pairs, stats = TextProcessor(slow).pairs(*pair_notes(notes))
    assert stats.marks == 0
    assert set(pairs[0]["earlier"]) == {"input_ids"}
    assert "marks are masked like other tokens" in caplog.text


def test_the_option_reaches_the_processor(tmp_path, tokenizer):
    """`DenseTrainer` leaves marks out of its masks unless it is told to predict them."""
    text = "chest pain ___ and cough " * 8
    notes = datasets.Dataset.from_dict({"patient_id": [1, 1], "time": [0, 1], "text": [text, text + "again"]})
    for predict in (True, False):
        args = DenseTrainingArguments(output_dir=str(tmp_path), predict_marks=predict, use_cpu=True)
        processor = pair_processor(tokenizer, SimpleNamespace(long_notes=None, prompt=""), args)
        assert ("marked" in processor.pairs(*pair_notes(notes))[0][0]["earlier"]) != predict
