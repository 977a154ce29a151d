"""Formulas: their derivatives, the kernels that are written for them, and both beside the eager code that they stand for."""

import random

import pytest
import sympy
import torch
import torch.nn.functional as F
from common import DEVICE, compare, make
from recorder import interpret

from sloth.kernels import gated_formula as module
from sloth.kernels.common import special
from sloth.kernels.common.language import tl, triton
from sloth.kernels.formula import OPS, SLOPES, FormulaError, Steps, backward, evaluate, formula
from sloth.kernels.gated_formula import EXAMPLES, gated_formula
from sloth.patterns.gated_formula import TERMS

X = sympy.Symbol("x", real=True)
DEFINITIONS = {
    "abs": sympy.Abs(X), "exp": sympy.exp(X), "expm1": sympy.exp(X) - 1, "log": sympy.log(X), "log1p": sympy.log(1 + X),
    "sqrt": sympy.sqrt(X), "rsqrt": 1 / sympy.sqrt(X), "sin": sympy.sin(X), "cos": sympy.cos(X), "erf": sympy.erf(X),
    "sigmoid": 1 / (1 + sympy.exp(-X)), "tanh": sympy.tanh(X), "softplus": sympy.log(1 + sympy.exp(X)),
}  # fmt: skip


def test_slopes_are_the_derivatives():
    """Of each function, sympy's derivative of its definition, and its values."""
    assert DEFINITIONS.keys() == SLOPES.keys()
    x = torch.tensor([0.3, 1.7, 4.1], dtype=torch.double)
    for op, definition in DEFINITIONS.items():
        y = OPS[op].aten(x)
        steps = Steps()
        names = {name: steps.add(name) for name in ("a", "y")}
        slope = steps.read(SLOPES[op], names)
        (found,) = evaluate(formula("neg(g)")._replace(steps=tuple(steps.steps), results=(slope,)), a=x, y=y)
        for i, at in enumerate(x.tolist()):
            assert abs(float(definition.subs(X, at)) - y[i]) < 1e-12, op
            assert abs(float(definition.diff(X).subs(X, at)) - found[i]) < 1e-12, op


def test_a_formula_is_differentiated_as_sympy_does():
    """Quick GELU, clamped, times a square root: the whole chain rule, by both tensors."""
    g, u = sympy.symbols("g u", real=True)
    a, b = g / (1 + sympy.exp(-1.702 * g)), sympy.sqrt(u**2 + 3) + u
    text = "mul(mul(g,sigmoid(mul(1.702,clamp(g,-5.0,7.0)))),add(sqrt(add(mul(u,u),3.0)),u))"
    one = torch.ones(1, dtype=torch.double)
    for at in ((0.7, -1.1), (-3.0, 2.0)):
        found = evaluate(backward(text, True, True), dh=one, g=at[0] * one, u=at[1] * one)
        wanted = [(a * b).diff(v).subs({g: at[0], u: at[1]}) for v in (g, u)]
        assert [float(x) for x in found] == pytest.approx([float(x) for x in wanted], rel=1e-12)


DRAWN = ["add", "sub", "mul", "neg", "abs", "sin", "cos", "erf", "sigmoid", "tanh", "softplus", "relu", "clamp", "select"]


def drawn(dice: random.Random, depth: int) -> str:
    """A formula of g and u whose steps are smooth, or have kinks nobody hits."""
    if depth == 0:
        return dice.choice("gu")
    op = dice.choice(
        ["add", "sub", "mul", "neg", "abs", "sin", "cos", "erf", "sigmoid", "tanh", "softplus", "relu", "clamp", "select"]
    )
    below = [drawn(dice, depth - 1) for _ in range(OPS[op].operands)]
    if op in ("add", "mul") and dice.random() < 0.3:
        below[1] = "0.75"
    numbers = ["-0.8", "0.6"][: OPS[op].numbers]
    below[0] = f"positive({below[0]})" if op == "select" else below[0]
    return f"{op}({','.join([*below, *numbers])})"


