"""The registry: which kernel takes a problem and why not another one, its configuration, and what it hands the GPU."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from test_problem import array, dense, packed

from flashmoe_cupy.dtypes import BF16, BOOL, FP16, FP32, INT32
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.jit.device import H100
from flashmoe_cupy.jit.tensormap import TensorMap
from flashmoe_cupy.plan import kernels
from flashmoe_cupy.plan.archs import ARCHS, MAX_SMEM
from flashmoe_cupy.plan.attention import softcap
from flashmoe_cupy.plan.attention.forward import AttentionFwd, AttentionFwdSm80, AttentionFwdSm90
from flashmoe_cupy.plan.attention.problem import AttentionProblem
from flashmoe_cupy.plan.kernels import KERNELS, choose, of_task, only

SM80, SM90 = "attention_fwd_sm80", "attention_fwd_sm90"
hopper = AttentionFwdSm90()


def problem(
    batch: int = 2, q: int = 300, k: int = 400, heads_q: int = 8, heads_k: int = 2, d: int = 128, dv: int = 0,
    dtype: Any = BF16, **options: Any,
) -> AttentionProblem:  # fmt: skip
    return dense(
        q=array(batch, q, heads_q, d, dtype=dtype), k=array(batch, k, heads_k, d, dtype=dtype),
        v=array(batch, k, heads_k, dv or d, dtype=dtype), **options,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# which kernel


def test_special_kernels_come_first() -> None:
    assert list(of_task("attention_fwd")) == [SM90, SM80]
    assert [arch for arch in ARCHS if KERNELS[SM90].configs(arch)] == ["sm_90a"]
    assert all(KERNELS[SM80].configs(arch) for arch in ARCHS)


OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"causal": True}, {"window_size": (5, 6)}, {"softcap": 9.0}, {"softmax_scale": -1.0},
    {"sinks": array(8, dtype=FP32)}, {"alibi_slopes": array(2, 8, dtype=FP32)},
    {"bias": array(300, 400, dtype=FP32)}, {"dtype": FP16}, {"d": 8, "dv": 512}, {"d": 256}, {"heads_k": 8},
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_hopper_gets_its_own_kernel(options: dict[str, Any]) -> None:
    p = problem(**options)
    assert p.rows_aligned
    assert choose("attention_fwd", p, "sm_90a", True).name == SM90
    assert choose("attention_fwd", packed(), "sm_90a", True).name == SM90
    for arch in ARCHS:
        if arch != "sm_90a":
            assert choose("attention_fwd", p, arch, True).name == SM80
            assert "sm_90a" in KERNELS[SM90].why_not(p, arch)[0]


TURNED = (300 * 8 * 128, -8 * 128, 128, 1)
REFUSED: tuple[tuple[AttentionProblem, bool, str], ...] = (
    (problem(dtype=FP32), True, "float32"),
    (problem(), False, "16 bytes"),
    (problem(k=0), True, "is 0"),
    (problem(q=0), True, "is 0"),
    (problem(batch=0), True, "is 0"),
    (problem(heads_q=0, heads_k=0), True, "is 0"),
    (packed(k=array(0, 2, 64), v=array(0, 2, 32)), True, "is 0"),
    (packed(max_seqlen_k=0), True, "is 0"),
    (dense(q=array(2, 300, 8, 128, strides=TURNED), k=array(2, 9, 8, 128), v=array(2, 9, 8, 128)), True, "q has a"),
    (dense(k=array(2, 7, 2, 64, strides=(2**40, 128, 64, 1))), True, "k has a"),
    (dense(v=array(2, 7, 2, 32, strides=(448, 64, -32, 1))), True, "v has a"),
    (dense(out=array(2, 5, 4, 32, strides=(2**40, 128, 32, 1))), True, "out has a"),
    (
        dense(
            q=array(1, 5, 4, 192), k=array(1, 2**30 + 1, 2, 192, strides=(0, 0, 192, 1)),
            v=array(1, 2**30 + 1, 2, 192, strides=(0, 0, 192, 1)), bias=array(1, 2**30 + 1, dtype=BOOL),
        ), True, "31 and 24"
    ),
    (problem(32, 2**20, 2**20, 1, 1, bias=array(32, 1, 1, 2**20, dtype=BOOL)), True, "31 and 24"),
    (problem(batch=2**15, q=2**18, heads_q=64, heads_k=1), True, "tiles"),
)  # fmt: skip


@pytest.mark.parametrize(("p", "aligned", "word"), REFUSED, ids=[f"{i}: {r[2]}" for i, r in enumerate(REFUSED)])
def test_what_the_hopper_kernel_leaves_to_the_general_one(p: AttentionProblem, aligned: bool, word: str) -> None:
    (reason,) = hopper.why_not(p, "sm_90a", aligned)
    assert word in reason
    if "tiles" not in word:
        assert choose("attention_fwd", p, "sm_90a", aligned).name == SM80


def test_what_was_passed_over() -> None:
    """The reasons of faster kernels of that architecture, and of no others."""
    general, turned = KERNELS[SM80], REFUSED[8][0]
    (why,) = kernels.passed_over(general, turned, "sm_90a", True)
    assert "q has a stride" in why
    assert kernels.passed_over(general, turned, "sm_80", True) == []
    assert kernels.passed_over(KERNELS[SM90], problem(), "sm_90a", True) == []
    with only(SM80):
        assert kernels.passed_over(general, turned, "sm_90a", True) == []


def test_all_reasons_at_once() -> None:
    assert len(hopper.why_not(problem(dtype=FP32, k=0), "sm_90a", False)) == 3
    many = dense(k=array(2, 7, 2, 64, strides=(2**40, 128, 64, 1)), v=array(2, 7, 2, 32, strides=(448, -64, 32, 1)))
    assert [reason[0] for reason in hopper.why_not(many, "sm_90a")] == ["k", "v"]


def test_dimensions_of_one_may_have_any_stride() -> None:
    """Nothing follows them, so a stride that TMA could not take does not matter."""
    p = dense(
        q=array(1, 1, 4, 64, strides=(-7, 3, 64, 1)), k=array(1, 7, 1, 64, strides=(2**50, 64, -1, 1)),
        v=array(1, 7, 1, 32, strides=(1, 32, 1, 1)),
    )  # fmt: skip
    assert p.rows_aligned and hopper.why_not(p, "sm_90a") == []
    for one in hopper.map_arguments(p, hopper.choose(p, "sm_90a")):
        assert all(stride > 0 and stride % 16 == 0 for stride in one.strides)


def test_nothing_runs() -> None:
    with pytest.raises(UnsupportedProblem, match=r"compute capability 8\.0") as caught:
        choose("attention_fwd", problem(), "sm_75", True)
    assert "sm_75 is not supported" in caught.value.reasons[0] and len(caught.value.reasons) == 1


def test_only() -> None:
    calls: list[str] = []
    kernels.forget.append(lambda: calls.append("forgotten"))
    try:
        with only(SM80):
            assert choose("attention_fwd", problem(), "sm_90a", True).name == SM80 and len(calls) == 1
            with only(SM90):
                assert choose("attention_fwd", problem(), "sm_90a", True).name == SM90
                with pytest.raises(UnsupportedProblem, match="float32"):
                    choose("attention_fwd", problem(dtype=FP32), "sm_90a", True)
            assert choose("attention_fwd", problem(), "sm_90a", True).name == SM80
        assert choose("attention_fwd", problem(), "sm_90a", True).name == SM90 and len(calls) == 4
        with pytest.raises(KeyError), only("attention_fwd_sm10"):
            pass
        with pytest.raises(ZeroDivisionError), only(SM80):
            raise ZeroDivisionError
        assert choose("attention_fwd", problem(), "sm_90a", True).name == SM90
    finally:
        kernels.forget.pop()


def test_only_makes_remembered_plans_go() -> None:
    import numpy as np

    from flashmoe_cupy.ops import attention

    plans = attention._DENSE.plans

    q = np.zeros((1, 3, 2, 8), np.float32)
    attention.flash_attention(q, q, q)
    assert len(plans)
    with only(SM80):
        assert not len(plans)
        attention.flash_attention(q, q, q)
        assert len(plans)
    assert not len(plans)


# ---------------------------------------------------------------------------------------------------------------------
# configurations


def test_hopper_configurations_are_legal() -> None:
    for config in hopper.configs("sm_90a"):
        assert config.smem_bytes <= MAX_SMEM["sm_90a"]
        assert config.block_m % 64 == 0 and config.threads == 128 + 2 * config.block_m
        assert config.block_n % 16 == 0 and config.block_n <= 256, "a box has at most 256 rows"
        assert config.variant != "PlainScoresUnaligned" and config.element != "fp32"


def test_shared_memory_by_hand() -> None:
    """Two buffers of queries where they fit, one where not; rows are whole panels of 64; 16 KiB for 64 rows of out."""
    by_name = {config.name: config for config in hopper.configs("sm_90a")}
    tile, rest = 64 * 128, 2 * 16384 + 4 * (72 + 2 * 24) + 4 * 16 + 2 * 32
    one, two = by_name["bf16 d128 128x160x2 PlainScores"], by_name["fp16 d64/256 128x64x2 MaskScores<fm::PlainScores>"]
    assert one.smem_bytes == 2 * 2 * tile + 2 * 2 * 160 * 256 + rest + 2 * 16
    assert two.smem_bytes == 2 * 2 * tile + 2 * 64 * (128 + 512) + rest + 2 * 2 * 16
    three = by_name["bf16 d64 192x128x3 PlainScores"].smem_bytes  # each consumer has its steps in the record
    assert three == 2 * 3 * tile + 3 * 128 * 256 + 3 * 16384 + 4 * (72 + 3 * 24) + 16 * (3 * 2 + 2 * 3 + 4)
    narrow = by_name["bf16 d96 128x128x2 PlainScores"]
    assert narrow.smem_bytes == by_name["bf16 d128 128x128x2 PlainScores"].smem_bytes


DIMS = (
    ((8, 8), (64, 64)), ((64, 64), (64, 64)), ((64, 72), (96, 96)), ((64, 128), (128, 128)), ((64, 136), (64, 256)),
    ((8, 512), (64, 256)), ((72, 64), (96, 96)), ((104, 104), (128, 128)), ((128, 256), (256, 256)),
    ((136, 128), (192, 128)), ((192, 128), (192, 128)), ((192, 136), (192, 192)), ((160, 160), (192, 192)),
    ((200, 8), (256, 256)), ((256, 512), (256, 256)), ((128, 512), (256, 256)),
)  # fmt: skip


@pytest.mark.parametrize(("dims", "compiled"), DIMS, ids=str)
def test_hopper_head_dims(dims: tuple[int, int], compiled: tuple[int, int]) -> None:
    p = problem(d=dims[0], dv=dims[1])
    config = hopper.choose(p, "sm_90a")
    assert (config.head_dim, config.head_dim_v) == compiled
    packed = 2 ** hopper.pack_bits(p)
    assert packed == 4 and hopper.tiles(p, config) == -(-1200 // config.block_m) * (-(-dims[1] // compiled[1])) * 2 * 2


def tile(**options: Any) -> tuple[int, int, int]:
    # Nothing to pack, and whole rounds of tiles on 132 multiprocessors, however many a head has.
    config = hopper.choose(problem(**({"batch": 33, "heads_k": 8} | options)), "sm_90a")
    assert config in hopper.configs("sm_90a")
    return config.block_m, config.block_n, config.stages


def test_rows_choose_the_tile_at_d_64() -> None:
    """The rows of a tile by how many stay empty, and many of them with few keys where queries see few."""
    wide, fine, low = (192, 128, 3), (256, 64, 4), (128, 128, 3)
    for q, want in ((1, low), (128, low), (129, wide), (192, wide), (193, fine), (256, fine), (300, wide), (385, fine)):
        assert tile(d=64, q=q, k=300) == want, q
    cases: tuple[tuple[tuple[int, int, int], dict[str, Any]], ...] = (
        (fine, {"q": 512, "k": 512}), (fine, {"q": 1024, "k": 1024}), (wide, {"q": 2048, "k": 2048}),
        (fine, {"q": 1024, "k": 1024, "causal": True}), (wide, {"q": 2048, "k": 2048, "causal": True}),
        (fine, {"q": 10**6, "k": 10**6, "window_size": (127, 0)}), (wide, {"q": 10**6, "k": 10**6}),
        (fine, {"q": 10**6, "k": 10**6, "softmax_scale": -1.0}), (low, {"q": 1, "softmax_scale": -1.0}),
    )  # fmt: skip
    for want, options in cases:
        assert tile(d=64, **options) == want, options


def bits(**options: Any) -> int:
    return hopper.pack_bits(problem(**options))


def test_few_queries_pack_the_heads_of_a_group() -> None:
    """A power of two of them, at most 16, where that saves a tenth of the tiles."""
    for group, want in ((1, 0), (2, 1), (3, 0), (4, 2), (6, 1), (7, 0), (8, 3), (12, 2), (16, 4), (64, 4), (71, 0)):
        assert bits(q=1, heads_q=2 * group) == want, group
    # 8 heads by 8, 100, 112, 113, 128, 129 queries: 1, 7, 7, 8, 8, 9 tiles packed; 8, 8, 8, 8, 8, 16 not.
    for q, want in ((8, 3), (100, 3), (112, 3), (113, 0), (128, 0), (129, 3), (1000, 0), (4096, 0)):
        assert bits(q=q, heads_q=16) == want, q
    assert bits(q=9, softcap=3.0) == 2 and bits(q=9, sinks=array(8, dtype=FP32)) == 2 and bits(q=9, causal=True) == 2
    mask = array(8, 9, 400, dtype=BOOL)
    for score in ({"softmax_scale": -1.0}, {"bias": mask}, {"alibi_slopes": array(2, 8, dtype=FP32)}):
        assert bits(q=9, **score) == 0, "scores that depend on the head"
    for bias in (array(1, 1), array(8, 9, 400), array(9, 400, dtype=FP32), array(2, 1, 9, 400, dtype=BOOL)):
        assert bits(q=9, bias=bias) == 2, "the copy engine brings the rows of all heads"
    p = problem(q=9, heads_q=16, d=64)
    assert any("8 heads that share keys" in why for why in hopper.reasons(p, hopper.choose(p, "sm_90a")))
    assert hopper.choose(p, "sm_90a").block_m == 128 and AttentionFwdSm80().pack_bits(p) == 0
    assert hopper.tiles(p, hopper.choose(p, "sm_90a")) == 2 * 2, "72 rows: a tile each for two groups of two sequences"


def test_keys_choose_the_tile_at_d_128() -> None:
    """Wide tiles of keys from 4096 keys on that a query sees on average; how many queries there are does not matter."""
    wide, narrow = (128, 160, 2), (128, 128, 2)
    cases: tuple[tuple[tuple[int, int, int], dict[str, Any]], ...] = (
        (narrow, {"k": 4095}), (wide, {"k": 4096}), (wide, {"q": 1, "k": 4096}),
        (narrow, {"k": 8191, "causal": True}), (wide, {"k": 8192, "causal": True}),
        (narrow, {"k": 9000, "window_size": (2000, 2094)}), (wide, {"k": 9000, "window_size": (2000, 2095)}),
        (narrow, {"k": 9000, "window_size": (4094, 0)}), (wide, {"k": 9000, "window_size": (4095, 0)}),
        (narrow, {"k": 100, "window_size": (9000, 0)}), (wide, {"k": 9000, "window_size": (-1, 5)}),
        (narrow, {"k": 9000, "softmax_scale": -1.0}), (wide, {"k": 9000, "softcap": 1.0}),
    )  # fmt: skip
    for want, options in cases:
        assert tile(d=128, **options) == tile(d=128, **(options | {"q": 10**6})) == want, options


def test_whole_rounds_choose_the_tile_where_all_tiles_are_alike() -> None:
    """448 queries of 160 heads: 3 rounds of 256 rows, 4 of 192 (0.93 the time of a row), 5 of 128 on 132 of them."""
    p = problem(batch=8, q=448, k=1500, heads_q=20, heads_k=20, d=64)
    assert hopper.choose(p, "sm_90a", True, H100).block_m == 192
    assert hopper.choose(p._replace(causal=True, window_right=0), "sm_90a", True, H100).block_m == 256
    assert hopper.choose(p, "sm_90a", True, H100._replace(multiprocessors=320)).block_m == 256, "one round of all tiles"


def test_queries_that_see_no_key_have_no_tiles() -> None:
    p = problem(q=5121, k=33, heads_q=8, heads_k=8, d=128, causal=True)
    config = hopper.choose(p, "sm_90a")
    assert hopper.blocks(p, config)[0] == 1 and hopper.values(p, config, True)["may_unsee"] == 1
    assert hopper.tiles(p, config) == 16 and hopper.grid(p, config, 132) == 132, "more blocks fill the other rows"
    assert hopper.grid(problem(q=40, k=33, heads_q=8, heads_k=8, d=128, causal=True), config, 132) == 16
    assert AttentionFwdSm80().blocks(p, AttentionFwdSm80().choose(p, "sm_90a"))[0] == 41, "which has no rows to fill"
    for options in ({}, {"causal": True, "window_size": (5, 0)}, {"window_size": (-1, 3)}):
        few, many = problem(q=300, k=200, **options), problem(q=200, k=300, **options)
        assert hopper.values(many, hopper.choose(many, "sm_90a"), True)["may_unsee"] == 0
        assert hopper.values(few, hopper.choose(few, "sm_90a"), True)["may_unsee"] == bool(options)
    for uneven in (problem(q=300, k=300, causal=True, seqused_k=array(2, dtype=INT32)), packed(causal=True)):
        assert hopper.values(uneven, hopper.choose(uneven, "sm_90a"), True)["may_unsee"] == 1


def test_tiles_that_lengths_do_not_choose() -> None:
    for d, dv in ((256, 256), (192, 128), (64, 256)):
        assert len({tile(d=d, dv=dv, q=q, k=k) for q in (1, 5000) for k in (1, 400, 9000)}) == 1
    for d in (8, 64, 96, 128, 192, 256):
        for q, k in ((1, 1), (5000, 9000)):
            wide = (64 if d > 192 else 128, 128 if d <= 64 else 96 if d <= 128 else 64, 2)
            assert tile(d=d, q=q, k=k, bias=array(q, k, dtype=FP32), softcap=1.0) == wide
            few = {tile(d=d, q=n, k=k, bias=array(n, k), alibi_slopes=array(8, dtype=FP32)) for n in (1, 300, 5000)}
            assert len(few) == 1
            few = {tile(d=d, q=n, k=k, bias=array(1, 1, dtype=BOOL)) for n in (1, 300, 5000)}
            assert len(few) == 1 or d <= 64


def test_a_bias_that_all_queries_share_is_a_value_for_each_key() -> None:
    def chosen(**options: Any) -> str:
        return hopper.choose(problem(**options), "sm_90a").variant

    b, h, q, k = 2, 8, 300, 400
    for shape in ((1, k), (b, 1, 1, k), (1, 1), (b, 1, 1, 1)):
        assert chosen(bias=array(*shape)) == "KeyBiasScores<2>", shape
        assert chosen(bias=array(*shape, dtype=FP32)) == "KeyBiasScores<4>", shape
        assert chosen(bias=array(*shape), softcap=3.0) == "BiasScores<2>", shape
    assert chosen(bias=array(h, 1, k)) == "BiasScores<2>", "heads that lie side by side differ"
    assert chosen(bias=array(h, 1, k), heads_k=h) == "KeyBiasScores<2>"
    for shape in ((q, k), (b, 1, q, 1), (b, h, q, k)):
        assert chosen(bias=array(*shape), heads_k=h) == "BiasScores<2>", shape
    p = problem(bias=array(b, 1, 1, k), heads_k=2, q=9)
    (bias_map,) = hopper.map_arguments(p, hopper.choose(p, "sm_90a"))[4:]
    assert bias_map.box == (128, 1, 1, 1, 1) and bias_map.swizzle == 0 and hopper.pack_bits(p) == 2


def test_the_other_tile_is_a_reason() -> None:
    cases = (
        (problem(q=5), "128x128 rather than 128x160"),
        (problem(batch=33, d=64, q=2048, k=2048), "192x128 rather than 256x64, 128x128"),
    )
    for p, words in cases:
        assert words in hopper.reasons(p, hopper.choose(p, "sm_90a"))[-1]
    single = problem(d=256)
    assert not any("rather" in reason for reason in hopper.reasons(single, hopper.choose(single, "sm_90a")))


def test_every_choice_is_in_the_closed_set() -> None:
    """All head dims, features, short and long lengths, on both kernels."""
    features: tuple[dict[str, Any], ...] = (
        {}, {"softcap": 1.0}, {"softcap": 99.0}, {"softmax_scale": -1.0}, {"bias": array(1, 1, dtype=FP32)},
        {"bias": None}, {"bias": array(1, 1, dtype=BOOL)}, {"bias": array(1, 1, dtype=BOOL), "softcap": 1.0},
        {"bias": array(1, 1, dtype=FP32), "softcap": 1.0}, {"bias": None, "softcap": 1.0},
    )  # fmt: skip
    lengths = ((1, 400), (200, 400), (2000, 5000), (255, 400))
    for kernel in of_task("attention_fwd").values():
        used, every = set(), set(kernel.configs("sm_90a"))
        grid = itertools.product(range(8, 257, 8), range(8, 513, 8), lengths, features, (BF16, FP16, FP32))
        for d, dv, (q, k), options, dtype in grid:
            if "bias" in options:
                options = options | {"bias": options["bias"] or array(1, 1, dtype=dtype)}
            if (d + dv) % 48:
                continue
            p = problem(batch=33, q=q, k=k, heads_k=8, d=d, dv=dv, dtype=dtype, **options)
            if not kernel.why_not(p, "sm_90a"):
                used.add(kernel.choose(p, "sm_90a"))
        assert used <= every
        assert {c for c in every if "Unaligned" not in c.variant} == used


@pytest.mark.parametrize("kernel", of_task("attention_fwd").values(), ids=lambda kernel: kernel.name)
def test_the_sanitizer_launches_every_configuration(kernel: AttentionFwd) -> None:
    pytest.importorskip("cupy")
    import sanitize
    from emulated_attention import problem_of

    used = set()
    for case in sanitize.cases():
        p = problem_of(case, case.random())
        ways = [aligned for aligned in (True, False) if not kernel.why_not(p, "sm_90a", aligned)]
        used |= {kernel.choose(p, "sm_90a", aligned) for aligned in ways}
    assert used == set(kernel.configs("sm_90a"))


# ---------------------------------------------------------------------------------------------------------------------
# what the GPU gets


def test_grid_and_section() -> None:
    def numbers(p: AttentionProblem, sms: int) -> tuple[int, int, int]:
        config = hopper.choose(p, "sm_90a")
        return hopper.tiles(p, config), hopper.grid(p, config, sms), hopper.section(p, config, sms)

    plain = problem(q=4096, k=4096)  # 32 tiles of queries, 16 heads in all
    assert numbers(plain, 132) == (512, 132, 1), "all tiles take as long: head after head"
    assert numbers(plain._replace(causal=True, window_right=0), 132) == (512, 132, 8), "two rounds of 132 in 32 tiles"
    assert numbers(plain._replace(window_left=100), 132) == (512, 132, 8)
    assert numbers(plain._replace(window_left=4096 + 4096), 132) == (512, 132, 1), "a window that hides nothing"
    assert numbers(plain._replace(window_right=0), 1000) == (512, 512, 16)
    assert numbers(problem(q=10**6, k=10**6, causal=True), 132)[2] == 1, "one head fills two rounds"
    wide = problem(q=100, d=64, dv=512, causal=True)  # one tile of queries, two blocks of values
    assert numbers(wide, 132) == (32, 32, 0), "few tiles in each head"
    assert numbers(problem(q=600, k=600, causal=True), 132) == (80, 80, 16), "not more heads than there are"


def test_params_of_the_hopper_kernel() -> None:
    """The general kernel's values, which the tile may change, and its own."""
    p = problem(q=4096, k=4096, causal=True)
    config = hopper.choose(p, "sm_90a")
    portable = AttentionFwdSm80()
    values = hopper.values(p, config, True, 100)
    base = portable.values(p, portable.choose(p, "sm_90a"), True)
    assert {name: values[name] for name in base} == base | {"m_blocks": 32}
    section = hopper.section(p, config, 100)
    assert section > 1 and {name: values[name] for name in values if name not in base} == {
        "tiles": 512, "batch": 2, "section": section, "tile_counter": 0, "total_q": 0, "clear_rest": 0,
        "may_unsee": 0, "pack_bits": 0, "mask_batches": 1, "mask_lists": 1, "mask_list": 33, "mask_stride_b": 0,
        "mask_stride_h": 0, "mask_stride_q": 0, **softcap.fields("", 1.0, 0.0),
    }  # fmt: skip
    assert len(hopper.params.pack(values)) == 512 - 128 and len(portable.params.pack(base)) == 344 - 128
    assert hopper.counter_at(p) == 0 and hopper.counter_at(packed()) == hopper.params.fields["tile_counter"].at == 360
    rest = hopper.values(packed(), config, True, 100)
    assert (rest["total_q"], rest["clear_rest"]) == (packed().total_q, 0)
    assert hopper.params.size == 1152 and "alignof(fm::AttentionFwdSm90Params) == 128" in hopper.source(config)
    assert f"__launch_bounds__({config.threads}, 1)" in hopper.source(config)


