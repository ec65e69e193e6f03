"""Options and data that the trainer refuses, each with what came, what is wrong and what to do."""

import pytest
from conftest import make_model, make_notes, make_trainer
from transformers import BertModel


def refusal(folder, tokenizer, notes, model=None, **settings):
    """The message with which the trainer refuses, before any training."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the callers look at the words)
        make_trainer(folder, tokenizer, notes, model=model, **settings)
    return str(error.value)


def test_model_without_a_head_is_refused(tmp_path, tokenizer, pairs):
    """What: mlm_weight without a head; where: the class; what to do: load by name or set mlm_weight=0."""
    model = BertModel(make_model("bert", tokenizer).config)
    message = refusal(tmp_path, tokenizer, pairs, model=model)
    for word in ("mlm_weight is 1.0", "BertModel has no language-modelling head", "from_pretrained", "mlm_weight=0"):
        assert word in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"subspace_dim": 24}, ("subspace_dim is 24", "16", "Lower subspace_dim")),
        (
            {"subspace_dim": 16, "window": "none"},
            ("subspace_dim is 16", "batch of 16", "rank 15", "raise the batch size"),
        ),
        (
            {"subspace_dim": 16, "window": None},
            ("subspace_dim is 16", "batch of 16", "rank 15", "raise the batch size"),
        ),
        ({"subspace_dim": 20, "window": "18"}, ("subspace_dim is 20", "window", "18", "rank 17")),
        ({"subspace_dim": 20, "window": 18}, ("subspace_dim is 20", "window", "18", "rank 17")),
        ({"pooling": "average"}, ("pooling", "mean, cls, last, max", "'average'")),
        ({"window": "sometimes"}, ("window", "'none', 'auto' or a number", "'sometimes'")),
        ({"mlm_weight": 0.0, "dense_weight": 0.0}, ("mlm_weight and dense_weight are both 0",)),
        ({"mlm_probability": 1.5}, ("mlm_probability", "[0, 1]", "1.5")),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, tokenizer, pairs, settings, words):
    """A k that the samples cannot support, an unknown pooling, window or weight: named, with what came and what to do."""
    message = refusal(tmp_path, tokenizer, pairs, **settings)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("compute_metrics", ("compute_metrics would never be called", "evaluator=", "evaluator(model, tokenizer)")),
        ("preprocess_logits_for_metrics", ("preprocess_logits_for_metrics would never be called", "evaluator=")),
        ("compute_loss_func", ("compute_loss_func would never be called", "override compute_loss")),
    ],
)
def test_functions_that_would_never_be_called_are_refused(tmp_path, tokenizer, pairs, name, words):
    """What the stock Trainer calls and this one does not is an error at once, not ignored."""
    message = refusal(tmp_path, tokenizer, pairs, extra={name: lambda *args: {}})
    for word in words:
        assert word in message, message


@pytest.mark.slow
def test_largest_k_that_the_batch_supports_is_taken(tmp_path, tokenizer, pairs):
    """One less than what is refused trains: k = 15 of 16 centred pairs, counting the accumulated batch."""
    make_trainer(tmp_path, tokenizer, pairs, subspace_dim=15, window="none").train()
    make_trainer(
        tmp_path,
        tokenizer,
        pairs,
        subspace_dim=15,
        window=None,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    ).train()


def test_notes_without_pairs_or_columns_are_refused(tmp_path, tokenizer):
    """Notes of single-note patients, and notes without a needed column, are refused with counts and names, no text."""
    notes = make_notes(patients=4)
    single = notes.add_column("row", range(len(notes))).filter(lambda r: r == 0 or r == 3, input_columns="row")
    message = refusal(tmp_path, tokenizer, single)
    for word in ("No pair of adjacent notes", "2 notes", "2 patients", "at least two notes"):
        assert word in message, message
    for name in ("patient_id", "time", "text"):
        message = refusal(tmp_path, tokenizer, notes.remove_columns(name))
        assert f"`{name}`" in message or f"'{name}'" in message, message
        assert notes[0]["text"][:20] not in message


def test_training_without_data_is_refused(tmp_path, tokenizer):
    """No train_dataset and no eval_dataset: each says which is needed."""
    trainer = make_trainer(tmp_path, tokenizer, None)
    with pytest.raises(ValueError, match="needs a train_dataset: notes with patient_id, time and text"):
        trainer.train()
    with pytest.raises(ValueError, match="needs an eval_dataset"):
        trainer.evaluate()


def test_a_frozen_model_is_refused_before_the_first_step(tmp_path, tokenizer, pairs):
    """Without a trainable parameter: the class, and what to do."""
    model = make_model("bert", tokenizer).requires_grad_(False)
    trainer = make_trainer(tmp_path, tokenizer, pairs, model=model)
    with pytest.raises(ValueError, match=r"No parameter of BertForMaskedLM is trainable.*peft_config"):
        trainer.train()


def test_predict_says_what_to_call_instead(tmp_path, tokenizer, pairs):
    """One sentence with `evaluate` and `encode`."""
    with pytest.raises(ValueError, match=r"trainer.evaluate.*dense_model.encode"):
        make_trainer(tmp_path, tokenizer, pairs).predict(pairs)
