"""The terms beside the paper's: against NumPy and SciPy, finite differences, every edge, and any cut of the batch."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from scipy.stats import multivariate_normal

from hf_densefeat import DenseObjective, effective_rank
from hf_densefeat.objective.extra_terms import EXTRA_TERMS, rank_deficit
from hf_densefeat.objective.moments import PairMoments

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from study.terms import (
    LEAST_FLOOR,
    BoundedRank,
    MutualInformation,
    Sphericity,
    TargetSpectrum,
    log_determinant,
)

D = 5


def pairs(n, d=D, seed=0, shared=0.8, dtype=torch.float64, mean=0.5):
    """Rows of both sides with a common part and a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    common, *own = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(3))
    scale = torch.linspace(2, 0.4, d, dtype=torch.float64)
    sides = [(shared * common + (1 - shared**2) ** 0.5 * x) * scale + mean * (i + 1) for i, x in enumerate(own)]
    return [z.to(dtype) for z in sides]


def value(term, z_a, z_b, **options):
    """The term's value as the objective gives it."""
    objective = DenseObjective(subspace_dim=1, terms={"it": (1.0, term)}, **{"center": True} | options)
    return objective(z_a, z_b)["it"]


def pooled(z_a, z_b):
    return (np.cov(z_a.numpy().T, ddof=0) + np.cov(z_b.numpy().T, ddof=0)) / 2


# ---- Values ----


@pytest.mark.parametrize("center", [False, True])
def test_unshared_variance_is_the_mean_square_of_differences(center):
    """Mean squared difference of centred pairs over the total variance, whatever `center`; 0 for a copy, 1 if unrelated."""
    z_a, z_b = pairs(40)
    a, b = (z.numpy() - z.numpy().mean(0) for z in (z_a, z_b))
    expected = ((a - b) ** 2).sum() / ((a**2).sum() + (b**2).sum())
    term = EXTRA_TERMS["unshared_variance"]
    assert float(value(term, z_a, z_b, center=center)) == pytest.approx(expected, rel=1e-12)
    assert float(value(term, z_a, z_a + 3, center=center)) == pytest.approx(0, abs=1e-12)
    assert float(value(term, *pairs(20_000, shared=0.0), center=center)) == pytest.approx(1, abs=0.02)
    centred = z_a - z_a.mean(0)
    assert float(value(term, centred, -centred)) == pytest.approx(2, rel=1e-12)


def test_mutual_information_is_that_of_canonical_correlations():
    """With hardly a floor it is -1/2 sum log(1 - rho^2), rho from SciPy's subspace angles, over d, negated."""
    z_a, z_b = pairs(60)
    a, b = (z.numpy() - z.numpy().mean(0) for z in (z_a, z_b))
    rho = np.cos(scipy.linalg.subspace_angles(a, b))
    expected = -0.5 * np.log(1 - rho**2).sum()
    found = value(MutualInformation(epsilon=1e-9), z_a, z_b)
    assert -D * float(found) == pytest.approx(expected, rel=1e-6)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1)).double()).Q
    assert float(value(MutualInformation(epsilon=1e-9), z_a @ turn * 7, z_b @ turn.mT)) == pytest.approx(float(found))


def test_mutual_information_with_a_floor_is_its_formula():
    """1/2 log(det S_a det S_b / det S_ab) by NumPy's determinants, the floor on both diagonals."""
    z_a, z_b = pairs(30)
    joint = np.cov(np.concatenate([z_a.numpy(), z_b.numpy()], 1).T, ddof=0)
    scale = np.repeat([joint[:D, :D].trace() / D, joint[D:, D:].trace() / D], D)
    joint = joint / np.sqrt(np.outer(scale, scale)) + 0.3 * np.eye(2 * D)
    expected = 0.5 * math.log(np.linalg.det(joint[:D, :D]) * np.linalg.det(joint[D:, D:]) / np.linalg.det(joint))
    assert float(value(MutualInformation(epsilon=0.3), z_a, z_b)) == pytest.approx(-expected / D, rel=1e-10)
    bound = 0.5 * math.log(1.3**2 / (1.3**2 - 1))  # of an isotropic copy
    isotropic = math.sqrt(D) * torch.cat([torch.eye(D), -torch.eye(D)]).double()
    assert float(value(MutualInformation(epsilon=0.3), isotropic, isotropic)) == pytest.approx(-bound, rel=1e-10)


