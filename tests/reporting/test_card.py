"""The model card: what was trained and measured, valid metadata, usage that runs as printed."""

import re

import pytest
import torch
from conftest import make_model, make_notes
from huggingface_hub import ModelCard

from hf_densefeat import (
    AutoDenseModel,
    DenseHead,
    DenseObjective,
    DenseTrainer,
    DenseTrainingArguments,
    geometry_report,
)
from hf_densefeat.evaluation.metrics import PROBES, Metric
from hf_densefeat.models.head import PairCovariances, content_head, form_head
from hf_densefeat.reporting.card import licence_of

ARGUMENTS = {"use_cpu": True, "report_to": [], "subspace_dim": 3, "max_steps": 1}


def share_of_mean(s):
    """Share of the mean in the second moment."""
    return s.a.mean.square().sum() / s.a.covariance.trace()


def measure(name, model, tokenizer, shift=None):
    z = model.encode(make_notes(patients=20)["text"], tokenizer)
    step = shift or 0.0
    found = {
        "name": name,
        "geometry": geometry_report(z[:-1], z[1:], k=3),
        "spectrum": [1.0, 0.5 - step, 0.1],
        "similarity": {"disease mrr": [0.2 + step, 0.1 + step, 0.3 + step], "disease mrr_binary": [0.1, 0.05, 0.2]},
        "probes": {"died auroc": [0.7 + step, 0.6 + step, 0.8 + step], "age rmse": [10.0 - step, 9.0, 11.0]},
    }
    if shift is not None:
        found["differences"] = {"disease mrr": [step, 0.01, 0.09], "died auroc": [step, -0.02, 0.12]}
    return found


def make_card(kind, root, tokenizer, *, measured=False):
    """The folder of a run with its card, and the trainer."""
    make_model("bert", tokenizer, max_length=48).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    folder = root / "dense-encoder"
    model = AutoDenseModel.from_pretrained(str(root / "base"), pooling=kind.split()[0])
    args = DenseTrainingArguments(str(folder), **ARGUMENTS)
    objective = DenseObjective(subspace_dim=3, lambda_sub=0.25, terms={"mean_share": (0.5, share_of_mean)})
    options = {"train_dataset": make_notes(), "processing_class": tokenizer, "objective": objective}
    trainer = DenseTrainer(model, args, **options)
    if "head" in kind:
        model.views = {"content": DenseHead.fit(model.encode(make_notes()["text"], tokenizer), epsilon=1.0)}
    if "views" in kind:
        z = model.encode(make_notes()["text"], tokenizer, view=None, input_layer=True)
        pairs = PairCovariances.of(z[:-1], z[1:])
        model.views = {"content": content_head(pairs, epsilon=0.3), "form": form_head(pairs, epsilon=1.0)}
    trainer.save_model()
    if measured:
        trainer.measured = [measure("start", model, tokenizer), measure("trained", model, tokenizer, 0.05)]
    trainer.create_model_card()
    return folder, trainer


@pytest.fixture(scope="module")
def card(tokenizer, tmp_path_factory):
    """Of a measured run, with a head."""
    return make_card("mean with a head", tmp_path_factory.mktemp("card"), tokenizer, measured=True)


@pytest.mark.parametrize("kind", ["mean with a head", "mean with views", "mean", "cls", "last", "max"])
def test_snippets_run_as_printed(kind, tokenizer, tmp_path, monkeypatch, capsys):
    """Every python block, run beside the folder, prints the shapes that its comments promise, the same embeddings each."""
    folder, trainer = make_card(kind, tmp_path, tokenizer)
    monkeypatch.chdir(folder.parent)
    text, found = (folder / "README.md").read_text(), []
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 3
    assert ("load_file" in snippets[1]) == (trainer.model.dense_head is not None)
    assert ('task="form"' in snippets[0]) == (len(trainer.model.views) > 1)
    for snippet in snippets:
        names = {}
        exec(snippet, names)
        promised = re.findall(r"print\(embeddings\.shape\)  # (.*)", snippet)
        assert promised == [capsys.readouterr().out.splitlines()[0]]
        found.append(torch.as_tensor(names["embeddings"]))
        torch.testing.assert_close(found[-1], trainer.model.encode(names["texts"]), rtol=1e-5, atol=1e-5)


