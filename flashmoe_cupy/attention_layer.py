"""An attention layer with its projections, rotary positions and a KV cache, for arrays of any library."""

from __future__ import annotations

from typing import Any, NamedTuple, Never

from flashmoe_cupy._types import Array, Window
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.kv_cache import KVCache, new_cache
from flashmoe_cupy.layer_arrays import (
    Library,
    dtype_name,
    float32,
    kind_name,
    kind_of,
    library,
    make_pytree,
    views_of,
    why_not_ints,
)
from flashmoe_cupy.ops.attention import flash_attention, flash_attention_varlen
from flashmoe_cupy.ops.names import no_argument, strict
from flashmoe_cupy.plan.attention.checks import check_heads, check_scalars
from flashmoe_cupy.plan.checks import check_dtypes, check_places, count, have, show
from flashmoe_cupy.plan.options import real, window

_UNLIMITED = (-1, -1)


class AttentionOptions(NamedTuple):
    """What an attention layer is made of, beside its weights."""

    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    causal: bool
    window_size: tuple[int, int]
    softmax_scale: float | None
    softcap: float
    rope_theta: float | None
    norm_eps: float

    def __str__(self) -> str:
        plain = {"n_kv_heads": self.n_heads, "head_dim": self.dim // self.n_heads, "causal": True,
                 "window_size": _UNLIMITED, "softmax_scale": None, "softcap": 0.0, "rope_theta": 1e4,
                 "norm_eps": 1e-6}  # fmt: skip
        named = [f"{name}={getattr(self, name)!r}" for name, value in plain.items() if getattr(self, name) != value]
        return ", ".join([str(self.dim), str(self.n_heads), *named])

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of the weights, as (out, in)."""
        q, k = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {"w_q": (q, self.dim), "w_k": (k, self.dim), "w_v": (k, self.dim), "w_out": (self.dim, q)}


def attention_options(
    name: str, dim: Any, n_heads: Any, n_kv_heads: Any, head_dim: Any, causal: Any, window_size: Any,
    softmax_scale: Any, softcap: Any, rope_theta: Any, norm_eps: Any,
) -> AttentionOptions:  # fmt: skip
    """Validate these for the layer `name`. Raises one UnsupportedProblem that holds every reason."""
    why: list[str] = []
    width, heads = count(why, "dim", dim), count(why, "n_heads", n_heads)
    fewer = heads if n_kv_heads is None else count(why, "n_kv_heads", n_kv_heads)
    each = 0
    if head_dim is not None:
        each = count(why, "head_dim", head_dim)
    elif width and heads:
        each = width // heads
        if width % heads:
            why.append(f"dim {width} is no multiple of n_heads {heads}, so head_dim must be given")
    if heads and fewer and heads % fewer:
        why.append(f"n_heads {heads} is no multiple of n_kv_heads {fewer}")
    elif each:
        check_heads(why, 1, 1, 1, each, each, each)
    scalars = check_scalars(why, causal, window_size, softmax_scale, softcap, each)
    theta, eps = real(rope_theta), real(norm_eps)
    if rope_theta is not None and (theta is None or not 0 < theta < float("inf")):
        why.append(f"rope_theta must be a positive number or None (no rotary positions), but is {have(rope_theta)}")
    if eps is None or not 0 <= eps < float("inf"):
        why.append(f"norm_eps must be a number from 0 on, but is {have(norm_eps)}")
    if why:
        said = f"{name}({show(dim)}, {show(n_heads)}, n_kv_heads={show(n_kv_heads)}, head_dim={show(head_dim)})"
        raise UnsupportedProblem(said, why, "dim=512, n_heads=8, n_kv_heads=2 runs: head_dim is 64, a multiple of 8")
    scale = None if softmax_scale is None else scalars[3]
    sides = window(window_size) or _UNLIMITED
    return AttentionOptions(width, heads, fewer, each, scalars[0], sides, scale, scalars[4], theta, eps or 0.0)


def rotary(xp: Library, x: Any, position_ids: Any, theta: float) -> Any:
    """x (..., rows, heads, dim) with elements i and i + dim / 2 turned by position * theta ** (-2 i / dim), in float32.

    position_ids: (..., rows), integers, without leading axes that x has and it need not.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (float32_of(xp, xp.arange(half, x)) * (-1.0 / half))
    angle = (float32_of(xp, position_ids)[..., None] * frequency)[..., None, :]  # the same for all heads
    cos, sin = xp.xp.cos(angle), xp.xp.sin(angle)
    first, second = float32(x[..., :half]), float32(x[..., half:])
    turned = xp.xp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return xp.cast(turned, x.dtype)


