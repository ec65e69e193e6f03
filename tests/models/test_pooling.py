"""The poolings: padding changes nothing, and they are those of sentence-transformers."""

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling

from hf_densefeat.models.pooling import POOLINGS, pool

LENGTHS = (5, 1, 3, 7)


def batch(side, width=7, fill=0.0, dtype=torch.float32):
    """Rows of 5, 1, 3 and 7 tokens, padded to `width` on a side with `fill`."""
    hidden = torch.full((len(LENGTHS), width, 6), fill, dtype=dtype)
    mask = torch.zeros(len(LENGTHS), width, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for i, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        hidden[i, place] = torch.randn(length, 6, generator=generator).to(dtype) - 2
        mask[i, place] = 1
    return hidden, mask


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(pooling, side):
    """Whatever stands in padded places, however many and on which side, the embedding is that of the bare tokens."""
    bare = torch.cat(
        [
            pool(hidden[mask.bool()][None], torch.ones(1, int(mask.sum()), dtype=torch.int64), pooling)
            for hidden, mask in zip(*batch("right"), strict=True)
        ]
    )
    for fill, width in ((0.0, 7), (1e4, 7), (-1e4, 12)):
        torch.testing.assert_close(pool(*batch(side, width, fill), pooling), bare, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padded_tokens_get_no_gradient(pooling):
    """The gradient of an embedding is zero at padded tokens and reaches at least one attended token of each row."""
    hidden, mask = batch("right")
    hidden.requires_grad_()
    pool(hidden, mask, pooling).sum().backward()
    assert not hidden.grad[~mask.bool()].any()
    assert hidden.grad.abs().sum((1, 2)).gt(0).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_equal_to_sentence_transformers(pooling, side):
    """Each pooling equals sentence-transformers' module of the name that is written into the saved folder."""
    hidden, mask = batch(side)
    theirs = Pooling(6, **{f"pooling_mode_{POOLINGS[pooling].mode}": True})(
        {"token_embeddings": hidden, "attention_mask": mask}
    )["sentence_embedding"]
    torch.testing.assert_close(pool(hidden, mask, pooling), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_row_without_tokens_is_finite(pooling, dtype):
    """A row of which nothing is attended has a finite embedding and gradient; half precision is widened to float32."""
    hidden, mask = batch("right", dtype=dtype)
    mask[1] = 0
    hidden.requires_grad_()
    z = pool(hidden, mask, pooling)
    assert z.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert z.isfinite().all()
    z[1].sum().backward()
    assert hidden.grad.isfinite().all()
    if pooling == "mean":
        assert not z[1].any()


def test_mean_of_half_precision_is_summed_in_float32():
    """A mean over 4,096 bf16 tokens is exact to float32, where a bf16 sum would have stopped at 256."""
    hidden = torch.ones(1, 4096, 2, dtype=torch.bfloat16)
    assert pool(hidden, torch.ones(1, 4096, dtype=torch.int64), "mean").tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_boolean_masks_are_masks(pooling):
    """A boolean mask means what one of 0 and 1 does."""
    hidden, mask = batch("left")
    assert torch.equal(pool(hidden, mask.bool(), pooling), pool(hidden, mask, pooling))
