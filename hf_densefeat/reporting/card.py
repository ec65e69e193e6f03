"""The model card: what an encoder is, from what it was made and what was measured. Constant text, names and numbers.

Nothing that goes into a card is the text of a note, an identifier of a patient, or a path of this machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_densefeat.models.pooling import POOLINGS
from hf_densefeat.reporting.comparison import GROUPS, Measured, comparisons, judged, metric_named, verdict
from hf_densefeat.reporting.formats import markdown, number
from hf_densefeat.reporting.plots import Picture
from hf_densefeat.reporting.tables import before_after_table, geometry_table, subspace_table

TAGS = ("feature-extraction", "clinical", "hf_densefeat")

READING = """Measured on notes of held-out patients. Similarity compares the embeddings by cosine as they are; probes are
linear, on frozen embeddings. In brackets, 95 % bootstrap intervals over patients, paired: ↑ better, ↓ worse, · no visible
difference, which is no proof of equality. Words are TF-IDF, fitted on training notes; "fused with words" orders documents by
the reciprocal ranks of both. A subspace distance means nothing without its noise floor, the distance of two
halves of the same notes."""

TERMS = {
    "spectral_spreading": "‖Σ / tr Σ − I/d‖², spread of the spectrum of the embeddings' covariance",
    "subspace_consistency": "‖P_a − P_b‖², leading {k}-dimensional subspaces of the earlier and the later notes",
    "orthogonality": "‖corr(Z) − I‖², correlation between features",
}

IMPORTS = """from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file"""

HEAD = """
# the content view, an affine map fitted on training notes; the two other ways apply it by themselves
head = load_file(cached_file("{repository}", "{path}/model.safetensors"))
embeddings = embeddings @ head["linear.weight"].T + head["linear.bias"]"""

INPUTS = """
inputs, seen = out.hidden_states[0], tokens["attention_mask"].unsqueeze(-1)
embeddings = torch.cat([embeddings, (inputs * seen).sum(1) / seen.sum(1)], 1)"""

LOCAL = "`{repository}` is the folder's name: give its path instead, or the repository's name once it is pushed."

CHUNKED = """Trained on whole notes in chunks: hf_densefeat's `encode` averages the embeddings of
a longer text's chunks, weighted by tokens; the other two cut it."""

TRANSFORMERS = """With Transformers:

```python
import torch
{imports}

texts = ["Chest pain on exertion, relieved by rest.", "Follow-up for type 2 diabetes."]
tokenizer = AutoTokenizer.from_pretrained("{repository}")
model = AutoModel.from_pretrained("{repository}")
tokens = tokenizer(texts, padding=True, truncation=True, max_length={max_length}, return_tensors="pt")
with torch.no_grad():
    out = model(**tokens{states})
hidden = out.last_hidden_state
{pooling_code}{inputs}{head}
print(embeddings.shape)  # torch.Size([2, {width}])
```"""

TAILED = """`AutoModel` gives the hidden states alone: the two other ways put the prompt before a text, where there is one, and
apply what follows pooling, {modules}."""

USE = """With Sentence Transformers:

```python
from sentence_transformers import SentenceTransformer

texts = ["Chest pain on exertion, relieved by rest.", "Follow-up for type 2 diabetes."]
encoder = SentenceTransformer("{repository}")
embeddings = encoder.encode(texts){by_content}
print(embeddings.shape)  # (2, {width}){by_form}
print(encoder.similarity(embeddings, embeddings))
```

{transformers}

With hf_densefeat, to go on training or to measure:

```python
from hf_densefeat import AutoDenseModel

texts = ["Chest pain on exertion, relieved by rest.", "Follow-up for type 2 diabetes."]
embeddings = AutoDenseModel.from_pretrained("{repository}").encode(texts)
print(embeddings.shape)  # torch.Size([2, {width}])
```"""

