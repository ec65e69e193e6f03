"""Notes longer than the window: read whole in chunks, the same in `encode` and in training, whatever the cut."""

import numpy as np
import pytest
import torch
from conftest import QUIET, make_model, make_notes
from peft import LoraConfig
from transformers import LlamaConfig, T5Config, T5EncoderModel

from hf_densefeat import AutoDenseModel, DenseTrainer, DenseTrainingArguments, adjacent_pairs
from hf_densefeat.data.collator import DensePairCollator
from hf_densefeat.data.tokens import TextProcessor
from hf_densefeat.models.dense import as_dense

WINDOW = 12
TEXTS = [*make_notes(patients=3)["text"][:6], "fever", "chest pain " * 30, ""]


def make_trainer(folder, tokenizer, model, dropout=0.0, **kwargs):
    settings = {"per_device_train_batch_size": 16, "max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 1e9}
    settings |= {"subspace_dim": 3, "long_notes": "chunk", "max_length": WINDOW}
    extra = {"peft_config": kwargs.pop("peft_config", None)}
    args = DenseTrainingArguments(str(folder), **QUIET | settings | kwargs)
    return DenseTrainer(model, args, train_dataset=make_notes(), processing_class=tokenizer, **extra)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_encode_is_the_mean_over_chunks_weighted_by_tokens(tokenizer, pooling):
    """By hand, chunk by chunk; texts that fit are as they were; no token of a long text is without effect."""
    model = make_model("bert", tokenizer, pooling=pooling)
    short = model.encode(TEXTS, tokenizer, max_length=WINDOW)
    as_dense(model, max_length=WINDOW, long_notes="chunk")
    z = model.encode(TEXTS, tokenizer, batch_size=4)
    assert z.shape == (len(TEXTS), 24)
    for i, text in enumerate(TEXTS):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        chunks = [[2, *ids[j : j + WINDOW - 2], 3] for j in range(0, max(len(ids), 1), WINDOW - 2)]
        rows = [
            model.encode({"input_ids": torch.tensor([c]), "attention_mask": torch.ones(1, len(c))}) for c in chunks
        ]
        expected = sum(len(c) * row for c, row in zip(chunks, rows, strict=True)) / sum(map(len, chunks))
        torch.testing.assert_close(z[i : i + 1], expected, rtol=1e-5, atol=1e-5)
        if len(chunks) == 1:
            torch.testing.assert_close(z[i], short[i], rtol=1e-5, atol=1e-5)
    long = "chest " * 40
    both = model.encode([long + "pain", long + "fever"], tokenizer)
    assert (both[0] - both[1]).abs().max() > 1e-4


def test_tokens_are_the_tokenizers_own_chunks(tokenizer):
    """`TextProcessor(chunk=True)` cuts as the tokenizer's `return_overflowing_tokens` does, and loses nothing."""
    notes = make_notes()
    tokens, stats = TextProcessor(tokenizer, chunk=True, whole_words=True).tokens(notes, WINDOW)
    for ids, words, text in zip(tokens["input_ids"], tokens["word_ids"], notes["text"], strict=True):
        expected = tokenizer(text, truncation=True, max_length=WINDOW, return_overflowing_tokens=True)["input_ids"]
        assert ids == [token for chunk in expected for token in chunk]
        assert [word < 0 for word in words] == [token in (2, 3) for token in ids]
    assert list(tokens["length"]) == [len(ids) for ids in tokens["input_ids"]]
    assert (stats.truncated, stats.cut) == (0, 0)
    assert 0 < stats.chunked < len(notes)
    assert f"{stats.chunked} notes" in str(stats)
    assert "in chunks of 12 tokens" in str(stats)


@pytest.mark.parametrize("objective", ["mlm", "causal", None])
def test_batch_of_chunks(tokenizer, objective):
    """Rows fit the window and name their note; labels do not cross chunks; an empty share of a rank has two rows."""
    notes = make_notes()
    pairs = TextProcessor(tokenizer, chunk=True).pairs(notes, adjacent_pairs(notes), max_length=WINDOW)[0]
    collator = DensePairCollator(tokenizer, objective=objective, chunk_length=WINDOW)
    drawn = [pairs[(i, 0)] for i in range(5)]
    batch = collator(drawn)
    notes_of = [pair[side]["input_ids"] for side in ("earlier", "later") for pair in drawn]
    assert batch["input_ids"].shape[1] <= WINDOW
    assert batch["chunk_to_note"].tolist() == sorted(batch["chunk_to_note"].tolist())
    assert np.bincount(batch["chunk_to_note"], batch["attention_mask"].sum(1)).tolist() == [
        len(ids) for ids in notes_of
    ]
    assert (batch["input_ids"][:, 0] == 2).all()
    last = batch["attention_mask"].sum(1) - 1
    assert (batch["labels"][torch.arange(len(last)), last] == -100).all()
    if objective == "causal":
        inside = batch["attention_mask"][:, 1:].bool()
        assert torch.equal(batch["labels"][:, :-1][inside], batch["input_ids"][:, 1:][inside])
    empty = collator([])
    assert (empty["num_pairs"], empty["chunk_to_note"].tolist()) == (0, [0, 1])


@pytest.mark.parametrize("kind", ["bert", "llama", "lora"])
def test_training_sees_what_encode_gives(tmp_path, tokenizer, kind):
    """Z_a and Z_b of a batch are `encode` of the same notes, for encoders, decoders and under an adapter."""
    if kind == "llama":
        shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        model = AutoDenseModel.from_config(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **shape))
    else:
        model = make_model("bert", tokenizer, dropout=0.0)
    adapter = LoraConfig(r=2, target_modules=["query"]) if kind == "lora" else None
    trainer = make_trainer(tmp_path, tokenizer, model, mlm_weight=0.0, peft_config=adapter)
    sampler = trainer.get_train_dataloader().batch_sampler
    chosen = next(iter(sampler))
    batch = trainer.data_collator(trainer.train_dataset.__getitems__(chosen))
    assert len(batch["input_ids"]) > 2 * batch["num_pairs"]
    with torch.no_grad():
        _, z_a, z_b, *_ = trainer.embed_pairs(trainer.model.eval(), batch)
    texts, pairs = make_notes()["text"], trainer.train_dataset.pairs
    for z, rows in ((z_a, pairs.earlier), (z_b, pairs.later)):
        expected = model.encode([texts[int(rows[index])] for index, _ in chosen], tokenizer)
        torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-5)


