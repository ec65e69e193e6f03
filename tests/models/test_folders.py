"""Folders of sentence-transformers as starts: embeddings equal theirs, saved ones too, or a refusal that says why."""

import json
import shutil

import pytest
import torch
from conftest import QUIET, WORDS, make_model, make_notes
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer
from transformers import LlamaConfig, LlamaModel, set_seed

from hf_densefeat import AutoDenseModel, DenseHead, DenseTrainer, DenseTrainingArguments
from hf_densefeat.commands.main import main
from hf_densefeat.models.head import PairCovariances, content_head, form_head
from hf_densefeat.models.interpolation import interpolate_weights
from hf_densefeat.models.sentence_transformers import as_sentence_transformer
from hf_densefeat.models.tokenizers import load_tokenizer

TEXTS = [" ".join(WORDS[i : i + n]) for i, n in ((0, 4), (4, 2), (6, 25), (3, 3), (9, 12), (1, 1))]
PROMPTS = {"query": "chest: ", "passage": "fever and pain: "}
LIMIT = 1e-5


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tokenizer):
    """A tiny encoder and a tiny decoder as plain transformers folders."""
    root = tmp_path_factory.mktemp("bases")
    encoder = make_model("bert", tokenizer)
    encoder.save_pretrained(root / "encoder")
    set_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    decoder = LlamaModel(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, **sizes))
    decoder.save_pretrained(root / "decoder")
    for path in root.iterdir():
        for file in path.iterdir():
            if file.name not in ("config.json", "model.safetensors"):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        tokenizer.save_pretrained(path)
    return root


def make_folder(bases, target, kind):
    """A folder that sentence-transformers wrote, of one kind; the encoder that wrote it."""
    set_seed(1)
    transformer = Transformer(str(bases / ("decoder" if kind == "last" else "encoder")), max_seq_length=20)
    tail = {
        "normalised": [Normalize()],
        "dense": [Dense(24, 10), Dense(10, 10, activation_function=torch.nn.GELU(), use_residual=True)],
        "everything": [LayerNorm(24), Dense(24, 8, bias=False, activation_function=None), Normalize()],
    }.get(kind, [])
    mode = {"cls": "cls", "last": "lasttoken", "max": "max", "sqrt": "mean_sqrt_len_tokens"}.get(kind, "mean")
    prompted = kind in ("prompted", "everything")
    pooling = Pooling(24, mode, include_prompt=kind != "everything")
    prompts = {"prompts": PROMPTS, "default_prompt_name": "passage"} if prompted else {}
    encoder = SentenceTransformer(modules=[transformer, pooling, *tail], device="cpu", **prompts)
    encoder.save_pretrained(str(target), create_model_card=False)
    return encoder


def difference(model, folder_or_encoder, texts=TEXTS, **options):
    """Largest difference between our embeddings and theirs, and that there are embeddings."""
    theirs = folder_or_encoder
    if not isinstance(theirs, SentenceTransformer):
        theirs = SentenceTransformer(str(theirs), device="cpu")
    expected = theirs.encode(texts, convert_to_tensor=True, **options)
    found = model.encode(texts, **options)
    assert found.shape == expected.shape == (len(texts), model.output_dimension)
    assert found.std(0).max() > 1e-3
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


