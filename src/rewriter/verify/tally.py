"""Errors counted, and compared: ours against eager's, both against fp64, with an interval.

The ratio of two errors is ‖ours − exact‖ / max(‖eager − exact‖, ‖round(exact) − exact‖), as `sloth.testing.assert_no_worse` has
it. Errors are rounding, so the ratio is a draw from what the code gives; over clusters i with squares a_i of ours and b_i of
eager's

    log ratio = ½ log(Σa / Σb),    var(log ratio) ≈ ¼ Σ (a_i/Σa − b_i/Σb)²

(delta method, clusters taken for independent), Student's quantile for few. Of fewer than 4 clusters, or where the sum is that of
fewer than 3 of them, the F distribution of as many degrees of freedom says how far equally good results may lie apart.

Clusters are draws: within one, rounding is not independent. Where numbers are all alike (the probabilities of a fresh model), so
are their roundings, and one code hits a power of two where the other just misses it: a factor of up to 2, since that is how far
relative rounding varies between powers of two. Of a single draw rows are the clusters, and the limit is twice as high.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from sloth.rewriter.verify.limit import LIMIT, least, unit

SLACK = 4.0  # ulps of fp32 of the norm, for sums that are taken in another order
AT_ONCE = 1 << 24  # elements that are compared at a time
FEW = 4  # clusters: of fewer no spread can be told


@dataclass
class Tally:
    """Squared errors of one result, by cluster: ours, eager's, and the rounding of the exact result; squares: of its norm.
    single: of one draw.
    """

    single: bool = False
    ours: list[torch.Tensor] = field(default_factory=list)
    eager: list[torch.Tensor] = field(default_factory=list)
    rounding: list[torch.Tensor] = field(default_factory=list)
    squares: float = 0.0
    unit: float = unit(torch.float32)

    def add(self, ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
        """One draw. Where fp64 itself is not finite nothing is asked."""
        width = exact.shape[-1] if exact.dim() > 1 else 1
        found: list[list[torch.Tensor]] = [[], [], []]
        step = max(1, AT_ONCE // max(width, 1))
        rows = [t.detach().reshape(-1, width) for t in (ours, eager, exact)]
        for start in range(0, len(rows[2]), step):
            a, b, e = (t[start : start + step] for t in rows)
            e = e.double()
            asked = torch.isfinite(e)
            self.squares += e.where(asked, 0.0).square().sum().item()
            for errors, t in zip(found, (a, b, e.to(eager.dtype)), strict=True):
                d = (t.double() - e).where(asked, 0.0)
                errors.append(torch.nan_to_num(d, nan=math.inf).square().sum(-1).cpu())
        for errors, new in zip((self.ours, self.eager, self.rounding), found, strict=True):
            errors.append(torch.cat(new) if self.single else torch.cat(new).sum()[None])
        if eager.dtype == torch.float64:
            self.unit = unit(eager.dtype)

    def judged(self) -> Ratio:
        a, b, r = (torch.cat(kind) for kind in (self.ours, self.eager, self.rounding))
        limit = 2 * LIMIT if self.single else LIMIT
        norm = math.sqrt(self.squares)
        ours, eager, rounding = (math.sqrt(t.sum().item()) for t in (a, b, r))
        b = b if eager >= rounding else r
        held, slack = least(eager, rounding), SLACK * self.unit * norm
        ratio = _over(ours, held)
        if ours <= limit * held + slack or math.isinf(held):
            return Ratio(ours, eager, norm, ratio, 0.0, math.inf, limit)
        width = _width(a, b) if math.isfinite(ours) and held > 0 else 0.0
        beyond = _over(ours - slack, held)  # what sums in another order do not explain
        return Ratio(ours, eager, norm, ratio, beyond * math.exp(-width), ratio * math.exp(width), limit)


def _over(a: float, b: float) -> float:
    return a / b if b else (math.inf if a else 1.0)


def _width(a: torch.Tensor, b: torch.Tensor) -> float:
    """Half of the 99.9 % interval of the log ratio."""
    n = len(a)
    that_count = (a.sum().square() / a.square().sum()).item()  # one draw in which an expert was another is one, not many
    if n < FEW or that_count < FEW - 1:
        return 3.5 / math.sqrt(min(n, that_count) - 0.7)  # F(n, n) has 0.999 of its mass below exp(2 · this)
    spread = (a / a.sum() - b / b.sum()).square().sum().item() * n / (n - 1)
    return _student(n - 1) * 0.5 * math.sqrt(spread)


def _student(df: int) -> float:
    """The 0.9995 quantile of Student's t (Cornish-Fisher; Abramowitz and Stegun 26.7.5)."""
    z = 3.2905
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(t / df ** (i + 1) for i, t in enumerate(terms))


@dataclass(frozen=True)
class Ratio:
    """errors, and the norm of the exact result; ratio of errors, and its interval. `low` is 0 where the ratio is within the
    limit.
    """

    ours: float
    eager: float
    norm: float
    ratio: float
    low: float
    high: float
    limit: float

    @property
    def worse(self) -> bool:
        """Is it beyond the limit, interval and all?"""
        return self.low > self.limit

    @property
    def open(self) -> bool:
        """Is it beyond the limit, but not beyond doubt?"""
        return 0 < self.low <= self.limit
