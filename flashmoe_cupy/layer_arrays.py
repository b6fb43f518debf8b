"""What layers know of the arrays that they hold, which may be of any library. Imports none of them."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from typing import Any

from flashmoe_cupy import dtypes
from flashmoe_cupy.arrays import View, row_major, view
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops.adapters import adapter
from flashmoe_cupy.ops.grouped_gemm import grouped_gemm
from flashmoe_cupy.plan.checks import show
from flashmoe_cupy.torch_reasons import no_strides


def float32(array: Any) -> Any:
    """The array in float32, by its own library; itself where it is float32 already."""
    if array is None:
        return None
    if str(array.dtype).removeprefix("torch.") == "float32":  # by the array itself: a traced one has no view
        return array
    return array.float() if hasattr(array, "data_ptr") else array.astype("float32")


def kind_of(array: Any) -> type:
    """The array type of array's library; subclasses and tracers are instances of it."""
    for module, name in (("torch", "Tensor"), ("jax", "Array"), ("cupy", "ndarray"), ("numpy", "ndarray")):
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(array, kind):
            return kind  # type: ignore[no-any-return]
    return object


def kind_name(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


_pytrees: set[type] = set()


def make_pytree(layer: type) -> None:
    """Tell JAX, which is there as its array is, what such an object is made of: `_tree_flatten`, `_tree_unflatten`."""
    if layer not in _pytrees:
        _pytrees.add(layer)
        its: Any = layer
        sys.modules["jax"].tree_util.register_pytree_node(layer, its._tree_flatten, its._tree_unflatten)


def views_of(why: list[str], hints: list[str], arrays: dict[str, Any]) -> dict[str, View]:
    """Views of all that can be read; of what has no memory (tracers, fake tensors), its shape and dtype.

    Raises TypeError for what is no array.
    """
    views, strangers = {}, []
    for name, array in arrays.items():
        try:
            if adapter(array) is None:
                views[name] = view(array, name)
                continue
            if hasattr(array, "is_nested") and (reason := no_strides(sys.modules["torch"], array)):
                why.append(f"{name}: {reason}")
                continue
            shape, dtype = tuple(array.shape), dtypes.from_name(str(array.dtype).removeprefix("torch."))
            library = type(array).__module__.partition(".")[0]
            views[name] = View(0, shape, row_major(shape), dtype, -1, library, False, array)
        except UnsupportedProblem as error:
            why += [f"{name}: {reason}" for reason in error.reasons]
            hints.append(error.hint)
        except TypeError as error:
            strangers.append(str(error))
    if strangers:
        raise TypeError("; ".join(strangers))
    return views


def fits(shape: tuple[int, ...], want: tuple[int | str, ...]) -> bool:
    """Whether a shape is what is wanted, as far as that is known."""
    return len(shape) == len(want) and all(isinstance(m, str) or size == m for size, m in zip(shape, want, strict=True))


def why_not_ints(name: str, x: Any, kind: Any, shapes: list[tuple[int, ...]], wide: bool = False) -> list[str]:
    """Why this is no array of int32 (or int64, if `wide`) in one of these shapes."""
    if not isinstance(x, kind):
        return [f"{name} must be a {kind_name(kind)} like x, but is {show(x)}"]
    why, known = [], ("int32", "int64") if wide else ("int32",)
    if tuple(x.shape) not in shapes:
        why.append(f"{name} must have shape {' or '.join(map(str, dict.fromkeys(shapes)))}, but has {tuple(x.shape)}")
    if dtype_name(x) not in known:
        why.append(f"{name} must be {' or '.join(known)}, but is {dtype_name(x)}")
    return why


def dtype_name(x: Any) -> str:
    """The name of an array's dtype, in all libraries the same."""
    return str(x.dtype).removeprefix("torch.")


class Library:
    """The functions of an array library that layers use, under one name each."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.xp: Any = import_module("jax.numpy" if name == "jax" else name)
        self.kind: Any = getattr(import_module(name), {"torch": "Tensor", "jax": "Array"}.get(name, "ndarray"))

    def __reduce__(self) -> Any:  # a module has no copy
        return _named, (self.name,)

    def arange(self, count: int, like: Any) -> Any:
        """0 to count - 1, int32, on the device of `like`."""
        xp = self.xp
        if self.name == "torch":
            return xp.arange(count, dtype=xp.int32, device=like.device)
        if self.name == "cupy":
            with like.device:
                return xp.arange(count, dtype=xp.int32)
        return xp.arange(count, dtype=xp.int32)

    def zeros(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        """Zeros on the device of `like`."""
        if self.name == "torch":
            return self.xp.zeros(shape, dtype=dtype, device=like.device)
        if self.name == "cupy":
            with like.device:
                return self.xp.zeros(shape, dtype)
        if self.name == "jax":
            try:
                places = tuple(like.devices())
            except (AttributeError, TypeError):  # traced: it goes where the rest goes
                places = ()
            return self.xp.zeros(shape, dtype, device=places[0] if len(places) == 1 else None)
        return self.xp.zeros(shape, dtype)

    def cast(self, x: Any, dtype: Any) -> Any:
        """x in this dtype; x itself where it has it."""
        if x.dtype == dtype:
            return x
        return x.to(dtype) if self.name == "torch" else x.astype(dtype)

    def linear(self, x: Any, weight: Any, bias: Any = None) -> Any:
        """x @ weight.T + bias in x's dtype, added up in float32.

        torch and JAX have a product with a gradient. NumPy's is slow for short floats, and CuPy's needs cuBLAS: for
        their arrays it is `grouped_gemm` with one group, where rows are multiples of 8 long and lie side by side.
        """
        n, d = weight.shape
        if self.name in ("numpy", "cupy") and not (n % 8 or d % 8) and weight.strides[-1] == weight.itemsize:
            rows = self.xp.ascontiguousarray(x.reshape(-1, d))
            offsets = self.arange(2, x) * self.xp.int32(rows.shape[0])
            made = grouped_gemm(rows, weight[None], offsets=offsets, bias=None if bias is None else bias[None])
            return made.reshape(*x.shape[:-1], n)
        if self.name == "numpy":
            made = float32(x) @ float32(weight).T
            return self.cast(made if bias is None else made + float32(bias), x.dtype)
        made = x @ weight.T
        return made if bias is None else made + bias


@cache
def _named(name: str) -> Library:
    return Library(name)


def library(kind: type) -> Library:
    """The library of an array type that `kind_of` gave."""
    return _named(kind.__module__.partition(".")[0].removesuffix("lib"))
