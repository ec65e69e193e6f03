"""`densefeat` itself, its help, and the head for an encoder that nobody trains."""

import argparse
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_notes
from safetensors.torch import load_file
from transformers import HfArgumentParser

import hf_densefeat
from hf_densefeat import AutoDenseModel
from hf_densefeat.commands import head, main, pretrain, settings
from hf_densefeat.commands.settings import refuse_unknown
from hf_densefeat.training.arguments import DenseTrainingArguments

pytestmark = pytest.mark.recipe


def test_version_usage_and_an_unknown_command(capsys):
    """Each is what a stranger types first."""
    main.main(["--version"])
    assert capsys.readouterr().out.strip() == hf_densefeat.__version__
    main.main([])
    assert "densefeat head" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no command 'foo'"):
        main.main(["foo"])


def test_help_fits_a_screen_and_names_options_that_exist(capsys):
    """The options that people set, in groups; every one has a help."""
    with pytest.raises(SystemExit):
        pretrain.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert sum(line.startswith("  --") for line in lines) == sum(map(len, pretrain.GROUPS.values()))


def test_a_misspelt_option_names_the_nearest(capsys):
    """And says where the list is."""
    with pytest.raises(SystemExit):
        pretrain.parse(["--notes", "x", "--model_name_or_path", "y", "--learnin_rate", "1", "--use_cpu"])
    assert "Did you mean learning_rate" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pretrain.parse(["--notes", "x", "--model_name_or_path", "y", "--views", "centre", "--use_cpu"])
    assert "auto, center or a number above 0" in capsys.readouterr().err


def test_one_name_of_the_model_and_the_other_is_taken():
    """`--model` everywhere; what transformers' scripts call it is understood, with = and with a hyphen."""
    parsed = settings.parse(head, ["--model-name-or-path=m", "--notes", "n-n", "--output", "o", "--id-column=a-b"])
    assert (parsed.model, parsed.notes, parsed.id_column) == ("m", "n-n", "a-b")
    words = ["--notes", "x", "--model_name_or_path", "y", "--use_cpu"]
    pretrain.check(words)
    parsed, _ = pretrain.parse(words)
    assert parsed.model == "y"


def test_an_error_names_the_options_of_the_command():
    """Python's arguments become options, with their values; what the command has no option for is left out."""
    told = ValueError(
        'Say: `time_unit=` one of days, `time_format="%d.%m. %Y"`, or leave them out (`on_missing="drop"`).'
    )
    found = settings.error_line(told, ["time_unit", "time_format"])
    assert found == "Say: --time_unit one of days, --time_format '%d.%m. %Y', or leave them out."
    assert (
        settings.error_line(ValueError("allow it (allow_trained=True)."), ["allow_trained"])
        == "allow it (--allow_trained)."
    )


def test_an_output_folder_that_cannot_be_written_is_named_with_its_option(tmp_path):
    """Before notes are read; nothing is left in one that can be."""
    (tmp_path / "a file").write_text("")
    with pytest.raises(ValueError, match=r"--output '.*/a file/out' cannot be written: Not a directory"):
        settings.writable(str(tmp_path / "a file" / "out"), "output")
    assert list(settings.writable(str(tmp_path / "new"), "output").iterdir()) == []


@pytest.mark.parametrize("words", [["--num_processes", "2"], ["--num_processes=2"]])
def test_several_processes_are_launched_either_way(monkeypatch, words):
    """With a space and with =."""
    called = []
    monkeypatch.setattr(main.subprocess, "call", lambda command: called.append(command) or 7)
    with pytest.raises(SystemExit) as end:
        main.launch_if_several("head", ["--model", "a=b", *words, "--notes", "n"])
    assert end.value.code == 7
    launched = [
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "-m",
        "hf_densefeat.commands.main",
        "head",
        "--model",
        "a=b",
        "--notes",
        "n",
    ]
    assert called[0][3:] == launched


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("probe", ["--task", "died:binery"], "Expected --task label:kind .* got 'died:binery'"),
        ("probe", ["--similarity", "died:near"], "column:neighbours, column:query"),
        ("head", ["--similarity", "died:near"], "column:neighbours, column:query"),
    ],
)
def test_a_wrong_word_is_refused_before_the_notes_are_read(tmp_path, monkeypatch, tokenizer, command, words, said):
    """Of a task or a use."""
    monkeypatch.setattr(settings.NotesTable, "read", lambda self: pytest.fail("the notes are read"))
    make_model("bert", tokenizer).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    with pytest.raises(SystemExit, match=said):
        main.main(
            [command, "--model", str(tmp_path / "encoder"), "--notes", "n", "--output", str(tmp_path / "o"), *words]
        )


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", ["center", "auto", "0.5"])
def test_head_ends_the_mean_cosine_and_keeps_the_weights(tokenizer, tmp_path, capsys, epsilon):
    """A folder with the encoder as it was, and the head; what the held-out notes look like is printed."""
    model = make_model("bert", tokenizer)
    model.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    make_notes(40).to_parquet(tmp_path / "notes.parquet")
    words = ["--model", tmp_path / "encoder", "--notes", tmp_path / "notes.parquet", "--output", tmp_path / "ö ut"]
    main.main(["head", *map(str, words), "--epsilon", epsilon])
    assert "mean cosine" in capsys.readouterr().out
    again = AutoDenseModel.from_pretrained(str(tmp_path / "ö ut"))
    assert again.dense_head is not None
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("encoder", "ö ut"))
    assert all(before[name].equal(after[name]) for name in before)
    modules = json.loads((tmp_path / "ö ut" / "modules.json").read_text())
    assert modules[-1]["path"].endswith("Dense" if epsilon == "center" else "Router")
    assert set(again.views) == ({"content"} if epsilon == "center" else {"content", "form"})


