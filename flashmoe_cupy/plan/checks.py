"""What the validation of every operation shares: checks that add reasons to a list, and the words of the reasons."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flashmoe_cupy.dtypes import BF16, FLOATS, FP16, FP32, INT32, DType
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.options import boolean, integer, real

if TYPE_CHECKING:
    from flashmoe_cupy.arrays import View

INT_MAX = 2**31 - 1  # kernels count rows, heads and assignments in 32 bits
FLOAT_MAX = 3.4028234663852886e38  # numbers reach the kernels as float32
FLOAT_TINY = 1.1754943508222875e-38
MAX_HEAD_DIM = 256  # the largest compiled size (plan/attention/tiles.py)
MAX_HEAD_DIM_V = 512  # two blocks of that size
MAX_EXPERTS = 1024  # of the router: 32 scores of a token in each lane of a warp (plan/moe/small.py)
MAX_TOP_K = 32  # of the router: one choice for each lane
GATED = ("swiglu", "geglu", "geglu_tanh", "swigluoai")
ACTIVATIONS = (*GATED, "gelu", "gelu_tanh", "relu", "relu2")  # in the order of enum Activation of moe/params.cuh
SWIGLUOAI_ALPHA, SWIGLUOAI_LIMIT = 1.702, 7.0  # of gpt-oss, whose activation it is
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}  # the dtypes of the arrays that are computed with
Option = tuple[str, object, object]  # name, value, default
Named = Sequence[tuple[str, "View"]]


# ---- checks ----


def check_ranks(why: list[str], rank: int, named: Named) -> None:
    """The number of dimensions of each array."""
    for name, x in named:
        if len(x.shape) != rank:
            why.append(f"{name} must have {rank} dimensions, but its shape is {x.shape}")


def check_last(why: list[str], name: str, x: View) -> None:
    """The last dimension has stride 1; empty arrays and dimensions of size 1 may have any."""
    if x.shape and x.shape[-1] > 1 and x.strides[-1] != 1 and 0 not in x.shape:
        have = f"but its stride is {x.strides[-1]} elements"
        repair = "" if name == "out" else f"; {copy(name, x)}"  # a copy of out would keep the result to itself
        why.append(f"the last dimension of {name} must be contiguous, {have}{repair}")


def check_places(why: list[str], named: Named) -> None:
    """One library and one device for all."""
    library, device = named[0][1].library, named[0][1].device
    same = True
    for _, x in named:
        same = same and x.library == library and x.device == device
    if not same:
        places = ", ".join(f"{name} is {place(x)}" for name, x in named)
        why.append(f"arguments must be of one library and on one device: {places}")


def check_dtypes(why: list[str], named: Named) -> None:
    """One floating dtype for all."""
    dtype = named[0][1].dtype
    if dtype in SHORT and all(x.dtype is dtype for _, x in named):
        return
    bad = [(name, x) for name, x in named if x.dtype not in SHORT]
    for name, x in bad:
        why.append(f"{name} has dtype {x.dtype}, which must be {FLOATS}; {cast(name, x)}")
    if not bad:
        have = ", ".join(f"{name} is {x.dtype}" for name, x in named)
        why.append(f"dtypes differ: {have}; cast them to one dtype")


def check_out(
    why: list[str], out: View, owner: str, dtype: DType, want: tuple[int, ...] | None, name: str = "out"
) -> None:  # fmt: skip
    """An output that was given: writable, of the right shape and of owner's dtype, no element twice in memory."""
    if out.library == "jax":
        why.append(f"{name} is a JAX array; leave {name}=None: JAX arrays are immutable")
    elif out.readonly:
        why.append(f"{name} is read-only")
    if want is not None and out.shape != want:
        why.append(f"{name} must have shape {want}, but has {out.shape}")
    if out.dtype is not dtype:
        why.append(f"{name} must have {owner}'s dtype {dtype}, but has {out.dtype}")
    check_last(why, name, out)
    if 0 in out.shape:
        return
    reach = 0  # every stride must step over all that the smaller ones reach
    for stride, size in sorted((abs(t), n) for t, n in zip(out.strides, out.shape, strict=True) if n > 1):
        if stride <= reach:
            why.append(f"elements of {name} overlap in memory: shape {out.shape}, strides {out.strides} elements")
            break
        reach += stride * (size - 1)


def check_small(
    why: list[str], name: str, x: View, dtype: DType, owner: str, want: tuple[int, ...] | None
) -> None:
    """A bias or the like: float32 or its owner's dtype, of exactly the shape `want` where that is known."""
    if x.dtype is not FP32 and x.dtype is not dtype:
        why.append(f"{name} has dtype {x.dtype}, which must be float32{or_else(dtype, owner)}; {cast(name, x)}")
    if want is not None and x.shape != want:
        why.append(f"{name} must have shape {want}, but has {x.shape}")
    check_last(why, name, x)


def check_list(why: list[str], name: str, x: View) -> None:
    """An int32 array with one dimension."""
    if x.dtype is not INT32:
        why.append(f"{name} has dtype {x.dtype}, which must be int32; {cast(name, x, 'int32')}")
    check_ranks(why, 1, ((name, x),))
    check_last(why, name, x)


def check_eights(why: list[str], *sizes: tuple[str, int, str]) -> None:
    """Sizes that are multiples of 8: name, size, and which arrays to pad."""
    for name, n, what in sizes:
        if n % 8 or n < 8:
            pad = f" (pad {what} with zeros to {-(-n // 8) * 8})" if n else ""
            why.append(f"{name} is {n}; it must be a multiple of 8{pad}")


# ---- values ----


