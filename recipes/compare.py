"""The paper's study: its baselines, the peers and the dense objective on one domain, Tables 1 to 4 beside the paper's.

    python recipes/compare.py                                                # text, the bundled cohort
    python recipes/compare.py --domain text --data FOLDER --seeds 3 --budget 40
    python recipes/compare.py --domain text --data FOLDER --sweep

Every method starts from the same weights, sees the same batches for the same number of steps, and is frozen before it is
measured: on patients it has not seen, with linear probes. The number of steps follows from --budget, minutes for all
methods of the study and --seeds together, by timing steps of MLM + dense; 60 % of the budget is for training, the rest
for encoding and probes. --steps says it instead. With --warm_up N the common start is N steps of MLM, made once a seed.
Each run, (method, seed), is kept in --work: what is there is not trained again.

Written to --output, each name beginning with the domain: the report (.md), all numbers (.json) and the plots. They hold
numbers and names, no text. Intervals are 95 %, of redrawn patients and seeds; differences are on the same redraws.
"""

import argparse
import copy
import hashlib
import importlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import torch
from domains import Domain
from huggingface_hub.constants import HF_HOME
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from hf_densefeat import DenseObjective, DenseTrainer, DenseTrainingArguments, ProbeEvaluator, geometry_report
from hf_densefeat import baselines as b
from hf_densefeat.geometry import patient_subspaces
from hf_densefeat.plots import COLOURS, MARKERS, STYLES
from hf_densefeat.probes import probe
from hf_densefeat.scores import Estimate, patient_weights

matplotlib.use("Agg")
from matplotlib import pyplot as plt

logger = logging.getLogger("compare")

HERE = Path(__file__).resolve().parent
DOMAINS = ("text", "tabular", "multimodal")
BOOTSTRAPS = 1000
GEOMETRY_BOOTSTRAPS = 200
MISSING = (0.0, 0.2, 0.4, 0.6, 0.8)
MISSING_ROWS = 600
SHOTS = (4, 16, 64)
PATIENT_K = 4  # a patient's notes, cut in two halves, have to support it


