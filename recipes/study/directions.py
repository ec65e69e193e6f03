"""What the variance of the embeddings is of: the share of it that lies between the classes of each label."""

import numpy as np
import torch
from torch import Tensor

from hf_densefeat.reporting.formats import markdown
from study.methods import Method
from study.runs import Study

LEADING = 10


def table_variance(study: Study, methods: dict[str, Method]) -> str:
    """A row a method, first seed: for each label the share of all variance, and of that along the ten leading directions.

    The share that unrelated classes would have is taken off: see `between_classes`.
    """
    rows = {
        name: found
        for name, found in study.measures.similarity.rows.items()
        if found.kind == "neighbours" and not name.startswith("validation ")
    }
    same = study.measures.similarity.rows.get("same disease")
    rows |= {"disease": same} if same else {}
    table = [["Method", *(f"{name}, {part}" for name in rows for part in ("all", f"leading {LEADING}"))]]
    for name, method in methods.items():
        if method.after:
            continue
        z = torch.from_numpy(study.embeddings(name, method, 0)[0]).double()
        cells = []
        for found in rows.values():
            centred = z[study.measures.rows(found.texts)]
            centred = centred - centred.mean(0)
            leading = torch.linalg.svd(centred, full_matrices=False)[2][:LEADING]
            cells += [between_classes(centred, found.y), between_classes(centred @ leading.mT, found.y)]
        table.append([method.title, *(f"{cell:.3f}" for cell in cells)])
    return markdown(table)


def between_classes(z: Tensor, y: np.ndarray) -> float:
    """Share of the variance of centred rows (N, d) that lies between the C classes of y (N,), adjusted for chance.

    With s = sum_c n_c |mean_c|^2 / sum_i |z_i|^2, whose expectation for unrelated classes is e = (C - 1) / (N - 1), it is
    (s - e) / (1 - e): epsilon squared of Kelley (1935). At most 1; about 0 for unrelated classes.
    """
    classes, code, count = np.unique(y, return_inverse=True, return_counts=True)
    means = torch.zeros(len(classes), z.shape[1], dtype=z.dtype).index_add_(0, torch.from_numpy(code), z)
    means /= torch.from_numpy(count).to(z.dtype)[:, None]
    share = (means.square().sum(1) @ torch.from_numpy(count).to(z.dtype) / z.square().sum()).item()
    chance = (len(classes) - 1) / (len(y) - 1)
    return (share - chance) / (1 - chance)