KINDS = ("mean", "cls", "last", "max", "sqrt", "normalised", "prompted", "dense", "everything")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_read_and_saved_as_it_is(bases, tmp_path, kind):
    """Ours equals theirs, of the folder, of the folder that we save, of one with a head, and of theirs of that one."""
    encoder = make_folder(bases, tmp_path / "theirs", kind)
    model = AutoDenseModel.from_pretrained(str(tmp_path / "theirs"))
    assert model.max_length == 20
    assert difference(model, encoder) < LIMIT
    assert difference(model, encoder, prompt_name="query") < LIMIT if model.sentence.prompts.get("query") else True
    tokenizer = load_tokenizer(str(tmp_path / "theirs"))
    live = as_sentence_transformer(model, tokenizer).encode(TEXTS, convert_to_tensor=True)
    assert float((live - model.encode(TEXTS)).abs().max()) < LIMIT

    head = {"content": DenseHead.fit(model.encode(TEXTS))}
    for name, views in (("head", head), ("views", two_views(model)), ("ours", {})):
        model.views = views
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        again = AutoDenseModel.from_pretrained(str(tmp_path / name))
        assert list(again.views) == list(views)
        assert difference(again, tmp_path / name) < LIMIT
        assert difference(model, tmp_path / name) < LIMIT
    kinds = [type(module).__name__ for module in SentenceTransformer(str(tmp_path / "ours"), device="cpu")]
    assert kinds == [type(module).__name__ for module in encoder]
    again = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    assert (again.max_seq_length, again.prompts, again.default_prompt_name) == (
        encoder.max_seq_length,
        encoder.prompts,
        encoder.default_prompt_name,
    )


def two_views(model):
    """Content and form, of the input embeddings too where the folder pools every token."""
    z = model.encode(TEXTS, view=None, input_layer=model.has_input_layer)
    pairs = PairCovariances.of(z[:-1], z[1:])
    return {"content": content_head(pairs, epsilon=0.3), "form": form_head(pairs, epsilon=1.0)}


def test_views_that_they_saved_again(bases, tmp_path, tokenizer):
    """Their own layout of the same modules is read as two views."""
    model = AutoDenseModel.from_pretrained(str(bases / "encoder"), max_length=20)
    model.views = two_views(model)
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    SentenceTransformer(str(tmp_path / "ours"), device="cpu").save_pretrained(str(tmp_path / "again"))
    again = AutoDenseModel.from_pretrained(str(tmp_path / "again"))
    for view in (None, "content", "form"):
        torch.testing.assert_close(
            again.encode(TEXTS, view=view), model.encode(TEXTS, tokenizer, view=view), rtol=1e-4, atol=1e-4
        )


def test_the_older_layout(bases, tmp_path):
    """One flag a mode, class names of release 2, weights in a .bin, do_lower_case: as of most models on the Hub."""
    make_folder(bases, tmp_path, "dense")
    modules = json.loads((tmp_path / "modules.json").read_text())
    for module in modules:
        module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    flags = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 24, **flags}))
    (tmp_path / "sentence_bert_config.json").unlink()
    (tmp_path / "sentence_roberta_config.json").write_text(json.dumps({"max_seq_length": 9, "do_lower_case": True}))
    for name in ("2_Dense", "3_Dense"):
        torch.save(load_file(tmp_path / name / "model.safetensors"), tmp_path / name / "pytorch_model.bin")
        (tmp_path / name / "model.safetensors").unlink()
    model = AutoDenseModel.from_pretrained(str(tmp_path))
    assert (model.pooling, model.max_length) == ("cls", 9)
    assert difference(model, tmp_path, [text.upper() for text in TEXTS]) < LIMIT
    assert torch.equal(model.encode([text.upper() for text in TEXTS]), model.encode(TEXTS))


def test_a_hub_name(bases, tmp_path):
    """Every file is found in the cache of a repository, the tokenizer that lowers text too."""
    encoder = make_folder(bases, tmp_path / "models--someone--encoder" / "snapshots" / ("a" * 40), "everything")
    (tmp_path / "models--someone--encoder" / "refs").mkdir()
    (tmp_path / "models--someone--encoder" / "refs" / "main").write_text("a" * 40)
    options = {"cache_dir": str(tmp_path), "local_files_only": True}
    model = AutoDenseModel.from_pretrained("someone/encoder", **options)
    found = model.encode(TEXTS, load_tokenizer("someone/encoder", **options))
    torch.testing.assert_close(found, encoder.encode(TEXTS, convert_to_tensor=True), rtol=0, atol=LIMIT)