# ---- Methods -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """How one encoder is trained, or made from another's embeddings.

    Attributes:
        title: name in tables.
        arguments: options of `DenseTrainingArguments` that differ from its defaults.
        pair_loss: width → loss that takes the place of the dense terms.
        supervised: cross-entropy on the domain's labels.
        self_pairs: each note with itself instead of the next.
        spec_weight: of L_spec, 1 but for the ablation.
        most_rank: L_spec is without effect where the participation ratio, 1 / ||Sigma / tr Sigma||^2, is above this.
        broadening: of the projectors' gradient.
        pair_weight: of `unshared_variance`, beside the dense terms.
        clean: the dense terms see the unmasked input, in a second forward.
        after: (name of a method, function of (z of its training notes, z) → z): nothing is trained.
    """

    title: str
    arguments: dict = field(default_factory=dict)
    pair_loss: Callable[[int], Callable] | None = None
    supervised: bool = False
    self_pairs: bool = False
    spec_weight: float = 1.0
    most_rank: float | None = None
    broadening: float = 1.0
    pair_weight: float = 0.0
    clean: bool = False
    after: tuple[str, Callable] | None = None


def whitened(train: Tensor, z: Tensor) -> Tensor:
    """Whitening fitted on the training inputs."""
    return b.apply_affine(z, *b.fit_whitening(train))


def top_removed(train: Tensor, z: Tensor) -> Tensor:
    """All-but-the-top fitted on the training inputs."""
    return b.apply_affine(z, *b.fit_all_but_the_top(train))


ALONE = {"mlm_weight": 0.0, "dense_weight": 1.0}
ORTH = {"lambda_orth": 1e-4}
METHODS = {
    "supervised": Method("Supervised CE", ALONE, supervised=True),
    "mlm": Method("Masked reconstruction (MLM)", {"dense_weight": 0.0}),
    "infonce": Method("InfoNCE, adjacent", ALONE, lambda width: b.info_nce),
    "simcse": Method("SimCSE", ALONE, lambda width: b.info_nce, self_pairs=True),
    "vicreg": Method("VICReg", ALONE, lambda width: b.Expanded(b.vicreg, width)),
    "barlow": Method("Barlow Twins", ALONE, lambda width: b.Expanded(b.barlow_twins, width)),
    "vne": Method("I-VNE+", ALONE, lambda width: b.Expanded(b.i_vne, width)),
    "sigreg": Method("LeJEPA (SIGReg)", ALONE, lambda width: b.Expanded(b.lejepa, width)),
    "mlm+vicreg": Method("MLM + VICReg", {"dense_weight": 1 / 25}, lambda width: b.vicreg),
    "mlm+whitening": Method("MLM, then whitened", after=("mlm", whitened)),
    "mlm+top-removed": Method("MLM, top directions removed", after=("mlm", top_removed)),
    "dense": Method("Dense alone (the paper's form)", ALONE | ORTH | {"center": False}),
    "mlm+dense": Method("MLM + dense (default)"),
    "full": Method("MLM + dense, with L_orth", ORTH),
    "full-spec": Method("… without L_spec", ORTH, spec_weight=0.0),
    "full-sub": Method("… without L_sub", ORTH | {"lambda_sub": 0.0}),
}
OURS = ("dense", "mlm+dense", "full")
ABLATION = {
    "full": "Full objective",
    "full-spec": "w/o Spectral Spreading",
    "full-sub": "w/o Subspace Consistency",
    "mlm+dense": "w/o Orthogonality",
}
# What ours has to beat: trained without labels, or made from such at no cost.
BASELINES = tuple(name for name in METHODS if name not in ("supervised", *OURS, *ABLATION))
SWEEP = {
    "lambda_sub": [{"lambda_sub": value} for value in (0.0, 0.001, 0.01, 0.03)],
    "lambda_orth": [{"lambda_orth": value} for value in (1e-5, 1e-4, 1e-3)],
    "dense_weight": [{"dense_weight": value} for value in (0.3, 1.0, 10.0)],
    "window": [{"window": value} for value in ("none", "512")],
    "centring": [{"center": False}],
    "estimator": [{"unbiased": True}],
    "pairs_per_patient": [{"pairs_per_patient": value} for value in (4, 8)],
    "pooling": [{"pooling": value} for value in ("cls", "max")],
}
SWEEP_METHODS = {
    "broadening 0.1": {"broadening": 0.1},
    "broadening 10": {"broadening": 10.0},
    "clean input": {"clean": True},
    "rank at most 16": {"most_rank": 16.0},
    "rank at most 32": {"most_rank": 32.0},
    "rank at most 64": {"most_rank": 64.0},
    "pairing-aware, no L_sub": {"pair_weight": 0.1, "arguments": {"lambda_sub": 0.0}},
    "pairing-aware and L_sub": {"pair_weight": 0.1},
}


def sweep_methods() -> dict[str, Method]:
    """One factor at a time around the default."""
    found = {}
    for values in SWEEP.values():
        for change in values:
            name = ", ".join(f"{key} {value}" for key, value in change.items())
            found[name] = Method(name, change)
    return found | {name: Method(name, **change) for name, change in SWEEP_METHODS.items()}


# ---- Training ------------------------------------------------------------------------------------------------------


class StudyObjective(DenseObjective):
    """With a weight on L_spec and a rank above which it is without effect."""

    def __init__(self, objective: DenseObjective, method: Method):
        vars(self).update(vars(objective))
        self.broadening, self.spec_weight = method.broadening, method.spec_weight
        self.most_rank = method.most_rank

    def terms(self, a, b):
        """The terms, the loss changed."""
        terms = super().terms(a, b)
        spread = terms["spectral_spreading"]
        counted = spread
        if self.most_rank is not None:
            counted = (spread - (1 / self.most_rank - 1 / len(a.shift))).clamp(min=0)
        terms["loss"] = terms["loss"] - spread + self.spec_weight * counted
        return terms


class StudyTrainer(DenseTrainer):
    """With a term that sees the pairing, and a second, unmasked forward for the dense terms."""

    pair_weight = 0.0

    def _dense_term(self, update, z_a, z_b):
        loss = super()._dense_term(update, z_a, z_b)
        return loss + self.pair_weight * b.unshared_variance(z_a, z_b) if self.pair_weight else loss

    def _forward(self, model, inputs):
        if "clean" not in inputs:
            return super()._forward(model, inputs)
        clean = inputs.pop("clean")
        outputs, *_ = super()._forward(model, inputs)
        return outputs, *super()._forward(model, clean)[1:]


class BothCollator:
    """The masked batch, and in it the unmasked one."""

    def __init__(self, masked, clean):
        self.masked, self.clean = masked, clean

    def __call__(self, pairs):
        """One dict in another."""
        return self.masked(pairs) | {"clean": self.clean(pairs)}


class Progress(TrainerCallback):
    """Steps of all runs on one bar."""

    def __init__(self, bar: tqdm | None):
        self.bar = bar

    def on_step_end(self, args, state, control, **kwargs):
        """One more."""
        if self.bar is not None:
            self.bar.update()


def make_trainer(domain: Domain, method: Method, model, seed: int, steps: int, folder: Path, bar=None):
    """The trainer of one run: same data, batches and schedule for all."""
    options = {
        "output_dir": str(folder / "trainer"),
        "max_steps": steps,
        "seed": seed,
        "data_seed": seed,
        "dataloader_drop_last": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    args = DenseTrainingArguments(**(options | domain.training | method.arguments))
    collator = domain.collator("mlm" if args.mlm_weight else None)
    if method.clean:
        collator = BothCollator(collator, domain.collator(None))
    common = {
        "model": model,
        "args": args,
        "train_dataset": domain.self_pairs if method.self_pairs else domain.train,
        "processing_class": domain.processor,
        "data_collator": collator,
    }
    if method.supervised:
        trainer = b.SupervisedTrainer(labels=domain.supervised, classes=domain.classes, **common)
    elif method.pair_loss is not None:
        torch.manual_seed(seed)
        trainer = b.PairLossTrainer(pair_loss=method.pair_loss(model.config.hidden_size), **common)
    else:
        trainer = StudyTrainer(**common)
        trainer.pair_weight = method.pair_weight
        trainer.objective = StudyObjective(trainer.objective, method)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(bar))
    return trainer


# ---- Runs, kept on disk --------------------------------------------------------------------------------------------


class Study:
    """The domain, the folder of its runs, and the number of steps that all of them take."""

    def __init__(self, domain: Domain, work: Path, warm_up: int):
        self.domain, self.warm_up = domain, warm_up
        inputs = [*domain.earlier, *domain.later, *domain.train_inputs]
        self.test = {task.name: task for task in domain.tasks}[domain.primary]
        options = {"bootstraps": BOOTSTRAPS, "cache": False}
        self.evaluator = ProbeEvaluator([*domain.tasks, *domain.shift], **options)
        self.few = ProbeEvaluator([self.test], shots=SHOTS, **options)
        rows = self.evaluator.rows
        inputs += [text for found in rows.values() for text in found.texts]
        found = rows[domain.primary]
        self.damaged = np.random.default_rng(0).permutation(np.flatnonzero(found.split == 2))[:MISSING_ROWS]
        held = [found.texts[i] for i in self.damaged]
        self.missing = {share: domain.degrade(held, share, 0) for share in MISSING}
        self.inputs = sorted({*inputs, *(text for texts in self.missing.values() for text in texts)})
        self.place = {text: i for i, text in enumerate(self.inputs)}
        digest = hashlib.sha256(repr((domain.name, domain.facts, sorted(domain.training.items()), warm_up)).encode())
        for text in self.inputs:
            digest.update(hashlib.sha256(text.encode()).digest())
        self.folder = work / f"{domain.name}-{digest.hexdigest()[:12]}"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.steps = 0

    def plan(self, budget: float, seeds: int, steps: int | None) -> None:
        """Settle the number of steps: given, remembered for this budget, or timed now."""
        path = self.folder / f"plan-{budget:g}-{seeds}.json"
        if steps:
            self.steps = steps
        elif path.exists():
            self.steps = json.loads(path.read_text())["steps"]
        else:
            times = []
            for timed in (2, 10):
                trainer = make_trainer(self.domain, METHODS["mlm+dense"], self.start(0), 0, timed, self.folder)
                begun = time.perf_counter()
                trainer.train()
                times.append(time.perf_counter() - begun)
            second = max(times[1] - times[0], 1e-6) / 8
            runs = seeds * sum(method.after is None for method in METHODS.values())
            self.steps = max(10, 10 * math.floor(0.6 * 60 * budget / runs / second / 10))
            path.write_text(json.dumps({"steps": self.steps, "seconds_per_step": second, "runs": runs}))

    def start(self, seed: int):
        """The model that every method starts from: random, or after `warm_up` steps of MLM alone, made once."""
        model = self.domain.make_model(seed)
        model.config = copy.deepcopy(model.config)  # a run's pooling is written there
        if self.warm_up:
            path = self.folder / f"start-{seed}.pt"
            if not path.exists():
                make_trainer(self.domain, METHODS["mlm"], model, seed, self.warm_up, self.folder).train()
                torch.save(model.state_dict(), path)
            model.load_state_dict(torch.load(path))
        return model

    def path(self, name: str, method: Method, seed: int) -> Path:
        """Where a run is kept: its name says the settings, those of the defaults too."""
        defaults = DenseTrainingArguments(output_dir="-", report_to="none")
        dense = (
            "mlm_weight",
            "dense_weight",
            "lambda_sub",
            "lambda_orth",
            "window",
            "center",
            "unbiased",
            "power_iterations",
        )
        arguments = {key: getattr(defaults, key) for key in dense} | method.arguments
        rest = (method.supervised, method.self_pairs, method.spec_weight, method.most_rank, method.broadening)
        rest += (method.pair_weight, method.clean, self.steps, seed)
        digest = hashlib.sha256(repr((sorted(arguments.items()), rest)).encode()).hexdigest()[:8]
        clean = "".join(letter if letter.isalnum() or letter in "+-." else "_" for letter in name)
        return self.folder / f"{clean}-{self.steps}-{seed}-{digest}"

    def embeddings(self, name: str, method: Method, seed: int, bar=None) -> tuple[np.ndarray, float]:
        """Embeddings of all inputs by the trained model, and the seconds that training and encoding took."""
        path = self.path(name, method, seed).with_suffix(".npz")
        if not path.exists():
            begun = time.perf_counter()
            model = self.start(seed)
            make_trainer(self.domain, method, model, seed, self.steps, self.folder, bar).train()
            z = self.domain.encode(model, self.inputs).float().cpu().numpy()
            save(path, z=z, seconds=time.perf_counter() - begun)
        with np.load(path) as kept:
            return kept["z"], float(kept["seconds"])

    def trained(self, name: str, method: Method, seed: int) -> bool:
        """Whether the run is on disk."""
        return self.path(name, method, seed).with_suffix(".npz").exists()

    def measured(self, name: str, method: Method, seed: int, bar=None) -> dict:
        """Geometry, probes, robustness and shift of one run: flat names to values and replicates."""
        path = self.path(name, method, seed).with_suffix(".measured.npz")
        if not path.exists():
            if method.after:
                z, seconds = self.embeddings(method.after[0], METHODS[method.after[0]], seed, bar)
                train = torch.from_numpy(z[self.rows(self.domain.train_inputs)])
                z = method.after[1](train, torch.from_numpy(z)).numpy()
            else:
                z, seconds = self.embeddings(name, method, seed, bar)
            save(path, seconds=seconds, **self.measure(z))
        with np.load(path) as kept:
            return {key: kept[key] for key in kept.files}

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """Where the texts are among the inputs."""
        return np.array([self.place[text] for text in texts])

    def measure(self, z: np.ndarray) -> dict[str, np.ndarray]:
        """Value first, then replicates, of everything that is measured."""
        domain, found = self.domain, {}
        z_a, z_b = (torch.from_numpy(z[self.rows(side)]) for side in (domain.earlier, domain.later))
        k = domain.training.get("subspace_dim", 20)
        report = geometry_report(z_a, z_b, k=k, groups=torch.from_numpy(domain.patient))
        for key, value in report.items():
            found[f"geometry {key}"] = np.array([value])
        for key, drawn in geometry_replicates(z_a, z_b, domain.patient, int(report["k"])).items():
            # Redrawn patients are fewer different ones, which by itself lowers the rank and raises the distance.
            value = found[f"geometry {key}"]
            found[f"geometry {key}"] = np.append(value, drawn * value / drawn.mean())
        last = np.append(np.diff(domain.patient) != 0, True)
        owner = np.append(domain.patient, domain.patient[last])
        chain = np.argsort(owner, kind="stable")  # a patient's windows in order: those that are followed, and the last
        own = patient_subspaces(torch.cat([z_a, z_b[last]])[chain], torch.from_numpy(owner[chain]), PATIENT_K)
        for key in ("distance", "noise_floor"):
            found[f"geometry patient_{key}"] = np.array([own.get(f"{key}_normalized", np.nan)])
        known = Known(self.inputs, z)
        for name, result in self.evaluator.evaluate(known).items():
            for metric, estimate in result.metrics.items():
                found[f"{name} {metric}"] = np.append(estimate.value, result.replicates[metric])
        for shots, estimate in self.few.evaluate(known)[domain.primary].shots.items():
            found[f"{shots} shots"] = np.array([estimate.value, estimate.low, estimate.high])
        rows = self.evaluator.rows[domain.primary]
        order = np.append(np.flatnonzero(rows.split < 2), self.damaged)
        own, labels = (
            z[self.rows([rows.texts[i] for i in order])],
            (rows.y[order], rows.patient[order], rows.split[order]),
        )
        for share, texts in self.missing.items():
            own[-len(texts) :] = z[self.rows(texts)]
            result = probe(own, *labels, self.test.kind, BOOTSTRAPS)
            found[f"missing {share:.0%}"] = np.append(result.metrics["auroc"].value, result.replicates["auroc"])
        return found


def save(path: Path, **arrays) -> None:
    """Whole or not at all."""
    partial_path = path.with_suffix(".tmp")
    with open(partial_path, "wb") as file:
        np.savez(file, **arrays)
    partial_path.rename(path)


class Known:
    """An encoder whose embeddings are known."""

    def __init__(self, texts: Sequence[str], z: np.ndarray):
        self.place, self.z = {text: i for i, text in enumerate(texts)}, z

    def encode(self, texts: list[str]) -> Tensor:
        """Look them up."""
        return torch.from_numpy(self.z[[self.place[text] for text in texts]])


def geometry_replicates(z_a: Tensor, z_b: Tensor, patient: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """Effective rank of the earlier side and normalised subspace distance, both centred, for redrawn patients."""
    weights = torch.from_numpy(patient_weights(patient, GEOMETRY_BOOTSTRAPS)).float()
    count = weights.sum(1)[:, None]
    ranks, bases = [], []
    for z in (z_a, z_b):
        z = (z - z.mean(0)).float()
        mean = weights @ z / count
        second = torch.stack([(z * row[:, None]).mT @ z for row in weights]) / count[:, :, None]
        values, vectors = torch.linalg.eigh((second - mean[:, :, None] * mean[:, None]).double())
        share = values.clamp(min=0) / values.clamp(min=0).sum(1, keepdim=True).clamp(min=1e-300)
        ranks.append(torch.special.entr(share).sum(1).exp().numpy())
        bases.append(vectors[:, :, z.shape[1] - k :])
    if k:
        distances = (1 - (bases[0].mT @ bases[1]).square().sum((1, 2)) / k).numpy()
    return {"effective_rank_centered": ranks[0]} | ({"subspace_distance_normalized_centered": distances} if k else {})


# ---- Over seeds ----------------------------------------------------------------------------------------------------


class Results:
    """All runs' numbers, method by method, averaged over seeds with intervals of redrawn seeds and patients."""

    def __init__(self, runs: dict[str, list[dict]], domain: Domain):
        self.runs = runs
        self.kinds = {task.name: task.kind for task in domain.tasks}
        classes = [name for name, kind in self.kinds.items() if kind in ("binary", "multiclass")]
        self.summaries = {"AUROC": [f"{name} auroc" for name in classes]}
        self.summaries |= {
            title: [f"{name} {metric}" for name, own in self.kinds.items() if own == kind]
            for title, kind, metric in (("ARI", "clustering", "ari"), ("RMSE", "regression", "rmse"))
        }
        seeds = len(next(iter(runs.values())))
        self.drawn = np.random.default_rng(0).integers(seeds, size=(BOOTSTRAPS, seeds))

    def array(self, name: str, keys: str | list[str]) -> tuple[float, np.ndarray]:
        """Value and replicates of a method, the mean over several metrics where a list is given."""
        keys = [keys] if isinstance(keys, str) else keys
        table = np.mean([[run[key] for run in self.runs[name]] for key in keys], axis=0)
        value, replicates = table[:, 0].mean(), table[:, 1:]
        if replicates.shape[1] == 0:
            return float(value), np.empty(0)
        drawn = self.drawn[: replicates.shape[1]]
        return float(value), replicates[drawn, np.arange(len(drawn))[:, None]].mean(1)

    def estimate(self, name: str, keys) -> Estimate:
        """With its interval."""
        return Estimate.of(*self.array(name, keys))

    def difference(self, ours: str, theirs: str, keys) -> Estimate:
        """Ours minus theirs on the same redraws."""
        (value, drawn), (other, others) = self.array(ours, keys), self.array(theirs, keys)
        return Estimate.of(value - other, drawn - others)

    def best(self, keys, low: bool = False) -> str | None:
        """The baseline that is best at this, of those that were run."""
        there = [name for name in BASELINES if name in self.runs]
        return min(there, key=lambda name: self.array(name, keys)[0] * (1 if low else -1), default=None)


