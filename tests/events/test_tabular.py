"""Episodes of timed values: reading, padding, masks, the encoder, and training with `DenseTrainer`."""

import importlib
import json
import math
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import make_window_trainer
from transformers import AutoModel, set_seed

from hf_densefeat import AutoDenseModel, ProbeEvaluator, ProbeTask, adjacent_pairs
from hf_densefeat.events import (
    EpisodePairCollator,
    EventConfig,
    EventModelForMaskedValues,
    EventProcessor,
    event_episodes,
    latest_of_each,
    pack_episodes,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
CODES = ("HR", "K", "Lactate", "Na", "pH")


def make_episodes(patients=20, seed=0):
    """Three episodes a patient of 4 to 15 events; all values of a patient are near one number, positive in the sick."""
    rng = np.random.default_rng(seed)
    table = {"patient_id": [], "time": [], "text": [], "sick": []}
    for patient in range(patients):
        for day in range(3):
            n = rng.integers(4, 16)
            code = rng.choice(CODES, n)
            value = (1 + patient / patients) * (2 * (patient % 2) - 1) + 0.2 * rng.normal(size=n)
            table["patient_id"].append(patient)
            table["time"].append(float(day))
            table["text"] += pack_episodes(np.zeros(n, int), code, value, rng.random(n) * 24, 1)
            table["sick"].append(patient % 2)
    return datasets.Dataset.from_dict(table)


@pytest.fixture(scope="module")
def episodes():
    return make_episodes()


@pytest.fixture(scope="module")
def processor(episodes):
    return EventProcessor.fit(episodes["text"][:])


def make_model(processor, dropout=0.1):
    set_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return EventModelForMaskedValues(EventConfig.of(processor, **sizes, dropout=dropout))


def episode(*events):
    return json.dumps({"events": [list(event) for event in events]})


# ---- Episodes -----------------------------------------------------------------------------------------------------


def test_pack_episodes_sorts_by_time_and_keeps_empty_ones():
    """Events of an episode come in the order of their hours; an episode may have none, and a note beside them."""
    packed = pack_episodes([2, 0, 2], ["a", "b", "c"], [1, 2, 3], [5.0, 0.0, 1.0], ["note", None, None])
    assert [json.loads(text) for text in packed] == [
        {"events": [["b", 2.0, 0.0]], "text": "note"},
        {"events": []},
        {"events": [["c", 3.0, 1.0], ["a", 1.0, 5.0]]},
    ]


def test_pack_episodes_names_what_is_wrong():
    """NaN values, different lengths and unknown episodes are errors that say where and what to do."""
    with pytest.raises(
        ValueError, match=r"Column `value`, row 1: expected a finite number, got nan.*leave its row out"
    ):
        pack_episodes([0, 0], ["a", "b"], [1, math.nan], [0, 0], 1)
    with pytest.raises(ValueError, match="got 1, 1, 2 and 1"):
        pack_episodes([0], ["a"], [1, 2], [0], 1)
    with pytest.raises(ValueError, match="Expected episodes 0 to 0, got 1 to 1"):
        pack_episodes([1], ["a"], [1], [0], 1)


def test_event_episodes_cuts_by_time_since_the_first_event():
    """Episodes of 24 hours from the first event; an episode has the time of its last event; nulls are no events."""
    times = np.datetime64("2020-01-01T06", "us") + np.array([0, 30, 5, 0, 23], "timedelta64[h]")
    table = datasets.Dataset.from_dict(
        {
            "patient_id": ["q", "q", "q", "p", "p"],
            "time": times.tolist(),
            "code": ["K", "K", "Na", "K", "Na"],
            "value": [1.0, 2.0, 3.0, None, 5.0],
        }
    )
    found = event_episodes(table)
    assert found["patient_id"][:] == ["p", "q", "q"]
    assert found["time"][:] == [times[4].item(), times[2].item(), times[1].item()]
    assert [json.loads(text)["events"] for text in found["text"]] == [
        [["Na", 5.0, 0.0]],
        [["K", 1.0, 0.0], ["Na", 3.0, 5.0]],
        [["K", 2.0, 6.0]],
    ]
    with pytest.raises(ValueError, match="Expected a column `value`"):
        event_episodes(table.rename_column("value", "valuenum"))


def test_latest_of_each_code_first():
    """A lone early lactate outlives the earlier of two heart rates, whatever the order of the rows."""
    episode, code, hours = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 0, 0, 0]), np.array([9.0, 1.0, 5.0, 1.0, 2.0])
    assert set(latest_of_each(episode, code, hours, 2).tolist()) == {0, 1, 3, 4}
    assert set(latest_of_each(episode, code, hours, 1).tolist()) == {0, 4}