def test_a_folder_of_ours_that_they_saved_again(bases, tmp_path, tokenizer):
    """It is read as it now is: other pooling, other modules, fewer tokens; what the config said before counts no more."""
    model = make_model("bert", tokenizer, pooling="mean", max_length=30)
    model.views = {"content": DenseHead.fit(model.encode(TEXTS, tokenizer), epsilon=1.0)}
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    theirs = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    theirs.save_pretrained(str(tmp_path / "again"))
    again = AutoDenseModel.from_pretrained(str(tmp_path / "again"))
    assert difference(again, tmp_path / "again") < LIMIT
    torch.testing.assert_close(again.encode(TEXTS), model.encode(TEXTS, tokenizer), rtol=0, atol=LIMIT)
    theirs.max_seq_length = 7
    changed = SentenceTransformer(modules=[theirs[0], Pooling(24, "max"), Normalize()], device="cpu")
    changed.save_pretrained(str(tmp_path / "changed"))
    again = AutoDenseModel.from_pretrained(str(tmp_path / "changed"))
    assert (again.pooling, again.max_length, again.dense_head) == ("max", 7, None)
    assert difference(again, tmp_path / "changed") < LIMIT


@pytest.mark.parametrize("kind", ["normalised", "everything"])
def test_training_sees_what_encode_gives(bases, tmp_path, kind):
    """The embeddings of a batch of notes in training pass prompt, pooling and tail; what is trained is saved with them."""
    encoder = make_folder(bases, tmp_path / "theirs", kind)
    notes = make_notes()
    args = DenseTrainingArguments(
        str(tmp_path / "out"), **QUIET | {"max_steps": 2, "subspace_dim": 3}, per_device_train_batch_size=16
    )
    trainer = DenseTrainer(str(tmp_path / "theirs"), args, train_dataset=notes)
    model = trainer.dense_model.eval()
    pairs = trainer.train_dataset
    batch = trainer.data_collator(pairs.__getitems__([0, 1, 2]))
    with model.capture_hidden():
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
        model.pooled(batch["attention_mask"])
    order = [*pairs.pairs.earlier[:3], *pairs.pairs.later[:3]]
    clean = [pairs.tokens[int(i)]["input_ids"] for i in order]
    tokens = trainer.processing_class.pad({"input_ids": clean}, padding_side="right", return_tensors="pt")
    with torch.no_grad(), model.capture_hidden():
        model(**tokens)
        z = model.pooled(tokens["attention_mask"])
    expected = encoder.encode([notes["text"][int(i)] for i in order], convert_to_tensor=True)
    torch.testing.assert_close(z, expected, rtol=0, atol=LIMIT)
    trainer.train()
    trainer.save_model()
    assert difference(trainer.dense_model, tmp_path / "out") < LIMIT
    assert difference(trainer.dense_model, encoder) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cls", "last", "prompted", "everything"])
def test_every_command_keeps_the_folder(bases, tmp_path, kind, capsys):
    """What pretrain, head and interpolate write encodes alike in both; below the views and at share 0 it is the start."""
    encoder = make_folder(bases, tmp_path / "start", kind)
    start, notes, trained = str(tmp_path / "start"), str(tmp_path / "notes.parquet"), str(tmp_path / "trained")
    make_notes(40).to_parquet(notes)
    quick = "--max_steps 2 --per_device_train_batch_size 8 --subspace_dim 2 --share 1 --views none --use_cpu"
    shared = ["--epsilon", "center", "--notes", notes, "--output"]  # a finite one multiplies this encoder's rounding
    main(["pretrain", "--model", start, "--notes", notes, "--output_dir", trained, *quick.split()])
    main(["head", "--model", start, *shared, str(tmp_path / "head")])
    main(["interpolate", "--model", trained, "--start", start, "--share", "0", *shared, str(tmp_path / "back")])
    for name in ("trained", "head", "back"):
        model = AutoDenseModel.from_pretrained(str(tmp_path / name))
        assert difference(model, tmp_path / name) < LIMIT
        below = model.encode(TEXTS, view=None) - encoder.encode(TEXTS, convert_to_tensor=True)
        assert (float(below.abs().max()) < LIMIT) == (name != "trained")
    report = [*shared[2:], str(tmp_path / "report"), "--similarity", "same_patient"]
    main(["probe", "--model", start, "--model", trained, *report])
    assert (tmp_path / "report" / "report.json").exists()