# ---- Tables --------------------------------------------------------------------------------------------------------

PAPER = {
    "supervised": (38.2, 214.7, 0.317, 0.781, 0.214, 0.642),
    "mlm": (51.6, 142.3, 0.284, 0.764, 0.238, 0.618),
    "infonce": (47.9, 168.4, 0.261, 0.792, 0.251, 0.604),
    "dense": (86.4, 61.2, 0.143, 0.824, 0.317, 0.559),
}
PAPER_ABLATION = {
    "full": (86.4, 0.824),
    "full-spec": (52.1, 0.781),
    "full-sub": (63.7, 0.802),
    "mlm+dense": (58.9, 0.794),
}
RANK, DISTANCE = "geometry effective_rank_centered", "geometry subspace_distance_normalized_centered"
CONDITION = "geometry condition_resolved_centered"


def show(estimate: Estimate, digits: int = 3, sign: str = "") -> str:
    """Value and interval."""
    text = f"{estimate.value:{sign}.{digits}f}"
    if math.isfinite(estimate.low):
        text += f" ({estimate.low:{sign}.{digits}f} … {estimate.high:{sign}.{digits}f})"
    return text


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def paper(name: str, column: int) -> str:
    """The paper's figure, where it has one."""
    return f"{PAPER[name][column]:g}" if name in PAPER else ""


