"""Numbers, tables, directions and verdicts, in Markdown and on a terminal."""

import numpy as np
import pytest

from hf_densefeat.evaluation.metrics import Estimate
from hf_densefeat.evaluation.similarity import SimilarityResult
from hf_densefeat.reporting.comparison import comparisons, direction, measured_of, plain_numbers, verdict
from hf_densefeat.reporting.formats import interval, markdown, number
from hf_densefeat.reporting.tables import before_after_table, code_table, comparison_table, geometry_table, terminal

GEOMETRY = {
    "attainable_rank": 64,
    "effective_rank_centered": 16.0,
    "total_variance": 10.0,
    "total_variance_centered": 5.0,
    "mean_cosine": 0.5,
}


def encoder(name, values, differences=None):
    """Values of an encoder, each with an interval of 0.02; differences as (value, half width)."""
    probes = ("died auroc", "age rmse", "ward ari")
    made = {key: [value, value - 0.01, value + 0.01] for key, value in values.items()}
    found = {"name": name, "geometry": GEOMETRY, "spectrum": [2.0, 1.0]}
    found["similarity"] = {key: one for key, one in made.items() if key not in probes}
    found["probes"] = {key: one for key, one in made.items() if key in probes}
    if differences is not None:
        found["differences"] = {key: [value, value - half, value + half] for key, (value, half) in differences.items()}
    return found


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.8123, "0.812"), (22.84, "22.8"), (4310.2, "4,310"), (0.0041, "0.0041"), (2e-5, "2.0e-05"), (0.0, "0.000")],
)
def test_numbers_have_about_three_digits(value, text):
    """Whatever their size; a sign only where it is asked for, NaN as n/a."""
    assert number(value) == text
    assert number(float("nan")) == "n/a"
    assert number(0.25, signed=True) == "+0.250"


def test_intervals_and_those_that_are_unknown():
    """A value without bootstrap stands alone."""
    assert interval(Estimate(0.5, 0.4, 0.6)) == "0.500 [0.400, 0.600]"
    assert interval(Estimate(-0.5, -0.6, -0.4), signed=True) == "-0.500 [-0.600, -0.400]"
    assert interval(Estimate(0.5)) == "0.500"


def test_markdown_is_padded_and_numbers_stand_right():
    """A bar in a name does not end a cell."""
    table = markdown([["task", "kind", "value"], ["a|b", "x", "0.5"], ["c", "yes", "n/a"]])
    assert table.splitlines() == [
        "| task | kind | value |",
        "| ---- | ---- | ----: |",
        "| a\\|b | x    |   0.5 |",
        "| c    | yes  |   n/a |",
    ]


def test_direction_of_a_difference():
    """The interval decides, and for RMSE lower is better."""
    assert direction(Estimate(0.02, 0.01, 0.03), "auroc") == "better"
    assert direction(Estimate(0.02, 0.01, 0.03), "rmse") == "worse"
    assert direction(Estimate(-0.02, -0.03, -0.01), "mrr_binary") == "worse"
    assert direction(Estimate(0.02, -0.01, 0.05), "auroc") == "equal"
    assert direction(Estimate(0.02), "auroc") == "equal"


START = {
    "disease mrr": 0.2,
    "disease mrr_binary": 0.1,
    "kind precision_at_10": 0.8,
    "died auroc": 0.7,
    "ward ari": 0.3,
}


@pytest.mark.parametrize(
    ("differences", "against", "words"),
    [
        ({"disease mrr": (0.1, 0.01), "died auroc": (-0.01, 0.02)}, "better", "Take ours rather than start"),
        ({"disease mrr": (0.0, 0.01), "died auroc": (-0.1, 0.02)}, "worse", "Stay with start: ours is worse"),
        ({"disease mrr": (0.0, 0.01), "died auroc": (0.0, 0.02)}, "equal", "do not tell ours from start"),
        (
            {"disease mrr": (0.1, 0.01), "died auroc": (-0.1, 0.02)},
            "mixed",
            "Take ours for similarity, stay with start for linear probes",
        ),
        (
            {"disease mrr": (0.1, 0.01), "kind precision_at_10": (-0.2, 0.02)},
            "mixed",
            "Choose between ours and start by the use",
        ),
    ],
)
def test_verdicts_count_headlines_by_group(differences, against, words):
    """Similarity, probes and k-means apart; the largest gain and loss are named, with intervals."""
    found = verdict(encoder("ours", START, differences | {"ward ari": (0.0, 0.1)}), encoder("start", START))
    assert found.against == against
    assert words in found.sentence
    assert found.counts["clusterings"] == {"better": 0, "equal": 1, "worse": 0}
    assert "k-means: 1 without a visible difference" in found.sentence
    assert ("Largest gain: MRR of disease +0.100 [+0.090, +0.110]" in found.sentence) == (
        differences["disease mrr"][0] > 0
    )
    assert "ours is healthy" in found.sentence