# ---- The processor -----------------------------------------------------------------------------------------------


def test_quantiles_are_mid_ranks():
    """Uniform values become their share; a value that half of the data have becomes the middle of its ranks; ends clip."""
    uniform = [episode(("a", value / 1000, 0.0), ("b", float(value >= 500), 0.0)) for value in range(1001)]
    processor = EventProcessor.fit(uniform)
    rows, _ = processor.read([episode(("a", 0.25, 1), ("a", -9, 2), ("a", 9, 3), ("b", 0, 4), ("b", 1, 5))])
    np.testing.assert_allclose(rows[0]["quantiles"], [0.25, 0.0, 1.0, 0.25, 0.75], atol=0.01)


def test_quantiles_come_from_training_alone(processor):
    """Reading other episodes changes nothing of the processor, and what it gives for an episode does not depend on others."""
    before, one = processor.to_json_string(), episode(("K", 0.3, 1.0))
    alone = processor.read([one])[0][0]
    beside = processor.read([episode(("K", 1e6, 1.0)), one])[0][1]
    assert processor.to_json_string() == before
    assert all(np.array_equal(alone[name], beside[name]) for name in alone)


def test_unknown_codes_and_events_over_the_limit_are_counted(processor, caplog):
    """Unknown codes are dropped with a warning, surplus events cut, and both are counted."""
    text = episode(("HR", 0, 1), ("HR", 0, 2), ("K", 0, 1), ("new", 0, 1))
    rows, stats = processor.read([text], max_length=2)
    assert (stats.events, stats.unknown, stats.cut) == (2, 1, 1)
    assert rows[0]["hours"].tolist() == [1.0, 2.0]
    processor.rows([text])
    assert "1 of unknown codes dropped" in caplog.text


def test_processor_round_trip(processor, tmp_path):
    """Saved as JSON and read again it is the same."""
    processor.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    assert EventProcessor.from_pretrained(tmp_path).to_json_string() == processor.to_json_string()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("a note", "Episode 1: expected JSON"),
        (None, "Episode 1: expected JSON"),
        ('{"events": [["K", 1.0]]}', "Episode 1: expected events of code, value and hours"),
        ('{"events": [["K", "high", 1.0]]}', "Episode 1: expected events of code, value and hours"),
        ('{"events": [["K", NaN, 1.0]]}', "Episode 1 has an event whose value or hours are not finite"),
        ('{"events": []}', "Episode 1 has no event of a known code"),
        ('{"events": [["new", 1.0, 1.0]]}', "Episode 1 has no event of a known code"),
    ],
)
def test_episodes_that_cannot_be_read(processor, bad, message):
    """Each error names the episode and says what was expected."""
    with pytest.raises(ValueError, match=message):
        processor.rows([episode(("K", 1.0, 1.0)), bad])


def test_one_window_instead_of_a_list(processor):
    """A lone string is refused."""
    with pytest.raises(ValueError, match="wrap it in a list"):
        processor.rows(episode(("K", 1.0, 1.0)))


def test_fit_without_events():
    """Nothing to fit on is an error."""
    with pytest.raises(ValueError, match="none in 1 episodes"):
        EventProcessor.fit(['{"events": []}'])


# ---- The encoder -------------------------------------------------------------------------------------------------


def test_encode_does_not_depend_on_padding_batch_or_order(episodes, processor):
    """Embeddings are of the episode alone; events of one time may come in any order."""
    model, texts = make_model(processor), episodes["text"][:]
    z = model.encode(texts, processor, batch_size=64)
    assert z.shape == (60, 24)
    torch.testing.assert_close(model.encode(texts, processor, batch_size=1), z, atol=1e-5, rtol=0)
    turned = [json.dumps({"events": json.loads(text)["events"][::-1]}) for text in texts]
    torch.testing.assert_close(model.encode(turned, processor), z, atol=1e-5, rtol=0)
    batch = processor.pad(processor.rows(texts[:4]))
    order = torch.randperm(batch["input_ids"].shape[1])
    shuffled = {name: values[:, order] for name, values in batch.items()}
    torch.testing.assert_close(model.encode(shuffled), z[:4], atol=1e-5, rtol=0)


