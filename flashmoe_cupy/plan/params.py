"""Params, the one argument of a kernel: its layout is read from the C++ struct, and values are packed by their names.

A header of `cuda_src` is the only place where the order and the types of Params stand. A struct begins with its
pointers; numbers follow, and tensor maps end it. Every translation unit checks the size and the alignment.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property

from flashmoe_cupy.jit import source, tensormap

MAP = "TensorMap"
_FORMATS = {"i64": "q", "u64": "Q", "int": "i", "u32": "I", "float": "f", "*": "Q"}  # of struct; * is any pointer

Values = Mapping[str, float | Sequence[float]]


class Field:
    """A member of Params: where it lies, in bytes, its C++ type without const ("*": a pointer), how many there are."""

    __slots__ = ("at", "kind", "length")

    def __init__(self, at: int, kind: str, length: int) -> None:
        self.at, self.kind, self.length = at, kind, length


class Params:
    """The struct `name` of the header `header`, both as a kernel includes and names them inside namespace fm."""

    def __init__(self, header: str, name: str) -> None:
        self.header, self.name = header, name

    @cached_property
    def _layout(self) -> tuple[dict[str, Field], int, int]:
        return _layout(self.header, self.name)

    @property
    def fields(self) -> dict[str, Field]:
        """Every member by its name, in their order."""
        return self._layout[0]

    @property
    def size(self) -> int:
        """Bytes of the struct."""
        return self._layout[1]

    @property
    def align(self) -> int:
        """Bytes that its address is a multiple of."""
        return self._layout[2]

    @cached_property
    def pointers(self) -> tuple[str, ...]:
        """The names of the pointers that it begins with."""
        found = []
        for name, field in self.fields.items():
            if field.kind != "*":
                break
            found.append(name)
        return tuple(found)

    @cached_property
    def maps(self) -> tuple[str, ...]:
        """The names of its tensor maps, which end it."""
        return tuple(name for name, field in self.fields.items() if field.kind == MAP)

    @cached_property
    def mapped(self) -> tuple[int, ...]:
        """Of each tensor map, which pointer's array it is over: that whose name it has."""
        return tuple(self.pointers.index(name.removesuffix("_map")) for name in self.maps)

    @cached_property
    def pack_pointers(self) -> Callable[..., None]:
        """`pack_pointers(buffer, offset, *addresses)` stores what it begins with."""
        return struct.Struct(f"{len(self.pointers)}Q").pack_into

    @cached_property
    def maps_at(self) -> int:
        """Where the tensor maps begin; without any, the end."""
        return self.fields[self.maps[0]].at if self.maps else self.size

    @cached_property
    def _numbers(self) -> tuple[tuple[str, ...], struct.Struct]:
        """The names between the pointers and the maps, and how their values lie there."""
        names = tuple(self.fields)[len(self.pointers) : len(self.fields) - len(self.maps)]
        at, text = 8 * len(self.pointers), "="
        for field in (self.fields[name] for name in names):
            text += f"{field.at - at}x{field.length}{_FORMATS[field.kind]}"
            at = field.at + field.length * _size(field.kind)
        return names, struct.Struct(f"{text}{self.maps_at - at}x")

    def pack(self, values: Values) -> bytes:
        """The bytes between the pointers and the maps; a member with several values takes a sequence of them.

        Every member must be given, and nothing else: KeyError. What is called `unused` is 0.
        """
        names, form = self._numbers
        wrong = {name for name in names if name != "unused"} ^ values.keys()
        if wrong:
            raise KeyError(f"{self.name} has other members: {', '.join(sorted(wrong))}")
        flat: list[float] = []
        for name in names:
            value = values.get(name, 0)
            flat += value if isinstance(value, Sequence) else (value,)
        return form.pack(*flat)


def _size(kind: str) -> int:
    return tensormap.BYTES if kind == MAP else struct.calcsize(f"={_FORMATS[kind]}")


@cache
def _layout(header: str, name: str) -> tuple[dict[str, Field], int, int]:
    """(members, size, alignment) as a C++ compiler lays them out."""
    base, body = _text(header, name)
    fields: dict[str, Field] = {}
    at, align = 0, 1
    if base:
        inherited, at, align = _layout(header, base)
        fields.update(inherited)
    for given, kind, members in _members(body):
        align = max(align, given)
        for member in members:
            declared, _, rest = member.partition("[")
            count = int(rest.rstrip("]") or 1)
            of = "*" if declared.startswith("*") else kind
            size = _size(of)
            need = max(size, given)
            at = -(-at // need) * need
            fields[declared.lstrip("*")] = Field(at, of, count)
            at += size * count
            align = max(align, need)
    return fields, -(-at // align) * align, align


def _members(body: str) -> list[tuple[int, str, list[str]]]:
    """(alignment that is asked for, type, declarators) of each line of a struct."""
    found = []
    for line in filter(None, map(str.strip, body.split(";"))):
        align, rest = 1, line
        if line.startswith("alignas("):
            number, _, rest = line.removeprefix("alignas(").partition(")")
            align = int(number)
        kind, _, declared = rest.strip().removeprefix("const ").replace("*", " *").partition(" ")
        found.append((align, kind, [part.replace(" ", "") for part in declared.split(",")]))
    return found


@cache
def _text(header: str, name: str) -> tuple[str, str]:
    """(name of the base or "", what stands between the braces) of a struct, without comments."""
    for text in source.headers_for(f'#include "{header}"\n').values():
        start = f"\n{text}".find(f"\nstruct {name} ")  # a struct begins a line
        if start >= 0:
            code = "\n".join([line.partition("//")[0] for line in text[start : text.index("\n};", start)].split("\n")])
            declared, _, body = code.partition("{")
            return declared.partition(":")[2].strip(), body
    raise KeyError(f"{header} has no struct {name}")
