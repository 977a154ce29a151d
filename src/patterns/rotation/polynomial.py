"""Arrays of polynomials: what each element of a tensor is of elements of others.

A polynomial is a sum of monomials, a number times atoms; atoms are elements of other tensors. An array of them is kept as a few
terms: each has for every element its number (0 where it has no such monomial) and which element of each tensor is meant. The last
axis is of size 1, or 2 for complex numbers: their real and imaginary parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

MOST = 16  # terms


class Unreadable(Exception):
    """What is computed is not known to be linear."""


class Term(NamedTuple):
    """tensors: whose elements they are, in order, as a leaf and the names of the dtypes that it is rounded to."""

    tensors: tuple[tuple[int, tuple[str, ...]], ...]
    elements: tuple[np.ndarray, ...]
    numbers: np.ndarray


class Array(NamedTuple):
    shape: tuple[int, ...]
    terms: tuple[Term, ...]

    def map(self, fn: Callable[[np.ndarray], np.ndarray]) -> Array:
        """With all its elements arranged as `fn` does."""
        shape = fn(np.broadcast_to(False, self.shape)).shape
        return Array(shape, tuple(Term(t.tensors, tuple(map(fn, t.elements)), fn(t.numbers)) for t in self.terms))

    def reshape(self, shape: Sequence[int]) -> Array:
        return self.map(lambda a: a.reshape(shape))

    def expand(self, shape: Sequence[int]) -> Array:
        return self.map(lambda a: np.broadcast_to(a, shape))

    def part(self, i: int) -> Array:
        return self.map(lambda a: a[..., i : i + 1])


def elements_of(leaf: int, shape: tuple[int, ...]) -> Array:
    """A tensor's own."""
    elements = np.arange(np.prod(shape, dtype=int)).reshape((*shape, 1))
    return Array(elements.shape, (Term(((leaf, ()),), (elements,), np.ones(elements.shape)),))


def side_by_side(arrays: Sequence[Array], axis: int) -> Array:
    shape = np.concatenate([np.broadcast_to(False, a.shape) for a in arrays], axis).shape
    terms, at = [], 0
    for array in arrays:
        place = (*(slice(None) for _ in range(axis % len(shape))), slice(at, at + array.shape[axis]))

        def padded(a: np.ndarray, place: tuple = place) -> np.ndarray:
            whole = np.zeros(shape, a.dtype)
            whole[place] = a
            return whole

        terms += array.map(padded).terms
        at += array.shape[axis]
    return _joined(shape, terms)


def times(a: Array, b: Array) -> Array:
    if a.shape[-1] == b.shape[-1] == 2:
        (re, im), (c, s) = ((x.part(0), x.part(1)) for x in (a, b))
        return side_by_side((plus(times(re, c), scaled(times(im, s), -1)), plus(times(re, s), times(im, c))), -1)
    shape = np.broadcast_shapes(a.shape, b.shape)
    terms = []
    for p in a.expand(shape).terms:
        for q in b.expand(shape).terms:
            order = sorted(range(len(p.tensors) + len(q.tensors)), key=(p.tensors + q.tensors).__getitem__)
            tensors, elements = (tuple((x + y)[i] for i in order) for x, y in ((p.tensors, q.tensors), (p.elements, q.elements)))
            terms.append(Term(tensors, elements, p.numbers * q.numbers))
    return _joined(shape, terms)


def plus(a: Array, b: Array) -> Array:
    if a.shape[-1] != b.shape[-1]:
        raise Unreadable("a real number and a complex one are added")
    shape = np.broadcast_shapes(a.shape, b.shape)
    return _joined(shape, [*a.expand(shape).terms, *b.expand(shape).terms])


def total(array: Array, axis: int) -> Array:
    """The sum over one axis."""
    parts = [array.map(lambda a, i=i: a.take(i, axis)) for i in range(array.shape[axis])]
    found = parts[0]
    for part in parts[1:]:
        found = plus(found, part)
    return found


def scaled(array: Array, number: Any) -> Array:
    return array._replace(terms=tuple(t._replace(numbers=t.numbers * number) for t in array.terms))


def rounded(array: Array, dtype: str) -> Array:
    """Of elements of tables, each with its sign."""
    known = sum(np.abs(t.numbers) for t in array.terms)
    if (
        any(len(t.tensors) > 1 for t in array.terms)
        or not np.all(known == 1)
        or sum((t.numbers != 0) for t in array.terms).max() > 1
    ):
        raise Unreadable("a sum that is rounded")
    rename = lambda tensors: tuple((leaf, (*roundings, dtype)) for leaf, roundings in tensors)  # noqa: E731
    return array._replace(terms=tuple(t._replace(tensors=rename(t.tensors)) for t in array.terms))


def _joined(shape: tuple[int, ...], terms: Sequence[Term]) -> Array:
    """Terms of the same tensors are one where no element has both, or has the same of both."""
    found: list[Term] = []
    for t in terms:
        for i, f in enumerate(found):
            if f.tensors == t.tensors:
                in_f, in_t = f.numbers != 0, t.numbers != 0
                both = in_f & in_t
                if all(np.array_equal(x[both], y[both]) for x, y in zip(f.elements, t.elements, strict=True)):
                    elements = tuple(np.where(in_f, x, y) for x, y in zip(f.elements, t.elements, strict=True))
                    found[i] = Term(f.tensors, elements, f.numbers + t.numbers)
                    break
        else:
            found.append(t)
    found = [t for t in found if t.numbers.any()]
    if len(found) > MOST:
        raise Unreadable("a sum of many products")
    return Array(shape, tuple(found))
