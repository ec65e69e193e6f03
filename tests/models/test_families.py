"""Every family by one path: trained, saved in full or with LoRA merged, opened where this package does not exist."""

import copy
import json

import pytest
import torch
from conftest import make_model, make_notes, run_without_densefeat
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    DebertaV2Config,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
    set_seed,
)

from hf_densefeat import AutoDenseModel, DenseTrainer, DenseTrainingArguments, adjacent_pairs
from hf_densefeat.data.tokens import TextProcessor
from hf_densefeat.models.dense import as_dense
from hf_densefeat.training.checkpoints import seal

pytestmark = pytest.mark.slow

ENCODERS = ("bert", "roberta", "distilbert", "modernbert", "electra", "deberta-v2")
DECODERS = ("llama", "qwen2", "qwen3", "gpt2")
CASES = [
    (family, kind, pooling)
    for family in (*ENCODERS, *DECODERS)
    for kind in ("full", "lora")
    for pooling in ("mean", "cls", "last", "max")
    if not (family in DECODERS and pooling == "cls")
]
TEXTS = [*make_notes(patients=3)["text"][:6], "fever", "chest pain " * 60]

# Opens every folder as users of sentence-transformers and transformers do, and saves the embeddings.
LOAD_AND_ENCODE = """
import json, pathlib, torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, logging
logging.set_verbosity_error()
logging.disable_progress_bar()

root = pathlib.Path.cwd()
texts, out = json.loads((root / "texts.json").read_text()), {}
for folder in sorted(p for p in root.iterdir() if p.is_dir()):
    encoder = SentenceTransformer(str(folder), device="cpu")
    out[folder.name] = encoder.encode(texts, convert_to_tensor=True).contiguous()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=encoder.max_seq_length, return_tensors="pt")
    with torch.no_grad():
        hidden, length = model(**tokens).last_hidden_state, tokens["attention_mask"].sum(1)
    by_hand = {
        "mean": lambda row: row.mean(0), "cls": lambda row: row[0], "last": lambda row: row[-1], "max": lambda row: row.amax(0)
    }[folder.name.rsplit("-", 1)[1]]
    out[folder.name + " auto"] = torch.stack([by_hand(row[:n]) for row, n in zip(hidden, length)])
save_file(out, root / "out.safetensors")
"""


def build(family, tokenizer):
    if family in ("bert", "roberta", "distilbert", "modernbert"):
        return make_model(family, tokenizer)
    set_seed(0)
    shared = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    heads = {"num_key_value_heads": 1, "head_dim": 12}
    config = {
        "electra": lambda: ElectraConfig(**shared, **shape, embedding_size=16, max_position_embeddings=66),
        "deberta-v2": lambda: DebertaV2Config(
            **shared,
            **shape,
            max_position_embeddings=66,
            relative_attention=True,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
        ),
        "llama": lambda: LlamaConfig(**shared, **shape, **heads, max_position_embeddings=66),
        "qwen2": lambda: Qwen2Config(**shared, **shape, num_key_value_heads=1, max_position_embeddings=66),
        "qwen3": lambda: Qwen3Config(**shared, **shape, **heads, max_position_embeddings=66),
        "gpt2": lambda: GPT2Config(**shared, n_embd=24, n_layer=2, n_head=2, n_positions=66),
    }[family]()
    return AutoDenseModel.from_config(config)


