"""Random problems on the emulated GPU: padding, biases of every kind and stride, and what both kernels leave of them.

A number draws a problem, the same one in every run. float64 judges; what must not count is NaN; every array lies beside
memory that nobody can access; each order of events must leave the same bits. Head dims are those of few configurations,
since compiling one takes longer than running many problems.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import emulate
import numpy as np
import pytest
from emulate import EmulationError, guarded
from emulated_attention import SM80, SM90, attention, choose, faults
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from test_emulated_attention import Fault

from flashmoe_cupy.testing import AttentionCase, Case, VarlenCase

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing())),
]

NUMBERS = range(40)
EDGES = (1, 2, 7, 63, 64, 65, 127, 128, 129, 200)
KINDS = ("bool", "bool", "same", "float32", "")  # of the bias, by number; "": none
Pick = random.Random
Array = NDArray[Any]
Lay = Callable[[Array, str], Array]

# ---------------------------------------------------------------------------------------------------------------------
# what is drawn


def lengths(pick: Pick, batch: int, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(left, used) of each batch entry: none, some or all of n rows, from any on."""
    used = tuple([pick.choice((n, n, pick.randint(n // 2, n), pick.choice((0, n)))) for _ in range(batch)])
    return tuple([pick.choice((0, pick.randint(0, end // 2), pick.choice((end // 2, end)))) for end in used]), used


def drawn(number: int) -> Case:
    pick = Pick(number)
    heads_k, group = pick.choice(((1, 1), (2, 1), (1, 2), (1, 4), (2, 3), (1, 6), (1, 16)))
    batch, bias = pick.choice((1, 2, 3)), KINDS[number % len(KINDS)]
    most = 900 // (batch * heads_k * group)  # rows of all heads
    common: dict[str, Any] = {
        "heads_q": heads_k * group, "heads_k": heads_k, "head_dim": pick.choice((8, 40, 64)),
        "head_dim_v": pick.choice((0, 8, 64)), "causal": pick.random() < 0.5,
        "window_size": pick.choice(((-1, -1), (-1, -1), (pick.choice((-1, 0, 40)), pick.choice((-1, 0, 70))))),
        "sinks": pick.choice(("", "same", "float32")),
    }  # fmt: skip
    if bias:  # beside one, all of this is one compiled kernel, but for a mask
        common["softmax_scale"] = pick.choice((None, 0.3, -0.2))
        common["softcap"] = pick.choice((0.0, 0.0, 15.0))
        common["alibi"] = pick.choice(("", "", "h" if not common["sinks"] else ""))  # a sink far above all scores is 0
    if not bias and pick.random() < 0.5:
        rows, keys = (tuple([pick.choice((0, 1, pick.randint(2, 99))) for _ in range(4)]) for _ in "qk")
        return VarlenCase(rows, keys, tail_q=pick.choice((0, 3)), tail_k=2, **common)
    seqlen_q = min(most, pick.choice((*EDGES, pick.randint(1, 300))))
    seqlen_k = pick.choice((*EDGES, pick.randint(1, 300)))
    if pick.random() < 0.5:
        for axis, n in (("q", seqlen_q), ("k", seqlen_k)):
            common[f"left_{axis}"], common[f"used_{axis}"] = lengths(pick, batch, n)
    if bias:
        common["bias"] = "".join([pick.choice((axis, axis, axis, "1")) for axis in "bhqk"])[pick.choice((0, 0, 1, 2)) :]
        common["bias_dtype"] = bias
    return AttentionCase(seqlen_q, seqlen_k, batch, **common)


def values_of(case: Case, number: int, spread: tuple[int, ...]) -> dict[str, Array]:
    """The arrays; a bias has hidden tiles, one value along each axis of `spread`, and NaN where it must not count."""
    arrays, pick, rng = case.random(number), Pick(f"{number} hidden"), np.random.default_rng(number)
    if not isinstance(case, AttentionCase) or not case.bias:
        return arrays
    bias = arrays["bias"]
    rows, keys = bias.shape[-2:]
    hidden = rng.random((-(-rows // 32), -(-keys // 64))) < pick.choice((0.0, 0.4, 0.9))
    hidden = np.repeat(np.repeat(hidden, 32, 0), 64, 1)[:rows, :keys]
    bias[..., hidden] = False if bias.dtype == bool else -np.inf
    bias[...] = bias[tuple([slice(0, 1) if axis in spread else slice(None) for axis in range(bias.ndim)])]
    if bias.dtype != bool and not spread:
        counts = np.zeros((case.batch, 1, case.seqlen_q, case.seqlen_k), bool)
        for one, (begin, end), (first, last) in zip(counts, case.spans("q"), case.spans("k"), strict=True):
            one[:, begin:end, first:last] = True
        full = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        single = tuple([axis for axis, n in enumerate(full.shape) if n == 1])
        full[np.broadcast_to(~counts.any(single, keepdims=True), full.shape)] = np.nan
    return arrays


def strange(pick: Pick, x: Array, spread: tuple[int, ...], before: bool) -> Array:
    """x with its axes in any order, backwards, stretched, padded, from any address on; stride 0 along `spread`."""
    plain = pick.random() < 0.3  # as the copy engine wants it, or nearly
    order = [*range(x.ndim)] if plain or pick.random() < 0.6 else pick.sample(range(x.ndim), x.ndim)
    strides, step = [0] * x.ndim, 1
    for axis in reversed(order):
        if axis in spread:
            continue
        strides[axis] = step * (1 if plain else pick.choice((1, 1, 1, 2)))
        step = strides[axis] * x.shape[axis]
        step += -step % 16 if plain else pick.choice((0, 0, 1, 3, 8))
        strides[axis] *= 1 if plain else pick.choice((1, 1, 1, -1))
    ends = [(n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)]
    low, high = sum(min(end, 0) for end in ends), sum(max(end, 0) for end in ends)
    shift = pick.choice((0, 0, 8, 1, 2, 3))
    blank: Any = True if x.dtype == bool else np.nan
    memory = guarded(np.full(shift + high - low + 1, blank, x.dtype), "bias", before)
    # Nothing follows the one element of an axis, so its stride may be anything.
    strides = [pick.choice((s, 3, -1001)) if n == 1 else s for n, s in zip(x.shape, strides, strict=True)]
    found = as_strided(memory[shift - low :], x.shape, [stride * x.itemsize for stride in strides])
    first = tuple([slice(0, 1) if axis in spread else slice(None) for axis in range(x.ndim)])
    found[first] = x[first]
    return found


def what_is_wrong(
    number: int, kernel: str, seeds: tuple[int, ...], headers: Mapping[str, str] | None = None
) -> list[str]:  # fmt: skip
    case, pick = drawn(number), Pick(f"{number} spread")
    rank = len(case.bias) if isinstance(case, AttentionCase) else 0
    spread = tuple([axis for axis in range(rank) if pick.random() < 0.1])
    arrays, found, bits = values_of(case, number, spread), [], set()
    config = choose(case, kernel)
    for seed in seeds:

        def lay(x: Array, name: str, seed: int = seed) -> Array:
            before = seed % 2 == 1
            return strange(Pick(f"{number} strides"), x, spread, before) if name == "bias" else guarded(x, name, before)

        try:
            out, lse = attention(
                case, kernel, seed, config, headers, sms=2 + seed, resident=1 + seed % 2, given=arrays, lay=lay
            )
        except EmulationError as error:
            found.append(str(error))
            continue
        found += faults(case, kernel, out, lse, arrays)
        bits.add((out.tobytes(), lse.tobytes()))
    return found + ["bits depend on the order of events"] * (len(bits) > 1)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [SM80, SM90])
@pytest.mark.parametrize("number", NUMBERS)
def test_random_problems(number: int, kernel: str) -> None:
    assert what_is_wrong(number, kernel, (1, 5)) == [], drawn(number)


FAR = 2**31 - 1
NO_ROWS: dict[str, Any] = {
    "used_q": (-1, 500, FAR, -FAR, 60), "used_k": (FAR, 100, -7, 150, 90), "left_q": (-5, 3, 200, -FAR, 70),
    "left_k": (0, -FAR, 40, FAR, 30),
}  # fmt: skip
ROWS: dict[str, Any] = {
    "used_q": (0, 70, 70, 0, 70), "used_k": (150, 100, 40, 150, 90), "left_q": (0, 3, 70, 0, 70),
    "left_k": (0, 0, 40, 150, 30),
}  # fmt: skip


@pytest.mark.parametrize("kernel", [SM80, SM90])
@pytest.mark.parametrize("bias", ["", "bool", "same"])
def test_lengths_that_are_no_rows_are_the_nearest_ones(bias: str, kernel: str) -> None:
    case = AttentionCase(70, 150, 5, 2, 1, 64, bias="1hqk" if bias else "", bias_dtype=bias or "same", causal=True)
    case = case._replace(**ROWS)
    arrays = case.random()
    for name, given in case._replace(**NO_ROWS).indices().items():
        assert faults(case, kernel, *attention(case, kernel, 1, given=arrays | {name: given}), arrays) == []


@pytest.mark.parametrize("kernel", [SM80, SM90])
def test_used_rows_of_packed_sequences_may_be_any_number(kernel: str) -> None:
    case = VarlenCase((10, 20, 5), (10, 20, 5), (0, 20, 0), (0, 20, 5), tail_q=3, causal=True)
    arrays = case.random()
    given = arrays | case._replace(used_q=(-4, 300, -FAR), used_k=(-FAR, FAR, 77)).indices()
    for seed in range(2):
        assert faults(case, kernel, *attention(case, kernel, seed, given=given), arrays) == []


# What the problems above have to notice: a kernel, and what is wrong in one of its headers.
FAULTS = {
    "pairs of a bias from odd places on": (
        SM80, Fault("attention/bias_sm80.cuh", "p.bias_stride_q % 2 == 0 && ", "")
    ),
    "a bias whose axes lie the other way": (
        SM90, Fault("attention/bias_rows.cuh", "row = matrix * p.queries + query;", "row = matrix * p.queries;")
    ),
    "a bias beside keys that begin elsewhere": (
        SM90, Fault("attention/schedule_sm90.cuh", "from_step<kKeyStep>(without", "from_step<1>(without")
    ),
    "keys of padding that count": (SM90, Fault("attention/fwd_sm90.cuh", "hide_keys(r_s[0], before)", "")),
    "values of padding that are no numbers": (
        SM90, Fault("attention/outside_sm90.cuh", "if (head) clear_rows", "if (false) clear_rows")
    ),
    "a mask from the first key of the array on": (
        SM90, Fault("attention/mask_words.cuh", "found.k_row * p.bias_stride_k;", "0;")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_noticed(name: str) -> None:
    kernel, fault = FAULTS[name]
    assert any(what_is_wrong(number, kernel, (1,), fault.headers()) for number in NUMBERS)