def test_softcap_is_a_polynomial_of_small_scores() -> None:
    """Exponents of 2 up to a part of the softcap, as float32 computes them; then numbers that no float32 holds."""
    kinds = ((FP16, "SoftcapScores", 0.5, 1.5e-6), (BF16, "BoundedSoftcapScores", 0.6, 4e-6))
    for dtype, variant, most, error in kinds:
        p = problem(softcap=30.0, softmax_scale=0.125, dtype=dtype)
        config = hopper.choose(p, "sm_90a")
        extra: Any = hopper.values(p, config, True)
        assert config.variant == variant and extra["query_scale"] == (1.0 if dtype is FP16 else 2.0**-4)
        assert extra["to_tanh"] == 0.125 / 30 / extra["query_scale"]
        for name, terms, end, wrong in (("exponent", 4, most, error), ("short", 2, 2 * extra["to_tanh"], 9e-5)):
            if dtype is FP16 and name == "short":
                assert extra["softcap_short"] == [0.0, 0.0], "the bounded variant's only"
                continue
            c = np.array(extra[f"softcap_{name}"], np.float32)
            assert len(c) == terms
            s = np.linspace(-end, end, 2001, dtype=np.float32) / np.float32(extra["to_tanh"])
            found = s * np.polynomial.polynomial.polyval(s * s, c)
            want = 30 * np.tanh(s.astype(np.float64) * extra["to_tanh"]) / np.log(2)
            np.testing.assert_allclose(found, want, rtol=wrong, atol=1e-30)
    odd = problem(softcap=2e-38, softmax_scale=1e38)
    config = hopper.choose(odd, "sm_90a")
    assert config.variant == "SoftcapScores" and len(hopper.params.pack(hopper.values(odd, config, True))) == 384
    assert hopper.choose(problem(softcap=56.5), "sm_90a").variant == "SoftcapScores", "exponents beyond bf16's range"
    for options in ({"alibi_slopes": array(8, dtype=FP32)}, {"softmax_scale": -1.0}):
        assert hopper.choose(problem(softcap=1.0, **options), "sm_90a").variant == "ModifiedScores<false>"


