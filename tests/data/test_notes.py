"""Any table becomes notes, or one clear error that quotes no patient text."""

import datetime
import gzip
import json
import logging
import subprocess
import sys
import traceback

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from hf_densefeat.data.notes import copied, describe_notes, load_notes
from hf_densefeat.data.pairs import adjacent_pairs
from hf_densefeat.data.splits import split_by_patient

SENTINEL = "Zebrafish"
TABLE = {
    "patient_id": [7, 3, 7, 3, 5],
    "time": [
        "2020-03-01 10:00:00",
        "2020-01-01 00:00:00",
        "2020-02-01 09:30:00",
        "2020-01-02 00:00:00",
        "2021-01-01 00:00:00",
    ],
    "text": ["seven b", 'three "a",\nsecond line', "seven a", "three b", "five é"],
    "score": [1, 2, 3, 4, 5],
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Converted files go to a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path, table):
    """Write a table in the format that the path names."""
    name = path.name
    if name.endswith(".parquet"):
        pq.write_table(pa.table(table), path)
    elif ".csv" in name or ".tsv" in name:
        delimiter = "\t" if ".tsv" in name else ","
        with pa.output_stream(str(path)) as out:
            pa.csv.write_csv(pa.table(table), out, pa.csv.WriteOptions(delimiter=delimiter))
    else:
        rows = pa.table(table).to_pylist()
        text = json.dumps(rows) if name.endswith(".json") else "".join(f"{json.dumps(row)}\n" for row in rows)
        with pa.output_stream(str(path)) as out:
            out.write(text.encode())
    return path


def plain(**columns):
    """A table of two patients with two notes each, with columns replaced."""
    base = {"patient_id": [1, 1, 2, 2], "time": [0, 1, 0, 1], "text": ["a", "b", "c", "d"]}
    return datasets.Dataset.from_dict(base | columns)


@pytest.mark.parametrize(
    "name",
    [
        "n.parquet",
        "n.csv",
        "n.csv.gz",
        "n.tsv",
        "n.tsv.gz",
        "n.jsonl",
        "n.jsonl.gz",
        "n.json",
        "folder",
        "saved",
        "object",
    ],
)
def test_every_format_gives_the_same_notes(tmp_path, name):
    """One table, however stored, gives the same rows, sorted by patient and time, with its other columns."""
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        write(path / "0.csv", {key: values[:2] for key, values in TABLE.items()})
        write(path / "1.csv", {key: values[2:] for key, values in TABLE.items()})
    elif name == "saved":
        datasets.Dataset.from_dict(TABLE).save_to_disk(str(path))
    elif name == "object":
        path = datasets.Dataset.from_dict(TABLE)
    else:
        write(path, TABLE)
    for source in (path, path if name == "object" else str(path)):
        notes = load_notes(source)
        assert notes["patient_id"][:] == [3, 3, 5, 7, 7]
        assert notes["text"][:] == ['three "a",\nsecond line', "three b", "five é", "seven a", "seven b"]
        assert notes["score"][:] == [2, 4, 5, 3, 1]
        assert notes["time"][0] == datetime.datetime(2020, 1, 1)
        assert notes.features["time"].dtype == "timestamp[us]"


def test_presets_are_detected_and_said(tmp_path, caplog):
    """MIMIC-IV-Note as downloaded: ties in charttime go by note_seq, side tables are left out, the log says so."""
    caplog.set_level(logging.INFO)
    notes = {
        "note_id": ["1-DS-2", "1-DS-1"],
        "subject_id": [1, 1],
        "hadm_id": [20, 20],
        "note_type": ["DS", "DS"],
        "note_seq": [10, 9],
        "charttime": ["2180-05-07 00:00:00"] * 2,
        "storetime": ["2180-05-09 15:26:00", None],
        "text": ["second", "first"],
    }
    write(tmp_path / "discharge.csv.gz", notes)
    write(tmp_path / "discharge_detail.csv.gz", {"note_id": ["1-DS-1"], "field_name": ["author"]})
    loaded = load_notes(tmp_path)
    assert loaded["text"][:] == ["first", "second"]
    assert loaded["note_type"][:] == ["DS", "DS"]
    assert "columns taken as MIMIC-IV-Note" in loaded.info.description
    assert "discharge_detail.csv.gz" in caplog.text


