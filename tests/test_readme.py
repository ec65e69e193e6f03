"""The first page and the guide: short enough, true to the code, and their blocks run as printed."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hf_densefeat.commands import main, pretrain
from hf_densefeat.commands.settings import parser_of
from hf_densefeat.evaluation import geometry

ROOT = Path(__file__).parents[1]
README, GUIDE = ((ROOT / name).read_text() for name in ("README.md", "recipes/README.md"))


def blocks(text, language="python"):
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_first_page_is_short():
    """A reader has minutes."""
    assert len(README.split()) <= 1500
    assert len(README.splitlines()) <= 150


def test_links_and_pictures_are_there():
    """Every relative link of both pages names a file."""
    for page, text in ((ROOT, README), (ROOT / "recipes", GUIDE)):
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert (page / target).exists(), target


def test_the_log_table_has_the_thresholds_of_the_code():
    """The states of collapse have one definition."""
    assert f"below {geometry.COLLAPSED_RANK:.0%}".replace("%", " %") in README
    assert f"above {geometry.OVERSPREAD_RANK:.0%}".replace("%", " %") in README


def test_commands_are_given_options_that_exist():
    """Every option that the first page prints is one of its command."""
    text = README.replace("\\\n", " ")
    modules = {name: importlib.import_module(f"hf_densefeat.commands.{name}") for name in main.COMMANDS}
    known = {name: parser_of(module) for name, module in modules.items() if name != "pretrain"}
    for command, words in re.findall(r"^    densefeat (\w+) (.*)$", text, re.MULTILINE):
        names = {word for word in words.split() if word.startswith("--")}
        if command in known:
            assert names <= set(known[command]._option_string_actions)
        else:
            argv = words.replace("emilyalsentzer/Bio_ClinicalBERT", "model").split()
            assert pretrain.parse([*argv, "--use_cpu"])


@pytest.mark.slow
def test_python_blocks_run_as_printed(tmp_path, monkeypatch):
    """In order, in one process, in a folder that has the repository's recipes; updates cut to two."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes" / "data", tmp_path / "recipes" / "data")
    names = {}
    for block in blocks(README)[:-1]:
        exec(block.replace("max_steps=100", "max_steps=2"), names)
    assert names["z"].shape == (8, 192)


@pytest.mark.slow
def test_a_folder_with_a_head_is_searched_without_the_package(tmp_path):
    """The command of the page makes the folder; its block searches it, in a process of its own, in two ways that agree."""
    bundled = ROOT / "recipes" / "data" / "medquad"
    columns = ["--patient_column", "document_id", "--time_column", "order"]
    pq.write_table(pq.read_table(bundled / "answers.parquet").slice(0, 600), tmp_path / "notes.parquet")
    argv = ["head", "--model", str(bundled / "encoder"), "--notes", str(tmp_path / "notes.parquet"), *columns]
    main.main([*argv, "--max_length", "32", "--output", str(tmp_path / "sharper"), "--epsilon", "auto"])
    check = """
import sys
assert "hf_densefeat" not in sys.modules
assert [hit["corpus_id"] for hit in hits[0]] == rows[0].tolist()
assert all(abs(hit["score"] - score) < 1e-5 for hit, score in zip(hits[0], scores[0]))
"""
    program = blocks(README)[-1] + check
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_block_of_a_database_runs_as_printed(tmp_path, monkeypatch):
    """SQLite, by `Dataset.from_sql`."""
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(next(block for block in blocks(GUIDE) if "sqlite3" in block), names)
    assert len(names["notes"]) == 2
    exec(next(block for block in blocks(GUIDE) if "evaluate.load" in block), names)
    assert 1 <= names["rank"]["effective_rank"] <= 8
