"""Offsets of packed rows, which the NumPy back end can read. They are running sums; often lengths are given instead."""

from __future__ import annotations

from flashmoe_cupy import _env

_warned: set[str] = set()


def like_lengths(values: list[int], rows: int) -> bool:
    """Whether numbers given as offsets add up to all rows, as lengths do, and are not those of all rows themselves."""
    return bool(values) and min(values) >= 0 and sum(values) == rows and (values[0] != 0 or values[-1] != rows)


def repair(values: list[int], rows: int) -> str:
    """What to add to an error about wrong offsets: how to make them of lengths, if they look like lengths; else ""."""
    if not like_lengths(values, rows):
        return ""
    return f": {values[:8]} look like lengths, whose running sums are np.cumsum([0, *lengths], dtype=np.int32)"


def warn(name: str, values: list[int], rows: int) -> None:
    """Warn once, for each name, of offsets that look like lengths. They run, for some rows may be in no sequence."""
    if name not in _warned and like_lengths(values, rows):
        _warned.add(name)
        _env.log.warning(
            "%s = %s add up to all %d rows, so they look like lengths; what is wanted are running sums from 0, "
            "np.cumsum([0, *lengths], dtype=np.int32)", name, values[:8], rows,
        )  # fmt: skip
