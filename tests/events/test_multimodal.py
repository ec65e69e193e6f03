"""A note and the values of one episode in one embedding: missing sides, masks of both, and training."""

import importlib
import json
import sys
from pathlib import Path

import conftest
import datasets
import numpy as np
import pytest
import torch
from conftest import WORDS, make_window_trainer
from transformers import AutoModel, BertConfig, set_seed

from hf_densefeat import AutoDenseModel, ProbeEvaluator, ProbeTask, adjacent_pairs
from hf_densefeat.events import (
    EventConfig,
    EventProcessor,
    MultimodalConfig,
    MultimodalModelForMaskedPrediction,
    MultimodalPairCollator,
    MultimodalProcessor,
    pack_episodes,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
INPUTS = ("input_ids", "event_ids", "quantiles", "hours", "attention_mask")


def make_episodes(patients=20, seed=0):
    """Three episodes a patient: every fourth without its note, every fifth without its values."""
    rng = np.random.default_rng(seed)
    table = {"patient_id": [], "time": [], "text": [], "sick": []}
    for patient in range(patients):
        for day in range(3):
            row = 3 * patient + day
            n = 0 if row % 5 == 4 else int(rng.integers(3, 9))
            value = 2 * (patient % 2) - 1 + 0.2 * rng.normal(size=n)
            words = ["sepsis" if patient % 2 else "stable", *rng.choice(WORDS, rng.integers(3, 12))]
            note = None if row % 4 == 3 and n else " ".join(words)
            table["patient_id"].append(patient)
            table["time"].append(float(day))
            code, hours = rng.choice(["HR", "K", "pH"], n), rng.random(n) * 24
            table["text"] += pack_episodes(np.zeros(n, int), code, value, hours, [note])
            table["sick"].append(patient % 2)
    return datasets.Dataset.from_dict(table)


@pytest.fixture(scope="module")
def episodes():
    return make_episodes()


@pytest.fixture(scope="module")
def processor(episodes, tokenizer):
    return MultimodalProcessor(tokenizer, EventProcessor.fit(episodes["text"][:]))


def make_model(processor, dropout=0.1, text_width=24):
    set_seed(0)
    text = BertConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=text_width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    events = EventConfig.of(processor.events, **sizes, dropout=dropout)
    return MultimodalModelForMaskedPrediction(MultimodalConfig(text_config=text, event_config=events))


def episode(text=None, *events):
    return json.dumps({"events": [list(event) for event in events]} | ({"text": text} if text else {}))


NOTE, VALUES = "chest pain stable", (("HR", 0.5, 1.0), ("K", -1.0, 2.0))


def test_either_side_may_be_missing(processor):
    """A note alone, values alone and both have embeddings, all different; batches and padding change nothing."""
    model = make_model(processor)
    texts = [episode(NOTE), episode(None, *VALUES), episode(NOTE, *VALUES), episode("fever", *VALUES)]
    z = model.encode(texts, processor)
    assert z.shape == (4, 24)
    assert torch.isfinite(z).all()
    assert (torch.cdist(z, z) + torch.eye(4) > 0.01).all()
    for i, text in enumerate(texts):
        torch.testing.assert_close(model.encode([text], processor)[0], z[i], atol=1e-5, rtol=0)
    wide = [episode(" ".join(WORDS[:20]), *[("pH", 0.0, float(hour)) for hour in range(20)])]
    torch.testing.assert_close(model.encode(texts + wide, processor)[:4], z, atol=1e-5, rtol=0)


def test_a_missing_side_is_not_seen(processor):
    """What stands at the positions of a missing side has no influence: neither other embeddings nor other weights."""
    model = make_model(processor).eval()
    batch = processor.pad(processor.rows([episode(NOTE), episode(None, *VALUES)]))
    z = model.encode(batch)
    other = {name: values.clone() for name, values in batch.items()}
    other["event_ids"][0], other["quantiles"][0], other["hours"][0], other["input_ids"][1] = 1, 0.9, 7.0, 9
    torch.testing.assert_close(model.encode(other), z, atol=1e-6, rtol=0)


def test_a_width_of_its_own_for_the_text(processor):
    """A text encoder of another width goes through a linear map."""
    model = make_model(processor, text_width=32)
    assert model.encode([episode(NOTE, *VALUES)], processor).shape == (1, 24)
    batch = processor.pad(processor.rows([episode(NOTE, *VALUES)]))
    assert model(**batch).logits.shape[-1] == max(len(processor.tokenizer), processor.events.bins)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"events": []}', "Episode 1 has neither a note nor an event of a known code"),
        ('{"events": [], "text": "  "}', "Episode 1 has neither"),
        ('{"events": [["new", 1.0, 1.0]]}', "Episode 1 has neither"),
        ("a note", "Episode 1: expected JSON"),
    ],
)
def test_episodes_with_nothing_are_refused(processor, bad, message):
    """Both sides missing is an error that names the episode."""
    with pytest.raises(ValueError, match=message):
        processor.rows([episode(NOTE), bad])


def test_save_and_load(episodes, processor, tmp_path):
    """One folder holds weights, tokenizer and quantiles, and opens with equal embeddings."""
    model, texts = make_model(processor), episodes["text"][:8]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= names
    assert not names & {"modules.json", "sentence_bert_config.json"}
    z = model.encode(texts, processor)
    again = AutoDenseModel.from_pretrained(str(tmp_path))
    assert type(again) is MultimodalModelForMaskedPrediction
    assert torch.equal(again.encode(texts), z)
    assert torch.equal(AutoModel.from_pretrained(tmp_path).encode(texts, processor), z)


