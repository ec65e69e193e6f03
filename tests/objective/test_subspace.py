"""The subspace distance against SciPy, its gradient against its formula written out, and the tracked subspace."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from hf_densefeat import DenseObjective, subspace_consistency_loss
from hf_densefeat.objective.objective import COLD_ITERATIONS, OVERSAMPLING
from hf_densefeat.objective.subspace import (
    Eigenspace,
    eigenspace,
    eigenspace_of_rows,
    subspace_distance_squared,
    subspace_iteration,
)


def rows(n, d, seed=0, low=0.3):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(2, low, d).double() @ mix


def covariance(n, d, seed=0):
    z = rows(n, d, seed)
    return z.mT @ z / n


def truncated(space, m):
    """The leading m directions, the trailing eigenvalues by their mean."""
    return Eigenspace(space.basis[:, :m], space.values[:m], space.values[m:].mean())


def gradient_by_loop(space, other_projector, k, broadening):
    """-2 times the gradient of <P_other, P>, written out over all pairs i <= k < j, gaps broadened."""
    values, basis = space.values.numpy(), space.basis.numpy()
    d, other = len(basis), other_projector.numpy()
    eps = broadening * values.mean()
    total = np.zeros((d, d))
    for i in range(k):
        for j in range(k, d):
            gap = values[i] - values[j]
            u, v = basis[:, i], basis[:, j]
            inverse = 0 if gap == eps == 0 else gap / (gap * gap + eps * eps)
            # d P = sum (u^T dSigma v) / gap (u v^T + v u^T), and <P_other, u v^T + v u^T> = 2 u^T P_other v
            total += 2 * (u @ other @ v) * inverse * (np.outer(u, v) + np.outer(v, u)) / 2
    return -2 * total


def distance_and_gradients(cov_a, cov_b, a, b, k, broadening):
    cov_a, cov_b = cov_a.clone().requires_grad_(), cov_b.clone().requires_grad_()
    value = subspace_distance_squared(cov_a, cov_b, a, b, k, broadening)
    return value.detach(), *torch.autograd.grad(value, (cov_a, cov_b))


def test_eigenspaces_equal_numpy():
    """`eigenspace` and `eigenspace_of_rows` give NumPy's eigenvalues, largest first, and eigenvectors of them."""
    for n, d in ((30, 7), (4, 7)):
        z = rows(n, d)
        sigma = (z.mT @ z / n).numpy()
        expected = np.linalg.eigvalsh(sigma)[::-1]
        for space in (eigenspace(torch.tensor(sigma)), eigenspace_of_rows(z)):
            m = len(space.values)
            np.testing.assert_allclose(space.values.numpy(), expected[:m].clip(0), atol=1e-12)
            basis = space.basis.numpy()
            np.testing.assert_allclose(sigma @ basis, basis * space.values.numpy(), atol=1e-12)
            np.testing.assert_allclose(basis.T @ basis, np.eye(m), atol=1e-12)
            assert float(space.rest) == 0
            assert float(space.gap(2)) == pytest.approx((expected[1] - expected[2]) / expected.mean(), rel=1e-10)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_distance_is_twice_the_squared_sines_of_scipy(k):
    """The value is 2 sum sin^2 of SciPy's principal angles and ||P_a - P_b||_F^2, symmetric, in [0, 2k]."""
    cov_a, cov_b = covariance(30, 7), covariance(30, 7, seed=1)
    a, b = eigenspace(cov_a), eigenspace(cov_b)
    value = float(subspace_distance_squared(cov_a, cov_b, a, b, k, 0.0))
    u, v = a.basis[:, :k].numpy(), b.basis[:, :k].numpy()
    assert value == pytest.approx(2 * (np.sin(scipy.linalg.subspace_angles(u, v)) ** 2).sum(), rel=1e-10)
    assert value == pytest.approx(np.linalg.norm(u @ u.T - v @ v.T) ** 2, rel=1e-10)
    assert value == pytest.approx(float(subspace_distance_squared(cov_b, cov_a, b, a, k, 0.0)), rel=1e-12)
    assert 0 < value <= 2 * k


