"""Each loss against its definition in NumPy and its slope in finite differences; the trainer they share."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUIET, make_model, make_notes
from scipy.integrate import trapezoid
from scipy.stats import entropy

from hf_densefeat import BatchLoss, DenseTrainer, DenseTrainingArguments, geometry_report

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from baselines.affine import apply_affine, fit_all_but_the_top, fit_whitening
from baselines.losses import (
    Expanded,
    barlow_twins,
    i_vne,
    info_nce,
    lejepa,
    sigreg,
    unshared_variance,
    vicreg,
    von_neumann_entropy,
)
from baselines.trainer import SupervisedTrainer


def unit(z):
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def numpy_info_nce(a, b):
    s = np.exp(unit(a) @ unit(b).T / 0.05)
    return -np.mean([np.log(s[i, i] / s[i].sum()) + np.log(s[i, i] / s[:, i].sum()) for i in range(len(a))]) / 2


def numpy_vicreg(a, b):
    d, total = a.shape[1], 25 * ((a - b) ** 2).mean()
    for z in (a, b):
        cov = np.cov(z.T)
        total += 25 * np.maximum(0, 1 - np.sqrt(z.var(0, ddof=1) + 1e-4)).mean() / 2
        total += (cov**2).sum() / d - (np.diag(cov) ** 2).sum() / d
    return total


def numpy_barlow(a, b):
    c = ((a - a.mean(0)) / np.sqrt(a.var(0) + 1e-5)).T @ ((b - b.mean(0)) / np.sqrt(b.var(0) + 1e-5)) / len(a)
    return sum((1 - c[i, i]) ** 2 if i == j else 0.0051 * c[i, j] ** 2 for i in range(len(c)) for j in range(len(c)))


def numpy_entropy(z):
    values = np.linalg.svd(unit(z), compute_uv=False) ** 2 / len(z)
    return entropy(values[values > 1e-12])


def numpy_i_vne(a, b):
    cosine = (unit(a) * unit(b)).sum(1).mean()
    return -(np.log(len(a)) * cosine + (numpy_entropy(a) + numpy_entropy(b)) / 2)


def numpy_unshared(a, b):
    a, b = a - a.mean(0), b - b.mean(0)
    return ((a - b) ** 2).sum() / ((a**2).sum() + (b**2).sum())


DEFINITIONS = {
    info_nce: numpy_info_nce,
    vicreg: numpy_vicreg,
    barlow_twins: numpy_barlow,
    i_vne: numpy_i_vne,
    unshared_variance: numpy_unshared,
}


def sides(n, d, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, generator=generator, dtype=dtype) * torch.linspace(0.2, 2, d, dtype=dtype) + 0.5
    return a, 0.7 * a + 0.4 * torch.randn(n, d, generator=generator, dtype=dtype)


@pytest.mark.parametrize(("n", "d"), [(16, 5), (6, 9)])
@pytest.mark.parametrize("loss", DEFINITIONS, ids=lambda loss: loss.__name__)
def test_definition(loss, n, d):
    a, b = sides(n, d)
    assert loss(a, b).item() == pytest.approx(DEFINITIONS[loss](a.numpy(), b.numpy()), rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(7, 4), (4, 6)])
@pytest.mark.parametrize("loss", DEFINITIONS, ids=lambda loss: loss.__name__)
def test_gradient(loss, n, d):
    a, b = (z.requires_grad_() for z in sides(n, d, seed=1))
    assert torch.autograd.gradcheck(loss, (a, b), eps=1e-6, atol=1e-5)


def test_sigreg_is_the_epps_pulley_statistic_of_the_projections():
    z = sides(40, 5)[0]
    u = torch.nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=0)
    t = np.linspace(0, 3, 17)
    found = []
    for x in (z @ u).numpy().T:
        error = np.abs(np.exp(1j * t[:, None] * x).mean(1) - np.exp(-(t**2) / 2)) ** 2
        found.append(2 * len(x) * trapezoid(error * np.exp(-(t**2) / 2), t))
    assert sigreg(z, u).item() == pytest.approx(np.mean(found), rel=1e-9)
    assert torch.autograd.gradcheck(lambda rows: sigreg(rows, u), (z[:6].clone().requires_grad_(),))


def test_sigreg_tells_normal_rows_from_collapsed_and_scaled_ones():
    z = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    u = torch.nn.functional.normalize(torch.randn(8, 64), dim=0)
    normal = sigreg(z, u)
    assert normal < 2  # its mean under the null does not grow with n
    for other in (0 * z, 3 * z, z + 1, z[:, :1].expand_as(z)):
        assert sigreg(other, u) > 5 * normal


def test_lejepa_draws_fresh_directions_and_weighs_the_parts():
    a, b = sides(12, 6)
    torch.manual_seed(0)
    found = lejepa(a, b, weight=0.3, directions=5)
    torch.manual_seed(0)
    u = torch.nn.functional.normalize(torch.randn(6, 5, dtype=a.dtype), dim=0)
    views = torch.stack([a, b])
    prediction = (views.mean(0) - views).square().mean()
    assert found.item() == pytest.approx((0.7 * prediction + 0.15 * (sigreg(a, u) + sigreg(b, u))).item())
    assert lejepa(a, b) != lejepa(a, b)


def test_von_neumann_entropy():
    a = sides(30, 5)[0]
    assert von_neumann_entropy(a).item() == pytest.approx(numpy_entropy(a.numpy()))
    normalised = torch.nn.functional.normalize(a, dim=1)
    assert von_neumann_entropy(a).exp().item() == pytest.approx(geometry_report(normalised)["effective_rank"])
    assert von_neumann_entropy(torch.eye(4)).item() == pytest.approx(np.log(4))
    assert von_neumann_entropy(torch.ones(6, 4)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [*DEFINITIONS, lejepa], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("case", ["zeros", "constant", "one pair", "fewer rows", "equal sides"])
def test_edges_are_finite_with_finite_gradients(loss, case):
    a, b = {
        "zeros": (torch.zeros(4, 3), torch.zeros(4, 3)),
        "constant": (torch.full((4, 3), 5.3), torch.full((4, 3), 5.3)),
        "one pair": sides(1, 3, dtype=torch.float32),
        "fewer rows": sides(2, 8, dtype=torch.float32),
        "equal sides": (sides(5, 3, dtype=torch.float32)[0],) * 2,
    }[case]
    a, b = (z.clone().requires_grad_() for z in (a, b))
    value = loss(a, b)
    value.backward()
    assert value.isfinite()
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()


def test_best_pairs():
    a = sides(200, 4)[0]
    assert info_nce(a, a) < info_nce(a, a.roll(1, 0))
    assert info_nce(a[:1], -a[:1]) == 0
    assert unshared_variance(a, a + 3).item() == pytest.approx(0, abs=1e-12)
    assert unshared_variance(a, a.flip(0)).item() == pytest.approx(1, abs=0.3)
    white = apply_affine(a, *fit_whitening(a))
    assert barlow_twins(white, white).item() == pytest.approx(0, abs=1e-6)
    assert vicreg(2 * white, 2 * white).item() == pytest.approx(0, abs=1e-6)


# ---- Post-hoc ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [200, 6])
def test_whitening_gives_the_identity_or_a_projector(n):
    z = sides(n, 9)[0]
    white = apply_affine(z, *fit_whitening(z))
    covariance = white.T @ white / n
    rank = min(n - 1, 9)
    assert torch.linalg.eigvalsh(covariance)[-rank:].numpy() == pytest.approx(np.ones(rank))
    assert covariance.trace().item() == pytest.approx(rank)
    assert white.mean(0).abs().max() < 1e-10


def test_whitening_leaves_what_rounding_fills_alone():
    z = torch.nn.functional.layer_norm(sides(100, 6, dtype=torch.float32)[0], (6,)) + 100
    white = apply_affine(z, *fit_whitening(z))
    assert white.dtype == torch.float32
    assert geometry_report(white)["total_variance"] == pytest.approx(5, rel=1e-3)
    assert apply_affine(torch.zeros(3, 4), *fit_whitening(torch.zeros(3, 4))).abs().max() == 0


def test_all_but_the_top():
    z = sides(100, 6)[0]
    values, vectors = np.linalg.eigh(np.cov(z.numpy().T))
    left = apply_affine(z, *fit_all_but_the_top(z, 2))
    assert (left @ torch.from_numpy(vectors[:, -2:].copy())).abs().max() < 1e-10
    assert np.sort(np.linalg.eigvalsh(np.cov(left.numpy().T)))[2:] == pytest.approx(values[:4])
    wide = torch.randn(50, 260)
    assert torch.linalg.matrix_rank(fit_all_but_the_top(wide)[1]) == 257  # d / 100 of them


# ---- The trainer ---------------------------------------------------------------------------------------------------


def arguments(tmp_path, **kwargs):
    options = {"max_steps": 3, "per_device_train_batch_size": 8, "subspace_dim": 3, "learning_rate": 1e-3}
    return DenseTrainingArguments(output_dir=str(tmp_path), **QUIET | options | kwargs)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def cohort():
    return make_notes(12, seed=0)


def test_total_is_mlm_and_the_pair_loss(tmp_path, tokenizer, cohort):
    model = make_model("bert", tokenizer)
    trainer = DenseTrainer(
        model,
        arguments(tmp_path, mlm_weight=0.5, dense_weight=2.0),
        train_dataset=cohort,
        processing_class=tokenizer,
        objective=BatchLoss(info_nce, name="pair_loss"),
    )
    trainer.train()
    for log in trainer.state.log_history[:-1]:
        assert log["loss"] == pytest.approx(0.5 * log["mlm_loss"] + 2 * log["pair_loss"], rel=1e-4)
        assert "spectral_spreading" not in log


def test_without_a_pair_loss_it_is_the_plain_trainer(tmp_path, tokenizer, cohort):
    found = []
    for objective in (None, BatchLoss(lambda a, b: 0 * a.sum())):
        model = make_model("bert", tokenizer)
        args = arguments(tmp_path, dense_weight=0.0 if objective is None else 1.0)
        DenseTrainer(model, args, train_dataset=cohort, processing_class=tokenizer, objective=objective).train()
        found.append(weights(model))
    assert torch.equal(*found)


def test_parameters_of_the_loss_are_trained(tmp_path, tokenizer, cohort):
    model = make_model("bert", tokenizer)
    loss = Expanded(vicreg, model.config.hidden_size, 16)
    before, start = weights(loss), weights(model.base_model)
    trainer = DenseTrainer(
        model,
        arguments(tmp_path, mlm_weight=0),
        train_dataset=cohort,
        processing_class=tokenizer,
        objective=BatchLoss(loss),
    )
    trainer.train()
    assert not torch.equal(before, weights(loss))
    assert not torch.equal(start, weights(model.base_model))
    assert not any("expander" in name for name in model.state_dict())


def test_accumulation_and_ranks_are_refused(tmp_path, tokenizer, cohort, monkeypatch):
    common = {"train_dataset": cohort, "processing_class": tokenizer, "objective": BatchLoss(info_nce)}
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 2"):
        DenseTrainer(make_model("bert", tokenizer), arguments(tmp_path, gradient_accumulation_steps=2), **common)
    monkeypatch.setattr(DenseTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="2 ranks"):
        DenseTrainer(make_model("bert", tokenizer), arguments(tmp_path), **common)


def test_supervised_learns_its_labels(tmp_path, tokenizer, cohort):
    labels = np.array([len(text) > np.median([len(one) for one in cohort["text"]]) for text in cohort["text"]]).astype(
        int
    )
    labels[::5] = -1
    trainer = SupervisedTrainer(
        make_model("bert", tokenizer, dropout=0.0),
        arguments(tmp_path, mlm_weight=0, dense_weight=1.0, max_steps=40, learning_rate=5e-3),
        train_dataset=cohort,
        processing_class=tokenizer,
        labels=labels,
        classes=2,
    )
    trainer.train()
    losses = [log["pair_loss"] for log in trainer.state.log_history[:-1]]
    assert losses[0] == pytest.approx(np.log(2), abs=0.2)
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


def test_classes_of_a_batch_are_those_of_its_rows(tmp_path, tokenizer, cohort):
    labels = np.arange(len(cohort))
    trainer = SupervisedTrainer(
        make_model("bert", tokenizer),
        arguments(tmp_path, mlm_weight=0),
        train_dataset=cohort,
        processing_class=tokenizer,
        labels=labels,
        classes=len(cohort),
    )
    pairs = trainer.train_dataset.pairs
    items = [(4, 7), (0, 1), (9, 2)]
    batch = trainer.data_collator(trainer.train_dataset.__getitems__(items))
    index = [pair for pair, _ in items]
    assert batch["classes"].tolist() == [*pairs.earlier[index], *pairs.later[index]]
    assert len(trainer.train_dataset) == len(pairs)


@pytest.mark.parametrize("labels", [[0, 1], None])
def test_labels_that_do_not_fit_are_refused(tmp_path, tokenizer, cohort, labels):
    labels = labels or [2] * len(cohort)
    with pytest.raises(ValueError, match="labels between -1 and 1"):
        SupervisedTrainer(
            make_model("bert", tokenizer),
            arguments(tmp_path, mlm_weight=0),
            train_dataset=cohort,
            processing_class=tokenizer,
            labels=labels,
            classes=2,
        )
