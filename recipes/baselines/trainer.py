"""The supervised reference: a linear classifier on the embeddings, on the same trainer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from hf_densefeat import BatchLoss
from hf_densefeat.training.trainer import DenseTrainer


class Classifier(nn.Module):
    """Cross-entropy of a linear head on the rows of both sides, earlier notes first.

    Attributes:
        classes: of the 2N rows of the next batch, -1 for none, which do not count; None for a loss of 0.
    """

    def __init__(self, width: int, classes: int, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # the dropout of a run does not depend on whether it has a head
            torch.manual_seed(seed)
            self.head = nn.Linear(width, classes)
        self.classes: Tensor | None = None

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Mean over the rows that have a class; 0 where none has."""
        if self.classes is None:
            return z_a.new_zeros(())
        known = self.classes >= 0
        logits = self.head(torch.cat([z_a, z_b])[known])
        return F.cross_entropy(logits, self.classes[known], reduction="sum") / known.sum().clamp(min=1)


class SupervisedTrainer(DenseTrainer):
    """Cross-entropy of a linear head on the embeddings of both notes of each pair; unlabelled notes do not count.

    Args:
        model: the model itself, not its name.
        args: as for `DenseTrainer`.
        labels: class 0 … classes - 1 of every row that the pairs index (all notes, in order), -1 for none.
        classes: number of classes.
        kwargs: as for `DenseTrainer`, except `objective`.

    Raises:
        ValueError: for gradient accumulation and several ranks, and if the labels do not fit the notes or the classes.
    """

    def __init__(self, model, args, *, labels: Sequence[int] | np.ndarray, classes: int, **kwargs):
        self.classifier = Classifier(model.embedding_dimension, classes, args.seed)
        super().__init__(model, args, objective=BatchLoss(self.classifier, name="pair_loss"), **kwargs)
        labels, rows = np.asarray(labels), self.train_dataset.pairs.num_notes
        if len(labels) != rows or labels.min() < -1 or labels.max() >= classes:
            raise ValueError(
                f"Expected {rows:,} labels between -1 and {classes - 1}, one a note, but got {len(labels):,} between "
                f"{labels.min()} and {labels.max()}."
            )
        self.train_dataset = _LabelledPairs(self.train_dataset, labels)
        self.data_collator = _LabelledCollator(self.data_collator)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Take the classes out of the batch first: the model does not know them."""
        self.classifier.classes = inputs.pop("classes", None)
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.classifier.classes = None


class _LabelledPairs(Dataset):
    """Pairs with the classes of their two notes."""

    def __init__(self, dataset, labels: np.ndarray):
        self.dataset, self.labels = dataset, labels
        self.pairs, self.lengths = dataset.pairs, dataset.lengths

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, items) -> list[dict]:
        index = [item[0] if isinstance(item, tuple) else item for item in items]
        earlier, later = self.labels[self.pairs.earlier[index]], self.labels[self.pairs.later[index]]
        pairs = self.dataset.__getitems__(items)
        return [pair | {"classes": both} for pair, *both in zip(pairs, earlier, later, strict=True)]


class _LabelledCollator:
    """The batch, and the classes of its rows, earlier notes first."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, pairs: list[dict]) -> dict[str, Tensor]:
        classes = [pair.pop("classes") for pair in pairs]
        batch = self.collator(pairs)
        batch["classes"] = torch.tensor(np.array(classes).reshape(-1, 2).T.ravel())
        return batch
