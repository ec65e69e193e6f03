"""Geometry against SciPy and NumPy, its degenerate cases, and what the noise floor is for."""

import itertools
import logging

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from hf_densefeat.evaluation.geometry import (
    COLLAPSED_DIRECTIONS,
    COLLAPSED_RANK,
    COLLAPSED_VARIANCE,
    OVERSPREAD_RANK,
    condition_number,
    effective_rank,
    geometry_report,
    geometry_state,
    mean_cosine,
    patient_subspaces,
    principal_angles,
    spectrum,
    subspace_distance,
    variance_share,
)

SHAPES = [(50, 20), (20, 50), (30, 30)]


def embeddings(n, d, seed=0, mean=0.5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.linspace(1, 0.1, d) + mean


def reference(z, center):
    z = z.double().numpy()
    return z - z.mean(0) if center else z


def leading(z, k, center):
    return np.linalg.svd(reference(z, center))[2][:k].T


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_spectrum_rank_and_condition_equal_scipy(n, d, center):
    """Eigenvalues are squared singular values over N; rank and condition number follow from them."""
    z = embeddings(n, d)
    values = scipy.linalg.svdvals(reference(z, center)) ** 2 / n
    np.testing.assert_allclose(spectrum(z, center=center).numpy(), values, atol=1e-13)
    assert effective_rank(z, center=center) == pytest.approx(np.exp(scipy.stats.entropy(values)), rel=1e-12)
    smallest = values[min(n - int(center), d) - 1]
    assert condition_number(z, center=center) == pytest.approx(values[0] / smallest, rel=1e-8)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_subspace_distance_and_angles_equal_scipy(n, d, center):
    """The distance is that of the projectors, twice the sum of the squared sines of SciPy's principal angles."""
    z, other, k = embeddings(n, d), embeddings(n, d, seed=1) + embeddings(n, d), 5
    u, v = leading(z, k, center), leading(other, k, center=center)
    distance = subspace_distance(z, other, k, center=center)
    assert distance == pytest.approx(np.linalg.norm(u @ u.T - v @ v.T) ** 2, rel=1e-10)
    angles = principal_angles(z, other, k, center=center)
    np.testing.assert_allclose(angles.numpy()[::-1], scipy.linalg.subspace_angles(u, v), atol=1e-10)
    assert distance == pytest.approx(2 * float(angles.sin().square().sum()), rel=1e-10)


def test_isotropic_and_rank_one_are_the_ends_of_the_scale():
    """An orthogonal matrix uses every direction alike; a rank-one matrix uses one."""
    q = torch.linalg.qr(embeddings(16, 16).double())[0]
    assert effective_rank(q) == pytest.approx(16)
    assert condition_number(q) == pytest.approx(1)
    line = torch.arange(1.0, 9)[:, None] * torch.ones(8)
    assert effective_rank(line) == pytest.approx(1)
    assert condition_number(line) == pytest.approx(1e10)


def test_values_do_not_depend_on_scale_rotation_or_row_order():
    """Rank, condition number and distance are those of the cloud, not of its coordinates."""
    z, other = embeddings(40, 12), embeddings(40, 12, seed=1)
    q, order = torch.linalg.qr(embeddings(12, 12, seed=2).double())[0], torch.randperm(40)
    turned, turned_other = 7 * (z.double() @ q)[order], 3 * other.double() @ q
    for center in (False, True):
        assert effective_rank(turned, center=center) == pytest.approx(effective_rank(z, center=center), rel=1e-9)
        assert condition_number(turned, center=center) == pytest.approx(condition_number(z, center=center), rel=1e-9)
        assert subspace_distance(turned, turned_other, 4, center=center) == pytest.approx(
            subspace_distance(z, other, 4, center=center), rel=1e-9
        )


def test_a_large_mean_hides_the_rest_only_without_centring():
    """One shared direction: uncentred rank 1 and cosine 1, centred rank as before (and it was high before)."""
    z = embeddings(200, 16, mean=0.0)
    moved = z + 1000
    assert effective_rank(z, center=True) > 10
    assert effective_rank(moved, center=True) == pytest.approx(effective_rank(z, center=True), rel=1e-3)
    assert effective_rank(moved) < 1.01
    assert mean_cosine(moved) > 0.99
    assert abs(mean_cosine(z)) < 0.05


def test_mean_cosine_is_the_mean_over_all_pairs():
    """The closed form equals the loop over pairs; zero rows have no direction."""
    z = embeddings(12, 5)
    z[3] = 0
    rows = [row for i, row in enumerate(z.double()) if i != 3]
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in itertools.combinations(rows, 2)]
    assert mean_cosine(z) == pytest.approx(np.mean(cosines), rel=1e-12)


