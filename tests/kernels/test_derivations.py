"""Proofs that no operator's own file has: identities that kernels rely on, and gradients that are made of several operators'.

docs/derivations.md lists every operator with its formula and the test that proves it; that the list is whole is tested here.
"""

import re
from pathlib import Path

import pytest
import sympy
import torch

from sloth.rewriter.match.registry import patterns

PAGE = Path(__file__).parent.parent.parent / "docs" / "derivations.md"
TESTS = Path(__file__).parent.parent
exp, log, Rational = sympy.exp, sympy.log, sympy.Rational


def symbols(name, rows, columns):
    return sympy.Matrix(rows, columns, lambda i, j: sympy.Symbol(f"{name}_{i}{j}", real=True))


def values(*of):
    """Rational numbers for all symbols in these, none like another."""
    found = sorted({s for e in of for s in e.free_symbols}, key=str)
    return {s: Rational((i * 37) % 23 - 11, 7 + 2 * i) or Rational(1, 3) for i, s in enumerate(found)}


def assert_derivative(loss, matrix, claimed):
    """To 30 digits, at a point."""
    for found, formula in zip(matrix.applyfunc(lambda v: sympy.diff(loss, v)), claimed, strict=True):
        point = values(found, formula)
        assert abs(sympy.N((found - formula).subs(point), 30)) < 1e-25


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("sink", [False, True])
def test_softmax_is_merged_online(sink):
    """Of two tiles, whatever m and m' are (they cancel): l' = l·e^(m−m') + Σ e^(s−m'), out' alike. In the end out/l is the mean
    of values that the softmax weighs, and m + log l the logarithm of the sum. A sink is a tile of one score whose value is 0:
    m = sink, l = 1.
    """
    s, v, m = sympy.symbols("s:4", real=True), sympy.symbols("v:4", real=True), sympy.symbols("m:3", real=True)
    low, total, out = (s[3], sympy.Integer(1), 0) if sink else (m[0], sympy.Integer(0), 0)
    for new, tile in ((m[1], (0, 1)), (m[2], (2,))):
        total = total * exp(low - new) + sum(exp(s[j] - new) for j in tile)
        out = out * exp(low - new) + sum(exp(s[j] - new) * v[j] for j in tile)
        low = new
    seen = sum(exp(s[j]) for j in range(3)) + (exp(s[3]) if sink else 0)
    assert sympy.simplify(total * exp(low) - seen) == 0
    assert sympy.simplify(out / total - sum(exp(s[j]) * v[j] for j in range(3)) / seen) == 0


def test_the_likelihood_in_the_order_that_keeps_small_losses_exact():
    """log l + (m − z_t) = lse − z_t, and the softmax is e^(z − lse), with lse in two parts too."""
    z, m, t = sympy.symbols("z:3", real=True), sympy.Symbol("m", real=True), 1
    low = sympy.Symbol("low", real=True)
    part = sum(exp(zj - m) for zj in z)
    lse = log(sum(map(exp, z)))
    point = values(part)
    assert abs(sympy.N(((log(part) + (m - z[t])) - (lse - z[t])).subs(point), 40)) < 1e-35
    assert sympy.simplify(exp(z[0] - (m + log(part))) - exp(z[0]) / sum(map(exp, z))) == 0
    assert sympy.simplify(exp((z[0] - (lse - low)) - low) - exp(z[0] - lse)) == 0


def test_probabilities_are_made_again_from_the_logarithm_of_their_sum():
    """p = e^(s − L) is the forward pass's; so Σ p = 1, and δ = Σ p dp is g·out: out is all that is read of the values."""
    s, v, g = sympy.symbols("s:3", real=True), symbols("v", 2, 3), symbols("g", 2, 1)
    L = log(sum(map(exp, s)))
    p = [exp(x - L) for x in s]
    out = sum((pj * v[:, j] for j, pj in enumerate(p)), sympy.zeros(2, 1))
    assert sympy.simplify(sum(p)) == 1
    assert sympy.simplify(sum(pj * g.dot(v[:, j]) for j, pj in enumerate(p)) - g.dot(out)) == 0