def table_1(results: Results) -> str:
    """Effective rank and condition number."""
    keys = ("geometry effective_rank", CONDITION, "geometry condition_over_median_centered", "geometry mean_cosine")
    head = ["Method", "Effective rank, centred", "uncentred", "Condition number", "over median", "Mean cosine"]
    rows = []
    for name in shown(results):
        values = [results.estimate(name, key) for key in keys]
        plain, condition, median, cosine = (value.value for value in values)
        row = [METHODS[name].title, show(results.estimate(name, RANK), 1), f"{plain:.1f}", f"{condition:,.0f}"]
        rows.append([*row, f"{median:,.1f}", f"{cosine:.2f}", paper(name, 0), paper(name, 1)])
    return markdown([*head, "Paper: rank", "Paper: condition"], rows)


def table_2(results: Results) -> str:
    """Subspace distance of the cohort and of each patient, with what sampling alone makes of them."""
    head = ["Method", "Subspace distance / 2k", "between halves", "floor of halves", "excess"]
    head += [f"A patient's earlier and later half, k = {PATIENT_K}", "floor", "Paper"]
    rows = []
    for name in shown(results):
        part = [
            results.estimate(name, f"geometry {key}").value
            for key in (
                "subspace_distance_half_normalized_centered",
                "subspace_noise_floor_normalized_centered",
                "subspace_excess_normalized_centered",
                "patient_distance",
                "patient_noise_floor",
            )
        ]
        distance = show(results.estimate(name, DISTANCE))
        part = [f"{value:.3f}" if math.isfinite(value) else "–" for value in part]
        rows.append([METHODS[name].title, distance, *part, paper(name, 2)])
    return markdown(head, rows)