def test_extreme_distances():
    """Equal subspaces are 0 apart, orthogonal ones 2k, the whole space always 0."""
    diagonal = torch.diag(torch.tensor([4.0, 3, 2, 1]).double())
    flipped = torch.diag(torch.tensor([1.0, 2, 3, 4]).double())
    a, b = eigenspace(diagonal), eigenspace(flipped)
    assert float(subspace_distance_squared(diagonal, diagonal, a, a, 2, 0.0)) == pytest.approx(0, abs=1e-14)
    assert float(subspace_distance_squared(diagonal, flipped, a, b, 2, 0.0)) == pytest.approx(4, rel=1e-14)
    value, grad_a, grad_b = distance_and_gradients(diagonal, flipped, a, b, 4, 1.0)
    assert float(value) == pytest.approx(0, abs=1e-14)
    assert grad_a.abs().max() < 1e-14
    assert grad_b.abs().max() < 1e-14


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("n", "d", "k"), [(12, 5, 2), (12, 5, 4), (4, 7, 2), (4, 7, 3)])
def test_unbroadened_gradient_passes_finite_differences(n, d, k, center):
    """gradcheck in float64: with broadening 0 the gradient is the projector's own, for N > d and N < d."""
    z_a, z_b = rows(n, d).requires_grad_(), (rows(n, d, seed=1) + 0.5).requires_grad_()
    torch.autograd.gradcheck(
        lambda a, b: subspace_consistency_loss(a, b, k, center=center), (z_a, z_b), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("n", [2, 3, 4])
def test_gradient_of_fewer_directions_than_k_passes_finite_differences(n):
    """With n centred rows below k = 5 the subspace is all they span; its gradient is exact from rows and from moments."""
    z_a, z_b = rows(n, 9).requires_grad_(), rows(n, 9, seed=1).requires_grad_()
    objective = DenseObjective(subspace_dim=5, center=True, broadening=0.0)
    for loss in (
        lambda a, b: subspace_consistency_loss(a, b, 5, center=True),
        lambda a, b: objective(a, b)["subspace_consistency"],
    ):
        assert float(loss(z_a, z_b).detach()) <= 2 * (n - 1)
        torch.autograd.gradcheck(loss, (z_a, z_b), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("broadening", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_gradient_is_its_formula_written_out(k, broadening):
    """The gradient equals the sum over pairs across k with g / (g^2 + eps^2), eps relative to the mean eigenvalue."""
    cov_a, cov_b = covariance(30, 6), covariance(30, 6, seed=1)
    a, b = eigenspace(cov_a), eigenspace(cov_b)
    _, grad_a, grad_b = distance_and_gradients(cov_a, cov_b, a, b, k, broadening)
    projectors = [space.basis[:, :k] @ space.basis[:, :k].mT for space in (a, b)]
    expected_a = gradient_by_loop(a, projectors[1], k, broadening)
    expected_b = gradient_by_loop(b, projectors[0], k, broadening)
    np.testing.assert_allclose(grad_a.numpy(), expected_a, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(grad_b.numpy(), expected_b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("broadening", [0.0, 1.0])
def test_null_space_of_few_rows_is_exact(broadening):
    """With N < d the N directions of the thin SVD give the gradient of all d: the rest has one eigenvalue, zero."""
    z_a, z_b, k = rows(5, 9), rows(5, 9, seed=1), 3
    covs = [z.mT @ z / 5 for z in (z_a, z_b)]
    thin = distance_and_gradients(*covs, eigenspace_of_rows(z_a), eigenspace_of_rows(z_b), k, broadening)
    full = distance_and_gradients(*covs, *map(eigenspace, covs), k, broadening)
    for x, y in zip(thin, full, strict=True):
        np.testing.assert_allclose(x.numpy(), y.numpy(), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("m", [3, 5, 8])
def test_left_out_eigenvalues_enter_through_their_mean(m):
    """With m < d directions the gradient is the full formula's with the trailing eigenvalues set to their mean."""
    k, covs = 3, [covariance(40, 9), covariance(40, 9, seed=1)]
    spaces = [eigenspace(c) for c in covs]
    _, grad_a, _ = distance_and_gradients(*covs, *(truncated(s, m) for s in spaces), k, 0.5)
    flat = spaces[0].values.clone()
    flat[m:] = flat[m:].mean()
    top = spaces[1].basis[:, :k]
    expected = gradient_by_loop(Eigenspace(spaces[0].basis, flat, flat.new_zeros(())), top @ top.mT, k, 0.5)
    np.testing.assert_allclose(grad_a.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("broadening", [0.0, 1.0])
def test_ties_have_finite_gradients(broadening):
    """At exact ties, inside the leading k and across k, and at the identity, value and gradient are finite."""
    for values in ([1.0, 1, 1, 1, 1], [3.0, 3, 2, 1, 1], [3.0, 2, 2, 1, 1], [1.0, 0, 0, 0, 0], [0.0] * 5):
        sigma, other = torch.diag(torch.tensor(values).double()), covariance(20, 5)
        for x in distance_and_gradients(sigma, other, eigenspace(sigma), eigenspace(other), 2, broadening):
            assert x.isfinite().all()


def test_tie_inside_the_subspace_does_not_enter_its_gradient():
    """A tie among the leading k leaves the exact gradient as it is: only gaps across k enter."""
    sigma, other = torch.diag(torch.tensor([3.0, 3, 1, 0.5]).double()), covariance(20, 4)
    apart = torch.diag(torch.tensor([3.0, 3 - 1e-9, 1, 0.5]).double())
    tied = distance_and_gradients(sigma, other, eigenspace(sigma), eigenspace(other), 2, 0.0)
    near = distance_and_gradients(apart, other, eigenspace(apart), eigenspace(other), 2, 0.0)
    for x, y in zip(tied, near, strict=True):
        np.testing.assert_allclose(x.numpy(), y.numpy(), rtol=1e-6, atol=1e-8)


def test_broadening_tames_a_closing_gap():
    """As the gap at k closes the exact gradient grows without bound and the broadened one does not."""
    other, norms = covariance(20, 4), {}
    for gap in (1e-1, 1e-6):
        sigma = torch.diag(torch.tensor([3.0, 1 + gap, 1, 0.5]).double())
        for broadening in (0.0, 1.0):
            _, grad, _ = distance_and_gradients(sigma, other, eigenspace(sigma), eigenspace(other), 2, broadening)
            norms[gap, broadening] = float(grad.norm())
    assert norms[1e-6, 0.0] > 1e4 * norms[1e-1, 0.0]
    assert norms[1e-6, 1.0] <= 1.1 * norms[1e-1, 1.0]


def test_collapsed_side_counts_the_directions_that_it_has():
    """Directions without variance are no part of a subspace: rank r < k against k is in [0, r + k], zero is a subset."""
    full, d = covariance(30, 6), 6
    top = eigenspace(full).basis[:, :1]
    line = top @ top.mT
    spaces = eigenspace(line), eigenspace(full)
    assert int(spaces[0].leading(3).sum()) == 1
    assert float(subspace_distance_squared(line, full, *spaces, 3, 1.0)) == pytest.approx(1 + 3 - 2, rel=1e-10)
    zero = torch.zeros(d, d, dtype=torch.float64)
    assert float(subspace_distance_squared(zero, full, eigenspace(zero), spaces[1], 3, 1.0)) == 3
    assert float(subspace_distance_squared(zero, zero, eigenspace(zero), eigenspace(zero), 3, 1.0)) == 0


# ---- Tracking by power iteration ----


def turning(step, d, speed, seed=0):
    """A covariance whose eigenvectors turn by `speed` radians a step and whose spectrum decays as text embeddings' do."""
    generator = torch.Generator().manual_seed(seed)
    skew = torch.randn(d, d, generator=generator, dtype=torch.float64)
    skew = (skew - skew.mT) / torch.linalg.matrix_norm(skew - skew.mT, 2)
    basis = torch.linalg.matrix_exp(step * speed * skew)
    return basis * torch.logspace(0, -2, d, dtype=torch.float64) @ basis.mT


@pytest.mark.parametrize("iterations", [1, 2])
def test_power_iteration_tracks_a_slowly_moving_subspace(iterations):
    """Warm-started block power steps stay within 1e-2 of eigh's subspace over 200 steps of a turning covariance."""
    d, k, speed = 48, 8, 2e-3
    basis = torch.linalg.qr(torch.randn(d, k + OVERSAMPLING, generator=torch.Generator().manual_seed(1)).double()).Q
    basis = subspace_iteration(turning(0, d, speed), basis, COLD_ITERATIONS, warm=False).basis
    worst = 0.0
    for step in range(1, 201):
        sigma = turning(step, d, speed)
        space, exact = subspace_iteration(sigma, basis, iterations), eigenspace(sigma)
        basis = space.basis
        worst = max(worst, float(subspace_distance_squared(sigma, sigma, space, exact, k, 1.0)))
    assert worst < 1e-2
    assert worst > 0
    np.testing.assert_allclose(space.values[:k].numpy(), exact.values[:k].numpy(), rtol=1e-2)
    np.testing.assert_allclose(float(space.rest), exact.values[k + OVERSAMPLING :].mean(), rtol=0.2)
    start = eigenspace(turning(0, d, speed))
    moved = float(subspace_distance_squared(sigma, sigma, start, exact, k, 1.0))
    assert moved > 100 * worst, "the covariance did not move"


def test_tracked_gradient_is_close_to_the_exact_one():
    """The gradient of L_sub from tracked spaces of both sides points where the exact broadened one does, at its length."""
    d, k, speed = 48, 8, 2e-3
    bases = [torch.eye(d, k + OVERSAMPLING, dtype=torch.float64)] * 2
    cosines, lengths = [], []
    for step in range(60):
        covs = [turning(step, d, speed), turning(step + 60, d, speed)]
        spaces = [
            subspace_iteration(c, b, 20 if step == 0 else 2, warm=step > 0) for c, b in zip(covs, bases, strict=True)
        ]
        bases = [s.basis for s in spaces]
        tracked = distance_and_gradients(*covs, *spaces, k, 1.0)
        exact = distance_and_gradients(*covs, *map(eigenspace, covs), k, 1.0)
        assert float(tracked[0]) == pytest.approx(float(exact[0]), rel=0.02)
        for x, y in zip(tracked[1:], exact[1:], strict=True):
            cosines.append(float((x * y).sum() / (x.norm() * y.norm())))
            lengths.append(float(x.norm() / y.norm()))
    assert min(cosines) > 0.995
    assert 0.95 < min(lengths) <= max(lengths) < 1.05


def test_power_iteration_of_nothing_is_finite():
    """A zero, a rank-one and an identity covariance give finite orthonormal bases."""
    start = torch.linalg.qr(rows(8, 8)[:, :4]).Q
    for sigma in (torch.zeros(8, 8), torch.ones(8, 8), torch.eye(8)):
        space = subspace_iteration(sigma.double(), start, 3)
        assert space.basis.isfinite().all()
        np.testing.assert_allclose((space.basis.mT @ space.basis).numpy(), np.eye(4), atol=1e-10)
        assert math.isfinite(float(space.gap(2)))