def meds(tmp_path):
    """A MEDS folder of three shards: without any text, with `large_string`, and with `string`."""
    numbers = pa.table({"subject_id": [3], "time": [datetime.datetime(2020, 1, 1)], "code": ["LAB//X"]})
    (tmp_path / "data" / "early").mkdir(parents=True)
    pq.write_table(numbers, tmp_path / "data" / "early" / "0.parquet")
    for shard, (kind, subject) in {"train": (pa.string(), 1), "held_out": (pa.large_string(), 2)}.items():
        folder = tmp_path / "data" / shard
        folder.mkdir(parents=True)
        time = [None, *(datetime.datetime(2020, 1, day) for day in (1, 2, 3))]
        table = {
            "subject_id": pa.array([subject] * 4, pa.int64()),
            "time": pa.array(time, pa.timestamp("us")),
            "code": pa.array(["MEDS_BIRTH", "NOTE//HP", "LAB//X", "NOTE//DS"], pa.string()),
            "numeric_value": pa.array([None, None, 1.0, None], pa.float32()),
            "text_value": pa.array([None, "first", "positive", "second"], kind),
        }
        pq.write_table(pa.table(table), folder / "0.parquet")
    (tmp_path / "metadata").mkdir()
    table = pa.table({"subject_id": [2, 1], "split": pa.array(["held_out", "train"], pa.large_string())})
    pq.write_table(table, tmp_path / "metadata" / "subject_splits.parquet")
    return tmp_path


def test_meds(tmp_path):
    """A MEDS folder: events with text, notes by their code, splits from the metadata."""
    notes = load_notes(meds(tmp_path))
    assert notes["text"][:] == ["first", "second"] * 2
    assert "columns taken as MEDS" in notes.info.description
    assert "dropped 2 with other codes (first event with text 2 of held_out/0.parquet)" in notes.info.description
    parts = split_by_patient(notes)
    assert {name: part["patient_id"][:] for name, part in parts.items()} == {"train": [1, 1], "test": [2, 2]}


@pytest.mark.parametrize(
    ("values", "expected", "kind"),
    [
        (["2020-01-02", "2020-01-01"], 1, "timestamp[us]"),
        (["2020-01-01T10:00:00Z", "2020-01-01T10:00:00+02:00"], 1 / 12, "timestamp[us]"),
        (["2020-01-01 00:00:00.123456789", "2020-01-01"], 0.123456 / 86400, "timestamp[us]"),
        ([datetime.date(2020, 1, 3), datetime.date(2020, 1, 1)], 2, "timestamp[us]"),
        ([7, -3], 10, "int64"),
        (["7", "-3"], 10, "int64"),
        ([1.5, 1.0], 0.5, "float64"),
        ([datetime.datetime(9999, 1, 1), datetime.datetime(9998, 1, 1)], 365, "timestamp[us]"),
    ],
)
def test_times(values, expected, kind):
    """Timestamps, dates, ISO strings with and without a zone, and days are all read; the gap is in days."""
    notes = load_notes(datasets.Dataset.from_dict({"patient_id": [1, 1], "time": values, "text": ["a", "b"]}))
    assert notes["text"][:] == ["b", "a"]
    assert notes.features["time"].dtype == kind
    assert len(adjacent_pairs(notes, max_gap=expected * 1.001)) == 1
    with pytest.raises(ValueError, match="1 by max_gap"):
        adjacent_pairs(notes, max_gap=expected * 0.999)


