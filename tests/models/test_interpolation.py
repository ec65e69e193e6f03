"""Weights between a start and a trained model, against the definition."""

import copy
import math
from functools import partial

import pytest
import torch
from conftest import make_model

from hf_densefeat import AutoDenseModel, DenseHead, interpolate_weights
from hf_densefeat.models.interpolation import choose_share


def moved(start, seed=0):
    """A copy whose every weight has moved."""
    model, generator = copy.deepcopy(start), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    return model


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, 1.25])
def test_every_weight_is_start_plus_share_of_the_way(tokenizer, family, share):
    """Tied weights too, which have two names and one place; the start stays as it is."""
    start = make_model(family, tokenizer)
    model = moved(start)
    first, last = ({name: value.double() for name, value in one.state_dict().items()} for one in (start, model))
    model.views = {"content": DenseHead.fit(torch.randn(50, model.config.hidden_size))}
    interpolate_weights(model, start, share)
    for name, value in model.state_dict().items():
        expected = first[name] + share * (last[name] - first[name])
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
        assert start.state_dict()[name].double().equal(first[name])
    assert model.dense_head is None


def test_half_precision_is_rounded_once(tokenizer):
    """bfloat16: the nearest number to the exact value, where a difference in bfloat16 would be rounded before."""
    start = make_model("bert", tokenizer).to(torch.bfloat16)
    model = moved(start)
    first, last = ({name: value.double() for name, value in one.state_dict().items()} for one in (start, model))
    interpolate_weights(model, start, 0.37)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        exact = first[name] + 0.37 * (last[name] - first[name])
        assert ((value.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-7).all()


def test_an_encode_in_the_same_autocast_sees_the_new_weights(tokenizer):
    """Autocast keeps a half-precision copy of each weight until it ends."""
    start = make_model("bert", tokenizer)
    model, texts = moved(start), ["fever and cough", "no change"]
    encode = partial(model.encode, tokenizer=tokenizer, view=None)
    with torch.autocast("cpu", torch.bfloat16):
        encode(texts)
        interpolate_weights(model, start, 0.0)
        found = encode(texts)
    with torch.autocast("cpu", torch.bfloat16):
        assert found.equal(start.encode(texts, tokenizer=tokenizer, view=None))


def test_weights_that_the_start_does_not_have_stay_the_models(tokenizer):
    """A masked-LM head that training began anew."""
    start = make_model("bert", tokenizer)
    model = moved(start)
    before = copy.deepcopy(model.state_dict())
    new = [name for name in before if name.startswith("cls.predictions.transform")]
    interpolate_weights(model, start, 0.0, new=new)
    assert new
    for name, value in model.state_dict().items():
        assert value.equal(before[name] if name in new else start.state_dict()[name])


def test_another_start_is_refused_with_the_weight_that_differs(tokenizer):
    """And a share that is none."""
    model = make_model("bert", tokenizer)
    for share in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="share to be a finite number of at least 0"):
            interpolate_weights(model, model, share)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers += 1
    with pytest.raises(ValueError, match=r"only the start has bert\.encoder\.layer"):
        interpolate_weights(model, AutoDenseModel.from_config(config), 0.5)
    config = copy.deepcopy(model.config)
    config.vocab_size += 8
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"in the model and \(\d+.*\) in the start"):
        interpolate_weights(model, AutoDenseModel.from_config(config), 0.5)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_the_share_is_the_largest_that_is_ahead_and_keeps_the_halves():
    """Against the formula; a gain within its error, and a loss of 4 % of the rank of halves, leave what comes before."""
    rng = torch.Generator().manual_seed(0)
    base = {"adjacent": torch.rand(50, generator=rng), "halves": torch.rand(80, generator=rng)}
    base = {kind: one + 0.5 - one.mean() for kind, one in base.items()}
    noise = {kind: torch.randn(len(one), generator=rng) for kind, one in base.items()}
    noise = {kind: (one - one.mean()) / one.std() for kind, one in noise.items()}

    def ranks_of(**gains):
        """Gains of each kind at shares of a half and of one; the standard errors are 0.007 and 0.014, 0.006 and 0.011."""

        def ranks(share):
            return {
                kind: base[kind] + 0.1 * share * noise[kind] + (0.0, *at)[int(2 * share)] for kind, at in gains.items()
            }

        return ranks

    chosen, tried = choose_share(ranks_of(adjacent=(0.05, 0.03), halves=(-0.005, 0.01)), shares=(0.5, 1.0))
    assert chosen is tried[1]  # the largest, not that of the largest gain
    assert [one.share for one in tried] == [0.0, 1.0]
    for kind, gain in {"adjacent": 0.03, "halves": 0.01}.items():
        assert chosen.gains[kind] == pytest.approx((gain, 0.1 / math.sqrt(len(base[kind]))), rel=1e-3)
        assert chosen.ranks[kind] == pytest.approx(0.5 + gain, rel=1e-5)
    for gains, share in (
        ({"adjacent": (0.03, 0.03), "halves": (-0.01, -0.02)}, 0.5),  # the larger one costs the halves
        ({"adjacent": (0.003, 0.01), "halves": (0.003, 0.01)}, 0),  # nothing is ahead for sure
        ({"adjacent": (0.03, 0.03), "halves": (-0.02, -0.02)}, 0),
        ({"adjacent": (-0.03, -0.03), "halves": (0.03, 0.03)}, 1),  # what follows may share the author alone
        ({"adjacent": (0, 0.03)}, 1),
        ({"halves": (0.03, 0)}, 0.5),
    ):
        assert choose_share(ranks_of(**gains), shares=(0.5, 1.0))[0].share == share
    assert choose_share(lambda share: base, shares=(0.5, 1.0))[0].share == 0  # nothing was trained
