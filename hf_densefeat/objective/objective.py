"""The dense-feature objective: L = L_spec + lambda_sub L_sub + lambda_orth L_orth (paper 4.2 to 4.5), and terms beside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_densefeat.objective.anchor import Rows
from hf_densefeat.objective.base import Objective, check_name, checked_value
from hf_densefeat.objective.closed_form import Pooled, paper_terms, pooled_of
from hf_densefeat.objective.extra_terms import EXTRA_TERMS
from hf_densefeat.objective.moments import PairGradient, PairMoments
from hf_densefeat.objective.running import averaged, gain_of, no_average
from hf_densefeat.objective.statistics import Average, Side, Statistics, Term
from hf_densefeat.objective.subspace import (
    Eigenspace,
    check_dimension,
    eigenspace,
    subspace_distance_squared,
    subspace_iteration,
    warn_if_unsupported,
)
from hf_densefeat.objective.terms import orthogonality, spectral_spreading

OVERSAMPLING = 32  # directions tracked beyond k: the gradient sees those that are left only as a mean
AVERAGED = ("covariance", "noise", "drift")  # of an `Average`, what is saved
EXPANDER = "expander."  # before its names in the state
COLD_ITERATIONS = 20  # power steps from a random basis, at the first call


def spectral_spreading_term(s: Statistics) -> Tensor:
    """L_spec of the rows of both sides; with `unbiased` the mean of the sides' estimates without the i = j terms."""
    if s.unbiased:
        return (s.a.purity + s.b.purity) / 2 - 1 / s.dimension
    return spectral_spreading(s.pooled, s.dimension, s.resolution.sum())


def subspace_consistency_term(s: Statistics) -> Tensor:
    """L_sub between the sides."""
    return subspace_distance_squared(
        s.a.covariance, s.b.covariance, s.a.eigenspace, s.b.eigenspace, s.subspace_dim, s.broadening
    )


def orthogonality_term(s: Statistics) -> Tensor:
    """L_orth of the rows of both sides in this update."""
    return orthogonality(*s.columns())


PAPER = {
    "spectral_spreading": spectral_spreading_term,
    "subspace_consistency": subspace_consistency_term,
    "orthogonality": orthogonality_term,
}