def table_3(results: Results) -> str:
    """Probes: means over tasks of a kind, and differences to the best baseline."""
    head, rows = ["Method"], []
    summaries = {title: keys for title, keys in results.summaries.items() if keys}
    best = {title: results.best(keys, title == "RMSE") for title, keys in summaries.items()}
    for title in summaries:
        head += [title, f"− {METHODS[best[title]].title}" if best[title] else "−"]
    for name in shown(results):
        row = [METHODS[name].title]
        for title, keys in summaries.items():
            other = best[title]
            difference = show(results.difference(name, other, keys), sign="+") if other and other != name else ""
            row += [show(results.estimate(name, keys)), difference]
        rows.append(row + [paper(name, column) for column in (3, 4, 5)])
    return markdown([*head, "Paper: AUROC", "Paper: ARI", "Paper: RMSE"], rows)


def table_tasks(results: Results, domain: Domain) -> str:
    """Every task by itself."""
    keys = [key for keys in results.summaries.values() for key in keys]
    rows = [[METHODS[name].title, *(show(results.estimate(name, key)) for key in keys)] for name in shown(results)]
    return markdown(["Method", *keys], rows)


def table_4(results: Results) -> str:
    """The ablation."""
    head = ["Objective", "Effective rank", "Subspace distance", "AUROC", "Paper: rank", "Paper: AUROC"]
    rows = []
    for name, title in ABLATION.items():
        if name in results.runs:
            row = [title, show(results.estimate(name, RANK), 1), show(results.estimate(name, DISTANCE))]
            row += [
                show(results.estimate(name, results.summaries["AUROC"])),
                *map("{:g}".format, PAPER_ABLATION[name]),
            ]
            rows.append(row)
    return markdown(head, rows)


