"""Tables as hospitals and public repositories have them: each is read rightly, or refused with the cure."""

import csv
import datetime
import gzip
import io
import json
import sqlite3
import zipfile

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_densefeat.commands.measuring import parse_tasks
from hf_densefeat.data.identity import NONE_WORDS
from hf_densefeat.data.notes import WHITE, load_notes
from hf_densefeat.data.pairs import adjacent_pairs

DAY = datetime.datetime(2020, 1, 2)
ROWS = [(1, "2020-01-02", "first; a | b"), (1, "2020-01-05", "second"), (2, "2020-01-03", "third")]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Converted files go to a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def table(times=("2020-01-02", "2020-01-05", "2020-01-03"), **names):
    """Three notes of two patients, with columns named otherwise."""
    values = {"patient_id": [1, 1, 2], "time": list(times), "text": ["first", "second", "third"]}
    return {names.get(name, name): value for name, value in values.items()}


# ---- Layouts ----


def test_mimic_iii(tmp_path):
    """CHARTTIME, else CHARTDATE; errors are left out and counted; marks are text."""
    lines = [
        "ROW_ID,SUBJECT_ID,HADM_ID,CHARTDATE,CHARTTIME,STORETIME,CATEGORY,ISERROR,TEXT",
        '1,22532,167853,2151-08-04,,,Discharge summary,,"Admission Date: [**2151-7-16**]"',
        '2,22532,167853,2151-08-03,2151-08-03 09:15:00,,Nursing,,"calm"',
        '3,22532,167853,2151-08-05,2151-08-05 10:00:00,,Nursing,1,"wrong patient"',
    ]
    (tmp_path / "NOTEEVENTS.csv").write_text("\n".join(lines) + "\n")
    notes = load_notes(tmp_path / "NOTEEVENTS.csv")
    assert notes["time"][:] == [datetime.datetime(2151, 8, 3, 9, 15), datetime.datetime(2151, 8, 4)]
    assert notes["text"][:] == ["calm", "Admission Date: [**2151-7-16**]"]
    assert "columns taken as MIMIC-III" in notes.info.description
    assert "1 with a mark that they are errors (first row 3 of NOTEEVENTS.csv)" in notes.info.description


@pytest.mark.parametrize("missing", [None, "note_datetime", "note_date"])
def test_omop(missing):
    """note_datetime, else note_date; either may be no column at all."""
    rows = {
        "person_id": [1, 1],
        "note_date": [datetime.date(2020, 1, 2), datetime.date(2020, 1, 5)],
        "note_datetime": [
            datetime.datetime(2020, 1, 2, 8),
            None if missing is None else datetime.datetime(2020, 1, 5),
        ],
        "note_text": ["a", "b"],
    }
    notes = load_notes({name: values for name, values in rows.items() if name != missing})
    first = DAY if missing == "note_datetime" else datetime.datetime(2020, 1, 2, 8)
    assert notes["time"][:] == [first, datetime.datetime(2020, 1, 5)]
    assert "columns taken as OMOP" in notes.info.description


def test_static_events_and_other_codes_of_meds_are_counted(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "metadata").mkdir()
    rows = {
        "subject_id": [1, 1, 1, 1],
        "time": [None, DAY, DAY + datetime.timedelta(1), DAY],
        "code": ["NOTE//static", "NOTE//x", "NOTE//x", "LAB//y"],
        "text_value": ["born", "a", "b", "1.0"],
    }
    pq.write_table(pa.table(rows), tmp_path / "data" / "0.parquet")
    notes = load_notes(tmp_path)
    assert notes["text"][:] == ["a", "b"]
    assert "1 with no time" in notes.info.description
    assert "1 with other codes" in notes.info.description


