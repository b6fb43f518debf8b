"""Threads of the NumPy back end: the same bits with any number of them, and what they are asked to do."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_cupy import flash_attention, flash_attention_varlen, moe_route
from flashmoe_cupy.arrays import view
from flashmoe_cupy.cpu import attention, moe, small, threads, tile
from flashmoe_cupy.cpu.tile import Sequences
from flashmoe_cupy.plan.attention.problem import attention_problem

Array = Any


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Any:
    """few(n): from now on n threads, however small the problem is."""
    monkeypatch.setattr(attention, "_ONE_THREAD", 0)
    monkeypatch.setattr(moe, "_ONE_THREAD", 0)
    monkeypatch.setattr(moe, "_SCORES", 1 << 10)
    return lambda n: monkeypatch.setattr(threads, "count", lambda: n)


def same(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (50, 9), "softcap": 3.0}], ids=str)
def test_attention_has_the_same_bits_with_any_threads(dtype: str, options: dict[str, Any], few: Any) -> None:
    rng = np.random.default_rng(0)
    q, k, v = [rng.standard_normal((2, 300, h, 16), np.float32).astype(dtype) for h in (4, 2, 2)]
    x, y, z = [a.reshape(600, -1, 16) for a in (q, k, v)]
    cu = np.array([0, 40, 40, 600], np.int32)
    lengths: dict[str, Any] = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 560, "max_seqlen_k": 560}
    few(1)
    dense = flash_attention(q, k, v, **options, return_lse=True)
    ragged = flash_attention_varlen(x, y, z, **lengths, **options, return_lse=True)
    for n in (2, 5):
        few(n)
        same(flash_attention(q, k, v, **options, return_lse=True), dense)
        same(flash_attention_varlen(x, y, z, **lengths, **options, return_lse=True), ragged)


def test_the_router_has_the_same_bits_with_any_threads(few: Any) -> None:
    logits = np.random.default_rng(0).standard_normal((900, 24), np.float32)
    few(1)
    alone = moe_route(logits, top_k=5, return_stats=True)
    for n in (2, 5):
        few(n)
        found = moe_route(logits, top_k=5, return_stats=True)
        same((*found[:2], *found[2]), (*alone[:2], *alone[2]))


def test_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    for text, wanted in (("", 6), ("4", 4), ("3,2", 3), ("1", 1), ("64", 6), ("0", 6), ("many", 6), (" 2 ", 2)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert threads.count() == wanted
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads.count() == 6


def test_each_takes_every_item_once_and_in_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "count", lambda: 3)
    met = threading.Barrier(3, timeout=30)
    taken: list[int] = []

    def piece(i: int) -> None:
        if i < 3:
            met.wait()  # passes only if three threads are at work
        assert np.isinf(np.float32(1) / np.zeros(1, np.float32)).all()  # without a warning, which would be an error
        taken.append(i)

    threads.each(lambda: piece, range(50))
    assert sorted(taken) == list(range(50))


def test_each_raises_what_a_piece_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "count", lambda: 2)

    def piece(i: int) -> None:
        if i == 7:
            raise KeyError("seven")
        time.sleep(0.001)

    with pytest.raises(KeyError, match="seven"):
        threads.each(lambda: piece, range(40))
    threads.each(lambda: piece, range(7))  # and goes on


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "count", lambda: 2)
    done: list[int] = []
    threads.each(lambda: done.append, range(8))
    child = os.fork()
    if child == 0:
        met = threading.Barrier(2, timeout=20)

        def wait(_: int) -> None:
            met.wait()

        try:
            threads.each(lambda: wait, range(2))
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(done) == 8


@given(st.integers(1, 300), st.integers(1, 900), st.sampled_from([(1, 1), (8, 1), (9, 3), (48, 2)]),
       st.sampled_from([(8, 8), (64, 64), (128, 40), (256, 512)]))  # fmt: skip
def test_products_stay_on_the_calling_thread(
    seqlen_q: int, seqlen_k: int, heads: tuple[int, int], dims: tuple[int, int]
) -> None:
    q = np.zeros((1, seqlen_q, heads[0], dims[0]), np.float32)
    k, v = (np.zeros((1, seqlen_k, heads[1], d), np.float32) for d in dims)
    problem = attention_problem(view(q, "q"), view(k, "k"), view(v, "v"))
    for t in attention._tiles(Sequences(problem, q, k, v, q, None, None, None, None)):
        c = tile._cut(t)
        rows, widest = c.stack * c.queries, max(dims) + c.column
        assert rows * c.keys * widest <= (threads.SINGLE if rows > 1 else threads.SINGLE_VECTOR)
        queries = t.rows.stop - t.rows.start
        assert 0 <= c.strips * c.queries - queries < c.strips and 1 in (c.stack, c.strips)


def test_scores_beyond_the_first_block_may_overflow_and_rows_do_not_notice_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(small, "_SCORES", -1)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1500, 1, 16), np.float32) for _ in range(3))
    plain, lse = flash_attention(q, k, v, return_lse=True)
    k[0, 1200] = 300.0 * np.sign(q[0, 5])  # a score of some hundred for query 5, far behind the first block
    out, lse_2 = flash_attention(q, k, v, return_lse=True)
    large = (q[0, :, 0] @ k[0, 1200, 0]) / 4 > 60
    small_rows = (q[0, :, 0] @ k[0, 1200, 0]) / 4 < -60
    assert large[5] and large.sum() > 100 and small_rows.sum() > 100
    np.testing.assert_allclose(out[0, large], np.broadcast_to(v[0, 1200], out[0, large].shape), rtol=1e-5)
    np.testing.assert_allclose(out[0, small_rows], plain[0, small_rows], rtol=0.1, atol=0.05)
    assert np.isfinite(out).all() and np.isfinite(lse_2).all() and np.isfinite(lse).all()


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_best_is_the_stable_order(experts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    hostile = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38], np.float32)
    choice = rng.choice(hostile[: rng.integers(1, 11)], (7, experts))
    choice[0, 0] = np.copysign(np.float32(np.nan), -1)
    for k in {1, (experts + 1) // 2, experts}:
        expected = np.argsort(-choice, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(moe._best(choice, k), expected)


# ------------------------------------------------------------------------------------------- the short way in for NumPy


def test_a_second_call_finds_the_plan_of_its_own_options() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 6, 6, 8), np.float32) for _ in range(3))
    asked: list[dict[str, Any]] = [
        {}, {"causal": True}, {"layout": "bhsd"}, {"layout": "bhsd", "causal": True}, {"softcap": 2.0},
        {"window_size": (1, 1)}, {"softmax_scale": 0.3},
    ]  # fmt: skip
    first = [flash_attention(q, k, v, **options, return_lse=True) for options in asked]
    for options, expected in zip(asked, first, strict=True):
        same(flash_attention(q, k, v, **options, return_lse=True), expected)
        same([flash_attention(q, k, v, **options)], expected[:1])
    half = [a.astype(ml_dtypes.bfloat16) for a in (q, k, v)]
    assert flash_attention(*half).dtype == ml_dtypes.bfloat16
    turned = np.ascontiguousarray(q.swapaxes(1, 2)).swapaxes(1, 2)
    np.testing.assert_allclose(flash_attention(turned, k, v), first[0][0], rtol=1e-5, atol=1e-6)
    for _ in range(2):  # what was refused once is not let through by the plan of another call
        with pytest.raises(ValueError, match="byte order"):
            flash_attention(q.astype(">f4"), k, v)
        with pytest.raises(ValueError, match="mask"):
            flash_attention(np.ma.masked_array(q), k, v)