@pytest.mark.parametrize("scale", [1e-4, 0.0442, 0.125, 0.7, 1.0])
@pytest.mark.parametrize("cap", [1.2, 15.0, 28.0, 50.0, 56.0])
def test_scores_below_two_need_two_coefficients(scale: float, cap: float) -> None:
    """Queries are scaled by a power of two, so that one bit of a score says whether it is in range."""
    kind = softcap.variant(scale, cap, True)
    assert kind == (softcap.UNBOUNDED if scale / cap > 0.15 else softcap.BOUNDED)
    f: Any = softcap.fields(softcap.BOUNDED, scale, cap)
    assert np.log2(f["query_scale"]) % 1 == 0 and 0.1 < 2 * f["to_tanh"] <= 0.3
    s = np.linspace(-2, 2, 2001)
    found = s * (f["softcap_short"][0] + f["softcap_short"][1] * s * s)
    assert np.abs(found - cap * np.tanh(s * f["to_tanh"]) / np.log(2)).max() < 8.5e-4, "beside the 2e-3 of bf16"


def test_packed_sequences_have_their_own_order() -> None:
    p = packed(causal=True)
    values = hopper.values(p, hopper.choose(p, "sm_90a"), True)
    assert values.items() >= ({"tiles": p.batch * p.heads_k, "batch": p.batch, "section": 1, "lengths": 2} | {
        "tile_counter": 0, "total_q": p.total_q, "clear_rest": 0, "pack_bits": 1,
    }).items()  # fmt: skip


