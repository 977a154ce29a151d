"""What error a result may have: 1.05 times eager's, against fp64."""

import torch

LIMIT = 1.05


def least(eager: float, rounding: float) -> float:
    """The error that ours is held against: eager's, or, where eager is lucky, that of the exact result rounded to its dtype."""
    return max(eager, rounding)


def unit(dtype: torch.dtype) -> float:
    """One ulp of what sums are taken in: fp64 for fp64, else fp32. Sums in another order are some of it off."""
    return 2.0**-52 if dtype == torch.float64 else 2.0**-23