def table_robust(results: Results, domain: Domain) -> str:
    """Few labels, missing parts, and shift."""
    runs = next(iter(results.runs.values()))[0]
    keys = [key for key in runs if key.endswith(" shots")]
    keys += [f"missing {share:.0%}" for share in MISSING]
    keys += [f"{task.name} auroc" for task in domain.shift]
    rows = []
    for name in shown(results):
        cells = []
        for key in keys:
            values = np.array([run[key] for run in results.runs[name]])
            few = key.endswith("shots")
            cells.append(show(Estimate(*values.mean(0)) if few else results.estimate(name, key)))
        rows.append([METHODS[name].title, *cells])
    return markdown(["Method", *keys], rows)


def table_rows(study: Study) -> str:
    """What the probes are on."""
    rows = []
    for task in [*study.domain.tasks, *study.domain.shift]:
        found = study.evaluator.rows[task.name]
        counts = [str(int((found.split == code).sum())) for code in range(3)]
        shares = [f"{np.mean(found.y[found.split == 2] == code):.2f}" for code in range(len(found.classes))]
        if task.kind == "clustering":
            counts = ["", "", str(len(found.y))]
            shares = [f"{np.mean(found.y == code):.2f}" for code in range(len(found.classes))]
        people = len(np.unique(found.patient if task.kind == "clustering" else found.patient[found.split == 2]))
        rows.append([task.name, task.kind, *counts, str(people), ", ".join(shares)])
    return markdown(["Task", "Kind", "Train", "Validation", "Test", "Test patients", "Share of classes, test"], rows)


def shown(results: Results) -> list[str]:
    """The methods that were run, in the order of the list."""
    return [name for name in METHODS if name in results.runs]


