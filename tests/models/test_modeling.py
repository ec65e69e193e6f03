"""Models: nothing added, native folders that open without this package, and `encode`."""

import copy
import json

import pytest
import torch
from conftest import make_model, make_notes, run_without_densefeat
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BloomConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    set_seed,
)

from hf_densefeat import AutoDenseModel, DenseFeatureMixin
from hf_densefeat.models import encoding
from hf_densefeat.models.dense import as_dense
from hf_densefeat.models.pooling import POOLINGS

FAMILIES = {
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "distilbert": "DistilBertForMaskedLM",
    "modernbert": "ModernBertForMaskedLM",
}
CASES = [(family, pooling) for family in FAMILIES for pooling in POOLINGS]
TEXTS = [*make_notes(patients=3)["text"][:7], "fever", "chest pain " * 60, ""]

# Opens every folder as users of sentence-transformers and transformers do, and saves the outputs.
LOAD_AND_ENCODE = """
import json, pathlib, sys, torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

root = pathlib.Path.cwd()
texts, out = json.loads((root / "texts.json").read_text()), {}
for folder in sorted(p for p in root.iterdir() if p.is_dir()):
    name = folder.name
    encoder = SentenceTransformer(str(folder), device="cpu")
    out[name + "/sentence"] = encoder.encode(texts, convert_to_tensor=True).contiguous()
    if not name.endswith("mean"):
        continue
    tokens = AutoTokenizer.from_pretrained(folder)(texts[:3], return_tensors="pt", padding=True)
    base, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    # BertForMaskedLM has no pooler, so that transformers makes a new one, for any such checkpoint
    assert not [key for key in info["missing_keys"] if not key.startswith("pooler.")], info
    masked, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        out[name + "/hidden"] = base.eval()(**tokens).last_hidden_state.contiguous()
        out[name + "/logits"] = masked.eval()(**tokens).logits.contiguous()
    assert type(masked).__module__.startswith("transformers."), type(masked)
    assert len(pipeline("fill-mask", model=str(folder))("chest [MASK] and fever")) == 5
assert not [name for name, module in sys.modules.items() if module and name.split(".")[0] == "hf_densefeat"]
save_file(out, root / "out.safetensors")
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory, tokenizer):
    """Every family and pooling saved, read in a process that cannot import hf_densefeat, and the same read here."""
    root, expected = tmp_path_factory.mktemp("saved"), {}
    for family, pooling in CASES:
        model, folder = make_model(family, tokenizer, pooling=pooling), root / f"{family}-{pooling}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        expected[f"{family}-{pooling}/sentence"] = model.encode(TEXTS, tokenizer)
        if pooling == "mean":
            tokens = tokenizer(TEXTS[:3], return_tensors="pt", padding=True)
            with torch.no_grad():
                out = model.eval()(**tokens, output_hidden_states=True)
                expected[f"{family}-mean/hidden"] = model.base_model(**tokens).last_hidden_state
            expected[f"{family}-mean/logits"] = out.logits
    (root / "texts.json").write_text(json.dumps(TEXTS))
    run_without_densefeat(LOAD_AND_ENCODE, root)
    return load_file(root / "out.safetensors"), expected


@pytest.mark.slow
@pytest.mark.parametrize(("family", "pooling"), CASES)
def test_sentence_transformer_opens_the_folder_elsewhere(opened, family, pooling):
    """`SentenceTransformer(folder)` where hf_densefeat cannot be imported gives the embeddings of `encode` to 1e-5."""
    found, expected = (values[f"{family}-{pooling}/sentence"] for values in opened)
    assert found.shape == (len(TEXTS), 24)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_opens_the_folder_elsewhere(opened, family):
    """AutoModel, AutoModelForMaskedLM and pipeline("fill-mask") open it there, no key missing, with equal outputs."""
    for what in ("hidden", "logits"):
        found, expected = (values[f"{family}-mean/{what}"] for values in opened)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_added_to_the_model(family, tokenizer, tmp_path):
    """Same parameters, buffers and forward as the native class; saved keys, model_type and architectures are native."""
    model = make_model(family, tokenizer)
    native = AutoModelForMaskedLM.from_config(model.config)
    assert isinstance(model, DenseFeatureMixin)
    assert isinstance(model, type(native))
    assert list(model.state_dict()) == list(native.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in native.named_parameters()]
    assert type(model).forward is type(native).forward
    model.save_pretrained(tmp_path / "ours")
    native.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == [FAMILIES[family]]
    assert config["model_type"] == family
    assert config["densefeat"] == {}
    assert "auto_map" not in config
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")]
    assert weights[0].keys() == weights[1].keys()
    assert not list((tmp_path / "ours").rglob("*.py"))
    assert not list((tmp_path / "ours").rglob("*.bin"))


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_again_gives_the_same_embeddings(family, tokenizer, tmp_path):
    """AutoDenseModel remembers pooling and max_length, in float32, and can be told otherwise."""
    model = make_model(family, tokenizer, pooling="max", max_length=12)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoDenseModel.from_pretrained(str(tmp_path))
    assert (again.pooling, again.max_length, again.dtype) == ("max", 12, torch.float32)
    assert torch.equal(again.encode(TEXTS), model.encode(TEXTS, tokenizer))
    other = AutoDenseModel.from_pretrained(str(tmp_path), pooling="cls", max_length=20)
    assert (other.pooling, other.max_length) == ("cls", 20)
    assert again.pooling == "max"
    mean = make_model(family, tokenizer)
    again_and_again, info = AutoDenseModel.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not info["missing_keys"]
    assert type(again_and_again) is type(mean)


def test_from_pretrained_takes_what_the_auto_class_takes(tokenizer, tmp_path):
    """A subfolder, a config attribute and a dtype reach transformers as they would through AutoModelForMaskedLM."""
    make_model("bert", tokenizer).save_pretrained(tmp_path / "inner")
    model = AutoDenseModel.from_pretrained(
        str(tmp_path), subfolder="inner", hidden_dropout_prob=0.4, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert model.config.hidden_dropout_prob == 0.4
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    z = model.encode(TEXTS, tokenizer)
    assert z.dtype == torch.float32
    assert z.isfinite().all()


@pytest.mark.parametrize("part", ["model", "base_model"])
def test_a_checkpoint_without_weights_of_the_encoder_is_refused(part, tokenizer, tmp_path):
    """They would be random; those of the head may be, and the pooler's are not used."""
    model = make_model("bert", tokenizer)
    saved = model if part == "model" else model.base_model
    weights = {name: value.clone() for name, value in saved.state_dict().items() if "layer.1.output.dense" not in name}
    saved.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"2 weights of the encoder, such as bert\.encoder\.layer\.1\.output.*Masked"):
        AutoDenseModel.from_pretrained(str(tmp_path))