def test_gradients_do_not_depend_on_the_cut(tmp_path, tokenizer):
    """One batch of 16 pairs, and micro-batches of 4: the same gradient to 1e-5 of its norm, with masks."""
    found = []
    for size, accumulation in ((16, 1), (4, 4)):
        model = make_model("bert", tokenizer, dropout=0.0)
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            model,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            lambda_sub=0.1,
            lambda_orth=0.01,
        )
        clip, gradients = trainer.accelerator.clip_grad_norm_, {}

        def keep(*args, model=model, clip=clip, gradients=gradients):
            gradients |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            return clip(*args)

        trainer.accelerator.clip_grad_norm_ = keep
        trainer.train()
        found.append(torch.cat([gradient.flatten() for gradient in gradients.values()]))
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()


def test_the_choice_is_saved_and_nonsense_refused(tmp_path, tokenizer):
    """The config remembers; a stranger's value, and chunks without a length, are errors that say what to do."""
    model = make_model("bert", tokenizer)
    trainer = make_trainer(tmp_path / "out", tokenizer, model)
    assert trainer.reading_stats["train"].chunked > 0
    trainer.save_model()
    trainer.create_model_card()
    assert "averages the embeddings" in (tmp_path / "out" / "README.md").read_text()
    again = AutoDenseModel.from_pretrained(str(tmp_path / "out"))
    assert (again.long_notes, again.max_length) == ("chunk", WINDOW)
    torch.testing.assert_close(again.encode(TEXTS), model.encode(TEXTS, tokenizer), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="truncate or chunk but got 'split'"):
        make_trainer(tmp_path, tokenizer, model, long_notes="split")
    shape = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2}  # without a limit on positions
    unlimited = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **shape))
    with pytest.raises(ValueError, match="set max_length"):
        make_trainer(tmp_path, tokenizer, unlimited, max_length=None, mlm_weight=0.0)