def test_head_says_what_is_wrong_in_one_line(tmp_path):
    """An epsilon that is none, and notes that are not there."""
    words = ["head", "--model", str(tmp_path), "--output", str(tmp_path), "--notes"]
    with pytest.raises(SystemExit, match="auto, center or a number"):
        main.main([*words, "x", "--epsilon", "much"])
    with pytest.raises(SystemExit, match="error: "):
        main.main([*words, str(tmp_path / "none.csv")])


@pytest.mark.slow
def test_interpolate_writes_an_encoder_between_start_and_model(tokenizer, tmp_path, capsys):
    """The start has no masked-LM head, as many on the Hub have none: the model's stays; the dense head is fitted anew."""
    start, model = make_model("bert", tokenizer), make_model("bert", tokenizer)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape)
    start.bert.save_pretrained(tmp_path / "start")
    model.save_pretrained(tmp_path / "model")
    for folder in ("start", "model"):
        tokenizer.save_pretrained(tmp_path / folder)
    make_notes(40).to_parquet(tmp_path / "notes.parquet")
    words = ["interpolate", "--notes", tmp_path / "notes.parquet", "--output", tmp_path / "half", "--share"]
    words = [str(word) for word in (*words, 0.5, "--model", tmp_path / "model", "--start")]
    main.main([*words, str(tmp_path / "start")])
    assert "mean cosine" in capsys.readouterr().out
    half = AutoDenseModel.from_pretrained(str(tmp_path / "half"))
    assert half.dense_head is not None
    for name, value in half.state_dict().items():
        first, last = start.state_dict()[name], model.state_dict()[name]
        own = (
            name.startswith("cls.") and name != "cls.predictions.decoder.weight"
        )  # that is tied to the embedding matrix
        torch.testing.assert_close(value, last if own else (first + last) / 2)
    make_model("distilbert", tokenizer).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match=r"is a DistilBertForMaskedLM and .* expected the start"):
        main.main([*words, str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="share to be a finite number"):
        main.main([*(word if word != "0.5" else "-1" for word in words), str(tmp_path / "start")])


def test_the_options_that_are_read_from_the_source_are_those_of_the_parser():
    """What the quick check knows, the parser takes, and the other way round."""
    parser = HfArgumentParser([pretrain.Settings, DenseTrainingArguments], add_help=False)
    taken = {action.dest: action for action in parser._actions}
    written = pretrain.written_options()
    assert set(written) - set(pretrain.EXTRA) == set(taken) - set(pretrain.EXTRA)
    for names in pretrain.GROUPS.values():
        for name in names:
            default, text = written[name]
            assert text == taken[name].help
            assert isinstance(default, (int, float, str)) <= (default == taken[name].default)
    switches = ["--no-center", "--no_center", "--center=false", "--learning-rate", "1e-4", "--max_gap=-1", "text--x"]
    refuse_unknown(switches, written, argparse.ArgumentParser())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrain", "--max_step", "3", "--modle=x"], "unknown: --max_step. Did you mean max_steps"),
        (["pretrain", "--max_step", "3", "--modle=x"], "unknown: --modle=x. Did you mean model"),
        (["probe", "--modle", "x"], "densefeat probe: error: unknown: --modle. Did you mean model?"),
        (["head", "--notes", "x"], "the following arguments are required: --output"),
        (["probe", "--k", "x", "--model", "m", "--notes", "n"], "argument --k: invalid int value"),
        *(([name, "--help"], "") for name in main.COMMANDS),
        (["--help"], ""),
        (["pretain"], "there is no command 'pretain'. Did you mean pretrain?"),
    ],
)
def test_a_misspelt_word_is_answered_before_anything_heavy_is_imported(words, said):
    """In a process in which torch, and with it transformers, cannot be imported."""
    script = "import atexit, sys; sys.modules.update(torch=None, datasets=None, numpy=None); "
    script += "atexit.register(lambda: print('transformers' in sys.modules)); "
    script += f"from hf_densefeat.commands.main import main; main({words})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 if "--help" in words else done.returncode in (1, 2)
    assert said in done.stderr
    assert done.stdout.endswith("False\n")
    assert ("usage: densefeat" in done.stdout) == ("--help" in words)
    assert "Traceback" not in done.stderr


