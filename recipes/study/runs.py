"""Runs, one a method and seed, kept on disk: what is there is neither trained nor measured again."""

import copy
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from domains import Domain

from hf_densefeat import DenseTrainingArguments, interpolate_weights
from hf_densefeat.commands.fitting import trained_for_similarity
from hf_densefeat.data.splits import refuse_trained
from study.measures import Measures
from study.methods import METHODS, Method
from study.training import make_trainer

# What the trainer's defaults say of the objective: a run under other defaults is another run.
DEFAULTS = (
    *("mlm_weight", "dense_weight", "lambda_sub", "lambda_orth", "lambda_pair"),
    *("window", "center", "unbiased", "power_iterations"),
)


class Study:
    """The domain, the folder of its runs, and the number of steps that all of them take."""

    def __init__(self, domain: Domain, work: Path, warm_up: int, encoders: Path | None = None):
        self.domain, self.warm_up, self.encoders, self.steps = domain, warm_up, encoders, 0
        self.measures = Measures(domain)
        digest = hashlib.sha256(repr((domain.name, domain.facts, sorted(domain.training.items()), warm_up)).encode())
        digest.update(domain.key.encode())
        for text in self.measures.inputs:
            digest.update(hashlib.sha256(text.encode()).digest())
        self.folder = work / f"{domain.name}-{digest.hexdigest()[:12]}"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def plan(self, budget: float, seeds: int, steps: int | None) -> None:
        """Settle the number of steps: given, remembered for this budget, or timed now."""
        probes = self.measures.evaluator.rows if self.domain.tasks else {}
        for name, rows in (probes | self.measures.similarity.rows).items():
            refuse_trained(rows.tested, self.domain.make_model(0), name)
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
            runs = seeds * sum(not method.free for method in METHODS.values())
            self.steps = max(10, 10 * math.floor(0.6 * 60 * budget / runs / second / 10))
            path.write_text(json.dumps({"steps": self.steps, "seconds_per_step": second, "runs": runs}))

    def start(self, seed: int):
        """The model that every method starts from: the domain's, or after `warm_up` steps of MLM alone, made once."""
        model = self.domain.make_model(seed)
        model.config = copy.deepcopy(model.config)  # a run's pooling is written there
        if self.warm_up:
            path = self.folder / f"start-{seed}.pt"
            if not path.exists():
                make_trainer(self.domain, METHODS["mlm"], model, seed, self.warm_up, self.folder).train()
                torch.save(model.state_dict(), path)
            model.load_state_dict(torch.load(path))
        return model

    def path(self, name: str, method: Method, seed: int, ending: str = ".npz") -> Path:
        """Where a run is kept: its name says the settings, those of the defaults too; one seed does for what has none."""
        seed = seed if method.trained or self.warm_up else 0
        defaults = DenseTrainingArguments(output_dir="-", report_to="none")
        arguments = {key: getattr(defaults, key) for key in DEFAULTS} | method.arguments
        rest = (method.supervised, method.self_pairs, method.spec_weight, method.most_rank, method.broadening)
        rest += (method.clean, self.steps, seed)
        rest += () if method.share == 1 else ("share", method.share)
        digest = hashlib.sha256(repr((sorted(arguments.items()), rest)).encode()).hexdigest()[:8]
        clean = "".join(letter if letter.isalnum() or letter in "+-." else "_" for letter in name)
        return self.folder / f"{clean}-{self.steps}-{seed}-{digest}{ending}"  # a name may hold a dot: no with_suffix

    def embeddings(self, name: str, method: Method, seed: int, bar=None) -> tuple[np.ndarray, float]:
        """Embeddings of all inputs by the trained model, and the seconds that training and encoding took."""
        path = self.path(name, method, seed)
        if not path.exists():
            begun = time.perf_counter()
            if method.encoder:
                z = self._encoded(name, method, seed, bar)
            else:
                z = self.domain.features(self.domain.train_inputs, self.measures.inputs).astype(np.float32)
            save(path, z=z, seconds=time.perf_counter() - begun)
        with np.load(path) as kept:
            return kept["z"], float(kept["seconds"])

    def _encoded(self, name: str, method: Method, seed: int, bar) -> np.ndarray:
        kept = self.encoder_of(name, seed)
        if kept and kept.exists():
            model = self.domain.open(kept)
        else:
            model = self.start(seed)
            if method.trained:
                make_trainer(self.domain, method, model, seed, self.steps, self.folder, bar).train()
            if method.share != 1:
                interpolate_weights(model, self.start(seed), method.share)
            if kept and method.trained:
                model.save_pretrained(kept)
                self.domain.processor.save_pretrained(kept)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.domain.training.get("bf16", False)):
            return self.domain.encode(model, self.measures.inputs).float().cpu().numpy()

    def encoder_of(self, name: str, seed: int) -> Path | None:
        """Where a trained encoder is kept, METHOD-SEED, or METHOD if it has no seed."""
        if self.encoders is None:
            return None
        plain = self.encoders / name.replace(" ", "_")
        return plain if plain.exists() else Path(f"{plain}-{seed}")

    def untrained(self, methods: dict[str, Method], seeds: Sequence[int]) -> tuple[int, int]:
        """How many of the runs that these methods need are not on disk, and how many they need."""
        needed = [
            (method.after[0], METHODS[method.after[0]]) if method.after else (name, method)
            for name, method in methods.items()
            if method.trained
        ]
        runs = {self.path(*one, seed): self.encoder_of(one[0], seed) for one in needed for seed in seeds}
        return sum(not (path.exists() or (kept and kept.exists())) for path, kept in runs.items()), len(runs)

    def measured(self, name: str, method: Method, seed: int, bar=None) -> dict[str, np.ndarray]:
        """Geometry, probes, robustness and shift of one run: flat names to values and replicates."""
        path = self.path(name, method, seed, ".measured.npz")
        if not path.exists():
            if method.after:
                z, seconds = self.embeddings(method.after[0], METHODS[method.after[0]], seed, bar)
                z = torch.from_numpy(z)
                z = method.after[1](z[self.measures.rows(self.domain.train_inputs)], z).numpy()
            else:
                z, seconds = self.embeddings(name, method, seed, bar)
            width = z.shape[1] // 2 if self.domain.pairs and method.encoder else None
            words = self.embeddings("features", METHODS["features"], 0)[0] if width else None
            kept = self.encoder_of(name, seed)
            for_similarity = not method.encoder or bool(kept and kept.exists() and trained_for_similarity(str(kept)))
            save(path, seconds=seconds, **self.measures.of(z, width, words, for_similarity=for_similarity))
        with np.load(path) as kept:
            return {key: kept[key] for key in kept.files}


def save(path: Path, **arrays) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".tmp")
    with open(partial, "wb") as file:
        np.savez(file, **arrays)
    partial.rename(path)
