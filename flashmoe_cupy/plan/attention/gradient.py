"""The problem of attention's backward: that of the forward, and how the arrays of the gradient lie. No GPU, no CuPy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flashmoe_cupy.dtypes import BOOL, FP32, DType
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.plan.attention.problem import AttentionProblem, attention_problem, varlen_problem
from flashmoe_cupy.plan.checks import (
    SHORT,
    asked,
    cast,
    check_dtypes,
    check_last,
    check_out,
    check_places,
    check_ranks,
    flag,
    show,
)
from flashmoe_cupy.plan.options import needed, text

if TYPE_CHECKING:
    from flashmoe_cupy.arrays import View

Strides = tuple[int, int, int]
NEEDS = "q", "k", "v", "sinks", "bias"
GRADIENTS = "dq", "dk", "dv", "dsinks", "dbias"


class AttentionBwdProblem(NamedTuple):
    """Everything but the pointers. Strides count elements; where sequences are packed, those of the batch are 0."""

    forward: AttentionProblem  # its out_strides are those of the given out
    dout_strides: Strides  # from batch entry to batch entry, from row to row, from head to head
    dq_strides: Strides
    dk_strides: Strides
    dv_strides: Strides
    lse_strides: Strides  # from batch entry to batch entry, from head to head, from row to row
    dlse_strides: Strides | None  # None: lse has no gradient
    wanted: tuple[str, ...]  # of GRADIENTS, in their order
    new: tuple[str, ...]  # of dq, dk and dv: made by the call, so that rows that do not count become 0
    deterministic: bool = True  # the same bits in every run
    bias_shape: tuple[int, ...] = ()  # entries, heads, queries and keys of the bias, each 1 or all; (): there is none

    @property
    def dtype(self) -> DType:
        """Of q, k, v, out and dout."""
        return self.forward.dtype

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute: no entry, or neither a query nor a key."""
        p = self.forward
        return not p.batch or not (p.total_q * p.heads_q or p.total_k * p.heads_k)

    @property
    def rows_aligned(self) -> bool:
        """Whether strides keep every row of every array at a multiple of 16 bytes, and each tile within 4 GiB."""
        p = self.forward
        like = p._replace(q_strides=self.dq_strides, k_strides=self.dk_strides, v_strides=self.dv_strides,
                          out_strides=self.dout_strides)  # fmt: skip
        return p.rows_aligned and like.rows_aligned

    def describe(self) -> str:
        """One line, for example "attention backward bf16 b2 q4096 k4096 h32/8 d128 causal: dq dk dv"."""
        text = self.forward.describe().replace("attention", "attention backward", 1)
        return f"{text}: {' '.join(self.wanted)}"


class GradientProblem(NamedTuple):
    """One launch of the backward. part: "dot", "sinks", "bias", or which of q, k and v get theirs: "q", "kv", ..."""

    of: AttentionBwdProblem
    part: str

    @property
    def dtype(self) -> DType:
        """Of q, k, v, out and dout."""
        return self.of.dtype

    @property
    def rows_aligned(self) -> bool:
        """See AttentionBwdProblem."""
        return self.of.rows_aligned

    def describe(self) -> str:
        """The whole backward, and this part of it."""
        return f"{self.of.describe()} ({self.part})"


def backward_problem(dout: View, q: View, k: View, v: View, out: View, lse: View, **given: Any) -> AttentionBwdProblem:
    """Validate the arguments of `flash_attention_backward`. Raises one UnsupportedProblem that holds every reason."""
    return _problem("flash_attention_backward", {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse}, given)


def varlen_backward_problem(
    dout: View, q: View, k: View, v: View, out: View, lse: View, **given: Any
) -> AttentionBwdProblem:  # fmt: skip
    """The same for `flash_attention_varlen_backward`."""
    main = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    return _problem("flash_attention_varlen_backward", main, given)


_OWN = "dlse", "dq", "dk", "dv", "need", "deterministic"  # what the forward does not know
_DEFAULTS = {
    "causal": False, "window_size": (-1, -1), "softmax_scale": None, "softcap": 0.0, "layout": "bshd",
    "need": "q k v", "deterministic": False,
}  # fmt: skip


