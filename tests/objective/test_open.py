"""The objective's open seams: terms beside the paper's, the cross covariance, losses of a whole batch."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from hf_densefeat import BatchLoss, DenseObjective
from hf_densefeat.objective.moments import PairMoments
from hf_densefeat.objective.objective import spectral_spreading_term
from hf_densefeat.objective.statistics import sees_pairing

PAPER = ["spectral_spreading", "subspace_consistency", "orthogonality"]


def rows(n=12, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(2, 0.3, d).double() + 0.5


@sees_pairing
def cross_size(s):
    """Squared norm of the cross covariance."""
    return s.cross_covariance.square().sum()


def mean_size(s):
    """Squared norm of both means."""
    return s.a.mean.square().sum() + s.b.mean.square().sum()


def test_terms_follow_the_papers_and_add_up():
    """Three names, then those given; `loss` is the sum of weight times value; a paper's name replaces that term."""
    terms = {"cross_size": (0.3, cross_size), "spectral_spreading": (2.0, spectral_spreading_term)}
    objective = DenseObjective(lambda_sub=0.5, lambda_orth=0.0, subspace_dim=2, terms=terms)
    values = objective(rows(), rows(seed=1))
    assert list(values) == [*PAPER, "cross_size", "loss"]
    assert objective.needs_cross_moment
    assert not DenseObjective().needs_cross_moment
    plain = DenseObjective(lambda_sub=0.5, lambda_orth=0.0, subspace_dim=2)(rows(), rows(seed=1))
    for name in PAPER:
        assert torch.equal(values[name], plain[name])
    weighted = sum(weight * float(values[name]) for name, (weight, _) in objective.terms.items())
    assert float(values["loss"]) == pytest.approx(weighted, rel=1e-12)


def test_a_term_without_weight_has_no_gradient_and_a_value():
    """Weight 0 is a number in the log, infinite gradient or not."""
    objective = DenseObjective(subspace_dim=2, terms={"root": (0.0, lambda s: (s.a.mean - s.a.mean).norm().sqrt())})
    z = rows().requires_grad_()
    values = objective(z, rows(seed=1))
    assert float(values["root"].detach()) == 0
    assert torch.autograd.grad(values["loss"], z)[0].isfinite().all()


@pytest.mark.parametrize("center", [False, True])
def test_statistics_are_numpys(center):
    """Each statistic that a term can read is what its line says."""
    z_a, z_b, seen = rows(), rows(seed=1), []

    @sees_pairing
    def look(s):
        seen.append(s)
        return s.pooled.trace()

    DenseObjective(subspace_dim=2, center=center, terms={"look": (1.0, look)})(z_a, z_b)
    (s,) = seen
    a, b = (z.numpy() - (z.numpy().mean(0) if center else 0) for z in (z_a, z_b))
    for side, z, raw in ((s.a, a, z_a), (s.b, b, z_b)):
        np.testing.assert_allclose(side.covariance.numpy(), z.T @ z / 12, atol=1e-12)
        np.testing.assert_allclose(side.batch_covariance.numpy(), z.T @ z / 12, atol=1e-12)
        np.testing.assert_allclose(side.mean.numpy(), raw.numpy().mean(0), atol=1e-12)
        values = np.linalg.eigvalsh(z.T @ z / 12)[::-1]
        np.testing.assert_allclose(side.eigenspace.values.numpy(), values, atol=1e-12)
        assert float(side.trace) == pytest.approx(values.sum())
        assert float(side.count) == 12
        assert bool(side.varies)
        assert 0 < float(side.noise) < 1
    np.testing.assert_allclose(s.cross_covariance.numpy(), a.T @ b / 12, atol=1e-12)
    np.testing.assert_allclose(s.batch_cross_covariance.numpy(), a.T @ b / 12, atol=1e-12)
    whole = np.concatenate([a, b])
    np.testing.assert_allclose(s.columns()[0].numpy(), np.cov(whole.T, ddof=0), atol=1e-12)
    assert (s.dimension, s.subspace_dim, s.center) == (6, 2, center)