class DenseObjective(Objective):
    """L = L_spec + lambda_sub L_sub + lambda_orth L_orth on adjacent notes Z_a, Z_b (N, d), row i of b after row i of a.

    L_spec and L_orth are those of the whole batch, the 2N rows of both sides; L_sub compares the sides. With `center`,
    each side's own mean is subtracted first (L_orth is always centred; without `center`, by the mean of all 2N rows).

    Args:
        lambda_sub: weight of L_sub, which lies in [0, 2k].
        lambda_orth: weight of L_orth, which lies in [0, d (d - 1)].
        subspace_dim: k.
        window: None for the moments of the batch alone, or the averaging window, in samples, of the running covariances
            of which L_spec and L_sub are taken (paper 4.5); "auto" is d samples. See `running.py`.
        center: subtract the means; the paper's Sigma is uncentred.
        unbiased: leave the i = j terms out of L_spec (`Moments.noise_of_purity`), as the mean over the two sides,
            because adjacent notes are not independent; the value may then be below 0, and keeps a bias of order 1/N.
        broadening: eps of the projector's gradient in units of the mean eigenvalue; 0 is the exact gradient.
        power_iterations: None for exact eigenspaces, or the number of warm-started, filtered block power steps a call
            (`subspace_iteration`), for which no d x d eigendecomposition is made: k + 32 directions are tracked, the
            rest enters the gradient of L_sub as its mean eigenvalue. With 2 steps, 256 new rows of spectrum 1/i a call
            and window "auto", that gradient is within 7 % of the exact one at d = 384 and 5 % at 768. Flat spectra, which
            have no leading subspace, are tracked worse (1/sqrt(i): 24 %).
        terms: more terms, name -> (weight, function of `Statistics` that returns a scalar), or name -> weight for one of
            `EXTRA_TERMS`. One of the paper's three names replaces that term. A function with `needs_cross_moment = True`
            (`sees_pairing`) gets the cross covariance of the pairs. Values are unweighted under their names; `loss` is
            the sum of weight * value.
        expander: a module of rows (n, d) -> (n, D), such as `Expander`, whose output the terms see in the place of the
            embeddings. It is trained along, is a part of the state, and is not saved with the model. Its
            weights are to be the same on all ranks. Not with an anchor.

    `terms` holds all terms, the paper's three first. The state (running covariances, tracked bases) is float32 or wider
    and a function of the global moments alone, so the same on all ranks. After each call `diagnostics` holds the `trace`
    of Sigma, the eigenvalue `gap` at k in units of the mean eigenvalue, and the `subspace_rank`, at most k.

    Raises:
        ValueError: for an option out of range, and for a term whose name, weight or function cannot be one.
    """

    subspace_dim: int

    def __init__(
        self,
        *,
        lambda_sub: float = 1.0,
        lambda_orth: float = 1.0,
        subspace_dim: int = 20,
        window: float | str | None = None,
        center: bool = False,
        unbiased: bool = False,
        broadening: float = 1.0,
        power_iterations: int | None = None,
        terms: Mapping[str, Term | float] | None = None,
        expander: nn.Module | None = None,
    ):
        for name, value in (("lambda_sub", lambda_sub), ("lambda_orth", lambda_orth), ("broadening", broadening)):
            if not value >= 0:
                raise ValueError(f"Expected {name} >= 0 but got {value}.")
        if subspace_dim < 1:
            raise ValueError(f"Expected subspace_dim >= 1 but got {subspace_dim}.")
        if not (window is None or window == "auto" or (not isinstance(window, str) and window > 0)):
            raise ValueError(f'Expected window to be None, "auto" or a number of samples but got {window!r}.')
        if power_iterations is not None and power_iterations < 1:
            raise ValueError(f"Expected power_iterations to be None or at least 1 but got {power_iterations}.")
        self.lambda_sub, self.lambda_orth, self.subspace_dim = lambda_sub, lambda_orth, subspace_dim
        self.window, self.center, self.unbiased = window, center, unbiased
        self.broadening, self.power_iterations = broadening, power_iterations
        self.terms: dict[str, Term] = {
            name: (weight, PAPER[name]) for name, weight in zip(PAPER, (1.0, lambda_sub, lambda_orth), strict=True)
        } | {name: _checked_term(name, term) for name, term in (terms or {}).items()}
        self.settings = {"covariance window": "none" if window is None else window, "centred": center}
        self.expander, self.module = expander, expander or nn.Module()
        if expander is not None:
            self.settings["expander"] = f"{sum(weight.numel() for weight in expander.parameters()):,} parameters"
            if self.needs_start:
                raise ValueError(
                    "An anchor is of the embeddings, and with an expander no term sees these: leave one out."
                )
        self.averages: list[Average | None] = [None, None]
        self.average_cross: Tensor | None = None
        self.bases: list[Tensor | None] = [None, None]
        self._pooled: Pooled | None = None
        self._planned: tuple[dict[str, Tensor], PairGradient] | None = None
        self.diagnostics: dict[str, Tensor] = {}

    def __call__(self, z_a: Tensor, z_b: Tensor, *, start: Rows | None = None) -> dict[str, Tensor]:
        """Every term, unweighted, by name, and their weighted sum `loss`; differentiable in `z_a`, `z_b` (N, d).

        `start` holds the rows that the frozen start gives of the same notes, both sides, where a term needs them.
        """
        if self.window is None:
            warn_if_unsupported(self.subspace_dim, len(z_a) - self.center)
        rows = self.seen(z_a), self.seen(z_b)
        return self.values(PairMoments.of(*rows, cross=self.needs_cross_moment, start=start))

    def seen(self, z: Tensor) -> Tensor:
        """The embeddings (n, d), or what the expander makes of them (n, D)."""
        return z if self.expander is None else self.expander(z)

    def values(self, pair: PairMoments) -> dict[str, Tensor]:
        """The same from the moments of the pairs, differentiable in them; advances the running state by one step."""
        with torch.autocast(pair.a.shift.device.type, enabled=False):
            seen = self._advance(pair.detached())
            self._pooled = pooled_of(seen)
            closed = dict(zip(PAPER, paper_terms(seen, self._pooled, pair), strict=True))
            statistics = seen.of(pair)
            values = {
                name: closed[name] if self._is_closed(name) else checked_value(name, function(statistics))
                for name, (_, function) in self.terms.items()
            }
            # a term without weight has no gradient, not 0 times one that may be infinite
            weighted = [weight * values[name] for name, (weight, _) in self.terms.items() if weight]
            return values | {"loss": sum(weighted, pair.a.shift.new_zeros(()))}

    def gradient(self, pair: PairMoments) -> tuple[dict[str, Tensor], PairGradient]:
        """Terms, and the gradient of `loss` with respect to the moments, for `PairGradient.pullback`."""
        pair = pair.detached(requires_grad=True)
        with torch.enable_grad(), torch.autocast(pair.a.shift.device.type, enabled=False):
            values = self.values(pair)
            loss, sums = values["loss"], pair.sums
            grads = torch.autograd.grad(loss, sums, allow_unused=True) if loss.requires_grad else [None] * len(sums)
        return {name: value.detach() for name, value in values.items()}, PairGradient.of(pair, grads)

    def plan(self, pair: PairMoments) -> dict[str, Tensor]:
        """The terms, unweighted, and `diagnostics`; `share` pulls the gradient at these moments back."""
        self._planned = self.gradient(pair)
        return self._planned[0] | self.diagnostics

    def share(
        self, z_a: Tensor, z_b: Tensor, *, start: Rows | None = None, parts: int = 1, ranks: int = 1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The value of the update over its parts, with the gradient at the global moments; nothing to log."""
        if self._planned is None:
            raise RuntimeError("The update has no plan yet: call plan first.")
        values, gradient = self._planned
        z_a, z_b = self.seen(z_a), self.seen(z_b)
        # linear in the rows: its gradient is exact, and its own value is replaced by that of the terms
        gradients = gradient.pullback(z_a, z_b, start)
        surrogate = sum((g * z).sum() for g, z in zip(gradients, (z_a, z_b), strict=True)) * ranks
        return surrogate + (values["loss"] / parts - surrogate).detach(), {}

    def evaluate(self, pair: PairMoments, batches: Sequence[Mapping[str, Tensor]] = ()) -> dict[str, Tensor]:
        """The terms of the moments given alone: no running state, exact eigenspaces, plug-in L_spec.

        For an evaluation set, where the rows are many and of one patient several. `batches` holds what `of_batch` gave.
        """
        kept = ("lambda_sub", "lambda_orth", "subspace_dim", "center", "broadening", "terms")
        return DenseObjective(**{name: getattr(self, name) for name in kept}).values(pair)

    @property
    def covariance(self) -> Tensor | None:
        """Mean of the covariances of both sides at the last call, of what the terms see (d, d), detached; None before."""
        return None if self._pooled is None else self._pooled[0] * self._pooled[1]

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs, by name; empty before the first step."""
        state = {"shift": self.shift, "cross.covariance": self.average_cross}
        state |= self.module.state_dict(prefix=EXPANDER)
        for side, average, basis in zip("ab", self.averages, self.bases, strict=True):
            state |= {f"{side}.basis": basis, **{f"{side}.{name}": getattr(average, name, None) for name in AVERAGED}}
        return {name: value.clone() for name, value in state.items() if value is not None}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        # copies, whose memory is aligned as that of any result: sums of a file's unaligned memory round otherwise
        state = {name: value.clone() for name, value in state.items()}
        self.module.load_state_dict(
            {name.removeprefix(EXPANDER): value for name, value in state.items() if name.startswith(EXPANDER)}
        )
        self.shift, self.average_cross = state.get("shift"), state.get("cross.covariance")
        self.bases = [state.get("a.basis"), state.get("b.basis")]
        for i, side in enumerate("ab"):
            saved = {name: state[f"{side}.{name}"] for name in AVERAGED if f"{side}.{name}" in state}
            self.averages[i] = Average(**saved, gain=torch.zeros_like(saved["noise"])) if saved else None

    def _is_closed(self, name: str) -> bool:
        """Whether `paper_terms` computes this term: not one that another function has replaced, and not all estimates."""
        unlike = ("spectral_spreading" if self.unbiased else "", "" if self.center else "orthogonality")
        return name not in unlike and PAPER.get(name) is self.terms[name][1]

    @torch.no_grad()
    def _advance(self, pair: PairMoments) -> Statistics:
        """The statistics of an update, by which running averages, tracked bases and shift move on."""
        k = self.subspace_dim
        check_dimension(k, len(pair.a.shift))
        a, b = Side(pair.a, self.center), Side(pair.b, self.center)
        seen = Statistics(a, b, pair, k, self.center, self.unbiased, self.broadening)
        if self.window is not None:
            self._average(seen, float(seen.dimension if self.window == "auto" else self.window))
        for i, side in enumerate((a, b)):
            side.eigenspace = self._eigenspace(i, side)
        self.diagnostics = {
            "trace": (a.trace + b.trace) / 2,  # of the batch
            "gap": torch.minimum(a.eigenspace.gap(k), b.eigenspace.gap(k)),
            "subspace_rank": torch.minimum(a.eigenspace.leading(k).sum(), b.eigenspace.leading(k).sum()),
        }
        # the next step's shift: near the mean, the same on all ranks, and finite
        mean = (pair.a.mean + pair.b.mean) / 2
        if self.shift is None:
            self.shift = torch.where(pair.a.shift.isfinite().all(), pair.a.shift, 0)
        self.shift = torch.where(mean.isfinite().all() & (pair.a.count > 0), mean, self.shift)
        return seen

    def _average(self, seen: Statistics, averaging_window: float) -> None:
        """Running averages of both sides, and of the normalised cross covariance if there is a cross moment."""
        sides = seen.a, seen.b
        past = [one or no_average(side) for one, side in zip(self.averages, sides, strict=True)]
        steps = [gain_of(one, side, averaging_window) for one, side in zip(past, sides, strict=True)]
        gains, usable = [gain for gain, _ in steps], [side.usable for side in sides]
        if seen.pair.cross is not None:
            # one gain for all, so that the joint covariance is a convex sum of joint covariances
            gains, usable = [torch.maximum(*gains)] * 2, [usable[0] & usable[1]] * 2
            normalised = seen.batch_cross_covariance / seen.cross_scale
            past_cross = torch.zeros_like(normalised) if self.average_cross is None else self.average_cross
            seen.average_cross = past_cross.lerp(normalised, gains[0])
            self.average_cross = torch.where(usable[0], seen.average_cross, past_cross)
        for i, side in enumerate(sides):
            side.average = averaged(past[i], side, gains[i], steps[i][1])
            # on a GPU this waits, as the small eigendecomposition of the next step does anyway
            self.averages[i] = side.average if usable[i] else past[i]

    def _eigenspace(self, i: int, side: Side) -> Eigenspace:
        covariance, scale = side.scaled
        if self.power_iterations is None:
            space = eigenspace(covariance)
        else:
            basis, iterations, warm = self.bases[i], self.power_iterations, True
            if basis is None:
                width = min(self.subspace_dim + OVERSAMPLING, len(covariance))
                start = torch.randn(len(covariance), width, generator=torch.Generator().manual_seed(0))
                basis, iterations, warm = torch.linalg.qr(start.to(covariance)).Q, COLD_ITERATIONS, False
            space = subspace_iteration(covariance, basis, iterations, warm=warm)
            usable = side.varies & space.basis.isfinite().all()
            self.bases[i] = space.basis if usable else basis
        scale = torch.where(side.varies, scale, 0)  # rounding noise has no directions
        return Eigenspace(space.basis, space.values * scale, space.rest * scale)


def _checked_term(name: str, term: Any) -> Term:
    if isinstance(term, (int, float)):
        if name not in EXTRA_TERMS:
            raise ValueError(
                f"Expected term {name!r} as (weight, function): only {', '.join(EXTRA_TERMS)} are known by name."
            )
        term = (term, EXTRA_TERMS[name])
    check_name(name)
    if not (isinstance(term, tuple) and len(term) == 2 and callable(term[1])):
        raise ValueError(f"Expected term {name!r} as (weight, function of Statistics) but got {term!r}.")
    weight, function = term
    if not math.isfinite(weight):
        raise ValueError(f"Expected a finite weight of term {name!r} but got {weight}.")
    return float(weight), function
