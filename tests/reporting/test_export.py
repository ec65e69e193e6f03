"""What reaches the Hub, file by file, and what a downstream user does with it, as the README prints it."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_notes, run_without_densefeat
from fake_hub import LARGE, FakeHub
from huggingface_hub import ModelCard
from safetensors.torch import load

from hf_densefeat import AutoDenseModel, DenseTrainer, DenseTrainingArguments

pytestmark = pytest.mark.slow

SENTENCE_TRANSFORMERS = {
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
ENCODER = {"config.json", "model.safetensors", "training_args.bin", "README.md"} | SENTENCE_TRANSFORMERS | TOKENIZER
ADAPTER = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
STATE = {
    "manifest.json",
    "densefeat_state.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
}
TOKEN = "hf_sentineloftoken"
ROOT = Path(__file__).parents[2]

PUSHER = """
import runpy, sys
from datasets import load_from_disk
from peft import LoraConfig
from transformers import TrainerCallback
from hf_densefeat import DenseTrainer, DenseTrainingArguments

class Patient(TrainerCallback):
    def on_step_begin(self, *arguments, **told):
        trainer._finish_current_push()  # or the next save is not pushed

root, token, recipe = sys.argv[1:]
notes = load_from_disk(root + "/notes")
for strategy, config in ("every_save", None), ("checkpoint", LoraConfig(r=2, target_modules=["query"])):
    args = DenseTrainingArguments(
        root + "/" + strategy, use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=16, max_steps=2,
        subspace_dim=3, save_strategy="steps", save_steps=1, push_to_hub=True, hub_model_id="someone/dense-" + strategy,
        hub_strategy=strategy, hub_token=token, learning_rate=1e-2, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    )
    scores = iter([1.0, 2.0])  # the last step is the best
    trainer = DenseTrainer(
        root + "/base", args, train_dataset=notes, eval_dataset=notes.select(range(12)), peft_config=config,
        callbacks=[Patient], evaluator=lambda model, tokenizer: {"score": next(scores)},
    )
    trainer.train()
    trainer.save_state()
    trainer.push_to_hub(tags=["cardiology"], language="en")

sys.argv = ["pretrain.py", "--notes", root + "/notes.parquet", "--model_name_or_path", root + "/base", "--use_cpu", "--probe",
            "old:binary", "--max_steps", "2", "--save_strategy", "no", "--per_device_train_batch_size", "8",
            "--subspace_dim", "3", "--output_dir", root + "/recipe", "--push_to_hub", "--hub_model_id",
            "someone/dense-recipe", "--hub_token", token]
