"""Moments add, survive far shifts and half precision, and their pullback is autograd; the running covariance."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_densefeat.objective.distributed import mean_over_ranks, sum_over_ranks
from hf_densefeat.objective.moments import Moments, PairGradient, PairMoments, pullback
from hf_densefeat.objective.objective import DenseObjective
from hf_densefeat.objective.running import averaged, gain_of, no_average
from hf_densefeat.objective.statistics import Side

SUMS = ("count", "first", "second", "square_weighted_sum", "quartic_sum")


def rows(n, d, seed=0, mean=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.linspace(2, 0.3, d, dtype=torch.float64)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) * spectrum + mean).to(dtype)


def brute_force(z, shift):
    """The sums as their table defines them, a row at a time."""
    d = z.shape[1]
    sums = [0.0, np.zeros(d), np.zeros((d, d)), np.zeros(d), 0.0]
    for row in z.numpy():
        y = row - shift.numpy()
        square = sum(v * v for v in y)
        for i, value in enumerate((1.0, y, np.outer(y, y), square * y, square * square)):
            sums[i] = sums[i] + value
    return dict(zip(SUMS, sums, strict=True))


def assert_moments(moments, expected, rtol=1e-10):
    for name, value in expected.items():
        scale = max(np.abs(value).max(), 1e-4)
        np.testing.assert_allclose(getattr(moments, name).detach().numpy(), value, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("shift", [None, 0.0, 3.0, -40.0])
def test_of_and_about_equal_the_sums_written_out(shift):
    """`of`, `about` and `quartic_sum_about` equal the table's sums about any shift, row by row."""
    z = rows(7, 4, mean=1.5)
    at = None if shift is None else torch.full((4,), shift, dtype=torch.float64)
    m = Moments.of(z, at)
    assert_moments(m, brute_force(z, m.shift))
    elsewhere = torch.tensor([5.0, -2.0, 0.5, 9.0], dtype=torch.float64)
    assert_moments(m.about(elsewhere), brute_force(z, elsewhere))
    assert float(m.quartic_sum_about(elsewhere)) == pytest.approx(brute_force(z, elsewhere)["quartic_sum"], rel=1e-10)
    assert m.mean.numpy() == pytest.approx(z.numpy().mean(0), rel=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 23), max_size=5),
    shifts=st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=6),
    mean=st.sampled_from([0.0, 1.0, 300.0]),
)
def test_sum_of_any_cut_is_the_moments_of_the_whole(cuts, shifts, mean):
    """However rows are cut, empty parts included and shifts far apart, the sum equals the moments of all rows."""
    z = rows(23, 3, mean=mean)
    edges = [0, *sorted(cuts), 23]
    parts = [
        Moments.of(z[a:b], torch.full((3,), s, dtype=torch.float64))
        for a, b, s in zip(edges, edges[1:], shifts, strict=False)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert float(total.count) == 23
    np.testing.assert_allclose(total.mean.numpy(), z.numpy().mean(0), rtol=1e-9, atol=1e-9)
    for center in (False, True):
        expected = np.cov(z.numpy().T, ddof=0) if center else z.numpy().T @ z.numpy() / 23
        # the widest shift decides the digits that are left: (1e3)^2 of 1e16
        np.testing.assert_allclose(total.covariance(center).numpy(), expected, rtol=1e-8, atol=1e-8)


def test_no_rows_are_the_neutral_element():
    """Moments of no rows are zeros, add nothing on either side, and have a finite mean and covariance."""
    z = rows(5, 3, mean=2.0)
    empty, m = Moments.of(z[:0]), Moments.of(z)
    assert all(float(x.abs().sum()) == 0 for x in empty.sums)
    assert empty.mean.tolist() == [0, 0, 0]
    assert not empty.covariance(True).any()
    assert not empty.covariance(False).any()
    for both in (empty + m, m + empty):
        np.testing.assert_allclose(both.covariance(True).numpy(), np.cov(z.numpy().T, ddof=0), rtol=1e-12, atol=1e-12)
    assert all(float(x.abs().sum()) == 0 for x in (empty + empty).sums)


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_float32_covariance_at_a_far_mean_equals_numpy(mean):
    """At mean 1e3 and standard deviation 1, fp32 moments give np.cov to 1e-4; one pass about zero is far off."""
    z = rows(64, 8, mean=mean, dtype=torch.float32)
    expected = np.cov(z.double().numpy().T, ddof=0)
    scale = np.abs(expected).max()
    assert np.abs(Moments.of(z).covariance(True).numpy() - expected).max() < 1e-4 * scale
    halves = Moments.of(z[:20]) + Moments.of(z[20:], shift=z[0])
    assert np.abs(halves.covariance(True).numpy() - expected).max() < 1e-4 * scale
    if mean:
        literal = (z.mT @ z / 64 - torch.outer(z.mean(0), z.mean(0))).numpy()
        assert np.abs(literal - expected).max() > 1e-2 * scale


@pytest.mark.parametrize("shift", [None, 2.0])
def test_pullback_is_autograd(shift):
    """`pullback` of the gradient at the summed moments is the autograd gradient of any function of them, every cut."""
    z = rows(9, 4, mean=1.0).requires_grad_()
    at = z.detach().mean(0) if shift is None else torch.full((4,), shift, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in Moments.of(z, at).sums]

    def function(m):
        return (
            sum((w * x).sum().sin() for w, x in zip(weights[1:], m.sums[1:], strict=True)) + m.covariance(True).norm()
        )

    (whole,) = torch.autograd.grad(function(Moments.of(z, at)), z)
    leaves = Moments(at, *(x.detach().requires_grad_() for x in Moments.of(z, at).sums))
    count, first, second, *rest = torch.autograd.grad(function(leaves), leaves.sums)
    grads = count, first, (second + second.mT) / 2, *rest
    for cut in ([9], [4, 5], [1, 0, 3, 5]):
        pulled = torch.cat([pullback(grads, part - at) for part in z.detach().split(cut)])
        np.testing.assert_allclose(pulled.numpy(), whole.numpy(), rtol=1e-12, atol=1e-12 * whole.abs().max().item())


def test_bfloat16_autocast_changes_nothing():
    """Inside bf16 autocast every operation on moments stays float32 and gives the bits it gives outside."""
    a, b = rows(8, 5, mean=3.0, dtype=torch.float32), rows(6, 5, seed=1, dtype=torch.float32)
    far = torch.full((5,), 2.5)

    def everything():
        m, other = Moments.of(a), Moments.of(b)
        both = m + other
        out = [*both.sums, *m.about(far).sums, m.quartic_sum_about(far), both.mean, both.covariance(True)]
        out += [
            both.covariance(False),
            both.resolution(True),
            *PairGradient((m.shift, far), (*both.sums, *m.sums, m.count), False).pullback(a, b[:2].repeat(4, 1)),
            m.noise_of_purity(m.second.square().sum(), m.second.trace(), True),
        ]
        average = advance(None, Side(m, True), 20)
        return [*out, average.covariance, average.noise, average.gain]

    outside = everything()
    with torch.autocast("cpu", torch.bfloat16):
        inside = everything()
    for x, y in zip(outside, inside, strict=True):
        assert y.dtype == torch.float32
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_widened(dtype):
    """Half-precision rows give the float32 moments of their values, and gradients in their own dtype."""
    z = rows(8, 5, mean=1.0).to(dtype).requires_grad_()
    m = Moments.of(z)
    assert {x.dtype for x in m.sums} == {torch.float32}
    for x, y in zip(m.sums, Moments.of(z.detach().float()).sums, strict=True):
        assert torch.equal(x.detach(), y)
    m.second.sum().backward()
    assert z.grad.dtype == dtype


def test_one_process_sums_over_ranks_without_change():
    """Without a process group the global moments are those given, and the mean that of the rows."""
    pair, counts = PairMoments.of(rows(4, 3), rows(4, 3, seed=1)), torch.tensor([5.0])
    assert sum_over_ranks(pair, counts) == (pair, counts)
    np.testing.assert_allclose(mean_over_ranks(rows(4, 3)).numpy(), rows(4, 3).numpy().mean(0), rtol=1e-12)
    assert mean_over_ranks(rows(0, 3)).tolist() == [0, 0, 0]


def test_embeddings_must_be_a_matrix():
    """A vector or a stack of matrices is refused with the shape that came."""
    with pytest.raises(ValueError, match=r"\(n, d\) but got \(3,\)"):
        Moments.of(torch.ones(3))
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        Moments.of(torch.ones(2, 3, 4))


# ---- The running covariance ----


def observe(z, center=True):
    return Side(Moments.of(z), center)


def advance(past, seen, window):
    """One step of one running average, as the objective takes it."""
    past = past or no_average(seen)
    return averaged(past, seen, *gain_of(past, seen, window))


def test_first_step_is_the_batch_and_the_second_a_mean():
    """There is no start-up bias: the first average is the batch's covariance, the second lies between both batches."""
    first, second = rows(24, 8), rows(24, 8, seed=1)
    average = advance(None, observe(first), 200)
    torch.testing.assert_close(average.covariance, observe(first).batch_normalised, rtol=1e-12, atol=1e-12)
    average = advance(average, observe(second), 200)
    share = (average.covariance - observe(first).batch_normalised).norm() / (
        observe(second).batch_normalised - observe(first).batch_normalised
    ).norm()
    assert 0.3 < share < 0.75


def test_gradient_flows_through_the_batch_at_full_strength():
    """The gradient of the average by the rows is that of the batch's own normalised covariance, at every step."""
    past, weight = None, rows(6, 6, seed=9)
    for seed in range(4):
        z = rows(16, 6, seed).requires_grad_()
        m = Moments.of(z)
        with torch.no_grad():
            past = average = advance(past, Side(m, True), 100)
        sides = [Side(m, True, x) for x in (average, None)]
        grads = [torch.autograd.grad((x.normalised * weight).sum(), z, retain_graph=True)[0] for x in sides]
        assert torch.equal(*grads)
        assert torch.equal(sides[0].normalised.detach(), average.covariance)


@pytest.mark.parametrize("bad", ["nan", "inf", "constant", "zeros"])
@pytest.mark.parametrize("when", [0, 1, 5])
def test_bad_batch_leaves_the_state_alone(bad, when):
    """A non-finite or constant batch, first or later, changes no bit of the running state, nor the next average."""
    shape = (16, 6)
    batch = {
        "nan": torch.full(shape, math.nan, dtype=torch.float64),
        "inf": rows(*shape).index_fill(0, torch.tensor([3]), math.inf),
        "constant": torch.full(shape, 1e3, dtype=torch.float64),
        "zeros": torch.zeros(shape, dtype=torch.float64),
    }[bad]
    objectives = [DenseObjective(subspace_dim=2, window="auto", center=True, power_iterations=2) for _ in range(2)]
    for i in range(when):
        for objective in objectives:
            objective(rows(*shape, seed=i), rows(*shape, seed=100 + i))
    before = objectives[0].state_dict()
    objectives[0](batch, batch)
    after = objectives[0].state_dict()
    for name, value in before.items():
        if name != "shift":
            assert torch.equal(value, after[name]) or (value.isnan() & after[name].isnan()).all()
    assert all(value.isfinite().all() or name.endswith("drift") for name, value in after.items())
    for i in range(3):
        z_a, z_b = rows(*shape, seed=50 + i), rows(*shape, seed=60 + i)
        losses = [objective(z_a, z_b)["loss"] for objective in objectives]
        # the tracked basis may have taken its cold start on the bad batch: the averages are equal, the tracking close
        torch.testing.assert_close(losses[0], losses[1], rtol=0.05 if when == 0 else 1e-6, atol=1e-6)
        for x, y in zip(objectives[0].averages, objectives[1].averages, strict=True):
            torch.testing.assert_close(x.covariance, y.covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("power_iterations", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_round_trip_is_bit_equal(power_iterations, dtype):
    """After state_dict and load_state_dict a fresh objective gives the next losses and gradients bit for bit."""

    def make():
        return DenseObjective(
            lambda_sub=0.5,
            lambda_orth=0.01,
            subspace_dim=3,
            window="auto",
            center=True,
            power_iterations=power_iterations,
        )

    def run(objective, seed):
        z_a = rows(12, 8, seed, mean=2.0, dtype=dtype).requires_grad_()
        terms = objective(z_a, rows(12, 8, seed + 100, mean=2.0, dtype=dtype))
        return [*terms.values(), *torch.autograd.grad(terms["loss"], z_a)]

    first, second = make(), make()
    assert first.state_dict() == {}
    for seed in range(4):
        run(first, seed)
    state = first.state_dict()
    second.load_state_dict(state)
    kept = {name: value.clone() for name, value in state.items()}
    for seed in range(10, 14):
        for x, y in zip(run(first, seed), run(second, seed), strict=True):
            assert torch.equal(x, y)
    assert all(torch.equal(kept[name], value) for name, value in state.items()), "a saved state must not move on"


def test_stationary_batches_average_below_their_noise():
    """On stationary batches of 16 the average comes at least twice as near to the truth as single batches are."""
    d = 24
    truth = torch.diag(torch.linspace(2, 0.3, d, dtype=torch.float64).square())
    truth = truth / truth.trace()
    average, single, several = None, [], []
    for seed in range(120):
        z = rows(16, d, seed)
        average = advance(average, observe(z), 1600)
        if seed >= 40:
            single.append((observe(z).batch_normalised - truth).square().sum())
            several.append((average.covariance - truth).square().sum())
    assert torch.stack(several).mean() < torch.stack(single).mean() / 4


def test_drifting_batches_stand_almost_alone():
    """While the covariance turns from step to step the average follows it: it is nearer to the batch than to the past."""
    d, generator = 16, torch.Generator().manual_seed(0)
    average, distances = None, []
    for seed in range(40):
        turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
        z = rows(64, d, seed) * torch.logspace(0, -2, d, dtype=torch.float64) @ turn
        past, average = average, advance(average, observe(z), 10_000)
        if seed >= 5:
            batch = observe(z).batch_normalised
            distances.append((average.covariance - batch).norm() / (past.covariance - batch).norm())
    assert max(distances) < 0.2


def test_window_no_longer_than_the_batch_is_the_batch():
    """A window of at most the batch's rows averages nothing."""
    average = None
    for seed in range(3):
        z = rows(32, 6, seed)
        average = advance(average, observe(z), 32)
        torch.testing.assert_close(average.covariance, observe(z).batch_normalised, rtol=1e-12, atol=1e-12)


# ---- Pairs ----


@pytest.mark.parametrize("shift", [None, 2.0])
def test_cross_moment_of_any_cut_is_that_of_the_whole(shift):
    """However pairs are cut, about whatever shifts, the cross covariance is NumPy's, centred and not, and so is its trace."""
    z_a, z_b = rows(11, 4, mean=1.0), rows(11, 4, seed=1, mean=-2.0)
    a, b = z_a.numpy(), z_b.numpy()
    parts = list(zip(z_a.split([3, 0, 8]), z_b.split([3, 0, 8]), strict=True))
    at = [None if shift is None else torch.full((4,), shift + i, dtype=torch.float64) for i in range(3)]
    first, second, third = (PairMoments.of(*part, s, cross=True) for part, s in zip(parts, at, strict=True))
    total = first + second + third
    np.testing.assert_allclose(total.cross_covariance(False).numpy(), a.T @ b / 11, rtol=1e-10, atol=1e-10)
    expected = (a - a.mean(0)).T @ (b - b.mean(0)) / 11
    np.testing.assert_allclose(total.cross_covariance(True).numpy(), expected, rtol=1e-10, atol=1e-10)
    alone = [PairMoments.of(*part, s) for part, s in zip(parts, at, strict=True)]
    objective = DenseObjective(subspace_dim=2, terms={"unshared_variance": 1.0})
    for sums in (total, alone[0] + alone[1] + alone[2]):
        unshared = objective.evaluate(sums)["unshared_variance"].item()
        assert unshared == pytest.approx(1 - 2 * np.trace(expected) / (a.var(0).sum() + b.var(0).sum()), rel=1e-10)
    assert PairMoments.of(*parts[1], cross=True).cross_covariance(True).abs().max() == 0


def test_pair_pullback_is_autograd():
    """The gradient of a function of all sums, the cross moment included, is autograd's for every cut."""
    z_a, z_b = rows(9, 3, mean=1.0).requires_grad_(), rows(9, 3, seed=1).requires_grad_()
    at = torch.full((3,), 0.5, dtype=torch.float64)

    def function(pair):
        return sum((i + 1) * x.sin().sum() for i, x in enumerate(pair.sums))

    expected = torch.autograd.grad(function(PairMoments.of(z_a, z_b, at, cross=True)), (z_a, z_b))
    leaves = PairMoments.of(z_a, z_b, at, cross=True).detached(requires_grad=True)
    grads = torch.autograd.grad(function(leaves), leaves.sums)
    gradient = PairGradient.of(leaves, grads)
    for cut in ([9], [2, 0, 7]):
        pulled = [gradient.pullback(*part) for part in zip(z_a.split(cut), z_b.split(cut), strict=True)]
        for found, wanted in zip(map(torch.cat, zip(*pulled, strict=True)), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_a_cross_moment_is_of_pairs_and_must_be_asked_for():
    """Sides of different length, sums with and without it, and its covariance where there is none are refused."""
    a, b = rows(4, 3), rows(5, 3)
    with pytest.raises(ValueError, match="Expected pairs of rows"):
        PairMoments.of(a, b)
    with pytest.raises(ValueError, match="pass `cross` to both or neither"):
        PairMoments.of(a, a) + PairMoments.of(a, a, cross=True)
    with pytest.raises(ValueError, match=r"PairMoments.of\(..., cross=True\)"):
        PairMoments.of(a, a).cross_covariance(True)
