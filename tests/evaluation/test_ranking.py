"""Ranks, neighbours, few labels and codes of embeddings, against brute force and sentence-transformers."""

from dataclasses import replace
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.sparse import random as random_sparse
from scipy.stats import rankdata
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import cos_sim
from sentence_transformers.util.quantization import quantize_embeddings

from hf_densefeat.evaluation.ranking import (
    TIE,
    coded,
    cosines,
    few_labels,
    ranking,
    same_group,
    same_label,
    searched,
    unit_rows,
)


def cloud(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def mask_of(pairs, documents):
    table = torch.zeros(max(q for q, _ in pairs) + 1, documents, dtype=torch.bool)
    for query, document in pairs:
        table[query, document] = True
    return lambda rows: table[rows]


def expected_by_permutation(scores, relevant, k):
    """Mean over all orders that agree with the scores of precision, recall, nDCG and the first relevant rank."""
    orders = [o for o in permutations(range(len(scores))) if all(scores[a] >= scores[b] for a, b in pairwise(o))]
    discount, found = 1 / np.log2(np.arange(k) + 2), []
    for order in orders:
        hits = np.array([relevant[i] for i in order], dtype=float)
        ideal = discount[: int(min(k, hits.sum()))].sum()
        found.append(
            (hits[:k].mean(), hits[:k].sum() / hits.sum(), (hits[:k] * discount).sum() / ideal, 1 + np.argmax(hits))
        )
    return np.mean(found, axis=0)


def test_equal_to_sentence_transformers():
    """MRR, recall, nDCG and precision are those of its evaluator on the same embeddings."""
    queries, documents, rng = cloud(40, 16), cloud(300, 16, 1), np.random.default_rng(2)
    wanted = {f"q{i}": {f"d{j}" for j in rng.choice(300, size=rng.integers(1, 5), replace=False)} for i in range(40)}
    found = ranking(
        cosines(queries, documents), mask_of([(int(q[1:]), int(d[1:])) for q in wanted for d in wanted[q]], 300)
    )
    z = {f"q{i}": row for i, row in enumerate(queries)} | {f"d{j}": row for j, row in enumerate(documents)}

    class Encoder:
        similarity, similarity_fn_name = staticmethod(cos_sim), "cosine"
        model_card_data = type("Card", (), {"set_evaluation_metrics": lambda *args, **kwargs: None})()

        def encode(self, texts, **options):
            return torch.as_tensor(np.stack([z[text] for text in texts]))

        encode_query = encode_document = encode

    theirs = InformationRetrievalEvaluator(
        {name: name for name in z if name[0] == "q"},
        {name: name for name in z if name[0] == "d"},
        wanted,
        mrr_at_k=[300],
        precision_recall_at_k=[10],
        ndcg_at_k=[10],
        score_functions={"cosine": cos_sim},
    )(Encoder())
    for ours, name in (("mrr", "mrr@300"), ("recall_at_10", "recall@10"), ("ndcg_at_10", "ndcg@10")):
        assert found[ours].mean() == pytest.approx(theirs[f"cosine_{name}"], abs=1e-6)
    assert found["precision_at_10"].mean() == pytest.approx(theirs["cosine_precision@10"], abs=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_ties_count_as_their_mean(seed):
    """With equal documents: the mean over every order of them; the first rank is the expected one."""
    rng = np.random.default_rng(seed)
    documents = cloud(3, 5, seed)[rng.integers(0, 3, size=7)]
    relevant = rng.random(7) < 0.4
    relevant[rng.integers(7)] = True
    query = cloud(1, 5, seed + 100)
    scores = np.round((unit_rows(query) @ unit_rows(documents).T).numpy()[0], 5)
    found = ranking(cosines(query, documents), mask_of([(0, j) for j in np.flatnonzero(relevant)], 7), k=3)
    precision, recall, ndcg, rank = expected_by_permutation(scores, relevant, 3)
    assert found["precision_at_3"][0] == pytest.approx(precision, abs=1e-6)
    assert found["recall_at_3"][0] == pytest.approx(recall, abs=1e-6)
    assert found["ndcg_at_3"][0] == pytest.approx(ndcg, abs=1e-6)
    assert 1 / found["mrr"][0] == pytest.approx(rank, abs=1e-5)


def test_equal_texts_are_tied_in_float32():
    """Rounding in a large product is below the width of a tie."""
    z = cloud(1500, 768)
    z[700:] = z[np.random.default_rng(0).integers(0, 700, size=800)]
    scores, first = unit_rows(z) @ unit_rows(z).T, np.unique(z, axis=0, return_inverse=True)[1].reshape(-1)
    for code in np.unique(first)[:50]:
        same = scores[:, first == code]
        assert float((same - same[:, :1]).abs().max()) <= TIE


def test_zero_vectors_are_as_near_to_all():
    """A query of zeros ranks every document the same, and gets chance."""
    found = ranking(cosines(np.zeros((1, 4)), cloud(9, 4)), mask_of([(0, 3)], 9), k=3)
    assert found["mrr"][0] == pytest.approx(1 / 5)
    assert found["precision_at_3"][0] == pytest.approx(1 / 9)


def test_no_relevant_document_and_few_documents():
    """A query without a relevant document has no value; k above the documents is all of them, under its name."""
    table = torch.zeros(2, 4, dtype=torch.bool)
    table[0, 1] = True
    found = ranking(cosines(cloud(2, 3), cloud(4, 3, 1)), lambda rows: table[rows])
    assert list(found) == ["mrr", "recall_at_10", "ndcg_at_10", "precision_at_10"]
    assert all(np.isfinite(values[0]) and np.isnan(values[1]) for values in found.values())
    assert found["recall_at_10"][0] == 1
    assert found["precision_at_10"][0] == 0.25


def test_chunks_do_not_matter(monkeypatch):
    """Queries in slices of one give what they give at once."""
    z, y, group = cloud(60, 8), np.arange(60) % 3, np.arange(60) // 2
    masks = same_label(y, group)
    whole = ranking(cosines(z), *masks)
    monkeypatch.setattr("hf_densefeat.evaluation.ranking._CHUNK", 1)
    for name, values in ranking(cosines(z), *masks).items():
        np.testing.assert_allclose(values, whole[name], atol=1e-6)


def test_neighbours_are_of_other_patients():
    """Against loops; a patient with all notes of a label has nobody to find and no value."""
    z, rng = cloud(80, 6), np.random.default_rng(3)
    group = rng.integers(0, 20, size=80)
    y = rng.integers(0, 3, size=80)
    y[group == 5] = 7
    found = ranking(cosines(z), *same_label(y, group), k=4)["precision_at_4"]
    scores = (unit_rows(z) @ unit_rows(z).T).numpy()
    for i in range(80):
        others = np.flatnonzero(group != group[i])
        nearest = others[np.argsort(-scores[i, others])[:4]]
        if group[i] == 5:
            assert np.isnan(found[i])
        else:
            assert found[i] == pytest.approx((y[nearest] == y[i]).mean())


def test_a_row_never_finds_itself():
    """Without `apart` the own patient is searched, but not the row; its copy is, tied with nobody."""
    z = np.repeat(cloud(5, 4), 2, axis=0)
    found = ranking(cosines(z), *same_label(np.repeat(np.arange(5), 2), np.zeros(10), apart=False))
    np.testing.assert_allclose(found["mrr"], 1)


def test_own_notes_and_the_next_one():
    """Against loops: the patient's other notes among all; the next note among others' notes."""
    z, group = cloud(40, 5), np.arange(40) // 4
    group[39] = 99
    following = np.array([i + 1 if i + 1 < 40 and group[i + 1] == group[i] else -1 for i in range(40)])
    found = searched(cosines(z), same_group(group, following))
    scores = (unit_rows(z) @ unit_rows(z).T).numpy()
    for i in range(40):
        own = [j for j in range(40) if group[j] == group[i] and j != i]
        if not own:
            assert np.isnan(found["mrr"][i])
            continue
        best = max(scores[i, own])
        assert 1 / found["mrr"][i] == pytest.approx(1 + sum(scores[i, j] > best for j in range(40) if j != i))
        if following[i] < 0:
            assert np.isnan(found["adjacent_mrr"][i])
        else:
            above = sum(scores[i, j] > scores[i, following[i]] for j in range(40) if group[j] != group[i])
            assert 1 / found["adjacent_mrr"][i] == pytest.approx(1 + above)


def test_few_labels_against_loops():
    """Nested samples, nobody classified whose patient is labelled, nearest mean of unit rows by cosine."""
    y, group = np.arange(90) % 3, np.arange(90) // 3 // 2
    z = cloud(90, 5) + 2 * np.eye(5, dtype=np.float32)[y]
    found = few_labels(z, y, group, labels=(2, 4), draws=3, seed=5)
    unit = unit_rows(z).numpy()
    for k in (2, 4):
        right, asked = np.zeros(90), np.zeros(90)
        for draw in range(3):
            rng = np.random.default_rng([5, draw])
            support = [rng.permutation(np.flatnonzero(y == c))[:k] for c in range(3)]
            centroids = np.stack([unit[rows].mean(0) for rows in support])
            centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
            for i in np.flatnonzero(~np.isin(group, group[np.concatenate(support)])):
                asked[i] += 1
                right[i] += (unit[i] @ centroids.T).argmax() == y[i]
        expected = np.divide(right, asked, out=np.full(90, np.nan), where=asked > 0)
        np.testing.assert_allclose(found[f"accuracy_at_{k}"], expected)
    assert np.nanmean(found["accuracy_at_4"]) > 0.7


def test_few_labels_edges():
    """A class of one row is left out; embeddings without any difference get chance; one class is refused."""
    y = np.array([0] * 20 + [1] * 20 + [2])
    found = few_labels(np.ones((41, 3)), y, np.arange(41))
    for values in found.values():
        assert np.isnan(values[40])
        np.testing.assert_allclose(values[:40][np.isfinite(values[:40])], 0.5)
    with pytest.raises(ValueError, match="two classes of at least two rows; 1 of 2"):
        few_labels(cloud(4, 2), np.array([0, 0, 0, 1]), np.arange(4))


def test_codes_are_those_of_sentence_transformers():
    """int8 values, and Hamming distances of packed bits; a constant dimension does no harm."""
    z, reference = cloud(50, 24), cloud(200, 24, 1)
    z[:, 3] = reference[:, 3] = 0.5
    theirs = quantize_embeddings(z, "int8", calibration_embeddings=reference)
    np.testing.assert_array_equal(coded(torch.from_numpy(z), "int8", torch.from_numpy(reference)).numpy(), theirs)
    bits = np.unpackbits(quantize_embeddings(z, "ubinary"), axis=1)
    hamming = (bits[:, None, :] != bits[None, :, :]).sum(2)
    ours = unit_rows(coded(torch.from_numpy(z), "binary"))
    np.testing.assert_allclose((ours @ ours.T).numpy(), 1 - 2 * hamming / 24, atol=1e-6)
    with pytest.raises(ValueError, match="int8 and binary"):
        coded(torch.from_numpy(z), "int4")


def sparse(n, words, seed=0, density=0.02):
    return random_sparse(n, words, density=density, random_state=seed, dtype=np.float32, format="csr")


def test_sparse_rows_give_what_dense_ones_do():
    """Ranking, neighbours, own notes and few labels of words are those of the same rows written out."""
    z, y, group = csr_matrix(sparse(60, 400)), np.arange(60) % 3, np.arange(60) // 2
    following = np.where(np.arange(60) % 2 == 0, np.arange(60) + 1, -1)
    searches = {"": same_label(y, group)}, same_group(group, following)
    for rows in (z[:, :5], z):  # with many zero rows, with none
        whole = rows.toarray()
        for one, other in (
            *((searched(cosines(rows), one), searched(cosines(whole), one)) for one in searches),
            (few_labels(rows, y, group), few_labels(whole, y, group)),
        ):
            for name, values in one.items():
                np.testing.assert_allclose(values, other[name], atol=1e-6)


def test_sparse_rows_stay_sparse():
    """Ten million words, which would take 80 GB."""
    z = csr_matrix((np.ones(4000, np.float32), (np.arange(4000) // 2, np.arange(4000) % 1999 * 5000)), (2000, 10**7))
    found = ranking(cosines(z[:3], z), mask_of([(0, 0), (1, 1), (2, 2)], 2000))
    assert (found["recall_at_10"] > 0).all()


def test_fused_order_is_that_of_summed_reciprocal_ranks():
    """Against SciPy's ranks: tied documents share their mean rank, and what shares no word is not found."""
    queries, documents, words, asked = (
        cloud(12, 6),
        cloud(50, 6, 1),
        csr_matrix(sparse(50, 30, 2, 0.1)),
        sparse(12, 30, 3),
    )
    documents[40:] = documents[30:40]
    table = torch.from_numpy(np.random.default_rng(4).random((12, 50)) < 0.8)
    relevant = torch.zeros(12, 50, dtype=torch.bool)
    relevant[:, ::7] = True
    beside = cosines(csr_matrix(asked), words)
    scores = replace(cosines(queries, documents), beside=beside)
    found = ranking(scores, lambda rows: relevant[rows], lambda rows: table[rows])
    dense, sparse_scores = (
        cosines(queries, documents).of(torch.arange(12)).numpy(),
        beside.of(torch.arange(12)).numpy(),
    )
    for i in range(12):
        kept = np.flatnonzero(table[i])
        scores = 1 / (60 + rankdata(-np.round(dense[i, kept], 6)))
        scores += np.where(sparse_scores[i, kept] > 0, 1 / (60 + rankdata(-np.round(sparse_scores[i, kept], 6))), 0)
        ranks = rankdata(-np.round(scores, 8))
        hits = relevant[i].numpy()[kept]
        best = np.round(scores, 8) == np.round(scores, 8)[hits].max()
        expected = ranks[hits].min() - (best.sum() + 1) / 2 + (best.sum() + 1) / (best[hits].sum() + 1)
        assert 1 / found["mrr"][i] == pytest.approx(expected, abs=1e-4)


def test_refusals():
    """NaN, other widths, other shapes."""
    with pytest.raises(ValueError, match="finite"):
        unit_rows(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match=r"\(N, d\)"):
        unit_rows(np.zeros(3))
    with pytest.raises(ValueError, match="width 4 but got 3"):
        ranking(cosines(cloud(2, 3), cloud(2, 4)), mask_of([(0, 0), (1, 1)], 2))