def count(why: list[str], name: str, value: object) -> int:
    """The value as an int from 1 on; 0 where it is none."""
    n = integer(value)
    if n is None or not 1 <= n <= INT_MAX:
        why.append(f"{name} must be an int from 1 on, but is {show(value)}")
        return 0
    return n


def flag(why: list[str], name: str, value: object) -> bool:
    """The value as a bool; False where it is none."""
    if boolean(value) is None:
        why.append(f"{name} must be a bool, but is {have(value)}")
        return False
    return bool(value)


def clamp_alpha(why: list[str], activation: object, known: bool, value: object) -> float:
    """swiglu_alpha as the kernels take it; 0 where there is none. known: the activation is one of ours."""
    if value is None:
        return SWIGLUOAI_ALPHA if activation == "swigluoai" else 0.0
    alpha = real(value)
    if alpha is None or not -FLOAT_MAX <= alpha <= FLOAT_MAX:
        why.append(f"swiglu_alpha must be a number finite in float32, but is {have(value)}")
    if known and activation != "swigluoai":
        why.append(f"swiglu_alpha is for activation='swigluoai'; {show(activation)} has no use for it")
    return alpha or 0.0


def clamp_limit(why: list[str], activation: object, known: bool, value: object) -> float:
    """swiglu_limit as the kernels take it; 0 where nothing is clamped."""
    if value is None:
        return SWIGLUOAI_LIMIT if activation == "swigluoai" else 0.0
    limit = real(value)
    if limit is None or not limit > 0.0:
        why.append(f"swiglu_limit must be a positive number (inf: no clamp), but is {have(value)}")
    if known and activation not in ("swiglu", "swigluoai"):
        why.append(f"swiglu_limit is for activation='swiglu' and 'swigluoai'; {show(activation)} has no use for it")
    if limit is not None and limit > FLOAT_MAX:
        return math.inf if activation == "swigluoai" else 0.0
    return limit or 0.0


# ---- words ----


def or_else(dtype: DType, owner: str) -> str:
    """The second dtype that a small array may have; nothing where it would be float32 again."""
    return f" or {owner}'s dtype {dtype}" if dtype in (BF16, FP16) else ""


def cast(name: str, x: View, dtype: str = "float32") -> str:
    """The words that change an array's dtype, in its library."""
    if x.library not in _MODULES:
        return f"cast it to {dtype}"
    return f"cast with {name}.{'to' if x.library == 'torch' else 'astype'}({_MODULES[x.library]}.{dtype})"


def cast_bias(x: View) -> str:
    """The words for a bias that cannot be added. Integers may be meant as a mask or as numbers, which only the caller
    knows.
    """
    if "int" not in x.dtype.name:
        return cast("bias", x)
    mask = "bias.bool()" if x.library == "torch" else "bias != 0"
    return f"for a mask, where True attends, give {mask}; numbers to add: {cast('bias', x)}"


def copy(name: str, x: View) -> str:
    """The words that make an array contiguous, in its library."""
    if x.library == "torch":
        return f"copy with {name}.contiguous()"
    return f"copy with {_MODULES[x.library]}.ascontiguousarray({name})" if x.library in _MODULES else "copy it"


_MODULES = {"torch": "torch", "jax": "jnp", "cupy": "cupy", "numpy": "np"}


def place(x: View) -> str:
    """Whose array it is and where it lies, in words."""
    owner: Any = getattr(x.owner, "source", x.owner)  # arrays taken by DLPack keep their producer there
    kind = f"{type(owner).__module__.partition('.')[0]}.{type(owner).__name__}"
    way = {"dlpack": " by DLPack", "cai": " by __cuda_array_interface__", "jax": " of JAX"}.get(x.library, "")
    return f"{kind}{way} on {'the CPU' if x.device < 0 else f'cuda:{x.device}'}"


def show(value: object) -> str:
    """A value in an error: repr of numbers and short tuples, the type of an array, whose repr could copy from a GPU."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, numbers.Number)):
        return repr(value)
    if isinstance(value, (tuple, list)) and len(value) <= 4:
        return f"({', '.join(map(show, value))})"
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if name.startswith("jax") and name.endswith("Tracer"):
        return "traced by JAX (options are Python values: name it in static_argnames of jax.jit)"
    return f"a {name}"


def have(value: object) -> str:
    """`show` of what should be a number; an array without dimensions comes with the word that makes it one."""
    said = show(value)
    scalar = said.startswith("a ") and hasattr(value, "item") and getattr(value, "shape", None) == ()
    return f"{said} without dimensions; its .item() is a Python value" if scalar else said


def asked(op: str, named: Named, options: Sequence[Option]) -> str:
    """The call in one line: dtypes and shapes of the arrays, and the options that are not at their defaults."""
    words = [f"{name}={x.dtype.name}{list(x.shape)}" for name, x in named]
    words += [f"{name}={show(value)}" for name, value, default in options if not _is_default(value, default)]
    return f"{op}({', '.join(words)})"


def _is_default(value: object, default: object) -> bool:
    numbers = int, float  # 0 and 0.0 say the same, 0 and False do not
    return show(value) == show(default) or (type(value) in numbers and type(default) in numbers and value == default)


def need_ranks(op: str, ranks: Mapping[str, int], shapes: Mapping[str, Sequence[object]]) -> None:
    """Raises UnsupportedProblem for arrays with another number of dimensions, by the names and shapes of all."""
    why = [
        f"{name} must have {rank} dimensions, but has {len(shapes[name])}"
        for name, rank in ranks.items()
        if len(shapes[name]) != rank
    ]
    if why:
        raise UnsupportedProblem(op, why)