def test_padded_batches_have_that_order_too() -> None:
    """The lengths are on the device: no section, a counter of tiles, and rows may follow the last key."""
    used = array(2, dtype=INT32)
    even = problem(causal=True, q=4096, k=4096)
    p = problem(causal=True, q=4096, k=4096, seqused_k=used, leftpad_q=used, return_lse=True)
    config = hopper.choose(p, "sm_90a")
    assert config == hopper.choose(even, "sm_90a"), "the lengths change no configuration"
    assert (even.lengths, p.lengths, p.clear_rest) == ((), ("seqused_k", "leftpad_q"), 3)
    assert hopper.values(even, config, True)["lengths"] == 0 and hopper.counter_at(even) == 0
    values = hopper.values(p, config, True)
    assert (values["lengths"], values["section"], values["total_q"]) == (1, 1, 0)
    assert hopper.counter_at(p) == hopper.params.fields["tile_counter"].at
    assert hopper.map_arguments(p, config) == hopper.map_arguments(even, config)
    assert problem(seqused_k=used).clear_rest == 0, "all queries count"
    assert problem(leftpad_q=used, out=array(2, 300, 8, 128)).clear_rest == 0, "a given out keeps its other rows"


def test_maps_of_a_dense_problem() -> None:
    p = problem(q=384, k=400, d=96, dv=64)
    config = hopper.choose(p, "sm_90a")
    q, k, v, out = hopper.map_arguments(p, config)
    assert q == TensorMap(BF16, (96, 4, 384, 2, 2), (192, 8 * 192, 4 * 192, 384 * 8 * 192), (64, 1, 64, 1, 1))
    assert k == TensorMap(BF16, (96, 400, 2, 2), (2 * 192, 192, 400 * 2 * 192), (64, config.block_n, 1, 1))
    assert v == TensorMap(BF16, (64, 400, 2, 2), (2 * 128, 128, 400 * 2 * 128), (64, config.block_n, 1, 1))
    assert out == TensorMap(BF16, (64, 8, 384, 2), (128, 8 * 128, 384 * 8 * 128), (64, 1, 16, 1))
    q, _, _, out = hopper.map_arguments(problem(q=20, k=400), config)
    assert q.box == (64, 4, 16, 1, 1) and out.box == (64, 4, 4, 1), "four heads of a group for each query"
    assert AttentionFwdSm80().map_arguments(p, AttentionFwdSm80().choose(p, "sm_90a")) == ()