def test_names_in_another_case_with_spaces():
    notes = load_notes(table(patient_id=" Patient_ID", time="TIME ", text="Text"))
    assert notes["text"][:] == ["first", "second", "third"]
    with pytest.raises(ValueError, match="`Text` and `TEXT`: say which"):
        load_notes(table(text="Text") | {"TEXT": ["x"] * 3})
    notes = load_notes(table(text="Text") | {"TEXT": ["x", "y", "z"]}, columns={"text": "TEXT"})
    assert notes["text"][:] == ["x", "y", "z"]


def test_fhir_is_refused_with_the_cure(tmp_path):
    rows = [{"resourceType": "DocumentReference", "id": str(i), "date": "2020-01-02"} for i in range(3)]
    (tmp_path / "documents.ndjson").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"FHIR.*base64.*attachment\.data"):
        load_notes(tmp_path / "documents.ndjson")


# ---- Sources ----


def frames():
    rows = table()
    yield "pandas", pd.DataFrame(rows)
    yield "pandas with an index of its own", pd.DataFrame(rows, index=[5, 7, 9])
    yield "pandas categories", pd.DataFrame(rows).astype({"text": "category"})
    yield "arrow", pa.table(rows)
    yield (
        "arrow views",
        pa.table({name: pa.array(v, pa.string_view() if name == "text" else None) for name, v in rows.items()}),
    )
    yield "dict", rows
    yield "list", [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]


@pytest.mark.parametrize(("kind", "source"), list(frames()), ids=lambda value: value if isinstance(value, str) else "")
def test_frames_and_lists(kind, source):
    notes = load_notes(source)
    assert notes["text"][:] == ["first", "second", "third"]
    assert notes["time"][0] == DAY
    assert set(notes.column_names) == {"patient_id", "time", "text"}


def test_what_is_no_table():
    for source in (3, {1, 2}, [1, 2], {"patient_id": [1], "time": [1, 2], "text": ["a"]}):
        with pytest.raises(ValueError, match=r"Expected a path|no table"):
            load_notes(source)


def test_a_query_of_sqlite(tmp_path):
    """As in the guide."""
    with sqlite3.connect(tmp_path / "notes.db") as connection:
        connection.execute("create table noteevents (subject_id integer, charttime text, text text)")
        connection.executemany("insert into noteevents values (?, ?, ?)", ROWS)
        notes = load_notes(pd.read_sql("select * from noteevents where subject_id = 1", connection))
    assert notes["text"][:] == ["first; a | b", "second"]
    connection.close()


# ---- Times ----

DISGUISED = {
    "dates with a time, YYYYMMDDHHMMSS": [20200102080000, 20200105080000, 20200103080000],
    "dates with a time, YYYYMMDDHHMM": [202001020800, 202001050800, 202001030800],
    "dates, YYYYMMDD": [20200102, 20200105, 20200103],
    "months, YYYYMM": [202001, 202002, 202001],
    "years, YYYY": [2020, 2021, 2020],
    "seconds since 1970": [1577923200, 1578182400, 1578009600],
    "milliseconds since 1970": [1577923200000, 1578182400000, 1578009600000],
}
SHIFTED = {  # as MIMIC shifts dates, and one date before 1979 among others
    "seconds since 1970, first row 1": [5685379200, 5688057600, 7226582400],
    "milliseconds since 1970, first row 1": [5685379200000.5, 5688057600000, 7226582400000],
    "microseconds since 1970, first row 1": [5685379200000000, 5688057600000000, 7226582400000000],
    "seconds since 1970, first row 2": [86400, 162864000, 1577923200],
    "a unit shorter than days .divide minutes by 1440., first row 1": [26300000, 26300060, 26300120],
}


@pytest.mark.parametrize("looks", SHIFTED)
def test_more_than_a_million_days_count_something_else(looks):
    with pytest.raises(ValueError, match=f"look like {looks}, not like days"):
        load_notes(table(SHIFTED[looks]))
    assert len(load_notes(table(SHIFTED[looks]), time_unit="days")) == 3


