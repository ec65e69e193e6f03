"""The dense-feature objective: L = L_spec + lambda_sub L_sub + lambda_orth L_orth (paper 4.2 to 4.5), and terms beside."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_densefeat.objective.batch_loss import checked_value
from hf_densefeat.objective.extra_terms import EXTRA_TERMS
from hf_densefeat.objective.moments import MomentsGradient, PairGradient, PairMoments
from hf_densefeat.objective.running import RunningCovariance
from hf_densefeat.objective.statistics import Side, Statistics, Term
from hf_densefeat.objective.subspace import (
    Eigenspace,
    check_dimension,
    eigenspace,
    power_iteration,
    subspace_distance_squared,
    warn_if_unsupported,
)
from hf_densefeat.objective.terms import orthogonality, spectral_spreading

OVERSAMPLING = 32  # directions tracked beyond k: the gradient sees those that are left only as a mean
COLD_ITERATIONS = 20  # power steps from a random basis, at the first call
RESERVED = ("loss", "mlm_loss", "trace", "gap", "subspace_rank", "effective_rank")  # names of other numbers in the log


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


class DenseObjective:
    """L = L_spec + lambda_sub L_sub + lambda_orth L_orth on adjacent notes Z_a, Z_b (N, d), row i of b after row i of a.

    L_spec and L_orth are those of the whole batch, the 2N rows of both sides; L_sub compares the sides. With `center`,
    each side's own mean is subtracted first (L_orth is always centred; without `center`, by the mean of all 2N rows).

    Args:
        lambda_sub: weight of L_sub, which lies in [0, 2k].
        lambda_orth: weight of L_orth, which lies in [0, d (d - 1)].
        subspace_dim: k.
        window: None for the moments of the batch alone, or the averaging window, in samples, of the running covariances
            of which L_spec and L_sub are taken (paper 4.5); "auto" is d samples. See `RunningCovariance`.
        center: subtract the means; the paper's Sigma is uncentred.
        unbiased: leave the i = j terms out of L_spec (`Moments.noise_of_purity`), as the mean over the two sides,
            because adjacent notes are not independent; the value may then be below 0, and keeps a bias of order 1/N.
        broadening: eps of the projector's gradient in units of the mean eigenvalue; 0 is the exact gradient.
        power_iterations: None for exact eigenspaces, or the number of warm-started block power steps a call, for
            which no d x d eigendecomposition is made: k + 32 directions are tracked, the rest enters the gradient of
            L_sub as its mean eigenvalue. With 2 steps, 256 new rows of spectrum 1/i a call and window "auto", that
            gradient is within 7 % of the exact one at d = 384 and 5 % at 768 (cosine 0.998). Flat spectra, which have
            no leading subspace, are tracked worse (1/sqrt(i): 24 %, cosine 0.97).
        terms: more terms, name -> (weight, function of `Statistics` that returns a scalar), or name -> weight for one of
            `EXTRA_TERMS`. One of the paper's three names replaces that term. A function with `needs_cross_moment = True`
            (`sees_pairing`) gets the cross covariance of the pairs. Values are unweighted under their names; `loss` is
            the sum of weight * value.

    `terms` holds all terms, the paper's three first. The state (running covariances, tracked bases) is float32 or wider
    and a function of the global moments alone, so the same on all ranks; `state_dict` and `load_state_dict` save and
    restore it. After each call `diagnostics` holds the `trace` of Sigma, the eigenvalue `gap` at k in units of the mean
    eigenvalue, and the `subspace_rank`, at most k; `covariance` is that of both sides, detached.

    Raises:
        ValueError: for an option out of range, and for a term whose name, weight or function cannot be one.
    """

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
    ):
        _check_options(lambda_sub, lambda_orth, subspace_dim, window, broadening, power_iterations)
        self.lambda_sub, self.lambda_orth, self.subspace_dim = lambda_sub, lambda_orth, subspace_dim
        self.window, self.center, self.unbiased = window, center, unbiased
        self.broadening, self.power_iterations = broadening, power_iterations
        self.terms: dict[str, Term] = {
            "spectral_spreading": (1.0, spectral_spreading_term),
            "subspace_consistency": (lambda_sub, subspace_consistency_term),
            "orthogonality": (lambda_orth, orthogonality_term),
        } | {name: _checked_term(name, term) for name, term in (terms or {}).items()}
        self.running = (RunningCovariance(), RunningCovariance())
        self.running_cross: Tensor | None = None
        self.bases: list[Tensor | None] = [None, None]
        self.shift: Tensor | None = None
        self.covariance: Tensor | None = None
        self.diagnostics: dict[str, Tensor] = {}

    @property
    def needs_cross_moment(self) -> bool:
        """Whether a term asks for the cross moment: `PairMoments.of(..., cross=objective.needs_cross_moment)`."""
        return any(getattr(function, "needs_cross_moment", False) for _, function in self.terms.values())

    def pure(self) -> DenseObjective:
        """The same terms of the moments given alone: no running state, exact eigenspaces, plug-in L_spec.

        What evaluation uses, where the rows are many and of one patient several.
        """
        return DenseObjective(
            lambda_sub=self.lambda_sub,
            lambda_orth=self.lambda_orth,
            subspace_dim=self.subspace_dim,
            center=self.center,
            broadening=self.broadening,
            terms=self.terms,
        )

    def __call__(self, z_a: Tensor, z_b: Tensor) -> dict[str, Tensor]:
        """Every term, unweighted, by name, and their weighted sum `loss`; differentiable in `z_a`, `z_b` (N, d)."""
        if z_a.shape != z_b.shape:
            raise ValueError(
                f"Expected z_a and z_b of one shape (n, d), a row a pair, but got {tuple(z_a.shape)}, {tuple(z_b.shape)}."
            )
        if self.window is None:
            warn_if_unsupported(self.subspace_dim, len(z_a) - self.center)
        return self.values(PairMoments.of(z_a, z_b, cross=self.needs_cross_moment))

    def values(self, pair: PairMoments) -> dict[str, Tensor]:
        """The same from the moments of the pairs, differentiable in them; advances the running state by one step."""
        check_dimension(self.subspace_dim, len(pair.a.shift))
        with torch.autocast(pair.a.shift.device.type, enabled=False):
            statistics = self._statistics(pair)
            terms = self.terms.items()
            values = {name: checked_value(name, function(statistics)) for name, (_, function) in terms}
            # a term without weight has no gradient, not 0 times one that may be infinite
            weighted = [weight * values[name] for name, (weight, _) in terms if weight]
            loss = sum(weighted[1:], weighted[0]) if weighted else pair.a.shift.new_zeros(())
            a, b, k = statistics.a, statistics.b, self.subspace_dim
            self.diagnostics = {
                "trace": ((a.trace + b.trace) / 2).detach(),  # of the batch
                "gap": torch.minimum(a.eigenspace.gap(k), b.eigenspace.gap(k)),
                "subspace_rank": torch.minimum(a.eigenspace.leading(k).sum(), b.eigenspace.leading(k).sum()),
            }
        self._remember_mean(pair)
        self.covariance = statistics.pooled.detach()
        return values | {"loss": loss}

    def gradient(self, pair: PairMoments) -> tuple[dict[str, Tensor], PairGradient]:
        """Terms, and the gradient of `loss` with respect to the moments, for `PairGradient.pullback`."""
        pair = pair.detached(requires_grad=True)
        with torch.enable_grad():
            values = self.values(pair)
        grads = torch.autograd.grad(values["loss"], pair.sums, materialize_grads=True, allow_unused=True)
        gradient = PairGradient(
            MomentsGradient(pair.a.shift, *grads[:5]),
            MomentsGradient(pair.b.shift, *grads[5:10]),
            grads[10] if len(grads) > 10 else None,
        )
        return {name: value.detach() for name, value in values.items()}, gradient

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs, by name; empty before the first step."""
        state = {"shift": self.shift, "cross.covariance": self.running_cross}
        for side, running, basis in zip("ab", self.running, self.bases, strict=True):
            state |= {f"{side}.basis": basis, f"{side}.covariance": running.covariance}
            state |= {f"{side}.noise": running.noise, f"{side}.drift": running.drift}
        return {name: value.clone() for name, value in state.items() if value is not None}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.shift, self.running_cross = state.get("shift"), state.get("cross.covariance")
        self.bases = [state.get("a.basis"), state.get("b.basis")]
        for side, running in zip("ab", self.running, strict=True):
            running.covariance, running.noise = state.get(f"{side}.covariance"), state.get(f"{side}.noise")
            running.drift = state.get(f"{side}.drift")

    def _statistics(self, pair: PairMoments) -> Statistics:
        """The statistics of both sides, with the running averages advanced."""
        a, b = (
            Side(m, self.center, find_eigenspace=functools.partial(self._eigenspace, i))
            for i, m in enumerate((pair.a, pair.b))
        )
        statistics = Statistics(a, b, pair, self.subspace_dim, self.center, self.unbiased, self.broadening)
        if self.window is not None:
            averaging_window = float(statistics.dimension if self.window == "auto" else self.window)
            if pair.cross is None:
                for side, running in zip((a, b), self.running, strict=True):
                    noise, normalised = side.batch_noise, side.batch_normalised
                    side.average, side.average_noise = running.average(
                        normalised, noise, side.count, averaging_window, side.varies
                    )
            else:
                self._average_jointly(statistics, averaging_window)
        return statistics

    def _average_jointly(self, s: Statistics, averaging_window: float) -> None:
        """Both sides and the cross covariance by one gain, the larger of the sides': a convex sum of joint covariances."""
        usable = s.a.varies & s.b.varies
        sides = list(zip((s.a, s.b), self.running, strict=True))
        gains, drifts = zip(
            *(r.gain(x.batch_normalised, x.batch_noise, x.count, averaging_window) for x, r in sides), strict=True
        )
        gain = torch.maximum(*gains)
        normalised = s.batch_cross_covariance / (s.a.scale * s.b.scale).sqrt()
        usable = usable & normalised.isfinite().all() & s.a.batch_normalised.isfinite().all()
        usable = usable & s.b.batch_normalised.isfinite().all()
        for (side, running), drift in zip(sides, drifts, strict=True):
            side.average, side.average_noise = running.advance(
                side.batch_normalised, side.batch_noise, gain, drift, usable
            )
        with torch.no_grad():
            past = torch.zeros_like(normalised) if self.running_cross is None else self.running_cross
            average = past.lerp(normalised, gain)
            self.running_cross = torch.where(usable, average, past)
        s.average_cross = average + (normalised - normalised.detach())

    def _eigenspace(self, i: int, side: Side) -> Eigenspace:
        covariance = side.covariance.detach()
        if self.power_iterations is None:
            # LAPACK raises on NaN, where the loss can say NaN and be skipped
            space = eigenspace(torch.where(covariance.trace().isfinite(), covariance, 0))
        else:
            basis, iterations = self.bases[i], self.power_iterations
            if basis is None:
                width = min(self.subspace_dim + OVERSAMPLING, len(covariance))
                start = torch.randn(len(covariance), width, generator=torch.Generator().manual_seed(0))
                basis, iterations = torch.linalg.qr(start.to(covariance)).Q, COLD_ITERATIONS
            space = power_iteration(covariance, basis, iterations)
            self.bases[i] = torch.where(side.varies & space.basis.isfinite().all(), space.basis, basis)
        # rounding noise has no directions
        return replace(space, values=torch.where(side.varies, space.values, 0))

    @torch.no_grad()
    def _remember_mean(self, pair: PairMoments) -> None:
        """The next step's shift: near the mean, the same on all ranks, and finite."""
        mean = (pair.a.mean + pair.b.mean) / 2
        if self.shift is None:
            self.shift = torch.where(pair.a.shift.isfinite().all(), pair.a.shift, 0)
        self.shift = torch.where(mean.isfinite().all() & (pair.a.count > 0), mean, self.shift)


