"""What a crash leaves: whole checkpoints, and sentences about those that are not."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import logs, make_notes, make_trainer
from peft import LoraConfig
from transformers import TrainerCallback

from hf_densefeat.training import resumable
from hf_densefeat.training.checkpoints import MANIFEST, UNFINISHED, check_whole, damage, newest_whole, publish

STEPS = {
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_steps": 2,
}
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer, pairs):
    """A run with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = make_trainer(folder, tokenizer, pairs, **STEPS)
    trainer.train()
    return folder, trainer


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_every_checkpoint_is_sealed_and_nothing_is_left_beside(saved):
    folder, _ = saved
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    for checkpoint in folder.glob("checkpoint-*"):
        entries = json.loads((checkpoint / MANIFEST).read_text())["files"]
        assert sorted([*entries, MANIFEST]) == files_of(checkpoint)
        assert damage(checkpoint) is None
    assert newest_whole(folder).name == "checkpoint-6"


@pytest.mark.parametrize("how", ["removed", "halved", "zeroed"])
def test_every_damaged_file_is_named_before_anything_is_loaded(tmp_path, saved, caplog, how):
    """One file after another; `last` then passes over the checkpoint and says why."""
    folder, trainer = saved
    output = tmp_path / "run"
    shutil.copytree(folder, output)
    checkpoint = output / "checkpoint-6"
    for name in files_of(checkpoint):
        path, content = checkpoint / name, (checkpoint / name).read_bytes()
        if not content:
            continue
        if how == "removed":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2] if how == "halved" else bytes(len(content)))
        with pytest.raises(ValueError, match=r"checkpoint-6 is not whole: .*Resume from checkpoint-4") as raised:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert name in str(raised.value)
        caplog.clear()
        assert newest_whole(output).name == "checkpoint-4"
        assert "checkpoint-6 is passed over" in caplog.text
        assert name in caplog.text
        path.write_bytes(content)
    check_whole(checkpoint)


def test_no_checkpoint_is_said(tmp_path, tokenizer, pairs):
    trainer = make_trainer(tmp_path, tokenizer, pairs, **STEPS)
    with pytest.raises(ValueError, match=r"There is no whole checkpoint in .* to resume from"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="There is no checkpoint checkpoint-9"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match=rf"no {MANIFEST}.*There is no whole checkpoint before it: begin anew"):
        check_whole(tmp_path / "checkpoint-2")


@pytest.mark.slow
def test_last_passes_over_a_damaged_one_and_ends_the_same(tmp_path, tokenizer, pairs, saved, caplog):
    folder, whole = saved
    output = tmp_path / "run"
    shutil.copytree(folder, output)
    (output / "checkpoint-6" / "optimizer.pt").unlink()
    trainer = make_trainer(output, tokenizer, pairs, save_total_limit=1, **STEPS)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-6 is passed over: optimizer.pt is missing" in caplog.text
    assert logs(trainer)[-1] == logs(whole)[-1]
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-6"]
    assert damage(output / "checkpoint-6") is None


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [False, True])
def test_a_finished_run_is_not_trained_further(tmp_path, tokenizer, pairs, epochs, caplog):
    length = {"max_steps": -1, "num_train_epochs": 1} if epochs else {"max_steps": 2}
    settings = STEPS | length
    first = make_trainer(tmp_path, tokenizer, pairs, **settings)
    first.train()
    second = make_trainer(tmp_path, tokenizer, pairs, **settings)
    result = second.train(resume_from_checkpoint=True)
    assert result.global_step == first.state.global_step == second.state.global_step
    assert "nothing left to train" in caplog.text
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, first.model.state_dict()[name]), name
    for name, value in second.objective.state_dict().items():
        assert torch.equal(value, first.objective.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "stream", "expander"])
def test_adapters_streams_and_expanders_resume_under_the_same_rules(tmp_path, tokenizer, pairs, kind):
    extra = {"peft_config": LoraConfig(r=2, target_modules=["query"])} if kind == "adapter" else {}
    notes = make_notes().to_iterable_dataset() if kind == "stream" else pairs
    settings = STEPS | ({"expander": 2} if kind == "expander" else {})
    whole = make_trainer(tmp_path / "a", tokenizer, notes, extra=extra, **settings)
    whole.train()
    checkpoint = tmp_path / "a" / "checkpoint-4"
    again = make_trainer(tmp_path / "b", tokenizer, notes, extra=extra, **settings)
    again.train(resume_from_checkpoint=str(checkpoint))
    found, expected = (logs(trainer)[-1] | {"epoch": 0} for trainer in (again, whole))  # a stream has none
    assert found == expected
    lost = "adapter/adapter_model.safetensors" if kind == "adapter" else "densefeat_state.safetensors"
    (checkpoint / lost).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{lost} has 0 bytes of .*Resume from checkpoint-2"):
        again.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoint_before(tmp_path, tokenizer, pairs, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, pairs, **STEPS)

    def full(folder, target, fingerprint):
        if target.name == "checkpoint-4":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        publish(folder, target, fingerprint)

    monkeypatch.setattr(resumable, "publish", full)
    sentence = r"checkpoint-4 could not be written: .*No space left on device.* MB of the disk were free.*checkpoint-2"
    with pytest.raises(OSError, match=sentence):
        trainer.train()
    assert sorted(path.name for path in tmp_path.rglob("checkpoint-*")) == ["checkpoint-2"]
    check_whole(tmp_path / "checkpoint-2")


