"""The objective against the paper's formulas in NumPy, finite differences, brute-force U-statistics and every edge."""

import itertools
import logging
import math

import numpy as np
import pytest
import torch

from hf_densefeat import (
    DenseObjective,
    Moments,
    orthogonality_loss,
    spectral_spreading_loss,
    subspace_consistency_loss,
)
from hf_densefeat.objective.extra_terms import EXTRA_TERMS
from hf_densefeat.objective.moments import PairMoments
from hf_densefeat.objective.objective import PAPER
from hf_densefeat.objective.subspace import warn_if_unsupported

TERMS = ("spectral_spreading", "subspace_consistency", "orthogonality", "loss")


# ---- The paper, transcribed: NumPy, float64, Z as it stands there ----


def paper_spectral(z):
    n, d = z.shape
    sigma = z.T @ z / n
    return ((sigma / np.trace(sigma) - np.eye(d) / d) ** 2).sum()


def paper_subspace(z_a, z_b, k):
    u_a, u_b = (np.linalg.svd(z, full_matrices=False)[2][:k].T for z in (z_a, z_b))
    return ((u_a @ u_a.T - u_b @ u_b.T) ** 2).sum()


def paper_orthogonality(z):
    n, d = z.shape
    z = (z - z.mean(0)) / z.std(0)
    return ((z.T @ z / n - np.eye(d)) ** 2).sum()


def random_case(seed):
    """N below and above d, spectra from flat to steep, any rotation, mean and scale; rank of either side above k."""
    rng = np.random.default_rng(seed)
    d = int(rng.integers(3, 40))
    n = int(rng.integers(4, 60))
    k = int(rng.integers(1, min(n - 1, d - 1) + 1))
    spectrum = np.geomspace(1, 10.0 ** -rng.uniform(0.1, 1.5), d)
    mean = rng.choice([0.0, 0.3, 3.0]) * rng.standard_normal(d)
    scale = 10.0 ** rng.uniform(-3, 3)
    turn_a = np.linalg.qr(rng.standard_normal((d, d)))[0]
    turn_b = np.linalg.qr(turn_a + 0.3 * rng.standard_normal((d, d)))[0]
    z_a = scale * (rng.standard_normal((n, d)) * spectrum @ turn_a + mean)
    z_b = scale * (rng.standard_normal((n, d)) * spectrum @ turn_b - 0.5 * mean)
    return z_a, z_b, k


def relative(value, expected):
    return abs(float(value) - expected) / abs(expected)


def test_200_random_cases_equal_the_paper_to_1e_10():
    """The three functions and DenseObjective, centred and not, equal the NumPy transcription to 1e-10 relative."""
    below = above = 0
    for seed in range(200):
        a, b, k = random_case(seed)
        z_a, z_b, both = torch.tensor(a), torch.tensor(b), np.concatenate([a, b])
        below, above = below + (len(both) < a.shape[1]), above + (len(a) > a.shape[1])
        assert relative(spectral_spreading_loss(z_a), paper_spectral(a)) < 1e-10
        assert relative(spectral_spreading_loss(z_a, center=True), paper_spectral(a - a.mean(0))) < 1e-10
        assert relative(subspace_consistency_loss(z_a, z_b, k), paper_subspace(a, b, k)) < 1e-10
        assert relative(orthogonality_loss(z_a), paper_orthogonality(a)) < 1e-10
        for center in (False, True):
            sides = [z - z.mean(0) if center else z for z in (a, b)]
            whole = np.concatenate(sides)
            expected = [paper_spectral(whole), paper_subspace(*sides, k), paper_orthogonality(whole)]
            expected.append(expected[0] + 0.7 * expected[1] + 0.01 * expected[2])
            terms = DenseObjective(lambda_sub=0.7, lambda_orth=0.01, subspace_dim=k, center=center)(z_a, z_b)
            assert list(terms) == list(TERMS)
            for name, value in zip(TERMS, expected, strict=True):
                assert relative(terms[name], value) < 1e-10, (seed, center, name)
    assert below >= 10
    assert above >= 50