def test_codes_do_not_count():
    """A gain with binary codes alone is no gain."""
    found = verdict(
        encoder("ours", START, {"disease mrr_binary": (0.1, 0.01), "disease mrr": (0.0, 0.1)}), encoder("s", START)
    )
    assert found.against == "equal"


def test_one_encoder_has_a_state_and_what_to_do():
    """Without a base there is nothing better or worse."""
    found = verdict(encoder("only", START) | {"geometry": GEOMETRY | {"total_variance_centered": 0.5}})
    assert (found.state, found.against) == ("collapsed", None)
    assert "subtract the mean" in found.sentence


def test_before_and_after_with_an_encoder_of_which_little_is_known():
    """Similarity, geometry, probes; what MLM alone lacks is n/a; the change is that of the last to the first."""
    some = {"name": "MLM alone", "similarity": {"disease mrr": [0.25, None, None]}}
    ours = encoder("ours", {key: value + 0.1 for key, value in START.items()}, {"disease mrr": (0.1, 0.01)})
    table = before_after_table([encoder("start", START), some, ours])
    assert table[0] == ["held-out notes", "start", "MLM alone", "ours", "change"]
    titles = [line[0] for line in table[1:]]
    assert titles == [
        "disease: MRR",
        "disease: MRR, binary codes",
        "kind: precision at 10",
        "mean cosine of two notes",
        "effective rank, of 64",
        "died: AUROC",
        "ward: ARI",
    ]
    assert table[1] == ["disease: MRR", "0.200", "0.250", "0.300", "+0.100 [+0.090, +0.110] ↑"]
    assert table[3][1:] == ["0.800", "n/a", "0.900", "n/a"]
    assert before_after_table([encoder("start", START)])[0] == ["held-out notes", "start"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_terminal_lines_fit_and_lose_nothing(width):
    """Long titles and heads go on in the next line, and every value is there."""
    names = ("start", "MLM alone", "MLM + dense, three epochs")
    values = {
        "question to answer in other words mrr": 0.123,
        "question to answer in other words accuracy_at_16": 0.456,
    }
    measured = [encoder(name, values, {key: (0.1, 0.01) for key in values}) for name in names]
    text = terminal(before_after_table(measured), width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("0.123") == 3
    assert " ".join(text.split()).count("+0.110] ↑") == 2
    words = "question answer other accuracy labels class epochs".split()
    assert all(word in text for word in words)


def test_comparison_and_code_tables():
    """Differences in numbers and words; codes and dimensions beside the plain metric, one line an encoder."""
    measured = [
        encoder("start", START),
        encoder("ours", START, {"disease mrr": (0.1, 0.01), "died auroc": (0.0, 0.1)}),
    ]
    table = comparison_table(measured, ("similarity",), "similarity")
    assert table[0] == ["similarity", "start", "ours", "ours − start"]
    assert table[1] == [
        "disease: MRR", "0.200 [0.190, 0.210]", "0.200 [0.190, 0.210]", "+0.100 [+0.090, +0.110] better",
    ]  # fmt: skip
    assert table[2][3] == "n/a"
    assert comparison_table(measured, ("probes",), "probe")[1][3] == "+0.000 [-0.100, +0.100] no visible difference"
    assert code_table(measured)[:3] == [
        ["similarity with fewer bits or dimensions", "encoder", "float", "binary"],
        ["disease: MRR", "start", "0.200", "0.100"],
        ["disease: MRR", "ours", "0.200", "0.100"],
    ]


def test_what_was_measured_is_plain_numbers():
    """Names are task and metric, differences are paired, NaN is null in JSON."""

    def result(value):
        drawn = np.linspace(value - 0.1, value + 0.1, 101)
        metrics, rows = {"mrr": Estimate.of(value, drawn)}, np.arange(4)
        how = {"kind": "retrieval", "metrics": metrics, "replicates": {"mrr": drawn}, "values": {}, "rows": {}}
        return {"disease": SimilarityResult(**how, y=rows, patient=rows)}

    alone = measured_of("x", {}, np.ones(2), (result(0.5), {}))
    compared = measured_of("x", {}, [], (result(0.6), {}), base=(result(0.5), {}))
    assert alone["similarity"]["disease mrr"] == pytest.approx([0.5, 0.405, 0.595])
    assert (alone["differences"], alone["spectrum"]) == ({}, [1, 1])
    assert compared["differences"]["disease mrr"] == pytest.approx([0.1, 0.1, 0.1])
    assert plain_numbers({"a": [np.float32(0.5), float("nan")], 1: np.int64(3)}) == {"a": [0.5, None], "1": 3}
    [row] = comparisons([alone])
    assert (row.task, row.metric, row.headline) == ("disease", "mrr", True)


def test_the_change_of_an_encoder_with_views_is_that_of_the_better_view():
    """In each row; the geometry is the content view's, and columns stay what each view measured."""

    def measured(name, mrr, kind, **more):
        similarity = {"disease mrr": [mrr, mrr, mrr], "kind precision_at_10": [kind, kind, kind]}
        gaps = {
            key: [one[0] - base, one[0] - base - 0.01, one[0] - base + 0.01]
            for (key, one), base in zip(similarity.items(), (0.3, 0.7), strict=True)
        }
        shape = {"attainable_rank": 9.0, "mean_cosine": mrr, "effective_rank_centered": 5.0}
        return {
            "name": name,
            "geometry": shape,
            "similarity": similarity,
            "probes": {},
            "differences": gaps if more else {},
            **more,
        }

    views = [measured("content view", 0.5, 0.4, view="content"), measured("form view", 0.2, 0.72, view="form")]
    table = before_after_table([measured("start", 0.3, 0.7), *views])
    assert table[0] == ["held-out notes", "start", "content view", "form view", "change"]
    assert [line[1:4] for line in table[1:3]] == [["0.300", "0.500", "0.200"], ["0.700", "0.400", "0.720"]]
    assert [line[4][:6] for line in table[1:3]] == ["+0.200", "+0.020"]
    assert [line[4][-1] for line in table[1:3]] == ["↑", "↑"]
    assert table[3][-1] == "+0.200"


def test_words_are_a_column_with_their_difference_and_a_sentence():
    """Ahead, behind and fused; in the terminal a column alone, in files also the paired difference; no geometry."""
    words = {"name": "words", "similarity": {"disease mrr": [0.4, 0.39, 0.41]}, "geometry": {}, "spectrum": []}
    found = {"disease mrr": 0.2, "disease mrr_with_words": 0.45, "died auroc": 0.8}
    ours = encoder("ours", found, {"disease mrr": (0.0, 0.01)})
    ours["against_words"] = {
        "disease mrr": [-0.2, -0.22, -0.18],
        "disease mrr_with_words": [0.05, 0.04, 0.06],
        "died auroc": [0.1, 0.05, 0.15],
    }
    measured = [encoder("start", START), words, ours]
    narrow, wide = before_after_table(measured), before_after_table(measured, wide=True)
    assert narrow[0] == ["held-out notes", "start", "words", "ours", "change"]
    assert [line[-1] for line in wide[:3]] == [
        "ours − words",
        "-0.200 [-0.220, -0.180] ↓",
        "+0.050 [+0.040, +0.060] ↑",
    ]
    assert wide[2][:4] == ["disease: MRR, fused with words", "n/a", "n/a", "0.450"]
    assert {len(line) for line in wide} == {6}
    said = verdict(ours, measured[0]).evidence
    assert "Words are ahead: MRR of disease -0.200 [-0.220, -0.180]." in said
    assert "Fused with words, it is better than words alone in 1 and worse in 0 of 1 searches." in said
    assert "Words" not in verdict(encoder("start", START)).evidence
    assert comparison_table(measured, ("similarity",), "use")[0][-1] == "ours − words"
    assert geometry_table([words])[0] == ["geometry"]