def test_value_time_and_code_matter(processor):
    """Changing any one of an event's three parts changes the embedding."""
    model = make_model(processor)
    texts = [episode(("K", 0.0, 1.0)), episode(("K", 1.0, 1.0)), episode(("K", 0.0, 9.0)), episode(("Na", 0.0, 1.0))]
    z = model.encode(texts, processor)
    assert (torch.cdist(z, z) + torch.eye(4) > 0.01).all()


def test_masked_values_do_not_reach_the_logits(episodes, processor):
    """Whatever a masked value was, batch and logits are the same, but for its label."""
    pairs, _ = processor.pairs(episodes, adjacent_pairs(episodes))
    collator, model = EpisodePairCollator(processor, mask_probability=0.5), make_model(processor).eval()
    [pair] = pairs.__getitems__([(0, 7)])
    batch = collator([pair])
    masked = batch["labels"][0] != -100
    assert masked.any()
    other = pair["earlier"]["quantiles"].copy()
    place = masked[: len(other)].numpy()
    other[place] = 1 - other[place]
    changed = collator([pair | {"earlier": pair["earlier"] | {"quantiles": other}}])
    assert not torch.equal(batch["labels"], changed["labels"])
    inputs = [
        {name: b[name] for name in ("input_ids", "quantiles", "hours", "attention_mask")} for b in (batch, changed)
    ]
    assert torch.equal(model(**inputs[0]).logits, model(**inputs[1]).logits)


def test_labels_are_bins_and_padding_has_none(episodes, processor):
    """Labels are the quantile's bin where the value is masked, −100 elsewhere and at padding; rows keep their masks."""
    pairs, _ = processor.pairs(episodes, adjacent_pairs(episodes))
    collator = EpisodePairCollator(processor)
    batch = collator(pairs.__getitems__([(0, 1), (1, 2), (2, 3)]))
    assert batch["num_pairs"] == 3
    assert batch["input_ids"].shape[0] == 6
    assert ((batch["labels"] >= 0) == (batch["quantiles"] < 0)).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert batch["labels"].max() < processor.bins
    alone = collator(pairs.__getitems__([(1, 2)]))
    width = alone["labels"].shape[1]
    assert torch.equal(alone["labels"][0], torch.nn.functional.pad(batch["labels"][1], (0, 9))[:width])
    clean = EpisodePairCollator(processor, None)(pairs.__getitems__([(0, 1)]))
    assert (clean["labels"] == -100).all()
    assert (clean["quantiles"] >= 0).all()


def test_empty_share_of_a_rank(processor):
    """No pairs give two rows without labels, on which the model runs."""
    batch = EpisodePairCollator(processor)([])
    assert batch.pop("num_pairs") == 0
    assert (batch.pop("labels") == -100).all()
    assert make_model(processor)(**batch).logits.shape == (2, 1, processor.bins)


def test_save_and_load(episodes, processor, tmp_path):
    """The folder opens with AutoDenseModel and AutoModel, with equal embeddings, and without files for texts."""
    model, texts = make_model(processor), episodes["text"][:8]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    z = model.encode(texts, processor)
    again = AutoDenseModel.from_pretrained(str(tmp_path))
    assert type(again) is EventModelForMaskedValues
    assert torch.equal(again.encode(texts), z)
    assert torch.equal(AutoModel.from_pretrained(tmp_path).encode(texts, processor), z)


def test_weights_begin_as_said(processor):
    """Embeddings have variance 1, the value's and the time's maps their own, the layers the library's."""
    model = make_model(processor)
    embeddings = model.encoder.embeddings
    assert abs(embeddings.codes.weight.std() - 1) < 0.2
    assert abs(embeddings.value.weight.std() - 0.7) < 0.1
    assert abs(embeddings.time.weight.std() - 0.05) < 0.01
    assert abs(model.encoder.layers.layers[0].linear1.weight.std() - 0.02) < 0.005