# ---- encode ----


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_keeps_the_order_whatever_the_batch(family, tokenizer):
    """Row i is text i for any batch size, and equals the text encoded alone."""
    model = make_model(family, tokenizer)
    whole = model.encode(TEXTS, tokenizer)
    assert whole.shape == (len(TEXTS), 24)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    for batch_size in (1, 3):
        torch.testing.assert_close(model.encode(TEXTS, tokenizer, batch_size=batch_size), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.encode(TEXTS[::-1], tokenizer).flip(0), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.encode(tuple(TEXTS), tokenizer), whole, rtol=0, atol=0)


def test_slices_and_streams_are_the_whole(tokenizer, monkeypatch):
    """Slices of two texts, by number or by characters, and blocks of a generator give what one slice gives, cut notes too."""
    model = make_model("bert", tokenizer)
    texts = [*TEXTS, "chest pain " * 60, "fever " * 70, "fever"]
    whole, cut = model.encode(texts, tokenizer, return_cut=True)
    lengths = [len(ids) for ids in tokenizer(texts, truncation=False)["input_ids"]]
    assert cut.tolist() == [length > model.max_length for length in lengths]
    assert 0 < cut.sum() < len(texts)
    for name, value in (("SLICE", 2), ("CHARACTERS", 40)):
        monkeypatch.setattr(encoding, name, value)
        found, again = model.encode(texts, tokenizer, return_cut=True)
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
        assert torch.equal(again, cut)
    blocks = list(model.encode_stream((text for text in texts), block=4, tokenizer=tokenizer))
    assert [len(block) for block in blocks] == [4] * (len(texts) // 4) + [len(texts) % 4] * (len(texts) % 4 > 0)
    torch.testing.assert_close(torch.cat(blocks), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_encode_has_no_dropout_and_restores_the_mode(training, tokenizer):
    """Two calls agree bit for bit in train mode, which is as it was afterwards, also after an error, on every module."""
    model = make_model("bert", tokenizer, dropout=0.5).train(training)
    assert torch.equal(model.encode(TEXTS, tokenizer), model.encode(TEXTS, tokenizer))
    assert {module.training for module in model.modules()} == {training}
    with pytest.raises(ValueError, match="list"):
        model.encode("fever", tokenizer)
    assert {module.training for module in model.modules()} == {training}


def test_encode_leaves_a_frozen_part_in_its_mode(tokenizer):
    """A module that was put in eval mode inside a model in train mode is still in eval mode afterwards."""
    model = make_model("bert", tokenizer).train()
    model.bert.embeddings.eval()
    model.encode(TEXTS, tokenizer)
    assert not model.bert.embeddings.dropout.training
    assert model.bert.encoder.training


def test_encode_of_nothing_and_of_tokens(tokenizer):
    """No texts are (0, d); a batch of tokens gives the rows that its texts give; one string is an error that says so."""
    model = make_model("bert", tokenizer)
    assert model.encode([], tokenizer).shape == (0, 24)
    tokens = tokenizer(TEXTS[:4], return_tensors="pt", padding=True)
    torch.testing.assert_close(model.encode(tokens), model.encode(TEXTS[:4], tokenizer), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.encode(dict(tokens)), model.encode(tokens), rtol=0, atol=0)
    with pytest.raises(ValueError, match="one string: wrap it in a list"):
        model.encode("fever", tokenizer)
    with pytest.raises(ValueError, match=r"pass one, model.encode\(texts, tokenizer\)"):
        model.encode(TEXTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_long_texts_are_cut_at_max_length(family, tokenizer):
    """A text of 120 words fits, by the model's positions, and `max_length` cuts it further, closing token included."""
    model, long = make_model(family, tokenizer), "chest pain " * 60
    wide = copy.deepcopy(tokenizer)
    wide.model_max_length = 10**6
    expected = {"bert": 66, "roberta": 66 - tokenizer.pad_token_id - 1, "distilbert": 66, "modernbert": 66}[family]
    assert model.max_length == expected
    assert model.encode([long], wide).isfinite().all()
    cut = model.encode([long], wide, max_length=8)
    tokens = wide([long], truncation=True, max_length=8, return_tensors="pt")
    assert tokens["input_ids"].shape == (1, 8)
    torch.testing.assert_close(cut, model.encode(tokens), rtol=1e-5, atol=1e-6)


def test_captured_embeddings_have_their_graph_and_keep_nothing(tokenizer):
    """`pooled` inside `capture_hidden` is the pooled last hidden state with gradient; outside nothing is kept."""
    model = make_model("modernbert", tokenizer, dropout=0.0)
    tokens = tokenizer(TEXTS[:4], return_tensors="pt", padding=True)
    for _ in range(2):
        with model.capture_hidden():
            out = model(**tokens, output_hidden_states=True)
            z = model.pooled(tokens["attention_mask"])
    weight = tokens["attention_mask"].unsqueeze(-1).float()
    last = model.base_model(**tokens).last_hidden_state
    torch.testing.assert_close(z, (last * weight).sum(1) / weight.sum(1), rtol=1e-5, atol=1e-6)
    assert out.logits.shape[-1] == len(tokenizer)
    assert z.requires_grad
    assert model.base_model._densefeat_hidden is None
    model(**tokens)
    assert model.base_model._densefeat_hidden is None
    assert len(model.base_model._forward_hooks) == 1
    clone = copy.deepcopy(model)
    assert torch.equal(clone.encode(TEXTS, tokenizer), model.encode(TEXTS, tokenizer))


# ---- as_dense ----


def test_as_dense_changes_the_object_in_place():
    """The same object, weights and hooks; doing it again changes nothing; the library's class is left alone."""
    set_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model, calls = BertForMaskedLM(config), []
    model.register_forward_hook(lambda *args: calls.append(1))
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    dense = as_dense(model, pooling="cls")
    assert dense is model
    assert as_dense(model) is model
    assert model.pooling == "cls"
    for name, value in model.state_dict().items():
        assert (value.data_ptr(), True) == (before[name][0], torch.equal(value, before[name][1]))
    model(torch.tensor([[1, 2]]))
    assert calls == [1]
    assert not isinstance(BertForMaskedLM(config), DenseFeatureMixin)
    assert not hasattr(BertForMaskedLM, "encode")


def test_base_model_without_a_head(tokenizer, tmp_path):
    """A bare encoder has no language-modelling head, encodes as its masked-LM sibling does, and saves natively."""
    masked = make_model("bert", tokenizer)
    masked.save_pretrained(tmp_path / "masked")
    bare = as_dense(BertModel.from_pretrained(tmp_path / "masked", add_pooling_layer=False))
    assert bare.language_modeling is None
    assert masked.language_modeling == "mlm"
    torch.testing.assert_close(bare.encode(TEXTS, tokenizer), masked.encode(TEXTS, tokenizer), rtol=1e-5, atol=1e-6)
    bare.save_pretrained(tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["BertModel"], "bert")
    assert AutoModel.from_pretrained(tmp_path / "bare").config.densefeat == {}


def test_unknown_pooling_is_refused(tokenizer):
    """The error names the poolings and what came."""
    with pytest.raises(ValueError, match="one of mean, cls, last, max, mean_sqrt_len but got 'average'"):
        make_model("bert", tokenizer, pooling="average")


def test_decoder_pools_its_last_token_and_is_causal(tokenizer, tmp_path):
    """A tiny Llama gets "last" and causal, its padding changes nothing, and its folder opens as native and as sentences."""
    from sentence_transformers import SentenceTransformer

    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    model = AutoDenseModel.from_config(config)
    assert isinstance(model, LlamaForCausalLM)
    assert (model.language_modeling, model.pooling) == ("causal", "last")
    z = model.encode(TEXTS, tokenizer)
    alone = torch.cat([model.encode([text], tokenizer) for text in TEXTS])
    torch.testing.assert_close(z, alone, rtol=1e-4, atol=1e-5)
    tokens = tokenizer(TEXTS[0], return_tensors="pt")
    last = model.base_model(**tokens).last_hidden_state[:, -1].detach()
    torch.testing.assert_close(z[:1], last, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["architectures"], saved["model_type"]) == (["LlamaForCausalLM"], "llama")
    again = AutoDenseModel.from_pretrained(str(tmp_path))
    assert (type(again).__name__, again.pooling) == ("LlamaForCausalLM", "last")
    theirs = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(theirs, z, rtol=1e-4, atol=1e-5)


def test_the_encoder_of_an_encoder_decoder_opens_again(tmp_path, tokenizer):
    """A folder of T5EncoderModel is opened as that, with the embeddings it was saved with."""
    config = T5Config(vocab_size=len(tokenizer), d_model=24, d_kv=12, d_ff=48, num_layers=2, num_heads=2)
    model = as_dense(T5EncoderModel(config))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoDenseModel.from_pretrained(str(tmp_path))
    assert type(again).__name__ == "T5EncoderModel"
    texts = ["fever and cough", "stable"]
    torch.testing.assert_close(again.encode(texts), model.encode(texts, tokenizer))


def test_a_model_and_a_tokenizer_without_a_limit_read_the_whole_text(tokenizer):
    """Neither knows a length: nothing is cut, nothing overflows; `max_length` still cuts."""
    model = AutoDenseModel.from_config(BloomConfig(vocab_size=len(tokenizer), hidden_size=24, n_layer=1, n_head=2))
    unlimited = copy.deepcopy(tokenizer)
    unlimited.model_max_length = int(1e30)
    long = " ".join(["fever and cough"] * 60)
    z = model.encode([long, "stable"], unlimited)
    tokens = tokenizer(long, truncation=False, return_tensors="pt")
    torch.testing.assert_close(z[:1], model.encode(dict(tokens)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(z[:1], model.encode([long], unlimited, max_length=8))