def embeddings(n, d, seed=0, mean=0.5, low=0.3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(2, low, d).double()
    return (z + mean).to(dtype)


# ---- Gradients ----


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("n", "d"), [(9, 4), (4, 7)])
def test_gradients_of_the_functions_by_finite_differences(n, d, center):
    """gradcheck in float64 of L_spec, L_sub and L_orth, on the covariance side and on the Gram side."""
    z, other = embeddings(n, d).requires_grad_(), embeddings(n, d, seed=1).requires_grad_()
    torch.autograd.gradcheck(lambda z: spectral_spreading_loss(z, center=center), z)
    torch.autograd.gradcheck(orthogonality_loss, z)
    torch.autograd.gradcheck(lambda a, b: subspace_consistency_loss(a, b, 2, center=center), (z, other))


@pytest.mark.slow
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("n", "d"), [(9, 4), (5, 7)])
def test_gradients_of_the_objective_by_finite_differences(n, d, center, unbiased):
    """gradcheck in float64 of the whole objective with the unbroadened projector."""
    z_a, z_b = embeddings(n, d).requires_grad_(), embeddings(n, d, seed=1).requires_grad_()
    objective = DenseObjective(
        lambda_sub=0.3, lambda_orth=0.05, subspace_dim=2, center=center, unbiased=unbiased, broadening=0.0
    )
    for name in TERMS:
        torch.autograd.gradcheck(lambda a, b, name=name: objective(a, b)[name], (z_a, z_b), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("window", [None, "auto", 40])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("power_iterations", [None, 2])
def test_gradient_at_the_moments_is_autograd_of_the_whole_batch(window, center, unbiased, power_iterations):
    """`gradient` and `pullback`, by micro-batches about a far shift, give autograd's gradient, step after step."""
    settings = {"window": window, "center": center, "unbiased": unbiased, "power_iterations": power_iterations}
    whole, cut = (DenseObjective(lambda_sub=0.3, lambda_orth=0.05, subspace_dim=2, **settings) for _ in range(2))
    shift = torch.full((5,), -1.0, dtype=torch.float64)
    for seed in range(3):
        z_a, z_b = embeddings(12, 5, seed).requires_grad_(), embeddings(12, 5, 50 + seed).requires_grad_()
        terms = whole(z_a, z_b)
        expected = torch.autograd.grad(terms["loss"], (z_a, z_b))
        parts = list(zip(z_a.detach().split([5, 0, 7]), z_b.detach().split([5, 0, 7]), strict=True))
        first, second, third = (PairMoments.of(*part, shift) for part in parts)
        again, gradient = cut.gradient(first + second + third)
        for name in TERMS:
            torch.testing.assert_close(again[name], terms[name].detach(), rtol=1e-9, atol=1e-11)
        for pulled, want in zip(
            zip(*(gradient.pullback(*part) for part in parts), strict=True), expected, strict=True
        ):
            pulled = torch.cat(pulled)
            torch.testing.assert_close(pulled, want, rtol=1e-8, atol=1e-10 * want.abs().max().item())


# ---- The estimator without i = j ----


def distinct_quadruples(x):
    """||Sigma||_F^2 from all ordered quadruples of distinct rows: the mean of ((x_i - x_j) . (x_k - x_l))^2 / 4."""
    kernel = [((x[i] - x[j]) @ (x[k] - x[m])) ** 2 / 4 for i, j, k, m in itertools.permutations(range(len(x)), 4)]
    return float(torch.stack(kernel).mean())


def distinct_pairs(x):
    """||E z z^T||_F^2 from all ordered pairs of distinct rows: the mean of (z_i . z_j)^2."""
    return float(torch.stack([(x[i] @ x[j]) ** 2 for i, j in itertools.permutations(range(len(x)), 2)]).mean())


def u_statistic(m, center):
    sigma = m.covariance(center)
    plug_in = sigma.square().sum()
    rest = plug_in - m.noise_of_purity(plug_in, sigma.trace(), center)
    return float(rest * (m.count / (m.count - 1)).square() if center else rest)


@pytest.mark.parametrize("n", [4, 5, 7])
def test_u_statistic_equals_the_sum_over_distinct_indices(n):
    """What is left after `noise_of_purity` is the brute-force mean over distinct indices, about any shift."""
    z = embeddings(n, 3)
    for shift in (None, torch.tensor([4.0, -1.0, 0.0]).double()):
        assert u_statistic(Moments.of(z, shift), True) == pytest.approx(distinct_quadruples(z), rel=1e-9)
        assert u_statistic(Moments.of(z, shift), False) == pytest.approx(distinct_pairs(z), rel=1e-9)


def test_unbiased_objective_is_the_mean_of_both_sides():
    """DenseObjective(unbiased=True) is the mean of both sides' U-statistics over squared traces, minus 1/d."""
    z_a, z_b, n, d = embeddings(6, 3), embeddings(6, 3, seed=1), 6, 3
    for center, brute in ((True, distinct_quadruples), (False, distinct_pairs)):
        expected = 0.0
        for z in (z_a, z_b):
            x = z - z.mean(0) if center else z
            trace = float(x.square().sum() / n)
            expected += brute(z) * (((n - 1) / n) ** 2 if center else 1) / trace**2 / 2
        value = DenseObjective(lambda_sub=0, lambda_orth=0, subspace_dim=1, center=center, unbiased=True)(z_a, z_b)[
            "spectral_spreading"
        ]
        assert float(value) == pytest.approx(expected - 1 / d, rel=1e-9)


@pytest.mark.parametrize("center", [False, True])
def test_u_statistic_is_unbiased_and_the_plug_in_is_not(center):
    """Over 2,000 samples of 8 rows the U-statistic's mean is ||Sigma||_F^2 within 3 standard errors; the plug-in's is not."""
    deviations, mean = torch.tensor([2.0, 1.0, 0.5]).double(), 0.4
    truth = torch.diag(deviations.square()) + (0 if center else mean**2)
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(2000, 8, 3, generator=generator, dtype=torch.float64) * deviations + mean
    moments = [Moments.of(sample) for sample in z]
    values = np.array([u_statistic(m, center) for m in moments])
    plug_in = np.array([float(m.covariance(center).square().sum()) for m in moments])
    target, error = float(truth.square().sum()), values.std() / math.sqrt(len(values))
    assert abs(values.mean() - target) < 3 * error
    assert abs(plug_in.mean() * ((8 / 7) ** 2 if center else 1) - target) > 3 * error


def test_unbiased_value_does_not_measure_the_batch_size():
    """For isotropic rows at N = 16 of d = 64 the plug-in reads mostly N; the unbiased value is near 0."""
    values = {False: [], True: []}
    for seed in range(60):
        z = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for unbiased, kept in values.items():
            objective = DenseObjective(lambda_sub=0, lambda_orth=0, subspace_dim=4, center=True, unbiased=unbiased)
            kept.append(float(objective(z[:16], z[16:])["spectral_spreading"]))
    assert np.mean(values[False]) > 0.02
    assert abs(np.mean(values[True])) < 0.002


# ---- Invariances, identities, direction ----


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("n", "d"), [(6, 20), (20, 20), (19, 20), (40, 20)])
def test_gram_side_equals_covariance_side(n, d, center):
    """L_spec from Z Z^T (N < d) equals L_spec from Z^T Z, value and gradient."""
    z = embeddings(n, d).requires_grad_()
    x = z - z.mean(0) if center else z
    sigma = x.mT @ x / n
    expected = (sigma / sigma.trace() - torch.eye(d) / d).square().sum()
    value = spectral_spreading_loss(z, center=center)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13)
    pair = [torch.autograd.grad(v, z, retain_graph=True)[0] for v in (value, expected)]
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
def test_rotation_and_scale_invariance(center, unbiased):
    """L_spec and L_sub do not change under a common rotation or scale, L_orth not under a scale of each column."""
    z_a, z_b = embeddings(20, 6), embeddings(20, 6, seed=1)
    turn = torch.linalg.qr(embeddings(6, 6, seed=2)).Q
    make = DenseObjective(lambda_sub=0.5, lambda_orth=0.0, subspace_dim=2, center=center, unbiased=unbiased)
    base = make(z_a, z_b)
    for change in (lambda z: z @ turn, lambda z: 1e-4 * z, lambda z: 3e3 * z @ turn):
        other = make(change(z_a), change(z_b))
        for name in ("spectral_spreading", "subspace_consistency", "loss"):
            assert float(other[name]) == pytest.approx(float(base[name]), rel=1e-9)
    columns = torch.logspace(-3, 3, 6, dtype=torch.float64)
    assert float(orthogonality_loss(z_a * columns + 2)) == pytest.approx(float(orthogonality_loss(z_a)), rel=1e-8)
    if center:
        shifted = make(z_a + 5, z_b - 7)
        assert float(shifted["loss"]) == pytest.approx(float(base["loss"]), rel=1e-9)


