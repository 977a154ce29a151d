"""RoPE of q and k whose heads are normalised first (QK-norm).

    y = turn(norm(x, w), cos, sin)

with norms of sloth.patterns.rms_norm and turns of sloth.patterns.rope. In some models the norm reads [B, S, heads, D], as the
projection gives it, and its result is transposed; in others it reads what is turned. Where the norms of q and k differ in form
or eps, the entries for one of both still match. Other normalisations are left to theirs: of all heads in one (OLMo 2, its mean
square is that of another row), behind the turn (Hunyuan), LayerNorm with a weight for each head (Cohere).
"""

from sloth.kernels.norm_rope import norm_rope
from sloth.patterns.rms_norm import RMS_NORM, gemma, helium, llama, olmo2
from sloth.patterns.rope import NO_GRAD, ROPE, SIZES, halves, one_table_for_all_heads, partial, plain
from sloth.rewriter.match.domain import domain, finite
from sloth.rewriter.match.registry import pattern
from sloth.rewriter.plan.narrow import rounds_once

full, leading = plain(halves), partial(plain(halves))
TURNED = {"q": "B H S D", "k": "B G S D"}
TRANSPOSED = {"q": "B S H D", "k": "B S G D"}  # before the norm; what is turned is their transpose


def on_both(norm, turn, transpose):
    def both(q, k, wq, wk, cos, sin, *, eps: float):
        normed = (norm(x, w, eps=eps) for x, w in ((q, wq), (k, wk)))
        return tuple(turn(x.transpose(1, 2) if transpose else x, cos, sin) for x in normed)

    return both


def form(norm, turn, heads):
    """(reference, dims, options of the operator)"""
    transpose, table = heads is TRANSPOSED, "B 1 S D" if turn is full else "B 1 S R"
    options = {"offset": float(norm is gemma), "transpose": transpose, "dtype": lambda match: match.roots[0].meta.dtype}
    return on_both(norm, turn, transpose), {**heads, "cos": table, "sin": table}, options


FORMS = {
    "llama": form(llama, full, TRANSPOSED),  # Qwen3, LFM2 and most others
    "llama_turned": form(llama, full, TURNED),  # EXAONE 4, Apertus
    "llama_partial": form(llama, leading, TRANSPOSED),  # GLM-4.5, Laguna
    "olmo2": form(olmo2, full, TRANSPOSED),  # Beam
    "helium_turned": form(helium, full, TURNED),  # Gemma 3n, Gemma 4
    "gemma_turned": form(gemma, full, TURNED),  # Gemma 3
    "gemma_partial": form(gemma, leading, TRANSPOSED),  # Qwen3-Next, Qwen3.5
}

(_name, (_reference, _dims, _options)), *_others = FORMS.items()
both = pattern(
    ROPE,
    op=norm_rope,
    also=(RMS_NORM,),
    dims={"wq": "D", "wk": "D", **_dims},
    sizes=SIZES,
    no_grad=NO_GRAD,
    name="norm_rope",
    variant=_name,
    **_options,
)(_reference)
for _name, (_reference, _dims, _options) in _others:
    both.variant(_name, _dims, **_options)(_reference)
both.check(one_table_for_all_heads)
domain(norm_rope, numbers={"eps": finite})
rounds_once(norm_rope, streams=("q", "k"))
