"""What users call operations, dtypes and architectures, read into what the library has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flashmoe_cupy import _env
from flashmoe_cupy.service.machine import devices

if TYPE_CHECKING:
    from flashmoe_cupy.dtypes import DType

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # dtypes by their short names, which are printed
DTYPE_NAMES = ", ".join(f"{full} or {short}" for short, full in DTYPES.items())  # all of them, for people


def named_dtype(name: str, more: str = "") -> DType:
    """The dtype called `name`, in full or as it is printed in problems and configurations.

    more: what else the caller knows, for the error. Raises ValueError.
    """
    from flashmoe_cupy import dtypes

    try:
        return dtypes.from_name(DTYPES.get(name, name))
    except ValueError:
        raise ValueError(f"unknown dtype {name!r}; known: {more and f'{more}, '}{DTYPE_NAMES}") from None


# The arch of GPUs, and their names as people write them; only names that mean one arch.
_GPUS = {
    "sm_80": ("A100", "A30", "A800"), "sm_86": ("A10", "A40", "A16", "A2", "RTX 3090", "RTX 3080", "RTX A6000"),
    "sm_89": ("L4", "L40", "L40S", "RTX 4090", "RTX 4080"), "sm_90a": ("H100", "H200", "H800", "H20", "GH200"),
    "sm_100": ("B200", "GB200"), "sm_120": ("RTX 5090", "RTX 5080"),
}  # fmt: skip


def _of_gpu(name: str) -> str:
    """What is known of a GPU that was named instead of an arch; "" if nothing is."""
    plain = re.sub(r"nvidia|geforce|rtx|[^a-z0-9]", "", name.lower())
    for arch, names in _GPUS.items():
        for gpu in names:
            if plain == re.sub(r"rtx|[^a-z0-9]", "", gpu.lower()):
                return f"; {gpu} is {arch}"
    return ""


def named_arch(name: str) -> str:
    """The arch that is meant by sm_90a, sm_90, sm90 or 9.0. Raises ValueError for one that is not known."""
    from flashmoe_cupy.plan.archs import ARCHS, MAX_SMEM, arch_for

    known = tuple(dict.fromkeys((*ARCHS, *MAX_SMEM)))
    numbers = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", name.strip().lower())
    meant = arch_for((int(numbers[1]), int(numbers[2]))) if numbers else name.strip().lower()
    if meant not in known:
        raise ValueError(f"unknown arch {name!r}{_of_gpu(name)}; known: {', '.join(known)}")
    return meant


def require_known(what: str, name: str, known: Sequence[str]) -> None:
    """Raise ValueError for a name that is none of the known ones. what: it is a name of, for the error."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def target_archs(arch: str | Sequence[str] | None) -> tuple[str, ...]:
    """The archs that are meant: given, from FLASHMOE_ARCH, of the devices here, else all. Raises ValueError."""
    from flashmoe_cupy.plan.archs import ARCHS

    chosen = arch if arch is not None else _env.get().arch
    if chosen is not None:
        names = tuple(chosen) if isinstance(chosen, (list, tuple, set)) else (str(chosen),)
        return tuple(dict.fromkeys(map(named_arch, names)))
    found = tuple(dict.fromkeys(device.arch for device in devices() if device.arch))
    return found or tuple(ARCHS)