@pytest.mark.parametrize(
    "z",
    [
        torch.zeros(5, 4),
        torch.full((6, 4), 1.1),
        torch.ones(1, 4),
        torch.zeros(1, 3),
        embeddings(3, 4).repeat(4, 1),
        embeddings(1, 4).repeat(9, 1) * torch.arange(1, 10)[:, None],
        torch.full((300, 4), 0.1, dtype=torch.float64),
    ],
    ids=["zero", "constant", "one row", "one zero row", "duplicated", "rank one", "constant, many rows"],
)
def test_degenerate_input_is_finite(z):
    """Every number of the report is finite, without and with a second side."""
    for report in (geometry_report(z, k=2), geometry_report(z, z, k=2)):
        assert all(np.isfinite(value) for value in report.values())


def test_no_variance_reads_as_the_worst_value():
    """A collapsed encoder gives rank 0, condition number 1/floor and cosine 1, not NaN."""
    z = torch.full((64, 8), 1.1)
    assert effective_rank(z, center=True) == 0.0
    assert condition_number(z, center=True) == 1e10
    assert mean_cosine(z) == pytest.approx(1)
    assert effective_rank(torch.zeros(3, 2)) == 0.0


def test_noise_floor_of_one_distribution():
    """Two independent batches of one distribution are nearly as far apart as can be; the report says so."""
    z, other = embeddings(32, 768, mean=0.0), embeddings(32, 768, seed=1, mean=0.0)
    assert subspace_distance(z, other, k=20) > 28
    report = geometry_report(embeddings(64, 768, mean=0.0), embeddings(64, 768, seed=1, mean=0.0), k=20)
    assert report["subspace_noise_floor"] > 28
    assert abs(report["subspace_excess"]) < 3
    assert report["subspace_noise_floor"] == report["subspace_noise_floor_normalized"] * 40


def test_excess_sees_a_change_that_the_floor_does_not_explain():
    """A rotated second side stands above the floor; an equal one does not, although its rows are noisy."""
    low = torch.cat([torch.ones(4), torch.full((12,), 0.1)])
    z = embeddings(400, 16, mean=0.0).sign() * low * embeddings(400, 16, seed=3, mean=2.0)
    same, turned = z[torch.randperm(400)], z.flip(1)
    quiet, loud = geometry_report(z, same, k=4), geometry_report(z, turned, k=4)
    assert abs(quiet["subspace_excess"]) < 0.1
    assert loud["subspace_excess"] > 3


def test_noise_floor_is_seeded_and_keeps_groups_whole():
    """The same seed gives the same floor; duplicated rows in one group cannot lower it."""
    z = embeddings(60, 10)

    def floor(rows, **options):
        return geometry_report(rows, k=3, **options)["subspace_noise_floor"]

    assert floor(z, seed=1) == floor(z, seed=1)
    assert floor(z, seed=1) != floor(z, seed=2)
    twins, groups = z.repeat(2, 1), torch.arange(60).repeat(2)
    assert floor(twins, groups=groups) > 1.2 * floor(twins)


def test_unsupported_k_is_refused_by_the_function_and_lowered_aloud_by_the_report(caplog):
    """`subspace_distance` raises and says what is supported; the report says k and k_requested and warns."""
    z = embeddings(12, 30)
    with pytest.raises(
        ValueError, match=r"1 <= k <= 11 but got k=20: z_a of shape \(12, 30\) after centring has rank"
    ):
        subspace_distance(z, z, k=20, center=True)
    with caplog.at_level(logging.WARNING):
        report = geometry_report(z, z + embeddings(12, 30, seed=1), k=20)
    assert (report["k"], report["k_requested"]) == (5, 20)
    assert "k = 5 instead of 20" in caplog.text
    assert report["subspace_distance"] <= 10


def test_report_always_carries_its_sample_size_and_both_centrings():
    """N, d and min(N - 1, d) are there, and each spectral number plain and centred."""
    report = geometry_report(embeddings(20, 50), k=3)
    assert (report["n"], report["d"], report["attainable_rank"]) == (20, 50, 19)
    for name in ("effective_rank", "condition_number", "condition_over_median", "total_variance"):
        assert {name, f"{name}_centered"} <= report.keys()
    assert report["effective_rank_centered"] <= 19
    assert report["effective_rank"] == effective_rank(embeddings(20, 50))


