"""The anchor against its literal definition, whole and in parts, in value and gradient."""

import numpy as np
import pytest
import torch

from hf_densefeat import DenseObjective
from hf_densefeat.objective.anchor import AnchorMoments
from hf_densefeat.objective.moments import PairMoments

N, D, D0 = 7, 5, 6


def rows(seed, width=D, n=N):
    return torch.randn(2, n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind()


def literal(z_a, z_b, f_a, f_b):
    """Mean of (cos - cos_0)^2 over ordered pairs of rows that are neither one row nor partners, in NumPy."""
    z, f = np.concatenate([z_a, z_b]), np.concatenate([f_a, f_b])
    z, f = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (z, f))
    n = len(z_a)
    return np.mean([(z[i] @ z[j] - f[i] @ f[j]) ** 2 for i in range(2 * n) for j in range(2 * n) if i % n != j % n])


def test_value_and_gradient_of_the_literal_definition():
    """Rows of any length and start rows of another width; the gradient by finite differences."""
    z, f = rows(0), rows(1, D0)
    assert AnchorMoments.of(z, f).value().item() == pytest.approx(literal(*(x.numpy() for x in (*z, *f))), rel=1e-12)
    leaves = tuple(x.clone().requires_grad_() for x in z)
    assert torch.autograd.gradcheck(lambda a, b: AnchorMoments.of((a, b), f).value(), leaves)


def test_edges():
    """0 at the start, and for one pair, where no rows are unrelated; none is negative by more than rounding."""
    z = rows(0)
    assert AnchorMoments.of(z, z).value().item() == pytest.approx(0, abs=1e-14)
    assert AnchorMoments.of(tuple(3 * x for x in z), z).value().item() == pytest.approx(0, abs=1e-14)
    one = AnchorMoments.of(rows(0, n=1), rows(1, n=1))
    assert one.value().item() == 0
    none, one = (PairMoments.of(*rows(0, n=n), start=rows(1, n=n)) for n in (0, 1))
    assert (none + one).anchor.value().item() == 0


@pytest.mark.parametrize("cuts", [[7], [3, 3, 1], [0, 5, 2]])
def test_term_of_the_objective_for_any_cut(cuts):
    """Gradients of all terms by the rows, from the moments of parts, equal those of the whole batch by autograd."""
    z, f = rows(0), rows(1)
    objective = DenseObjective(
        lambda_sub=0.0, lambda_orth=0.0, subspace_dim=1, terms={"anchor": 2.0, "unshared_variance": 0.3}
    )
    assert objective.needs_start
    leaves = tuple(x.clone().requires_grad_() for x in z)
    values = objective(*leaves, start=f)
    assert values["anchor"].item() == pytest.approx(AnchorMoments.of(z, f).value().item(), rel=1e-12)
    expected = torch.autograd.grad(values["loss"], leaves)
    parts = [tuple(x.split(cuts)[i] for x in z) for i in range(len(cuts))]
    starts = [tuple(x.split(cuts)[i] for x in f) for i in range(len(cuts))]
    shift, total = torch.zeros(D, dtype=torch.float64), None
    for part, start in zip(parts, starts, strict=True):
        moments = PairMoments.of(*part, shift, start=start)
        total = moments if total is None else total + moments
    objective.plan(total)
    shares, found = [], []
    for part, start in zip(parts, starts, strict=True):
        leaves = tuple(x.clone().requires_grad_() for x in part)
        share, _ = objective.share(*leaves, start=start, parts=len(cuts))
        shares.append(share.item())
        found.append(torch.autograd.grad(share, leaves))
    assert sum(shares) == pytest.approx(values["loss"].item(), rel=1e-12)
    for side in range(2):
        torch.testing.assert_close(torch.cat([part[side] for part in found]), expected[side], rtol=1e-10, atol=1e-14)


def test_the_start_is_asked_for():
    objective = DenseObjective(terms={"anchor": 1.0}, subspace_dim=1)
    with pytest.raises(ValueError, match="rows of the frozen start"):
        objective(*rows(0))
