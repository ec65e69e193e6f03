"""The views against NumPy, what they do not depend on, and edges."""

import math

import numpy as np
import pytest
import torch

from hf_densefeat.models.head import PairCovariances, content_head, form_head, shared_covariance, unshared_covariance
from hf_densefeat.objective.moments import PairMoments

EPSILONS = (10.0, 0.3, 0.03)


def pairs_of(n=300, d=12, seed=0):
    """Sides (n, d) that share half of their directions' variance, with a mean far from 0 that moves between them."""
    rng = np.random.default_rng(seed)
    mix, shared = rng.normal(size=(d, d)), rng.normal(size=(n, d)) * np.linspace(0.1, 2, d)
    sides = [shared + rng.normal(size=(n, d)) * np.linspace(2, 0.1, d) + 5 + i for i in range(2)]
    return tuple(torch.from_numpy(side @ mix) for side in sides)


def gram(head, z):
    """Inner products after a map: they do not depend on the basis or the signs of axes."""
    return head(z) @ head(z).mT


def inverse_root(matrix, epsilon):
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag((values + epsilon * values.mean()) ** -0.5) @ vectors.T


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("center", [True, False])
def test_both_views_equal_their_definitions(epsilon, center):
    """In NumPy: S_u as half the covariance of the difference, S_s from the cross covariance, clipped."""
    a, b = (z.numpy() for z in pairs_of())
    mean = (a.mean(0) + b.mean(0)) / 2 if center else 0
    unshared = np.cov((a - b).T, ddof=0) / 2
    cross = (a - a.mean(0)).T @ (b - b.mean(0)) / len(a)
    values, vectors = np.linalg.eigh((cross + cross.T) / 2)
    shared = vectors @ np.diag(np.maximum(values, 0)) @ vectors.T
    pairs = PairCovariances.of(*map(torch.from_numpy, (a, b)))
    for fit, noise in ((content_head, unshared), (form_head, shared)):
        expected = (a - mean) @ inverse_root(noise, epsilon)
        head = fit(pairs, epsilon=epsilon, center=center)
        np.testing.assert_allclose(gram(head, torch.from_numpy(a)), expected @ expected.T, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("center", [True, False])
def test_axes_come_in_the_order_of_their_variance(center):
    """After the map features are uncorrelated, the largest first, so that cutting the last ones loses the least."""
    a, b = (z - z.mean(0) for z in pairs_of())
    if not center:  # about 0, with a mean that is not 0
        a, b = a + 3, b + 3
    z = content_head(PairCovariances.of(a, b), epsilon=0.3, center=center)(torch.cat([a, b])).numpy()
    spread = z.T @ z / len(z)
    np.testing.assert_allclose(spread, np.diag(np.diag(spread)), atol=1e-9 * spread.max())
    assert (np.diff(np.diag(spread)) <= 1e-9 * spread.max()).all()


def test_moments_of_the_objective_give_the_same_views():
    """To 1e-10, whole or added up from parts."""
    a, b = pairs_of()
    m = PairMoments.of(a[:100], b[:100], cross=True) + PairMoments.of(a[100:], b[100:], cross=True)
    summed = PairCovariances(
        (m.a.mean + m.b.mean) / 2, m.a.covariance(True), m.b.covariance(True), m.cross_covariance(True)
    )
    for fit in (content_head, form_head):
        expected = gram(fit(PairCovariances.of(a, b), epsilon=0.3), a)
        torch.testing.assert_close(gram(fit(summed, epsilon=0.3), a), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fit", [content_head, form_head])
def test_rotation_and_scale_do_not_change_inner_products(fit):
    """Rotated embeddings give the same Gram matrix, scaled ones too, since epsilon is relative to the mean eigenvalue."""
    a, b = pairs_of()
    expected = gram(fit(PairCovariances.of(a, b), epsilon=0.3), a)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    for change in (lambda z: z @ rotation, lambda z: 1000 * z):
        found = gram(fit(PairCovariances.of(change(a), change(b)), epsilon=0.3), change(a))
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_cosine_finds_the_pair_where_noise_is_large():
    """Pairs that share a weak part below strong noise: content finds the pair, form does not."""
    rng = torch.Generator().manual_seed(0)
    shared = torch.randn(200, 8, generator=rng)
    a, b = (torch.cat([shared, 3 * torch.randn(200, 4, generator=rng)], 1) for _ in range(2))
    pairs = PairCovariances.of(a, b)

    def found(head):
        x, y = (torch.nn.functional.normalize(head(z), dim=1) for z in (a, b))
        return float(((x @ y.mT).argmax(1) == torch.arange(200)).float().mean())

    assert found(content_head(pairs, epsilon=0.03)) > 0.95
    assert found(form_head(pairs, epsilon=0.03)) < 0.05
    assert 0.02 < found(content_head(pairs, epsilon=math.inf)) < 0.9


def test_what_halves_do_not_share_is_no_form():
    """A class that halves of a note share and adjacent notes do not, below chance that neither shares."""
    rng = torch.Generator().manual_seed(0)

    def rows(matter, kind):
        chance = 2 * torch.randn(len(kind), 6, generator=rng)
        return torch.cat([2 * matter, torch.nn.functional.one_hot(kind, 3).float(), chance], 1)

    kind, another = torch.randint(3, (2, 400), generator=rng)
    matter = torch.randn(400, 6, generator=rng)
    a, b, half = rows(matter, kind), rows(matter, another), rows(matter, kind)
    adjacent, halves = PairCovariances.of(a, b), PairCovariances.of(a, half)

    def precision(head):
        z = torch.nn.functional.normalize(head(a), dim=1)
        nearest = (z @ z.mT).fill_diagonal_(-1).topk(10).indices
        return float((kind[nearest] == kind[:, None]).float().mean())

    plain, better = (precision(form_head(adjacent, epsilon=0.1, halves=some)) for some in (None, halves))
    assert plain < 0.6 < 0.8 < better
    same = PairCovariances.of(a, a)  # nothing is chance
    assert precision(form_head(adjacent, epsilon=0.1, halves=same)) == pytest.approx(plain, abs=0.1)


@pytest.mark.parametrize(
    "sides",
    [pairs_of(3), pairs_of(1), (torch.ones(5, 4), torch.ones(5, 4)), (torch.zeros(4, 4), torch.zeros(4, 4))],
    ids=["fewer pairs than d", "one pair", "equal rows", "zeros"],
)
@pytest.mark.parametrize("epsilon", [math.inf, 1.0, 0.03, 0.0])
@pytest.mark.parametrize("fit", [content_head, form_head])
def test_edges_are_finite(sides, epsilon, fit):
    """Values stay finite, and where nothing varies the map is z - mu."""
    head = fit(PairCovariances.of(*sides), epsilon=epsilon)
    z = head(torch.cat(sides))
    assert torch.isfinite(z).all()
    if len(sides[0]) != 3:
        torch.testing.assert_close(head.matrix, torch.eye(len(head.mean), dtype=torch.float64))
        assert head.epsilon == math.inf


def test_nothing_shared_leaves_the_form_view_centred():
    """S_s of pairs that are each other's opposite has no positive eigenvalue."""
    a, _ = pairs_of()
    assert shared_covariance(PairCovariances.of(a, -a).cross).abs().max() < 1e-12 * float(a.square().mean())
    torch.testing.assert_close(form_head(PairCovariances.of(a, -a), epsilon=1.0)(a), a)
    same = PairCovariances.of(a, a)
    assert unshared_covariance(same.a, same.b, same.cross).abs().max() == 0


def test_what_cannot_be_fitted_is_refused():
    """In sentences that say what came."""
    with pytest.raises(ValueError, match=r"n >= 1, but got \(0, 3\) and \(0, 3\)"):
        PairCovariances.of(torch.empty(0, 3), torch.empty(0, 3))
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 3\)"):
        PairCovariances.of(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        PairCovariances.of(torch.ones(2, 2), torch.full((2, 2), math.nan))
    with pytest.raises(ValueError, match="epsilon >= 0"):
        content_head(PairCovariances.of(*pairs_of()), epsilon=math.nan)