def test_half_precision_is_widened():
    """bfloat16 input gives the values of its float32 copy."""
    z = embeddings(30, 8).bfloat16()
    assert geometry_report(z, k=2) == geometry_report(z.float(), k=2)


def test_patient_subspaces_see_drift_and_skip_short_patients():
    """A patient whose later notes turn away stands above the floor of random cuts; short patients are counted."""
    low = torch.cat([torch.ones(3), torch.full((9,), 0.05)])
    steady = torch.cat(
        [embeddings(40, 12, seed=s, mean=0.0).sign() * low * (1 + embeddings(40, 12, s)) for s in (1, 2)]
    )
    drifting = steady.clone()
    drifting[20:40], drifting[60:80] = steady[20:40].flip(1), steady[60:80].flip(1)
    patients = torch.tensor([5] * 40 + [3] * 40)
    calm, drift = (patient_subspaces(z, patients, k=3) for z in (steady, drifting))
    assert calm["patients"] == drift["patients"] == 2
    assert calm["distance"] < calm["noise_floor"] + 1
    assert drift["distance"] > drift["noise_floor"] + 2
    short = patient_subspaces(steady, torch.tensor([5] * 40 + [3] * 33 + [1] * 7), k=3)
    assert (short["patients"], short["patients_skipped"]) == (2, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: effective_rank(torch.zeros(3)), r"\(N, d\)"),
        (lambda: effective_rank(torch.zeros(0, 3)), "at least one row"),
        (lambda: spectrum(torch.tensor([[0.0], [float("nan")]])), "row 1"),
        (lambda: subspace_distance(torch.eye(4), torch.eye(5), 2), "equal widths"),
        (lambda: geometry_report(torch.eye(4), torch.eye(5)), "z_next"),
    ],
)
def test_wrong_input_says_what_is_expected(call, message):
    """Shapes and non-finite rows are named."""
    with pytest.raises(ValueError, match=message):
        call()


def test_layernorm_encoders_are_singular_and_the_resolved_condition_number_is_not():
    """A LayerNorm output has one direction without variance: at the floor by construction, resolved without it."""
    scale, shift = torch.linspace(0.5, 2, 16), embeddings(1, 16, seed=1)[0]
    z = torch.nn.functional.layer_norm(embeddings(300, 16, mean=0.0), (16,), scale, shift)
    report = geometry_report(z, k=2)
    assert report["condition_number_centered"] == 1e10
    assert report["resolved_rank_centered"] == 15
    assert report["condition_resolved_centered"] < 1e4


def report_of(rank=50.0, attainable=128, variance=0.5):
    return {
        "effective_rank_centered": rank,
        "attainable_rank": attainable,
        "total_variance": 2.0,
        "total_variance_centered": 2.0 * variance,
    }


@pytest.mark.parametrize(
    ("report", "state"),
    [
        (report_of(), "healthy"),
        (report_of(rank=COLLAPSED_RANK * 128 - 0.1), "collapsed"),
        (report_of(rank=COLLAPSED_RANK * 128 + 0.1), "healthy"),
        (report_of(rank=COLLAPSED_DIRECTIONS - 0.1, attainable=20), "collapsed"),
        (report_of(variance=COLLAPSED_VARIANCE - 0.01), "collapsed"),
        (report_of(variance=COLLAPSED_VARIANCE + 0.01), "healthy"),
        (report_of(rank=OVERSPREAD_RANK * 128 + 0.1), "over-spread"),
        (report_of(rank=0.0, attainable=0, variance=0.0), "collapsed"),
    ],
)
def test_state_of_a_report(report, state):
    """Each threshold from both sides."""
    assert geometry_state(report) == state


def test_state_of_clouds():
    """Noise is over-spread, a decaying spectrum healthy, one shared direction at cosine 0.95 collapsed, and so are zeros."""
    noise = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    assert geometry_state(geometry_report(noise)) == "over-spread"
    decay = noise * torch.linspace(0, 4, 64).neg().exp()
    assert geometry_state(geometry_report(decay)) == "healthy"
    shifted = decay + 4.4 * decay.square().sum(1).mean().sqrt() * torch.eye(64)[0]
    found = geometry_report(shifted)
    assert found["mean_cosine"] > 0.9
    assert variance_share(found) == pytest.approx(1 - found["mean_cosine"], abs=0.02)
    assert geometry_state(found) == "collapsed"
    assert geometry_state(geometry_report(torch.zeros(30, 8))) == "collapsed"