def _checked_term(name: str, term: Any) -> Term:
    if isinstance(term, (int, float)):
        if name not in EXTRA_TERMS:
            raise ValueError(
                f"Expected term {name!r} as (weight, function): only {', '.join(EXTRA_TERMS)} are known by name."
            )
        term = (term, EXTRA_TERMS[name])
    if name in RESERVED:
        raise ValueError(f"A term cannot be called {name!r}: the log has another number of that name. Rename it.")
    if not (isinstance(term, tuple) and len(term) == 2 and callable(term[1])):
        raise ValueError(f"Expected term {name!r} as (weight, function of Statistics) but got {term!r}.")
    weight, function = term
    if not math.isfinite(weight):
        raise ValueError(f"Expected a finite weight of term {name!r} but got {weight}.")
    return float(weight), function


def _check_options(
    lambda_sub: float,
    lambda_orth: float,
    subspace_dim: int,
    window: float | str | None,
    broadening: float,
    power_iterations: int | None,
) -> None:
    for name, value in (("lambda_sub", lambda_sub), ("lambda_orth", lambda_orth), ("broadening", broadening)):
        if not value >= 0:
            raise ValueError(f"Expected {name} >= 0 but got {value}.")
    if subspace_dim < 1:
        raise ValueError(f"Expected subspace_dim >= 1 but got {subspace_dim}.")
    if not (window is None or window == "auto" or (not isinstance(window, str) and window > 0)):
        raise ValueError(f'Expected window to be None, "auto" or a number of samples but got {window!r}.')
    if power_iterations is not None and power_iterations < 1:
        raise ValueError(f"Expected power_iterations to be None or at least 1 but got {power_iterations}.")