def test_collapsed_is_worse_than_anisotropic_is_worse_than_isotropic():
    """L_spec and L_orth order a collapsed, an anisotropic and an isotropic batch."""
    noise = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)).double()
    turn = torch.linalg.qr(embeddings(8, 8)).Q
    collapsed = noise[:, :1] @ turn[:1] + 1e-3 * noise
    anisotropic = noise * torch.logspace(0, -1, 8).double() @ turn
    for loss in (spectral_spreading_loss, orthogonality_loss):
        assert loss(collapsed) > 1.5 * loss(anisotropic) > 1.5 * loss(noise)


@pytest.mark.parametrize("window", [None, "auto"])
def test_twenty_sgd_steps_raise_a_low_effective_rank(window):
    """From an effective rank below 3 of 16, 20 SGD steps of a linear encoder on the objective at least double it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 16, generator=generator)
    weight = torch.diag(torch.logspace(0, -3, 16)).requires_grad_()

    def rank():
        with torch.no_grad():
            z = x @ weight
            p = torch.linalg.eigvalsh(z.mT @ z).clamp(min=0)
            return torch.special.entr(p / p.sum()).sum().exp().item()

    objective, optimizer = (
        DenseObjective(lambda_sub=0.01, lambda_orth=0.0, subspace_dim=4, window=window, center=True),
        torch.optim.SGD([weight], lr=0.5),
    )
    before = rank()
    for step in range(20):
        rows = torch.randperm(256, generator=torch.Generator().manual_seed(step))[:128]
        z = x[rows] @ weight
        optimizer.zero_grad()
        objective(z[:64], z[64:])["loss"].backward()
        optimizer.step()
    assert before < 3
    assert rank() > 2 * before


def test_autocast_and_half_precision_change_nothing():
    """Under bf16 autocast losses are float32 and bit-equal; bf16 rows give the float32 value of their entries."""
    z_a, z_b = embeddings(12, 6, dtype=torch.float32), embeddings(12, 6, seed=1, dtype=torch.float32)

    def everything(a, b):
        options = {"window": "auto", "center": True, "unbiased": True, "power_iterations": 2}
        objective = DenseObjective(lambda_sub=0.3, lambda_orth=0.1, subspace_dim=2, **options)
        for _ in range(2):
            terms = objective(a, b)
        functions = spectral_spreading_loss(a, center=True), subspace_consistency_loss(a, b, 2), orthogonality_loss(a)
        return [*terms.values(), *functions, *objective.state_dict().values()]

    outside = everything(z_a, z_b)
    with torch.autocast("cpu", torch.bfloat16):
        inside = everything(z_a, z_b)
    narrow = z_a.bfloat16(), z_b.bfloat16()
    for x, y in itertools.chain(
        zip(outside, inside, strict=True),
        zip(everything(*narrow), everything(*(z.float() for z in narrow)), strict=True),
    ):
        assert x.dtype == y.dtype == torch.float32
        assert torch.equal(x, y)


# ---- Edges ----

D, K = 6, 3
CONSTANT = torch.tensor([0.3, -1.1, 0.7, 0.01, -0.2, 0.9]).double()
EDGES = {
    "one row": embeddings(1, D),
    "two rows": embeddings(2, D),
    "N < k": embeddings(K - 1, D),
    "N < d": embeddings(D - 1, D),
    "constant": CONSTANT.expand(8, D),
    "constant at 1e3": (1e3 + CONSTANT).expand(7, D),
    "constant to a bit": (1e3 + CONSTANT).expand(7, D) * (1 + 6e-8 * torch.eye(7, D).double()),
    "zeros": torch.zeros(8, D).double(),
    "identity": math.sqrt(D) * torch.eye(D).double(),
    "plus and minus": torch.cat([torch.eye(D), -torch.eye(D)]).double(),
    "duplicates": embeddings(3, D).repeat(4, 1),
    "rank 1": embeddings(9, 1) * CONSTANT,
    "constant columns": torch.cat([embeddings(9, D - 2), torch.ones(9, 2) * 50], 1),
    "columns as good as dead": embeddings(9, D) * torch.tensor([1e-12, 1e-17, 1.0, 1.0, 1.0, 1.0]).double(),
    "tiny": 1e-6 * embeddings(9, D),
    "huge": 1e6 * embeddings(9, D),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edge", EDGES)
def test_edges_are_finite_in_loss_and_gradient(edge, dtype):
    """Every edge, cold, repeated and between good batches, is finite with each of center, unbiased, window and tracking.

    In float32 with all combinations of these, in float64 with half of them, in which every two values meet.
    """
    edge_rows = EDGES[edge].to(dtype)
    good = [embeddings(10, D, seed, dtype=dtype) for seed in (1, 2)]
    windows, powers = (None, "auto", 30), (None, 1, 2)
    for center, unbiased, window, power in itertools.product((False, True), (False, True), windows, powers):
        if dtype == torch.float64 and (center + unbiased + windows.index(window) + powers.index(power)) % 2:
            continue
        updates = [(edge_rows, edge_rows), (edge_rows, edge_rows.flip(0)), good]
        if window or power:  # else nothing is kept from one to the next
            updates += [(edge_rows, edge_rows), good]
        options = {"window": window, "center": center, "unbiased": unbiased, "power_iterations": power}
        objective = DenseObjective(lambda_sub=0.5, lambda_orth=0.1, subspace_dim=K, **options)
        for a, b in updates:
            z_a, z_b = a.clone().requires_grad_(), b.clone().requires_grad_()
            terms = objective(z_a, z_b)
            gradients = torch.autograd.grad(terms["loss"], (z_a, z_b))
            values = [*terms.values(), *gradients, *objective.diagnostics.values()]
            where = (edge, center, unbiased, window, power)
            assert all(x.isfinite().all() for x in values), where
            assert -1e-5 <= terms["subspace_consistency"] <= 2 * K + 1e-5, where
            assert -1e-3 <= terms["orthogonality"] <= D * (D - 1) * (1 + 1e-4), where
            if not unbiased:
                assert -1e-6 <= terms["spectral_spreading"] <= 1 - 1 / D + 1e-4, where
            assert all(x.isfinite().all() for name, x in objective.state_dict().items() if not name.endswith("drift"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edge", EDGES)
def test_edges_of_the_functions_are_finite(edge, dtype):
    """The paper's functions are finite in value and gradient at every edge, centred and broadened or not."""
    z = EDGES[edge].to(dtype).requires_grad_()
    other = embeddings(len(z), D, seed=3, dtype=dtype)
    for center in (False, True):
        losses = [spectral_spreading_loss(z, center=center), orthogonality_loss(z)]
        for broadening in (0.0, 1.0):
            losses += [
                subspace_consistency_loss(z, x, K, center=center, broadening=broadening)
                for x in (other, z, z.detach().flip(0))
            ]
        for loss in losses:
            assert loss.isfinite()
            assert torch.autograd.grad(loss, z)[0].isfinite().all()


