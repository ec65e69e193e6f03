"""Losses of a whole batch that are no functions of moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_densefeat.objective.anchor import Rows
from hf_densefeat.objective.base import Objective, check_name, checked_value
from hf_densefeat.objective.moments import PairMoments
from hf_densefeat.objective.precision import full_precision


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
