"""What a trainer asks of an objective, and the one of losses that are no functions of moments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_densefeat.objective.anchor import Rows
from hf_densefeat.objective.moments import PairMoments
from hf_densefeat.objective.precision import full_precision

# names of other numbers in the log
RESERVED = {"loss", "mlm_loss", "trace", "gap", "subspace_rank", "effective_rank", "padding_waste", "skipped_updates"}
RESERVED |= {"grad_norm", "learning_rate", "epoch", "mlm_weight"}


class Objective(ABC):
    """A loss of the embeddings of pairs, by update: plan it from the moments, then take each micro-batch's share."""

    terms: Mapping[str, tuple[float, Callable[..., Any]]]  # name to weight and function
    adds_up: bool = True  # over micro-batches and ranks
    subspace_dim: int | None = None  # k, or None for an objective without subspaces
    window: float | str | None = None  # averaging window of the running covariances, in samples
    center: bool = True  # whether covariances are taken about the mean
    shift: Tensor | None = None  # near the mean, the same on all ranks: about it moments lose no digits; None at first
    settings: Mapping[str, Any] = {}  # what a model card says beside terms and weights
    module: nn.Module = nn.Module()  # trained along with the model, and put into training or evaluation mode

    @property
    def needs_cross_moment(self) -> bool:
        """Whether a term asks for the cross moment: `PairMoments.of(..., cross=True)`."""
        return any(getattr(function, "needs_cross_moment", False) for _, function in self.terms.values())

    @property
    def needs_start(self) -> bool:
        """Whether a term asks for the rows of the frozen start: `PairMoments.of(..., start=rows)`."""
        return any(getattr(function, "needs_start", False) for _, function in self.terms.values())

    @property
    def covariance(self) -> Tensor | None:
        """Mean of the covariances of both sides at the last update (d, d), detached; None if there is none."""
        return None

    def plan(self, pair: PairMoments) -> Mapping[str, Tensor]:
        """Prepare the shares of an update from its global moments of `seen` rows; returns numbers to log."""
        return {}

    @abstractmethod
    def share(
        self, z_a: Tensor, z_b: Tensor, *, start: Rows | None = None, parts: int = 1, ranks: int = 1
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """A micro-batch's share of the loss, and numbers to log; `start` are the rows of the frozen start, if needed.

        Shares add up over the `parts` of a rank and average over `ranks`, in value and in gradient.
        """

    @abstractmethod
    def evaluate(self, pair: PairMoments, batches: Sequence[Mapping[str, Tensor]] = ()) -> Mapping[str, Tensor]:
        """Terms and `loss` of an evaluation set, of its moments and of what `of_batch` gave; leaves the state as it is."""

    def of_batch(self, z_a: Tensor, z_b: Tensor) -> Mapping[str, Tensor]:
        """What evaluation needs of the rows of a batch beside their moments."""
        return {}

    def seen(self, z: Tensor) -> Tensor:
        """What the terms see of embeddings (n, d), and moments are taken of: the embeddings, unless an expander is given."""
        return z

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer trains along with the model."""
        return list(self.module.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs, by name."""
        return dict(self.module.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.module.load_state_dict(state)


class BatchLoss(Objective):
    """A loss of a whole batch that is no function of moments, in the place of a `DenseObjective`.

    It does not add up over parts of a batch, so the trainer refuses it with gradient accumulation or several ranks, and
    evaluation reports its mean over the evaluation batches.

    Args:
        function: of (z_a, z_b), both (N, d) in float32 or wider; returns a scalar, or a dict of scalars whose sum (or
            whose entry `loss`) is trained. An `nn.Module` is trained along: its parameters are in the gradient norm, in
            the optimizer without weight decay, and in the state; evaluation sets it to evaluation mode.
        name: under which a scalar is logged.
    """

    adds_up = False

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor | Mapping[str, Tensor]], *, name: str = "batch_loss"
    ):
        if not callable(function):
            raise ValueError(f"Expected a function of (z_a, z_b) but got {type(function).__name__}.")
        check_name(name)
        self.function, self.name = function, name
        self.terms = {name: (1.0, function)}
        self.module = function if isinstance(function, nn.Module) else nn.Module()

    def __call__(self, z_a: Tensor, z_b: Tensor) -> dict[str, Tensor]:
        """The values by name, and `loss`."""
        with torch.autocast(z_a.device.type, enabled=False):
            result = self.function(full_precision(z_a), full_precision(z_b))
            values = dict(result) if isinstance(result, Mapping) else {self.name: result}
            loss = values.pop("loss", None)
            for name, value in values.items():
                check_name(name)
                checked_value(name, value)
            return values | {"loss": sum(values.values(), z_a.new_zeros(())) if loss is None else loss}

    of_batch = __call__

    def share(
        self, z_a: Tensor, z_b: Tensor, *, start: Rows | None = None, parts: int = 1, ranks: int = 1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the batch, which is the whole update."""
        values = self(z_a, z_b)
        return values["loss"], values

    def evaluate(self, pair: PairMoments, batches: Sequence[Mapping[str, Tensor]] = ()) -> dict[str, Tensor]:
        """Means over the batches."""
        return {name: torch.stack([values[name] for values in batches]).mean() for name in batches[0]}


def check_name(name: str) -> None:
    """ValueError for a term with the name of another number of the log."""
    if name in RESERVED:
        raise ValueError(f"A term cannot be called {name!r}: the log has another number of that name. Rename it.")


def checked_value(name: str, value: Any) -> Tensor:
    """The value of a term; ValueError if it is no scalar tensor."""
    if not isinstance(value, Tensor) or value.ndim:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"Expected term {name!r} to return a scalar tensor but got {found}.")
    return value
