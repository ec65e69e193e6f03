"""One optimizer update: its plan, the replay of its forwards, and the language-modelling loss of its micro-batches."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from hf_densefeat.objective.moments import PairGradient

logger = logging.getLogger(__name__)


class Update:
    """What is known of an optimizer update: the plan before its first backward, and sums for the log."""

    def __init__(self, micro_batches: int):
        self.micro_batches = micro_batches
        self.tokens: Tensor | None = None
        self.terms: dict[str, Tensor] = {}
        self.gradient: PairGradient | None = None
        self.random_states: list[RandomState] = []
        self.expected: list[Tensor] = []
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Sum over micro-batches, for the log, on the device and without waiting for it."""
        self.sums[name] = self.sums.get(name, 0) + value.detach().float()


class RandomState:
    """The random state of the CPU and of the devices on which the tensors of a batch lie, to replay a forward."""

    def __init__(self, inputs: dict):
        self.cpu = torch.get_rng_state()
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        self.devices, self.states = get_device_states(*tensors)
        self.kind = next((tensor.device.type for tensor in tensors if tensor.device.type != "cpu"), None)

    def restore(self) -> None:
        """The next forward draws what the one after this state was taken drew."""
        torch.set_rng_state(self.cpu)
        if self.kind is not None:
            set_device_states(self.devices, self.states, device_type=self.kind)


def add_parameters(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    """Train these along with the model, without weight decay."""
    if parameters:
        optimizer.add_param_group({"params": parameters, "weight_decay": 0.0})

        def zero(*_) -> None:
            for parameter in parameters:  # the Trainer zeroes the gradients of the model alone
                parameter.grad = None

        optimizer.register_step_post_hook(zero)


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over the predicted tokens, in float32 or wider. Labels stand where their logits are, for decoders too.

    Not the model's own loss: some classes ignore the number of tokens of the update, and a batch without any is NaN.
    """
    predicted = labels.ne(-100)
    logits = logits[predicted]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels[predicted], reduction="sum")


def check_replay(expected: Tensor, z: Tensor) -> None:
    """Warn where the second forward of a micro-batch gave other embeddings (n, d) than the moments pass."""
    if (expected - z).norm() > 1e-2 * (expected - expected.mean(0)).norm():
        logger.warning(
            "The replayed forward differs from the first: dropout was not reproduced, and the dense gradient is that of "
            "another dropout mask. Set the model's dropout to 0 for exact accumulation."
        )
