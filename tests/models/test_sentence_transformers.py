"""sentence-transformers' evaluators in our trainer, ours among theirs, and its arguments of `encode`."""

import numpy as np
import torch
from conftest import QUIET, make_model, make_notes
from sentence_transformers import SentenceTransformer
from sentence_transformers.evaluation import InformationRetrievalEvaluator, SequentialEvaluator

from hf_densefeat import (
    AutoDenseModel,
    DenseHead,
    DenseTrainer,
    DenseTrainingArguments,
    ProbeEvaluator,
    ProbeTask,
    SimilarityEvaluator,
    SimilarityTask,
)
from hf_densefeat.models.head import PairCovariances, form_head
from hf_densefeat.models.sentence_transformers import as_sentence_transformer

NOTES = make_notes()
TEXTS = NOTES["text"][:20]


def retrieval():
    """Each text is found by its first half."""
    corpus = {str(i): text for i, text in enumerate(TEXTS)}
    queries = {name: text[: len(text) // 2] for name, text in corpus.items()}
    return InformationRetrievalEvaluator(queries, corpus, {name: {name} for name in queries}, name="half")


def test_a_live_model_encodes_as_a_sentence_transformer(tokenizer):
    """The same embeddings as `encode`, with the head, and the saved folder's."""
    model = make_model("bert", tokenizer)
    model.views = {"content": DenseHead.fit(model.encode(TEXTS, tokenizer))}
    live = as_sentence_transformer(model, tokenizer)
    expected = model.encode(TEXTS, tokenizer)
    torch.testing.assert_close(live.encode(TEXTS, convert_to_tensor=True), expected, rtol=1e-5, atol=1e-5)
    assert live.similarity(expected, expected).diagonal().min() > 0.999


def test_their_evaluator_in_our_trainer(tokenizer, tmp_path):
    """Its numbers are among the metrics, are those of the saved folder, and the training goes on in training mode."""
    args = DenseTrainingArguments(
        str(tmp_path),
        **QUIET | {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "subspace_dim": 3},
        per_device_train_batch_size=16,
        metric_for_best_model="half_cosine_ndcg@10",
    )
    trainer = DenseTrainer(
        make_model("bert", tokenizer),
        args,
        train_dataset=NOTES,
        eval_dataset=NOTES,
        processing_class=tokenizer,
        evaluator=retrieval(),
    )
    trainer.train()
    trainer.save_model()
    found = [entry["eval_half_cosine_ndcg@10"] for entry in trainer.state.log_history if "eval_loss" in entry]
    saved = retrieval()(SentenceTransformer(str(tmp_path), device="cpu"))
    assert len(found) == 2
    assert abs(found[-1] - saved["half_cosine_ndcg@10"]) < 1e-6


def test_our_evaluators_among_theirs(tokenizer, tmp_path):
    """SequentialEvaluator passes output_path, epoch and steps by position."""
    model = make_model("bert", tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    notes = NOTES.add_column("long", [len(text.split()) > 20 for text in NOTES["text"]])
    ours = [
        ProbeEvaluator([ProbeTask("long", notes, "long", "binary")], cache=False),
        SimilarityEvaluator([SimilarityTask(name="own", kind="same_patient", notes=notes)], cache=False),
    ]
    encoder = SentenceTransformer(str(tmp_path), device="cpu")
    found = SequentialEvaluator([*ours, retrieval()])(encoder, str(tmp_path), 1, 2)
    assert found["long_auroc"] == ours[0](model, tokenizer)["long_auroc"]
    assert found["own_mrr"] == ours[1](model, tokenizer)["own_mrr"]
    assert "half_cosine_ndcg@10" in found


def test_encode_takes_their_arguments(tokenizer):
    """Arrays, rows of length 1 and the progress bar, by their names."""
    model = make_model("bert", tokenizer)
    z = model.encode(TEXTS, tokenizer)
    found = model.encode(
        TEXTS, tokenizer, convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False, batch_size=4
    )
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, (z / z.norm(dim=1, keepdim=True)).numpy(), rtol=1e-5, atol=1e-6)


def test_a_content_view_of_the_last_layer_beside_a_form_view_of_both(tmp_path, tokenizer):
    """One folder: the widened view gives what it gave, here and in sentence-transformers."""
    model = make_model("bert", tokenizer)
    z = model.encode(TEXTS, tokenizer, view=None, input_layer=True)
    content = DenseHead.fit(z[:, :24])
    form = form_head(PairCovariances.of(z[:-1], z[1:]), epsilon=1.0)
    model.views = {"content": content.widened(z.shape[1]), "form": form}
    expected = content(model.encode(TEXTS, tokenizer, view=None))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    for found in (model.encode(TEXTS, tokenizer), AutoDenseModel.from_pretrained(str(tmp_path)).encode(TEXTS)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.encode(TEXTS, convert_to_tensor=True), expected, rtol=0, atol=1e-5)
    assert theirs.encode(TEXTS, task="form").shape == (len(TEXTS), z.shape[1])