def csv_of_ones_own(path, notes):
    """The notes under other names."""
    table = notes.to_pandas().rename(columns={"patient_id": "MRN", "time": "seen on", "text": "note"})
    table.to_csv(path, index=False)
    return path


@pytest.mark.slow
def test_a_table_with_other_names_is_named_by_options(tokenizer, tmp_path, capsys):
    """Without them the sentence has the options, with them `head` and `probe` read it."""
    encoder = tmp_path / "encoder"
    make_model("bert", tokenizer).save_pretrained(encoder)
    tokenizer.save_pretrained(encoder)
    table = str(csv_of_ones_own(tmp_path / "mine.csv", make_notes(40)))
    with pytest.raises(SystemExit, match="Name yours with --patient_column, --time_column, --text_column"):
        main.main(["probe", "--model", str(encoder), "--notes", table])
    names = ["--patient_column", "MRN", "--time_column", "seen on", "--text_column", "note"]
    main.main(["head", "--model", str(encoder), "--notes", table, "--output", str(tmp_path / "out"), *names])
    small = ["--bootstraps", "20", "--k", "2", "--no_cache", "--output", str(tmp_path / "report")]
    main.main(["probe", "--model", str(encoder), "--notes", table, *names, *small])
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["head", "probe", "pretrain"])
def test_a_model_without_a_tokenizer_and_one_that_is_not_there_are_named(tokenizer, tmp_path, command, capsys):
    """transformers would make a tokenizer of the special tokens alone, and every word would be unknown."""
    make_model("bert", tokenizer).save_pretrained(tmp_path / "bare")
    make_notes(40).to_parquet(tmp_path / "notes.parquet")
    out = ["--output_dir" if command == "pretrain" else "--output", str(tmp_path / "out")]
    option = "--model_name_or_path" if command == "pretrain" else "--model"
    words = [command, "--notes", str(tmp_path / "notes.parquet"), *out, option]
    with pytest.raises(SystemExit, match="No tokenizer beside the model"):
        main.main([*words, str(tmp_path / "bare")])
    with pytest.raises(SystemExit, match=r"The model '.*absent' cannot be loaded\. There is no such folder"):
        main.main([*words, str(tmp_path / "absent")])


@pytest.mark.slow
def test_head_of_patients_with_one_note_each(tokenizer, tmp_path, capsys):
    """No note follows another: the shape of the embeddings is measured, and no use of them by patient."""
    make_model("bert", tokenizer).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    notes = make_notes(40)
    notes = notes.remove_columns("patient_id").add_column("patient_id", list(range(len(notes))))
    notes.to_parquet(tmp_path / "notes.parquet")
    words = ["head", "--model", str(tmp_path / "encoder"), "--notes", str(tmp_path / "notes.parquet")]
    main.main([*words, "--output", str(tmp_path / "out")])
    assert "mean cosine" in capsys.readouterr().out
    small = ["--k", "2", "--no_cache", "--output", str(tmp_path / "report")]
    main.main(["probe", *words[1:], *small])
    assert (tmp_path / "report" / "report.html").is_file()
    with pytest.raises(SystemExit, match="column:query, column:same"):
        main.main([*words, "--output", str(tmp_path / "none"), "--similarity", "text:wrong"])
    assert not (tmp_path / "none").exists()


def test_models_that_see_different_lengths_are_said():
    """Where both cut, the shorter length makes them comparable; a model that reads notes in chunks cuts none."""
    from hf_densefeat.commands import probing

    made = {}
    for name, limit, cut in (("a", 8, 0.5), ("b", 16, 0.5), ("c", 8, 0.0)):
        made[name] = SimpleNamespace(max_length=limit, measured={"geometry": {"truncated": cut}})
    said = probing.different_lengths({name: made[name] for name in "ab"})
    assert "--max_length 8 makes them comparable" in said
    assert probing.different_lengths({name: made[name] for name in "ac"}) == ""
