"""The registry of families. A new one is declared in a file of its own and named here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashmoe_cupy.service.attention import ATTENTION
from flashmoe_cupy.service.attention_backward import ATTENTION_BACKWARD
from flashmoe_cupy.service.family import Family, Filter
from flashmoe_cupy.service.moe import MOE
from flashmoe_cupy.service.names import require_known

FAMILIES: dict[str, Family] = {family.name: family for family in (ATTENTION, ATTENTION_BACKWARD, MOE)}
OPS = tuple(FAMILIES)
DEFAULT_OP = ATTENTION.name  # where none is named


def family_of(op: str) -> Family:
    """The family called `op`. Raises ValueError."""
    require_known("op", op, tuple(FAMILIES))
    return FAMILIES[op]


def all_filters() -> dict[str, Filter]:
    """Every filter that a family has, by name."""
    return {each.name: each for family in FAMILIES.values() for each in family.filters}


def given(filters: Mapping[str, Any]) -> dict[str, Any]:
    """The filters whose value is not None. Raises TypeError for one that no family has."""
    if foreign := sorted(set(filters) - set(all_filters())):
        raise TypeError(f"unknown filter {', '.join(foreign)}; known: {', '.join(all_filters())}")
    return {name: value for name, value in filters.items() if value is not None}


def misfit(family: Family, filters: Mapping[str, Any], spelled: Mapping[str, str], subject: str) -> str:
    """Why the given filters do not go with a family and with each other; "": they do.

    spelled: every filter that the caller takes, as it is written there. subject: the family, as it is written there.
    """
    own = {each.name: each for each in family.filters}
    if not set(filters) <= set(own):
        return f"{subject} has no {' and no '.join(word for name, word in spelled.items() if name not in own)}"
    for name in filters:
        if own[name].needs and own[name].needs not in filters:
            return f"{spelled[name]} needs {spelled[own[name].needs]} beside it"
    return ""