def test_the_averaged_joint_covariance_stays_positive_semidefinite():
    """With an averaging window both sides and the cross covariance share one gain, whatever the batches are."""
    seen = []

    @sees_pairing
    def look(s):
        seen.append(torch.cat([torch.cat(x, 1) for x in joint(s)]))
        return s.cross_covariance.trace()

    def joint(s):
        return (s.a.covariance, s.cross_covariance), (s.cross_covariance.mT, s.b.covariance)

    objective = DenseObjective(subspace_dim=2, center=True, window=200, terms={"look": (1.0, look)})
    for seed in range(12):
        z = rows(5, seed=seed) * (1 + seed % 3)
        objective(z, z.flip(1) * 0.1 + 0.05 * rows(5, seed=seed + 50))
    for matrix in seen:
        values = torch.linalg.eigvalsh(matrix)
        assert values[0] > -1e-12 * values[-1]
    assert len(seen) == 12
    state = objective.state_dict()
    assert state["cross.covariance"].shape == (6, 6)
    resumed = DenseObjective(subspace_dim=2, center=True, window=200, terms={"look": (1.0, look)})
    resumed.load_state_dict(state)
    z_a, z_b = rows(5, seed=90), rows(5, seed=91)
    assert torch.equal(resumed(z_a, z_b)["loss"], objective(z_a, z_b)["loss"])


def test_a_bad_batch_leaves_the_joint_average_alone():
    """A batch without variance on one side, or not finite, changes nothing of the joint running state."""
    objective = DenseObjective(subspace_dim=2, center=True, window=200, terms={"cross_size": (1.0, cross_size)})
    for seed in range(3):
        objective(rows(seed=seed), rows(seed=seed + 50))
    before = objective.state_dict()
    for bad in (torch.ones(12, 6).double(), torch.full((12, 6), torch.nan).double()):
        objective(rows(seed=9), bad)
    for name, value in objective.state_dict().items():
        assert name == "shift" or torch.equal(value, before[name]), name


def test_evaluation_has_no_past():
    """`evaluate` gives the values of the moments alone, by the same terms, and leaves the objective as it was."""
    objective = DenseObjective(
        lambda_sub=0.2,
        subspace_dim=2,
        center=True,
        unbiased=True,
        window="auto",
        power_iterations=2,
        terms={"mean_size": (0.5, mean_size)},
    )
    for seed in range(3):
        objective(rows(seed=seed), rows(seed=seed + 50))
    before = objective.state_dict()
    z_a, z_b = rows(seed=7), rows(seed=8)
    found = objective.evaluate(PairMoments.of(z_a, z_b))
    plain = DenseObjective(lambda_sub=0.2, subspace_dim=2, center=True, terms={"mean_size": (0.5, mean_size)})
    for name, value in plain(z_a, z_b).items():
        assert torch.equal(found[name], value)
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())


def test_objectives_travel_between_processes():
    """An objective with terms of a module survives pickling, its state included."""
    objective = DenseObjective(
        subspace_dim=2, window="auto", terms={"mean_size": (0.5, mean_size), "rank_deficit": 0.1}
    )
    objective(rows(), rows(seed=1))
    again = pickle.loads(pickle.dumps(objective))
    assert torch.equal(again(rows(), rows(seed=1))["loss"], objective(rows(), rows(seed=1))["loss"])


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"loss": (1.0, mean_size)}, "cannot be called 'loss'"),
        ({"gap": (1.0, mean_size)}, "cannot be called 'gap'"),
        ({"learning_rate": (1.0, mean_size)}, "cannot be called 'learning_rate'"),
        ({"x": mean_size}, "Expected term 'x' as"),
        ({"x": (1.0,)}, "Expected term 'x' as"),
        ({"x": (float("nan"), mean_size)}, "finite weight of term 'x' but got nan"),
        ({"x": 0.5}, "Expected term 'x' as .* known by name"),
    ],
)
def test_terms_that_cannot_be_are_refused(terms, message):
    with pytest.raises(ValueError, match=message):
        DenseObjective(terms=terms)


