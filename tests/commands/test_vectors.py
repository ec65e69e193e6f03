"""Vectors without an encoder: joined to the notes by an id or by the row, measured, and refused where they do not fit."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_notes
from sentence_transformers.sentence_transformer.modules import Dense

from hf_densefeat.commands import head, probe
from hf_densefeat.commands.settings import NotesTable, parse
from hf_densefeat.commands.vectors import numbered_notes, read_vectors


@pytest.fixture
def tables(tmp_path):
    """A table of notes in no order of time, and a vector of each of its rows."""
    notes = make_notes(40, seed=3)
    notes = notes.select(np.random.default_rng(0).permutation(len(notes)))
    notes = notes.add_column("note_id", [f"n{i}" for i in range(len(notes))])
    notes.to_parquet(str(tmp_path / "notes.parquet"))
    z = np.random.default_rng(1).normal(size=(len(notes), 5)).astype(np.float32)
    return tmp_path, notes, z


def test_vectors_are_joined_by_id_or_row(tables):
    """In any order, from one file, from shards and from columns; notes without a vector are not found."""
    folder, notes, z = tables
    read = numbered_notes(NotesTable(notes=str(folder / "notes.parquet")))
    expected = z[read["row"][:]]
    turned = np.random.default_rng(2).permutation(len(z))
    pq.write_table(pa.table({"row": turned, "vector": list(z[turned])}), folder / "by_row.parquet")
    columns = {f"x{i}": z[:, i] for i in range(5)}
    pq.write_table(pa.table({"note_id": notes["note_id"][:], "row": turned, **columns}), folder / "columns.parquet")
    (folder / "shards").mkdir()
    for part in (0, 1):
        rows = np.arange(part * 30, len(z) if part else 30)
        table = pa.table(
            {"row": rows, "patient_id": rows, "vector": pa.FixedSizeListArray.from_arrays(z[rows].ravel(), 5)}
        )
        pq.write_table(table, folder / "shards" / f"{part}.parquet")
    for source in ("by_row.parquet", "columns.parquet", "shards"):
        found, rows = read_vectors(str(folder / source), read, None)
        assert found.tolist() == list(range(len(read)))
        np.testing.assert_array_equal(rows, expected)
    pq.write_table(
        pa.table({"key": notes["note_id"][:7], "vector": list(z[:7])}).rename_columns(["note_id", "v"]),
        folder / "few.parquet",
    )
    found, rows = read_vectors(str(folder / "few.parquet"), read, "note_id")
    np.testing.assert_array_equal(rows, z[np.array(read["row"][:])[found]])
    assert len(found) == 7


def test_vectors_that_do_not_fit_are_refused(tables):
    """Another id, ids that repeat, codes, lengths that differ, NaN, nobody's."""
    folder, _, z = tables
    read = numbered_notes(NotesTable(notes=str(folder / "notes.parquet")))
    vectors = list(z)
    for table, message in (
        ({"key": np.arange(len(z)), "vector": vectors}, "expected a column note_id or row"),
        ({"row": np.zeros(len(z), int), "vector": vectors}, "one vector a row; some repeat"),
        ({"row": np.arange(len(z)), "vector": list((10 * z).astype(np.int8))}, "whole numbers are codes"),
        ({"row": np.arange(len(z)), "vector": [z[0][:4], *vectors[1:]]}, "of one length"),
        ({"row": np.arange(len(z)), "vector": [z[0] * np.nan, *vectors[1:]]}, "1 vectors are not finite"),
        ({"row": np.arange(len(z)) + 10**6, "vector": vectors}, "no note has a vector"),
    ):
        pq.write_table(pa.table(table), folder / "z.parquet")
        with pytest.raises(ValueError, match=message):
            read_vectors(str(folder / "z.parquet"), read, None)
    with pytest.raises(ValueError, match="no file or folder"):
        read_vectors(str(folder / "nowhere"), read, None)


@pytest.mark.slow
def test_probe_measures_vectors_alone(tables):
    """Similarity, geometry and words beside them; the query of a column is refused."""
    folder, notes, z = tables
    pq.write_table(pa.table({"note_id": notes["note_id"][:], "vector": list(z)}), folder / "z.parquet")
    words = [
        "--vectors",
        f"api={folder / 'z.parquet'}",
        "--notes",
        str(folder / "notes.parquet"),
        "--bootstraps",
        "20",
    ]
    report = probe.run(parse(probe, [*words, "--output", str(folder / "report"), "--k", "2"]))
    assert [one["name"] for one in report["measured"]] == ["words", "api"]
    assert "own notes mrr_with_words" in report["measured"][1]["against_words"]
    assert "vectors as given" in (folder / "report" / "report.md").read_text()
    assert json.loads((folder / "report" / "report.json").read_text())["verdicts"]["api"]["against"]
    with pytest.raises(ValueError, match="column:query need an encoder"):
        probe.run(parse(probe, [*words, "--similarity", "note_id:query"]))
    with pytest.raises(ValueError, match="Nothing to measure"):
        probe.run(parse(probe, words[2:]))


@pytest.mark.slow
def test_head_fits_the_views_of_vectors(tables, capsys):
    """Saved for sentence-transformers and for NumPy, both the same map; a model and vectors at once are refused."""
    folder, notes, z = tables
    pq.write_table(pa.table({"note_id": notes["note_id"][:], "vector": list(z)}), folder / "z.parquet")
    words = ["--vectors", str(folder / "z.parquet"), "--notes", str(folder / "notes.parquet")]
    head.run(parse(head, [*words, "--output", str(folder / "out"), "--epsilon", "1"]))
    said = capsys.readouterr().out
    assert "fused" in said
    assert "words" in said.split("\n\n")[1]
    for name in ("content", "form"):
        with np.load(folder / "out" / f"{name}.npz") as view:
            expected = (z - view["mean"]) @ view["matrix"]
        dense = Dense.load(str(folder / "out" / name))
        found = dense({"sentence_embedding": torch.from_numpy(z)})["sentence_embedding"].detach().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="either --model"):
        head.run(parse(head, [*words, "--model", "x", "--output", str(folder / "out")]))