def test_text_encoder_of_a_checkpoint(tokenizer, processor, tmp_path):
    """The note's side can begin with trained weights of any family with an MLM head."""
    text = conftest.make_model("modernbert", tokenizer)
    text.save_pretrained(tmp_path)
    model = MultimodalModelForMaskedPrediction.from_text_encoder(
        str(tmp_path), make_model(processor).config.event_config
    )
    ours, theirs = model.encoder.text.state_dict(), text.base_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert model.encode([episode(NOTE, *VALUES), episode(None, *VALUES)], processor).shape == (2, 24)


def test_every_weight_is_trained(episodes, processor):
    """No parameter is without gradient: data-parallel training would stop at one."""
    pairs, _ = processor.pairs(episodes, adjacent_pairs(episodes))
    batch, model = MultimodalPairCollator(processor)(pairs.__getitems__([0, 1, 2, 3])), make_model(processor)
    logits = model(**{name: batch[name] for name in INPUTS}).logits
    torch.nn.functional.cross_entropy(
        logits[batch["labels"] != -100], batch["labels"][batch["labels"] != -100]
    ).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_masks_of_both_sides(episodes, processor):
    """Labels are tokens in the note's part, bins in the values' part; what is masked is not in the batch."""
    pairs, _ = processor.pairs(episodes, adjacent_pairs(episodes))
    collator = MultimodalPairCollator(processor, mask_probability=0.5)
    batch = collator(pairs.__getitems__([(i, i) for i in range(8)]))
    assert batch.pop("num_pairs") == 8
    labels, tokens = batch.pop("labels"), batch["input_ids"].shape[1]
    assert labels.shape == batch["attention_mask"].shape == (16, tokens + batch["event_ids"].shape[1])
    assert (labels[batch["attention_mask"] == 0] == -100).all()
    assert ((labels[:, tokens:] >= 0) == (batch["quantiles"] < 0)).all()
    assert (labels[:, :tokens] >= 0).any()
    assert labels[:, tokens:].max() < processor.events.bins
    logits = make_model(processor)(**batch).logits
    chosen = logits[labels != -100].log_softmax(-1).gather(1, labels[labels != -100][:, None])
    assert torch.isfinite(chosen).all()
    assert chosen.min() > -10
    assert (logits[:, tokens:].softmax(-1)[..., processor.events.bins :] == 0).all()


def test_masked_values_do_not_reach_the_logits(processor):
    """Whatever a masked value was, the logits are the same."""
    collator, model = MultimodalPairCollator(processor, mask_probability=0.5), make_model(processor).eval()
    [row], _ = processor.read([episode(NOTE, *VALUES, ("pH", 0.3, 3.0), ("HR", 0.1, 4.0))])
    pair = {"earlier": row, "later": row, "mask_seed": 3}
    batch = collator([pair])
    masked = batch["quantiles"][0] < 0
    assert masked.any()
    other = np.where(masked.numpy(), 1 - row["quantiles"], row["quantiles"])
    changed = collator([pair | {"earlier": row | {"quantiles": other}}])
    assert not torch.equal(batch["labels"], changed["labels"])
    logits = [model(**{name: b[name] for name in INPUTS}).logits for b in (batch, changed)]
    assert torch.equal(logits[0][0], logits[1][0])


def test_empty_share_of_a_rank(processor):
    """No pairs give two rows without labels, on which the model runs."""
    batch = MultimodalPairCollator(processor)([])
    assert batch.pop("num_pairs") == 0
    assert (batch.pop("labels") == -100).all()
    assert torch.isfinite(make_model(processor)(**batch).logits).all()


@pytest.mark.slow
def test_the_bundled_cohort_as_a_domain():
    """The study's small version: no test patient in training, sides that are missing, parts that go missing."""
    domain = importlib.import_module("domains.multimodal").load()
    assert len(domain.supervised) == domain.train.pairs.num_notes
    assert not {*domain.earlier, *domain.later} & {*domain.train_inputs}
    rows = domain.train.rows
    assert 0.05 < np.mean([len(row["input_ids"]) == 0 for row in rows]) < 0.15
    assert np.mean([len(row["event_ids"]) == 0 for row in rows]) > 0.15
    assert all(len(row["input_ids"]) + len(row["event_ids"]) > 0 for row in rows)
    assert domain.earlier[0] != (left := domain.degrade(domain.earlier[:50], 0.5, 0))[0]
    assert domain.encode(domain.make_model(0), left).shape == (50, 128)
    alone, values = (
        task.dataset.filter(lambda part: part == "test", input_columns="split")["text"] for task in domain.shift
    )
    assert all(not json.loads(text)["events"] and json.loads(text)["text"] for text in alone)
    assert all(json.loads(text)["events"] and not json.loads(text)["text"] for text in values)


@pytest.mark.slow
def test_training_lowers_the_loss_probes_and_saves(episodes, processor, tmp_path):
    """Episodes with and without each side train together; the saved folder embeds as the trained model does."""
    evaluator = ProbeEvaluator([ProbeTask("sick", episodes, "sick")], cache=False)
    options = {"max_steps": 40, "learning_rate": 5e-3, "dense_weight": 0.3, "logging_steps": 5}
    trainer = make_window_trainer(tmp_path, make_model(processor), episodes, processor, evaluator, **options)
    trainer.train()
    losses = [log["mlm_loss"] for log in trainer.state.log_history if "mlm_loss" in log]
    assert losses[-1] < losses[0] - 0.2
    assert trainer.evaluate()["eval_sick_auroc"] > 0.8
    trainer.save_model()
    again = AutoDenseModel.from_pretrained(str(tmp_path))
    torch.testing.assert_close(
        again.encode(episodes["text"][:5]), trainer.model.encode(episodes["text"][:5], processor)
    )
