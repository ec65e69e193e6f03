"""`densefeat encode`: vectors of a table, in files that are whole or not there, the same however they were made."""

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import make_model, make_notes
from sentence_transformers import quantize_embeddings

from hf_densefeat import AutoDenseModel, DenseHead
from hf_densefeat.commands import main

SENTINEL = "zebrasentinel"
pytestmark = pytest.mark.recipe


@pytest.fixture(scope="module")
def work(tokenizer, tmp_path_factory):
    """An encoder, and a table of notes with a sentinel in each, out of order, two rows without text."""
    work = tmp_path_factory.mktemp("work")
    make_model("bert", tokenizer).save_pretrained(work / "encoder")
    tokenizer.save_pretrained(work / "encoder")
    notes = make_notes(10)
    frame = pd.DataFrame({name: notes[name] for name in ("patient_id", "time", "text")})
    frame["text"] = SENTINEL + " " + frame["text"]
    frame["note_id"] = [f"n{i}" for i in range(len(frame))]
    frame = frame.sample(frac=1, random_state=0)
    frame.loc[frame.index[3], "text"] = " "
    frame.loc[frame.index[20], "text"] = "NULL"
    frame.to_parquet(work / "notes.parquet", index=False)
    return work


def encode(work, output, *more):
    """Run the command in this process; the manifest."""
    words = ["--model", work / "encoder", "--notes", work / "notes.parquet", "--output", output, "--shard_size", 7]
    main.main(["encode", *map(str, (*words, *more))])
    return json.loads((output / "_manifest.json").read_text())


def contents(folder):
    """Name to bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def vectors(work):
    encode(work, work / "vectors")
    return work / "vectors"


def test_vectors_are_those_of_encode_and_nothing_else_is_written(work, vectors):
    """Of every row with a text; the folder is private, and no text is in it."""
    table = pd.read_parquet(work / "notes.parquet")
    found = pd.read_parquet(vectors)
    kept = [i for i in range(len(table)) if i not in (3, 20)]
    assert found["row"].tolist() == kept
    assert list(found) == ["row", "patient_id", "time", "note_id", "vector"]
    for name in ("patient_id", "time", "note_id"):
        assert found[name].tolist() == table[name].iloc[kept].tolist()
    wanted = AutoDenseModel.from_pretrained(str(work / "encoder")).encode(table["text"].iloc[kept].tolist())
    np.testing.assert_allclose(np.stack(found["vector"].tolist()), wanted, atol=1e-6)
    manifest = json.loads((vectors / "_manifest.json").read_text())
    assert len(manifest["files"]) == -(-len(table) // 7)
    for name, content in contents(vectors).items():
        assert SENTINEL.encode() not in content
        if name != "_manifest.json":
            assert manifest["files"][name]["sha256"] == hashlib.sha256(content).hexdigest()
    assert vectors.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in vectors.iterdir()} == {0o600}
    assert str(work) not in (vectors / "_manifest.json").read_text()


def test_other_programs_open_the_folder(vectors):
    """`datasets`, DuckDB and pandas, and any one file alone."""
    found = datasets.load_dataset(str(vectors), split="train", cache_dir=str(vectors.parent / "cache"))
    frame = pd.read_parquet(vectors)
    assert found["row"][:] == frame["row"].tolist()
    np.testing.assert_array_equal(found.with_format("numpy")["vector"][:], np.stack(frame["vector"].tolist()))
    import duckdb

    rows = duckdb.sql(f"SELECT count(*), len(any_value(vector)) FROM '{vectors}/*.parquet'").fetchall()
    assert rows[0] == (len(frame), len(frame["vector"][0]))


@pytest.mark.slow
def test_the_block_of_the_guide_searches_the_folder(vectors, monkeypatch):
    """In the folder's place, as printed: a note finds itself first."""
    monkeypatch.chdir(vectors.parent)
    guide = (Path(__file__).parents[2] / "recipes" / "README.md").read_text()
    block, names = next(one for one in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "faiss" in one), {}
    exec(block, names)
    np.testing.assert_allclose(names["scores"][:, 0], 1, atol=1e-5)
    assert names["rows"].shape == (2, 5)