def value_and_gradient(loss, z):
    z = z.clone().requires_grad_()
    value = loss(z)
    return value.item(), torch.autograd.grad(value, z)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_values_are_those_of_the_docstrings(dtype):
    """No variance reads 1 - 1/d with zero gradient, constant columns add 1, an isotropic batch 0, N < d at least 1/N - 1/d."""

    def at(edge):
        return EDGES[edge].to(dtype)

    worst = 1 - 1 / D
    value, gradient = value_and_gradient(spectral_spreading_loss, at("zeros"))
    assert value == pytest.approx(worst)
    assert not gradient.any()
    for edge in ("one row", "constant", "constant at 1e3", "constant to a bit", "zeros"):
        if edge == "constant to a bit" and dtype == torch.float64:
            continue
        value, gradient = value_and_gradient(lambda z: spectral_spreading_loss(z, center=True), at(edge))
        assert value == pytest.approx(worst), edge
        assert not gradient.any(), edge
        value, gradient = value_and_gradient(orthogonality_loss, at(edge))
        assert value == D, edge
        assert not gradient.any(), edge
        for center in (False, True):
            terms = DenseObjective(subspace_dim=K, center=center)(at(edge), at(edge))
            assert terms["spectral_spreading"].item() == pytest.approx(worst, rel=1e-5), edge
            assert terms["subspace_consistency"].item() == pytest.approx(0, abs=1e-5), edge
            assert terms["orthogonality"].item() == D, edge
    for edge in ("identity", "plus and minus"):
        assert value_and_gradient(spectral_spreading_loss, at(edge))[0] == pytest.approx(0, abs=1e-6)
    assert value_and_gradient(orthogonality_loss, at("plus and minus"))[0] == pytest.approx(0, abs=1e-6)
    assert value_and_gradient(spectral_spreading_loss, at("rank 1"))[0] == pytest.approx(worst, rel=1e-5)
    for edge in ("two rows", "N < d"):
        n = len(at(edge))
        assert value_and_gradient(spectral_spreading_loss, at(edge))[0] >= 1 / n - 1 / D
    columns, gradient = value_and_gradient(orthogonality_loss, at("constant columns"))
    assert columns == pytest.approx(float(orthogonality_loss(at("constant columns")[:, : D - 2])) + 2, rel=1e-5)
    assert not gradient[:, D - 2 :].any()
    once, often = (orthogonality_loss(embeddings(5, D, dtype=dtype).repeat(r, 1)).item() for r in (1, 4))
    assert once == pytest.approx(often, rel=1e-4)