def test_interpolation_keeps_the_modules(bases, tmp_path):
    """Share 0 gives the start's embeddings, through the tail."""
    encoder = make_folder(bases, tmp_path, "dense")
    model, start = (AutoDenseModel.from_pretrained(str(tmp_path)) for _ in range(2))
    with torch.no_grad():
        model.base_model.embeddings.word_embeddings.weight.add_(0.1)
    interpolate_weights(model, start, 0.0)
    assert difference(model, encoder) < LIMIT


def test_chunks_pass_the_tail_together(bases, tmp_path):
    """A long text read in chunks has an embedding of length 1 where the folder ends with Normalize."""
    make_folder(bases, tmp_path, "normalised")
    model = AutoDenseModel.from_pretrained(str(tmp_path))
    model.config.densefeat["long_notes"] = "chunk"
    z = model.encode([" ".join(WORDS[:60] * 2), TEXTS[0]])
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2))


def _module(folder, kind, path="2_Other", **config):
    modules = json.loads((folder / "modules.json").read_text())
    (folder / path).mkdir(exist_ok=True)
    (folder / path / "config.json").write_text(json.dumps(config))
    (folder / "modules.json").write_text(json.dumps([*modules, {"idx": 2, "name": "2", "path": path, "type": kind}]))


def _edit(folder, name, **values):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


REFUSED = {
    "Router": lambda f: _module(f, "sentence_transformers.base.modules.router.Router"),
    "custom_st.Layer": lambda f: _module(f, "custom_st.Layer"),
    "its modules are StaticEmbedding": lambda f: (f / "modules.json").write_text(
        '[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.StaticEmbedding"}]'
    ),
    "its modules are CLIPModel": lambda f: (f / "modules.json").write_text(
        '[{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]'
    ),
    "pools by weightedmean": lambda f: _edit(f, "1_Pooling/config.json", pooling_mode="weightedmean"),
    "pools by mean and max": lambda f: _edit(f, "1_Pooling/config.json", pooling_mode=["mean", "max"]),
    "it is a SparseEncoder": lambda f: _edit(f, "config_sentence_transformers.json", model_type="SparseEncoder"),
    "it sets truncate_dim": lambda f: _edit(f, "config_sentence_transformers.json", truncate_dim=8),
    "it sets query_expansion": lambda f: _edit(f, "sentence_bert_config.json", query_expansion={"length": 32}),
    "takes message": lambda f: _edit(f, "sentence_bert_config.json", modality_config={"message": {}}),
    "no class of torch.nn": lambda f: _module(
        f, "sentence_transformers.models.Dense", activation_function="os.system"
    ),
    "reads or writes token_embeddings": lambda f: _module(
        f, "sentence_transformers.models.Normalize", module_input_name="token_embeddings"
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_kept_is_refused(bases, tmp_path, reason):
    """Before any weight is loaded, with the reason and what a folder may have."""
    make_folder(bases, tmp_path, "mean")
    REFUSED[reason](tmp_path)
    save_file({"linear.weight": torch.zeros(2, 2)}, *[tmp_path / "2_Other" / "model.safetensors"]) if (
        tmp_path / "2_Other"
    ).is_dir() else None
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"cannot be kept as it is: .*{reason}.* text Transformer, then Pooling"):
        AutoDenseModel.from_pretrained(str(tmp_path))


def test_an_unknown_prompt_is_refused(bases, tmp_path):
    """The error names the prompts there are."""
    make_folder(bases, tmp_path, "prompted")
    with pytest.raises(ValueError, match="one of document, passage, query but got 'other'"):
        AutoDenseModel.from_pretrained(str(tmp_path)).encode(TEXTS, prompt_name="other")