def test_sorting_is_stable_and_independent_of_the_source():
    """Notes of one time keep the order of the rows; a dataset with an indices mapping reads as its rows say."""
    table = datasets.Dataset.from_dict({"patient_id": list("baab"), "time": [0, 0, 0, -1], "text": list("wxyz")})
    assert load_notes(table)["text"][:] == ["x", "y", "z", "w"]
    assert load_notes(table.select([3, 2, 1, 0]))["text"][:] == ["y", "x", "z", "w"]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (plain().remove_columns("time").add_column("tiem", [0, 1, 0, 1]), ["`time`", "`tiem`", "columns="]),
        (plain(text=["", " \n", None, "\u00a0"]), ["All 4 texts are empty"]),
        (plain(text=[None] * 4), ["All 4 texts are empty"]),
        (plain(text=[1, 2, 3, 4]), ["text holds int64"]),
        (plain(time=["2020-01-01", "2020-01-02", SENTINEL, "x"]), ["Column time", "row 3", "ISO 8601"]),
        (plain(time=["2020-01-01", "2020-02-30", "5", "x"]), ["Column time", "row 2"]),
        (plain(time=["5", "6", "seven", "8"]), ["Column time", "row 3"]),
        (plain(time=[True] * 4), ["time holds bool"]),
        (plain(time=[0, 1, None, 3]), ["1 of 4 rows have no time", "first row 3", 'on_missing="drop"']),
        (plain(patient_id=["a", " ", None, "b"]), ["2 of 4 rows have no patient", "first row 2"]),
        (plain(patient_id=[1.0, 2.0, 2.5, 3.0]), ["no identifiers", "row 3"]),
        (plain(patient_id=[[1]] * 4), ["patient_id holds list"]),
        (plain().select([]), ["no rows"]),
    ],
)
def test_bad_tables_are_refused(table, words):
    """Each fault gives one ValueError that says what, where and what to do."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - every word is checked below
        load_notes(table)
    for word in words:
        assert word in str(error.value)
    assert SENTINEL not in str(error.value)


def test_options_are_checked(tmp_path):
    """Wrong arguments are named, with what would be right."""
    with pytest.raises(ValueError, match="on_missing"):
        load_notes(plain(), on_missing="ignore")
    with pytest.raises(ValueError, match="MIMIC-IV-Note"):
        load_notes(plain(), columns="mimic")
    with pytest.raises(ValueError, match=r"got \['note'\]"):
        load_notes(plain(), columns={"note": "text"})
    with pytest.raises(ValueError, match="there twice"):
        load_notes(plain().add_column("when", [0, 1, 2, 3]), columns={"time": "when"})
    with pytest.raises(ValueError, match="no such file"):
        load_notes(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="expected files named"):
        load_notes(tmp_path)
    with pytest.raises(ValueError, match=r"one of \['a', 'b'\]"):
        load_notes(datasets.DatasetDict(a=plain(), b=plain()))
    with pytest.raises(ValueError, match="got int"):
        load_notes(3)
    assert len(load_notes(datasets.DatasetDict(a=plain(), b=plain()), split="b")) == 4


def test_patient_ids_are_stripped():
    """White space around an identifier does not make two patients of one."""
    notes = load_notes(plain(patient_id=["a", "a ", "b", " b"]))
    assert notes["patient_id"][:] == ["a", "a", "b", "b"]
    assert len(adjacent_pairs(notes)) == 2


def test_patient_ids_that_a_missing_one_made_floats():
    """Whole floats are integers again."""
    notes = load_notes(plain(patient_id=[2.0, 1.0, float("nan"), 1.0]), on_missing="drop")
    assert notes["patient_id"][:] == [1, 1, 2]
    assert notes.features["patient_id"].dtype == "int64"


def test_own_columns():
    """Named columns are renamed to ours; the others stay."""
    table = plain().rename_columns({"patient_id": "mrn", "text": "note"})
    notes = load_notes(table, columns={"patient_id": "mrn", "text": "note"})
    assert set(notes.column_names) == {"patient_id", "time", "text"}
    assert table.info.description == ""


def test_rows_are_dropped_with_a_count_and_the_first_row(caplog):
    """No text and exact duplicates are dropped, missing times on request; all are counted, nothing silently."""
    table = {
        "patient_id": [1, 1, 1, 1, 2, 2],
        "time": [0, 0, 1, None, 0, -1],
        "text": ["a", "a", " ", "d", "a", "f"],
        "note_id": ["x", "x", "y", "z", "x", "w"],
    }
    notes = load_notes(datasets.Dataset.from_dict(table), on_missing="drop")
    assert notes["text"][:] == ["a", "f", "a"]
    for words in (
        "dropped 1 with no text (first row 3)",
        "1 with no time (first row 4)",
        "1 with the same patient, time and text as another (first row 2)",
        "kept 1 with a negative time (first row 6)",
        "2 with a note_id that another note has too (first row 1)",
    ):
        assert words in notes.info.description
        assert words.removeprefix("dropped ").removeprefix("kept ") in caplog.text


def test_copies_that_differ_in_white_space_are_counted_and_left_out_when_asked():
    """Copied forward with a space more, at the same time or later; the same letters in another order are no copy."""
    texts = [
        "chest pain 12 mg",
        "chest  pain\n12 mg ",
        "chest pain 12 mg\t",
        "chest pain 21 mg",
        "chest pain 12 mg",
        "x",
    ]
    table = plain(patient_id=[1, 1, 1, 1, 2, 2], time=[0, 0, 5, 6, 0, 1], text=texts)
    notes = load_notes(table)
    assert notes["text"][:] == [texts[0], *texts[2:]]
    assert "2 with a text that the same patient has at another time (first row 1)" in notes.info.description
    assert "3 with a text that another patient has too (first row 1)" in notes.info.description
    assert copied(notes) == 2
    notes = load_notes(table, drop_copies=True)
    assert notes["text"][:] == [texts[0], *texts[3:]]
    assert "1 with a text that the patient had before (first row 3)" in notes.info.description
    assert copied(notes) == 0


def test_dirty_text_is_mended_and_counted(tmp_path):
    """NUL bytes and bytes that are not UTF-8 are mended in their rows; a note of a megabyte is a note."""
    long = "word " * 200_000
    rows = [
        b"patient_id,time,text",
        b"007,2020-01-01,caf\xe9",
        b"007,2020-01-02,a\0b",
        b"08,2020-01-01," + long.encode(),
    ]
    (tmp_path / "n.csv").write_bytes(b"\n".join(rows) + b"\n")
    notes = load_notes(tmp_path / "n.csv")
    assert notes["text"][:] == ["café", "ab", long]
    assert notes["patient_id"][:] == ["007", "007", "08"]
    assert (
        "1 with text with bytes that are not UTF-8, read as Windows-1252 (first row 1 of n.csv)"
        in notes.info.description
    )
    assert "1 with text with NUL bytes, removed (first row 2 of n.csv)" in notes.info.description


def test_a_column_that_changes_its_type_is_read_as_strings(tmp_path, monkeypatch):
    """A csv column of numbers, until one is none, costs its type and nothing else."""
    monkeypatch.setattr("hf_densefeat.data.readers.BLOCK_BYTES", 1 << 12)
    rows = "".join(f"{i % 9},{i},word {i},{i if i < 900 else 'none'}\n" for i in range(1000))
    (tmp_path / "n.csv").write_text("patient_id,time,text,score\n" + rows)
    notes = load_notes(tmp_path / "n.csv")
    assert len(notes) == 1000
    assert notes["score"][0] == "0"
    assert notes["patient_id"][0] == 0


HEAD = b"patient_id,time,text\n"
GOOD = b"".join(b"%d,%d,%s %d\n" % (i // 3, i, SENTINEL.encode(), i * i * 7919) for i in range(3000))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("n.csv", b"", ["n.csv is empty (0 bytes)"]),
        ("n.csv", b"\n\n", ["n.csv"]),
        ("n.csv", HEAD, ["no rows"]),
        ("n.csv", HEAD + b"1,2,a,b\n", ["n.csv", "damaged"]),
        ("n.csv", HEAD + GOOD + b'1,2,"' + SENTINEL.encode() + b"\n1,2,x\n", ["never closed", "row 3,001"]),
        ("n.csv", b"text,text,time,patient_id\na,b,1,2\n", ["two columns of one name"]),
        ("n.csv", b"1,5,%s\n" % SENTINEL.encode() + GOOD, ["Missing column", "is the first row a header"]),
        ("n.csv.gz", gzip.compress(HEAD + GOOD)[:-2000], ["n.csv.gz", "cut short"]),
        ("n.csv.gz", HEAD + GOOD, ["n.csv.gz", "not what its name says"]),
        ("n.parquet", b"PAR1" + GOOD, ["n.parquet", "damaged"]),
        ("n.jsonl", b'{"patient_id": 1, "time": 2, "te', ["n.jsonl", "jsonl"]),
        ("n.jsonl", b'{"patient_id": 1, "time": 2, "text": "%s"}\n[1]\n' % SENTINEL.encode(), ["n.jsonl", "jsonl"]),
        ("n.json", b'[{"patient_id": 1}, 2]', ["n.json"]),
        ("n.json", b"[]", ["n.json", "no rows"]),
        ("n.xlsx", b"PK", ["n.xlsx is a spreadsheet", "csv"]),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, words):
    """A damaged file gives one error that names it; neither message nor traceback quotes a patient."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - every word is checked below
        load_notes(tmp_path / name)
    for word in words:
        assert word in str(error.value)
    assert SENTINEL not in "".join(traceback.format_exception(error.value))


