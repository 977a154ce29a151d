"""Elementary functions that Triton has not, or not exact near 0, in fp32: from exp, log and sums, for every target.

expm1(x)     Taylor's sum up to x⁸ where |x| < 0.35 (what is left out is below 2⁻³²), else e^x − 1.
log1p(x)     2 artanh(s), s = x / (2 + x), by its series up to s¹⁵ where |s| ≤ ⅓, which is −½ ≤ x ≤ 1; else log(1 + x).
tanh(x)      −t / (t + 2) with t = expm1(−2|x|), and the sign of x.
sech2(x)     tanh'(x) = 1 − tanh²(x) = 4e / (1 + e)² with e = e^(−2|x|): nothing cancels.
softplus(x)  log(1 + e^x) = max(x, 0) + log1p(e^(−|x|)): nothing overflows. Its derivative is σ(x).
"""

from sloth.kernels.common.language import tl, triton


@triton.jit
def expm1(x):
    near = 1.0 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320)))))))
    return tl.where(tl.abs(x) < 0.35, x * near, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    inside = (x >= -0.5) & (x <= 1.0)
    s = tl.where(inside, x / (2.0 + x), 0.0)
    q = s * s
    near = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return tl.where(inside, 2.0 * s * near, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    t = expm1(-2.0 * tl.abs(x))
    y = -t / (t + 2.0)
    return tl.where(x < 0, -y, y)


@triton.jit
def sech2(x):
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def softplus(x):
    return tl.where(x < 0, 0.0, x) + log1p(tl.exp(-tl.abs(x)))
