"""The model card: what an encoder is, from what it was made and what was measured. Constant text, names and numbers.

Nothing that goes into a card is the text of a note, an identifier of a patient, or a path of this machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_densefeat.evaluation.metrics import metric_named
from hf_densefeat.models.pooling import POOLINGS

PICTURE = "spectra.png"
TAGS = ("feature-extraction", "clinical", "hf_densefeat")

GEOMETRY_ROWS = {
    "effective_rank_centered": "effective rank, centred",
    "effective_rank": "effective rank, uncentred",
    "condition_over_median_centered": "largest / median eigenvalue, centred",
    "mean_cosine": "mean cosine of random notes",
    "subspace_distance_half_normalized_centered": "subspace distance to the next note, 0 to 1",
    "subspace_noise_floor_normalized_centered": "its noise floor (equal halves)",
}

READING = """A subspace distance means nothing without its noise floor, the distance of two halves of the same notes. Probes,
where there are any, are linear, on frozen embeddings, scored on held-out patients; in parentheses, 95 % bootstrap
intervals over patients."""

CHUNKED = """Trained on whole notes in chunks: hf_densefeat's `encode` averages the embeddings of
a longer text's chunks, weighted by tokens; the other two cut it."""

USE = """With Sentence Transformers:

```python
from sentence_transformers import SentenceTransformer

texts = ["Chest pain on exertion, relieved by rest.", "Follow-up for type 2 diabetes."]
encoder = SentenceTransformer("{repository}")
embeddings = encoder.encode(texts)
print(embeddings.shape)  # (2, {width})
print(encoder.similarity(embeddings, embeddings))
```

With Transformers:

```python
import torch
from transformers import AutoModel, AutoTokenizer

texts = ["Chest pain on exertion, relieved by rest.", "Follow-up for type 2 diabetes."]
tokenizer = AutoTokenizer.from_pretrained("{repository}")
model = AutoModel.from_pretrained("{repository}")
tokens = tokenizer(texts, padding=True, truncation=True, max_length={max_length}, return_tensors="pt")
with torch.no_grad():
    hidden = model(**tokens).last_hidden_state
{pooling_code}
print(embeddings.shape)  # torch.Size([2, {width}])
```

With hf_densefeat, to go on training or to measure:

```python
from hf_densefeat import AutoDenseModel

texts = ["Chest pain on exertion, relieved by rest.", "Follow-up for type 2 diabetes."]
embeddings = AutoDenseModel.from_pretrained("{repository}").encode(texts)
print(embeddings.shape)  # torch.Size([2, {width}])
```"""

BODY = """# {name}

{kind}: `{architecture}`, {parameters:,} parameters, {width}-dimensional embeddings by {pooling}
pooling of {span}. {origin} Trained with [hf_densefeat](#citation) on adjacent notes of the same
patients: language modelling together with an objective that shapes the linear structure of the embeddings.

## Use

{use}
A private repository needs `hf auth login` first. {longer}

## Trained on

{counts}

Notes are paired with the same patient's next note. No text of them is in this repository.

## Objective

    L      = {mlm_weight} MLM + {dense_weight} (L_spec + {lambda_sub} L_sub + {lambda_orth} L_orth)
    L_spec = ‖Σ / tr Σ − I/d‖²        spread of the spectrum of the embeddings' covariance
    L_sub  = ‖P_a − P_b‖²             leading {subspace_dim}-dimensional subspaces of the earlier and the later notes
    L_orth = ‖corr(Z) − I‖²           correlation between features

{training}

## Measured

{measured}

## Intended use and limits

For research: features for probes, clustering and search in clinical text, by people who may process such text. It is not
a medical device, and no clinical decision should rest on it. What the training notes hold too little of (languages,
departments, groups of patients) it represents badly; check for your patients before relying on it. A more even spectrum
does not by itself make better predictions: the probes above are the evidence there is. Language models can keep fragments
of their training text: share the weights only with those who may see the notes, unless privacy has been assessed.

## Citation

```bibtex
@misc{{zhang_dense_feature_learning,
  title  = {{Dense Feature Learning via Linear Structure Preservation in Medical Data}},
  author = {{Zhang, Yuanyun and Zhang, Mingxuan and Li, Siyuan and Wang, Zihan and Chen, Haoran and Zhou, Wenbo and Li, Shi}}
}}
```
"""


