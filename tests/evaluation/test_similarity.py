"""Similarity tasks: tables in, intervals out, paired between encoders, with maps, codes and fewer dimensions."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import make_model, make_notes

from hf_densefeat import SimilarityEvaluator, SimilarityTask
from hf_densefeat.evaluation.metrics import PROBES, Metric, paired_difference, weighted_mean
from hf_densefeat.evaluation.ranking import cosines, ranking, same_label
from hf_densefeat.evaluation.similarity import SIMILARITY, similarity_of, similarity_rows, similarity_tasks
from hf_densefeat.models.head import DenseHead
from hf_densefeat.reporting.comparison import comparisons, known_metrics, measured_of, metric_named

N = 120


def notes_of(**columns):
    rng = np.random.default_rng(0)
    y = np.arange(N) % 4
    table = {
        "text": [f"note {i}" for i in range(N)],
        "patient_id": (np.arange(N) // 3).tolist(),
        "time": rng.permutation(N).tolist(),
        "disease": [f"disease {c}" for c in y],
        "question": [f"question {i}" for i in range(N)],
    }
    return table | columns


def embeddings(noise=1.0, seed=0, d=16):
    rng = np.random.default_rng(seed)
    return (2 * rng.normal(size=(4, d))[np.arange(N) % 4] + noise * rng.normal(size=(N, d))).astype(np.float32)


def task(kind, notes=None, **options):
    return SimilarityTask(name="a", kind=kind, notes=notes_of() if notes is None else notes, **options)


KINDS = {
    "neighbours": {"label": "disease"},
    "retrieval": {"label": "disease"},
    "same_patient": {},
    "clusters": {"label": "disease"},
    "few_labels": {"label": "disease"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_metrics_and_variants(kind):
    """Every metric of the kind, of each code and share of the dimensions, in range, with an interval around it."""
    found = similarity_of(embeddings(), similarity_rows(task(kind, **KINDS[kind])), bootstraps=200)
    suffixes = ("", "_int8", "_binary", "_d_over_2", "_d_over_4", "_d_over_8")
    assert list(found.metrics) == [name + suffix for suffix in suffixes for name in SIMILARITY[kind].metrics]
    for name, estimate in found.metrics.items():
        assert -0.5 <= estimate.low <= estimate.high <= 1 + 1e-9
        assert found.replicates[name].shape == (200,)
        plain = name.split("_int8")[0].split("_bin")[0].split("_d_o")[0]
        assert metric_named(name).function is SIMILARITY[kind].metrics[plain].function
    assert found.rows["scored"] > 0
    assert found.rows["patients"] == 40


def test_intervals_redraw_patients():
    """The interval is that of a bootstrap over patients written out."""
    rows, z = similarity_rows(task("neighbours", label="disease")), embeddings(4.0)
    found = similarity_of(z, rows, codes=("float",), divisors=(1,), bootstraps=4000)
    values = ranking(cosines(z), *same_label(rows.y, rows.group))["precision_at_10"]
    assert found.metrics["precision_at_10"].value == pytest.approx(values.mean())
    rng, by_patient = np.random.default_rng(9), values.reshape(40, 3)
    means = [by_patient[rng.integers(0, 40, size=40)].mean() for _ in range(4000)]
    np.testing.assert_allclose(
        (found.metrics["precision_at_10"].low, found.metrics["precision_at_10"].high),
        np.percentile(means, [2.5, 97.5]),
        atol=0.01,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_differences_are_paired(kind):
    """The same redraws for both encoders: an encoder differs from itself by nothing, and from noise by its interval."""
    rows = similarity_rows(task(kind, **KINDS[kind]))
    good, bad = (similarity_of(embeddings(noise), rows, bootstraps=200) for noise in (1.0, 8.0))
    for estimate in paired_difference(good, good).values():
        assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)
    if kind != "same_patient":
        assert paired_difference(good, bad)[SIMILARITY[kind].headline].low > 0
    with pytest.raises(ValueError, match="their test rows differ"):
        paired_difference(good, similarity_of(embeddings()[:60], similarity_rows(task(kind, half(), **KINDS[kind]))))


def half():
    return {name: column[:60] for name, column in notes_of().items()}


def test_question_finds_its_own_row():
    """Each question is the query of its row; rows without one are searched and not asked for."""
    notes = notes_of(question=[None if i % 2 else f"question {i}" for i in range(N)])
    rows, z = similarity_rows(task("retrieval", notes, question="question")), embeddings()
    assert rows.queries == [f"question {i}" for i in range(0, N, 2)]
    found = similarity_of(z, rows, queries=z[::2], bootstraps=50)
    assert found.metrics["mrr"].value == 1
    assert found.rows == {"scored": 60, "patients": 40, "searched": 120, "undefined": 0, "without_question": 60}
    shuffled = similarity_of(z, rows, queries=np.random.default_rng(1).permutation(z)[:60], bootstraps=50)
    assert shuffled.metrics["mrr"].value < 0.5


def beir(**options):
    queries = pa.table({"_id": ["x", "y", "z"], "text": ["one", "two", "three"]})
    documents = {"_id": ["1", "2", "3"], "title": ["A", "", None], "text": ["a", "b", "c"]}
    relevance = pa.table({"query-id": ["x", "y", "x", "z"], "corpus-id": ["3", "2", "1", "1"], "score": [1, 2, 1, 0]})
    tables = {"queries": queries, "documents": documents, "relevance": relevance}
    return SimilarityTask(name="beir", kind="retrieval", **tables | options)


def test_tables_as_beir_has_them():
    """Relevance above 0 counts; a query without any is left out and counted; titles precede the text."""
    rows = similarity_rows(beir())
    assert (rows.texts, rows.queries) == (["A a", "b", "c"], ["one", "two"])
    assert rows.searches[""][0](torch.arange(2)).nonzero().tolist() == [[0, 0], [0, 2], [1, 1]]
    assert rows.left_out == {"without_relevant": 1}
    z = np.eye(3, dtype=np.float32)
    found = similarity_of(z, rows, queries=z[[2, 0]] + 0.1 * z[[1, 2]], bootstraps=20)
    assert found.values["mrr"].tolist() == [1, pytest.approx(1 / 3)]
    assert found.values["recall_at_10"].tolist() == [1, 1]


def test_relevance_of_unknown_ids_is_refused():
    """With their number."""
    relevance = {"query_id": ["x", "w"], "document_id": ["1", "9"]}
    with pytest.raises(ValueError, match="1 of 2 relevant pairs name an unknown id"):
        similarity_rows(beir(relevance=relevance))
    with pytest.raises(ValueError, match="nothing is left to score"):
        similarity_rows(beir(relevance={"query_id": [], "document_id": []}))


def test_rows_without_a_label_are_left_out():
    """Neither searched nor scored, and counted, whatever stands for no label."""
    notes = notes_of()
    notes["disease"][:3] = [None, float("nan"), ""]
    rows = similarity_rows(task("neighbours", notes, label="disease"))
    assert len(rows.texts) == N - 3
    assert rows.left_out == {"unlabelled": 3}
    assert rows.texts[0] == "note 3"


def test_refusals_say_what_is_needed():
    """One class, a missing column, text or patient, an unknown kind, a kind without its label."""
    with pytest.raises(ValueError, match="1 different values in 120 labelled rows, at least two"):
        similarity_rows(task("neighbours", notes_of(disease=["same"] * N), label="disease"))
    with pytest.raises(ValueError, match="expected a column 'ward'"):
        similarity_rows(task("neighbours", label="ward"))
    with pytest.raises(ValueError, match="row 4 has no text"):
        similarity_rows(task("same_patient", notes_of(text=["a"] * 4 + [None] * (N - 4))))
    with pytest.raises(ValueError, match="row 0 has nothing in column 'patient_id'"):
        similarity_rows(task("same_patient", notes_of(patient_id=[None] * N)))
    for kind, options in (("nearest", {"label": "disease"}), ("clusters", {}), ("same_patient", {"group": None})):
        with pytest.raises(ValueError, match="expected a kind among"):
            similarity_rows(task(kind, **options))
    with pytest.raises(ValueError, match="Expected 120 embeddings and 0 of queries but got 2"):
        similarity_of(np.zeros((2, 3)), similarity_rows(task("same_patient")))
    with pytest.raises(ValueError, match="Expected codes among"):
        similarity_of(embeddings(), similarity_rows(task("same_patient")), codes=("int4",))


def test_words_of_the_command_line_are_tasks():
    """Every word of every kind; another one is answered with all that there are."""
    notes = notes_of()
    given = [
        "same_patient",
        "question:query",
        "disease:same",
        "disease:neighbours",
        "disease:clusters",
        "disease:few_labels",
    ]
    tasks = similarity_tasks(given, notes)
    assert [(one.kind, one.name) for one in tasks] == [
        ("same_patient", "own notes"),
        ("retrieval", "question"),
        ("retrieval", "same disease"),
        ("neighbours", "disease neighbours"),
        ("clusters", "disease clusters"),
        ("few_labels", "disease few labels"),
    ]
    assert all(len(similarity_rows(one).y) == N for one in tasks)
    for wrong in ("disease:near", "disease", "disease:same_patient", "neighbours"):
        with pytest.raises(ValueError, match=r"same_patient.*column:few_labels"):
            similarity_tasks([wrong], notes)


def _of_twins(rows, scores, seed):
    found = ranking(scores, *same_label(rows.group, rows.y, apart=False))
    return {"twins_found": found["recall_at_10"], "mrr": found["mrr"]}


def test_a_further_kind_is_one_entry(monkeypatch):
    """With a word of the command line, intervals, variants and a place in tables and verdicts."""
    twin = replace(
        SIMILARITY["same_patient"],
        values=_of_twins,
        metrics={
            "twins_found": Metric(weighted_mean, "share of twins found", True, "recall"),
            "mrr": SIMILARITY["retrieval"].metrics["mrr"],
        },
        words={"twins": ("", "twins")},
    )
    monkeypatch.setitem(SIMILARITY, "twins", twin)
    [twins] = similarity_tasks(["twins"], notes_of())
    found = {twins.name: similarity_of(embeddings(), similarity_rows(twins), bootstraps=20)}
    assert {"twins_found_int8", "mrr_binary"} < found["twins"].metrics.keys()
    rows = [row for row in comparisons([measured_of("x", {}, [], (found, {}))]) if row.metric in twin.metrics]
    assert [(row.title, row.headline) for row in rows] == [
        ("twins: share of twins found", True),
        ("twins: MRR", True),
    ]


def test_the_next_note_is_next_in_time():
    """In the order of the time column, within the patient, whatever the order of the rows."""
    rows = similarity_rows(task("same_patient"))
    time = np.array(notes_of()["time"])
    for i, found in enumerate(rows.searches["adjacent_"][0](torch.arange(N))):
        later = [k for k in range(N) if k // 3 == i // 3 and time[k] > time[i]]
        assert found.nonzero()[:, 0].tolist() == ([min(later, key=lambda k: time[k])] if later else [])


@pytest.mark.parametrize("kind", ["neighbours", "same_patient"])
def test_of_many_rows_some_are_asked_and_all_are_searched(kind):
    """Whole patients, with the values that they have where all are asked; how many are not asked is counted."""
    rows, z = similarity_rows(task(kind, **KINDS[kind])), embeddings()
    every, some = (similarity_of(z, rows, bootstraps=20, maximum=maximum) for maximum in (N, 31))
    for name, values in some.values.items():
        asked = np.isfinite(values)
        np.testing.assert_array_equal(values[asked], every.values[name][asked])
        if "adjacent" not in name:
            assert asked.reshape(40, 3).sum(1).tolist().count(3) == 10
    assert some.rows["not_asked"] == 90
    assert (some.rows["searched"], some.rows["scored"]) == (N, 30)
    assert some.metrics.keys() == every.metrics.keys()


def test_evaluator_of_a_model(tokenizer, tmp_path):
    """Flat keys for a trainer; intervals and the cache in `evaluate`; equal numbers in both."""
    notes = make_notes(20, seed=1)
    label = [str(i % 3) for i in range(len(notes))]
    notes = notes.add_column("label", label).add_column("question", label)
    tasks = [
        SimilarityTask(name="near", kind="neighbours", notes=notes, label="label"),
        SimilarityTask(name="ask", kind="retrieval", notes=notes, question="question"),
        SimilarityTask(name="own", kind="same_patient", notes=notes),
    ]
    model = make_model("bert", tokenizer)
    evaluator = SimilarityEvaluator(tasks, cache=tmp_path, bootstraps=20)
    flat, full = evaluator(model, tokenizer), evaluator.evaluate(model, tokenizer)
    assert flat["similarity_seconds"] > 0
    for name, result in full.items():
        for metric, estimate in result.metrics.items():
            assert flat[f"{name}_{metric}"] == pytest.approx(estimate.value, abs=1e-6)
            assert np.isfinite(estimate.low)
    assert {"near_precision_at_10", "ask_mrr_binary", "own_adjacent_mrr_d_over_4"} <= flat.keys()
    with pytest.raises(ValueError, match="different names"):
        SimilarityEvaluator(tasks + tasks)


def test_every_metric_is_complete():
    """Each has all that tables and cards need; kinds that share a name share the metric."""
    for name, metric in known_metrics().items():
        assert callable(metric.function), name
        assert metric.title, name
        assert metric.hub_name, name
        assert metric.higher_is_better in (True, False), name
    for metrics in [*PROBES.values(), *(kind.metrics for kind in SIMILARITY.values())]:
        assert all(metric == known_metrics()[name] for name, metric in metrics.items())
    assert metric_named("adjacent_mrr_d_over_4").title == "MRR of the next note, first d/4 dimensions"
    assert metric_named("mrr_with_words").title == "MRR, fused with words"
    assert metric_named("nmi_binary").title == "NMI, binary codes"
    with pytest.raises(KeyError):
        metric_named("accuracy_binary")


def test_with_and_without_the_models_own_head(tokenizer, tmp_path):
    """`encode`'s own head counts unless it is switched off; the cache tells one head from another."""
    notes, model = make_notes(20, seed=1), make_model("bert", tokenizer)
    tasks = [SimilarityTask(name="own", kind="same_patient", notes=notes)]
    options = {"codes": ("float",), "divisors": (1, 2), "bootstraps": 0}

    def measured(head=True):
        return (
            SimilarityEvaluator(tasks, head=head, cache=tmp_path, **options).evaluate(model, tokenizer)["own"].metrics
        )

    plain = measured()
    z = model.encode(list(notes["text"]), tokenizer=tokenizer)
    model.views = {"content": DenseHead.fit(z, epsilon=0.1)}
    assert measured() != plain
    assert measured(False) == plain
    for head in (DenseHead.fit(z, epsilon=0.1), DenseHead.fit(z)):
        model.views = {"content": head}
        mapped = similarity_of(head(z), similarity_rows(tasks[0]), **options)
        assert measured()["mrr"].value == pytest.approx(mapped.metrics["mrr"].value, abs=1e-6)
    centred = similarity_of(z - z.mean(0), similarity_rows(tasks[0]), **options)
    assert mapped.metrics["mrr"].value == pytest.approx(centred.metrics["mrr"].value, abs=1e-6)