BODY = """# {name}

{kind}: `{architecture}`, {parameters:,} parameters, {width}-dimensional embeddings by {pooling}
pooling of {span}. {origin} Trained with [hf_densefeat](#citation) on pairs of texts of the same
patients, with an objective that shapes the linear structure of the embeddings.

## Use

{use}

A private repository needs `hf auth login` first. {local} {longer}

## Trained on

{counts}

A pair is two notes of a patient, one after the other, or two parts of one note. No text of them is in this repository.

## Objective

    {loss}

{terms}

{training}

## Measured

{measured}

## Intended use and limits

For research: features for probes, clustering and search in clinical text, by people who may process such text. It is not
a medical device, and no clinical decision should rest on it. What the training notes hold too little of (languages,
departments, groups of patients) it represents badly; check for your patients before relying on it. A more even spectrum
does not by itself make better predictions: the uses measured above are the evidence. Language models can keep fragments
of their training text: share the weights only with those who may see the notes, unless privacy has been assessed.

## Citation

```bibtex
@misc{{zhang_dense_feature_learning,
  title  = {{Dense Feature Learning via Linear Structure Preservation in Medical Data}},
  author = {{Zhang, Yuanyun and Zhang, Mingxuan and Li, Siyuan and Wang, Zihan and Chen, Haoran and Zhou, Wenbo and Li, Shi}}
}}
```
"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a model was trained on and how."""

    mlm_weight: float  # of language modelling
    dense_weight: float  # of the sum of the terms
    terms: Mapping[str, tuple[float, str]]  # name to weight and a line of description, of every term that was trained
    subspace_dim: int  # k of the subspaces
    settings: Mapping[str, Any]  # what else is worth knowing, by name
    counts: Mapping[str, int]  # numbers of patients, notes, pairs, by name
    base_model: str | None = None  # Hub name or folder of the weights that training began with; None for random ones
    local: bool = False  # the base model is a folder, which the card does not name, even where it is no longer there
    evaluated: Mapping[str, Any] | None = None  # numbers of the last evaluation in training, if all else is missing


def model_card(
    repository: str,
    model: Any,
    run: Run,
    *,
    measured: Sequence[Measured] = (),
    pictures: Sequence[Picture] = (),
    language: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    dataset: str | None = None,
) -> str:
    """README.md with its metadata; the snippets in it run as they are printed.

    The repository is a name on the Hub or of the folder. What was measured is in order of time; the last one's headlines
    become the `model-index`. Pictures lie beside the card. The language is an ISO code, the licence by default the one that
    the base model's card names, the dataset the Hub name of the notes, if they may be named.
    """
    own, base, name = model.card_use(), run.base_model, repository.split("/")[-1]
    on_hub = base if base and not run.local and not Path(base).exists() else None
    origin = f"Continued from [{on_hub}](https://hf.co/{on_hub})." if on_hub else "Continued from a local checkpoint."
    metadata = ModelCardData(
        language=language,
        license=license or (licence_of(base) if base else None),
        library_name="transformers" if own else "sentence-transformers",
        pipeline_tag="feature-extraction" if own else "sentence-similarity",
        tags=list(dict.fromkeys([*([] if own else ["sentence-transformers"]), *TAGS, *tags])),
        base_model=on_hub,
        datasets=dataset,
        model_name=name,
        eval_results=_eval_results(measured) if measured else None,
    )
    weighted = " + ".join(f"{weight:g} {term}" for term, (weight, _) in run.terms.items())
    terms = [
        [term, TERMS.get(term, text).replace("{k}", str(run.subspace_dim))] for term, (_, text) in run.terms.items()
    ]
    body = BODY.format(
        name=name,
        kind=model.card_kind,
        use=own.format(repository=repository, width=model.output_dimension) if own else _use(repository, model),
        local="" if "/" in repository else LOCAL.format(repository=repository),
        architecture=type(model).__name__.removeprefix("FSDP"),
        parameters=model.num_parameters(),
        width=model.output_dimension,
        pooling=model.pooling,
        span=f"the first {model.max_length:,} tokens" if model.max_length else "all tokens",
        longer=CHUNKED if model.long_notes == "chunk" else "",
        origin=origin if base else "Trained from random weights.",
        counts=markdown([["notes", "number"], *([key, f"{value:,}"] for key, value in run.counts.items())]),
        loss=f"L = {run.mlm_weight:g} MLM + {run.dense_weight:g} ({weighted})",
        terms=markdown([["term", "what it is"], *terms]),
        training=markdown([["training", "setting"], *([key, str(value)] for key, value in run.settings.items())]),
        measured=_measured(measured, pictures) if measured else _evaluated(run.evaluated or {}),
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}"


