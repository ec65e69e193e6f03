"""The forward of a micro-batch: groups of like length and chosen positions change neither losses nor gradients."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_densefeat import DensePairCollator
from hf_densefeat.training.forward import forward_pairs, length_groups, predicts_by_position
from tests.conftest import make_model


def make_batch(tokenizer, pairs=9, chunk_length=None, objective="mlm"):
    """Pairs of rows of 3 to 40 tokens."""
    rng = np.random.default_rng(0)

    def ids():
        return [2, *rng.integers(5, len(tokenizer), rng.integers(1, 39)).tolist(), 3]

    collator = DensePairCollator(tokenizer, objective=objective, chunk_length=chunk_length)
    return collator(
        [{"earlier": {"input_ids": ids()}, "later": {"input_ids": ids()}, "mask_seed": i} for i in range(pairs)]
    )


def plain(model, batch):
    """The definition: all rows in one padded forward, logits everywhere."""
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    hidden, mask = out.hidden_states[-1], batch["attention_mask"][..., None]
    predicted = batch["labels"] != -100
    mlm = nn.functional.cross_entropy(out.logits[predicted], batch["labels"][predicted], reduction="sum")
    return mlm, ((hidden * mask).sum(1) / mask.sum(1)).chunk(2)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert"])
@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_equal_to_one_padded_forward(tokenizer, family, by_position, grouped):
    model, batch = make_model(family, tokenizer, dropout=0.0).double(), make_batch(tokenizer)
    made = forward_pairs(model, model, batch, predict=True, by_position=by_position, grouped=grouped)
    mlm, (z_a, z_b) = plain(model, batch)
    weight = torch.randn_like(z_a)
    torch.testing.assert_close(made.mlm, mlm)
    torch.testing.assert_close(made.z_a, z_a)
    torch.testing.assert_close(made.z_b, z_b)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for loss, expected in (
        (made.mlm, mlm),
        ((made.z_a * weight).sum() - made.z_b.square().sum(), (z_a * weight).sum() - z_b.square().sum()),
    ):
        options = {"retain_graph": True, "allow_unused": True}
        for one, other in zip(
            torch.autograd.grad(loss, parameters, **options),
            torch.autograd.grad(expected, parameters, **options),
            strict=True,
        ):
            if other is not None:
                torch.testing.assert_close(one if one is not None else torch.zeros_like(other), other)
    tokens = batch["attention_mask"]
    assert made.slots == tokens.numel() if not grouped else tokens.sum() <= made.slots < tokens.numel()


def test_chunks_are_put_together_over_groups(tokenizer):
    model, batch = make_model("bert", tokenizer, dropout=0.0).double(), make_batch(tokenizer, chunk_length=16)
    options = {"predict": True, "by_position": True}
    one, many = (forward_pairs(model, model, batch, grouped=grouped, **options) for grouped in (False, True))
    for x, y in zip(one[:3], many[:3], strict=True):
        torch.testing.assert_close(y, x)
    assert len(many.z_a) == 9


def test_without_a_predicted_token_or_a_pair(tokenizer):
    model = make_model("bert", tokenizer)
    empty = DensePairCollator(tokenizer)([])
    made = forward_pairs(model, model, empty, predict=True, by_position=True, grouped=True)
    assert (len(made.z_a), len(made.z_b), made.mlm.item()) == (0, 0, 0.0)
    made.mlm.backward()  # every rank has a backward
    batch = make_batch(tokenizer)
    assert forward_pairs(model, model, batch, predict=False, by_position=True, grouped=True).mlm == 0


def test_groups_hold_every_row_once_and_little_padding():
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 16, 64, 300):
        for lengths in (rng.integers(5, 512, n), np.full(n, 77), np.r_[512, np.full(n - 1, 3)]):
            groups = length_groups(lengths.tolist())
            assert sorted(np.concatenate(groups)) == list(range(n))
            slots = sum(len(group) * lengths[group].max() for group in groups)
            assert slots <= n * lengths.max()
            assert all((np.diff(lengths[group]) <= 0).all() for group in groups)
            assert len(groups) <= 8
            if len(groups) == 1:
                assert lengths.sum() >= 0.95 * slots
    assert len(length_groups([7] * 9)) == 1
    # two lengths: two groups, none padded
    assert [len(group) for group in length_groups([512] * 4 + [20] * 28)] == [4, 28]


class MixingHead(nn.Module):
    """Logits of a position are those of the mean of its row."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        return self.head(hidden.mean(1, keepdim=True).expand_as(hidden))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert"])
def test_heads_by_position_are_found(tokenizer, family):
    model = make_model(family, tokenizer).train()
    assert predicts_by_position(model, DensePairCollator(tokenizer)([]))
    assert model.training


def test_a_head_that_mixes_positions_is_found(tokenizer):
    model = make_model("bert", tokenizer)
    model.cls = MixingHead(model.cls)
    assert not predicts_by_position(model, DensePairCollator(tokenizer)([]))


def test_a_head_that_fails_is_found(tokenizer):
    model = make_model("bert", tokenizer)
    model.cls = nn.Bilinear(1, 1, 1)
    assert not predicts_by_position(model, DensePairCollator(tokenizer)([]))