def test_first_or_last_event_is_no_pooling(processor):
    """Pooling by place is refused."""
    with pytest.raises(ValueError, match="Expected pooling mean or max for events, got 'cls'"):
        EventModelForMaskedValues(EventConfig.of(processor, densefeat={"pooling": "cls"}))


@pytest.mark.slow
def test_the_bundled_cohort_as_a_domain():
    """The study's small version: no test patient in training, no event after a label, values that go missing go."""
    domain = importlib.import_module("domains.tabular").load()
    pairs, task = domain.train.pairs, domain.tasks[0]
    assert len(domain.supervised) == pairs.num_notes
    held_out = {p for p, part in zip(task.dataset["patient_id"], task.dataset["split"], strict=True) if part == "test"}
    assert len(held_out) == len(set(domain.patient.tolist())) == 64
    assert not {*domain.earlier, *domain.later} & {*domain.train_inputs}
    assert {type(text) for text in domain.earlier} == {str}
    events = [json.loads(text)["events"] for text in domain.earlier]
    assert all(0 <= hours <= 365 * 24 and len(found) <= 64 for found in events for _, _, hours in found)
    left = [json.loads(text)["events"] for text in domain.degrade(domain.earlier, 0.8, 0)]
    assert all(len(found) > 0 for found in left)
    assert 0.15 < sum(map(len, left)) / sum(map(len, events)) < 0.25
    assert domain.degrade(domain.earlier, 0.0, 0) == domain.earlier
    assert domain.encode(domain.make_model(0), domain.earlier[:3]).shape == (3, 128)
    assert torch.equal(
        domain.make_model(1).encoder.embeddings.codes.weight, domain.make_model(1).encoder.embeddings.codes.weight
    )


# ---- Training ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_lowers_the_loss_probes_and_saves(episodes, processor, tmp_path):
    """Episodes go in as notes do; the loss falls, the evaluator's probes come out, the folder holds model and processor."""
    evaluator = ProbeEvaluator([ProbeTask("sick", episodes, "sick")], cache=False)
    options = {"max_steps": 120, "learning_rate": 1e-2, "dense_weight": 0.3, "logging_steps": 20}
    trainer = make_window_trainer(tmp_path, make_model(processor), episodes, processor, evaluator, **options)
    trainer.train()
    losses = [log["mlm_loss"] for log in trainer.state.log_history if "mlm_loss" in log]
    assert abs(losses[0] - math.log(processor.bins)) < 0.2
    assert losses[-1] < losses[0] - 0.3
    assert trainer.reading_stats["train"].episodes == 60
    metrics = trainer.evaluate()
    assert metrics["eval_sick_auroc"] > 0.8
    assert math.isfinite(metrics["eval_loss"])
    trainer.save_model()
    z = trainer.model.encode(episodes["text"][:5], processor)
    torch.testing.assert_close(AutoDenseModel.from_pretrained(str(tmp_path)).encode(episodes["text"][:5]), z)


def test_card_runs_as_printed(episodes, processor, tmp_path, capsys):
    """The card tells of episodes, not of texts, and its code runs; a stream of episodes is refused."""
    model = make_model(processor)
    trainer = make_window_trainer(tmp_path, model, episodes, processor, max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "SentenceTransformer" not in card
    assert "sentence-transformers" not in card
    code = card.split("```python\n")[1].split("```")[0]
    exec(code.replace(f'"{tmp_path.name}"', f'"{tmp_path}"'), {})
    assert "torch.Size([2, 24])" in capsys.readouterr().out
    with pytest.raises(ValueError, match="EventProcessor cannot read a stream"):
        make_window_trainer(tmp_path, model, episodes.to_iterable_dataset(), processor)


def test_probes_are_cached(episodes, processor, tmp_path):
    """The evaluator's cache knows the processor: another one, or other weights, make another file."""
    model, task = make_model(processor), ProbeTask("sick", episodes, "sick")
    evaluator = ProbeEvaluator([task], bootstraps=0, cache=tmp_path)
    first = evaluator.evaluate(model, processor)["sick"].metrics["auroc"].value
    assert evaluator.evaluate(model, processor)["sick"].metrics["auroc"].value == first
    assert len(list(tmp_path.iterdir())) == 1
    evaluator.evaluate(model, EventProcessor.fit(episodes["text"][:40]))
    assert len(list(tmp_path.iterdir())) == 2
