"""One optimizer update: its plan, the replay of its forwards, and the language-modelling loss of its micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from hf_densefeat.objective.base import Objective
from hf_densefeat.objective.distributed import mean_over_ranks, sum_over_ranks
from hf_densefeat.objective.moments import PairMoments
from hf_densefeat.training.forward import Forward

logger = logging.getLogger(__name__)

MAXIMUM_SKIPPED = 50  # in a row; the loss scale of float16 may need some


class Update:
    """One optimizer update: its plan, which is made before the first backward, and sums for the log.

    Attributes:
        micro_batches: how many there are on this rank.
        tokens: predicted tokens of the whole update, on all ranks; None until the update is planned.
        stops: how many ranks were told to stop; the collective of the update counts them too.
        random_states: from which the forward of each micro-batch is replayed; empty where there is one forward.
        expected: embeddings of the first forwards, where the replay is to be checked.
        kept: forwards with their graphs, first micro-batch first, which need no replay.
        sums: name to sum over micro-batches.
        slots: positions that were computed here, and how many of them were tokens.
    """

    def __init__(self, micro_batches: int, *, told_to_stop: bool = False):
        self.micro_batches, self.told_to_stop = micro_batches, told_to_stop
        self.tokens: Tensor | None = None
        self.stops: Tensor | None = None
        self.random_states: list[RandomState] = []
        self.expected: list[Tensor] = []
        self.kept: list[Forward] = []
        self.sums: dict[str, Tensor] = {}
        self.slots: Tensor | float = 0.0

    def counts(self, tokens: Tensor) -> Tensor:
        """(2,) what all ranks add up: predicted tokens, and 1 where this rank was told to stop."""
        return torch.stack([tokens, torch.full_like(tokens, int(self.told_to_stop))])

    @torch.no_grad()
    def plan(self, objective: Objective, pair: PairMoments, tokens: Tensor) -> None:
        """One all-reduce, then the plan of the objective, the same on every rank.

        Args:
            objective: that which trains.
            pair: moments of this rank's micro-batches.
            tokens: predicted tokens of this rank's micro-batches, a number.
        """
        pair, (self.tokens, self.stops) = sum_over_ranks(pair, self.counts(tokens))
        self.add(objective.plan(pair))

    def moments_pass(
        self,
        micro_batches: Iterable[dict],
        forward: Callable[[dict], Forward],
        objective: Objective,
        *,
        keep_graphs: int = 0,
        keep_embeddings: bool = False,
    ) -> None:
        """Plan from a forward of every micro-batch, before the first backward.

        The first `keep_graphs` forwards keep their graphs, for their backward. The others run without gradient, and the
        random state from which each is to be replayed is kept.

        Args:
            micro_batches: prepared, on the device.
            forward: of one micro-batch.
            objective: as for `plan`.
            keep_graphs: how many graphs there is memory for.
            keep_embeddings: keep the embeddings of the others, for `check_replay`.
        """
        totals: PairMoments | None = None
        tokens = []
        for place, inputs in enumerate(micro_batches):
            graph = place < keep_graphs
            if not graph:
                self.random_states.append(RandomState(inputs))
            with torch.set_grad_enabled(graph):
                first = forward(inputs)
            if graph:
                self.kept.append(first)
            elif keep_embeddings:
                self.expected.append(first.rows())
            # all micro-batches share one shift, so that their moments add up
            pair = moments_of(first, objective, None if totals is None else totals.a.shift)
            totals = pair if totals is None else totals + pair
            tokens.append(inputs["labels"].ne(-100).sum())
        if totals is not None:
            self.plan(objective, totals, torch.stack(tokens).sum())

    def dense_share(self, objective: Objective, made: Forward, ranks: int) -> Tensor:
        """This micro-batch's share of the objective, which is logged."""
        share, values = objective.share(made.z_a, made.z_b, start=made.start, parts=self.micro_batches, ranks=ranks)
        self.add(values)
        return share

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Sum over micro-batches, for the log, on the device and without waiting for it."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()

    def add_slots(self, attention_mask: Tensor, slots: int) -> None:
        """Count the tokens of a micro-batch, and the positions that were computed for them."""
        tokens = attention_mask.sum()
        self.slots = self.slots + torch.stack([torch.full_like(tokens, slots), tokens]).float()


@torch.no_grad()
def moments_of(first: Forward, objective: Objective, shift: Tensor | None = None) -> PairMoments:
    """Moments of a micro-batch, about `shift`, or about the objective's shift, or about the mean over all ranks."""
    if shift is None:
        shift = objective.shift if objective.shift is not None else mean_over_ranks(first.rows())
    options: dict[str, Any] = {"cross": objective.needs_cross_moment, "start": first.start}
    return PairMoments.of(first.z_a.detach(), first.z_b.detach(), shift, **options)


class UpdateLog:
    """Means of what updates are logged with, and the count of updates that were skipped.

    Attributes:
        skipped: updates whose gradient was not finite, since the run began; checkpoints keep it.
    """

    def __init__(self):
        self.skipped = self._in_a_row = self._updates = 0
        self._sums: dict[str, Tensor] = {}
        self._slots: Tensor | float = 0.0

    def add(self, update: Update) -> None:
        """Count an update that was made."""
        for name, value in update.sums.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._slots = self._slots + update.slots
        self._updates += 1
        self._in_a_row = 0

    def skip(self, step: int) -> None:
        """Count one that was not; RuntimeError for the 50th in a row."""
        self.skipped += 1
        self._in_a_row += 1
        # float16's loss scale needs some; more is a run that trains nothing
        if self._in_a_row == MAXIMUM_SKIPPED:
            raise RuntimeError(
                f"{MAXIMUM_SKIPPED} updates in a row had a gradient that is not finite, up to step {step}: nothing is being "
                "trained. Lower the learning rate, try float32 or bf16, and look for NaN in the model's weights. "
                "Checkpoints are in output_dir as they were saved."
            )
        logger.warning("Step %d: non-finite gradient, update skipped.", step)

    def means(self, reduce: Callable[[Any], Any]) -> dict[str, float]:
        """Means over the updates since the last call, without those that were skipped; {} where there was none.

        Args:
            reduce: the mean over ranks of each tensor in a nest of containers.
        """
        # all ranks come here at the same update, so that the collective below is in step
        sums, slots, updates = self._sums, self._slots, self._updates
        self._sums, self._slots, self._updates = {}, 0.0, 0
        if not updates:
            return {}
        sums, (slots, tokens) = reduce((sums, slots))
        means = {name: value.item() / updates for name, value in sums.items() if name != "loss"}
        return means | {"padding_waste": 1 - (tokens / slots).item()}


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


def check_replay(expected: Tensor, z: Tensor) -> None:
    """Warn where the second forward of a micro-batch gave other embeddings (n, d) than the moments pass."""
    if (expected - z).norm() > 1e-2 * (expected - expected.mean(0)).norm():
        logger.warning(
            "The replayed forward differs from the first: dropout was not reproduced, and the dense gradient is that of "
            "another dropout mask. Set the model's dropout to 0 for exact accumulation."
        )
