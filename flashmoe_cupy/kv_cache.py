"""Keys and values of the tokens that an attention layer has seen, in arrays of any library."""

from __future__ import annotations

from typing import Any

from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.layer_arrays import (
    Library,
    dtype_name,
    fits,
    kind_name,
    kind_of,
    library,
    make_pytree,
    why_not_ints,
)
from flashmoe_cupy.plan.checks import show
from flashmoe_cupy.plan.options import integer

_FLOATS = ("float32", "float16", "bfloat16")


class KVCache:
    """Keys and values of the tokens that a layer has seen, in arrays with room for more.

    keys, values: (batch, max_length, n_kv_heads, head_dim), of one dtype, whatever they hold. They are written in
        place, except with JAX, whose arrays are immutable: there new ones take their place.
    lengths: (batch,) int32, on their device: how many first rows of each entry count. 0 at first.
    length: an int on the host, at least the greatest of lengths. By it `update` sees that the room is used up, without
        waiting for the device. Who sets lengths sets both.

    `FlashAttentionLayer.new_cache` makes one. With JAX it is a pytree of keys, values and lengths, an argument and a
    result of jax.jit; there nobody knows `length`, which is then None, and rows without room are dropped.
    Raises UnsupportedProblem for other arrays.
    """

    length: int | None

    def __init__(self, keys: Any, values: Any) -> None:
        why: list[str] = []
        kind = kind_of(keys)
        if kind is object or kind_of(values) is not kind:
            why.append("keys and values must be NumPy, CuPy, torch or JAX arrays, both of one library")
        elif len(keys.shape) != 4 or len(values.shape) != 4 or tuple(keys.shape[:3]) != tuple(values.shape[:3]):
            why.append(f"keys and values must have shape (batch, max_length, n_kv_heads, head_dim), but have "
                       f"{tuple(keys.shape)} and {tuple(values.shape)}")  # fmt: skip
        elif dtype_name(keys) not in _FLOATS or keys.dtype != values.dtype:
            why.append(f"keys and values must have one dtype of {', '.join(_FLOATS)}, but have {dtype_name(keys)} and "
                       f"{dtype_name(values)}")  # fmt: skip
        if why:
            raise UnsupportedProblem("KVCache", why, "FlashAttentionLayer.new_cache(batch, max_length)")
        self._library = library(kind)
        self.keys, self.values = keys, values
        self.reset()
        if self._library.name == "jax":
            make_pytree(KVCache)

    @property
    def max_length(self) -> int:
        """Rows that an entry has room for."""
        return int(self.keys.shape[1])

    def reset(self) -> None:
        """Forget all tokens."""
        xp = self._library
        self.lengths: Any = xp.zeros((self.keys.shape[0],), xp.xp.int32, self.keys)
        self.length = 0

    def update(self, keys: Any, values: Any, lengths: Any = None) -> tuple[Any, Any]:
        """Write new rows behind those of each entry. Returns keys and values, with all rows that there is room for.

        keys, values: (batch, rows, n_kv_heads, head_dim), in the dtype of the cache. lengths: (batch,) int32, how many
        of them count; None = all. The next update writes over those that do not. Nothing waits for the device. Raises
        UnsupportedProblem for arrays that do not fit, for too many rows, and for torch tensors that require a gradient:
        a cache has none.
        """
        self.count(self.write(keys, values, lengths), keys.shape[1])
        return self.keys, self.values

    def write(self, keys: Any, values: Any, lengths: Any = None) -> Any:
        """The first half of `update`: write rows that do not count yet. Returns what `lengths` is with them."""
        if why := self.why_not(keys, values, lengths):
            raise UnsupportedProblem(f"{self!r}", why, "a cache with a larger max_length, or reset()")
        rows, xp = keys.shape[1], self._library
        total = self.lengths + (rows if lengths is None else lengths)
        entries = xp.arange(keys.shape[0], self.keys)[:, None]
        places = self.positions(rows)
        if xp.name == "jax":
            self.keys = self.keys.at[entries, places].set(keys)
            self.values = self.values.at[entries, places].set(values)
        else:
            self.keys[entries, places] = keys
            self.values[entries, places] = values
        return total

    def count(self, total: Any, rows: int) -> None:
        """The second half of `update`: let what `write` wrote count. total: what it gave."""
        self.lengths = total
        if self.length is not None:
            self.length += rows

    def positions(self, rows: int) -> Any:
        """(batch, rows) int32: the places of new rows in their sequences."""
        return self.lengths[:, None] + self._library.arange(rows, self.keys)

    def why_not(self, keys: Any, values: Any, lengths: Any = None) -> list[str]:
        """Why `update` would refuse these."""
        why, kind = [], self._library.kind
        for name, x, of in (("keys", keys, self.keys), ("values", values, self.values)):
            if not isinstance(x, kind):
                why.append(f"{name} must be a {kind_name(kind)} like those of the cache, but is {show(x)}")
                continue
            want = (of.shape[0], "rows", *of.shape[2:])
            if not fits(tuple(x.shape), want):
                shown = ", ".join(map(str, want))
                why.append(f"the cache needs {name} of shape ({shown}), but they have {tuple(x.shape)}")
            if x.dtype != of.dtype:
                why.append(f"the cache has dtype {dtype_name(of)}, but {name} have {dtype_name(x)}")
            if getattr(x, "requires_grad", False):
                why.append(f"{name} require grad, but a cache has no gradient; use torch.no_grad()")
        if not why and self.length is not None and self.length + keys.shape[1] > self.max_length:
            why.append(f"there is room for {self.max_length} rows, of which {self.length} may be in use, and "
                       f"{keys.shape[1]} are to come")  # fmt: skip
        if lengths is not None:
            why += why_not_ints("lengths", lengths, kind, [(self.keys.shape[0],)])
        return why

    def _tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        return (self.keys, self.values, self.lengths), self._library

    @classmethod
    def _tree_unflatten(cls, its: Any, leaves: Any) -> KVCache:
        made = cls.__new__(cls)  # leaves may be placeholders of any type, so nothing is checked
        made._library, made.length = its, None
        made.keys, made.values, made.lengths = leaves
        return made

    def __repr__(self) -> str:
        used = "" if self.length is None else f", length={self.length}"
        return f"KVCache(keys={list(self.keys.shape)}, dtype={dtype_name(self.keys)}{used})"


def new_cache(
    xp: Library, batch: Any, max_length: Any, heads: int, head_dim: int, like: Any, dtype: Any
) -> KVCache:  # fmt: skip
    """An empty cache on the device of `like`. Raises UnsupportedProblem for sizes that are none."""
    sizes = {"batch": integer(batch), "max_length": integer(max_length)}
    given = {"batch": batch, "max_length": max_length}
    why = [f"{name} must be an int from 0 on, but is {show(given[name])}"
           for name, n in sizes.items() if n is None or n < 0]  # fmt: skip
    if why:
        raise UnsupportedProblem("new_cache", why, "new_cache(batch=1, max_length=2048)")
    shape = int(batch), int(max_length), heads, head_dim
    return KVCache(*[xp.zeros(shape, dtype, like) for _ in range(2)])
