"""Losses of a whole batch that are no functions of moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_densefeat.objective.precision import full_precision


class BatchLoss:
    """A loss of a whole batch that is no function of moments, in the place of a `DenseObjective`.

    It does not add up over parts of a batch, so the trainer refuses it with gradient accumulation or several ranks, and
    evaluation reports its mean over the evaluation batches.

    Args:
        function: of (z_a, z_b), both (N, d) in float32 or wider; returns a scalar, or a dict of scalars whose sum (or
            whose entry `loss`) is trained. An `nn.Module` is trained along, and its parameters are in the state.
        name: under which a scalar is logged.
    """

    needs_cross_moment = False

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor | Mapping[str, Tensor]], *, name: str = "batch_loss"
    ):
        if not callable(function):
            raise ValueError(f"Expected a function of (z_a, z_b) but got {type(function).__name__}.")
        self.function, self.name = function, name
        self.shift: Tensor | None = None
        self.covariance: Tensor | None = None
        self.diagnostics: dict[str, Tensor] = {}

    def __call__(self, z_a: Tensor, z_b: Tensor) -> dict[str, Tensor]:
        """The values by name, and `loss`."""
        with torch.autocast(z_a.device.type, enabled=False):
            result = self.function(full_precision(z_a), full_precision(z_b))
            values = dict(result) if isinstance(result, Mapping) else {self.name: result}
            loss = values.pop("loss", None)
            values = {name: checked_value(name, value) for name, value in values.items()}
            return values | {"loss": sum(values.values(), z_a.new_zeros(())) if loss is None else loss}

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer trains along with the model."""
        return list(self.function.parameters()) if isinstance(self.function, nn.Module) else []

    def to(self, device: torch.device) -> None:
        """Move the module, if it is one."""
        if isinstance(self.function, nn.Module):
            self.function.to(device)

    def pure(self) -> BatchLoss:
        """Itself: it has no running state."""
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers of the module, if it is one."""
        return dict(self.function.state_dict()) if isinstance(self.function, nn.Module) else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        if isinstance(self.function, nn.Module):
            self.function.load_state_dict(state)


def checked_value(name: str, value: Any) -> Tensor:
    """The value of a term; ValueError if it is no scalar tensor."""
    if not isinstance(value, Tensor) or value.ndim:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"Expected term {name!r} to return a scalar tensor but got {found}.")
    return value