def test_a_damaged_saved_folder(tmp_path):
    """A folder that save_to_disk wrote, and that lost its data, is named."""
    datasets.Dataset.from_dict(TABLE).save_to_disk(str(tmp_path / "saved"))
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="saved was written by `save_to_disk`"):
        load_notes(tmp_path / "saved")


def test_shards_must_agree(tmp_path):
    """Shards of a folder without the columns of notes, or of another kind, are refused by name."""
    write(tmp_path / "0.csv", TABLE)
    write(tmp_path / "1.csv", {key: values for key, values in TABLE.items() if key != "text"})
    with pytest.raises(ValueError, match=r"1\.csv has the columns"):
        load_notes(tmp_path)
    write(tmp_path / "1.parquet", TABLE)
    with pytest.raises(ValueError, match="holds csv and parquet files"):
        load_notes(tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_column_that_nobody_needs_does_not_decide(tmp_path, kind, caplog):
    """Empty in the first shard, of another type in the second, and missing in the third: the notes are read, all of them."""
    base = {"patient_id": [1, 1], "time": [0, 1]}
    for i, more in enumerate(
        ({"unit": [None, None], "n": [1, 2]}, {"unit": ["x", "y"], "n": ["a", "b"]}, {"n": [1, 2]})
    ):
        write(tmp_path / f"{i}.{kind}", base | {"text": [f"{i} a", f"{i} b"]} | more)
    notes = load_notes(tmp_path)
    assert sorted(notes["text"][:]) == ["0 a", "0 b", "1 a", "1 b", "2 a", "2 b"]
    rows = {row["text"]: (row["unit"], row["n"]) for row in notes}
    assert rows["1 a"] == ("x", "a")
    assert rows["2 a"] == (None, "1")
    assert "Some files lack the columns ['unit']" in caplog.text


def test_a_header_that_is_not_utf_8_is_read_as_cells_are(tmp_path):
    """Windows-1252, also after an empty line."""
    lines = "\r\nPatientennr;Datum;Befund;Größe\r\n1;2020-01-01;Ödem;1\r\n1;2020-01-02;b;2\r\n"
    (tmp_path / "n.csv").write_bytes(lines.encode("latin-1"))
    notes = load_notes(tmp_path / "n.csv", columns={"patient_id": "Patientennr", "time": "Datum", "text": "Befund"})
    assert notes["text"][:] == ["Ödem", "b"]
    assert notes["Größe"][:] == [1, 2]


def test_a_changed_file_is_read_anew(tmp_path):
    """The conversion is kept while the file stays the same, and not longer."""
    path = write(tmp_path / "n.parquet", TABLE)
    assert len(load_notes(path)) == 5
    write(path, {key: values[:3] for key, values in TABLE.items()})
    assert len(load_notes(path)) == 3


def malformed(seed):
    """A csv, jsonl or parquet table with one to three random faults: its name and bytes."""
    rng = np.random.default_rng(seed)
    columns = {
        "subject_id": [int(i) for i in rng.integers(1, 4, 12)],
        "charttime": [f"2150-0{rng.integers(1, 10)}-{rng.integers(10, 28)} 00:00:00" for _ in range(12)],
        "note_seq": list(range(12)),
        "text": [f"{SENTINEL} {i}" for i in range(12)],
    }
    odd = [
        None,
        "",
        "   ",
        SENTINEL,
        "\0",
        "2020-13-45",
        "9" * 30,
        "-1",
        "nan",
        "é" * 50,
        '"',
        "a\nb",
        1e300,
        -5,
        True,
        [1],
        {"k": 1},
    ]
    for _ in range(rng.integers(1, 4)):
        name = str(rng.choice(list(columns)))
        match rng.integers(6):
            case 0:
                columns[name] = [odd[rng.integers(len(odd))], *columns[name][1:]]
            case 1:
                columns[name] = [odd[rng.integers(len(odd))]] * max(1, len(columns[name]))
            case 2:
                columns = {("x" + key if key == name else key): values for key, values in columns.items()}
            case 3:
                rows = int(rng.integers(3))
                columns = {key: values[:rows] for key, values in columns.items()}
            case 4:
                columns[name] = columns[name][::-1]
            case 5:
                columns = {key: values + values[:2] for key, values in columns.items()}
    rows = max(map(len, columns.values()))
    columns = {key: values + [None] * (rows - len(values)) for key, values in columns.items()}
    kind = str(rng.choice(["csv", "csv.gz", "jsonl", "json", "parquet"]))
    if kind == "parquet":
        try:
            table = pa.table(columns)
        except (pa.ArrowException, OverflowError, TypeError):
            table = pa.table(
                {key: [None if value is None else str(value) for value in values] for key, values in columns.items()}
            )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        content = sink.getvalue().to_pybytes()
    elif "csv" in kind:
        rows = [list(columns), *zip(*columns.values(), strict=True)]
        quote = '"' if rng.random() < 0.5 else ""
        content = "\n".join(
            ",".join(f"{quote}{'' if cell is None else cell}{quote}" for cell in row) for row in rows
        ).encode()
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        content = (json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))).encode()
    if rng.random() < 0.3 and content:
        place = int(rng.integers(len(content)))
        match rng.integers(3):
            case 0:
                content = content[:place]
            case 1:
                content = content[:place] + rng.bytes(4) + content[place + 4 :]
            case 2:
                content = content + content[place:]
    if kind == "csv.gz":
        content = gzip.compress(content, 1)
        content = content[: int(len(content) * rng.choice([1, 1, 0.7]))]
    return f"n.{kind}", content


