"""RoPE in spellings that no entry lists: put together from ways to split, multiply, join and lay out tables."""

import pytest
import torch
from common import DEVICE, cases, compare, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from sloth.kernels.rotation import rotate, rotate_both
from sloth.patterns.rope import ROPE
from sloth.rewriter.backend import listening
from sloth.rewriter.match.registry import patterns
from sloth.rewriter.pipeline import rewrite
from sloth.rewriter.report import MATCHED

B, S, H, D = 2, 5, 3, 8
ENTRIES = [entry for entry in patterns() if entry.construct is ROPE]

# ---------------------------------------------------------------- spellings


def two(x, by):
    """Its last dimension as (2, half) or (half, 2), and which of these is the 2."""
    return (x.unflatten(-1, (2, -1)), -2) if by == "halves" else (x.unflatten(-1, (-1, 2)), -1)


SPLITS = {
    "slices": lambda x, by: (
        (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]) if by == "halves" else (x[..., ::2], x[..., 1::2])
    ),
    "unbind": lambda x, by: two(x, by)[0].unbind(two(x, by)[1]),
    "select": lambda x, by: tuple(two(x, by)[0].select(two(x, by)[1], i) for i in (0, 1)),
    "pieces": lambda x, by: tuple(t.squeeze(two(x, by)[1]) for t in two(x, by)[0].split(1, two(x, by)[1])),
    "complex": lambda x, by: (
        (z := torch.view_as_complex(two(x, by)[0].contiguous())).real, z.imag
    ) if by == "pairs" and x.dtype != torch.bfloat16 else x.chunk(2, -1) if by == "halves" else (x[..., ::2], x[..., 1::2]),
}  # fmt: skip
JOINS = {
    "stack": lambda a, b, by: torch.stack((a, b), -2 if by == "halves" else -1).flatten(-2),
    "cat": lambda a, b, by: (
        torch.cat((a, b), -1) if by == "halves" else torch.cat((a[..., None], b[..., None]), -1).flatten(-2)
    ),
    "complex": lambda a, b, by: (
        torch.view_as_real(torch.complex(a, b)).flatten(-2) if by == "pairs" and a.dtype != torch.bfloat16
        else JOINS["stack"](a, b, by)
    ),
}  # fmt: skip


def matrices(c, s):
    return torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2)


def by_matrix(a, b, c, s):
    m, x = matrices(c, s), torch.stack((a, b), -1)[..., None]
    dtype = torch.promote_types(m.dtype, x.dtype)
    return (m.to(dtype) @ x.to(dtype)).squeeze(-1).unbind(-1)


def by_sum(a, b, c, s):
    return (matrices(c, s) * torch.stack((a, b), -1)[..., None, :]).sum(-1).unbind(-1)


def by_complex(a, b, c, s):
    if a.dtype == torch.bfloat16:
        return a * c - b * s, a * s + b * c
    dtype = torch.promote_types(a.dtype, c.dtype)
    z = torch.complex(a.to(dtype), b.to(dtype)) * torch.complex(c.to(dtype), s.to(dtype))
    return z.real, z.imag


