"""Contexts longer than a model was made for: its rotary embedding is scaled, in the model's own kind.

kind        what changes                     source
default     becomes linear, θ_i / factor     Chen et al., Extending Context Window … via Positional Interpolation, 2023
linear      factor
dynamic     factor                           NTK-aware scaling, by the length of each batch
yarn        factor                           Peng et al., YaRN, 2023
llama3      factor                           Llama 3.1's own interpolation of low frequencies
longrope    nothing: its factors were searched for one length
"""

from __future__ import annotations

from typing import Any

KINDS = {"default": "linear", "linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "llama3": "llama3"}
LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len")


def lengthen(config: Any, length: int | None, scaling: dict[str, Any] | None = None) -> str | None:
    """Write into `config` what lets the model read `length` tokens. Returns what was done in words, None for nothing.

    scaling: rope_parameters of the caller's own, e.g. {"rope_type": "yarn", "factor": 4.0}. Raises ValueError where the model's
    position embedding cannot be scaled.
    """
    text = config.get_text_config()
    name = next((n for n in LIMITS if isinstance(getattr(text, n, None), int)), None)
    limit: int | None = getattr(text, name) if name else None
    if scaling is not None:
        if not isinstance(scaling, dict) or not ("rope_type" in scaling or "type" in scaling):
            raise ValueError(
                f"rope_scaling={scaling!r} is no dict with a rope_type, such as {{'rope_type': 'yarn', 'factor': 4.0}}"
            )
        _write(text, lambda old: _by_hand(old, scaling, limit))
        if name and limit is not None and length is not None:
            setattr(text, name, max(length, limit))
        return f"rope_scaling is {scaling}, as given"
    if name is None or limit is None or length is None or length <= limit:
        return None
    if not getattr(text, "rope_parameters", None):
        if getattr(text, "alibi", False):
            setattr(text, name, length)
            return None
        raise ValueError(
            f"max_seq_length={length}, and {text.model_type} has learned positions for {limit} tokens, which cannot be scaled:"
            f" give max_seq_length={limit} or less"
        )
    kinds = _write(text, lambda old: _scaled(old, length / limit, length, limit))
    setattr(text, name, length)
    return f"max_seq_length={length} is {length / limit:.3g} times the {limit} tokens of the model: its RoPE is scaled ({kinds})"


def _write(text: Any, change: Any) -> str:
    """Change the parameters of RoPE, of each kind of layer that has its own. Returns what they are now, in words."""
    held = text.rope_parameters
    if not any(isinstance(v, dict) for v in held.values()):
        text.rope_parameters = change(dict(held))
        return _words(text.rope_parameters)
    windows = {"sliding_attention"} & held.keys()  # these never look further back than their window
    changed = {k: v if k in windows or not isinstance(v, dict) else change(dict(v)) for k, v in held.items()}
    text.rope_parameters = changed
    return ", ".join(f"{k}: {_words(v)}" for k, v in changed.items() if isinstance(v, dict) and v != held[k])


def _words(rope: dict[str, Any]) -> str:
    return f"{rope['rope_type']}, factor {rope.get('factor', 1.0):.4g}"


def _scaled(rope: dict[str, Any], ratio: float, length: int, limit: int) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    if kind not in KINDS:
        raise ValueError(
            f"max_seq_length={length}: the model's RoPE is of type {kind}, whose factors hold for {limit} tokens: give"
            f" max_seq_length={limit} or less, or rope_scaling={{…}} of your own"
        )
    return rope | {"rope_type": KINDS[kind], "factor": float(rope.get("factor") or 1.0) * ratio}


def _by_hand(rope: dict[str, Any], scaling: dict[str, Any], limit: int | None) -> dict[str, Any]:
    given = dict(scaling)
    given["rope_type"] = given.pop("type", None) or given["rope_type"]
    if given["rope_type"] in ("yarn", "llama3", "longrope") and limit is not None:
        given.setdefault("original_max_position_embeddings", rope.get("original_max_position_embeddings", limit))
    return rope | given
