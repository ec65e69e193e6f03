"""The pretraining recipe, run as a user would, small, and given what users give by mistake."""

import json
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_model, make_notes
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoModel, AutoTokenizer

from hf_densefeat.commands import pretrain, pretraining
from hf_densefeat.data.splits import SplitRecord

DOCUMENTS = Path(__file__).parents[2] / "recipes" / "configs" / "documents.yaml"

pytestmark = [pytest.mark.recipe, pytest.mark.slow]


@pytest.fixture(scope="module")
def recipe():
    return pretrain


@pytest.fixture(scope="module")
def encoder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    make_model("bert", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("notes") / "notes.parquet"
    notes = make_notes(40)
    notes = notes.add_column("old", [patient % 2 == 0 for patient in notes["patient_id"]])
    notes.add_column("words", [float(len(text.split())) for text in notes["text"]]).to_parquet(path)
    return path


SMALL = ["--max_steps", "3", "--per_device_train_batch_size", "8", "--subspace_dim", "4", "--use_cpu"]
SMALL += ["--save_strategy", "no", "--logging_steps", "1", "--disable_tqdm", "true"]


@pytest.fixture
def run(recipe, capsys, tmp_path):
    """Run the recipe with arguments; what it printed, or what it exits with."""

    def run(*argv):
        try:
            recipe.main([*map(str, argv), "--output_dir", str(tmp_path / "out")], DOCUMENTS)
        except SystemExit as error:
            return f"{error.code} {capsys.readouterr().err}"
        return capsys.readouterr().out

    return run


def test_a_run_reads_measures_trains_and_writes_a_folder_that_opens(run, encoder, table, tmp_path):
    """What was read is printed, numbers before and after are saved, and the folder is an encoder."""
    out = run("--notes", table, "--model_name_or_path", encoder, "--probe", "old:binary", "words:regression", *SMALL)
    for words in (
        "notes of 40 patients",
        "adjacent pairs",
        "truncated",
        "effective rank",
        "old: AUROC",
        "words: RMSE",
        "trained 3 updates in",
    ):
        assert words in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80 or str(tmp_path) in max(out.splitlines(), key=len)
    assert sum(line.startswith("update ") for line in out.splitlines()) == 3
    folder = tmp_path / "out"
    numbers = json.loads((folder / "report.json").read_text())
    assert numbers["updates"] == 3
    assert numbers["before"]["geometry"]["n"] == numbers["after"]["geometry"]["n"] > 0
    assert (folder / "spectrum.png").stat().st_size > 10_000
    before, after = AutoModel.from_pretrained(encoder), AutoModel.from_pretrained(folder)
    assert any(not torch.equal(x, y) for x, y in zip(before.parameters(), after.parameters(), strict=True))
    assert len(AutoTokenizer.from_pretrained(folder)) == len(AutoTokenizer.from_pretrained(encoder))
    record = SplitRecord.from_dict(after.config.densefeat["split"])
    assert set(np.bincount(record.rules[0].parts_of(sorted(set(pq.read_table(table)["patient_id"].to_pylist()))))) == {
        28,
        6,
    }


def test_a_new_head_is_trained_alone_first(run, tokenizer, encoder, table, tmp_path, monkeypatch):
    """A checkpoint without a masked-LM head gets one, and its encoder does not move while the head warms up."""
    bare = tmp_path / "bare"
    AutoModel.from_pretrained(encoder).save_pretrained(bare)
    tokenizer.save_pretrained(bare)
    start = load_file(bare / "model.safetensors")
    seen = {}
    train = pretraining.warm_up_head

    def watched(model, *args):
        head = model.cls.predictions.transform.dense.weight.detach().clone()
        train(model, *args)
        seen["head moved"] = not torch.equal(head, model.cls.predictions.transform.dense.weight)
        body = dict(model.bert.named_parameters())
        seen["body moved"] = any(not torch.equal(body[name], start[name]) for name in body)
        seen["all train again"] = all(parameter.requires_grad for parameter in model.parameters())

    monkeypatch.setattr(pretraining, "warm_up_head", watched)
    out = run("--notes", table, "--model_name_or_path", bare, "--head_warmup_steps", "2", *SMALL)
    assert "trained alone first, for 2 updates" in out
    assert seen == {"head moved": True, "body moved": False, "all train again": True}


def test_yaml_values_get_the_options_types_and_the_command_line_wins(recipe, tmp_path):
    """1e-4 is a float, no is a word, paths are relative to the file, and an option of the command line overrides."""
    config = tmp_path / "c.yaml"
    config.write_text(
        "notes: ./notes.csv\nmodel_name_or_path: m\nlearning_rate: 1e-4\nsave_strategy: no\nmax_steps: 7\n"
        "bf16: false\nprobe: [died:binary, age:regression]\nmax_gap: null\nterms: {rank_deficit: 1e-1}\n"
    )
    parsed, args = recipe.parse(["--config", str(config), "--max_steps", "9", "--use_cpu"])
    assert args.learning_rate == 1e-4
    assert args.max_steps == 9
    assert args.save_strategy == "no"
    assert args.bf16 is False
    assert args.max_gap is None
    assert parsed.notes == str(tmp_path / "notes.csv")
    assert parsed.probe == ["died:binary", "age:regression"]
    assert args.terms == {"rank_deficit": 0.1}


def test_without_arguments_the_bundled_cohort_and_encoder_are_used(recipe):
    """The default run needs nothing that is not in the repository."""
    parsed, args = recipe.parse(["--use_cpu"], DOCUMENTS)
    assert Path(parsed.notes).is_file()
    assert Path(parsed.model, "model.safetensors").is_file()
    assert args.dense_weight > 0


def write(path, rows):
    datasets.Dataset.from_dict(rows).to_parquet(path)
    return path


GOOD = {"patient_id": [1, 1, 2, 2, 3, 3, 4, 4], "time": [1, 2] * 4, "text": ["fever and cough"] * 7 + ["stable"]}
MISTAKES = {
    "missing column": (GOOD | {"texts": GOOD["text"], "text": None}, [], ["text", "texts"]),
    "one patient only": ({k: v[:2] for k, v in GOOD.items()}, [], ["patient"]),
    "no patient with two notes": (
        {"patient_id": list(range(8)), "time": [1] * 8, "text": list("abcdefgh")},
        [],
        ["two notes", "got 8 notes of 8 patients"],
    ),
    "texts all empty": (GOOD | {"text": [""] * 8}, [], ["text", "8"]),
    "times that are none": (GOOD | {"time": ["yesterday"] * 8}, [], ["time", "row"]),
    "k too large": (GOOD, ["--subspace_dim", "20", "--window", "none"], ["subspace_dim is 20", "batch"]),
    "pooling unknown": (GOOD, ["--pooling", "middle"], ["middle", "mean, cls, last, max"]),
    "probe of an unknown kind": (GOOD, ["--probe", "died:binery"], ["kind one of", "died:binery"]),
    "use of an unknown kind": (GOOD, ["--similarity", "died:near"], ["died:near"]),
    "probe of no column": (GOOD, ["--subspace_dim", "1", "--probe", "died:binary"], ["died"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_clear_error_before_training(run, encoder, tmp_path, mistake):
    """What is wrong, where, and no traceback."""
    rows, options, words = MISTAKES[mistake]
    path = write(tmp_path / "bad.parquet", {name: values for name, values in rows.items() if values})
    message = run("--notes", path, "--model_name_or_path", encoder, *SMALL[:6], *SMALL[6:], *options)
    assert "error:" in message
    assert "Traceback" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(("name", "words"), [("", "Repo id must use"), ("someone/dense", "offline mode is enabled")])
def test_a_push_that_cannot_be_is_refused_before_training(run, encoder, table, monkeypatch, name, words):
    """A name that the Hub does not take, and no network: one line."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = run("--notes", table, "--model_name_or_path", encoder, *SMALL, "--push_to_hub", f"--hub_model_id={name}")
    assert "pretrain: error: " in message
    assert words in message


def test_an_empty_file_an_unknown_key_and_a_model_without_a_head_are_named(run, encoder, table, tmp_path):
    """Each gives one line."""
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    assert "empty.csv" in run("--notes", empty, "--model_name_or_path", encoder)
    config = tmp_path / "c.yaml"
    config.write_text("learning_rat: 1")
    message = run("--config", config)
    assert "unknown key 'learning_rat'" in message
    assert "learning_rate" in message
    assert "no_such_file.csv" in run("--notes", tmp_path / "no_such_file.csv", "--model_name_or_path", encoder)
    message = run("--notes", table, "--model_name_or_path", tmp_path / "no_such_model", *SMALL)
    assert "error:" in message
    assert "no_such_model" in message
    vision = tmp_path / "vision"
    vision.mkdir()
    (vision / "config.json").write_text('{"model_type": "vit"}')
    (vision / "tokenizer.json").write_bytes((encoder / "tokenizer.json").read_bytes())
    (vision / "tokenizer_config.json").write_bytes((encoder / "tokenizer_config.json").read_bytes())
    message = run("--notes", table, "--config_name", vision, *SMALL)
    assert "reads pixel_values, not tokens of a text" in message


@pytest.mark.parametrize(("chosen", "expected"), [("1", 2), ("3", 1), (None, 1)])
def test_only_accelerates_single_thread_is_undone(recipe, monkeypatch, tmp_path, chosen, expected):
    """A number of threads that the user chose stays."""
    args = recipe.parse(["--use_cpu", "--output_dir", str(tmp_path)], DOCUMENTS)[1]
    set_to = [1]
    monkeypatch.setattr(pretraining.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(pretraining.torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(pretraining.torch, "set_num_threads", set_to.append)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    pretraining.use_every_core(args)
    assert set_to[-1] == expected


@pytest.mark.parametrize(("load", "said"), [(0.2, ""), (1.8, "other programs use 2 of 2 cores")])
def test_other_programs_are_said(recipe, monkeypatch, tmp_path, capsys, load, said):
    """Threads beside another program spin: one line of the log says what helps."""
    args = recipe.parse(["--use_cpu", "--output_dir", str(tmp_path)], DOCUMENTS)[1]
    monkeypatch.setattr(pretraining.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(pretraining.os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(pretraining.torch, "get_num_threads", lambda: 2)
    pretraining.use_every_core(args)
    assert said in capsys.readouterr().out


def test_what_fails_after_training_leaves_the_encoder(run, encoder, table, tmp_path, monkeypatch):
    """Whatever it is: the folder opens."""

    def fail(*args, **options):
        raise RuntimeError("not of ours")

    monkeypatch.setattr(pretraining, "fit_views", fail)
    with pytest.raises(RuntimeError, match="not of ours"):
        run("--notes", table, "--model", encoder, *SMALL)
    AutoModel.from_pretrained(tmp_path / "out")


def test_what_was_measured_of_other_options_is_not_shown_beside(recipe, tmp_path, capsys):
    """The file says of which options it is; another seed, model or number of steps leaves it out, and says so."""
    own, args = recipe.parse(["--use_cpu"], DOCUMENTS)
    assert [one["name"] for one in pretraining.kept_measurements(own, args)] == ["MLM alone"]
    for words in (["--seed", "7"], ["--max_steps", "2000"], ["--model", "answerdotai/ModernBERT-base"]):
        assert pretraining.kept_measurements(*recipe.parse(["--use_cpu", *words], DOCUMENTS)) == []
        assert "first-run-mlm.json is left out: it was measured with" in " ".join(capsys.readouterr().out.split())


def test_a_start_that_was_trained_for_similarity(run, tokenizer, table, tmp_path):
    """No language modelling, an anchor, a share that validation notes choose; what is named wins, and the folder remembers."""
    make_model("bert", tokenizer).base_model.save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    config.pop("densefeat")
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    modules = [Transformer(str(tmp_path / "bare"))]
    modules += [Pooling(modules[0].get_embedding_dimension(), pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "similar"))
    out = run("--notes", table, "--model", tmp_path / "similar", *SMALL)
    for words in (
        "trained for similarity",
        "pairs adjacent halves",
        "0 mlm_loss + 3 (",
        "3.33333 anchor",
        "trained 3 updates",
        "share auto",
        "of the way",
    ):
        assert words in " ".join(out.split())
    block = json.loads((tmp_path / "out" / "config.json").read_text())["densefeat"]
    assert block["contrastive"]
    assert 0 <= block["share"] <= 1
    assert "share of the way from the start" in (tmp_path / "out" / "README.md").read_text()
    out = run(
        "--notes",
        table,
        "--model",
        tmp_path / "out",
        "--lambda_anchor",
        "0",
        "--share",
        "0",
        "--views",
        "none",
        *SMALL,
    )
    assert "trained for similarity" in out
    assert "anchor" not in out.partition("objective")[2].partition("output")[0]
    first, last = (
        SentenceTransformer(str(tmp_path / name), device="cpu").encode(["fever"]) for name in ("similar", "out")
    )
    np.testing.assert_allclose(np.linalg.norm(last), 1, rtol=1e-5)
    assert first.shape == last.shape
