"""What layers know of the arrays that they hold, which may be of any library. Imports none of them."""

from __future__ import annotations

import sys
from typing import Any

from flashmoe_cupy import dtypes
from flashmoe_cupy.arrays import View, row_major, view
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops.adapters import adapter
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