def _use(repository: str, model: Any) -> str:
    """Code that shows how to use the model; it runs as printed."""
    content = model.dense_head
    shared = {"repository": repository, "width": model.output_dimension}
    wide, two = content is not None and len(content.mean) > model.embedding_dimension, len(model.views) > 1
    if model.tail or model.prompt:
        kinds = [module.kind for module in model.tail] + ["the dense head"] * (content is not None)
        transformers = TAILED.format(modules=", ".join(kinds) or "nothing")
    else:
        path = next((path for path in model.sentence_modules if "content" in path), list(model.sentence_modules)[-1])
        transformers = TRANSFORMERS.format(
            **shared,
            imports=IMPORTS.splitlines()[1] if content is None else IMPORTS,
            max_length=model.max_length,
            pooling_code=POOLINGS[model.pooling].snippet,
            states=", output_hidden_states=True" if wide else "",
            inputs=INPUTS if wide else "",
            head=HEAD.format(repository=repository, path=path) if content is not None else "",
        )
    by_form = '\nby_form = encoder.encode(texts, task="form")  # the form view: what kind of text it is'
    by_content = "  # the content view: what a text is about"
    views = {"by_content": by_content, "by_form": by_form} if two else {"by_content": "", "by_form": ""}
    return USE.format(**shared, transformers=transformers, **views)


def licence_of(base_model: str) -> str | None:
    """The licence that the card of a Hub repository or folder names; None where there is no card, name or network."""
    card = Path(base_model) / "README.md" if Path(base_model).is_dir() else base_model
    try:
        return ModelCard.load(card).data.license
    except (OSError, ValueError, yaml.YAMLError):  # a card must not stop a run at its end
        return None


def _measured(measured: Sequence[Measured], pictures: Sequence[Picture]) -> str:
    """Verdict, tables and pictures of what was measured, as Markdown."""
    last = judged(measured)
    found, shape = verdict(last, measured[0] if len(measured) > 1 else None), last["geometry"]
    parts = [f"**{found.advice}** {found.evidence}", markdown(before_after_table(measured, wide=True)), READING]
    for picture in pictures:
        alt = picture.alt.translate(str.maketrans("[]", "()"))  # brackets would end the text of the picture
        parts.append(f"![{alt}]({picture.path.name})\n\n{picture.caption}")
    parts.append(markdown(geometry_table([last])))
    if shape.get("k") and "subspace_distance_half_normalized_centered" in shape:
        parts.append(markdown(subspace_table({last["name"]: shape})))
    return "\n\n".join(parts)


def _evaluated(evaluated: Mapping[str, Any]) -> str:
    """The evaluator's numbers, of a run that was only evaluated in training."""
    rows = [
        [key.removeprefix("eval_").replace("_", " "), number(value)]
        for key, value in evaluated.items()
        if key.startswith("eval_") and not key.endswith(("_runtime", "_per_second", "_seconds", "_time"))
    ]
    if not rows:
        return "Nothing was measured in this run."
    return f"The last evaluation in training, on held-out notes:\n\n{markdown([['measure', 'value'], *rows])}"


def _eval_results(measured: Sequence[Measured]) -> list[EvalResult] | None:
    """Headlines of the last encoder, with the interval in the metric's name: the Hub has no field for it."""
    # of the views the content view, which the folder gives by default
    one = next((one for one in measured if "view" in one), measured[-1])
    results = []
    for row in comparisons([one]):
        found = row.values[one["name"]]
        if not row.headline or not math.isfinite(found.value):
            continue
        metric = metric_named(row.metric)
        within = f", 95 % interval {found.low:.3f} to {found.high:.3f}" if math.isfinite(found.low) else ""
        kind, name = metric.hub_task or ("feature-extraction", GROUPS[row.group].capitalize())
        results.append(
            EvalResult(
                task_type=kind,
                task_name=name,
                dataset_type="clinical-notes",
                dataset_name=f"held-out patients: {row.task}",
                dataset_config=f"{row.task}, {name}",  # entries with the same task type and config are merged
                dataset_split="test",
                metric_type=metric.hub_name,
                metric_name=f"{metric.title}{within}",
                metric_value=round(found.value, 4),
            )
        )
    return results or None