def float32_of(xp: Library, x: Any) -> Any:
    """Integers as float32."""
    return xp.cast(x, xp.xp.float32)


def rms_norm(xp: Library, x: Any, weight: Any, eps: float) -> Any:
    """x over the root of the mean of its squares along the last axis, times weight; in float32, then in x's dtype."""
    wide = float32(x)
    scale = ((wide * wide).mean(-1) + eps) ** -0.5
    return xp.cast(wide * scale[..., None] * float32(weight), x.dtype)


def attend(
    xp: Library, its: AttentionOptions, q: Any, k: Any, v: Any, position_ids: Any = None, cache: KVCache | None = None,
    lengths: Any = None, cu_seqlens: Any = None, max_seqlen: Any = None,
) -> Any:  # fmt: skip
    """Attention of projected rows: q (..., n_heads, head_dim), k and v (..., n_kv_heads, head_dim), as of one call.

    Returns (..., n_heads * head_dim). Its arguments are those of a call that `why_not_call` has nothing against.
    """
    rows = q.shape[-3]
    if its.rope_theta is not None:
        if position_ids is None:
            position_ids = xp.arange(rows, q) if cache is None else cache.positions(rows)
            if cu_seqlens is not None:  # from the start of the sequence that each row belongs to
                last = xp.xp.searchsorted(cu_seqlens, position_ids, side="right") - 1
                position_ids = position_ids - cu_seqlens[last]
        q, k = (rotary(xp, x, position_ids, its.rope_theta) for x in (q, k))
    options: dict[str, Any] = {
        "causal": its.causal, "window_size": its.window_size, "softmax_scale": its.softmax_scale,
        "softcap": its.softcap,
    }  # fmt: skip
    if cu_seqlens is not None:
        out = flash_attention_varlen(
            q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen, **options,
        )  # fmt: skip
    elif cache is not None:
        total = cache.write(k, v, lengths)
        out = flash_attention(q, cache.keys, cache.values, seqused_q=lengths, seqused_k=total, **options)
        cache.count(total, rows)  # not before: an error leaves the cache as it was
    else:
        out = flash_attention(q, k, v, seqused_q=lengths, seqused_k=lengths, **options)
    return out.reshape(*out.shape[:-2], its.n_heads * its.head_dim)


def why_not_call(
    its: AttentionOptions, kind: Any, x: Any, position_ids: Any, cache: Any, lengths: Any, cu_seqlens: Any,
    max_seqlen: Any,
) -> list[str]:  # fmt: skip
    """What is wrong with the arguments of a call; x is an array of the type `kind`."""
    why = []
    packed, shape = cu_seqlens is not None, tuple(x.shape)
    want = "(total, dim) beside cu_seqlens" if packed else "(batch, seqlen, dim)"
    if len(shape) != (2 if packed else 3) or shape[-1] != its.dim:
        why.append(f"x must have shape {want}, with dim {its.dim}, but has {shape}")
        return why
    if packed:
        why += [f"{name} is given beside cu_seqlens, which say the lengths of packed sequences"
                for name, one in (("cache", cache), ("lengths", lengths)) if one is not None]  # fmt: skip
        if max_seqlen is None:
            why.append("cu_seqlens need max_seqlen, at least the longest sequence")
        if not isinstance(cu_seqlens, kind):
            why.append(f"cu_seqlens must be a {kind_name(kind)} like x, but is {show(cu_seqlens)}")
    else:
        if max_seqlen is not None:
            why.append("max_seqlen is given, but no cu_seqlens")
        if cache is not None and not isinstance(cache, KVCache):
            why.append(f"cache must be a KVCache, but is {show(cache)}")
        elif cache is not None and cache.keys.shape[0] != shape[0]:
            why.append(f"the cache has {cache.keys.shape[0]} entries, but x has {shape[0]}")
        if lengths is not None:
            why += why_not_ints("lengths", lengths, kind, [shape[:1]])
    if position_ids is not None and its.rope_theta is None:
        why.append("position_ids are given, but rope_theta=None: the layer has no positions")
    elif position_ids is not None:
        why += why_not_ints("position_ids", position_ids, kind, [shape[:-1], shape[-2:-1]], wide=True)
    return why


