"""Earlier calls of an operation, found by what later ones give: by a key, or by a guard that looks at all arrays."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from flashmoe_cupy.ops.access import ArrayAccess
from flashmoe_cupy.plan.forget import forget

_MAX_PLANS = 4096  # distinct calls that an operation remembers
Plan = TypeVar("Plan")


class PlanMemory(Generic[Plan]):
    """Plans by the shapes, strides, dtypes and options of the calls that they serve."""

    __slots__ = ("_lock", "_plans", "find")

    def __init__(self) -> None:
        self._plans: dict[Any, Plan] = {}
        self._lock = threading.Lock()
        self.find = self._plans.get  # of a key that can be hashed
        forget.append(self._plans.clear)

    def keep(self, key: Any, plan: Plan) -> Plan:
        """Find the plan by this key from now on."""
        with self._lock:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            with suppress(TypeError):  # an unhashable option that validation let through
                self._plans[key] = plan
        return plan

    def __len__(self) -> int:
        return len(self._plans)


class GuardedPlans:
    """What the last few calls ran, found by a guard: one look in C at all arrays, without making their key."""

    __slots__ = ("_guards_of", "entries")
    _MOST, _MOST_GUARDS, _MOST_PLANS = 4, 8, 4096

    def __init__(self) -> None:
        # By options: guards, and the fast calls for arrays that they know. The options tell the number of arrays.
        self.entries: dict[Any, tuple[tuple[Callable[..., bool], Any], ...]] = {}
        self._guards_of: dict[Any, int] = {}  # guards made for each plan: what always changes does without
        forget.append(self.clear)

    def note(self, access: ArrayAccess, given: tuple[Any, ...], options: Any, plan: Any) -> None:
        """Find from now on what this plan runs for such arrays. It has just run, and says once more what that is."""
        made = self._guards_of.get(plan, 0)
        if made >= self._MOST_GUARDS or len(self._guards_of) >= self._MOST_PLANS:
            return
        guard = access.guard(given)
        if guard is not None:
            self._guards_of[plan] = made + 1
            found = guard, plan.fast_call(access, given)
            self.entries[options] = (found, *self.entries.get(options, ())[: self._MOST - 1])

    def clear(self) -> None:
        """Forget all."""
        self.entries.clear()
        self._guards_of.clear()
