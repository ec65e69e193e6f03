"""Words as an encoder: scikit-learn's TF-IDF, the beginning that an encoder reads, every use and probe, fused rankings."""

import numpy as np
import pytest
from conftest import make_notes
from letters import LetterCounts, notes, tasks
from sklearn.feature_extraction.text import TfidfVectorizer

from hf_densefeat import ProbeEvaluator, SimilarityEvaluator, SimilarityTask
from hf_densefeat.evaluation.metrics import paired_difference
from hf_densefeat.evaluation.words import Words

TEXTS = ["Chest pain on exertion, chest pain at rest.", "Type 2 diabetes; no chest pain", "?", "unheard of"]


def test_words_are_those_of_scikit_learn():
    """Sublinear TF-IDF at length 1, of training texts; unknown words are not seen."""
    found = Words.fit(TEXTS[:3]).encode(TEXTS)
    expected = TfidfVectorizer(sublinear_tf=True).fit(TEXTS[:3]).transform(TEXTS)
    np.testing.assert_allclose(found.toarray(), expected.toarray(), atol=1e-6)
    counts = np.array([1 + np.log(2), 1 + np.log(2), 1, 1, 1, 1])  # chest, pain, on, exertion, at, rest
    weights = counts * (1 + np.log(4 / (1 + np.array([2, 2, 1, 1, 1, 1]))))
    np.testing.assert_allclose(np.sort(found[0].data), np.sort(weights / np.linalg.norm(weights)), rtol=1e-6)
    assert (found[2].nnz, found[3].nnz) == (0, 0)


def test_words_read_what_the_encoder_reads(tokenizer):
    """The first tokens of each text, cut where the last of them ends."""
    texts = list(make_notes(12, seed=1)["text"])
    cut = [tokenizer.decode(tokenizer(text, max_length=8, truncation=True)["input_ids"][1:-1]) for text in texts]
    found, expected = Words.fit(texts, tokenizer, 8).encode(texts), Words.fit(cut).encode(cut)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.toarray(), expected.toarray(), atol=1e-6)
    assert found.nnz < Words.fit(texts).encode(texts).nnz


def test_every_use_and_every_probe_takes_words(tokenizer):
    """Evaluators give the metrics of an encoder without codes; fused rankings are compared with words alone."""
    table = make_notes(30, seed=1)
    label = [str(i % 3) for i in range(len(table))]
    table = table.add_column("label", label).add_column("question", [text[:20] for text in table["text"]])
    kinds = {
        "neighbours": "label",
        "clusters": "label",
        "few_labels": "label",
        "retrieval": "question",
        "same_patient": "",
    }
    uses = [
        SimilarityTask(name=kind, kind=kind, notes=table, **({column: column} if column else {}))
        for kind, column in kinds.items()
    ]
    evaluator, words = SimilarityEvaluator(uses, bootstraps=20, cache=False), Words.fit(list(table["text"]))
    alone, encoder = evaluator.evaluate(words), evaluator.evaluate(LetterCounts(), words=words)
    assert alone["retrieval"].metrics["mrr"].value > 0.4  # a question is the beginning of its note
    for kind in kinds:
        assert not [name for name in alone[kind].metrics if name.endswith(("_int8", "_over_2", "_with_words"))]
        fused = {name for name in encoder[kind].metrics if name.endswith("_with_words")}
        assert bool(fused) == (kind in ("neighbours", "retrieval", "same_patient"))
        gaps = paired_difference(encoder[kind], alone[kind])
        assert gaps.keys() == alone[kind].metrics.keys() | fused
    one, other = encoder["same_patient"].metrics["mrr_with_words"], alone["same_patient"].metrics["mrr"]
    assert gaps["mrr_with_words"].value == pytest.approx(one.value - other.value)
    probed = notes()
    letters = probed.map(lambda row: {"text": " ".join(letter * 2 for letter in row["text"].strip())})
    found = ProbeEvaluator(tasks(letters), bootstraps=20, cache=False).evaluate(Words.fit(list(letters["text"])))
    assert found["sick_binary"].metrics["auroc"].value > 0.95
    assert found["age_regression"].metrics["r2"].value > 0.5
    assert found["grade_multiclass"].metrics["auroc"].value > 0.8
    assert np.isfinite(found["grade_clustering"].metrics["nmi"].value)