def test_a_bias_of_queries_changes_no_probability():
    """ALiBi: bias_j − bias_i is added where the model adds bias_j."""
    s, b, i = sympy.symbols("s:3", real=True), sympy.symbols("b:3", real=True), 1
    ours = [exp(sj + bj - b[i]) for sj, bj in zip(s, b, strict=True)]
    theirs = [exp(sj + bj) for sj, bj in zip(s, b, strict=True)]
    for a, e in zip(ours, theirs, strict=True):
        assert sympy.simplify(a / sum(ours) - e / sum(theirs)) == 0


def test_smoothed_likelihoods_are_added_up_without_their_offset():
    """Σ w_j (lse − z_j) = W · nll − D"""
    z, w = sympy.symbols("z:3", real=True), sympy.symbols("w:3", real=True)
    lse, t = sympy.Symbol("lse"), 1
    D = sum(wj * (zj - z[t]) for wj, zj in zip(w, z, strict=True))
    left = sum(wj * (lse - zj) for wj, zj in zip(w, z, strict=True))
    assert sympy.expand(left - (sum(w) * (lse - z[t]) - D)) == 0


def test_adapters_that_read_the_same_are_one_product():
    """[A₁; A₂] x is both, and the gradients of x add up to [u₁ u₂] [A₁; A₂]."""
    x, a, b = symbols("x", 2, 3), symbols("a", 1, 3), symbols("b", 2, 3)
    u, w = symbols("u", 2, 1), symbols("w", 2, 2)
    both = a.col_join(b)
    assert x * both.T == (x * a.T).row_join(x * b.T)
    assert (u.row_join(w) * both - (u * a + w * b)).expand() == sympy.zeros(2, 3)


def test_the_activation_and_its_derivative_share_a_sigmoid():
    """act' of SiLU from s = act / g alone; and what is written over u is du = dh · act(g), which needs no u."""
    g, u = sympy.symbols("g u", real=True)
    s = 1 / (1 + exp(-g))
    assert sympy.simplify(sympy.diff(g * s, g) - s * (1 + g * (1 - s))) == 0
    assert not sympy.diff(g * s * u, u).has(u)


# ---------------------------------------------------------------- operators that are made of others


def test_a_norm_behind_an_addition():
    """dx = dresidual = dh + r (m − x̂ mean(m x̂)), with dh the gradient that the residual stream h brings."""
    x, res, w, g, dh = (symbols(n, 1, 2) for n in ("x", "res", "w", "g", "dh"))
    eps = sympy.Symbol("eps", positive=True)
    h = x + res
    r = 1 / sympy.sqrt(h.dot(h) / 2 + eps)
    loss = g.dot((h * r).multiply_elementwise(w)) + dh.dot(h)
    m, hat = g.multiply_elementwise(w), h * r
    claimed = dh + r * (m - hat * (m.dot(hat) / 2))
    assert_derivative(loss, x, claimed)
    assert_derivative(loss, res, claimed)
    assert_derivative(loss, w, g.multiply_elementwise(hat))


def test_a_packed_gate():
    """dx = [dg | du]"""
    x, dh = symbols("x", 1, 4), symbols("d", 1, 2)
    s = [1 / (1 + exp(-x[i])) for i in (0, 1)]
    loss = sum(dh[i] * x[i] * s[i] * x[i + 2] for i in (0, 1))
    dg = [dh[i] * x[i + 2] * s[i] * (1 + x[i] * (1 - s[i])) for i in (0, 1)]
    assert_derivative(loss, x, sympy.Matrix([[*dg, *(dh[i] * x[i] * s[i] for i in (0, 1))]]))