@pytest.mark.parametrize("seed", range(40))
def test_random_formulas(seed):
    """Gradients, both or one alone, are autograd's of the same steps."""
    dice = random.Random(seed)
    text = f"mul({drawn(dice, 3)},add(g,{drawn(dice, 2)}))"
    g, u, dh = (make((2, 5), torch.double, seed=64 * seed + i, device="cpu") for i in range(3))
    leaves = [g.requires_grad_(), u.requires_grad_()]
    (h,) = evaluate(formula(text), g=g, u=u)
    wanted = torch.autograd.grad(h, leaves, dh, allow_unused=True)
    for need in ((True, True), (True, False), (False, True)):
        found = evaluate(backward(text, *need), dh=dh, g=g.detach(), u=u.detach())
        for a, b in zip(found, (w for w, n in zip(wanted, need, strict=True) if n), strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("text", EXAMPLES)
def test_gradcheck(text):
    for need in ((True, True), (True, False), (False, True)):
        g, u = (make((3, 7), torch.double, seed=i, scale=2.0).requires_grad_(n) for i, n in enumerate(need))
        assert torch.autograd.gradcheck(lambda g, u: gated_formula(g, u, text), (g, u))
    torch.library.opcheck(
        gated_formula, (make((3, 7), torch.float32, seed=5).requires_grad_(), make((3, 7), torch.float32), text)
    )


def gpt_oss(g, u):
    c = g.clamp(max=7.0)
    return c * torch.sigmoid(1.702 * c) * (u.clamp(-7.0, 7.0) + 1)


FUNCTIONS = {
    EXAMPLES[0]: gpt_oss,
    EXAMPLES[1]: lambda g, u: F.mish(g) * u,
    "mul(tanh(g),u)": lambda g, u: torch.tanh(g) * u,
    "mul(softplus(g),u)": lambda g, u: F.softplus(g) * u,
    "mul(neg(softplus(neg(g))),u)": lambda g, u: F.logsigmoid(g) * u,
    "mul(select(positive(g),g,expm1(clamp(g,-inf,0.0))),u)": lambda g, u: F.elu(g) * u,
    "mul(mul(g,sigmoid(mul(1.3,g))),u)": lambda g, u: g * torch.sigmoid(1.3 * g) * u,
    "mul(mul(g,mul(0.5,add(erf(mul(g,0.7071067811865476)),1.0))),u)": lambda g, u: F.gelu(g) * u,
    "mul(div(mul(15.0,g),sqrt(add(mul(g,g),225.0))),u)": lambda g, u: 15 * g / torch.sqrt(g * g + 225) * u,
    "mul(log1p(abs(g)),u)": lambda g, u: torch.log1p(g.abs()) * u,
}


@pytest.mark.covered(1)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 40.0])
@pytest.mark.parametrize("text", FUNCTIONS)
def test_as_exact_as_eager(text, scale):
    """Near 0, and where functions are flat or overflow; by ATen, and by the kernels. Where eager is finite, so is this."""
    eager = FUNCTIONS[text]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        g, u = make((4, 513), dtype, "padded", seed=3, scale=scale), make((4, 513), dtype, seed=4)
        for kernels in (False, True):
            if kernels and dtype == torch.bfloat16 and DEVICE == "cpu":
                continue  # the interpreter does not round to it
            with interpret(kernels):
                compare(lambda g, u: gated_formula(g, u, text), eager, [g, u])
                edges = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 88.0, -88.0, 3e4, -3e4], device=DEVICE).to(dtype)
                leaves = [[edges.clone().requires_grad_(), torch.ones_like(edges).requires_grad_()] for _ in range(2)]
                ours, theirs = gated_formula(*leaves[0], text), eager(*leaves[1])
                ours.sum().backward()
                theirs.sum().backward()
            for a, b in zip((ours, *(x.grad for x in leaves[0])), (theirs, *(x.grad for x in leaves[1])), strict=True):
                assert bool((a.isfinite() | ~b.isfinite()).all()), (dtype, kernels, a, b)


@triton.jit
def _apply(x_ptr, y_ptr, N: tl.constexpr, OP: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    if OP == "expm1":
        y = special.expm1(x)
    elif OP == "log1p":
        y = special.log1p(x)
    elif OP == "tanh":
        y = special.tanh(x)
    elif OP == "sech2":
        y = special.sech2(x)
    else:
        y = special.softplus(x)
    tl.store(y_ptr + at, y)


@pytest.mark.parametrize("op", ["expm1", "log1p", "tanh", "sech2", "softplus"])
@pytest.mark.parametrize("around", [1e-6, 0.03, 0.3, 1.0, 8.0, 60.0])
def test_special_functions(op, around):
    """Within a few units in the last place, at every distance from 0."""
    x = torch.linspace(-around, around, 512, device=DEVICE)
    x = x.clamp(min=-0.99) if op == "log1p" else x
    y = torch.empty_like(x)
    _apply[(1,)](x, y, x.numel(), op)
    exact = OPS[op].aten(x.double())
    exact = torch.log1p(x.double().exp()) if op == "softplus" else exact  # torch's is cut off at 20
    units = 8 + 4 * x.abs() if DEVICE == "cuda" else 8  # there e^x is 2^(x log₂ e), whose exponent is rounded
    assert ((y - exact).abs() <= units * 2.0**-24 * exact.abs() + 1e-38).all()


@pytest.mark.parametrize(
    "text, told",
    [("mul(g,", "too early"), ("exec(g)", "neither a function"), ("mul(g)", "takes 2"), ("mul(g,u)u", "behind the end"),
     ("clamp(g,u,1.0)", "where a number belongs"), ("mul(2.0,3.0)", "numbers alone"), ("g", "computes nothing"),
     ('mul(g,u)"""\nimport os', "behind the end"), ("mul(g,__import__)", "neither"), ("1.0", "computes nothing")],
)  # fmt: skip
def test_what_is_no_formula(text, told):
    with pytest.raises(FormulaError, match=told):
        formula(text)
    with pytest.raises(FormulaError):
        module.source(text)


@pytest.mark.parametrize("name, holds", [("gt", torch.gt), ("ge", torch.ge), ("lt", torch.lt), ("le", torch.le)])
def test_comparisons_are_those_of_torch(name, holds):
    """Of what is no number nothing is true: a run that diverges must show it."""
    x = torch.tensor([-1.0, 0.5, 2.0, float("nan"), float("inf"), -float("inf")])
    (found,) = evaluate(formula(TERMS[name]("g", "0.5")), g=x, u=x)
    assert torch.equal(found > 0, holds(x, 0.5))


def test_what_has_no_derivative_says_so():
    with pytest.raises(FormulaError, match="neither a function"):
        formula("mul(g,nan)")
    with pytest.raises(FormulaError, match="sech2 has no derivative"):
        backward("mul(sech2(g),u)", True, True)