def test_dead_columns_of_a_checkpoint_are_constant():
    """Some checkpoints have features 1e-11 below the others: their correlations are rounding, their gradient explodes."""
    scale = torch.ones(48)
    scale[[5, 17, 40]] = 1e-11
    z_a, z_b = ((embeddings(16, 48, seed).float() * scale).requires_grad_() for seed in (1, 2))
    for lambda_orth in (0.0, 1.0):
        terms = DenseObjective(lambda_sub=0.1, lambda_orth=lambda_orth, subspace_dim=4, center=True)(z_a, z_b)
        gradients = torch.autograd.grad(terms["loss"], (z_a, z_b))
        alive = torch.autograd.grad(
            DenseObjective(lambda_sub=0.1, lambda_orth=lambda_orth, subspace_dim=4, center=True)(
                z_a * (scale == 1), z_b * (scale == 1)
            )["loss"],
            (z_a, z_b),
        )
        for found, expected in zip(gradients, alive, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edge", ["one row", "constant", "constant at 1e3", "zeros"])
def test_centred_batch_without_variance_has_no_subspace(edge, dtype):
    """Equal rows centred have no direction: against a full side L_sub is k, against another such side 0, without gradient."""
    z = EDGES[edge].to(dtype)
    full = embeddings(9, D, dtype=dtype)[: max(len(z), 4)]
    if len(z) != len(full):
        z = z[:1].expand(len(full), D)
    for other, expected in ((full, K), (z.flip(1), 0)):
        value, gradient = value_and_gradient(lambda x, o=other: subspace_consistency_loss(x, o, K, center=True), z)
        assert value == pytest.approx(expected, abs=1e-5)
        assert not gradient.any()


def test_constant_rows_about_a_far_shift_have_no_variance():
    """Constant fp32 rows at 1e3 whose moments are about 0 read as collapsed, not as rounding noise."""
    z = EDGES["constant at 1e3"].float()
    m = Moments.of(z, torch.zeros(D))
    terms = DenseObjective(subspace_dim=K, center=True).values(PairMoments(m, m, m.second.trace()))
    assert [terms[name].item() for name in TERMS[:3]] == pytest.approx([1 - 1 / D, 0, D], abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"window": "auto"}, {"unbiased": True}, {"power_iterations": 2}])