@pytest.mark.parametrize("how", ["numbers", "strings", "floats"])
@pytest.mark.parametrize("looks", DISGUISED)
def test_dates_in_disguise_are_refused_and_read_when_said(looks, how):
    time = [str(t) if how == "strings" else float(t) if how == "floats" else t for t in DISGUISED[looks]]
    with pytest.raises(ValueError, match=f"look like {looks}, first row 1, .*`time_unit=`.*days, seconds") as error:
        load_notes(table(time))
    assert str(time[0]) not in str(error.value)
    unit = looks.split()[0] if "since" in looks else "yyyymmdd"
    notes = load_notes(table(time), time_unit=unit)
    month = {"months, YYYYMM": (2020, 1, 1), "years, YYYY": (2020, 1, 1)}.get(looks, (2020, 1, 2))
    assert (notes["time"][0].year, notes["time"][0].month, notes["time"][0].day) == month
    assert load_notes(table(time), time_unit="days")["time"][:] == [*sorted(map(float, time[:2])), float(time[2])]


@pytest.mark.parametrize("time", [[43831, 43834, 43832], [0, 3, 1], [0.5, 2020.25, 1.0], [-3, 0, 2]])
def test_days_stay_days(time):
    assert "times as numbers of days" in load_notes(table(time)).info.description


FORMATS = {
    "%d/%m/%Y": ["02/01/2020", "31/01/2020", "03/01/2020"],
    "%m/%d/%Y": ["01/02/2020", "01/31/2020", "01/03/2020"],
    "%d-%b-%y": ["02-JAN-20", "31-JAN-20", "03-JAN-20"],
    "%m/%d/%Y %I:%M %p": ["1/2/2020 3:04 PM", "1/31/2020 3:04 AM", "1/3/2020 3:04 PM"],
    "%d.%m.%y %H:%M:%S": ["02.01.20 08:00:01", "31.01.20 08:00:01", "03.01.20 08:00:01"],
}


@pytest.mark.parametrize("pattern", FORMATS)
def test_dates_of_other_countries_are_read_when_said(pattern):
    with pytest.raises(ValueError, match="not ISO 8601, first in row 1") as error:
        load_notes(table(FORMATS[pattern]))
    assert f'`time_format="{pattern}"`.' in str(error.value)  # the only one that reads all rows
    notes = load_notes(table(FORMATS[pattern]), time_format=pattern)
    assert [time.date() for time in notes["time"]] == [
        datetime.date(2020, 1, 2),
        datetime.date(2020, 1, 31),
        datetime.date(2020, 1, 3),
    ]


def test_day_and_month_that_cannot_be_told_apart():
    with pytest.raises(ValueError, match=r"cannot be told apart.*%d/%m/%Y.* or .*%m/%d/%Y"):
        load_notes(table(["01/02/2020", "03/04/2020", "05/06/2020"]))
    with pytest.raises(ValueError, match=r"row 2\. Expected the same in every row: '%d/%m/%Y'"):
        load_notes(table(["31/12/2020", "12/31/2020", "01/01/2020"]), time_format="%d/%m/%Y")
    with pytest.raises(ValueError, match="`time_unit` to be one of days"):
        load_notes(table(), time_unit="weeks")


def test_placeholders_are_named():
    notes = load_notes(table(["9999-12-31", "1900-01-01", "0001-01-01"]))
    assert "3 with a date that often stands for none (0001-01-01, 1900-01-01, 9999-12-31; make it null" in (
        notes.info.description
    )


# ---- Files ----


