"""The paper's three terms (sections 4.2 to 4.4), of a covariance Sigma (d, d) and of the rows of an embedding Z (N, d)."""

import torch
from torch import Tensor

from hf_densefeat.objective.precision import full_precision, rounding_variance
from hf_densefeat.objective.subspace import (
    check_dimension,
    eigenspace_of_rows,
    subspace_distance_squared,
    warn_if_unsupported,
)

# ---- Of covariances; subspace consistency is `subspace.subspace_distance_squared` ------------------------------------


def spectral_spreading(covariance: Tensor, dimension: int, resolution: Tensor) -> Tensor:
    """L_spec = ||Sigma / tr Sigma - I/d||_F^2 = ||Sigma||_F^2 / (tr Sigma)^2 - 1/d (paper 4.2, A.1), in [0, 1 - 1/d].

    The Gram matrix Z Z^T / N has the same non-zero eigenvalues and serves as well. Where the trace is at most
    `resolution` there is no variance and no spectrum: the value is 1 - 1/d, that of rank one, without gradient.
    """
    trace = covariance.trace()
    resolved = trace > resolution
    normalised = covariance / torch.where(resolved, trace, 1)
    return torch.where(trace <= resolution, 1, normalised.square().sum()) - 1 / dimension


def orthogonality(covariance: Tensor, resolution: Tensor) -> Tensor:
    """L_orth = ||corr - I||_F^2 of a centred Sigma (paper 4.4), corr_ij^2 = Sigma_ij^2 / (Sigma_ii Sigma_jj).

    In [0, d (d - 1)]. A column whose variance is at most `resolution` (d,) standardises to zeros and adds the 1 of its
    missing diagonal, without gradient.
    """
    variance = covariance.diagonal()
    varies = variance > resolution
    trace = torch.where(varies, variance, 0).sum()
    unit = torch.where(varies.any(), trace, 1)  # squares of small numbers underflow
    inverse = torch.where(varies, unit / torch.where(varies, variance, 1), 0)
    # corr_jj is 1 or 0, without gradient: ||corr - I||^2 = ||corr||^2 + d - 2 tr corr
    return inverse @ (covariance / unit).square() @ inverse + len(variance) - 2 * varies.sum()


# ---- Of embeddings ---------------------------------------------------------------------------------------------------


def spectral_spreading_loss(z: Tensor, *, center: bool = False) -> Tensor:
    """L_spec = ||Sigma / tr Sigma - I/d||_F^2 with Sigma = Z^T Z / N (paper 4.2), for Z (N, d); in [0, 1 - 1/d].

    0 for an isotropic Sigma, 1 - 1/d for rank one; rotation- and scale-invariant; no eigendecomposition. `center`
    subtracts the mean first. A batch without variance (all zeros; one row or equal rows if centred) reads 1 - 1/d, with
    zero gradient. With N < d the value is at least 1/N - 1/d. Raises ValueError for no rows and for other shapes.
    """
    (z,) = _checked(z)
    with torch.autocast(z.device.type, enabled=False):
        rows = z - z.mean(0) if center else z
        second = (rows @ rows.mT if len(z) < z.shape[1] else rows.mT @ rows) / len(z)
        return spectral_spreading(second, z.shape[1], _resolution(z, center).sum())


def subspace_consistency_loss(
    z_a: Tensor, z_b: Tensor, k: int, *, center: bool = False, broadening: float = 0.0
) -> Tensor:
    """L_sub = ||U_a U_a^T - U_b U_b^T||_F^2 (paper 4.3), U the leading k right singular vectors of Z (N, d); in [0, 2k].

    Equals 2k - 2 ||U_a^T U_b||_F^2, twice the sum of squared sines of `scipy.linalg.subspace_angles` (A.2). Gradients
    are those of the projectors, exact for `broadening=0` and finite at ties; see `subspace_distance_squared`. With fewer
    than k directions of variance (N < k, collapse) the subspaces have as many dimensions as there are: a warning says so
    when N alone forces it. Raises ValueError for k outside 1..d, for no rows and for other shapes.
    """
    z_a, z_b = _checked(z_a, z_b)
    check_dimension(k, z_a.shape[1])
    warn_if_unsupported(k, min(len(z_a), len(z_b)) - center)
    with torch.autocast(z_a.device.type, enabled=False):
        if center:
            z_a, z_b = (torch.where(_varies(z), z - z.mean(0), 0) for z in (z_a, z_b))
        (cov_a, a), (cov_b, b) = ((z.mT @ z / len(z), eigenspace_of_rows(z.detach())) for z in (z_a, z_b))
        return subspace_distance_squared(cov_a, cov_b, a, b, k, broadening)


def orthogonality_loss(z: Tensor) -> Tensor:
    """L_orth = ||Z_B^T Z_B / B - I||_F^2, columns of Z_B (B, d) standardised with the biased variance (paper 4.4).

    The squared Frobenius norm of `np.corrcoef(z.T) - I`, in [0, d (d - 1)]. Independent features read d (d - 1) / (B - 1)
    on average. A constant column (each of them, for one row) standardises to zeros and adds 1, with zero gradient:
    collapse is not seen here, only by L_spec. Raises ValueError for no rows and for other shapes.
    """
    (z,) = _checked(z)
    with torch.autocast(z.device.type, enabled=False):
        rows = z - z.mean(0)
        return orthogonality(rows.mT @ rows / len(z), _resolution(z, center=True))


def _checked(*sides: Tensor) -> tuple[Tensor, ...]:
    """Matrices of one width with at least one row, in float32 or wider."""
    shapes = [tuple(z.shape) for z in sides]
    if any(len(shape) != 2 or shape[0] == 0 or shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError(f"Expected embeddings of shape (n, d), n >= 1, but got {', '.join(map(str, shapes))}.")
    return tuple(full_precision(z) for z in sides)


def _resolution(z: Tensor, center: bool) -> Tensor:
    mean = z.detach().mean(0)
    return rounding_variance(mean, (z.detach() - mean).square().mean(0), center=center)


def _varies(z: Tensor) -> Tensor:
    """Whether the rows differ by more than rounding."""
    rows = z.detach() - z.detach().mean(0)
    return rows.square().mean(0).sum() > _resolution(z, center=True).sum()
