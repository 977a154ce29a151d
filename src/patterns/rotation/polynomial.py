"""Arrays of polynomials: what each element of a tensor is of elements of others.

A polynomial is a tuple of monomials (atoms, number); atoms are elements of the other tensors, in order. The last axis of an array
is of size 1, or 2 for complex numbers: their real and imaginary parts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Poly = tuple[tuple[tuple, Any], ...]
LONGEST = 16  # monomials


class Unreadable(Exception):
    """What is computed is not known to be linear."""


def filled(items: list[Poly], shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array.reshape(shape)


def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.shape[-1] == b.shape[-1] == 2:
        (re, im), (c, s) = ((x[..., :1], x[..., 1:]) for x in (a, b))
        parts = plus(_TIMES(re, c), scaled(_TIMES(im, s), -1)), plus(_TIMES(re, s), _TIMES(im, c))
        return np.concatenate(parts, -1)
    return _TIMES(a, b)


def plus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.shape[-1] != b.shape[-1]:
        raise Unreadable("a real number and a complex one are added")
    return _PLUS(a, b)


def total(array: np.ndarray, axis: int) -> np.ndarray:
    """The sum over one axis."""
    parts = np.moveaxis(array, axis, 0)
    found = parts[0]
    for part in parts[1:]:
        found = plus(found, part)
    return found


def scaled(a: np.ndarray, number: Any) -> np.ndarray:
    return np.frompyfunc(lambda p: tuple((atoms, n * number) for atoms, n in p), 1, 1)(a)


def _product(p: Poly, q: Poly) -> Poly:
    return _sum(*(((tuple(sorted((*a, *b))), m * n),) for a, m in p for b, n in q))


def _sum(*polys: Poly) -> Poly:
    terms: dict[tuple, Any] = {}
    for poly in polys:
        for atoms, number in poly:
            terms[atoms] = terms.get(atoms, 0) + number
    if len(terms) > LONGEST:
        raise Unreadable("a sum of many products")
    return tuple((atoms, number) for atoms, number in terms.items() if number != 0)


_TIMES, _PLUS = np.frompyfunc(_product, 2, 1), np.frompyfunc(_sum, 2, 1)