def written(path, separator=",", encoding="utf-8"):
    lines = [separator.join(("patient_id", "time", "text"))]
    lines += [separator.join((str(patient), time, f'"{text}"')) for patient, time, text in ROWS]
    content = ("\n".join(lines) + "\n").encode(encoding)
    name = path.name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("notes.csv", content)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(content))
    elif name.endswith((".zst", ".bz2")):
        with pa.output_stream(str(path), compression="detect") as out:
            out.write(content)
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "separator", "encoding"),
    [
        ("n.csv", ";", "utf-8"),
        ("n.csv", "|", "utf-8"),
        ("n.csv", "\t", "utf-8"),
        ("n.txt", "\t", "utf-8"),
        ("n.txt", ",", "utf-8-sig"),
        ("n.csv", ",", "utf-16"),
        ("n.csv", ";", "utf-16"),
        ("n.txt", "\t", "utf-16"),
        ("n.csv.zst", ",", "utf-8"),
        ("n.tsv.zst", "\t", "utf-8"),
        ("n.csv.bz2", ";", "utf-8"),
        ("n.zip", ",", "utf-8"),
        ("n.zip", ";", "utf-16"),
    ],
)
def test_packed_encoded_and_separated(tmp_path, name, separator, encoding):
    notes = load_notes(written(tmp_path / name, separator, encoding))
    assert notes["text"][:] == ["first; a | b", "second", "third"]
    assert notes["patient_id"][:] == [1, 1, 2]
    assert notes["time"][0] == DAY


@pytest.mark.parametrize("name", ["n.ndjson", "n.ndjson.gz", "n.jsonl.zst", "n.json"])
def test_lines_of_json(tmp_path, name):
    rows = [dict(zip(("patient_id", "time", "text"), row, strict=True)) for row in ROWS]
    with pa.output_stream(str(tmp_path / name), compression="detect") as out:
        out.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    assert load_notes(tmp_path / name)["text"][:] == ["first; a | b", "second", "third"]


def test_archives_and_spreadsheets_that_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.csv", "x")
        archive.writestr("b.csv", "x")
    (tmp_path / "bad.zip").write_bytes(b"PK")
    (tmp_path / "n.xlsx").write_bytes(b"PK")
    for name, words in {"two.zip": "holds 2 tables", "bad.zip": "no zip archive", "n.xlsx": "save it as csv"}.items():
        with pytest.raises(ValueError, match=words):
            load_notes(tmp_path / name)


def test_words_for_no_text_are_left_out_and_counted():
    words = ["NULL", "nan", "None", "[NULL]", r"\N", " null "]
    rows = {"patient_id": [1] * 8, "time": list(range(8)), "text": [*words, "None of the above.", "note"]}
    notes = load_notes(rows)
    assert notes["text"][:] == ["None of the above.", "note"]
    assert "6 with a word for no text (NULL, nan, None)" in notes.info.description


def test_probe_tables_are_read_by_the_same_reader(tmp_path):
    notes = load_notes(table())
    for name, separator in {"labels.tsv": "\t", "labels.csv.gz": ",", "labels.zip": ";"}.items():
        written(tmp_path / name, separator)
        [task] = parse_tasks([f"patient_id:binary:{tmp_path / name}"], notes)
        assert task.dataset["text"][:] == ["first; a | b", "second", "third"]


# ---- Behaviour ----


def test_what_is_one_patient():
    def patients(ids):
        return load_notes({"patient_id": ids, "time": range(len(ids)), "text": list("abcdef")[: len(ids)]})[
            "patient_id"
        ][:]

    assert len(set(patients(["7", "007", " 7", "7 "]))) == 2  # leading zeros tell apart, spaces around do not
    assert len(set(patients(["A1-b", "a1-B"]))) == 2
    assert len(set(patients([2**63 - 1, 2**63 - 2]))) == 2
    assert len(set(patients([str(2**70), str(2**70 + 1)]))) == 2
    assert patients([1.0, 2.0]) == [1, 2]
    with pytest.raises(ValueError, match="floats that are no identifiers, first row 2"):
        patients([1.0, 2.5])
    with pytest.raises(ValueError, match="floats that are no identifiers"):
        patients([2.0**60, 1.0])


