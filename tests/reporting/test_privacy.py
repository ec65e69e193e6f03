"""No note, patient or token leaves a run: planted sentinels are looked for in every byte, and sockets are blocked."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
from conftest import make_model, make_notes

from hf_densefeat import (
    DenseTrainingArguments,
    ProbeEvaluator,
    ProbeTask,
    SimilarityEvaluator,
    SimilarityTask,
    load_notes,
    split_by_patient,
)
from hf_densefeat.commands.measuring import read_table

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain.py"
NOTE, PATIENT = "Qzxsentinelofanote", "Qzxsentinelofapatient"

# Runs the recipe as a user would, with every library talking, a tracker that writes all it is told, and no network.
CHILD = """
import json, logging, pathlib, runpy, socket, sys

attempts = []

def blocked(*arguments, **options):
    attempts.append(repr(arguments[-1:]))
    raise OSError("no network here")

connect = socket.socket.connect
socket.socket.connect = lambda self, where: connect(self, where) if self.family == socket.AF_UNIX else blocked(where)
socket.socket.connect_ex = socket.socket.sendto = socket.getaddrinfo = socket.gethostbyname = blocked
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)

import datasets, transformers, transformers.trainer

datasets.logging.set_verbosity_debug()
transformers.logging.set_verbosity_debug()
transformers.utils.logging.set_verbosity_warning = lambda: None

class Tracker(transformers.TrainerCallback):
    def write(self, event, args, state, **told):
        folder = pathlib.Path(args.output_dir, "runs")
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "events.jsonl", "a") as file:
            # the model's config and the processor's repr too: trackers keep both
            extra = [told["model"].config.to_json_string(), repr(told["processing_class"]), repr(told["train_dataloader"])]
            file.write(json.dumps([event, args.to_sanitized_dict(), state.log_history, told.get("metrics"), extra]) + "\\n")

    def on_train_begin(self, args, state, control, **told):
        self.write("begin", args, state, **told)

    def on_evaluate(self, args, state, control, **told):
        self.write("evaluate", args, state, **told)

    def on_log(self, args, state, control, **told):
        self.write("log", args, state, **told)

transformers.trainer.DEFAULT_CALLBACKS.append(Tracker)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")

from hf_densefeat import AutoDenseModel
from hf_densefeat.reporting.card import licence_of

