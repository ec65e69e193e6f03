"""Every masked-LM and causal family of the installed transformers, tiny: it trains and opens elsewhere, or is refused."""

import pytest
import torch
from conftest import QUIET, make_model
from tiny_configs import tiny_config
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertLMHeadModel,
    CLIPConfig,
    CLIPModel,
    Qwen2Config,
    ViTConfig,
    ViTModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from hf_densefeat import AutoDenseModel, DenseTrainer, DenseTrainingArguments
from hf_densefeat.models.dense import as_dense
from hf_densefeat.models.families import SEES_PADDING
from hf_densefeat.models.pooling import pool

# What `as_dense` says, and of which families it says so.
REFUSED = {
    "is an encoder-decoder": "mlm-bart mlm-mbart mlm-mvp",
    "has the body": "causal-bart causal-bigbird_pegasus causal-blenderbot causal-blenderbot-small causal-emu3 causal-marian "
    "causal-mbart causal-mvp causal-pegasus causal-plbart causal-prophetnet causal-trocr causal-whisper",
    "its config has no hidden_size": "mlm-modernvbert mlm-ultravbert causal-blt causal-fuyu causal-gemma3 causal-gemma4 "
    "causal-gemma4_unified_assistant causal-got_ocr2 causal-moss_transcribe_diarize",
    "reads inputs, not tokens": "mlm-perceiver",
    "no body apart from its head": "causal-llama4 causal-llama4_text causal-mllama",
    "AutoModel does not find every weight": "causal-axk1 causal-deepseek_v4 causal-inkling2_loop_text "
    "causal-inkling2_text causal-laguna",
    "twice as wide": "mlm-reformer causal-reformer",
}
REASON = {name: reason for reason, names in REFUSED.items() for name in names.split()}
# Parts of larger models, which have no tiny configuration by these means
NOT_BUILT = "dots3_note gemma3n gemma4_assistant gemma4_unified musicgen musicgen_melody".split()
FAST = "mlm-bert mlm-mpnet mlm-esm causal-bert causal-opt causal-mamba causal-qwen2 causal-rwkv causal-whisper mlm-perceiver"
CASES = [
    pytest.param(head, name, id=f"{head}-{name}", marks=[] if f"{head}-{name}" in FAST.split() else pytest.mark.slow)
    for head, names in (("mlm", MODEL_FOR_MASKED_LM_MAPPING_NAMES), ("causal", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    for name in sorted(names)
    if name not in NOT_BUILT
]


def native(head, name):
    """The model of transformers, with random weights."""
    decoder = head == "causal" and (name in MODEL_FOR_MASKED_LM_MAPPING_NAMES or name == "reformer")
    config = tiny_config(name, **({"is_decoder": True} if decoder and name not in ("xlm", "flaubert") else {}))
    torch.manual_seed(0)
    return (AutoModelForMaskedLM if head == "mlm" else AutoModelForCausalLM).from_config(config)


def batch():
    """Four rows of 9, 9, 7 and 6 tokens."""
    ids = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([9, 9, 7, 6])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize(("head", "name"), CASES)
def test_it_trains_and_opens_elsewhere_or_is_refused(head, name, tokenizer, pairs, tmp_path, caplog):
    """After two updates the forward with the head, `encode`, the folder read again and that read by AutoModel are equal."""
    found = native(head, name)
    caplog.clear()
    if f"{head}-{name}" in REASON:
        with pytest.raises(ValueError, match=REASON[f"{head}-{name}"]):
            as_dense(found)
        return
    model = as_dense(found)
    assert ("sees padding" in caplog.text) == (name in SEES_PADDING)
    settings = QUIET | {"per_device_train_batch_size": 4, "max_steps": 2, "subspace_dim": 2, "window": "none"}
    trainer = DenseTrainer(
        model, DenseTrainingArguments(str(tmp_path), **settings), train_dataset=pairs, processing_class=tokenizer
    )
    before = model.eval().encode(batch())
    trainer.train()
    assert trainer.state.log_history[0]["skipped_updates"] == 0
    longest = torch.full((1, min(model.max_length or 9, 100)), 5)  # no more than there are positions
    assert model.encode({"input_ids": longest, "attention_mask": torch.ones_like(longest)}).isfinite().all()
    tokens = batch()
    with torch.no_grad(), model.eval().capture_hidden():
        model(**tokens)
        z = model.pooled(tokens["attention_mask"])
    expected = model.encode(tokens)
    assert expected.shape == (4, model.config.hidden_size)
    assert (expected - before).abs().max() > 0
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-5)
    if name not in SEES_PADDING:
        alone = model.encode({key: value[3:, :6] for key, value in tokens.items()})
        torch.testing.assert_close(alone, expected[3:], rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = AutoDenseModel.from_pretrained(str(tmp_path))
    assert again.language_modeling == model.language_modeling
    # loading sets the padding token's embedding to 0, which an output layer that shares it had moved
    rows = slice(0, 2 if name in SEES_PADDING else 4)
    assert torch.equal(again.encode(tokens)[rows], expected[rows])
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(tmp_path).eval()(**tokens)[0]
    opened = pool(hidden, tokens["attention_mask"], model.pooling)
    torch.testing.assert_close(opened[rows], expected[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_what_is_named_here_is_in_transformers():
    """The newest release has every name; an older one may lack some."""
    known = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert {name.split("-", 1)[1] for name in REASON} | set(NOT_BUILT) <= known
    assert len(MODEL_FOR_MASKED_LM_MAPPING) > 40
    assert len(MODEL_FOR_CAUSAL_LM_MAPPING) > 150


def test_models_of_pictures_are_refused_before_the_first_step():
    """ViT reads pixels, and CLIP is of two halves."""
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    with pytest.raises(ValueError, match=r"ViTModel reads pixel_values, not tokens of a text\. Use a text encoder"):
        as_dense(ViTModel(ViTConfig(**small, image_size=4, patch_size=2)))
    halves = {"text_config": small | {"vocab_size": 9}, "vision_config": small | {"image_size": 4, "patch_size": 2}}
    with pytest.raises(ValueError, match="CLIPModel is not a text encoder: its config has no hidden_size"):
        as_dense(CLIPModel(CLIPConfig(**halves, projection_dim=4)))


def test_a_causal_head_on_an_encoder_is_refused_and_on_a_decoder_taken(tokenizer):
    """BERT without is_decoder attends to the tokens that it is to predict; with it, its folder opens as what it is."""
    config = make_model("bert", tokenizer).config
    with pytest.raises(ValueError, match="BertLMHeadModel would see the tokens that it is to predict"):
        as_dense(BertLMHeadModel(config))
    decoder = AutoDenseModel.from_config(BertConfig(**config.to_dict() | {"is_decoder": True}))
    assert (decoder.language_modeling, decoder.pooling) == ("causal", "mean")


def test_key_heads_that_do_not_divide_the_heads_are_refused():
    """Qwen2Config has 32 key heads unless told: the plain model of transformers fails in its first forward."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    plain = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=96, **sizes))
    with pytest.raises(RuntimeError, match="size of tensor"):
        plain(**batch())
    with pytest.raises(ValueError, match="num_attention_heads is 4, which is no multiple of num_key_value_heads, 32"):
        as_dense(plain)