def test_copies_are_counted():
    rows = {
        "patient_id": [1, 1, 2, 3, 3],
        "time": [0, 1, 0, 0, 0],
        "text": ["copied forward", "copied forward", "copied forward", "addendum", "note"],
    }
    notes = load_notes(rows)
    assert len(notes) == 5
    assert "2 with a text that the same patient has at another time" in notes.info.description
    assert "3 with a text that another patient has too" in notes.info.description


def test_notes_of_all_languages_and_lengths():
    texts = [
        "Größe 1,80 m",
        "患者は安定",
        "مريض مستقر",
        "x" * 500_000,
        "ok",
        "caf\u00e9",
        "cafe\u0301",
        "👩‍⚕️",
        "a\x07b",
    ]
    notes = load_notes({"patient_id": [1] * 9, "time": range(9), "text": texts})
    assert notes["text"][:] == texts


def test_one_patient_with_many_notes_and_many_with_one():
    n = 200_000
    many = load_notes({"patient_id": [1] * n, "time": list(range(n)), "text": list(map(str, range(n)))})
    assert len(adjacent_pairs(many)) == n - 1
    alone = load_notes({"patient_id": list(range(n)), "time": [0] * n, "text": list(map(str, range(n)))})
    with pytest.raises(ValueError, match="sections"):
        adjacent_pairs(alone)


@pytest.mark.slow
def test_two_thousand_files_and_ten_thousand_columns(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(2000):
        (folder / f"{i:04}.csv").write_text(f"patient_id,time,text\n{i % 500},2020-01-{i // 500 + 1:02},note {i}\n")
    assert len(load_notes(folder)) == 2000
    wide = {f"c{i}": [1, 2] for i in range(10_000)} | {"patient_id": [1, 1], "time": [0, 1], "text": ["a", "b"]}
    pq.write_table(pa.table(wide), tmp_path / "wide.parquet")
    assert len(load_notes(tmp_path / "wide.parquet").column_names) == 10_003


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
TABLES = st.lists(
    st.tuples(st.integers(-5, 5), st.integers(0, 40), CELLS.filter(lambda text: text.strip())), min_size=1, max_size=12
)


@given(TABLES, st.sampled_from(["dict", "csv", "jsonl", "parquet"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_row_is_lost_or_crosses_patients(tmp_path_factory, rows, kind):
    """Every row comes back under its own patient and time, once; what was written is read as the same again."""
    patient, time, text = zip(*rows, strict=True)
    source = {"patient_id": list(patient), "time": [float(t) for t in time], "text": list(text)}
    folder = tmp_path_factory.mktemp("tables")
    if kind == "csv":
        pd.DataFrame(source).to_csv(folder / "n.csv", index=False, quoting=csv.QUOTE_ALL)
    elif kind == "jsonl":
        (folder / "n.jsonl").write_text(
            "".join(
                json.dumps(dict(zip(source, row, strict=True))) + "\n" for row in zip(*source.values(), strict=True)
            )
        )
    elif kind == "parquet":
        pq.write_table(pa.table(source), folder / "n.parquet")
    kept = {}  # white space tells no two notes of one patient and time apart, and the first stays
    for row in zip(*source.values(), strict=True):
        if row[2].strip().lower() not in NONE_WORDS:
            kept.setdefault((*row[:2], row[2].translate(dict.fromkeys(map(ord, WHITE)))), row)
    expected = sorted(kept.values())
    if not expected:
        with pytest.raises(ValueError, match=r"None of|no rows|All .* texts"):
            load_notes(source if kind == "dict" else folder)
        return
    notes = load_notes(source if kind == "dict" else folder)
    found = sorted(zip(notes["patient_id"][:], notes["time"][:], notes["text"][:], strict=True))
    assert found == expected
    buffer = io.BytesIO()
    pq.write_table(notes.data.table, buffer)
    again = load_notes(pq.read_table(io.BytesIO(buffer.getvalue())))
    assert again.to_dict() == notes.to_dict()
