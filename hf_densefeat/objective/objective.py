"""The dense-feature objective: L = L_spec + lambda_sub L_sub + lambda_orth L_orth (paper, sections 4.2 to 4.5)."""

import functools
import logging
from dataclasses import replace

import torch
from torch import Tensor

from hf_densefeat.objective.moments import Moments, RunningCovariance, full_precision
from hf_densefeat.objective.subspace import (
    Eigenspace,
    eigenspace,
    eigenspace_of_rows,
    power_iteration,
    subspace_distance_squared,
)

logger = logging.getLogger(__name__)

OVERSAMPLING = 32  # directions tracked beyond k: the gradient sees those that are left only as a mean
COLD_ITERATIONS = 20  # power steps from a random basis, at the first call


# ---- The three terms, of covariances -------------------------------------------------------------------------------


def spectral_spreading(covariance: Tensor, dimension: int, resolution: Tensor) -> Tensor:
    """L_spec of Sigma, or of the Gram matrix Z Z^T / N, which has the same non-zero eigenvalues (paper 4.2, A.1).

    ||Sigma / tr Sigma - I/d||_F^2 = ||Sigma||_F^2 / (tr Sigma)^2 - 1/d, in [0, 1 - 1/d]; the worst value, that of rank
    one, where the trace is at most `resolution`: no variance, no spectrum.
    """
    trace = covariance.trace()
    resolved = trace > resolution
    normalised = covariance / torch.where(resolved, trace, 1)
    return torch.where(trace <= resolution, 1, normalised.square().sum()) - 1 / dimension


# L_sub of two covariances is `subspace.subspace_distance_squared`: ||P_a - P_b||_F^2 (paper 4.3)


def orthogonality(covariance: Tensor, resolution: Tensor) -> Tensor:
    """L_orth of a centred Sigma (d, d): ||corr - I||_F^2 (paper 4.4), in [0, d (d - 1)].

    corr_ij^2 = Sigma_ij^2 / (Sigma_ii Sigma_jj). A column whose variance is at most `resolution` (d,) standardises to
    zeros and adds the 1 of its missing diagonal.
    """
    variance = covariance.diagonal()
    varies = variance > resolution
    trace = torch.where(varies, variance, 0).sum()
    unit = torch.where(varies.any(), trace, 1)  # squares of small numbers underflow
    inverse = torch.where(varies, unit / torch.where(varies, variance, 1), 0)
    # corr_jj is 1 or 0, without gradient: ||corr - I||^2 = ||corr||^2 + d - 2 tr corr
    return inverse @ (covariance / unit).square() @ inverse + len(variance) - 2 * varies.sum()


def noise_of_purity(m: Moments, covariance: Tensor, center: bool) -> Tensor:
    """||Sigma_hat||_F^2 minus its U-statistic: what the i = j terms add, which measures N and not the model.

    With rows x about the mean, S = sum x x^T and q = sum |x|^4, the U-statistic
    [||S||_F^2 - q + (tr S)^2 / ((n-1)(n-2)) - 2 q / (n-2)] / (n (n-3)) is unbiased for ||Sigma||_F^2 (Song et al., 2012,
    with both kernels Z Z^T); uncentred it is (||S||_F^2 - q) / (n (n-1)). Rows must be independent. With fewer than 4
    rows (2 uncentred) all of ||Sigma_hat||_F^2 is noise.
    """
    n, plug_in = m.count, covariance.square().sum()
    if center:
        q, trace = m.fourth_about(m.mean), n * covariance.trace()
        rest = trace.square() / ((n - 1) * (n - 2)).clamp(min=1) - 2 * q / (n - 2).clamp(min=1)
        # Sigma_hat divides by n, the unbiased covariance by n - 1
        unbiased = (n.square() * plug_in - q + rest) / (n * (n - 3)).clamp(min=1) * ((n - 1) / n.clamp(min=1)).square()
    else:
        unbiased = (n.square() * plug_in - m.fourth_about(torch.zeros_like(m.shift))) / (n * (n - 1)).clamp(min=1)
    return torch.where(n >= (4 if center else 2), plug_in - unbiased, plug_in)


# ---- The paper's formulas, of embeddings ---------------------------------------------------------------------------