@pytest.mark.parametrize("each", [False, True], ids=["one loss", "a loss for each row"])
def test_a_head_and_its_loss(each):
    """dh = dz W, dW = dzᵀ h, db = Σ dz, dt = s dz U, dU = s dzᵀ t, with dz of cross_entropy.py's formula, of rows in two chunks;
    a power of two that dz carries comes out of all of them.
    """
    N, H, V, r = 2, 2, 3, 1
    h, W, b = symbols("h", N, H), symbols("W", V, H), symbols("b", 1, V)
    t, U, s, a = symbols("t", N, r), symbols("U", V, r), sympy.Symbol("s", real=True), sympy.Symbol("a", positive=True)
    G = symbols("G", N, 1) if each else sympy.ones(N, 1) * sympy.Symbol("G", real=True)
    target = (2, 0)
    z = a * (h * W.T + sympy.ones(N, 1) * b + s * t * U.T)
    lse = [log(sum(exp(z[n, j]) for j in range(V))) for n in range(N)]
    loss = sum(G[n] * (lse[n] - z[n, target[n]]) for n in range(N))
    power = 2**7
    dz = sympy.Matrix(N, V, lambda n, j: power * a * G[n] * (exp(z[n, j] - lse[n]) - int(j == target[n])))
    chunks = [(dz[n, :], h[n, :], t[n, :]) for n in range(N)]
    zero = sympy.zeros
    dW = sum((d.T * x for d, x, _ in chunks), zero(V, H)) / power
    dU = s * sum((d.T * y for d, _, y in chunks), zero(V, r)) / power
    db = sum((d for d, _, _ in chunks), zero(1, V)) / power
    for matrix, claimed in ((h, dz * W / power), (W, dW), (b, db), (t, s * dz * U / power), (U, dU)):
        assert_derivative(loss, matrix, claimed)


def test_a_slab_of_the_vocabulary_needs_no_other():
    """Lean: dW of some words is made of their logits and of the rows' lse, which all words gave."""
    h, W = symbols("h", 2, 2), symbols("W", 3, 2)
    z, target = h * W.T, (2, 0)
    lse = [log(sum(exp(z[n, j]) for j in range(3))) for n in range(2)]
    loss = sum(lse[n] - z[n, target[n]] for n in range(2))
    words = W[1:, :]
    slab = h * words.T
    dz = sympy.Matrix(2, 2, lambda n, j: exp(slab[n, j] - lse[n]) - int(j + 1 == target[n]))
    assert_derivative(loss, words, dz.T * h)


def test_queries_that_see_nothing_weigh_all_keys_alike():
    """p = 1/T and the gradient of a sum that swallowed x: ds = p (dp − δ), which is that of the softmax at equal scores."""
    x, v, g = sympy.symbols("x:3", real=True), sympy.symbols("v:3", real=True), sympy.Symbol("g", real=True)
    total = sum(map(exp, x))
    loss = g * sum(exp(xj) / total * vj for xj, vj in zip(x, v, strict=True))
    alike = dict.fromkeys(x, 0)
    mean = sum(v) / 3
    for j in range(3):
        assert sympy.simplify(sympy.diff(loss, x[j]).subs(alike) - g * (v[j] - mean) / 3) == 0


# ---------------------------------------------------------------- the page


def rows():
    return re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE)


def test_the_page_lists_every_operator():
    known = {str(p.op).split(".")[1] for p in patterns() if str(p.op).startswith("sloth.")}
    assert known <= {name for name, _ in rows()}, "docs/derivations.md: a row for each operator of the registry"
    assert all(hasattr(torch.ops.sloth, name) for name, _ in rows())


def test_the_page_names_tests_that_exist():
    named = {test for _, row in rows() for test in re.findall(r"`(\w+/test_\w+\.py::\w+)`", row)}
    assert all(re.search(r"`\w+/test_\w+\.py::\w+`", row) for _, row in rows()), "each row names what proves it"
    named |= set(re.findall(r"`(\w+/test_\w+\.py::\w+)`", PAGE.read_text()))
    for test in named:
        file, function = test.split("::")
        assert f"def {function}(" in (TESTS / file).read_text(), test
