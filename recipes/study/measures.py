"""What is measured of one encoder's embeddings: geometry, probes, few labels, missing parts, shift."""

from collections.abc import Sequence

import numpy as np
import torch
from domains import Domain
from torch import Tensor

from hf_densefeat import ProbeEvaluator, geometry_report
from hf_densefeat.evaluation.geometry import CONDITION_FLOOR, effective_rank_of_spectrum, patient_subspaces
from hf_densefeat.evaluation.metrics import PatientWeights
from hf_densefeat.evaluation.probes import probe
from study.similarity import SimilarityMeasures

BOOTSTRAPS = 1000
GEOMETRY_BOOTSTRAPS = 200
MISSING = (0.0, 0.2, 0.4, 0.6, 0.8)
MISSING_ROWS = 600
SHOTS = (4, 16, 64)
PATIENT_K = 4  # a patient's notes, cut in two halves, have to support it


class Measures:
    """The inputs whose embeddings are needed, each once, and all that is asked of these."""

    def __init__(self, domain: Domain):
        self.domain = domain
        self.similarity = SimilarityMeasures(domain)
        inputs = {*domain.earlier, *domain.later, *domain.train_inputs, *self.similarity.inputs}
        if domain.tasks:
            inputs.update(self._read_probes(domain))
        self.inputs = sorted(inputs)
        self.place = {text: i for i, text in enumerate(self.inputs)}

    def _read_probes(self, domain: Domain) -> set[str]:
        """The probes' rows, and their inputs."""
        self.primary = next(task for task in domain.tasks if task.name == domain.primary)
        options = {"bootstraps": BOOTSTRAPS, "cache": False}
        self.evaluator = ProbeEvaluator([*domain.tasks, *domain.shift], **options)
        self.few = ProbeEvaluator([self.primary], shots=SHOTS, **options)
        rows = self.evaluator.rows[domain.primary]
        self.damaged = np.random.default_rng(0).permutation(np.flatnonzero(rows.split == 2))[:MISSING_ROWS]
        held = [rows.texts[i] for i in self.damaged]
        self.missing = {share: domain.degrade(held, share, 0) for share in MISSING}
        return set().union(*(rows.texts for rows in self.evaluator.rows.values()), *self.missing.values())

    def rows(self, texts: Sequence[str]) -> list[int]:
        """Where the texts are among the inputs."""
        return [self.place[text] for text in texts]

    def of(
        self,
        z: np.ndarray,
        width: int | None = None,
        words: np.ndarray | None = None,
        *,
        for_similarity: bool = False,
    ) -> dict[str, np.ndarray]:
        """Value first, then replicates, of everything that is measured, given the embeddings of the inputs.

        `width` columns of `z` are the embedding, by default all; `words` are embeddings of the inputs' words;
        `for_similarity` says that `z` is made for cosine.
        """
        known, whole = Known(self, z[:, :width]), Known(self, z)
        beside = None if words is None else Known(self, words).encode
        train, options = whole.encode(self.domain.train_inputs), {"for_similarity": for_similarity}
        found = self.similarity.of(whole.encode, train, width, beside, **options)
        found = self._geometry(known) | found
        return found | self._probes(known) | self._missing(known) if self.domain.tasks else found

    def _geometry(self, known: "Known") -> dict[str, np.ndarray]:
        patient, k = self.domain.patient, self.domain.training.get("subspace_dim", 20)
        z_a, z_b = known.encode(self.domain.earlier), known.encode(self.domain.later)
        report = geometry_report(z_a, z_b, k=k, groups=torch.from_numpy(patient))
        found = {key: np.array([value]) for key, value in report.items()}
        for key, drawn in geometry_replicates(z_a, z_b, patient, int(report["k"])).items():
            # Redrawn patients are fewer different ones, which by itself lowers the rank and raises the other two.
            found[key] = np.append(found[key], drawn * found[key] / max(drawn.mean(), 1e-300))
        last = np.append(np.diff(patient) != 0, True)
        owner = np.append(patient, patient[last])
        chain = np.argsort(owner, kind="stable")  # a patient's windows in order: those that are followed, and the last
        own = patient_subspaces(torch.cat([z_a, z_b[last]])[chain], torch.from_numpy(owner[chain]), PATIENT_K)
        for key in ("distance", "noise_floor"):
            found[f"patient_{key}"] = np.array([own.get(f"{key}_normalized", np.nan)])
        return {f"geometry {key}": values for key, values in found.items()}

    def _probes(self, known: "Known") -> dict[str, np.ndarray]:
        found = {}
        for name, result in self.evaluator.evaluate(known).items():
            for metric, estimate in result.metrics.items():
                found[f"{name} {metric}"] = np.append(estimate.value, result.replicates[metric])
        for shots, estimate in self.few.evaluate(known)[self.primary.name].shots.items():
            found[f"{shots} shots"] = np.array([estimate.value, estimate.low, estimate.high])
        return found

    def _missing(self, known: "Known") -> dict[str, np.ndarray]:
        rows, found = self.evaluator.rows[self.primary.name], {}
        whole = np.flatnonzero(rows.split < 2)
        order = np.append(whole, self.damaged)
        for share, texts in self.missing.items():
            z = known.encode([rows.texts[i] for i in whole] + texts).numpy()
            result = probe(
                z, rows.y[order], rows.patient[order], rows.split[order], self.primary.kind, bootstraps=BOOTSTRAPS
            )
            found[f"missing {share:.0%}"] = np.append(result.metrics["auroc"].value, result.replicates["auroc"])
        return found


class Known:
    """An encoder whose embeddings are known."""

    def __init__(self, measures: Measures, z: np.ndarray):
        self.measures, self.z = measures, torch.from_numpy(z)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Look them up."""
        return self.z[self.measures.rows(texts)]


def geometry_replicates(z_a: Tensor, z_b: Tensor, patient: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """Effective rank and condition of the earlier side and normalised subspace distance, centred, for redrawn patients."""
    weights = torch.from_numpy(PatientWeights.of(patient, GEOMETRY_BOOTSTRAPS)[:]).double()
    count = weights.sum(1)[:, None]
    spectra, bases = [], []
    for z in (z_a, z_b):
        z = (z - z.mean(0)).double()
        mean = weights @ z / count
        second = torch.stack([(z * row[:, None]).mT @ z for row in weights]) / count[:, :, None]
        values, vectors = torch.linalg.eigh(second - mean[:, :, None] * mean[:, None])
        spectra.append(values.clamp(min=0))
        bases.append(vectors[:, :, z.shape[1] - k :])
    top = spectra[0][:, -1:]
    resolved = spectra[0].where(spectra[0] > CONDITION_FLOOR * top, top)
    found = {
        "effective_rank_centered": np.array([effective_rank_of_spectrum(values) for values in spectra[0]]),
        "condition_resolved_centered": (top[:, 0] / resolved.min(1).values.clamp(min=1e-300)).numpy(),
    }
    if k:
        distances = 1 - (bases[0].mT @ bases[1]).square().sum((1, 2)) / k
        found["subspace_distance_normalized_centered"] = distances.numpy()
    return found
