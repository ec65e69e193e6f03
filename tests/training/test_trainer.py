"""The trainer: exact under accumulation, equal to the stock one where that is right; its terms, logs and evaluation."""

import math

import pytest
import torch
from conftest import LAMBDA_ORTH, LAMBDA_SUB, QUIET, K, logs, make_model, make_notes, make_trainer
from transformers import AutoModelForMaskedLM, BertModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_densefeat import DenseObjective, DenseTrainer
from hf_densefeat.models.dense import as_dense

# ---- Accumulation ----


class Recorder(DenseTrainer):
    """Keeps of every update its micro-batches, the random state before them, and the gradients before the step."""

    def get_batch_samples(self, *args, **kwargs):
        self.updates = getattr(self, "updates", [])
        out = super().get_batch_samples(*args, **kwargs)
        self.updates.append({"micro_batches": out[0], "random": None})
        return out

    def training_step(self, *args, **kwargs):
        if self.updates[-1]["random"] is None:
            self.updates[-1]["random"] = torch.get_rng_state()
        return super().training_step(*args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        self.updates[-1]["gradients"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return super()._get_grad_norm(model, grad_norm)


def recorded(folder, tokenizer, pairs, objective=None, **kwargs):
    """The updates of one epoch, with a learning rate of 0 so that all are of the same weights."""
    settings = {"learning_rate": 0.0, "optim": "sgd", "max_grad_norm": 0.0}
    extra = {"objective": objective}
    trainer = make_trainer(folder, tokenizer, pairs, cls=Recorder, extra=extra, **settings, **kwargs)
    if trainer.start is not None:  # as if training had come some way
        generator = torch.Generator().manual_seed(0)
        for parameter in trainer.start.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    trainer.train()
    return trainer


def distance(found, expected):
    """Norm of the difference of all gradients together, relative to the expected norm."""
    assert found.keys() == expected.keys()
    difference = sum((found[n].double() - expected[n].double()).square().sum() for n in found).sqrt()
    return float(difference / sum(g.double().square().sum() for g in expected.values()).sqrt())


# 45 pairs: updates of 32 and 13 pairs, the second in windows of 1, 1, 2 and 4 with one pair in the last
EVEN = [(32, 1), (16, 2), (8, 4), (4, 8)]
# updates of 24 and 21 pairs: 12 + 9, 8 + 8 + 5, 5 windows of 5 of which the last has 1 after 20
UNEVEN = [(24, 1), (12, 2), (8, 3), (3, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("cuts", [EVEN, UNEVEN], ids=["32", "24"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"window": "none", "power_iterations": 0, "unbiased": True, "center": False, "lambda_anchor": 3.0}],
)
def test_gradients_do_not_depend_on_the_cut(tmp_path, tokenizer, pairs, family, cuts, settings):
    """Without dropout every cut of an update, short last windows included, gives the gradients of the whole to 1e-5."""
    runs = [
        recorded(
            tmp_path,
            tokenizer,
            pairs,
            family=family,
            dropout=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            **settings,
        )
        for size, accumulation in cuts
    ]
    whole = runs[0]
    assert len(whole.updates) == 2
    for run, (size, _) in zip(runs, cuts, strict=True):
        sizes = [[int(batch["num_pairs"]) for batch in update["micro_batches"]] for update in run.updates]
        assert sum(sizes[1]) == 45 - sum(sizes[0])
        assert len(sizes[1]) == math.ceil(sum(sizes[1]) / size)
        for update, expected in zip(run.updates, whole.updates, strict=True):
            assert distance(update["gradients"], expected["gradients"]) < 1e-5
        for entry, expected in zip(logs(run), logs(whole), strict=True):
            for name in ("loss", "mlm_loss", "spectral_spreading", "subspace_consistency", "orthogonality", "trace"):
                assert entry[name] == pytest.approx(expected[name], rel=2e-5, abs=1e-6)


def paper_loss(z_a, z_b):
    """The paper's formulas on Z itself, each side about its mean, differentiated by autograd through the SVD."""
    z_a, z_b = (z.double() - z.double().mean(0) for z in (z_a, z_b))
    z, d = torch.cat([z_a, z_b]), z_a.shape[1]
    sigma = z.mT @ z / len(z)
    spectral = (sigma / sigma.trace() - torch.eye(d) / d).square().sum()
    k = min(K, len(z_a) - 1)  # centred rows have no more directions
    tops = [torch.linalg.svd(x, full_matrices=False).Vh[:k].mT for x in (z_a, z_b)]
    subspace = (tops[0] @ tops[0].mT - tops[1] @ tops[1].mT).square().sum()
    columns = z / z.std(0, correction=0)
    orthogonal = (columns.mT @ columns / len(z) - torch.eye(d)).square().sum()
    return spectral + LAMBDA_SUB * subspace + LAMBDA_ORTH * orthogonal


def reference_gradients(trainer, update):
    """Of the whole update with all graphs kept, and of the naive mean over micro-batches, from the same forwards."""
    model = trainer.model.train()
    state = torch.get_rng_state()
    torch.set_rng_state(update["random"])
    forwards = [trainer.embed_pairs(model, batch) for batch in update["micro_batches"]]
    torch.set_rng_state(state)
    sides = [(made.z_a, made.z_b) for made in forwards]
    counts = [(batch["labels"] != -100).sum() for batch in update["micro_batches"]]
    whole = paper_loss(*(torch.cat(side) for side in zip(*sides, strict=True))) + sum(
        made.mlm for made in forwards
    ) / sum(counts)
    naive = sum(paper_loss(*side) for side in sides)
    naive = naive + sum(made.mlm / count for made, count in zip(forwards, counts, strict=True))
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return [
        {n: torch.zeros_like(named[n]) if g is None else g for n, g in zip(named, grads, strict=True) if g is not None}
        for grads in (
            torch.autograd.grad(loss, named.values(), retain_graph=True, allow_unused=True)
            for loss in (whole, naive / len(sides))
        )
    ]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("size", "accumulation"), [*EVEN, (8, 3), (7, 5)])
def test_gradients_with_dropout_equal_one_graph_of_all_micro_batches(
    tmp_path, tokenizer, pairs, family, size, accumulation, dtype, tolerance
):
    """With dropout the gradients are those of one backward through the paper's loss on all rows: 1e-5, 1e-10 in fp64."""
    objective = DenseObjective(
        lambda_sub=LAMBDA_SUB, lambda_orth=LAMBDA_ORTH, subspace_dim=K, center=True, broadening=0.0
    )
    trainer = recorded(
        tmp_path,
        tokenizer,
        pairs,
        objective,
        model=make_model(family, tokenizer).to(dtype),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        window="none",
        power_iterations=0,
    )
    # the first update has full windows; the second may be short
    update = trainer.updates[0]
    assert len(update["micro_batches"]) == accumulation
    whole, naive = reference_gradients(trainer, update)
    assert distance(update["gradients"], whole) < tolerance
    if accumulation > 1:
        assert distance(naive, whole) > 1e-2, "the test would not see a missing window pass"
    other = reference_gradients(trainer, update | {"random": trainer.updates[1]["random"]})[0]
    assert distance(other, whole) > 1e-2, "dropout is not active"
    if dtype == torch.float64:  # in fp32 the exact projector of few rows has fewer digits, where a gap at k is small
        last = trainer.updates[-1]
        assert sum(int(batch["num_pairs"]) for batch in last["micro_batches"]) == 45 % (size * accumulation)
        assert distance(last["gradients"], reference_gradients(trainer, last)[0]) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_kept_graphs_have_the_gradients_of_replayed_forwards(tmp_path, tokenizer, pairs, family):
    """With dropout: the same draws in the same order, one forward a micro-batch in place of two."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "family": family}
    replayed = recorded(tmp_path, tokenizer, pairs, **settings)
    kept = recorded(tmp_path, tokenizer, pairs, keep_graphs=True, **settings)
    for x, y in zip(replayed.updates[:1], kept.updates[:1], strict=True):
        assert distance(y["gradients"], x["gradients"]) < 1e-5
    for x, y in zip(logs(replayed)[:1], logs(kept)[:1], strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-5)
    assert len(kept.updates) == len(replayed.updates)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer, pairs):
    """With dropout and accumulation the gradients are the same with gradient checkpointing."""
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    plain = recorded(tmp_path, tokenizer, pairs, **settings)
    kept = recorded(tmp_path, tokenizer, pairs, gradient_checkpointing=True, **settings)
    for x, y in zip(plain.updates, kept.updates, strict=True):
        assert distance(y["gradients"], x["gradients"]) < 1e-5


def test_moments_are_all_that_an_update_keeps(tmp_path, tokenizer, pairs, monkeypatch):
    """Under accumulation the objective is called once an update, with the moments of all its pairs."""
    calls = []
    gradient = DenseObjective.gradient

    def counted(self, pair):
        calls.append((float(pair.a.count), float(pair.b.count)))
        return gradient(self, pair)

    monkeypatch.setattr(DenseObjective, "gradient", counted)
    make_trainer(tmp_path, tokenizer, pairs, per_device_train_batch_size=4, gradient_accumulation_steps=4).train()
    assert calls == [(16, 16), (16, 16), (13, 13)]


# ---- Beside the stock Trainer ----


@pytest.mark.slow
def test_without_dense_weight_it_is_the_stock_trainer(tmp_path, tokenizer, pairs):
    """dense_weight 0: weights after two epochs equal those of transformers' Trainer on the same batches, accumulated.

    Without dropout: see below.
    """
    common = {"learning_rate": 1e-3, "num_train_epochs": 2, "gradient_accumulation_steps": 3}
    ours = make_trainer(
        tmp_path,
        tokenizer,
        pairs,
        family="modernbert",
        dropout=0.0,  # rows are grouped by length, so that dropout draws other numbers
        dense_weight=0.0,
        per_device_train_batch_size=4,
        **common,
    )
    model = AutoModelForMaskedLM.from_config(ours.model.config)
    model.load_state_dict(ours.model.state_dict())
    args = TrainingArguments(str(tmp_path), **QUIET, seed=3, per_device_train_batch_size=4, **common)

    class Stock(Trainer):
        def get_train_dataloader(self):
            loader = ours.get_train_dataloader()
            collate = loader.collate_fn
            loader.collate_fn = lambda rows: {
                n: v for n, v in collate(rows).items() if n not in ("num_pairs", "lengths")
            }
            return loader

    stock = Stock(model, args)
    for trainer in (ours, stock):
        set_seed(7)
        trainer.train()
    assert ours.state.global_step == stock.state.global_step == 8
    for (name, x), y in zip(ours.model.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=name)
    for x, y in zip(logs(ours), logs(stock), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert x["loss"] == pytest.approx(x["mlm_loss"], rel=1e-5)
        assert "spectral_spreading" not in x


# ---- Logs and evaluation ----


def weighted_sum(entry, mlm_weight, dense_weight, prefix=""):
    dense = entry[prefix + "spectral_spreading"] + LAMBDA_SUB * entry[prefix + "subspace_consistency"]
    dense += LAMBDA_ORTH * entry[prefix + "orthogonality"]
    return mlm_weight * entry[prefix + "mlm_loss"] + dense_weight * dense


@pytest.mark.slow
@pytest.mark.parametrize(("size", "accumulation", "steps"), [(16, 1, 1), (4, 2, 4), (3, 3, 2)])
def test_logged_terms_add_up_to_the_loss(tmp_path, tokenizer, pairs, size, accumulation, steps):
    """The weighted terms of each log entry add up to its `loss`, over several updates, and again in a second run."""
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        pairs,
        mlm_weight=0.7,
        dense_weight=2.5,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        logging_steps=steps,
        num_train_epochs=2,
        learning_rate=1e-3,
    )
    for _ in range(2):
        trainer.train()
        entries = logs(trainer)
        assert len(entries) == trainer.state.max_steps // steps
        for entry in entries:
            assert entry["loss"] == pytest.approx(weighted_sum(entry, 0.7, 2.5), rel=1e-5)
            assert 1 <= entry["effective_rank"] <= 24
            assert 0 <= entry["padding_waste"] < 1
            assert entry["skipped_updates"] == 0
            assert {"trace", "gap", "subspace_rank", "grad_norm", "learning_rate"} <= entry.keys()


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path, tokenizer, pairs):
    """Terms, loss and effective rank of an evaluation set are the same in batches of 4, 7 and 45, and add up."""
    results = []
    for size in (45, 7, 4):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            pairs,
            extra={"eval_dataset": pairs},
            per_device_eval_batch_size=size,
            dense_weight=2.0,
        )
        trainer.model.train()
        results.append({n: v for n, v in trainer.evaluate().items() if "per_second" not in n and "time" not in n})
    assert results[0]["eval_loss"] == pytest.approx(weighted_sum(results[0], 1.0, 2.0, "eval_"), rel=1e-6)
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=2e-5)


def test_evaluation_is_the_objective_of_the_whole_set(tmp_path, tokenizer, pairs):
    """The eval terms are those of `DenseObjective` on the embeddings of all masked pairs, without dropout."""
    trainer = make_trainer(tmp_path, tokenizer, pairs, extra={"eval_dataset": pairs}, per_device_eval_batch_size=7)
    metrics = trainer.evaluate()
    model, sides = trainer.model.eval(), []
    for batch in trainer.get_eval_dataloader():
        z = model.encode({n: batch[n] for n in ("input_ids", "attention_mask")})
        sides.append(z.chunk(2))
    terms = DenseObjective(lambda_sub=LAMBDA_SUB, lambda_orth=LAMBDA_ORTH, subspace_dim=K, center=True)(
        *(torch.cat(s) for s in zip(*sides, strict=True))
    )
    for name in ("spectral_spreading", "subspace_consistency", "orthogonality"):
        assert metrics[f"eval_{name}"] == pytest.approx(terms[name].item(), rel=1e-4)


def test_notes_are_counted_and_paired_by_the_trainer(tmp_path, tokenizer):
    """Notes go in as they are; pairs, tokens and what was cut are counted for each split."""
    trainer = make_trainer(
        tmp_path, tokenizer, make_notes(), extra={"eval_dataset": {"held": make_notes(4, seed=9)}}, max_length=16
    )
    assert len(trainer.train_dataset) == 45
    assert trainer.reading_stats["train"].truncated > 0
    assert trainer.reading_stats["held"].max_length == 16
    assert "eval_held_loss" in trainer.evaluate()


# ---- Batches that are not finite ----


class Weights(TrainerCallback):
    """Keeps the weights after every update."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append(torch.cat([p.detach().flatten() for p in model.parameters()]))


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("bad", [0, 2])
def test_non_finite_update_is_skipped(tmp_path, tokenizer, pairs, max_grad_norm, accumulation, bad):
    """A NaN in one micro-batch leaves the weights of that update as they are, is counted, and training goes on."""
    weights = Weights()
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        pairs,
        extra={"callbacks": [weights]},
        max_grad_norm=max_grad_norm,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        weight_decay=0.1,
    )
    calls = []

    def poison(module, args, output):
        if trainer.state.global_step == bad:
            calls.append(1)
            # the last micro-batch alone, in both passes over an accumulated update
            return output * math.nan if len(calls) % accumulation == 0 else output
        return None

    start = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    trainer.model.bert.embeddings.register_forward_hook(poison)
    trainer.train()
    steps = [start, *weights.after]
    assert len(weights.after) == 6
    for i in range(6):
        assert torch.equal(steps[i], steps[i + 1]) == (i == bad), i
    assert steps[-1].isfinite().all()
    assert trainer.update_log.skipped == 1
    assert [entry["skipped_updates"] for entry in logs(trainer)] == [int(i >= bad) for i in range(6)]
    assert all(value.isfinite().all() for value in trainer.objective.state_dict().values())
    for i, entry in enumerate(logs(trainer)):
        if i != bad:
            assert entry["loss"] == pytest.approx(weighted_sum(entry, 1, 1), rel=1e-5), i


def test_updates_that_are_never_finite_are_an_error(tmp_path, tokenizer, pairs, monkeypatch):
    """A run that trains nothing does not go on for days."""
    monkeypatch.setattr("hf_densefeat.training.update.MAXIMUM_SKIPPED", 3)
    trainer = make_trainer(tmp_path, tokenizer, pairs, max_steps=6)
    trainer.model.bert.embeddings.register_forward_hook(
        lambda module, args, output: output * math.nan if trainer.state.global_step != 1 else None
    )
    with pytest.raises(RuntimeError, match="3 updates in a row had a gradient that is not finite, up to step 5"):
        trainer.train()


# ---- Either loss alone ----


@pytest.mark.parametrize("accumulation", [1, 2])
def test_dense_alone_freezes_the_head_and_trains_the_body(tmp_path, tokenizer, pairs, accumulation):
    """mlm_weight 0: no parameter of the head moves, the body does, and the log has no mlm_loss."""
    trainer = make_trainer(
        tmp_path, tokenizer, pairs, mlm_weight=0.0, learning_rate=1e-2, gradient_accumulation_steps=accumulation
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if name.startswith("cls."):
            assert torch.equal(parameter, before[name]), name
            assert not parameter.requires_grad
    assert any(
        not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n.startswith("bert.encoder")
    )
    for entry in logs(trainer):
        assert "mlm_loss" not in entry
        assert entry["loss"] == pytest.approx(weighted_sum(entry | {"mlm_loss": 0}, 0, 1), rel=1e-5)


@pytest.mark.slow
def test_dense_alone_needs_no_head_and_raises_the_rank(tmp_path, tokenizer, pairs):
    """A bare BertModel trains with mlm_weight 0, and its effective rank on the evaluation set rises."""
    model = as_dense(BertModel(make_model("bert", tokenizer, 0.0).config, add_pooling_layer=False))
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        pairs,
        model=model,
        extra={"eval_dataset": pairs},
        mlm_weight=0.0,
        learning_rate=3e-3,
        lambda_sub=0.003,  # the default: at 0.1 L_sub wins over L_spec here
        lambda_orth=0.0,
        num_train_epochs=15,
    )
    before = trainer.evaluate()["eval_effective_rank"]
    trainer.train()
    assert trainer.evaluate()["eval_effective_rank"] > 1.2 * before


def test_bfloat16_autocast_keeps_the_objective_in_float32(tmp_path, tokenizer, pairs):
    """With bf16=True the running state is float32 and the terms of the first update are near the float32 run's."""
    entries = []
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, tokenizer, pairs, bf16=bf16, dropout=0.0, gradient_accumulation_steps=2)
        trainer.train()
        assert {value.dtype for value in trainer.objective.state_dict().values()} == {torch.float32}
        entries.append(logs(trainer)[0])
    for name in ("mlm_loss", "spectral_spreading", "orthogonality"):
        assert entries[1][name] == pytest.approx(entries[0][name], rel=0.05)