@pytest.mark.parametrize("other", ["collapsed", "full"])
@pytest.mark.parametrize("edge", ["constant at 1e3", "constant to a bit"])
@pytest.mark.parametrize("shift", [None, 0.0, 990.0])
def test_collapse_to_a_far_point_has_no_gradient(settings, other, edge, shift):
    """Rows at 1e3 equal to rounding, about any shift: L_sub sees no direction of noise, and no row is moved by it."""
    z = EDGES[edge].float()
    full = embeddings(7, D, mean=shift or 0.0, dtype=torch.float32)
    z_a, z_b = z.clone().requires_grad_(), z.flip(1) if other == "collapsed" else full
    at = None if shift is None else torch.full((D,), shift)
    terms = DenseObjective(subspace_dim=K, center=True, **settings).values(PairMoments.of(z_a, z_b, at))
    assert terms["subspace_consistency"].item() == pytest.approx(0 if other == "collapsed" else K, abs=1e-4)
    assert torch.autograd.grad(terms["loss"], z_a)[0].norm() < 1e-3


def test_small_variance_at_a_far_mean_is_seen():
    """Standard deviation 1 at mean 1e3 in fp32 is no collapse: centred terms equal float64's to 1e-3."""
    z_a, z_b = embeddings(64, D, mean=1e3), embeddings(64, D, seed=1, mean=1e3)
    wide = DenseObjective(subspace_dim=K, center=True)(z_a, z_b)
    narrow = DenseObjective(subspace_dim=K, center=True)(z_a.float(), z_b.float())
    for name in TERMS:
        assert float(narrow[name]) == pytest.approx(float(wide[name]), rel=1e-3)