def test_a_run_goes_on_where_it_was_stopped(work, vectors):
    """Files that are there stay; those that are not are made as they were, half-written ones are not read."""
    before = contents(vectors)
    kept = {path: path.stat().st_mtime_ns for path in vectors.glob("*.parquet")}
    gone = sorted(kept)[2::3]
    for path in gone:
        path.unlink()
        kept.pop(path)
    (vectors / ".unfinished").mkdir()
    (vectors / ".unfinished" / f"{gone[0].name}.1").write_bytes(b"half")
    encode(work, vectors)
    assert contents(vectors) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize("more", [["--precision", "int8"], ["--shard_size", "9"], ["--max_length", "8"]])
def test_another_run_is_refused(work, vectors, more):
    """Vectors of two kinds are not mixed; what differs is named."""
    before = contents(vectors)
    with pytest.raises(SystemExit, match=f"holds vectors of another run: {more[0][2:]} differ"):
        encode(work, vectors, *more)
    assert contents(vectors) == before


def test_other_notes_and_a_folder_of_something_else_are_refused(work, vectors, tmp_path):
    """One changed letter is another table."""
    table = pd.read_parquet(work / "notes.parquet")
    table.loc[30, "text"] += "s"
    table.to_parquet(tmp_path / "notes.parquet")
    with pytest.raises(SystemExit, match="another run: notes differ"):
        encode(work, vectors, "--notes", tmp_path / "notes.parquet")
    with pytest.raises(SystemExit, match="is not empty, and no folder of vectors"):
        encode(work, tmp_path)
    with pytest.raises(SystemExit, match="truncate_dim from 1 to"):
        encode(work, tmp_path / "new", "--truncate_dim", 1000)


@pytest.mark.parametrize("precision", ["float16", "int8", "bits"])
def test_precisions_are_those_of_sentence_transformers(work, vectors, tmp_path, precision):
    """The first 8 dimensions, with the range of all notes, since there are fewer than are sampled."""
    z = np.stack(pd.read_parquet(vectors)["vector"].tolist())[:, :8]
    encode(work, tmp_path / "out", "--precision", precision, "--truncate_dim", 8)
    found = np.stack(pd.read_parquet(tmp_path / "out")["vector"].tolist())
    if precision == "float16":
        wanted = z.astype(np.float16)
        assert (
            pq.read_schema(next((tmp_path / "out").glob("*.parquet"))).field("vector").type.value_type == "halffloat"
        )
    else:
        wanted = quantize_embeddings(z, {"int8": "int8", "bits": "ubinary"}[precision])
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(found.astype(float), wanted.astype(float), atol=1 if precision == "int8" else 1e-3)
    assert (found == wanted).mean() > 0.98  # a value within 1e-7 of the border of a step may be on the other side


@pytest.mark.parametrize("view", ["form", "none", None])
def test_a_view_of_an_encoder_that_has_some(work, tokenizer, tmp_path, view):
    """The one that is named; content without a name."""
    model = AutoDenseModel.from_pretrained(str(work / "encoder"))
    texts = [text for text in pd.read_parquet(work / "notes.parquet")["text"] if text not in (" ", "NULL")]
    z = model.encode(texts, view=None)
    model.views = {"content": DenseHead.fit(z), "form": DenseHead.fit(z, epsilon=1.0)}
    model.save_pretrained(tmp_path / "views")
    tokenizer.save_pretrained(tmp_path / "views")
    encode(work, tmp_path / "out", "--model", tmp_path / "views", *(["--view", view] if view else []))
    found = np.stack(pd.read_parquet(tmp_path / "out")["vector"].tolist())
    wanted = model.encode(texts, view={"form": "form", "none": None, None: "content"}[view])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    with pytest.raises(SystemExit, match="Expected view to be one of"):
        encode(work, tmp_path / "another", "--view", "form")


@pytest.mark.slow
def test_killed_runs_and_two_processes_give_the_same_files(work, vectors, tmp_path):
    """SIGKILL after the second file and after the fourth; then two processes do the rest."""
    words = ["--model", work / "encoder", "--notes", work / "notes.parquet", "--output", tmp_path / "out"]
    command = [sys.executable, "-m", "hf_densefeat.commands.main", "encode", *map(str, words), "--shard_size", "7"]
    for files in (2, 4):
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list((tmp_path / "out").glob("*.parquet"))) < files and run.poll() is None:
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert not (Path(tmp_path / "out") / "vectors-00006-of-00008.parquet").exists() or run.returncode == 0
    done = subprocess.run([*command, "--num_processes", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(vectors)
