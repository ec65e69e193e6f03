"""The page that has the whole method on one screen is the method."""

import re
from pathlib import Path

import pytest
import torch

from hf_densefeat import DenseObjective
from hf_densefeat.models.head import PairCovariances, content_head, form_head

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def page():
    """What the block of the page defines."""
    names = {}
    [block] = re.findall(r"```python\n(.*?)```", (RECIPES / "MINIMAL.md").read_text(), re.DOTALL)
    exec(block, names)
    return names


def test_the_page_fits_a_screen():
    """Eighty lines, and none that wraps."""
    text = (RECIPES / "MINIMAL.md").read_text().splitlines()
    assert len(text) <= 80
    assert max(map(len, text)) <= 140


def test_the_loss_and_its_gradient_are_those_of_the_package(page):
    """The same value to 1e-12 and the same gradient of both sides to 1e-10."""
    torch.manual_seed(0)
    shared = torch.randn(64, 24, dtype=torch.float64)
    z = [(shared + 0.4 * torch.randn(64, 24, dtype=torch.float64) + 1).requires_grad_() for _ in range(2)]
    objective = DenseObjective(
        lambda_sub=0.0, lambda_orth=0.0, subspace_dim=4, center=True, terms={"unshared_variance": 0.3}
    )
    ours, theirs = objective(*z)["loss"], page["dense_loss"](*z)
    assert abs(ours.item() - theirs.item()) < 1e-12
    for mine, his in zip(torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z), strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", [False, True])
def test_the_views_are_those_of_the_package(page, form):
    """The same inner products to 1e-9: the package turns the result to its principal axes."""
    torch.manual_seed(0)
    shared = torch.randn(200, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + 3
    a, b = (shared + torch.randn(200, 12, dtype=torch.float64) for _ in range(2))
    mean, matrix = page["view"](a, b, form=form)
    head = (form_head if form else content_head)(PairCovariances.of(a, b), epsilon=0.1)
    mine, his = head(a), (a - mean) @ matrix
    torch.testing.assert_close(mine @ mine.T, his @ his.T, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_the_page_trains_an_encoder(page):
    """Two updates of the bundled encoder give a finite model with other weights."""
    torch.manual_seed(0)
    name = str(RECIPES / "data" / "medquad" / "encoder")
    pairs = [(f"The patient has disease number {i}.", f"Treatment of disease number {i}.") for i in range(8)]
    tokenizer, model = page["train"](name, pairs, steps=2, batch=4, length=16)
    with torch.no_grad():
        z, _ = page["embed"](model, tokenizer([text for text, _ in pairs], return_tensors="pt", padding=True))
    assert torch.isfinite(z).all()
    mean, matrix = page["view"](z, z + 0.1 * torch.randn_like(z))
    assert torch.isfinite((z - mean) @ matrix).all()
