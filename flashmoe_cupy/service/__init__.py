"""What surrounds the operations: explain a choice, warm up, count, report, clean. The command line prints these.

Nothing here is on the hot path, and all of it but the loading half of `warmup` works without a GPU.
"""

from __future__ import annotations

from flashmoe_cupy.service.attention import explain_attention, visible_pairs
from flashmoe_cupy.service.attention_backward import explain_attention_backward
from flashmoe_cupy.service.choices import Choice, Explanation
from flashmoe_cupy.service.families import FAMILIES, OPS
from flashmoe_cupy.service.family import Family, Filter, Size
from flashmoe_cupy.service.machine import Device, Driver, backend, devices, driver, show_config
from flashmoe_cupy.service.moe import explain_moe
from flashmoe_cupy.service.names import DTYPES, named_arch, named_dtype
from flashmoe_cupy.service.plans import explain, kernels, registry, specialisations
from flashmoe_cupy.service.warm import Stats, Warmed, clear_cache, stats, warmup

__all__ = [
    "DTYPES",
    "FAMILIES",
    "OPS",
    "Choice",
    "Device",
    "Driver",
    "Explanation",
    "Family",
    "Filter",
    "Size",
    "Stats",
    "Warmed",
    "backend",
    "clear_cache",
    "devices",
    "driver",
    "explain",
    "explain_attention",
    "explain_attention_backward",
    "explain_moe",
    "kernels",
    "named_arch",
    "named_dtype",
    "registry",
    "show_config",
    "specialisations",
    "stats",
    "visible_pairs",
    "warmup",
]
