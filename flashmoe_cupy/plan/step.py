"""A step: one launch of an operation, whatever the family of its kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Values = dict[str, float | Sequence[float]]  # of Params, by name
Arguments = dict[str, str]  # pointer of Params: array whose address it holds. Others are null


class Step:
    """One launch of an operation.

    problem: of the task's kernels. arguments: pointers of Params, and the arrays whose addresses they hold.
    values: members of Params that only the operation knows; a kernel that has no such member does without.
    clears: outputs, and their sizes in bytes, that must hold their fill value where the kernel writes nothing. A kernel
    that `clears` does so by itself; for others the array is filled first.
    """

    __slots__ = ("arguments", "clears", "problem", "task", "values")

    def __init__(
        self, task: str, problem: Any, arguments: Arguments, values: Values | None = None,
        clears: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        self.task, self.problem, self.arguments = task, problem, arguments
        self.values: Values = values or {}
        self.clears: Mapping[str, int] = clears or {}

    def with_problem(self, problem: Any) -> Step:
        """The same step for another problem."""
        return Step(self.task, problem, self.arguments, self.values, self.clears)


def same(*names: str) -> Arguments:
    """Pointers of Params that are called like their arrays."""
    return {name: name for name in names}