# ---- State, diagnostics, messages ----


def test_diagnostics_are_what_they_say():
    """`trace` is the mean trace of both sides, `gap` the smaller gap at k over the mean eigenvalue, the rank at most k."""
    z_a, z_b = embeddings(20, D), embeddings(20, D, seed=1)
    objective = DenseObjective(subspace_dim=K, center=True)
    objective(z_a, z_b)
    values = [np.linalg.eigvalsh(np.cov(z.numpy().T, ddof=0))[::-1] for z in (z_a, z_b)]
    assert float(objective.diagnostics["trace"]) == pytest.approx(np.mean([v.sum() for v in values]), rel=1e-10)
    gaps = [(v[K - 1] - v[K]) / v.mean() for v in values]
    assert float(objective.diagnostics["gap"]) == pytest.approx(min(gaps), rel=1e-8)
    assert int(objective.diagnostics["subspace_rank"]) == K
    objective(EDGES["rank 1"], z_b[:9])
    assert int(objective.diagnostics["subspace_rank"]) == 1


def test_saved_state_is_full_precision_and_survives_bfloat16_rows():
    """bf16 embeddings leave a float32 state."""
    objective = DenseObjective(lambda_orth=0, subspace_dim=K, window="auto", center=True, power_iterations=2)
    objective(embeddings(9, D).bfloat16(), embeddings(9, D, seed=1).bfloat16())
    state = objective.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert set(state) == {"shift", *(f"{s}.{n}" for s in "ab" for n in ("basis", "covariance", "noise", "drift"))}


def test_reduction_of_k_is_said_once(caplog):
    """With fewer rows than k a warning names both numbers, and is not repeated."""
    warn_if_unsupported.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            subspace_consistency_loss(embeddings(4, D), embeddings(4, D, seed=1), 5)
            DenseObjective(lambda_orth=0, subspace_dim=5)(embeddings(4, D), embeddings(4, D, seed=1))
    assert [r.getMessage() for r in caplog.records] == [
        "Subspace dimension reduced from 5 to 4, the rank that the rows can have."
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lambda_sub": -1.0}, "lambda_sub >= 0 but got -1"),
        ({"lambda_orth": math.nan}, "lambda_orth >= 0 but got nan"),
        ({"broadening": -0.1}, "broadening >= 0 but got -0.1"),
        ({"subspace_dim": 0}, "subspace_dim >= 1 but got 0"),
        ({"window": "long"}, "window to be None, \"auto\" or a number of samples but got 'long'"),
        ({"window": 0}, "window .* got 0"),
        ({"window": math.nan}, "window .* got nan"),
        ({"power_iterations": 0}, "power_iterations .* got 0"),
        ({"power_iterations": -2}, "power_iterations .* got -2"),
    ],
)
def test_objective_refuses_what_makes_no_sense(settings, message):
    """Each option out of range is refused by name, with what was expected and what came."""
    with pytest.raises(ValueError, match=message):
        DenseObjective(**settings)