def test_maps_of_other_layouts() -> None:
    swapped = dense(q=array(2, 8, 300, 64), k=array(2, 8, 400, 64), v=array(2, 8, 400, 64), layout="bhsd")
    q, k, _, out = hopper.map_arguments(swapped, hopper.choose(swapped, "sm_90a"))
    assert q.dims == (64, 1, 300, 8, 2) and q.strides == (16, 128, 300 * 128, 8 * 300 * 128)
    assert k.dims == (64, 400, 8, 2) and k.strides == (128, 400 * 128, 8 * 400 * 128)
    assert out.dims == (64, 8, 300, 2) and out.strides == (300 * 128, 128, 8 * 300 * 128)
    one = dense(k=array(2, 7, 2, 64, strides=(0, 64, 0, 1)), v=array(2, 7, 2, 32, strides=(0, 32, 0, 1)))
    _, k, *_ = hopper.map_arguments(one, hopper.choose(one, "sm_90a"))
    assert k.strides == (128, 0, 0) and hopper.why_not(one, "sm_90a") == [], "a broadcast head has stride 0"


def test_maps_of_packed_sequences() -> None:
    p = packed(seqused_k=array(3, dtype=INT32))
    q, k, v, out = hopper.map_arguments(p, hopper.choose(p, "sm_90a"))
    assert q.dims == (64, 2, 12, 2, 1) and q.strides == (128, 4 * 128, 2 * 128, 16)
    assert k.dims == (64, 20, 2, 1) and k.strides == (2 * 128, 128, 16)
    assert v.dims == (32, 20, 2, 1) and v.strides == (2 * 64, 64, 16)
    assert out.dims == (32, 4, 12, 1) and out.strides == (64, 4 * 64, 16)
