"""Terms and losses from outside the package: trained, logged, evaluated, saved and resumed, and exact under any cut."""

import pytest
import torch
from conftest import QUIET, logs, make_notes, make_trainer
from distributed_worker import Ranks, train
from torch import nn

from hf_densefeat import BatchLoss, DenseObjective, adjacent_pairs
from hf_densefeat.data.tokens import TextProcessor

# ---- What a stranger writes ----


def mean_share(s):
    """|mu|^2 / (tr Sigma + |mu|^2): the share of the mean in the second moment, over both sides."""
    sides = [(side.mean.square().sum(), side.moments.covariance(center=True).trace()) for side in (s.a, s.b)]
    return sum(mean / (mean + trace) for mean, trace in sides) / 2


def unfollowed(s):
    """1 - ||C_ab||_F^2 / (||S_a||_F ||S_b||_F): which note follows which, from the cross covariance."""
    return 1 - s.cross_covariance.square().sum() / (s.a.covariance.norm() * s.b.covariance.norm())


unfollowed.needs_cross_moment = True

TERMS = {"mean_share": (0.5, mean_share), "unfollowed": (0.3, unfollowed)}


def objective(*names, **options):
    """The objective with these terms."""
    return DenseObjective(
        lambda_sub=0.5, lambda_orth=0.005, subspace_dim=4, terms={name: TERMS[name] for name in names}, **options
    )


# ---- What must follow ----


@pytest.fixture(scope="module")
def data(tokenizer):
    """55 pairs: two updates of 24, and a rest."""
    notes = make_notes(15).select(range(70))
    return TextProcessor(tokenizer).pairs(notes, adjacent_pairs(notes), max_length=64)[0]


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks(2)
    yield pool
    pool.stop()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("window", [None, "auto"])
def test_the_gradient_of_a_foreign_term_is_that_of_any_cut(ranks, tokenizer, data, tmp_path, name, window):
    """1 x 24, 4 x 6 and two processes x 2 x 6 pairs give the same gradient and the same logged value within 1e-5."""
    runs = []
    for world, accumulation, size in ((1, 1, 24), (1, 4, 6), (2, 2, 6)):
        [first, *_] = ranks.run(
            train,
            world,
            folder=str(tmp_path),
            tokenizer=tokenizer,
            data=data,
            objective=objective(name, center=True, window=window),
            model={"dropout": 0.0},
            max_steps=2,
            mlm_weight=1.0,
            dense_weight=1.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        runs.append(first)
    for run in runs[1:]:
        for found, expected in zip(run["gradients"], runs[0]["gradients"], strict=True):
            difference = sum((found[n] - expected[n]).double().square().sum() for n in expected).sqrt()
            assert difference < 1e-5 * sum(g.double().square().sum() for g in expected.values()).sqrt()
        for entry, expected in zip(run["logs"], runs[0]["logs"], strict=True):
            assert entry[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", TERMS)
def test_a_foreign_term_is_trained_logged_evaluated_saved_and_resumed(tmp_path, tokenizer, pairs, name):
    """It moves the weights, is in log, loss, evaluation and card, and a resumed run goes on bit for bit."""
    settings = {"window": "auto", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    settings |= {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "logging_steps": 1}

    def make(folder, *names):
        extra = {"objective": objective(*names, center=True, window="auto"), "eval_dataset": pairs}
        return make_trainer(folder, tokenizer, pairs, extra=extra, **QUIET | settings)

    whole, plain = make(tmp_path / "whole", name), make(tmp_path / "plain")
    whole.train(), plain.train()
    for entry in logs(whole):
        terms = [weight * entry[term] for term, (weight, _) in whole.objective.terms.items()]
        assert entry["loss"] == pytest.approx(entry["mlm_loss"] + sum(terms), rel=1e-5)
    assert any((x != y).any() for x, y in zip(whole.model.parameters(), plain.model.parameters(), strict=True))
    whole.create_model_card()
    card = (tmp_path / "whole" / "README.md").read_text()
    assert f"{TERMS[name][0]:g} {name}" in card
    assert TERMS[name][1].__doc__.split(":")[0] in card.replace("\\|", "|")
    before = whole.objective.state_dict()
    metrics = whole.evaluate()
    terms = [weight * metrics[f"eval_{term}"] for term, (weight, _) in whole.objective.terms.items()]
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_mlm_loss"] + sum(terms), rel=1e-5)
    assert all(torch.equal(value, whole.objective.state_dict()[key]) for key, value in before.items())
    resumed = make(tmp_path / "whole", name)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [entry[name] for entry in logs(resumed)[-2:]] == [entry[name] for entry in logs(whole)[-2:]]
    for x, y in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(x, y)


# ---- A loss of a whole batch ----


class Prediction(nn.Module):
    """Mean squared error of a learned linear map from the earlier to the later note."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(width, width)

    def forward(self, z_a, z_b):
        return {"prediction": (self.map(z_a) - z_b).square().mean(), "size": 0.01 * z_a.square().mean()}


def test_a_batch_loss_is_trained_logged_evaluated_saved_and_resumed(tmp_path, tokenizer, pairs):
    """Its parts are in log and evaluation, its parameters are trained, saved and restored."""
    settings = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "logging_steps": 1, "learning_rate": 1e-2}

    def make():
        extra = {"objective": BatchLoss(Prediction(24)), "eval_dataset": pairs}
        return make_trainer(tmp_path, tokenizer, pairs, extra=extra, **QUIET | settings)

    whole = make()
    start = whole.objective.function.map.weight.detach().clone()
    whole.train()
    assert not torch.equal(whole.objective.function.map.weight, start)
    for entry in logs(whole):
        assert entry["loss"] == pytest.approx(entry["mlm_loss"] + entry["prediction"] + entry["size"], rel=1e-5)
    assert whole.evaluate()["eval_prediction"] > 0
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(resumed.objective.function.map.weight, whole.objective.function.map.weight)
    assert logs(resumed)[-1]["prediction"] == logs(whole)[-1]["prediction"]


def test_a_batch_loss_is_refused_with_accumulation(tmp_path, tokenizer, pairs):
    """In one sentence that says why."""
    extra = {"objective": BatchLoss(lambda a, b: (a - b).square().mean())}
    with pytest.raises(ValueError, match="BatchLoss is that of one whole batch, but gradient_accumulation_steps is 2"):
        make_trainer(tmp_path, tokenizer, pairs, extra=extra, gradient_accumulation_steps=2)