def verdict(results: Results) -> list[str]:
    """Whether the default reaches what the paper claims, in sentences."""
    name, lines = "mlm+dense", []
    if name not in results.runs or not any(other in results.runs for other in BASELINES):
        return lines
    for key, low, title, target in (
        (RANK, False, "Effective rank", "at least 1.6"),
        (DISTANCE, True, "Subspace distance", "at most 0.55"),
    ):
        there = [other for other in BASELINES if other in results.runs and not METHODS[other].after]
        if there:
            other = min(there, key=lambda one: results.array(one, key)[0] * (1 if low else -1))
            ratio = results.array(name, key)[0] / max(results.array(other, key)[0], 1e-12)
            best = f"the best trained baseline, {METHODS[other].title}"
            lines.append(f"{title}: {ratio:.2f} × that of {best} (paper: {target}).")
    better, worse, even = [], [], []
    for title, keys in results.summaries.items():
        sign = -1 if title == "RMSE" else 1
        for key in keys:
            other = results.best(key, title == "RMSE")
            found = results.difference(name, other, key)
            low, high = sorted((sign * found.low, sign * found.high))
            where = better if low > 0 else worse if high < 0 else even
            where.append(f"{key} ({show(found, sign='+')} against {METHODS[other].title})")
    for title, tasks in (("better than", better), ("within the interval of", even), ("worse than", worse)):
        lines.append(
            f"Tasks {title} the best baseline of each: {len(tasks)}{': ' if tasks else ''}{'; '.join(tasks)}."
        )
    return lines


# ---- Pictures ------------------------------------------------------------------------------------------------------


def _style(i: int) -> dict:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i // len(COLOURS) + i) % len(MARKERS)]}