def _problem(name: str, main: dict[str, View], given: dict[str, Any]) -> AttentionBwdProblem:
    packed = "varlen" in name
    make = varlen_problem if packed else attention_problem
    own = {key: given.get(key) for key in _OWN}
    rest = {key: value for key, value in given.items() if key not in _OWN}
    why: list[str] = []
    p, hint = None, ""
    try:
        p = make(main["q"], main["k"], main["v"], **rest)
    except UnsupportedProblem as error:
        why += [reason for reason in error.reasons if "one library" not in reason]  # told of all arrays, below
        hint = error.hint
    wanted = _wanted(why, own["need"], given, packed)
    flag(why, "deterministic", own["deterministic"])
    kind = "packed" if packed else text(given.get("layout", "bshd"))
    _check_forward(why, main, own["dlse"], kind)
    new = []
    for key in ("dq", "dk", "dv"):
        target, of = own[key], main[key[1]]
        if target is None:
            new.append(key)
        elif wanted and key not in wanted:
            why.append(f"{key} is given, but need leaves {key[1]} out")
        else:
            found: list[str] = []
            check_out(found, target, key[1], of.dtype, of.shape, key)
            why += [reason.partition("; copy")[0] for reason in found]  # a copy would keep the result to itself
    options = {**_DEFAULTS, "max_seqlen_q": None, "max_seqlen_k": None}
    given_arrays = {key: x for key, x in given.items() if key not in options and x is not None}
    check_places(why, [*main.items(), *given_arrays.items()])
    if why or p is None:
        said = [(key, given[key], value) for key, value in options.items() if key in given]
        raise UnsupportedProblem(asked(name, [*main.items(), *given_arrays.items()], said), why, _hint(why, kind, hint))
    s = 2 if p.heads_first else 1

    def rows(x: View | None, fresh: Sequence[int]) -> Strides:
        """Strides by batch entry, row and head. fresh: the shape of a new, row-major array in place of None."""
        strides = tuple(x.strides) if x is not None else _row_major(fresh)
        return (0, strides[0], strides[1]) if packed else (strides[0], strides[s], strides[3 - s])

    def statistics(x: View) -> Strides:
        return (0, x.strides[0], x.strides[1]) if packed else (x.strides[0], x.strides[1], x.strides[2])

    dlse, bias = own["dlse"], given.get("bias")
    return AttentionBwdProblem(
        forward=p._replace(out_strides=rows(main["out"], ()), clear_rest=0),
        dout_strides=rows(main["dout"], ()),
        dq_strides=rows(own["dq"], main["q"].shape),
        dk_strides=rows(own["dk"], main["k"].shape),
        dv_strides=rows(own["dv"], main["v"].shape),
        lse_strides=statistics(main["lse"]),
        dlse_strides=None if dlse is None else statistics(dlse),
        wanted=wanted,
        new=tuple(new),
        deterministic=bool(own["deterministic"]),
        bias_shape=() if bias is None else (1,) * (4 - len(bias.shape)) + bias.shape,
    )


def _wanted(why: list[str], need: object, given: dict[str, Any], packed: bool) -> tuple[str, ...]:
    """The gradients that `need` names, in the order of GRADIENTS."""
    said = needed(need)
    names = (said or "").split()
    known = NEEDS[:4] if packed else NEEDS  # packed sequences have no bias
    if not names or any(name not in known for name in names):
        why.append(f"need must name some of {', '.join(known)}, but is {'empty' if said == '' else show(need)}")
    for name in known[3:]:
        if name in names and given.get(name) is None:
            why.append(f"need names {name}, but {name} is not given")
    bias = given.get("bias")
    if "bias" in names and bias is not None and bias.dtype is BOOL:
        why.append("need names bias, but a boolean bias has no gradient")
    return tuple([f"d{name}" for name in NEEDS if name in names])


def _check_forward(why: list[str], main: dict[str, View], dlse: View | None, kind: str | None) -> None:
    """What the forward gave, and the gradients of that. kind: "packed", or the layout, which may be a wrong one."""
    q, v = main["q"], main["v"]
    rank = 3 if kind == "packed" else 4
    for name in ("dout", "out"):
        x = main[name]
        if q.dtype not in SHORT:
            check_dtypes(why, [(name, x)])
        elif x.dtype is not q.dtype:
            why.append(f"{name} must have q's dtype {q.dtype}, but has {x.dtype}")
        want = (*q.shape[:-1], *v.shape[-1:]) if len(q.shape) == len(v.shape) == rank else None
        _check_shape(why, name, x, want, rank)
        check_last(why, name, x)
    places = {"packed": (1, 0), "bshd": (0, 2, 1), "bhsd": (0, 1, 2)}.get(kind or "", ())  # in q, of the axes of lse
    want = tuple([q.shape[i] for i in places]) if places and len(q.shape) == rank else None
    for name, one in (("lse", main["lse"]), ("dlse", dlse)):
        if one is None:
            continue
        if one.dtype is not FP32:
            why.append(f"{name} has dtype {one.dtype}, which must be float32; {cast(name, one)}")
        _check_shape(why, name, one, want, rank - 1)


def _check_shape(why: list[str], name: str, x: View, want: tuple[int, ...] | None, rank: int) -> None:
    if want is None:
        check_ranks(why, rank, ((name, x),))
    elif x.shape != want:
        why.append(f"{name} must have shape {want}, but has {x.shape}")


_SHAPES = {  # of out, and of lse
    "bshd": ("(batch, seqlen_q, heads_q, head_dim_v)", "(batch, heads_q, seqlen_q)"),
    "bhsd": ("(batch, heads_q, seqlen_q, head_dim_v)", "(batch, heads_q, seqlen_q)"),
    "packed": ("(total_q, heads_q, head_dim_v)", "(heads_q, total_q)"),
}


def _hint(why: Sequence[str], kind: str | None, forward: str) -> str:
    """What would run: what the forward says of its arguments, and what concerns those of the gradient alone."""
    from flashmoe_cupy.plan.hints import ATTENTION, hint  # words of errors alone

    kind = kind if kind in _SHAPES else "bshd"
    out, lse = _SHAPES[kind]
    theirs = [topic for topic in ATTENTION[kind] if not topic[1].startswith("out ")]  # here out is an argument
    own = [
        (r"^d?out ", f"dout and out are {out}, in q's dtype"),
        (r"^d?lse ", f"lse, which the forward gives with return_lse=True, and dlse are {lse}, float32"),
        (r"^need|leaves", "need is a string or a tuple of names of arguments, as in need='q k v'"),
        (r"^d[qkv] (?!is given)|\bof d[qkv]\b", "dq, dk and dv have the shapes and dtype of q, k and v, are writable "
         "and share no memory; or None"),
    ]  # fmt: skip
    said = [forward] if forward else []
    for topic in (*own, *theirs):
        found = hint(why, [topic])
        if found and found not in forward:
            said.append(found)
    return re.sub(r"\bflash_attention(_varlen)?\b", r"\g<0>_backward", "; ".join(said))


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))
