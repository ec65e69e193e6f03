"""A small encoder, its notes and synthetic features, for the tests of evaluation."""

import datasets
import numpy as np
import torch
from sklearn import metrics

from hf_densefeat.evaluation.tasks import ProbeTask


class LetterCounts(torch.nn.Module):
    """An encoder of the plainest kind: how often each letter occurs, times a weight. Counts its calls."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((26,), scale))
        self.seen = []

    def encode(self, texts, batch_size=32):
        self.seen.append(list(texts))
        return torch.tensor([[text.count(chr(97 + i)) for i in range(26)] for text in texts]) * self.scale.detach()


def notes(patients=120, each=3, seed=0):
    """Notes of random letters; `sick` shows in the letter x, `grade` and `age` in the first four letters."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(3, size=(patients * each, 26))
    sick = rng.random(len(counts)) < 0.4
    counts[sick, 23] += 12
    texts = ["".join(chr(97 + i) * n for i, n in enumerate(row)) + " " for row in counts]
    score = counts[:, :4] @ np.array([1.0, -1.0, 0.5, 2.0])
    return datasets.Dataset.from_dict(
        {
            "patient_id": [f"p{i // each}" for i in range(len(texts))],
            "text": texts,
            "sick": sick.tolist(),
            "grade": np.digitize(score, np.quantile(score, [0.33, 0.66])).tolist(),
            "age": (40 + 5 * score).tolist(),
            "coin": rng.integers(0, 2, len(texts)).tolist(),
        }
    )


TASKS = [
    ("sick", "binary"),
    ("grade", "multiclass"),
    ("age", "regression"),
    ("grade", "clustering"),
]


def tasks(table):
    return [ProbeTask(f"{label}_{kind}", table, label, kind) for label, kind in TASKS]


def features(n, d, classes, seed=0):
    """Embeddings with a falling spectrum and a common mean, labels of a noisy linear rule."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    z = (rng.normal(size=(n, d)) * np.linspace(3, 0.1, d)) @ turn + rng.normal(size=d)
    logits = (z - z.mean(0)) @ rng.normal(size=(d, classes))
    return z.astype(np.float32), (1.5 * logits / logits.std() + rng.gumbel(size=logits.shape)).argmax(1)


def thirds(n):
    return np.repeat([0, 1, 2], [n - 2 * (n // 4), n // 4, n // 4])


def area(y, p):
    """AUROC of probabilities by scikit-learn."""
    return metrics.roc_auc_score(y, p[:, 1]) if p.shape[1] == 2 else metrics.roc_auc_score(y, p, multi_class="ovr")