def plot_pareto(points: dict[str, tuple[float, float, float]], path: Path) -> None:
    """Effective rank, subspace distance and AUROC of each method: two views, the third number beside the name."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 6.4), dpi=150, layout="constrained")
    for i, (name, (rank, distance, area)) in enumerate(points.items()):
        axes[0].plot(rank, area, linestyle="", markersize=9, label=name, **_style(i))
        axes[1].plot(distance, area, linestyle="", markersize=9, **_style(i))
    axes[0].set(xlabel="effective rank (centred)", ylabel="probe AUROC, mean over tasks")
    axes[1].set(xlabel="subspace distance of adjacent windows / 2k")
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25, linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path)
    plt.close(figure)


def plot_missing(results: Results, domain: Domain, path: Path) -> None:
    """AUROC as parts of the input go missing."""
    figure, axes = plt.subplots(figsize=(7.2, 5.2), dpi=150, layout="constrained")
    keys = [f"missing {share:.0%}" for share in MISSING]
    names = [name for name in shown(results) if name not in ABLATION or name == "mlm+dense"]
    for i, name in enumerate(names):
        values = [results.estimate(name, key).value for key in keys]
        style = _style(i) | {"linestyle": STYLES[i % len(STYLES)], "linewidth": 3 if name in OURS else 1.5}
        axes.plot([100 * share for share in MISSING], values, markersize=5, label=METHODS[name].title, **style)
    axes.set(xlabel="sections or values missing (%)", ylabel=f"AUROC, {domain.primary}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


# ---- The command line ----------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> dict:
    """Train what is missing, measure, print and write; returns what the JSON holds."""
    domain = importlib.import_module(f"domains.{arguments.domain}").load(arguments.data, arguments.model_name_or_path)
    if arguments.bf16:
        domain.training |= {"bf16": True, "use_cpu": not torch.cuda.is_available()}
    study = Study(domain, Path(arguments.work), arguments.warm_up)
    study.plan(arguments.budget, arguments.seeds, arguments.steps)
    if arguments.sweep:
        methods = {"mlm": METHODS["mlm"], "mlm+dense": METHODS["mlm+dense"]} | sweep_methods()
    else:
        methods = {name: METHODS[name] for name in arguments.methods}
    seeds = range(arguments.seeds)
    needed = {name: method for name, method in methods.items() if method.after is None}
    needed |= {method.after[0]: METHODS[method.after[0]] for method in methods.values() if method.after}
    left = [(name, seed) for seed in seeds for name, method in needed.items() if not study.trained(name, method, seed)]
    print(
        f"{domain.facts}\n{len(left)} runs of {study.steps} steps to train, of {len(needed) * len(seeds)}.", flush=True
    )
    runs: dict[str, list[dict]] = {name: [] for name in methods}
    with tqdm(total=len(left) * study.steps, unit="step", disable=None if left else True) as bar:
        for seed in seeds:
            for name, method in methods.items():
                bar.set_postfix_str(f"{name}, seed {seed}")
                runs[name].append(study.measured(name, method, seed, bar))
    results = Results(runs, domain)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    if arguments.sweep:
        return report_sweep(study, results, methods, output)
    return report(study, results, arguments, output)


def report(study: Study, results: Results, arguments: argparse.Namespace, output: Path) -> dict:
    """Tables that were asked for on the screen; all of them, numbers and plots on disk."""
    domain, name = study.domain, study.domain.name
    tables = {
        "1": ("Table 1. Effective rank and condition number", table_1(results)),
        "2": ("Table 2. Subspace distance between adjacent windows", table_2(results)),
        "3": ("Table 3. Linear probes on frozen embeddings", table_3(results)),
        "4": ("Table 4. Ablation", table_4(results)),
    }
    if arguments.table == "all":
        tables["tasks"] = ("Every probe", table_tasks(results, domain))
        tables["robust"] = ("Few labels, missing parts, shift", table_robust(results, domain))
        tables["rows"] = ("Rows behind the probes", table_rows(study))
        asked = list(tables)
    else:
        asked = [arguments.table]
    seconds = {method: float(np.mean([run["seconds"] for run in found])) for method, found in results.runs.items()}
    head = (
        f"{domain.facts} {study.steps} steps of {domain.training['per_device_train_batch_size']} pairs for every method, "
        f"{arguments.seeds} seeds, start: {f'{study.warm_up} steps of MLM' if study.warm_up else 'the same weights'}. The "
        f"supervised encoder has seen the training patients' labels of {domain.supervised_task}."
    )
    text = "\n\n".join([head, *verdict(results), *(f"## {tables[key][0]}\n\n{tables[key][1]}" for key in asked)])
    print("\n" + text)
    numbers = {
        "facts": domain.facts,
        "steps": study.steps,
        "seeds": arguments.seeds,
        "seconds": seconds,
        "methods": {
            method: {
                key: asdict(results.estimate(method, key))
                for key in found[0]
                if key != "seconds" and "shots" not in key
            }
            for method, found in results.runs.items()
        },
    }
    suffix = "" if arguments.table == "all" else f"-table-{arguments.table}"
    (output / f"{name}{suffix}.md").write_text(text + "\n")
    (output / f"{name}{suffix}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    if arguments.table == "all":
        plot_pareto({METHODS[one].title: point(results, one) for one in shown(results)}, output / f"{name}-pareto.png")
        plot_missing(results, domain, output / f"{name}-missing.png")
    return numbers


def point(results: Results, name: str) -> tuple[float, float, float]:
    """Effective rank, distance and mean AUROC."""
    return tuple(results.array(name, key)[0] for key in (RANK, DISTANCE, results.summaries["AUROC"]))


def report_sweep(study: Study, results: Results, methods: dict[str, Method], output: Path) -> dict:
    """One row a setting, with the difference in AUROC to the default."""
    head = ["Setting", "Effective rank", "Subspace distance", "AUROC", "− default", "ARI", "RMSE"]
    rows, numbers = [], {}
    for name, method in methods.items():
        row = [method.title, show(results.estimate(name, RANK), 1), show(results.estimate(name, DISTANCE))]
        areas = results.summaries["AUROC"]
        row += [show(results.estimate(name, areas)), show(results.difference(name, "mlm+dense", areas), sign="+")]
        row += [
            show(results.estimate(name, results.summaries[key])) for key in ("ARI", "RMSE") if results.summaries[key]
        ]
        rows.append(row)
        numbers[name] = dict(zip(("rank", "distance", "auroc"), point(results, name), strict=True))
    text = f"{study.domain.facts} {study.steps} steps.\n\n{markdown(head, rows)}"
    print("\n" + text)
    (output / f"{study.domain.name}-sweep.md").write_text(text + "\n")
    (output / f"{study.domain.name}-sweep.json").write_text(json.dumps(numbers, indent=1) + "\n")
    plot_pareto(
        {methods[name].title: point(results, name) for name in methods}, output / f"{study.domain.name}-sweep.png"
    )
    return numbers


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", default="text", choices=DOMAINS)
    parser.add_argument("--table", default="all", choices=("1", "2", "3", "4", "all"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--budget", type=float, default=10.0, help="minutes for the whole study of the domain")
    parser.add_argument("--steps", type=int, help="steps of every run, instead of --budget")
    parser.add_argument("--warm_up", type=int, default=0, help="steps of MLM that make the common start, once a seed")
    parser.add_argument(
        "--bf16", action="store_true", help="mixed precision, on processors and GPUs that are fast at it"
    )
    parser.add_argument("--methods", help=f"comma-separated, of: {', '.join(METHODS)}")
    parser.add_argument("--sweep", action="store_true", help="one factor at a time around the default, no tables")
    parser.add_argument("--data", help="folder of data sets; default: the bundled cohort")
    parser.add_argument("--model_name_or_path", help="start from this encoder instead of random weights")
    parser.add_argument("--output", default=str(HERE / "results"), help="folder to write")
    parser.add_argument("--work", default=str(Path(HF_HOME) / "hf_densefeat" / "compare"), help="folder of the runs")
    arguments = parser.parse_args(argv)
    arguments.methods = arguments.methods.split(",") if arguments.methods else list(METHODS)
    unknown = [name for name in arguments.methods if name not in METHODS]
    if unknown:
        parser.error(f"--methods: no method {', '.join(unknown)}. There are {', '.join(METHODS)}.")
    return arguments


def main(argv: Sequence[str] | None = None) -> dict:
    """Read the command line and run."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    return run(parse(argv))


if __name__ == "__main__":
    main()