_WEIGHTS = "w_q", "w_k", "w_v", "w_out"
_OTHERS = "b_q", "b_k", "b_v", "b_out", "q_norm", "k_norm"


class FlashAttentionLayer:
    """An attention layer: projections of queries, keys and values, rotary positions, attention, the way out.

    dim: of the tokens. n_heads: of queries; n_kv_heads: of keys and values, None = as many. head_dim: None = dim /
        n_heads, a multiple of 8 up to 256.
    w_q: (n_heads * head_dim, dim), w_k and w_v: (n_kv_heads * head_dim, dim), w_out: (dim, n_heads * head_dim), of one
        dtype: bfloat16, float16 or float32. b_q, b_k, b_v, b_out: biases in that dtype, None = none. Products are the
        library's own with torch and JAX, and `grouped_gemm` with NumPy and CuPy where dim is a multiple of 8.
    causal: a query sees no later key. window_size, softmax_scale, softcap: as in `flash_attention`.
    rope_theta: the base of rotary positions, which turn elements i and i + head_dim / 2 of queries and keys; None =
        there are none.
    q_norm, k_norm: (head_dim,) weights of an RMS norm of each head before that, with norm_eps; None = none.

    Arrays are NumPy, CuPy, torch or JAX, all of one library on one device. They are held, not copied, as attributes of
    the same names. Raises UnsupportedProblem with every reason for sizes, options, dtypes and shapes that do not run
    together, TypeError for what is no array.

    A layer of JAX arrays is a pytree, with its arrays as leaves, and jax.grad differentiates it. A layer of torch
    tensors has no parameters() or state_dict(): `flashmoe_cupy.torch.FlashMoEScienceAttention` is the nn.Module.
    """

    @strict
    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        *,
        w_q: Any,
        w_k: Any,
        w_v: Any,
        w_out: Any,
        b_q: Any = None,
        b_k: Any = None,
        b_v: Any = None,
        b_out: Any = None,
        head_dim: int | None = None,
        causal: bool = True,
        window_size: Window = _UNLIMITED,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        rope_theta: float | None = 1e4,
        q_norm: Any = None,
        k_norm: Any = None,
        norm_eps: float = 1e-6,
        **unknown: Never,
    ) -> None:
        if unknown:
            raise no_argument(FlashAttentionLayer.__init__, unknown, "FlashAttentionLayer")
        self.options = attention_options(
            "FlashAttentionLayer", dim, n_heads, n_kv_heads, head_dim, causal, window_size, softmax_scale, softcap,
            rope_theta, norm_eps,
        )  # fmt: skip
        weights = dict(zip(_WEIGHTS, (w_q, w_k, w_v, w_out), strict=True))
        others = dict(zip(_OTHERS, (b_q, b_k, b_v, b_out, q_norm, k_norm), strict=True))
        self._check(weights, {name: x for name, x in others.items() if x is not None})
        self.w_q, self.w_k, self.w_v, self.w_out = w_q, w_k, w_v, w_out
        self.b_q, self.b_k, self.b_v, self.b_out = b_q, b_k, b_v, b_out
        self.q_norm, self.k_norm = q_norm, k_norm
        self._library = library(kind_of(w_q))
        if self._library.name == "jax":
            make_pytree(FlashAttentionLayer)

    def __call__(
        self, x: Array, *, position_ids: Any = None, cache: KVCache | None = None, lengths: Any = None,
        cu_seqlens: Any = None, max_seqlen: int | None = None,
    ) -> Array:  # fmt: skip
        """x (batch, seqlen, dim) to the same shape and dtype; (total, dim) where sequences are packed.

        position_ids: (batch, seqlen), (seqlen,) or (total,), int32 or int64; None = from 0 on, behind the tokens in
            the cache, or in each packed sequence.
        cache: tokens that came before, to which these are added. Keys and values are kept as attention sees them.
        lengths: (batch,) int32: only so many first rows of each entry count; the result of others is b_out or 0.
        cu_seqlens: (batch + 1,) int32, max_seqlen: as in `flash_attention_varlen`; not beside cache and lengths.

        Raises UnsupportedProblem with every reason before anything is written, TypeError for what is no array.
        """
        given: Any = x
        its, xp = self.options, self._library
        if not isinstance(given, xp.kind):
            raise TypeError(f"x must be a {kind_name(xp.kind)} like the layer's weights, but is {show(given)}")
        why = why_not_call(its, xp.kind, given, position_ids, cache, lengths, cu_seqlens, max_seqlen)
        if given.dtype != self.w_q.dtype:
            why.append(f"x has dtype {dtype_name(given)}, but the weights have {dtype_name(self.w_q)}")
        if why:
            raise UnsupportedProblem(f"{self!r}", why, CALL)
        sides: list[tuple[Any, Any, int, Any]] = [
            (self.w_q, self.b_q, its.n_heads, self.q_norm), (self.w_k, self.b_k, its.n_kv_heads, self.k_norm),
            (self.w_v, self.b_v, its.n_kv_heads, None),
        ]  # fmt: skip
        made = []
        for weight, bias, heads, norm in sides:
            rows = xp.linear(given, weight, bias).reshape(*given.shape[:-1], heads, its.head_dim)
            made.append(rows if norm is None else rms_norm(xp, rows, norm, its.norm_eps))
        q, k, v = made
        out = attend(xp, its, q, k, v, position_ids, cache, lengths, cu_seqlens, max_seqlen)
        result: Array = xp.linear(out, self.w_out, self.b_out)
        return result

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty `KVCache` for this layer, in the dtype and on the device of its weights."""
        its = self.options
        return new_cache(self._library, batch, max_length, its.n_kv_heads, its.head_dim, self.w_q, self.w_q.dtype)

    def _check(self, weights: dict[str, Any], others: dict[str, Any]) -> None:
        """Raise for arrays that do not fit."""
        why: list[str] = []
        hints: list[str] = []
        its = self.options
        views = views_of(why, hints, weights | others)
        sizes: dict[str, tuple[int, ...]] = {**its.shapes, "q_norm": (its.head_dim,), "k_norm": (its.head_dim,)}
        sizes |= {f"b{name[1:]}": shape[:1] for name, shape in its.shapes.items()}
        for name, v in views.items():
            if v.shape != sizes[name]:
                why.append(f"{name} must have shape {sizes[name]}, but has {v.shape}")
        if views:
            check_dtypes(why, list(views.items()))
            check_places(why, list(views.items()))
        if any(kind_of(x) is object for x in weights.values()):
            why.append("the arrays of a layer must be NumPy, CuPy, torch or JAX arrays")
        if why:
            shapes = ", ".join(f"{name} {shape}" for name, shape in its.shapes.items())
            hints = [f"weights of shape (out, in) and one dtype: {shapes}", *hints]
            raise UnsupportedProblem(f"FlashAttentionLayer({its})", why, "; ".join(filter(None, hints)))

    def _tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        return tuple([getattr(self, name) for name in (*_WEIGHTS, *_OTHERS)]), (self.options, self._library)

    @classmethod
    def _tree_unflatten(cls, known: Any, leaves: Any) -> FlashAttentionLayer:
        made = cls.__new__(cls)  # leaves may be placeholders of any type, so nothing is checked
        made.options, made._library = known
        for name, leaf in zip((*_WEIGHTS, *_OTHERS), leaves, strict=True):
            setattr(made, name, leaf)
        return made

    def __repr__(self) -> str:
        return f"FlashAttentionLayer({self.options})"


CALL = "x of shape (batch, seqlen, dim), or (total, dim) with cu_seqlens and max_seqlen; lengths are (batch,) int32"