def model_card(
    repository: str,
    model: Any,
    weights: dict[str, Any],
    training: dict[str, Any],
    counts: dict[str, int],
    measured: Sequence[dict] = (),
    base_model: str | None = None,
    picture: bool = False,
    language: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    dataset: str | None = None,
) -> str:
    """README.md with its metadata; the snippets in it run as they are printed.

    Args:
        repository: name on the Hub, or of the folder.
        model: an encoder with `DenseFeatureMixin`.
        weights: `mlm_weight, dense_weight, lambda_sub, lambda_orth, subspace_dim` by name.
        training: settings of the run worth knowing, by name.
        counts: numbers of patients, notes, pairs, by name.
        measured: what was measured, in order of time, each `{"name", "geometry", "probes"}` as `measured_table` takes it;
            the probes of the last one become the `model-index`.
        base_model: Hub name or folder of the weights that training began with; None for random weights.
        picture: whether spectra.png lies beside the card.
        language: ISO code.
        license: by default the one that the base model's card names.
        tags: further tags.
        dataset: Hub name of the notes, if they may be named.
    """
    name, local = repository.split("/")[-1], base_model is not None and Path(base_model).exists()
    if base_model is None:
        origin = "Trained from random weights."
    elif local:
        origin = "Continued from a local checkpoint."
    else:
        origin = f"Continued from [{base_model}](https://hf.co/{base_model})."
    windows, use = hasattr(model, "card_use"), {}
    if not windows:
        use = {"max_length": model.max_length, "pooling_code": POOLINGS[model.pooling].snippet}
    text = BODY.format(
        name=name,
        kind=model.card_kind if windows else "A text encoder for clinical notes",
        use=(model.card_use() if windows else USE).format(
            repository=repository, width=model.config.hidden_size, **use
        ),
        repository=repository,
        architecture=type(model).__name__.removeprefix("FSDP"),
        parameters=model.num_parameters(),
        width=model.config.hidden_size,
        pooling=model.pooling,
        span=f"the first {model.max_length:,} tokens" if model.max_length else "all tokens",
        longer=CHUNKED if model.long_notes == "chunk" else "",
        origin=origin,
        counts=_table(["", "number"], [[key, f"{value:,}"] for key, value in counts.items()]),
        training=_table(["training", ""], [[key, str(value)] for key, value in training.items()]),
        measured=_measured(measured, picture),
        **weights,
    )
    metadata = ModelCardData(
        language=language,
        license=license or (licence_of(base_model) if base_model else None),
        library_name="transformers" if windows else "sentence-transformers",
        pipeline_tag="feature-extraction" if windows else "sentence-similarity",
        tags=list(dict.fromkeys([*([] if windows else ["sentence-transformers"]), *TAGS, *tags])),
        base_model=None if local else base_model,
        datasets=dataset,
        model_name=name,
        eval_results=_eval_results(measured[-1]) if measured else None,
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}"


def licence_of(base_model: str) -> str | None:
    """The licence that the card of a Hub repository or folder names; None where there is no card, name or network."""
    card = Path(base_model) / "README.md" if Path(base_model).is_dir() else base_model
    try:
        return ModelCard.load(card).data.license
    except (OSError, ValueError, yaml.YAMLError):  # a card must not stop a run at its end
        return None


def measured_table(measured: Sequence[dict]) -> str:
    """Geometry and probes as one Markdown table, a column for each encoder or moment that was measured.

    Args:
        measured: one or more of `{"name": str, "geometry": geometry_report(...), "probes": {"task metric": (value, low,
            high)}}`, all of the same notes.
    """
    shape = measured[0]["geometry"]
    head = f"N = {shape['n']:,} held-out pairs, d = {shape['d']}, attainable rank {shape['attainable_rank']}, k = {shape['k']}"
    rows = [
        [label, *(number(part["geometry"][key]) for part in measured)]
        for key, label in GEOMETRY_ROWS.items()
        if key in shape
    ]
    rows += [[probe, *(interval(*part["probes"][probe]) for part in measured)] for probe in measured[0]["probes"]]
    return f"{head}\n\n{_table(['', *(part['name'] for part in measured)], rows)}"


def number(value: float) -> str:
    """Three significant digits, thousands in full."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def interval(value: float, low: float, high: float) -> str:
    """A value with its interval."""
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _measured(measured: Sequence[dict], picture: bool) -> str:
    if not measured:
        return "Nothing was measured in this run."
    picture = f"\n\n![Spectrum of the embeddings]({PICTURE})" if picture else ""
    return f"{measured_table(measured)}\n\n{READING}{picture}"


def _eval_results(measured: dict) -> list[EvalResult] | None:
    results = []
    for probe, (value, low, high) in measured["probes"].items():
        task, metric = probe.rsplit(" ", 1)
        known = math.isfinite(low) and math.isfinite(high)
        results.append(
            EvalResult(
                task_type="feature-extraction",
                task_name="linear probe",
                dataset_type="clinical-notes",
                dataset_name=f"held-out patients: {task}",
                dataset_config=task,  # what tells one entry of a model-index from another
                dataset_split="test",
                metric_type=metric_named(metric).hub_name,
                metric_name=f"{metric}, 95 % interval {low:.3f} to {high:.3f}" if known else metric,
                metric_value=round(value, 4),
            )
        )
    return results or None
