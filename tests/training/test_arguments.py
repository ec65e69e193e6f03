"""DenseTrainingArguments: what the defaults are, what they mean for the objective, and what is refused."""

import dataclasses
import re

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_densefeat import DenseTrainingArguments


def arguments(tmp_path, **kwargs):
    return DenseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **kwargs)


def test_more_terms_are_given_by_name(tmp_path):
    """JSON on the command line or a dict: the objective has them after the paper's three."""
    for terms in ('{"rank_deficit": 0.2, "unshared_variance": 0.1}', {"rank_deficit": 0.2, "unshared_variance": 0.1}):
        objective = arguments(tmp_path, terms=terms).dense_objective()
        assert list(objective.terms)[3:] == ["rank_deficit", "unshared_variance"]
        assert objective.terms["rank_deficit"][0] == 0.2
        assert not objective.needs_cross_moment
    with pytest.raises(ValueError, match="known by name"):
        arguments(tmp_path, terms={"unknown": 1.0})


def test_defaults_are_those_of_the_design(tmp_path):
    """Centred, MLM of weight 1 and dense of weight 3, private repositories, and an objective with exactly these settings."""
    args = arguments(tmp_path)
    assert (args.mlm_weight, args.dense_weight, args.center, args.unbiased) == (1.0, 3.0, True, False)
    assert args.hub_private_repo is True
    assert args.ddp_broadcast_buffers is False
    assert args.logging_steps == 10
    objective = args.dense_objective()
    assert objective.center is True
    assert objective.window == "auto"
    assert (objective.lambda_sub, objective.lambda_orth, objective.subspace_dim) == (
        args.lambda_sub,
        args.lambda_orth,
        args.subspace_dim,
    )
    assert args.dense_objective() is not objective


@pytest.mark.parametrize(
    ("given", "expected"),
    [("none", None), (None, None), ("auto", "auto"), ("256", 256.0), (256, 256.0), (12.5, 12.5), ("1e3", 1000.0)],
)
def test_window_is_none_auto_or_a_number_of_samples(tmp_path, given, expected):
    """Words, numbers, and numbers written as words, as YAML and command lines give them, mean what they say."""
    assert arguments(tmp_path, window=given).dense_objective().window == expected


def test_zero_power_iterations_are_exact_eigenspaces(tmp_path):
    """0 is the exact eigendecomposition; other numbers are passed on."""
    assert arguments(tmp_path, power_iterations=0).dense_objective().power_iterations is None
    assert arguments(tmp_path, power_iterations=3).dense_objective().power_iterations == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mlm_weight": -1.0}, ("mlm_weight >= 0", "-1.0")),
        ({"dense_weight": -0.5}, ("dense_weight >= 0", "-0.5")),
        ({"mlm_weight": float("nan")}, ("mlm_weight >= 0", "nan")),
        ({"mlm_weight": 0.0, "dense_weight": 0.0}, ("mlm_weight and dense_weight are both 0",)),
        ({"lambda_sub": -0.1}, ("lambda_sub >= 0", "-0.1")),
        ({"lambda_orth": -0.1}, ("lambda_orth >= 0", "-0.1")),
        ({"expander": -1}, ("expander >= 0", "-1")),
        ({"expander": 2, "lambda_anchor": 1.0}, ("with an expander no term sees these",)),
        ({"subspace_dim": 0}, ("subspace_dim >= 1", "0")),
        ({"window": "always"}, ("window", "'none', 'auto' or a number of samples", "'always'")),
        ({"window": "0"}, ("window", "number of samples", "0")),
        ({"window": "-5"}, ("window", "number of samples", "-5")),
        ({"window": "nan"}, ("window", "number of samples", "nan")),
        ({"power_iterations": -1}, ("power_iterations", "-1")),
        ({"unbiased": True, "pairs_per_patient": 2}, ("unbiased", "pairs_per_patient is 2")),
    ],
)
def test_nonsense_is_refused_by_name(tmp_path, settings, words):
    """Each option out of range raises one ValueError that names it, what was expected and what came."""
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        arguments(tmp_path, **settings)
    for word in words:
        assert word in str(error.value)


def test_command_line_types(tmp_path):
    """HfArgumentParser reads every option of ours with the right type; each has a help text."""
    parser = HfArgumentParser(DenseTrainingArguments)
    line = f"--output_dir {tmp_path} --use_cpu --report_to none --lambda_sub 0.5 --window 128 --center false "
    line += "--unbiased --pairs_per_patient 1 --subspace_dim 7 --power_iterations 0 --pooling cls --max_gap 30"
    (args,) = parser.parse_args_into_dataclasses(line.split())
    assert (args.lambda_sub, args.window, args.center, args.unbiased) == (0.5, "128", False, True)
    assert (args.subspace_dim, args.power_iterations, args.pooling) == (7, 0, "cls")
    assert (args.max_gap, args.pairs_per_patient) == (30.0, 1)
    stock = {field.name for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(DenseTrainingArguments):
        if field.name not in stock:
            assert field.metadata["help"].endswith("."), field.name


def test_terms_given_to_the_objective_join_those_of_the_arguments(tmp_path):
    """Neither replaces the other, and a pairing weight that is given by name wins."""
    args = arguments(tmp_path, terms={"rank_deficit": 0.2})
    mine = args.dense_objective(terms={"mine": (1.0, lambda s: s.a.trace)}).terms
    assert {"rank_deficit", "mine", "unshared_variance"} <= set(mine)
    assert args.dense_objective(terms={"unshared_variance": 2.0}).terms["unshared_variance"][0] == 2.0
    with pytest.raises(ValueError, match="lambda_pair >= 0"):
        arguments(tmp_path, lambda_pair=-1.0)