def tokenizer_of(family, tokenizer):
    """The fixture's; for decoders without a mask token, padding on the left and with the end-of-text token."""
    tokenizer = copy.deepcopy(tokenizer)
    if family in ENCODERS:
        return tokenizer
    if family == "qwen2":  # beside a Qwen2 config transformers reads any tokenizer as this one
        vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
        return Qwen2Tokenizer(vocabulary, merges=[], model_max_length=64, padding_side="left")
    tokenizer.mask_token = tokenizer.cls_token = None
    tokenizer.eos_token = tokenizer.pad_token = "[SEP]"
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.fixture(scope="module")
def trainers(tokenizer, tmp_path_factory):
    """Two steps of every family, in full and with LoRA."""
    notes, found = make_notes(), {}
    for family, kind in sorted({case[:2] for case in CASES}):
        args = DenseTrainingArguments(
            str(tmp_path_factory.mktemp("out")),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            per_device_train_batch_size=16,
            max_steps=2,
            learning_rate=1e-2,
            subspace_dim=3,
            logging_steps=1,
        )
        words = tokenizer_of(family, tokenizer)
        found[family, kind] = DenseTrainer(
            build(family, words),
            args,
            train_dataset=notes,
            processing_class=words,
            peft_config=LoraConfig(r=2, lora_alpha=8, target_modules="all-linear") if kind == "lora" else None,
        )
        found[family, kind].train()
    return found


@pytest.fixture(scope="module")
def opened(trainers, tmp_path_factory):
    """What a process that cannot import hf_densefeat reads from the saved folders, and what `encode` says."""
    root, expected = tmp_path_factory.mktemp("saved"), {}
    for family, kind, pooling in CASES:
        trainer, name = trainers[family, kind], f"{family}-{kind}-{pooling}"
        model = as_dense(trainer.dense_model, pooling=pooling)
        trainer.save_model(str(root / name))
        expected[name] = model.encode(TEXTS, trainer.processing_class)
    (root / "texts.json").write_text(json.dumps(TEXTS))
    run_without_densefeat(LOAD_AND_ENCODE, root)
    return load_file(root / "out.safetensors"), expected


@pytest.mark.parametrize(("family", "kind", "pooling"), CASES)
def test_opened_elsewhere_it_gives_the_embeddings_of_encode(opened, family, kind, pooling):
    """SentenceTransformer, and AutoModel with its tokens pooled by hand, equal `encode` to 1e-5, long text included."""
    found, expected = opened
    name = f"{family}-{kind}-{pooling}"
    assert expected[name].shape == (len(TEXTS), 24)
    torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[name + " auto"], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_family_trains(trainers, family, kind):
    """Both losses are logged, finite, and the embeddings have moved from those of the untrained model."""
    trainer = trainers[family, kind]
    model, log = trainer.dense_model, trainer.state.log_history[0]
    assert model.language_modeling == ("causal" if family in DECODERS else "mlm")
    assert log["mlm_loss"] > 0
    assert 0 < log["spectral_spreading"] < 1
    assert log["skipped_updates"] == 0
    fresh = as_dense(build(family, trainer.processing_class), pooling=model.pooling)
    moved = model.encode(TEXTS, trainer.processing_class) - fresh.encode(TEXTS, trainer.processing_class)
    assert moved.abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoders_embed_the_last_token_and_predict_the_next(trainers, tokenizer, family):
    """Last-token pooling is the default, and the language-modelling loss is the model's own with shifted labels."""
    trainer = trainers[family, "full"]
    assert build(family, tokenizer).pooling == "last"
    model, batch = trainer.dense_model.eval(), next(iter(trainer.get_train_dataloader()))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    ours = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(ours, out.loss, rtol=1e-5, atol=1e-6)


def test_what_cannot_work_says_so_by_name(tokenizer):
    """Encoder-decoders, a head without a body of its own, and the first token of a decoder are refused by name."""
    small = {"vocab_size": 20, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    bart = BartConfig(**small, decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8)
    with pytest.raises(ValueError, match="BartForConditionalGeneration is an encoder-decoder"):
        AutoDenseModel.from_config(bart)
    t5 = T5Config(vocab_size=20, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="T5Model is an encoder-decoder"):
        AutoDenseModel.from_config(t5)
    assert as_dense(T5EncoderModel(t5)).encode(
        {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 3)}
    ).shape == (2, 8)
    with pytest.raises(ValueError, match="cls pooling takes the first token, which in LlamaForCausalLM"):
        as_dense(build("llama", tokenizer), pooling="cls")
    model = AutoModelForCausalLM.from_config(build("llama", tokenizer).config)
    model.base_model_prefix = "nothing"
    with pytest.raises(ValueError, match="LlamaForCausalLM has no body apart from its head"):
        as_dense(model)


