"""What rounding does to embeddings and their variances."""

import torch
from torch import Tensor


def full_precision(z: Tensor) -> Tensor:
    """Widen half precision to float32; float32 and float64 stay as they are."""
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def rounding_variance(shift: Tensor, square: Tensor, *, center: bool) -> Tensor:
    """Variance (d,) below which a column is constant to rounding, so that its direction is noise.

    `square` (d,) is the mean square of the columns about `shift`, the constant that was subtracted before summing.
    Uncentred columns are no differences: the threshold is the smallest normal number.
    """
    tiny = torch.finfo(shift.dtype).tiny
    if not center:
        return torch.full_like(shift, tiny)
    eps = 16 * torch.finfo(shift.dtype).eps
    rounding = eps * square + (eps * shift).square()
    # a column far below the others is none: some checkpoints have such, and 1 / variance would overflow
    rounding = rounding + eps**2 * square.mean()
    return rounding.detach() + tiny