def test_a_term_returns_a_scalar_and_asks_for_what_it_reads():
    """What came is named; a term that reads the cross covariance unmarked is told how to ask for it."""
    with pytest.raises(ValueError, match=r"term 'x' to return a scalar tensor but got \(6,\)"):
        DenseObjective(subspace_dim=2, terms={"x": (1.0, lambda s: s.a.mean)})(rows(), rows(seed=1))
    with pytest.raises(ValueError, match=r"cross=True"):
        DenseObjective(subspace_dim=2, terms={"x": (1.0, lambda s: s.cross_covariance.sum())})(rows(), rows(seed=1))


# ---- Losses of a whole batch ----


def test_batch_loss_of_a_function_a_dict_and_a_module():
    """A scalar under its name, a dict summed or with its own loss, a module with parameters and state."""
    z_a, z_b = rows(), rows(seed=1)
    distance = (z_a - z_b).square().mean()
    assert BatchLoss(lambda a, b: (a - b).square().mean(), name="mse")(z_a, z_b) == {"mse": distance, "loss": distance}
    parts = BatchLoss(lambda a, b: {"x": a.sum(), "y": b.sum()})(z_a, z_b)
    assert torch.equal(parts["loss"], z_a.sum() + z_b.sum())
    own = BatchLoss(lambda a, b: {"x": a.sum(), "loss": 3 * a.sum()})(z_a, z_b)
    assert list(own) == ["x", "loss"]
    assert torch.equal(own["loss"], 3 * z_a.sum())
    module = BatchLoss(nn.CosineSimilarity())
    with pytest.raises(ValueError, match=r"scalar tensor but got \(12,\)"):
        module(z_a, z_b)
    bilinear = nn.Bilinear(6, 6, 1).double()
    loss = BatchLoss(bilinear)
    assert loss.parameters() == list(bilinear.parameters())
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    with torch.no_grad():
        bilinear.weight += 1
    loss.load_state_dict(state)
    assert torch.equal(bilinear.weight, state["weight"])


def test_a_batch_loss_answers_as_an_objective():
    """Nothing is planned, a share is the loss of the batch, and evaluation takes the mean over batches in evaluation mode."""
    module = nn.Sequential(nn.Bilinear(6, 6, 1), nn.Flatten(0)).double()
    loss = BatchLoss(lambda a, b: (a - b).square().mean(), name="mse")
    pair = PairMoments.of(rows(), rows(seed=1))
    assert loss.plan(pair) == {}
    share, logged = loss.share(rows(), rows(seed=1))
    assert logged == {"mse": share, "loss": share}
    batches = [loss.of_batch(rows(), rows(seed=seed)) for seed in (1, 2)]
    assert float(loss.evaluate(pair, batches)["mse"]) == pytest.approx(float(sum(b["mse"] for b in batches)) / 2)
    trained = BatchLoss(module)
    trained.module.train(False)
    assert not module.training
    trained.parameters()[0].grad = torch.full_like(trained.parameters()[0], torch.nan)
    trained.module.zero_grad()
    assert trained.parameters()[0].grad is None
    assert (DenseObjective().adds_up, trained.adds_up) == (True, False)


def test_batch_loss_is_full_precision_under_autocast():
    """Half-precision rows are widened and autocast is off inside."""
    seen = []
    loss = BatchLoss(lambda a, b: seen.append((a @ b.mT).dtype) or a.sum())
    with torch.autocast("cpu", torch.bfloat16):
        loss(rows().bfloat16(), rows(seed=1).bfloat16())
    assert seen == [torch.float32]
    with pytest.raises(ValueError, match=r"function of \(z_a, z_b\) but got float"):
        BatchLoss(0.5)
