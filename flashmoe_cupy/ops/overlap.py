"""Whether a given `out` shares memory with an argument, whose values other blocks would read after they are gone."""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe_cupy import arrays
from flashmoe_cupy.arrays import View
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.checks import asked


class Overlap:
    """How far each array of a call reaches, computed once for all calls on arrays of these shapes and strides.

    name: of the operation; names: of the arrays `views`. out, written: the array that the call writes, and its name,
    which may be one of names.
    """

    __slots__ = ("_name", "_names", "_out", "_reach", "_there", "_written")

    def __init__(
        self, name: str, names: Sequence[str], views: Sequence[View | None], out: View, written: str = "out"
    ) -> None:  # fmt: skip
        self._name, self._names, self._written = name, names, written
        self._out = _reach(out)
        self._reach = [(0, 0) if v is None else _reach(v) for v in views]
        self._there = [reach for v, reach in zip(views, self._reach, strict=True) if v is not None]

    def check(self, out: View, views: Sequence[View | None]) -> None:
        """Raises UnsupportedProblem with every argument that shares memory with out."""
        low, high = out.ptr + self._out[0], out.ptr + self._out[1]
        others = [one for one in zip(self._names, views, self._reach, strict=True) if one[0] != self._written]
        why = [
            f"{self._written} shares memory with {name}"
            for name, v, (first, last) in others
            if v is not None and v.ptr + first < high and low < v.ptr + last and arrays.overlap(out, v)
        ]
        if why:
            given = [(name, v) for name, v in zip(self._names, views, strict=True) if v is not None]
            if self._written not in self._names:
                given.append((self._written, out))
            hint = f"an array of its own for {self._written}, or {self._written}=None"
            raise UnsupportedProblem(asked(self._name, given, []), why, hint)

    def possible(self, out: int, addresses: Sequence[int]) -> bool:
        """Whether an argument may share memory with out, by the addresses of those arguments that are there."""
        low, high = out + self._out[0], out + self._out[1]
        for address, (first, last) in zip(addresses, self._there, strict=True):
            if address + first < high and low < address + last:
                return True
        return False


def _reach(v: View) -> tuple[int, int]:
    """First byte and the one behind the last, from the first element on."""
    low, high = arrays.extent(v)
    return low - v.ptr, high - v.ptr
