"""The expander: its definition, rows that do not see each other, and a gradient that does not depend on the cut."""

import copy

import numpy as np
import pytest
import torch

from hf_densefeat import DenseObjective
from hf_densefeat.objective.expander import Expander
from hf_densefeat.objective.moments import PairMoments

N, D = 24, 6


@pytest.fixture
def z():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, N, D, generator=generator, dtype=torch.float64)


def test_it_is_its_definition(z):
    """Written out in NumPy."""
    expander = Expander(D, 3 * D).double()
    layers = expander.layers
    rows = z[0].numpy()
    for linear, norm in ((layers[0], layers[1]), (layers[3], layers[4])):
        rows = rows @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
        rows = (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + norm.eps)
        rows = np.maximum(rows * norm.weight.detach().numpy() + norm.bias.detach().numpy(), 0)
    rows = rows @ layers[6].weight.detach().numpy().T
    np.testing.assert_allclose(expander(z[0]).detach().numpy(), rows, atol=1e-12)


def test_weights_follow_from_the_seed_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, same, other = Expander(D, D, seed=3), Expander(D, D, seed=3), Expander(D, D, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.layers[0].weight, same.layers[0].weight)
    assert not torch.equal(one.layers[0].weight, other.layers[0].weight)


def test_half_precision_is_widened_under_autocast():
    expander = Expander(D, D)
    with torch.autocast("cpu", torch.bfloat16):
        features = expander(torch.randn(4, D, dtype=torch.bfloat16))
    assert features.dtype == torch.float32


@pytest.mark.parametrize("window", [None, "auto"])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(z, window):
    """Of the embeddings and of the expander's weights, against autograd through the whole batch."""
    options = {"subspace_dim": 2, "window": window, "center": True, "terms": {"unshared_variance": 0.3}}
    whole = DenseObjective(expander=Expander(D, 2 * D).double(), **options)
    parts = DenseObjective(expander=copy.deepcopy(whole.expander), **options)
    sides = [side.clone().requires_grad_() for side in z]
    whole(*sides)["loss"].backward()

    cut = [side.clone().requires_grad_() for side in z]
    pieces = list(zip(*(side.split(N // 3) for side in cut), strict=True))
    with torch.no_grad():
        shift = parts.seen(torch.cat(list(z))).mean(0)
        rows = [[parts.seen(side) for side in piece] for piece in pieces]
        pair = sum(
            (PairMoments.of(*piece, shift, cross=True) for piece in rows[1:]),
            PairMoments.of(*rows[0], shift, cross=True),
        )
    parts.plan(pair)
    for piece in pieces:
        parts.share(*piece, parts=3)[0].backward()
    for found, expected in zip(cut, sides, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-8, atol=1e-10)
    for found, expected in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-8, atol=1e-10)


def test_the_state_brings_the_weights_back(z):
    options = {"subspace_dim": 2, "window": "auto"}
    one = DenseObjective(expander=Expander(D, D).double(), **options)
    one(*z)
    other = DenseObjective(expander=Expander(D, D, seed=1).double(), **options)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(*z)["loss"], other(*z)["loss"])


def test_embeddings_without_rows_and_equal_rows_give_finite_gradients():
    for side in (torch.zeros(N, D), torch.ones(N, D)):
        objective = DenseObjective(expander=Expander(D, D), subspace_dim=2, terms={"unshared_variance": 0.3})
        rows = side.clone().requires_grad_()
        objective(rows, rows)["loss"].backward()
        assert rows.grad.isfinite().all()
        assert all(weight.grad is None or weight.grad.isfinite().all() for weight in objective.parameters())


def test_an_anchor_is_refused():
    with pytest.raises(ValueError, match="with an expander no term sees these"):
        DenseObjective(expander=Expander(D, D), terms={"anchor": 1.0})
