"""The loss for sentence-transformers' trainer: the gradient of `DenseTrainer` for the same batch, terms in the log."""

import pytest
import torch
from conftest import QUIET, make_model, make_trainer
from distributed_worker import Ranks, gradient_of_dense_loss
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from hf_densefeat import DenseObjective
from hf_densefeat.data.pairs import adjacent_pairs, pair_texts
from hf_densefeat.objective.expander import Expander
from hf_densefeat.training.sentence_loss import DenseLoss


@pytest.fixture
def folder(tmp_path, tokenizer):
    """An encoder without dropout, as a folder that both open."""
    make_model("bert", tokenizer, dropout=0.0).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_columns_of_texts(notes):
    """Row i holds the notes of pair i."""
    table, pairs = pair_texts(notes), adjacent_pairs(notes)
    assert table.column_names == ["earlier", "later"]
    assert table["later"][:] == [notes[int(row)]["text"] for row in pairs.later]


@pytest.mark.slow
def test_gradient_of_dense_trainer_for_the_same_batch(tmp_path, tokenizer, folder, notes, pairs):
    """All pairs in one batch, weights of the trainer; the anchor against a start that lies elsewhere."""
    settings = {"mlm_weight": 0.0, "dense_weight": 3.0, "lambda_pair": 0.3, "lambda_anchor": 3.0}
    trainer = make_trainer(tmp_path, tokenizer, pairs, dropout=0.0, per_device_train_batch_size=len(pairs), **settings)
    model = SentenceTransformer(str(folder), device="cpu")
    trainer.dense_model.load_state_dict(model[0].auto_model.state_dict(), strict=False)
    loss = DenseLoss(model, objective=trainer.args.dense_objective(), weight=3.0)
    generator = torch.Generator().manual_seed(0)
    theirs = dict(loss.start[0][0].auto_model.named_parameters())
    for name, parameter in trainer.start.base_model.named_parameters():
        moved = parameter + 0.05 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(moved)
        if name in theirs:
            theirs[name].copy_(moved)
    table = pair_texts(notes)
    features = [model.preprocess(list(table[name])) for name in ("earlier", "later")]
    values = loss(features)
    sum(values.values()).backward()
    batch = trainer.data_collator(trainer.train_dataset.__getitems__(list(range(len(pairs)))))
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    assert sum(values.values()).item() == pytest.approx(expected.item(), rel=1e-5)
    assert set(values) == {
        "spectral_spreading",
        "subspace_consistency",
        "orthogonality",
        "unshared_variance",
        "anchor",
    }
    ours = {n: p.grad for n, p in trainer.dense_model.base_model.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in model[0].auto_model.named_parameters() if p.grad is not None}
    assert ours.keys() == found.keys()
    difference = sum((found[n] - ours[n]).square().sum() for n in ours).sqrt()
    assert difference < 1e-5 * sum(g.square().sum() for g in ours.values()).sqrt()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("cuts", [(17, 30), (8, 9, 30)], ids=["2 processes", "3 processes"])
def test_several_processes_have_the_gradient_of_all_their_pairs(folder, notes, cuts):
    """The mean over processes of uneven parts, as DDP takes it, is the gradient of the whole batch, with the anchor."""
    table = pair_texts(notes).select(range(30))
    texts = list(table["earlier"]), list(table["later"])
    expected = gradient_of_dense_loss(str(folder), texts, (30,))
    ranks = Ranks(len(cuts))
    try:
        found = ranks.run(gradient_of_dense_loss, len(cuts), folder=str(folder), texts=texts, cuts=cuts)
    finally:
        ranks.stop()
    for own in found:
        difference = sum((own[name] - value).square().sum() for name, value in expected.items()).sqrt()
        assert difference < 1e-5 * sum(value.square().sum() for value in expected.values()).sqrt()


@pytest.mark.slow
def test_in_their_trainer(tmp_path, folder, notes):
    """Terms are in the log and add up, evaluation leaves the running state, and the default is that of a contrastive start."""
    model = SentenceTransformer(str(folder), device="cpu")
    args = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"),
        max_steps=3,
        per_device_train_batch_size=20,
        eval_strategy="steps",
        eval_steps=2,
        **QUIET,
    )
    loss = DenseLoss(model, objective=DenseObjective(subspace_dim=3, window="auto", terms={"anchor": 1.0}), weight=2.0)
    table = pair_texts(notes)
    SentenceTransformerTrainer(model, args, train_dataset=table, eval_dataset=table, loss=loss).train()
    assert DenseLoss(model).objective.terms["anchor"][0] > 0
    assert DenseLoss(model).start
    with pytest.raises(ValueError, match="two columns"):
        loss([{}])
    with pytest.raises(ValueError, match="trains nothing beside the model"):
        DenseLoss(model, objective=DenseObjective(expander=Expander(24, 24)))