runpy.run_path(recipe, run_name="__main__")
"""


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """A folder with a base model whose card names a licence, and notes."""
    root = tmp_path_factory.mktemp("hub")
    make_model("bert", tokenizer, max_length=48).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    (root / "base" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Base\n")
    make_notes().save_to_disk(root / "notes")
    notes = make_notes(40)
    notes.add_column("old", [patient % 2 == 0 for patient in notes["patient_id"]]).to_parquet(root / "notes.parquet")
    return root


@pytest.fixture(scope="module")
def pushes(base):
    """A process that pushes two runs at every save and at the end, and the recipe's; the Hub it pushed to, and its log."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with FakeHub() as hub:
        environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"HF_HOME": str(base / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        environment["HF_HUB_DISABLE_XET"] = "1"  # large files by LFS, which plain HTTP can speak
        command = [sys.executable, "-c", PUSHER, str(base), TOKEN, str(ROOT / "recipes" / "pretrain.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return hub, done.stdout + done.stderr


@pytest.fixture(params=[("every_save", "full"), ("checkpoint", "lora")], ids=lambda p: p[0])
def pushed(request, pushes):
    """The commits to the repository of one run."""
    strategy, kind = request.param
    return [c for c in pushes[0].commits if c["repository"] == f"someone/dense-{strategy}"], strategy, kind


def test_repositories_are_private_and_nothing_else_is_asked_for(pushes):
    """They are created private, every request but the store's carries the token, and all requests are those of commits."""
    hub, _ = pushes
    assert list(hub.repositories) == ["someone/dense-every_save", "someone/dense-checkpoint", "someone/dense-recipe"]
    assert {made["visibility"] for made in hub.repositories.values()} == {"private"}
    sent = {request: authorisation for request, authorisation in hub.requests}
    assert sent.pop("PUT store") is None
    assert set(sent.values()) == {f"Bearer {TOKEN}"}
    known = {"POST /api/repos/create", "POST /api/validate-yaml", "POST /store/verify"}
    known |= {f"POST /api/models/{name}/{verb}/main" for name in hub.repositories for verb in ("preupload", "commit")}
    known |= {f"POST /{name}.git/info/lfs/objects/batch" for name in hub.repositories}
    assert sent.keys() == known


def test_every_push_is_a_whole_encoder(pushes, pushed, base, tmp_path):
    """Each commit in mid-training and at the end has all files of an encoder, and no others; the last one is on disk.

    Weights and pickles go through the Hub's store of large files, where each is verified; all else is in the commit.
    """
    commits, strategy, kind = pushed
    expected = ENCODER | (ADAPTER if kind == "lora" else set())
    saved = (set(ENCODER) - {"README.md"}) | STATE | (ADAPTER if kind == "lora" else set())
    models = [c for c in commits if "checkpoint" not in c["summary"]]
    checkpoints = [c for c in commits if "checkpoint" in c["summary"]]
    assert [c["summary"] for c in models] == [
        "Training in progress, step 1",
        "Training in progress, step 2",
        "End of training",
    ]
    assert set(models[0]["files"]) == set(models[1]["files"]) == expected
    assert set(models[2]["files"]) == expected | {"trainer_state.json"}
    for commit in commits:
        assert commit["large"] == {name for name in commit["files"] if name.endswith(LARGE)}
        assert {hashlib.sha256(commit["files"][name]).hexdigest() for name in commit["large"]} <= pushes[0].verified
    assert len(checkpoints) == (2 if strategy == "checkpoint" else 0)
    for commit in checkpoints:
        assert set(commit["files"]) == {f"last-checkpoint/{name}" for name in saved}
    for name, data in models[-1]["files"].items():
        assert (base / strategy / name).read_bytes() == data, name
    weights = load(models[-1]["files"]["model.safetensors"])
    assert not [name for name in weights if "lora" in name]
    assert not any(
        torch.equal(weights[n], load(models[0]["files"]["model.safetensors"])[n])
        for n in weights
        if "query.weight" in n
    )
    for name, data in {name: data for c in commits for name, data in c["files"].items()}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    texts = make_notes(patients=2)["text"]
    z, here = (AutoDenseModel.from_pretrained(str(folder)).encode(texts) for folder in (tmp_path, base / strategy))
    assert torch.equal(z, here)


def test_nothing_uploaded_holds_the_token_the_notes_or_a_path(pushes, base):
    """No byte of any commit, nor of the log, has the token, a note's text, or the folder of this machine."""
    hub, log = pushes
    secrets = [TOKEN, *make_notes()["text"], str(base)]
    for secret in secrets:
        assert secret == str(base) or secret not in log
        for encoding in ("utf-8", "utf-16-le", "utf-32-le"):
            for commit in hub.commits:
                for name, data in commit["files"].items():
                    assert secret.encode(encoding) not in data, (name, secrets.index(secret))


def test_pushed_card_has_the_runs_facts(pushes, pushed):
    """Counts, licence of the base and tags are in the card; the Hub was asked to validate it; the local base is unnamed."""
    commits, strategy, kind = pushed
    card = ModelCard(commits[-1]["files"]["README.md"].decode())
    assert card.content in [sent["content"] for sent in pushes[0].cards]
    assert (card.data.license, card.data.language, card.data.base_model) == ("cc-by-4.0", "en", None)
    assert "cardiology" in card.data.tags
    for row in ("notes", 57), ("patients", 12), ("updates", 2):
        assert re.search(r"\| {} +\| +{} +\|".format(*row), card.text)
    assert ("LORA, merged" in card.text) == (kind == "lora")
    assert f'SentenceTransformer("someone/dense-{strategy}")' in card.text


def test_what_is_being_uploaded_does_not_change(tokenizer, tmp_path):
    """A checkpoint that comes while a push is under way is not pushed, and touches none of the files being read."""
    args = DenseTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], subspace_dim=3, hub_strategy="every_save")
    trainer = DenseTrainer(make_model("bert", tokenizer), args, processing_class=tokenizer)
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    trainer.push_in_progress = SimpleNamespace(is_done=lambda: False)
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_the_recipe_pushes_once_with_what_it_measured(pushes, base):
    """One commit, after the measurement: the card has both columns and the probes, as the files on disk do."""
    [commit] = [commit for commit in pushes[0].commits if commit["repository"] == "someone/dense-recipe"]
    reports = {"report.json", "report.md", "spectrum.png"}
    reports |= {"train_results.json", "all_results.json", "trainer_state.json"}
    modules = {name for name in commit["files"] if re.match(r"\d+_(Dense|Router|WeightedLayerPooling|Pooling)/", name)}
    assert any("Router/form_0_Dense" in name for name in modules)
    assert set(commit["files"]) - modules == (ENCODER | reports) - modules
    for name, data in commit["files"].items():
        assert (base / "recipe" / name).read_bytes() == data, name
    card = ModelCard(commit["files"]["README.md"].decode())
    after = json.loads(commit["files"]["report.json"])["after"]["probes"]["old auroc"]
    assert re.search(r"\| held-out notes +\| +start \| +words \| +content view \| +form view \| +change \|", card.text)
    assert re.search(rf"\| old: AUROC +\| +\d\.\d+ \| +\d\.\d+ \| +{after[0]:.3f} \|", card.text)
    assert [result.metric_value for result in card.data.eval_results if result.metric_type == "roc_auc"] == [
        round(after[0], 4)
    ]


# ---- The README, and a downstream user's day ----

RUN_BLOCKS = """
import torch
torch.set_num_threads(1)
for block in open("blocks.py").read().split("# next block"):
    names = {}
    exec(block, names)
    if "nearest" in names:
        texts, nearest = names["test"]["text"], names["nearest"]
        assert len(nearest) == 400 and names["z"].shape == (400, 192)
        assert texts[nearest[0]] == texts[0]
        assert not set(names["train"]["document_id"]) & set(names["test"]["document_id"])
        score = names["probe"].predict_proba(names["z_test"])[:, 1]
        assert names["roc_auc_score"](names["labels_test"], score) > 0.85
    if "graph" in names:
        import numpy, onnxruntime
        model = names["AutoModel"].from_pretrained("outputs/dense")
        tokenizer = names["AutoTokenizer"].from_pretrained("outputs/dense")
        tokens = tokenizer(texts[:5], padding=True, truncation=True, max_length=64, return_tensors="np")
        assert len(onnxruntime.InferenceSession("outputs/onnx/model.onnx").get_outputs()) == 1
        session = onnxruntime.InferenceSession("outputs/onnx/model.onnx")
        hidden = session.run(["last_hidden_state"], {i.name: tokens[i.name] for i in session.get_inputs()})[0]
        with torch.no_grad():
            expected = model(**{name: torch.from_numpy(v) for name, v in tokens.items()}).last_hidden_state.numpy()
        mask = tokens["attention_mask"] == 1
        numpy.testing.assert_allclose(hidden[mask], expected[mask], rtol=1e-4, atol=1e-5)
        print("onnx is the same")
"""


def test_the_guides_python_runs_as_printed(tmp_path, monkeypatch):
    """Ours trains and saves; the rest runs where this package cannot be imported: notes encoded, the nearest, a probe,
    fine-tuning by the stock Trainer, ONNX, with fewer steps.
    """
    ours = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    labs, *others = re.findall(r"```python\n(.*?)```", (ROOT / "recipes" / "README.md").read_text(), re.DOTALL)[:3]
    assert "hf_densefeat" in ours
    observations = ROOT / "recipes" / "data" / "cohort" / "observations.parquet"
    data = tmp_path / "recipes" / "data"
    (data / "cohort").mkdir(parents=True)
    (data / "cohort" / "observations.parquet").symlink_to(observations)
    (data / "medquad").symlink_to(ROOT / "recipes" / "data" / "medquad")
    blocks = [re.sub(r"max_steps=\d+", "max_steps=2", block) for block in (ours, labs, *others)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    exec(blocks[0], {})
    exec(blocks[1], {})

    (tmp_path / "blocks.py").write_text("\n# next block\n".join(blocks[2:]))
    printed = run_without_densefeat(RUN_BLOCKS, tmp_path, HF_HOME=str(tmp_path / "home"))
    assert "train_loss" in printed
    assert "onnx is the same" in printed


def test_files_for_older_sentence_transformers(base):
    """The written forms are those that releases 2 to 5 document: old type names, one flag a mode, no newer keys."""
    folder = base / "base"
    modules = json.loads((folder / "modules.json").read_text())
    assert [(m["idx"], m["name"], m["path"], m["type"]) for m in modules] == [
        (0, "0", "", "sentence_transformers.models.Transformer"),
        (1, "1", "1_Pooling", "sentence_transformers.models.Pooling"),
    ]
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert pooling.pop("word_embedding_dimension") == 24
    assert pooling.pop("include_prompt") is True
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    assert pooling == {f"pooling_mode_{name}": name == "mean_tokens" for name in names}
    assert json.loads((folder / "sentence_bert_config.json").read_text()) == {
        "max_seq_length": 48,
        "do_lower_case": False,
    }
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert config["similarity_fn_name"] == "cosine"
    assert {"__version__", "prompts", "default_prompt_name"} <= set(config)