@pytest.mark.slow
def test_generated_malformed_tables(tmp_path):
    """400 tables with random faults give notes in order, or a ValueError of ours without patient text."""
    loaded = 0
    for seed in range(400):
        name, content = malformed(seed)
        (tmp_path / name).write_bytes(content)
        notes = caught = None
        try:
            notes = load_notes(tmp_path / name, on_missing=["error", "drop"][seed % 2])
        except ValueError as error:
            caught = error
        if caught is not None:
            assert type(caught) is ValueError, seed
            shown = "".join(traceback.format_exception(caught))
            assert SENTINEL not in shown, seed
            assert "site-packages" not in shown, (seed, shown)
            continue
        loaded += 1
        assert describe_notes(notes).startswith(f"{len(notes)} notes of {len(set(notes['patient_id']))} patients")
        assert all(text.strip() for text in notes["text"])
        keys = list(zip(notes["patient_id"], notes["time"], strict=True))
        assert keys == sorted(keys), seed
    assert 50 < loaded < 350


def test_summary_counts():
    """The summary counts patients, notes and adjacent pairs, and prints one line without a patient."""
    summary = describe_notes(load_notes(plain(patient_id=["a", "a", "a", "b"], time=[0, 1, 2, 3])))
    assert summary == "4 notes of 2 patients (median 2, most 3 a patient), 2 adjacent pairs"