def test_mutual_information_rewards_the_pairing():
    """The loss is lower for pairs that go together than for the same rows out of order; the paper's terms do not change."""
    z_a, z_b = pairs(200)
    objective = DenseObjective(subspace_dim=2, center=True, terms={"mutual_information": 1.0})
    together, shuffled = objective(z_a, z_b), objective(z_a, z_b.flip(0))
    assert together["mutual_information"] < shuffled["mutual_information"] - 0.1
    for name in ("spectral_spreading", "subspace_consistency", "orthogonality"):
        assert float(together[name]) == pytest.approx(float(shuffled[name]), rel=1e-10)


def test_sphericity_is_the_divergence_from_the_nearest_isotropic_gaussian():
    """With hardly a floor: 2 / d min over sigma of KL(N(0, S) || N(0, sigma^2 I)), by SciPy's entropies and a grid."""
    z_a, z_b = pairs(50)
    sigma = pooled(z_a, z_b)
    entropy = multivariate_normal(cov=sigma).entropy()
    divergences = [
        -entropy + 0.5 * D * math.log(2 * math.pi * s) + 0.5 * sigma.trace() / s
        for s in sigma.trace() / D * np.linspace(0.99, 1.01, 201)
    ]
    expected = 2 / D * min(divergences)
    assert float(value(Sphericity(epsilon=1e-10), z_a, z_b)) == pytest.approx(expected, rel=1e-7)
    isotropic = torch.cat([torch.eye(D), -torch.eye(D)]).double()
    assert float(value(Sphericity(epsilon=0.1), isotropic, isotropic)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_target_spectrum_is_a_divergence_of_eigenvalues(alpha):
    """KL(q || p) from NumPy's eigenvalues, 0 at the target; alpha 0 is the sphericity."""
    z_a, z_b = pairs(50)
    q = np.arange(1.0, D + 1) ** -alpha
    q /= q.sum()
    p = np.linalg.eigvalsh(pooled(z_a, z_b))[::-1]
    p = (p / p.mean() + 0.2) / (D * 1.2)
    term = TargetSpectrum(alpha=alpha, epsilon=0.2)
    assert float(value(term, z_a, z_b)) == pytest.approx((q * np.log(q / p)).sum(), rel=1e-10)
    if alpha == 0:
        assert float(value(term, z_a, z_b)) == pytest.approx(
            float(value(Sphericity(epsilon=0.2), z_a, z_b)), rel=1e-10
        )
    on_target = torch.cat([torch.eye(D), -torch.eye(D)]).double() * torch.tensor(q).sqrt()
    assert float(value(TargetSpectrum(alpha=alpha, epsilon=1e-9), on_target, on_target)) == pytest.approx(0, abs=1e-7)


def test_rank_deficit_is_the_log_of_what_the_effective_rank_lacks():
    """log d - H by SciPy's entropy of NumPy's eigenvalues; the evaluation's effective rank; 0 where all are equal."""
    z_a, z_b = pairs(50)
    values = np.linalg.eigvalsh(pooled(z_a, z_b))
    found = float(value(rank_deficit, z_a, z_b))
    assert found == pytest.approx(math.log(D) - scipy.stats.entropy(values), rel=1e-10)
    both = torch.cat([z_a - z_a.mean(0), z_b - z_b.mean(0)])
    assert math.exp(-found) * D == pytest.approx(float(effective_rank(both)), rel=1e-6)
    isotropic = torch.cat([torch.eye(D), -torch.eye(D)]).double()
    assert float(value(rank_deficit, isotropic, isotropic)) == pytest.approx(0, abs=1e-12)
    flat = torch.cat([z_a[:, :1].expand(50, D), z_b[:, :1].expand(50, D)])
    assert float(value(rank_deficit, flat, flat)) == pytest.approx(math.log(D), abs=1e-10)


def test_bounded_rank_is_l_spec_up_to_the_rank():
    """Below the rank the gradient is that of L_spec, above it there is none."""
    z_a, z_b = (z.requires_grad_() for z in pairs(50))
    sigma = pooled(z_a.detach(), z_b.detach())
    rank = sigma.trace() ** 2 / (sigma**2).sum()
    objective = DenseObjective(subspace_dim=1, center=True)
    (plain,) = torch.autograd.grad(objective(z_a, z_b)["spectral_spreading"], z_a)
    above = value(BoundedRank(rank=rank + 0.5), z_a, z_b)
    assert float(above.detach()) == pytest.approx(1 / rank - 1 / (rank + 0.5), rel=1e-10)
    torch.testing.assert_close(torch.autograd.grad(above, z_a)[0], plain)
    assert not torch.autograd.grad(value(BoundedRank(rank=rank - 0.5), z_a, z_b), z_a)[0].any()


def test_the_floor_is_the_noise_of_the_eigenvalues():
    """ "noise" is the root mean square eigenvalue of S_hat - S over the mean eigenvalue, sqrt(d (1 + purity) / n)."""
    d, n, errors, floors = 24, 60, [], []
    scale = torch.linspace(2, 0.2, d).double()
    truth = np.diag(scale.numpy() ** 2)
    for seed in range(40):
        z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double() * scale
        sample = np.cov(z.numpy().T, ddof=0)
        errors.append((np.linalg.eigvalsh(sample - truth) ** 2).mean() / (truth.trace() / d) ** 2)
        objective = DenseObjective(subspace_dim=1, center=True, terms={"it": (1.0, lambda s: s.noise)})
        floors.append(d * float(objective(z, z)["it"]))
    purity = (truth**2).sum() / truth.trace() ** 2
    assert np.mean(floors) == pytest.approx(np.mean(errors), rel=0.1)
    assert np.mean(floors) == pytest.approx(d * (1 + purity) / n, rel=0.1)
    many = pairs(4000, dtype=torch.float32)
    explicit = value(Sphericity(epsilon=LEAST_FLOOR), *many)
    assert value(Sphericity(epsilon="noise"), *many) <= explicit


# ---- Gradients ----

FIXED = {
    "unshared_variance": EXTRA_TERMS["unshared_variance"],
    "mutual_information": MutualInformation(epsilon=0.2),
    "sphericity": Sphericity(epsilon=0.2),
    "target_spectrum": TargetSpectrum(epsilon=0.2),
    "bounded_rank": BoundedRank(rank=4.5),
    "rank_deficit": rank_deficit,
}


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("n", [7, 4])
@pytest.mark.parametrize("center", [False, True])
def test_gradients_by_finite_differences(name, n, center):
    """gradcheck in float64 with a constant floor, N above and below d."""
    z_a, z_b = (z.requires_grad_() for z in pairs(n))
    torch.autograd.gradcheck(lambda a, b: value(FIXED[name], a, b, center=center), (z_a, z_b), rtol=1e-4, atol=1e-7)


def test_log_determinant_by_finite_differences():
    """Value by NumPy, gradcheck on symmetric arguments, NaN where there is none."""
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    torch.autograd.gradcheck(lambda x: log_determinant(x @ x.mT + torch.eye(4)), x)
    matrix = (x @ x.mT + torch.eye(4)).detach()
    assert float(log_determinant(matrix)) == pytest.approx(np.linalg.slogdet(matrix.numpy())[1], rel=1e-12)
    assert log_determinant(-torch.eye(4)).isnan()


@pytest.mark.parametrize("name", EXTRA_TERMS)
@pytest.mark.parametrize("window", [None, "auto"])
def test_any_cut_has_the_gradient_of_the_whole_batch(name, window):
    """By name, over three updates: micro-batches about a far shift give the values and gradients of the whole batch."""
    whole, cut = (DenseObjective(subspace_dim=2, center=True, window=window, terms={name: 0.7}) for _ in range(2))
    assert whole.needs_cross_moment == (name == "mutual_information")
    shift = torch.full((D,), -1.0, dtype=torch.float64)
    for seed in range(3):
        z_a, z_b = (z.requires_grad_() for z in pairs(12, seed=seed))
        start = pairs(12, seed=seed + 3) if whole.needs_start else None
        terms = whole(z_a, z_b, start=start)
        expected = torch.autograd.grad(terms["loss"], (z_a, z_b))
        parts = list(zip(z_a.detach().split([5, 0, 7]), z_b.detach().split([5, 0, 7]), strict=True))
        starts = [None] * 3 if start is None else list(zip(*(z.split([5, 0, 7]) for z in start), strict=True))
        options = [{"cross": whole.needs_cross_moment, "start": one} for one in starts]
        moments = [PairMoments.of(*part, shift, **option) for part, option in zip(parts, options, strict=True)]
        again, gradient = cut.gradient(moments[0] + moments[1] + moments[2])
        assert float(again[name]) == pytest.approx(float(terms[name]), rel=1e-9, abs=1e-12)
        pulled = [
            torch.cat(sides) for sides in zip(*map(gradient.pullback, *zip(*parts, strict=True), starts), strict=True)
        ]
        for found, wanted in zip(pulled, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


# ---- Edges ----

CONSTANT = torch.tensor([0.3, -1.1, 0.7, 0.01, -0.2]).double()
EDGES = {
    "one row": pairs(1)[0],
    "two rows": pairs(2)[0],
    "N < d": pairs(D - 1)[0],
    "zeros": torch.zeros(8, D).double(),
    "constant": CONSTANT.expand(8, D),
    "constant at 1e3": (1e3 + CONSTANT).expand(8, D),
    "constant columns": torch.cat([pairs(9)[0][:, : D - 2], torch.ones(9, 2) * 50], 1),
    "rank 1": pairs(9)[0][:, :1] * CONSTANT,
    "ties": torch.cat([torch.eye(D), -torch.eye(D)]).double(),
    "duplicates": pairs(3)[0].repeat(4, 1),
    "tiny": 1e-6 * pairs(9)[0],
    "huge": 1e6 * pairs(9)[0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("window", [None, "auto"])
def test_edges_are_finite(edge, dtype, window):
    """Cold, repeated and between good batches, values and gradients are finite and in range, against itself and others."""
    rows = EDGES[edge].to(dtype)
    good = pairs(10, seed=1, dtype=dtype)
    objective = DenseObjective(subspace_dim=2, center=True, window=window, terms=dict.fromkeys(EXTRA_TERMS, 1.0))
    for a, b in ((rows, rows), (rows, rows.flip(0)), good, (rows, rows), (rows, rows.flip(1)), good):
        z_a, z_b = a.clone().requires_grad_(), b.clone().requires_grad_()
        terms = objective(z_a, z_b, start=(b, a.flip(1)))
        gradients = torch.autograd.grad(terms["loss"], (z_a, z_b))
        assert -1e-5 <= terms["anchor"] <= 4 + 1e-5
        assert all(x.isfinite().all() for x in (*terms.values(), *gradients))
        assert -1e-5 <= terms["unshared_variance"] <= 2 + 1e-5
        assert terms["mutual_information"] <= 1e-5
        assert terms["sphericity"] >= -1e-5
        assert terms["target_spectrum"] >= -1e-5
        assert -1e-5 <= terms["rank_deficit"] <= math.log(D) + 1e-5


@pytest.mark.parametrize("edge", ["one row", "zeros", "constant", "constant at 1e3"])
def test_collapse_reads_as_the_docstrings_say(edge):
    """Without variance: 1, 0, log((1 + e) / e), KL(q || uniform), ..., log d, all without gradient."""
    rows = EDGES[edge].clone().requires_grad_()
    q = np.arange(1.0, D + 1) ** -1 / (1 / np.arange(1.0, D + 1)).sum()
    expected = [1, 0, math.log(1.2 / 0.2), (q * np.log(q * D)).sum(), 1 / 4.5, math.log(D)]
    for (name, term), want in zip(FIXED.items(), expected, strict=True):
        found = value(term, rows, rows)
        if name == "bounded_rank":
            want = 1 - 1 / 4.5  # L_spec of rank one, 1 - 1/d, above the bound
        assert float(found.detach()) == pytest.approx(want, abs=1e-9), name
        (gradient,) = torch.autograd.grad(found, rows, allow_unused=True, materialize_grads=True)
        assert not gradient.any(), name


def test_one_collapsed_side_tells_nothing():
    """Against a side without variance the information is 0 and no row is moved by it."""
    good, _ = pairs(8)
    good.requires_grad_()
    found = value(MutualInformation(epsilon=0.2), good, EDGES["constant"])
    assert float(found.detach()) == pytest.approx(0, abs=1e-12)
    assert not torch.autograd.grad(found, good)[0].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sphericity(epsilon=0.0), 'epsilon to be "noise" or a finite number above 0 but got 0.0'),
        (lambda: MutualInformation(epsilon="rows"), "epsilon .* got 'rows'"),
        (lambda: TargetSpectrum(alpha=-1.0), "alpha >= 0 but got -1"),
        (lambda: BoundedRank(rank=1.0), "rank above 1 but got 1"),
        (
            lambda: DenseObjective(terms={"sphericty": 0.1}),
            "'sphericty' as .weight, function.: only unshared_variance",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