def test_metadata_is_valid_and_holds_the_headlines(card):
    """The front matter parses into ModelCardData; its model-index has the last encoder's headlines, similarity first."""
    folder, _ = card
    data = ModelCard.load(folder / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert {"sentence-transformers", "feature-extraction"} <= set(data.tags)
    results = data.eval_results
    assert [result.dataset_name.split(": ")[1] for result in results] == ["disease", "died", "age"]
    assert [result.task_type for result in results] == ["information-retrieval", *["feature-extraction"] * 2]
    assert [result.metric_type for result in results] == ["mrr", "roc_auc", "rmse"]
    assert [result.metric_value for result in results] == [0.25, 0.75, 9.95]
    assert results[1].metric_name == "AUROC, 95 % interval 0.650 to 0.850"
    assert data.model_name == "dense-encoder"


def test_a_metric_of_ones_own_is_on_the_card(tokenizer, tmp_path, monkeypatch):
    """One entry of its kind is enough: it counts, is shown and is in the model-index."""
    lift = Metric(lambda y, output, weights: output.mean(), "lift", True, "lift")
    monkeypatch.setitem(PROBES, "binary", {"lift": lift, **PROBES["binary"]})
    args = DenseTrainingArguments(str(tmp_path / "out"), **ARGUMENTS)
    model = make_model("bert", tokenizer)
    trainer = DenseTrainer(model, args, processing_class=tokenizer)
    start, trained = measure("start", model, tokenizer), measure("trained", model, tokenizer, 0.05)
    start["probes"]["died lift"] = [1.0, 0.9, 1.1]
    trained["probes"]["died lift"] = [2.0, 1.8, 2.2]
    trained["differences"] |= {"died lift": [1.0, 0.8, 1.2]}
    trainer.measured = [start, trained]
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "Largest gain: lift of died +1.000 [+0.800, +1.200]" in card.text
    assert ("lift", 2.0) in [(result.metric_type, result.metric_value) for result in card.data.eval_results]


def test_what_was_done_and_measured_is_said(card):
    """Every term with its weight, counts, verdict, table, both pictures with their texts, limits, citation; no path."""
    folder, _ = card
    text = re.sub(" +", " ", (folder / "README.md").read_text())  # tables are padded
    assert "L = 1 MLM + " in text
    assert "(1 spectral_spreading + 0.25 subspace_consistency + 1 orthogonality + 0.5 mean_share)" in text
    assert "| mean_share | Share of the mean in the second moment. |" in text
    assert (
        "**Take trained rather than start.** Similarity: 1 better; linear probes: 1 without a visible difference."
        in text
    )
    assert "| disease: MRR | 0.200 | 0.250 | +0.050 [+0.010, +0.090] ↑ |" in text
    assert "| died: AUROC | 0.700 | 0.750 | +0.050 [-0.020, +0.120] · |" in text
    assert text.index("disease: MRR") < text.index("mean cosine of two notes") < text.index("died: AUROC")
    assert re.search(r"!\[Dots with intervals[^\[\]]*disease, MRR: start 0\.200[^\[\]]*\]\(similarity\.png\)", text)
    assert re.search(r"!\[Falling lines.*\]\(spectrum\.png\)", text)
    for name in ("similarity.png", "spectrum.png"):
        assert (folder / name).stat().st_size > 5_000
    for heading in ("Use", "Trained on", "Objective", "Measured", "Intended use and limits", "Citation"):
        assert f"\n## {heading}\n" in text
    assert "Dense Feature Learning via Linear Structure Preservation in Medical Data" in text
    assert str(folder.parent) not in text
    assert not set("{}") & set(re.sub(r"```bibtex.*?```", "", text, flags=re.DOTALL)), "a field was left open"


def test_unmeasured_card_and_unknown_licence(tokenizer, tmp_path):
    """Saving writes a card; without measurement, base and notes it says so, and has no model-index."""
    args = DenseTrainingArguments(str(tmp_path / "out"), **ARGUMENTS)
    trainer = DenseTrainer(make_model("bert", tokenizer), args, processing_class=tokenizer)
    trainer.save_model()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "Nothing was measured in this run." in card.text
    assert "Trained from random weights." in card.text
    assert card.data.eval_results is None
    assert card.data.license is None
    assert licence_of(str(tmp_path)) is None


def test_an_evaluator_in_training_is_on_the_card(tokenizer, tmp_path):
    """What an evaluator gave in the last evaluation is shown, without the times."""
    args = DenseTrainingArguments(str(tmp_path / "out"), **ARGUMENTS)
    trainer = DenseTrainer(make_model("bert", tokenizer), args, processing_class=tokenizer)
    trainer.state.log_history = [{"eval_died_auroc": 0.5}, {"eval_died_auroc": 0.75, "eval_runtime": 3.0, "step": 2}]
    trainer.create_model_card()
    text = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"\| died auroc +\| 0\.750 \|", text)
    assert "runtime" not in text