PRODUCTS = {
    "written": lambda a, b, c, s: (a * c - b * s, b * c + a * s),
    "signs": lambda a, b, c, s: (c * a + s * (-b), s * a + c * b),
    "addcmul": lambda a, b, c, s: (torch.addcmul(a * c, b, s, value=-1), torch.addcmul(b * c, s, a)),
    "matrix": by_matrix,
    "sum": by_sum,
    "complex": by_complex,
}
TABLES = {  # of cos and sin, and how the model reads them
    "apart": (lambda c, s: (c, s), lambda c, s: (c, s)),
    "pairs": (lambda c, s: (torch.stack((c, s), -1),), lambda t: (t[..., 0], t[..., 1])),
    "front": (lambda c, s: (torch.stack((c, s)),), lambda t: t.unbind(0)),
    "joined": (lambda c, s: (torch.cat((c, s), -1),), lambda t: t.chunk(2, -1)),
    "angles": (lambda c, s: (torch.atan2(s, c),), lambda t: (t.cos(), t.sin())),
    "complex": (lambda c, s: (torch.complex(c.float(), s.float()),), lambda t: (t.real, t.imag)),
    "twice": (lambda c, s: (torch.cat((c, c), -1), torch.cat((s, s), -1)),
              lambda c, s: (c[..., : c.shape[-1] // 2], s[..., : s.shape[-1] // 2])),
    "rounded": (lambda c, s: (c.float(), s.float()), lambda c, s: (c.bfloat16().to(c.dtype), s.bfloat16().to(s.dtype))),
}  # fmt: skip
LAYOUTS = {
    "BSHD": (B, S, H, D),
    "BHSD": (B, H, S, D),
    "SBHD": (S, B, H, D),
    "SHD": (S, H, D),
    "BSD": (B, S, D),
    "BSGHD": (B, S, 2, H, D),
}
PARTS = {"all": (0, 0), "leading": (0, 4), "trailing": (4, 0)}


def over_heads(t, layout, by_batch):
    """[S, half] or [B, S, half] as it is broadcast to x."""
    if "S" not in layout[: layout.index("D")] or layout == "BSD":
        return t
    t = t if by_batch or layout[0] != "B" else t[None]
    for at, letter in enumerate(layout[:-1]):
        if letter not in "BS" or letter == "B" and layout[0] == "S":
            t = t.unsqueeze(at)
    return t


def spelling(how):
    """f(x, *tables) of these choices."""
    split, join, product, table, layout, part, before, after, twice, wide, inverse, by_batch = how
    read = TABLES[table][1]

    def turned(x, *tables):
        c, s = (over_heads(t, layout, by_batch) for t in read(*tables))
        s = -s if inverse else s
        leading, trailing = PARTS[part][0], PARTS[part][1]
        kept = x[..., :leading], x[..., x.shape[-1] - trailing :]
        given = x[..., leading : x.shape[-1] - trailing]
        moved = given.to(torch.promote_types(x.dtype, torch.float32)) if wide else given
        a, b = SPLITS[split](moved, before)
        if twice and before == after:  # x · cos + rotated · sin, of tables of all channels
            y = moved * JOINS["stack"](c, c, after) + JOINS[join](-b, a, after) * JOINS["cat"](s, s, after)
        else:
            y = JOINS[join](*PRODUCTS[product](a, b, c, s), after)
        y = y.to(x.dtype) if wide else y
        return torch.cat((kept[0], y, kept[1]), -1) if part != "all" else y

    return turned


@st.composite
def choices(draw):
    one = lambda of: draw(st.sampled_from(sorted(of)))  # noqa: E731
    pairing = ("halves", "pairs")
    layout = one(LAYOUTS)
    by_batch = draw(st.booleans()) and layout in ("BSHD", "BSD", "BSGHD")
    return (one(SPLITS), one(JOINS), one(PRODUCTS), one(TABLES), layout, one(PARTS), one(pairing), one(pairing), *draw(
        st.tuples(st.booleans(), st.booleans(), st.booleans())), by_batch)  # fmt: skip


def operands(how, dtype):
    *_, layout, part, _, _, _, _, _, by_batch = how
    x = make(LAYOUTS[layout], dtype, seed=1)
    angle = make((*((B,) if by_batch else ()), S, (D - sum(PARTS[part])) // 2), torch.float32, seed=2)
    dtype = torch.float32 if how[3] in ("complex", "angles", "rounded") else dtype
    return [x, *TABLES[how[3]][0](angle.cos().to(dtype), angle.sin().to(dtype))]


def rewritten(fn, sites, graphs=None, dynamic=False):
    """`fn` compiled with the entries of RoPE alone."""

    def backend(gm, _):
        report = rewrite(gm, ENTRIES, [ROPE])
        assert not report.untouched, report.untouched
        sites.extend(report.sites)
        if graphs is not None:
            graphs.append(gm.graph)
        return gm.forward

    torch._dynamo.reset()
    return torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)


def check(how, dtype):
    fn, sites = spelling(how), []
    tensors = operands(how, dtype)
    compiled = rewritten(fn, sites)
    # Where memory of complex products lies, eager decides by more than x.
    compare(compiled, fn, tensors, [True] + [False] * (len(tensors) - 1), strides=how[0] != "complex")
    # A sum of broadcast products may be read as a product of matrices, which is no rotation: it is left alone, and right.
    assert (sites or how[2] == "sum") and all(s.status == MATCHED for s in sites), (how, sites)


some_dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@settings(cases, max_examples=12)
@given(choices(), some_dtypes)
def test_any_spelling_is_one_rotation(how, dtype):
    check(how, dtype)


@pytest.mark.nightly
@settings(cases, max_examples=200)
@given(choices(), some_dtypes)
def test_many_spellings_are_one_rotation(how, dtype):
    check(how, dtype)


# ---------------------------------------------------------------- what is nearly one


def parts(x):
    return x.chunk(2, -1)


def turned(x, c, s, b_first=None):
    """halves; `b_first`: in place of x's second half, in the first half of the result."""
    a, b = parts(x)
    return torch.cat((a * c - (b if b_first is None else b_first) * s, b * c + a * s), -1)


def swapped(x, c, s, signs):
    a, b = parts(x)
    return x * torch.cat((c, c), -1) + torch.cat((b, a), -1) * torch.cat((s, s), -1) * signs


ODD = {
    "halves exchanged": lambda x, c, s: torch.cat(parts(turned(x, c, s))[::-1], -1),
    "one sign": lambda x, c, s: swapped(x, c, s, 1.0),
    "another sign in each pair": lambda x, c, s: swapped(x, c, s, torch.tensor([1.0, -1.0] * (D // 2))),
    "tables backwards": lambda x, c, s: turned(x, c.flip(-1), s),
    "positions backwards": lambda x, c, s: turned(x, c, s.flip(0)),
    "a channel twice": lambda x, c, s: turned(x, c, s, parts(x)[0]),
    "squared": lambda x, c, s: turned(x, c * c, s),
    "a term more": lambda x, c, s: turned(x, c, s) + x.roll(1, -1),
    "no gradient for one": lambda x, c, s: turned(x, c, s, parts(x.detach())[1]),
    "two tensors": lambda x, c, s: turned(x, c, s, parts(x.sin())[1]),
    "heads of their own": lambda x, c, s: turned(x, c, s) * torch.arange(1.0, H + 1)[:, None, None],
    "rounded on the way": lambda x, c, s: turned(x, c, s).bfloat16().to(x.dtype),
    "written over": lambda x, c, s: turned(x, c, s).mul_(2).add_(x),
    "pairs of pairs": lambda x, c, s: torch.cat((x[..., 2:4], x[..., 4:], x[..., :2]), -1) * torch.cat((s, s), -1)
    + x * torch.cat((c, c), -1),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_is_nearly_one_keeps_its_meaning(name):
    """Matched or not, what is computed is what the code says."""
    fn = lambda x, c, s: ODD[name](x, c, s)  # noqa: E731
    tensors = [make((B, H, S, D), torch.float32, seed=1), *(make((S, D // 2), torch.float32, seed=seed) for seed in (2, 3))]
    compare(rewritten(fn, []), fn, tensors, [True, False, False], strides=name != "written over")


# ---------------------------------------------------------------- in a model


class Attention(nn.Module):
    """q and k of one layer, turned as complex numbers."""

    def __init__(self, checkpointed):
        super().__init__()
        self.q, self.k = nn.Linear(16, 4 * D), nn.Linear(16, 2 * D)
        self.checkpointed = checkpointed

    def turned(self, h, cis):
        return torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (-1, 2))) * cis).flatten(-2)

    def heads(self, x, cis):
        q, k = (self.turned(p(x).view(*x.shape[:2], -1, D), cis) for p in (self.q, self.k))
        return q.sum(2) * k.sum(2)

    def forward(self, x, cis):
        return checkpoint(self.heads, x, cis, use_reentrant=False) if self.checkpointed else self.heads(x, cis)


def circle(length):
    angle = torch.outer(torch.arange(float(length)), 0.1 ** torch.arange(float(D // 2)))
    return torch.polar(torch.ones_like(angle), angle)[:, None].to(DEVICE)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_q_and_k_are_one_site(checkpointed):
    """With symbolic sizes, in the body of a checkpoint."""
    module, sites = Attention(checkpointed).to(DEVICE), []
    compiled = rewritten(module, sites, dynamic=True)
    for length in (5, 7):
        x = make((2, length, 16), torch.float32, seed=length)
        grads = [torch.autograd.grad(f(x, circle(length)).sin().sum(), [*module.parameters()]) for f in (compiled, module)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert [(s.variant, s.status) for s in sites] == [("rotation[pairs]", MATCHED)]


def of_seed(*shape, seed):
    return make(shape, torch.float32, seed=seed)


def test_one_call_of_operands_that_stand_there():
    """Tables of half the width are handed over as they are; q and k go in one launch."""
    graphs, sites = [], []
    q, k = (of_seed(B, n, S, D, seed=n) for n in (4, 2))
    c, s = (of_seed(S, D // 2, seed=seed) for seed in (7, 8))
    rewritten(lambda q, k, c, s: (turned(q, c, s), turned(k, c, s)), sites, graphs)(q, k, c, s)
    calls = [n for n in graphs[0].nodes if n.target in (rotate, rotate_both)]
    assert [n.target for n in calls] == [rotate_both] and len(sites) == 1
    assert all(a.op == "placeholder" for a in calls[0].all_input_nodes)


def test_tables_that_want_a_gradient_are_refused_at_the_model_s_line():
    sites, tensors = [], [of_seed(B, H, S, D, seed=1), *(of_seed(S, D // 2, seed=seed) for seed in (2, 3))]
    compare(rewritten(turned, sites), turned, tensors, [True, True, False])
    assert [(s.status, s.file.split("/")[-1]) for s in sites] == [("gradient", "test_rotation_spellings.py")]
    assert "cos" in sites[0].reason


def test_a_part_that_is_read_elsewhere_is_computed_all_the_same():
    def fn(x, c, s):
        a, b = parts(x)
        other = b * c + a * s
        return torch.cat((a * c - b * s, other), -1), other.sin()

    tensors = [of_seed(B, H, S, D, seed=1), *(of_seed(S, D // 2, seed=seed) for seed in (2, 3))]
    compare(rewritten(fn, []), fn, tensors, [True, False, False])


@pytest.mark.parametrize(("rows", "status"), [(1, MATCHED), (2, "check")])
def test_a_table_without_positions_is_of_a_single_row(rows, status):
    """Qwen4's keys of one block. Elsewhere it is a scaling of channels."""
    fn = lambda x, c, s: x * c + torch.cat((-parts(x)[1], parts(x)[0]), -1) * s  # noqa: E731
    tensors, sites = [of_seed(rows, 1, D, seed=1), *(of_seed(1, 1, D, seed=seed) for seed in (2, 3))], []
    compare(rewritten(fn, sites), fn, tensors, [True, False, False])
    assert [site.status for site in sites] == [status]


def test_what_the_other_entries_match_is_theirs():
    """Of two entries that compute the same, the one whose tables the model has at hand."""
    sites = []
    fn = lambda x, c, s: x * c + torch.cat((-parts(x)[1], parts(x)[0]), -1) * s  # noqa: E731
    rewritten(fn, sites)(of_seed(B, H, S, D, seed=1), *(of_seed(1, 1, S, D, seed=seed) for seed in (2, 3)))
    assert [s.variant for s in sites] == ["rope_single[halves_plain_full]"]


def test_a_norm_behind_it_does_not_take_its_sum():
    """NanoChat: q is turned the other way and normalised then. The sum is no residual of the norm."""

    def fn(x, c, s):
        a, b = parts(x)
        y = x * torch.cat((c, c), -1) + torch.cat((b, -a), -1) * torch.cat((s, s), -1)
        return torch.nn.functional.rms_norm(y, (D,), eps=1e-6)

    tensors = [of_seed(B, H, S, D, seed=1), *(of_seed(S, D // 2, seed=seed) for seed in (2, 3))]
    torch._dynamo.reset()
    with listening() as reports:
        torch.compile(fn, backend="sloth", options={"sloth.inner_backend": "eager"})(*tensors)
    assert {s.variant.split("[")[0] for r in reports for s in r.sites} == {"rotation_single", "rms_norm"}