def test_shapes_are_refused_with_what_came():
    """Wrong shapes, no rows and k above d are refused with the numbers."""
    z = embeddings(5, D)
    with pytest.raises(ValueError, match=r"one shape .* \(5, 6\), \(4, 6\)"):
        DenseObjective()(z, z[:4])
    with pytest.raises(ValueError, match=f"between 1 and d = {D} but got k = 7"):
        DenseObjective(subspace_dim=7)(z, z)
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"d = {D} but got k = {k}"):
            subspace_consistency_loss(z, z, k)
    for bad in (z[:0], z[0]):
        for loss in (spectral_spreading_loss, orthogonality_loss, lambda x: subspace_consistency_loss(x, x, 1)):
            with pytest.raises(ValueError, match=r"shape \(n, d\), n >= 1"):
                loss(bad)
    with pytest.raises(ValueError, match=r"\(5, 6\), \(5, 4\)"):
        subspace_consistency_loss(z, z[:, :4], 2)


# ---- Width ----


def moments_of_stream(d, step, exponent=1.0):
    """Moments of 256 new pairs of spectrum i^-exponent, slowly mixed as steps go by."""
    generator = torch.Generator().manual_seed(step)
    scale = torch.arange(1, d + 1) ** (-exponent / 2)
    mix = 0.02 * torch.randn(d, d, generator=torch.Generator().manual_seed(0)) / d**0.5
    shared = torch.randn(256, d, generator=generator)
    sides = [(0.8 * shared + 0.6 * torch.randn(256, d, generator=generator)) * scale for _ in range(2)]
    return PairMoments.of(*(z + step * z @ mix for z in sides), torch.zeros(d))


def test_tracked_steps_never_decompose_a_whole_covariance(monkeypatch):
    """At d = 512 every matrix that is decomposed is k + 32 wide at most."""
    widths = []
    for name in ("eigh", "eigvalsh", "svd", "svdvals", "eig", "qr"):
        real = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda x, *args, real=real, **kw: widths.append(x.shape[-1]) or real(x, *args, **kw)
        )
    options = {"window": "auto", "center": True, "unbiased": True, "power_iterations": 2}
    objective = DenseObjective(lambda_sub=0.01, lambda_orth=0.1, subspace_dim=20, **options)
    for step in range(2):
        objective.gradient(moments_of_stream(512, step))
    assert widths
    assert max(widths) <= 20 + 32


def test_the_tracked_gradient_is_near_the_exact_one_in_noise():
    """The figure of the docstring at d = 384: the gradient of L_sub after 30 batches of independent rows."""
    settings = {"lambda_sub": 1e4, "lambda_orth": 0.0, "subspace_dim": 20, "window": "auto", "center": True}
    tracked, exact = DenseObjective(power_iterations=2, **settings), DenseObjective(**settings)
    for step in range(30):
        pair = moments_of_stream(384, step)
        exact.load_state_dict(tracked.state_dict())
        found = tracked.gradient(pair)[1].sums[2]
    wanted = exact.gradient(pair)[1].sums[2]
    assert (found - wanted).norm() < 0.1 * wanted.norm()
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.995


# ---- In closed form ----


@pytest.mark.parametrize("window", [None, "auto"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("power_iterations", [None, 2])
@pytest.mark.parametrize("pairing", [{}, {"unshared_variance": 0.3}])
def test_the_closed_form_is_the_chain_of_the_terms(window, center, power_iterations, pairing):
    """Values, gradients and state over updates equal those of the functions of the terms under autograd."""
    options = {"window": window, "center": center, "power_iterations": power_iterations}
    closed = DenseObjective(lambda_sub=0.3, lambda_orth=0.05, subspace_dim=2, terms=pairing, **options)
    assert [name for name in closed.terms if closed._is_closed(name)] == list(PAPER)[: 3 if center else 2]
    functions = PAPER | {name: EXTRA_TERMS[name] for name in pairing}
    chained = {name: (closed.terms[name][0], lambda s, f=function: f(s)) for name, function in functions.items()}
    chain = DenseObjective(subspace_dim=2, terms=chained, **options)
    for seed in range(3):
        z_a, z_b = embeddings(12, 5, seed).requires_grad_(), embeddings(12, 5, 50 + seed).requires_grad_()
        found, expected = closed(z_a, z_b), chain(z_a, z_b)
        for name in (*functions, "loss"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)
            grads = [torch.autograd.grad(v[name], (z_a, z_b), retain_graph=True) for v in (found, expected)]
            for x, y in zip(*grads, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)
    for name, value in chain.state_dict().items():
        torch.testing.assert_close(closed.state_dict()[name], value, equal_nan=True)