def test_half_written_folders_are_said_and_never_read(tmp_path, tokenizer, pairs, caplog):
    half = tmp_path / UNFINISHED / "checkpoint-6"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    trainer = make_trainer(tmp_path, tokenizer, pairs, **STEPS)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    assert "half-written: checkpoint-6" in caplog.text
    make_trainer(tmp_path, tokenizer, pairs, save_total_limit=1, **STEPS | {"max_steps": 4}).train()
    assert half.is_dir()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


# ---- Killed from outside ----

WORKER = """
import json, os, sys
import torch
torch.set_num_threads(1)
from conftest import logs, make_notes, make_trainer
from training.test_crash import STEPS
from transformers import PreTrainedTokenizerFast

folder, tokenizer, steps = sys.argv[1], PreTrainedTokenizerFast.from_pretrained(sys.argv[2]), int(sys.argv[3])
settings = STEPS | {"max_steps": steps, "save_steps": 1, "save_total_limit": 3}
trainer = make_trainer(folder, tokenizer, make_notes(), **settings)
from hf_densefeat.objective.distributed import end_processes
from hf_densefeat.training.checkpoints import newest_whole
from pathlib import Path
print("started", flush=True)
trainer.train(resume_from_checkpoint=newest_whole(Path(folder)) is not None)
if trainer.is_world_process_zero():
    json.dump(logs(trainer), open(os.path.join(folder, "log.json"), "w"))
end_processes()
"""


def start(tmp_path, tokenizer, out, steps, processes=1):
    """A worker of one process, or of two under torchrun."""
    worker, saved = tmp_path / "worker.py", tmp_path / "tokenizer"
    worker.write_text(WORKER)
    tokenizer.save_pretrained(saved)
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [sys.executable, *launch, str(worker), str(out), str(saved), str(steps)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.002)


def finished_log(out):
    return [entry for entry in json.loads((out / "log.json").read_text()) if "loss" in entry][-1]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param(1), pytest.param(2, marks=pytest.mark.distributed)])
def test_killed_while_it_saves_and_resumed_equals_uninterrupted(tmp_path, tokenizer, processes):
    """SIGKILL for all processes as soon as the third checkpoint is begun."""
    steps, whole, killed = 8, tmp_path / "whole", tmp_path / "killed"
    run = start(tmp_path, tokenizer, whole, steps, processes)
    assert run.wait(120) == 0, run.stderr.read()
    run = start(tmp_path, tokenizer, killed, steps, processes)
    wait_for(lambda: (killed / UNFINISHED).is_dir() and len(list(killed.glob("checkpoint-*"))) > 1)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait(30)
    run = start(tmp_path, tokenizer, killed, steps, processes)
    assert run.wait(120) == 0, run.stderr.read()
    found, expected = finished_log(killed), finished_log(whole)
    for name in ("loss", "grad_norm", "mlm_loss", "effective_rank"):
        assert found[name] == expected[name], name


@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param(1), pytest.param(2, marks=pytest.mark.distributed)])
def test_sigterm_saves_and_ends(tmp_path, tokenizer, processes):
    """A cluster's preemption: the update is ended and saved; all ranks stop at the same one; what would follow is not run."""
    out = tmp_path / "out"
    run = start(tmp_path, tokenizer, out, 400, processes)
    wait_for(lambda: len(list(out.glob("checkpoint-*"))) > 1)
    os.kill(run.pid, signal.SIGTERM)
    code = run.wait(60)
    assert code == 143 if processes == 1 else code != 0
    assert not (out / "log.json").exists()
    newest = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    assert newest < 400
    assert newest_whole(out).name == f"checkpoint-{newest}"
    assert f"saves checkpoint-{newest} and stops" in run.stderr.read()


def test_sigterm_saves_nothing_where_nothing_is_saved(tmp_path, tokenizer, pairs, caplog):
    """A run told to save no checkpoint, such as that of a new head alone, leaves none that another would resume from."""

    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(tmp_path, tokenizer, pairs, **STEPS | {"save_strategy": "no"})
    trainer.add_callback(Terminate())
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    assert stopped.value.code == 143
    assert trainer.state.global_step == 1
    assert not list(tmp_path.glob("checkpoint-*"))
    assert "saves nothing (save_strategy no) and stops" in caplog.text


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_dies_ends_the_others(tmp_path, tokenizer):
    out = tmp_path / "out"
    run = start(tmp_path, tokenizer, out, 4000, processes=2)
    wait_for(lambda: len(list(out.glob("checkpoint-*"))) > 1)
    children = subprocess.run(
        ["ps", "--ppid", str(run.pid), "-o", "pid="], capture_output=True, text=True, check=True
    ).stdout.split()
    begun = time.monotonic()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert run.wait(60) != 0
    assert time.monotonic() - begun < 60
    assert newest_whole(out) is not None