def _of_rows(function):
    """Check that embeddings are matrices of one width, and compute in float32 or wider, whatever autocast says."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        shapes = [tuple(z.shape) for z in args if isinstance(z, Tensor)]
        if any(len(shape) != 2 or shape[0] == 0 or shape[1] != shapes[0][1] for shape in shapes):
            raise ValueError(f"Expected embeddings of shape (n, d), n >= 1, but got {', '.join(map(str, shapes))}.")
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*(full_precision(z) if isinstance(z, Tensor) else z for z in args), **kwargs)

    return wrapped


@_of_rows
def spectral_spreading_loss(z: Tensor, center: bool = False) -> Tensor:
    """L_spec = ||Sigma / tr Sigma - I/d||_F^2 with Sigma = Z^T Z / N (paper 4.2), for Z (N, d); in [0, 1 - 1/d].

    0 for an isotropic Sigma, 1 - 1/d for rank one; rotation- and scale-invariant; no eigendecomposition. `center`
    subtracts the mean first. A batch without variance (all zeros; one row or equal rows if centred) has no spectrum: it
    reads as the worst value, 1 - 1/d, with zero gradient. With N < d the value is at least 1/N - 1/d.
    """
    resolution = Moments.of(z.detach()).resolution(center).sum()
    rows = z - z.mean(0) if center else z
    second = (rows @ rows.mT if len(z) < z.shape[1] else rows.mT @ rows) / len(z)
    return spectral_spreading(second, z.shape[1], resolution)


@_of_rows
def subspace_consistency_loss(
    z_a: Tensor, z_b: Tensor, k: int, center: bool = False, broadening: float = 0.0
) -> Tensor:
    """L_sub = ||U_a U_a^T - U_b U_b^T||_F^2 (paper 4.3), U the leading k right singular vectors of Z (N, d); in [0, 2k].

    Equals 2k - 2 ||U_a^T U_b||_F^2, twice the sum of squared sines of `scipy.linalg.subspace_angles` (A.2). Gradients
    are those of the projectors, exact for `broadening=0` and finite at ties; see `subspace_distance_squared`. With fewer
    than k directions of variance (N < k, collapse) the subspaces have as many dimensions as there are: a warning says so
    when N alone forces it. Raises ValueError for k outside 1..d.
    """
    _check_dimension(k, z_a.shape[1])
    _warn_if_unsupported(k, min(len(z_a), len(z_b)) - center)
    if center:
        z_a, z_b = (torch.where(_varies(z), z - z.mean(0), 0) for z in (z_a, z_b))
    (cov_a, a), (cov_b, b) = ((z.mT @ z / len(z), eigenspace_of_rows(z.detach())) for z in (z_a, z_b))
    return subspace_distance_squared(cov_a, cov_b, a, b, k, broadening)


@_of_rows
def orthogonality_loss(z: Tensor) -> Tensor:
    """L_orth = ||Z_B^T Z_B / B - I||_F^2, columns of Z_B (B, d) standardised with the biased variance (paper 4.4).

    The squared Frobenius norm of `np.corrcoef(z.T) - I`, in [0, d (d - 1)]. Independent features read d (d - 1) / (B - 1)
    on average. A constant column (each of them, for one row) standardises to zeros and adds 1, with zero gradient:
    collapse is not seen here, only by L_spec.
    """
    m = Moments.of(z)
    return orthogonality(m.covariance(center=True), m.resolution(center=True))


def _varies(z: Tensor) -> Tensor:
    """Whether the rows differ by more than rounding."""
    m = Moments.of(z.detach())
    return m.covariance(center=True).trace() > m.resolution(center=True).sum()


def _check_dimension(k: int, d: int) -> None:
    if not 1 <= k <= d:
        raise ValueError(f"Expected a subspace dimension k between 1 and d = {d} but got k = {k}.")


@functools.lru_cache
def _warn_if_unsupported(k: int, rank: int) -> None:
    if rank < k:
        logger.warning("Subspace dimension reduced from %d to %d, the rank that the rows can have.", k, max(rank, 0))


# ---- The sum, with the running estimates ---------------------------------------------------------------------------


class DenseObjective:
    """L = L_spec + lambda_sub L_sub + lambda_orth L_orth on adjacent notes Z_a, Z_b (N, d), row i of b after row i of a.

    L_spec and L_orth are those of the whole batch, the 2N rows of both sides; L_sub compares the sides. With `center`,
    each side's own mean is subtracted first (L_orth is always centred; without `center`, by the mean of all 2N rows).

    Args:
        lambda_sub: weight of L_sub, which lies in [0, 2k].
        lambda_orth: weight of L_orth, which lies in [0, d (d - 1)].
        subspace_dim: k.
        window: None for the moments of the batch alone, or the length in samples of the running covariances of which
            L_spec and L_sub are taken (paper 4.5); "auto" is d samples. See `RunningCovariance`.
        center: subtract the means; the paper's Sigma is uncentred.
        unbiased: leave the i = j terms out of L_spec (`noise_of_purity`), as the mean over the two sides, because
            adjacent notes are not independent; the value may then be below 0, and keeps a bias of order 1/N.
        broadening: eps of the projector's gradient in units of the mean eigenvalue; 0 is the exact gradient.
        power_iterations: None for exact eigenspaces, or the number of warm-started block power steps a call, for
            which no d x d eigendecomposition is made: k + 32 directions are tracked, the rest enters the gradient of
            L_sub as its mean eigenvalue. With 2 steps, 256 new rows of spectrum 1/i a call and window "auto", that
            gradient is within 7 % of the exact one at d = 384 and 5 % at 768 (cosine 0.998). Flat spectra, which have
            no leading subspace, are tracked worse (1/sqrt(i): 24 %, cosine 0.97).

    The state (running covariances, tracked bases) is float32 or wider and a function of the global moments alone, so
    the same on all ranks; `state_dict` and `load_state_dict` save and restore it. After each call `diagnostics` holds
    the `trace` of Sigma, the eigenvalue `gap` at k in units of the mean eigenvalue, and the `subspace_rank`, at most k.
    """

    def __init__(
        self,
        lambda_sub: float = 1.0,
        lambda_orth: float = 1.0,
        subspace_dim: int = 20,
        window: float | str | None = None,
        center: bool = False,
        unbiased: bool = False,
        broadening: float = 1.0,
        power_iterations: int | None = None,
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
        self.running = (RunningCovariance(), RunningCovariance())
        self.bases: list[Tensor | None] = [None, None]
        self.shift: Tensor | None = None
        self.covariance: Tensor | None = None
        self.diagnostics: dict[str, Tensor] = {}

    def __call__(self, z_a: Tensor, z_b: Tensor) -> dict[str, Tensor]:
        """`spectral_spreading`, `subspace_consistency`, `orthogonality`, unweighted, and their weighted sum `loss`."""
        if z_a.shape != z_b.shape:
            raise ValueError(
                f"Expected z_a and z_b of one shape (n, d), a row a pair, but got {tuple(z_a.shape)}, {tuple(z_b.shape)}."
            )
        if self.window is None:
            _warn_if_unsupported(self.subspace_dim, len(z_a) - self.center)
        return self.terms(Moments.of(z_a), Moments.of(z_b))

    def terms(self, a: Moments, b: Moments) -> dict[str, Tensor]:
        """The same from the moments of both sides, differentiable in them; advances the running state by one step."""
        k, d = self.subspace_dim, len(a.shift)
        _check_dimension(k, d)
        with torch.autocast(a.shift.device.type, enabled=False):
            cov_a, purity_a, trace_a, resolved_a = self._estimate(a, self.running[0])
            cov_b, purity_b, trace_b, resolved_b = self._estimate(b, self.running[1])
            pooled = (cov_a + cov_b) / 2
            resolution = (a.resolution(self.center) + b.resolution(self.center)) / 2
            plug_in = spectral_spreading(pooled, d, resolution.sum())
            spread = (purity_a + purity_b) / 2 - 1 / d if self.unbiased else plug_in
            space_a = self._eigenspace(0, cov_a.detach(), resolved_a)
            space_b = self._eigenspace(1, cov_b.detach(), resolved_b)
            subspace = subspace_distance_squared(cov_a, cov_b, space_a, space_b, k, self.broadening)
            if self.center and self.window is None:
                orthogonal = orthogonality(pooled, resolution)
            else:
                orthogonal = orthogonality(*self._columns(a, b))
            loss = spread
            for weight, term in ((self.lambda_sub, subspace), (self.lambda_orth, orthogonal)):
                if weight:  # a term without weight has no gradient, not 0 times one that may be infinite
                    loss = loss + weight * term
        self._remember_mean(a, b)
        self.covariance = pooled.detach()
        self.diagnostics = {
            "trace": ((trace_a + trace_b) / 2).detach(),  # of the batch
            "gap": torch.minimum(space_a.gap(k), space_b.gap(k)),
            "subspace_rank": torch.minimum(space_a.leading(k).sum(), space_b.leading(k).sum()),
        }
        return {
            "spectral_spreading": spread,
            "subspace_consistency": subspace,
            "orthogonality": orthogonal,
            "loss": loss,
        }

    def gradient(self, a: Moments, b: Moments) -> tuple[dict[str, Tensor], Moments, Moments]:
        """Terms, and the gradient of `loss` with respect to the moments of either side, for `Moments.pullback`."""
        a, b = a.detached(requires_grad=True), b.detached(requires_grad=True)
        with torch.enable_grad():
            terms = self.terms(a, b)
        grads = torch.autograd.grad(terms["loss"], (*a.sums, *b.sums), materialize_grads=True, allow_unused=True)
        half = len(a.sums)
        terms = {name: term.detach() for name, term in terms.items()}
        return terms, Moments(a.shift, *grads[:half]), Moments(b.shift, *grads[half:])

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs, by name; empty before the first step."""
        state = {"shift": self.shift}
        for side, running, basis in zip("ab", self.running, self.bases, strict=True):
            state |= {f"{side}.basis": basis, f"{side}.covariance": running.covariance}
            state |= {f"{side}.noise": running.noise, f"{side}.drift": running.drift}
        return {name: value.clone() for name, value in state.items() if value is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.shift = state.get("shift")
        self.bases = [state.get("a.basis"), state.get("b.basis")]
        for side, running in zip("ab", self.running, strict=True):
            running.covariance, running.noise = state.get(f"{side}.covariance"), state.get(f"{side}.noise")
            running.drift = state.get(f"{side}.drift")

    def _estimate(self, m: Moments, running: RunningCovariance) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Covariance of one side, its running average at the batch's trace; unbiased purity; trace; has it variance."""
        covariance = m.covariance(self.center)
        trace = covariance.trace()
        resolved = trace > m.resolution(self.center).sum()
        if self.window is None and not self.unbiased:
            return covariance, trace.new_tensor(torch.nan), trace, resolved
        scale = torch.where(resolved, trace, 1)
        noise = noise_of_purity(m, covariance, self.center) / scale / scale
        normalised = covariance / scale
        if self.window is not None:
            window = len(m.shift) if self.window == "auto" else self.window
            normalised, noise = running.average(normalised, noise, m.count, window, resolved)
        purity = torch.where(resolved, normalised.square().sum() - noise, 1)
        return normalised * trace, purity, trace, resolved

    def _eigenspace(self, side: int, covariance: Tensor, resolved: Tensor) -> Eigenspace:
        if self.power_iterations is None:
            # LAPACK raises on NaN, where the loss can say NaN and be skipped
            space = eigenspace(torch.where(covariance.trace().isfinite(), covariance, 0))
        else:
            basis, iterations = self.bases[side], self.power_iterations
            if basis is None:
                width = min(self.subspace_dim + OVERSAMPLING, len(covariance))
                start = torch.randn(len(covariance), width, generator=torch.Generator().manual_seed(0))
                basis, iterations = torch.linalg.qr(start.to(covariance)).Q, COLD_ITERATIONS
            space = power_iteration(covariance, basis, iterations)
            self.bases[side] = torch.where(resolved & space.basis.isfinite().all(), space.basis, basis)
        # rounding noise has no directions
        return replace(space, values=torch.where(resolved, space.values, 0))

    def _columns(self, a: Moments, b: Moments) -> tuple[Tensor, Tensor]:
        """Centred covariance and resolution of the columns of all 2N rows: one mean, or with `center` a mean a side."""
        if not self.center:
            both = a + b
            return both.covariance(center=True), both.resolution(center=True)
        return tuple(
            (x + y) / 2 for x, y in zip(*((m.covariance(True), m.resolution(True)) for m in (a, b)), strict=True)
        )

    @torch.no_grad()
    def _remember_mean(self, a: Moments, b: Moments) -> None:
        """The next step's shift: near the mean, the same on all ranks, and finite."""
        mean = (a.mean + b.mean) / 2
        if self.shift is None:
            self.shift = torch.where(a.shift.isfinite().all(), a.shift, 0)
        self.shift = torch.where(mean.isfinite().all() & (a.count > 0), mean, self.shift)