@pytest.mark.slow
def test_a_file_of_one_row_group_is_not_held_in_memory(tmp_path):
    """What pandas writes is one group of up to a million rows: 40 MB of text are read with less than 15 MB in Arrow's pool."""
    text = "chest pain " * 90
    table = {"patient_id": np.arange(40_000) // 4, "time": np.arange(40_000) % 4}
    table["text"] = [f"{i} {text}" for i in range(40_000)]
    path = tmp_path / "notes.parquet"
    pq.write_table(pa.table(table), path, row_group_size=40_000, compression="none", use_dictionary=False)
    program = "import sys, pyarrow as pa; from hf_densefeat import load_notes; load_notes(sys.argv[1])"
    program += "; print(pa.default_memory_pool().max_memory())"  # of the process: another one has read other tables
    run = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 15e6


def test_a_ledger_cut_short_is_written_anew_and_the_cache_is_private(tmp_path, monkeypatch):
    """A full disk or a kill in the middle must not fail for ever; others can read neither the folder nor the files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "notes.csv"
    path.write_text("patient_id,time,text\n1,1,fever\n1,2,cough\n")
    expected = load_notes(path).to_dict()
    [ledger] = (tmp_path / "cache" / "hf_densefeat").glob("*.json")
    ledger.write_text(ledger.read_text()[:10])
    assert load_notes(path).to_dict() == expected
    assert load_notes(path).to_dict() == expected
    written = list(ledger.parent.iterdir())
    assert sorted(one.suffix for one in written) == [".arrow", ".json"]
    assert all(one.stat().st_mode & 0o077 == 0 for one in (ledger.parent, *written))
