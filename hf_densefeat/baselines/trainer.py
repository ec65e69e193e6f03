"""What a user might train instead: losses on pairs of embeddings, each as its paper has it, on the same trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from hf_densefeat.training.trainer import DenseTrainer, add_parameters

# ---- Losses of Z_a, Z_b (n, d), row i of b after row i of a, or another view of it ---------------------------------


def info_nce(z_a: Tensor, z_b: Tensor, temperature: float = 0.05) -> Tensor:
    """Contrastive loss: row i of one side is to find row i of the other among all n by its cosine.

    Mean over rows and both directions of -log softmax_j(cos(a_i, b_j) / temperature) at j = i: equation 1 of SimCSE
    (Gao et al., 2021), whose temperature is 0.05, made symmetric as in CLIP. With both sides the same notes under two
    dropout masks it is unsupervised SimCSE. In [0, log n + 2 / temperature]; 0 for one pair. Rows of zeros have cosine 0.
    """
    logits = F.normalize(z_a, dim=1) @ F.normalize(z_b, dim=1).mT / temperature
    target = torch.arange(len(z_a), device=z_a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target)) / 2


def vicreg(
    z_a: Tensor, z_b: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> Tensor:
    """VICReg (Bardes et al., 2022): invariance s + variance v + covariance c, weights 25, 25 and 1.

    s = mean squared difference; v = mean over columns and sides of relu(1 - sqrt(var + 1e-4)); c = sum over sides of the
    squared off-diagonal covariances, divided by d. Variances divide by n - 1, as published; one pair has variance 0.
    """
    similar = F.mse_loss(z_a, z_b)
    spread, redundant = 0.0, 0.0
    for z in (z_a, z_b):
        rows = z - z.mean(0)
        cov = rows.mT @ rows / max(len(z) - 1, 1)
        spread = spread + F.relu(1 - (cov.diagonal() + 1e-4).sqrt()).mean() / 2
        redundant = redundant + _off_diagonal(cov).square().sum() / z.shape[1]
    return invariance * similar + variance * spread + covariance * redundant


def barlow_twins(z_a: Tensor, z_b: Tensor, redundancy: float = 0.0051) -> Tensor:
    """Barlow Twins (Zbontar et al., 2021): sum_i (1 - C_ii)^2 + redundancy sum_{i != j} C_ij^2.

    C is the cross-correlation of both sides, columns standardised as by a BatchNorm (variance / n, + 1e-5). The weight
    of the off-diagonal terms is that of the authors' code, 0.0051; the paper rounds it to 0.005. A constant column reads 1.
    """
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z_a, z_b))
    correlation = a.mT @ b / len(a)
    return (1 - correlation.diagonal()).square().sum() + redundancy * _off_diagonal(correlation).square().sum()


def von_neumann_entropy(z: Tensor) -> Tensor:
    """-sum_i l_i log l_i of the eigenvalues of Z^T Z / n, rows of Z scaled to length 1 (VNE; Kim et al., 2023).

    In [0, log min(n, d)]: the log of the effective rank of the normalised, uncentred rows. Eigenvalues at the level of
    rounding count as 0, without gradient, which the authors' code leaves NaN. All zeros: 0.
    """
    rows = F.normalize(z, dim=1)
    gram = (rows @ rows.mT if len(z) < z.shape[1] else rows.mT @ rows) / len(z)
    values = torch.linalg.eigvalsh(gram)
    resolved = values > len(gram) * torch.finfo(values.dtype).eps
    return torch.special.entr(torch.where(resolved, values, 1)).sum()


def i_vne(z_a: Tensor, z_b: Tensor, entropy: float = 1.0) -> Tensor:
    """I-VNE+ (Kim et al., 2023): -(log(n) mean cosine of the pairs + entropy VNE), VNE the mean over both sides.

    The weights are those of the authors' code: 4.16 = log 64 on the cosine for batches of 64, and 1 on the entropy.
    """
    cosine = F.cosine_similarity(z_a, z_b).mean()
    return -(math.log(len(z_a)) * cosine + entropy * (von_neumann_entropy(z_a) + von_neumann_entropy(z_b)) / 2)


def sigreg(z: Tensor, directions: Tensor, knots: int = 17, most: float = 3.0) -> Tensor:
    """SIGReg (Balestriero and LeCun, 2025): the Epps-Pulley statistic of Z's projections, mean over the directions.

    For x = Z u: n times the integral over t in [-most, most] of |mean exp(itx) - exp(-t^2/2)|^2 exp(-t^2/2) dt, by the
    trapezoidal rule on `knots` points of [0, most], doubled. 0 where every projection is standard normal.

    Args:
        z: embeddings (n, d).
        directions: unit columns (d, m), drawn anew for each batch; see `lejepa`.
        knots: of the quadrature.
        most: end of the integral.
    """
    t = torch.linspace(0, most, knots, device=z.device, dtype=z.dtype)
    normal = torch.exp(-t.square() / 2)
    weights = torch.full_like(t, 2 * most / (knots - 1))
    weights[0] = weights[-1] = most / (knots - 1)
    angles = (z @ directions).unsqueeze(-1) * t
    error = (angles.cos().mean(0) - normal).square() + angles.sin().mean(0).square()
    return len(z) * (error @ (weights * normal)).mean()


def lejepa(z_a: Tensor, z_b: Tensor, weight: float = 0.02, directions: int = 256) -> Tensor:
    """LeJEPA of two views: (1 - weight) mean squared distance to the views' mean + weight SIGReg, mean over the views.

    Weight 0.02, 17 knots on [0, 3] and 256 fresh random directions are those of the authors' minimal implementation.
    """
    u = F.normalize(torch.randn(z_a.shape[1], directions, device=z_a.device, dtype=z_a.dtype), dim=0)
    prediction = ((z_a - z_b) / 2).square().mean()
    return (1 - weight) * prediction + weight * (sigreg(z_a, u) + sigreg(z_b, u)) / 2


def unshared_variance(z_a: Tensor, z_b: Tensor) -> Tensor:
    """1 - 2 tr C_ab / (tr Sigma_a + tr Sigma_b), all centred: the share of the variance that paired rows do not share.

    Unlike L_sub it sees which row follows which: 0 where z_b = z_a up to a shift, 1 for unrelated rows, at most 2. An
    experiment of ours, no paper's. Without variance it is 1, without gradient.
    """
    a, b = z_a - z_a.mean(0), z_b - z_b.mean(0)
    total = a.square().sum() + b.square().sum()
    varies = total > torch.finfo(total.dtype).eps ** 2 * (z_a.square().sum() + z_b.square().sum())
    return 1 - 2 * (a * b).sum() / torch.where(varies, total, torch.inf)


def _off_diagonal(square: Tensor) -> Tensor:
    return square - torch.diag(square.diagonal())


class Expanded(nn.Module):
    """A loss of a three-layer MLP of both sides, as VICReg, Barlow Twins, VNE and LeJEPA have it; probes see what is below.

    Linear, BatchNorm, ReLU twice, then Linear without bias; `PairLossTrainer` trains it along. Batches need two pairs.

    Args:
        loss: function of (z_a, z_b).
        width: d of the embedding.
        hidden: width of all three layers; the papers take four times that of the embedding.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], width: int, hidden: int | None = None):
        super().__init__()
        self.loss, hidden = loss, hidden or 4 * width
        layers = [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        layers += [nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        self.expander = nn.Sequential(*layers, nn.Linear(hidden, hidden, bias=False))

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of the expanded sides."""
        return self.loss(self.expander(z_a), self.expander(z_b))


# ---- After training, for nothing: z -> (z - mean) @ matrix ---------------------------------------------------------


@torch.no_grad()
def fit_whitening(z: Tensor, floor: float = 1e-7) -> tuple[Tensor, Tensor]:
    """Mean (d,) and matrix (d, d) after which these rows (N, d) have covariance I (Su et al., 2021), for `apply_affine`.

    ZCA, which moves the rows least. Directions with less than `floor` of the largest variance, which rounding of float32
    fills and a LayerNorm leaves empty, go to 0: the covariance is then a projector.
    """
    mean = z.double().mean(0)
    rows = z.double() - mean
    values, vectors = torch.linalg.eigh(rows.mT @ rows / len(z))
    kept = values > floor * values[-1].clamp(min=torch.finfo(torch.float64).tiny)
    scale = torch.where(kept, values, torch.inf).rsqrt()
    return mean, vectors * scale @ vectors.mT


@torch.no_grad()
def fit_all_but_the_top(z: Tensor, directions: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and matrix that removes the leading directions of these rows (N, d), for `apply_affine`.

    All-but-the-top (Mu and Viswanath, 2018): d/100 directions, rounded, one at least, unless `directions` says how many.
    """
    mean = z.double().mean(0)
    rows = z.double() - mean
    count = max(1, round(z.shape[1] / 100)) if directions is None else directions
    top = torch.linalg.eigh(rows.mT @ rows)[1][:, z.shape[1] - count :]
    return mean, torch.eye(z.shape[1], dtype=torch.float64) - top @ top.mT


def apply_affine(z: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    """(z - mean) @ matrix, in float64, back in the dtype of z."""
    return ((z.double() - mean) @ matrix).to(z.dtype)


# ---- The same trainer ---------------------------------------------------------------------------------------------


class PairLossTrainer(DenseTrainer):
    """`DenseTrainer` with loss = mlm_weight MLM + dense_weight pair_loss(Z_a, Z_b), all else the same.

    These losses are of a whole batch and do not add up over parts of it, so there is one micro-batch an update and one
    rank. Evaluation still reports the dense terms.

    Args:
        model, args, more: as for `DenseTrainer`.
        pair_loss: function of (z_a, z_b), both (pairs, d) in float32, or a module, whose parameters are trained along.
        kwargs: as for `DenseTrainer`.

    Raises:
        ValueError: for gradient accumulation, several ranks, and on resuming with a module that has parameters.
    """

    def __init__(self, model, args=None, *more, pair_loss: Callable[[Tensor, Tensor], Tensor], **kwargs):
        if args is not None and (args.gradient_accumulation_steps > 1 or args.world_size > 1):
            raise ValueError(
                "A pair loss is that of one whole batch, but gradient_accumulation_steps is "
                f"{args.gradient_accumulation_steps} and there are {args.world_size} ranks: its parts would not add up to "
                "it. Use one of each, and a larger per_device_train_batch_size."
            )
        super().__init__(model, args, *more, **kwargs)
        self.pair_loss = pair_loss.to(self.args.device) if isinstance(pair_loss, nn.Module) else pair_loss

    def create_optimizer(self, *args, **kwargs):
        """Also with the parameters of the loss."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if new and isinstance(self.pair_loss, nn.Module):
            add_parameters(optimizer, list(self.pair_loss.parameters()))
        return optimizer

    def _plan(self, update, pair, tokens) -> None:
        update.tokens = tokens[0]

    def _dense_term(self, update, z_a: Tensor, z_b: Tensor) -> Tensor:
        with torch.autocast(z_a.device.type, enabled=False):
            loss = self._pair_term(z_a.float(), z_b.float())
        update.add("pair_loss", loss)
        return loss

    def _pair_term(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return self.pair_loss(z_a, z_b)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None and isinstance(self.pair_loss, nn.Module) and list(self.pair_loss.parameters()):
            raise ValueError("The parameters of a pair loss are not in checkpoints: such a run cannot be resumed.")
        super()._load_optimizer_and_scheduler(checkpoint)


class SupervisedTrainer(PairLossTrainer):
    """Cross-entropy of a linear head on the embeddings of both notes of each pair; unlabelled notes do not count.

    Args:
        args: as for `DenseTrainer`.
        labels: class 0 … classes - 1 of every row that the pairs index (all notes, in order), -1 for none.
        classes: number of classes.
        kwargs: as for `DenseTrainer`.

    Raises:
        ValueError: as `PairLossTrainer`, and if the labels do not fit the notes or the classes.
    """

    def __init__(self, *args, labels: Sequence[int] | np.ndarray, classes: int, **kwargs):
        super().__init__(*args, pair_loss=nn.CrossEntropyLoss(), **kwargs)
        labels, rows = np.asarray(labels), self.train_dataset.pairs.notes
        if len(labels) != rows or labels.min() < -1 or labels.max() >= classes:
            raise ValueError(
                f"Expected {rows:,} labels between -1 and {classes - 1}, one a note, but got {len(labels):,} between "
                f"{labels.min()} and {labels.max()}."
            )
        with torch.random.fork_rng(devices=[]):  # the dropout of a run does not depend on whether it has a head
            torch.manual_seed(self.args.seed)
            self.pair_loss = nn.Linear(self.dense_model.config.hidden_size, classes).to(self.args.device)
        self.train_dataset = _LabelledPairs(self.train_dataset, labels)
        self.data_collator = _LabelledCollator(self.data_collator)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Take the classes out of the batch first: the model does not know them."""
        self._classes = inputs.pop("classes")
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _pair_term(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        known = self._classes >= 0
        logits = self.pair_loss(torch.cat([z_a, z_b])[known])
        return F.cross_entropy(logits, self._classes[known], reduction="sum") / known.sum().clamp(min=1)


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