def test_modernbert_reads_8192_tokens(tokenizer, tmp_path):
    """A note of 8,192 tokens is embedded whole: its last word changes the embedding; a pair of such notes trains."""
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=8192,
    )
    set_seed(0)
    model = AutoDenseModel.from_config(config, pooling="max", attn_implementation="sdpa")
    assert model.max_length == 8192
    words = ["chest"] * 8190
    texts = [" ".join(words), " ".join([*words[:-1], "fever"])]
    z = model.encode(texts, tokenizer, batch_size=1)
    assert (z[0] - z[1]).abs().max() > 1e-4
    settings = {"per_device_train_batch_size": 1, "center": False, "window": "none", "subspace_dim": 1, "max_steps": 1}
    settings |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    notes = Dataset.from_dict({"patient_id": [0, 0], "time": [1, 2], "text": texts})
    trainer = DenseTrainer(
        model, DenseTrainingArguments(str(tmp_path), **settings), train_dataset=notes, processing_class=tokenizer
    )
    assert (trainer.reading_stats["train"].tokens, trainer.reading_stats["train"].truncated) == (2 * 8192, 0)
    before = {name: value.clone() for name, value in model.base_model.named_parameters()}
    trainer.train()
    assert trainer.update_log.skipped == 0
    assert all(not torch.equal(value, before[name]) for name, value in model.base_model.named_parameters())


def resumed_weights(folder, base, tokenizer, checkpoint=None, **kwargs):
    notes = make_notes()
    pairs = TextProcessor(tokenizer).pairs(notes, adjacent_pairs(notes), max_length=64)[0]
    settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 16}
    settings |= {"max_steps": 4, "learning_rate": 1e-2, "subspace_dim": 3, "save_strategy": "no"} | kwargs
    args = DenseTrainingArguments(str(folder), **settings)
    trainer = DenseTrainer(AutoDenseModel.from_pretrained(base), args, train_dataset=pairs, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer.model.state_dict()


def test_a_base_with_legacy_key_names_resumes_with_the_trained_weights(tokenizer, tmp_path):
    """LayerNorm.gamma and beta of old checkpoints are read, saved under native names, and resume to the bit."""
    set_seed(0)
    model = build("bert", tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name:
                parameter.add_(torch.rand_like(parameter))
    base = tmp_path / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    names = {".weight": ".gamma", ".bias": ".beta"}
    state = load_file(base / "model.safetensors")
    old = {
        name.replace(suffix, names[suffix]) if "LayerNorm" in name else name: value
        for name, value in state.items()
        for suffix in [next(s for s in names if name.endswith(s))]
    }
    assert sum("gamma" in name for name in old) == sum("beta" in name for name in old) == 6
    save_file(old, base / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoDenseModel.from_pretrained(str(base)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())

    whole = resumed_weights(tmp_path / "a", str(base), tokenizer, save_strategy="steps", save_steps=2)
    saved = load_file(tmp_path / "a" / "checkpoint-2" / "model.safetensors")
    assert not [name for name in saved if "gamma" in name or "beta" in name]
    resumed = resumed_weights(tmp_path / "b", str(base), tokenizer, str(tmp_path / "a" / "checkpoint-2"))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert all(
        (whole[name] - value).abs().max() > 1e-4
        for name, value in state.items()
        if "encoder" in name and "Norm" in name
    )

    save_file(old, tmp_path / "a" / "checkpoint-2" / "model.safetensors", metadata={"format": "pt"})
    seal(tmp_path / "a" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"Missing: .*LayerNorm\.bias.*unexpected: .*LayerNorm\.beta"):
        resumed_weights(tmp_path / "c", str(base), tokenizer, str(tmp_path / "a" / "checkpoint-2"))
