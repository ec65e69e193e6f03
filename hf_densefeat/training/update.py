"""One optimizer update: its plan, the replay of its forwards, and the language-modelling loss of its micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from hf_densefeat.objective.batch_loss import BatchLoss
from hf_densefeat.objective.distributed import mean_over_ranks, sum_over_ranks
from hf_densefeat.objective.moments import PairGradient, PairMoments
from hf_densefeat.objective.objective import DenseObjective
from hf_densefeat.training.forward import Forward

logger = logging.getLogger(__name__)

MAXIMUM_SKIPPED = 50  # in a row; the loss scale of float16 may need some


class Update:
    """One optimizer update: its plan, which is made before the first backward, and sums for the log.

    Attributes:
        micro_batches: how many there are on this rank.
        tokens: predicted tokens of the whole update, on all ranks; None until the update is planned.
        stops: how many ranks were told to stop; the collective of the update counts them too.
        terms: the values of the objective at the global moments.
        gradient: its gradient there, which `pullback` takes to the rows of a micro-batch.
        random_states: from which the forward of each micro-batch is replayed; empty where there is one forward.
        expected: embeddings of the first forwards, where the replay is to be checked.
        kept: forwards with their graphs, first micro-batch first, which need no replay.
        sums: name to sum over micro-batches.
    """

    def __init__(self, micro_batches: int, *, told_to_stop: bool = False):
        self.micro_batches, self.told_to_stop = micro_batches, told_to_stop
        self.tokens: Tensor | None = None
        self.stops: Tensor | None = None
        self.terms: dict[str, Tensor] = {}
        self.gradient: PairGradient | None = None
        self.random_states: list[RandomState] = []
        self.expected: list[Tensor] = []
        self.kept: list[Forward] = []
        self.sums: dict[str, Tensor] = {}

    def counts(self, tokens: Tensor) -> Tensor:
        """(2,) what all ranks add up: predicted tokens, and 1 where this rank was told to stop."""
        return torch.stack([tokens, torch.full_like(tokens, int(self.told_to_stop))])

    @torch.no_grad()
    def plan(self, objective: DenseObjective | BatchLoss, pair: PairMoments, tokens: Tensor) -> None:
        """One all-reduce, then the terms and their gradient, the same on every rank.

        Args:
            objective: a `BatchLoss` is not planned: it has its own graph.
            pair: moments of this rank's micro-batches.
            tokens: predicted tokens of this rank's micro-batches, a number.
        """
        counts = self.counts(tokens)
        if not isinstance(objective, BatchLoss):
            pair, counts = sum_over_ranks(pair, counts)
        self.tokens, self.stops = counts
        if isinstance(objective, BatchLoss):
            return
        self.terms, self.gradient = objective.gradient(pair)
        for name, value in (self.terms | objective.diagnostics).items():
            self.add(name, value)

    def moments_pass(
        self,
        micro_batches: Iterable[dict],
        forward: Callable[[dict], Forward],
        objective: DenseObjective,
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

    def dense_share(self, objective: DenseObjective | BatchLoss, z_a: Tensor, z_b: Tensor, ranks: int) -> Tensor:
        """This micro-batch's share: the value of the terms, and their gradient by the rows at the global moments."""
        if isinstance(objective, BatchLoss):
            values = objective(z_a, z_b)
            for name, value in values.items():
                self.add(name, value)
            return values["loss"]
        if self.gradient is None:
            raise RuntimeError("The update has no plan yet: call plan or moments_pass first.")
        gradients = self.gradient.pullback(z_a, z_b)
        # linear in the rows: its gradient is exact, and its own value is replaced by that of the terms
        surrogate = sum((g * z).sum() for g, z in zip(gradients, (z_a, z_b), strict=True)) * ranks
        value = self.terms["loss"] / self.micro_batches
        return surrogate + (value - surrogate).detach()

    def add(self, name: str, value: Tensor) -> None:
        """Sum over micro-batches, for the log, on the device and without waiting for it."""
        self.sums[name] = self.sums.get(name, 0) + value.detach().float()


@torch.no_grad()
def moments_of(first: Forward, objective: DenseObjective | BatchLoss, shift: Tensor | None = None) -> PairMoments:
    """Moments of a micro-batch, about `shift`, or about the objective's shift, or about the mean over all ranks."""
    if shift is None:
        shift = objective.shift if objective.shift is not None else mean_over_ranks(first.rows())
    return PairMoments.of(first.z_a.detach(), first.z_b.detach(), shift, cross=objective.needs_cross_moment)


class UpdateLog:
    """Means of what updates are logged with, and the count of updates that were skipped.

    Attributes:
        skipped: updates whose gradient was not finite, since the run began; checkpoints keep it.
    """

    def __init__(self):
        self.skipped = self._in_a_row = self._updates = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, update: Update) -> None:
        """Count an update that was made."""
        for name, value in update.sums.items():
            self._sums[name] = self._sums.get(name, 0) + value
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

    def means(self, reduce: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, float]:
        """Means over the updates since the last call, without those that were skipped; {} where there was none.

        Args:
            reduce: the mean over ranks of each number.
        """
        # all ranks come here at the same update, so that the collective below is in step
        sums, updates = self._sums, self._updates
        self._sums, self._updates = {}, 0
        if not updates:
            return {}
        sums = reduce(sums)
        tokens, slots = sums.pop("tokens"), sums.pop("slots")
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


def add_parameters(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    """Train these along with the model, without weight decay."""
    if parameters:
        optimizer.add_param_group({"params": parameters, "weight_decay": 0.0})

        def zero(*_) -> None:
            for parameter in parameters:  # the Trainer zeroes the gradients of the model alone
                parameter.grad = None

        optimizer.register_step_post_hook(zero)


def check_replay(expected: Tensor, z: Tensor) -> None:
    """Warn where the second forward of a micro-batch gave other embeddings (n, d) than the moments pass."""
    if (expected - z).norm() > 1e-2 * (expected - expected.mean(0)).norm():
        logger.warning(
            "The replayed forward differs from the first: dropout was not reproduced, and the dense gradient is that of "
            "another dropout mask. Set the model's dropout to 0 for exact accumulation."
        )