z = AutoDenseModel.from_pretrained("out").encode(["chest pain", "fever"])
assert len(z) == 2
assert licence_of("someone/who-is-not-cached") is None
print("ATTEMPTS", attempts)
"""


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    """The recipe on notes that all hold a sentinel, with checkpoints, evaluation, probes, card, save and load."""
    root = tmp_path_factory.mktemp("privacy")
    make_model("bert", tokenizer).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    notes = make_notes(40)
    table = {
        "patient_id": [f"{PATIENT}{patient}" for patient in notes["patient_id"]],
        "time": list(notes["time"]),
        "text": [f"{text[:60]} {NOTE} {text[60:]}" for text in notes["text"]],
        "old": [patient % 2 == 0 for patient in notes["patient_id"]],
    }
    datasets.Dataset.from_dict(table).to_parquet(root / "notes.parquet")
    options = {
        "model_name_or_path": root / "base",
        "notes": root / "notes.parquet",
        "probe": "old:binary",
        "output_dir": root / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "subspace_dim": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": "true",
        "logging_steps": 1,
        "use_cpu": "true",
        "log_level": "debug",
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(root / "tmp")}
    (root / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(RECIPE), *words],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root, done.stdout, done.stderr


def holders(folder, secret):
    """Files in a folder that hold a string, as UTF-8, UTF-16 or UTF-32."""
    found, encodings = [], ("utf-8", "utf-16-le", "utf-32-le")
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        data = path.read_bytes()
        found += [str(path.relative_to(folder)) for encoding in encodings if secret.encode(encoding) in data]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("secret", [NOTE, PATIENT])
def test_no_byte_beside_the_model_holds_a_note_or_a_patient(run, secret):
    """Weights, checkpoints, card, reports, pickles, tracker files: nothing under output_dir; the search itself works."""
    root, _, _ = run
    assert holders(root / "out", secret) == []
    written = {path.name for path in (root / "out").rglob("*") if path.is_file()}
    assert {
        "README.md",
        "model.safetensors",
        "training_args.bin",
        "report.json",
        "trainer_state.json",
        "events.jsonl",
    } <= written
    assert holders(root / "home", secret), "the cache of datasets is where text lies, and where the README says"


@pytest.mark.slow
def test_no_cache_beside_the_outputs_or_elsewhere(run):
    """Text lies in the notes and under HF_HOME alone: no tables under output_dir, nothing in the temporary folder."""
    root, _, _ = run
    assert not [
        path for path in (root / "out").rglob("*") if path.suffix in (".arrow", ".parquet", ".json.gz", ".csv")
    ]
    assert {name.split("/")[0] for name in holders(root, NOTE)} == {"home", "notes.parquet"}


@pytest.mark.slow
def test_text_in_the_cache_is_the_users_alone(run):
    """Every file of the cache that holds a note or a patient is, or lies in a folder that is, closed to others."""
    root, _, _ = run
    for name in {*holders(root / "home", NOTE), *holders(root / "home", PATIENT)}:
        path = root / "home" / name
        folders = [parent for parent in path.parents if parent.is_relative_to(root / "home")]
        assert path.stat().st_mode & 0o077 == 0 or any(one.stat().st_mode & 0o077 == 0 for one in folders), name


@pytest.mark.slow
def test_logs_hold_neither_note_nor_patient(run):
    """At debug level of every library, and in what is printed."""
    _, out, err = run
    for secret in (NOTE, PATIENT):
        assert secret not in out
        assert secret not in err
    assert "effective rank" in out
    assert len(err) > 1000


@pytest.mark.slow
def test_nothing_uploaded_names_a_folder_of_this_machine(run):
    """Nothing that is uploaded, checkpoints included, has an absolute path of model, notes or output."""
    root, _, _ = run
    assert [name for name in holders(root / "out", str(root)) if not name.startswith("runs/")] == []


@pytest.mark.slow
def test_no_network_is_tried(run):
    """Training, evaluation, card, save and load with HF_HUB_OFFLINE=1 do not so much as look up a name."""
    assert "ATTEMPTS []" in run[1]


# A table in which everything that a table has is patient text: cells of every column, ids, splits, and, without a header,
# the names of the columns
CELL = f"{NOTE} denies chest pain, HIV negative"
ROWS = [{"patient_id": f"{PATIENT} {i // 2}", "time": i, "text": f"{CELL} {i}"} for i in range(12)]
MIXED = [row | {"comment": 7 if i < 9 else CELL} for i, row in enumerate(ROWS)]


def _written(folder, rows, kind):
    path = folder / f"notes.{kind}"
    frame = pd.DataFrame(rows)
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def _headless(folder):
    path = folder / "headless.csv"
    pd.DataFrame(ROWS).to_csv(path, index=False, header=False)
    return path


def _probe(kind="binary", **columns):
    rows = [row | {name: values[i % len(values)] for name, values in columns.items()} for i, row in enumerate(ROWS)]
    return ProbeEvaluator([ProbeTask("died", datasets.Dataset.from_list(rows), "died", kind)])


def _found(table, kind):
    if kind == "probe":
        return ProbeEvaluator([ProbeTask("died", table, "died")])
    return SimilarityEvaluator([SimilarityTask(name="near", kind="neighbours", notes=table, label="died")])


WRONG = {
    "frame with a mixed column": lambda folder: load_notes(pd.DataFrame(MIXED)),
    "list with a mixed column": lambda folder: load_notes(MIXED),
    "columns with a mixed column": lambda folder: load_notes({key: [row[key] for row in MIXED] for key in MIXED[0]}),
    "jsonl with a mixed column": lambda folder: load_notes(_written(folder, MIXED, "jsonl")),
    "csv without a header": lambda folder: load_notes(_headless(folder)),
    "texts for times, frame": lambda folder: load_notes(pd.DataFrame([row | {"time": CELL} for row in ROWS])),
    "texts for times, csv": lambda folder: load_notes(_written(folder, [r | {"time": CELL} for r in ROWS], "csv")),
    "texts for times, parquet": lambda folder: load_notes(
        _written(folder, [r | {"time": CELL} for r in ROWS], "parquet")
    ),
    "splits that are none": lambda folder: split_by_patient(load_notes([row | {"split": CELL} for row in ROWS])),
    "patients in two splits": lambda folder: split_by_patient(
        load_notes([row | {"split": ("train", "test")[i % 2]} for i, row in enumerate(ROWS)])
    ),
    "probe of a table without a header": lambda folder: _found(read_table(str(_headless(folder))), "probe"),
    "similarity of a table without a header": lambda folder: _found(read_table(str(_headless(folder))), "similarity"),
    "probe with a split that is none": lambda folder: _probe(died=[0, 1], split=[CELL]),
    "probe of three texts": lambda folder: _probe(died=[CELL, f"{CELL} x", f"{CELL} y"]),
    "regression of texts": lambda folder: _probe("regression", died=[CELL, "1"]),
    "probe with patients in two splits": lambda folder: _probe(died=[0, 1], split=["train", "test"]),
    "train set of two": lambda folder: split_by_patient(load_notes(ROWS[:2])),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_message_quotes_no_cell_no_header_and_no_patient(case, tmp_path, caplog, capsys):
    """Every route of input with something wrong: an error of ours, without the text, in it, the log or what is printed."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (what is looked for is what it does not say)
        WRONG[case](tmp_path)
    said = "".join(
        [str(error.value), str(error.value.__cause__), repr(error.value.args), caplog.text, *capsys.readouterr()]
    )
    assert NOTE not in said
    assert PATIENT not in said


def test_pickled_arguments_hold_no_token_and_no_folder(tmp_path):
    """training_args.bin is such a pickle; the arguments themselves keep both, and repositories are private by default."""
    args = DenseTrainingArguments(
        str(tmp_path / "name"),
        use_cpu=True,
        report_to=[],
        hub_token="hf_sentinel",
        resume_from_checkpoint=str(tmp_path),
    )
    assert args.hub_private_repo is True
    torch.save(args, tmp_path / "training_args.bin")
    data = (tmp_path / "training_args.bin").read_bytes()
    assert b"hf_sentinel" not in data
    assert str(tmp_path).encode() not in data
    assert (args.hub_token, args.output_dir) == ("hf_sentinel", str(tmp_path / "name"))
    again = pickle.loads(pickle.dumps(args))
    assert (again.hub_token, again.output_dir, again.lambda_sub) == (None, "name", args.lambda_sub)
    assert "hf_sentinel" not in repr(args) + json.dumps(args.to_sanitized_dict()) + args.to_json_string()
    assert str(tmp_path) not in args.to_json_string()
