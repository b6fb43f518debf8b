"""What plans depend on of a device, beside its architecture."""

from __future__ import annotations

from typing import NamedTuple


class DeviceProperties(NamedTuple):
    """Of one GPU."""

    multiprocessors: int
    memory_rate: int  # bytes a second, by the memory's clock and width; a plain read gives about 0.9 of it


H100 = DeviceProperties(132, 3_352_320_000_000)  # the SXM card's; for plans where no device is at hand
