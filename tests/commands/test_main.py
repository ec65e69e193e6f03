"""`densefeat` itself, its help, and the head for an encoder that nobody trains."""

import json

import pytest
from conftest import make_model, make_notes
from safetensors.torch import load_file

import hf_densefeat
from hf_densefeat import AutoDenseModel
from hf_densefeat.commands import main, options

pytestmark = [pytest.mark.recipe, pytest.mark.slow]


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
        options.parse(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert sum(line.startswith("  --") for line in lines) == sum(map(len, options.GROUPS.values()))


def test_a_misspelt_option_names_the_nearest(capsys):
    """And says where the list is."""
    with pytest.raises(SystemExit):
        options.parse(["--notes", "x", "--model_name_or_path", "y", "--learnin_rate", "1", "--use_cpu"])
    assert "Did you mean learning_rate" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        options.parse(["--notes", "x", "--model_name_or_path", "y", "--head", "centre", "--use_cpu"])
    assert "center, auto or a number above 0" in capsys.readouterr().err


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
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Dense"]


def test_head_says_what_is_wrong_in_one_line(tmp_path):
    """An epsilon that is none, and notes that are not there."""
    words = ["head", "--model", "x", "--output", str(tmp_path), "--notes"]
    with pytest.raises(SystemExit, match="center, auto or a number"):
        main.main([*words, "x", "--epsilon", "much"])
    with pytest.raises(SystemExit, match="error: "):
        main.main([*words, str(tmp_path / "none.csv")])
