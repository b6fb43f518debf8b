"""Params as they are read from C++ text, and packed by name."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from flashmoe_cupy.jit import source
from flashmoe_cupy.plan import params
from flashmoe_cupy.plan.attention import forward
from flashmoe_cupy.plan.params import MAP, Params

HEADER = """
// struct P { int not_this; };
struct Base {
  const void *q, *k;  // two, in one line
  float* lse;
  i64 stride;         // int hidden; in a comment
  int rows, unused;
  float scale;
};
static_assert(sizeof(Base) == 44);
struct P : Base {
  int tiles;
  int* counter;
  float c[4], limit;
  TensorMap q_map, k_map;
};
struct Late {
  void* out;
  int n;
  alignas(128) TensorMap out_map;
};
"""


@pytest.fixture
def header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "p.cuh").write_text(HEADER, encoding="utf-8")
    monkeypatch.setattr(source, "source_root", lambda: tmp_path)
    for one in (params._text, params._layout):
        one.cache_clear()
    return "p.cuh"


def test_members_are_where_a_compiler_puts_them(header: str) -> None:
    p = Params(header, "P")
    assert p.pointers == ("q", "k", "lse") and p.maps == ("q_map", "k_map") and p.mapped == (0, 1)
    assert (p.size, p.align, p.maps_at) == (384, 128, 128)
    assert {name: (field.at, field.kind, field.length) for name, field in p.fields.items()} == {
        "q": (0, "*", 1), "k": (8, "*", 1), "lse": (16, "*", 1), "stride": (24, "i64", 1),
        "rows": (32, "int", 1), "unused": (36, "int", 1), "scale": (40, "float", 1),
        "tiles": (48, "int", 1), "counter": (56, "*", 1), "c": (64, "float", 4),
        "limit": (80, "float", 1), "q_map": (128, MAP, 1), "k_map": (256, MAP, 1),
    }  # fmt: skip
    late = Params(header, "Late")
    assert (late.size, late.align, late.maps_at, late.fields["out_map"].at) == (256, 128, 128, 128)
    base = Params(header, "Base")
    assert (base.size, base.align, base.maps_at, base.maps) == (48, 8, 48, ())


def test_values_are_packed_by_name(header: str) -> None:
    p = Params(header, "P")
    values: dict[str, float | Sequence[float]] = {"limit": 2.0, "c": (1.0, 2.0, 3.0, 4.0), "counter": 7, "tiles": 5}
    packed = p.pack(values | {"scale": 0.5, "rows": -3, "stride": 2**40})
    assert packed == struct.pack("=q2if4xi4xQ5f44x", 2**40, -3, 0, 0.5, 5, 7, 1, 2, 3, 4, 2) and len(packed) == 128 - 24
    buffer = bytearray(64)
    p.pack_pointers(buffer, 8, 1, 2, 3)
    assert buffer == struct.pack("5Q24x", 0, 1, 2, 3, 0)


def test_what_lacks_or_is_not_there_is_named(header: str) -> None:
    with pytest.raises(KeyError, match="Base has other members: row, rows"):
        Params(header, "Base").pack({"stride": 1, "row": 2, "scale": 1.0})
    with pytest.raises(KeyError, match=r"p\.cuh has no struct Q"):
        _ = Params(header, "Q").size


def test_numbers_that_stand_in_a_header_too() -> None:
    epilogue = source.headers_for('#include "attention/epilogue_sm90.cuh"')["attention/epilogue_sm90.cuh"]
    tiles = source.headers_for('#include "attention/key_tiles.cuh"')["attention/key_tiles.cuh"]
    assert f"kFilledRows = {forward._FILLED_ROWS} }}" in epilogue and f"kClearers = {forward._CLEARERS} }}" in epilogue
    assert f"kTileBits = {forward._MAX_LISTED_TILES.bit_length() - 1}," in tiles
