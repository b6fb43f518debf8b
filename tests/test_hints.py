"""What an error says beside its reasons: the repair, and of what would run only what concerns them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import flashmoe_cupy
from flashmoe_cupy import UnsupportedProblem
from flashmoe_cupy.plan import hints

Arrays = dict[str, Any]


def f32(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


def i32(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int32)


DENSE: Arrays = {"q": f32(2, 6, 4, 16), "k": f32(2, 6, 2, 16), "v": f32(2, 6, 2, 16)}
PACKED: Arrays = {
    "q": f32(6, 4, 16), "k": f32(6, 2, 16), "v": f32(6, 2, 16), "cu_seqlens_q": i32(0, 2, 6),
    "cu_seqlens_k": i32(0, 2, 6), "max_seqlen_q": 4, "max_seqlen_k": 4,
}  # fmt: skip
ROUTE: Arrays = {"logits": f32(3, 8), "top_k": 2}
PERMUTE: Arrays = {"topk_ids": i32(0, 1).reshape(2, 1), "num_experts": 2}
GEMM: Arrays = {"x": f32(4, 8), "w": f32(2, 8, 8), "offsets": i32(0, 2, 4)}
MOE: Arrays = {
    "x": f32(2, 8), "w_gate_up": f32(2, 16, 8), "w_down": f32(2, 8, 8), "topk_weights": f32(2, 1),
    "topk_ids": i32(0, 1).reshape(2, 1),
}  # fmt: skip
GOOD: dict[str, Arrays] = {
    "flash_attention": DENSE, "flash_attention_varlen": PACKED, "moe_route": ROUTE, "moe_permute": PERMUTE,
    "grouped_gemm": GEMM, "fused_moe": MOE,
}  # fmt: skip


def refused(name: str, **change: Any) -> UnsupportedProblem:
    with pytest.raises(UnsupportedProblem) as caught:
        getattr(flashmoe_cupy, name)(**GOOD[name] | change)
    return caught.value


def strided(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same values with a stride of two elements in the last dimension."""
    return np.repeat(x, 2, axis=-1)[..., ::2]


HINTS: list[tuple[str, Arrays, str]] = [
    ("flash_attention", {"window_size": (-7, 0)}, r"window_size=\(left, right\), -1 for no bound"),
    ("flash_attention", {"causal": "yes"}, "True or False"),
    ("flash_attention", {"softcap": -1.0}, "softcap=0.0 is off"),
    ("flash_attention", {"softmax_scale": "1"}, r"softmax_scale=None is head_dim \*\* -0.5"),
    ("flash_attention", {"layout": "sbhd"}, "layout='bshd' is .*"),
    ("flash_attention", {"k": f32(3, 6, 2, 16)}, r"q is \(batch, seqlen_q, heads_q, head_dim\), k and v are [^;]*"),
    ("flash_attention", {"bias": f32(7, 7)}, "bias has 2 to 4 dimensions, which broadcast to [^;]*; bool keeps [^;]*"),
    ("flash_attention", {"sinks": f32(3)}, r"sinks is \(heads_q,\), [^;]*"),
    ("flash_attention", {"q": f32(2, 6, 3, 16)}, "heads_q is a multiple of heads_k[^;]*"),
    ("flash_attention", {"q": strided(DENSE["q"])}, "the last dimension of every array has stride 1[^;]*"),
    ("flash_attention", {"q": DENSE["q"].astype(np.float64)}, "q, k and v share one dtype: [^;]*"),
    ("flash_attention", {"q": f32(2, 6, 4, 20), "k": f32(2, 6, 2, 20)}, "head_dim is a multiple of 8 [^;]*; [^;]*"),
    ("flash_attention_varlen", {"max_seqlen_q": 4.0}, "max_seqlen is a Python int[^;]*"),
    ("flash_attention_varlen", {"max_seqlen_q": 3}, "max_seqlen_q is at least the longest sequence"),
    ("flash_attention_varlen", {"cu_seqlens_q": np.array([0, 2, 6])}, "cu_seqlens are [^;]*"),
    ("moe_route", {"top_k": 9}, "top_k is an int from 1 to 32[^;]*"),
    ("moe_route", {"scoring_func": "relu"}, "scoring_func='softmax' is the default"),
    ("moe_permute", {"num_experts": 0}, "num_experts is an int[^;]*"),
    ("moe_permute", {"expert_map": f32(2)}, "expert_map is [^;]*"),
    ("grouped_gemm", {"bias": f32(2, 9)}, r"bias is \(experts, n\)[^;]*"),
    ("fused_moe", {"b_down": f32(2, 9)}, r"b_down is \(experts, d\)[^;]*"),
    ("fused_moe", {"activation": "silu"}, "[^;]* call silu is 'swiglu' here; gated: [^;]*; not gated: [^;]*"),
    ("fused_moe", {"activation": "sine"}, "gated: [^;]*; not gated: [^;]*"),
    ("fused_moe", {"x": f32(1, 2, 8)}, r"x is .*; tokens are one axis: x.reshape\(-1, d\)[^;]*"),
    ("moe_route", {"logits": f32(1, 3, 8)}, r"logits is .*; tokens are one axis: logits.reshape\(-1, experts\)"),
    ("flash_attention", {"q": f32(6, 4, 16)}, r"q is .*; one sequence is a batch of one: q\[None\].*"),
    ("flash_attention_varlen", {"q": f32(2, 6, 4, 16)}, "q is [^;]*; for padded sequences there is flash_attention"),
    ("fused_moe", {"topk_ids": f32(2, 1)}, "topk_weights [^;]*"),
    ("fused_moe", {"batch_invariant": 1}, "True or False"),
]


@pytest.mark.parametrize(("name", "change", "want"), HINTS)
def test_the_hint_is_about_the_reasons(name: str, change: Arrays, want: str) -> None:
    error = refused(name, **change)
    assert re.fullmatch(want, error.hint), error


def test_every_topic_of_the_reasons_is_in_the_hint() -> None:
    error = refused("flash_attention", window_size=3, causal=1, bias=f32(7, 7))
    assert len(error.reasons) == 3
    for words in ("window_size", "True or False", "bias has 2 to 4"):
        assert words in error.hint
    assert "heads" not in error.hint.replace("heads_q, seqlen_q", "") and "stride" not in error.hint


def test_groups_that_do_not_divide_and_too_many_of_them_are_told() -> None:
    error = refused("moe_route", num_expert_group=3, topk_group=5)
    assert error.reasons == (
        "8 experts do not divide into num_expert_group=3 groups of one size",
        "topk_group is 5, but there are only 3 groups (num_expert_group)",
    )


def test_patterns_are_regular_expressions() -> None:
    tables = [*hints.ATTENTION.values(), hints.ROUTE, hints.PERMUTE, hints.GROUPED_GEMM, hints.moe(1), hints.moe(2)]
    tables += [hints.layer(1), hints.layer(2)]
    for pattern, said in [topic for table in tables for topic in table]:
        re.compile(pattern)
        assert said and not said.endswith(".")


# Arguments of another dtype, and the cast that repairs them.
CASTS: list[tuple[str, str]] = [
    ("flash_attention", "bias"), ("flash_attention", "sinks"), ("flash_attention", "alibi_slopes"),
    ("flash_attention", "q"), ("flash_attention_varlen", "sinks"), ("flash_attention_varlen", "alibi_slopes"),
    ("moe_route", "logits"), ("moe_route", "e_score_correction_bias"), ("grouped_gemm", "bias"), ("grouped_gemm", "w"),
    ("fused_moe", "b_gate_up"), ("fused_moe", "b_down"), ("fused_moe", "topk_weights"), ("fused_moe", "shared_gate"),
    ("fused_moe", "w_down"), ("flash_attention_varlen", "cu_seqlens_q"), ("flash_attention_varlen", "seqused_k"),
    ("moe_permute", "expert_map"), ("moe_permute", "topk_ids"), ("grouped_gemm", "offsets"),
]  # fmt: skip
SMALL: Arrays = {
    "bias": f32(6, 6), "sinks": f32(4), "alibi_slopes": f32(4), "e_score_correction_bias": f32(8),
    "b_gate_up": f32(2, 16), "b_down": f32(2, 8), "shared_gate": f32(2), "seqused_k": i32(2, 4),
    "expert_map": i32(0, 1),
}  # fmt: skip


def other(name: str, argument: str) -> np.ndarray[Any, Any]:
    """A good value of the argument, in 64 bits."""
    x = GOOD[name].get(argument, f32(2, 8) if name == "grouped_gemm" else SMALL.get(argument))
    return x.astype(np.float64)  # type: ignore[no-any-return, union-attr]


@pytest.mark.parametrize(("name", "argument"), CASTS)
def test_a_wrong_dtype_comes_with_its_cast(name: str, argument: str) -> None:
    x = other(name, argument)
    shared: Arrays = {"shared_w_gate_up": f32(16, 8), "shared_w_down": f32(8, 8)} if argument == "shared_gate" else {}
    error = refused(name, **shared, **{argument: x})
    (reason,) = error.reasons
    repair = re.search(rf"cast with ({argument}\.astype\(np\.(\w+)\))$", reason)
    assert repair is not None, reason
    repaired = eval(repair[1], {"np": np, argument: x})
    getattr(flashmoe_cupy, name)(**GOOD[name] | shared | {argument: repaired})


@pytest.mark.torch
@pytest.mark.parametrize(("name", "argument"), CASTS)
def test_a_cast_of_torch(name: str, argument: str) -> None:
    torch = pytest.importorskip("torch")
    arrays = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in GOOD[name].items()}
    x = torch.from_numpy(other(name, argument))
    if argument == "shared_gate":
        arrays |= {"shared_w_gate_up": torch.ones(16, 8), "shared_w_down": torch.ones(8, 8)}
    with pytest.raises(UnsupportedProblem) as caught:
        getattr(flashmoe_cupy, name)(**arrays | {argument: x})
    repair = re.search(rf"cast with ({argument}\.to\(torch\.(\w+)\))$", caught.value.reasons[0])
    assert repair is not None, caught.value
    getattr(flashmoe_cupy, name)(**arrays | {argument: eval(repair[1], {"torch": torch, argument: x})})


COPIES = [
    ("flash_attention", "q"), ("flash_attention", "v"), ("flash_attention", "sinks"),
    ("flash_attention", "alibi_slopes"), ("flash_attention_varlen", "cu_seqlens_k"), ("moe_route", "logits"),
    ("moe_permute", "expert_map"), ("grouped_gemm", "w"), ("grouped_gemm", "offsets"), ("fused_moe", "w_gate_up"),
    ("fused_moe", "w_down"), ("fused_moe", "b_down"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "argument"), COPIES)
def test_strided_arrays_come_with_their_copy(name: str, argument: str) -> None:
    x = strided(GOOD[name].get(argument, SMALL.get(argument)))  # type: ignore[arg-type]
    (reason,) = refused(name, **{argument: x}).reasons
    repair = re.search(rf"copy with (np\.ascontiguousarray\({argument}\))$", reason)
    assert repair is not None, reason
    getattr(flashmoe_cupy, name)(**GOOD[name] | {argument: eval(repair[1], {"np": np, argument: x})})
    torch = pytest.importorskip("torch")
    arrays = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in GOOD[name].items()}
    with pytest.raises(UnsupportedProblem, match=rf"copy with {argument}\.contiguous\(\)"):
        getattr(flashmoe_cupy, name)(**arrays | {argument: torch.from_numpy(x)})


@pytest.mark.parametrize("convert", [lambda x: x, lambda x: pytest.importorskip("torch").from_numpy(x)])
@pytest.mark.parametrize(
    ("name", "argument", "want"),
    [
        ("flash_attention", "q", "q may be bfloat16, float16 or float32"),
        ("flash_attention_varlen", "cu_seqlens_q", "cu_seqlens_q may be int32"),
        ("moe_permute", "topk_ids", "topk_ids may be int32 or int64"),
    ],
)
def test_dtypes_that_run_for_an_argument(convert: Callable[[Any], Any], name: str, argument: str, want: str) -> None:
    x = convert(GOOD[name][argument].astype(np.complex64))
    arrays = {n: convert(v) if isinstance(v, np.ndarray) else v for n, v in GOOD[name].items()}
    with pytest.raises(UnsupportedProblem) as caught:
        getattr(flashmoe_cupy, name)(**arrays | {argument: x})
    assert caught.value.hint == want and "float8" not in str(caught.value)


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("offsets", [i32(0, 5, 2), i32(-1, 2, 6), i32(0, 2, 7)])
@pytest.mark.parametrize("used", [None, i32(1, 1)])
def test_falling_offsets_blame_nothing_else(side: str, offsets: Any, used: Any) -> None:
    error = refused("flash_attention_varlen", **{f"cu_seqlens_{side}": offsets, f"seqused_{side}": used})
    assert error.reasons == (f"cu_seqlens_{side} must not fall and must lie between 0 and 6, the rows of {side}",)
    assert error.hint == f"cu_seqlens_{side} are the running sums of the lengths, from 0"


def test_offsets_of_both_sides_are_told() -> None:
    error = refused("flash_attention_varlen", cu_seqlens_q=i32(0, 5, 2), seqused_k=i32(3, 1), max_seqlen_k=2)
    assert [reason.split()[0] for reason in error.reasons] == ["cu_seqlens_q", "seqused_k", "max_seqlen_k"]


def test_a_call_is_told_alike_whatever_was_wrong() -> None:
    """What lengths hold is seen late, by the back end."""
    options: Arrays = {"causal": True, "window_size": [3, 0], "sinks": f32(4)}
    early = refused("flash_attention_varlen", **options, max_seqlen_q=-1)
    late = refused("flash_attention_varlen", **options, max_seqlen_q=3)
    assert late.reasons != early.reasons
    assert late.asked == early.asked.replace("max_seqlen_q=-1", "max_seqlen_q=3")
    for part in ("q=float32[6, 4, 16]", "sinks=float32[4]", "window_size=(3, 0)"):
        assert part in late.asked
    late = refused("grouped_gemm", offsets=i32(0, 5, 2))
    assert late.asked == "grouped_gemm(x=float32[4, 8], w=float32[2, 8, 8], offsets=int32[3])"
    x = f32(1000)
    for name in ("flash_attention", "flash_attention_varlen", "grouped_gemm", "fused_moe"):
        first, like = next(iter(GOOD[name].items()))
        given = x[: like.size].reshape(like.shape), x[8 : 8 + like.size].reshape(like.shape)
        late = refused(name, **{first: given[0], "out": given[1]})
        shown = f"=float32{list(like.shape)}"
        assert late.asked.startswith(f"{name}({first}{shown}") and f"out{shown}" in late.asked
        assert late.reasons == (f"out shares memory with {first}",)


def test_words_for_the_dtypes_and_dimensions_of_bias() -> None:
    wrong = np.zeros((6, 6))
    assert "must be bool or float32; cast" in refused("flash_attention", bias=wrong).reasons[0]
    half = {name: x.astype(np.float16) for name, x in DENSE.items()}
    (reason,) = refused("flash_attention", **half, bias=wrong).reasons
    assert "must be bool, float32 or q's dtype float16; cast" in reason
    keys = np.linspace(-1, 1, 6, dtype=np.float32)
    (reason,) = refused("flash_attention", bias=keys).reasons
    assert reason.endswith("has shape (6,); for one number per key give bias[None]")
    out = flashmoe_cupy.flash_attention(**DENSE, bias=keys[None])
    full = np.ascontiguousarray(np.broadcast_to(keys, (2, 4, 6, 6)))
    np.testing.assert_array_equal(out, flashmoe_cupy.flash_attention(**DENSE, bias=full))
    assert "2 to 4 dimensions" in str(flashmoe_cupy.flash_attention.__doc__)


@pytest.mark.jax
def test_out_beside_jax_arrays() -> None:
    jnp = pytest.importorskip("jax.numpy")
    moved = {name: jnp.asarray(x) for name, x in DENSE.items()}
    with pytest.raises(UnsupportedProblem) as caught:
        flashmoe_cupy.flash_attention(**moved, out=moved["q"])
    assert len(caught.value.reasons) == 1 and caught.value.hint == "leave out=None: JAX arrays are immutable"
    with pytest.raises(UnsupportedProblem) as caught:
        flashmoe_cupy.flash_attention(**moved | {"k": DENSE["k"]}, out=moved["q"])
    assert len(caught.value.reasons) == 2 and caught.value.hint == (
        "all arrays of one call belong to one library; leave out=None: JAX arrays are immutable"
    )
    with pytest.raises(UnsupportedProblem) as caught:
        flashmoe_cupy.flash_attention(**moved | {"k": DENSE["k"]})
    assert caught.value.hint == "all arrays of one call belong to one library"


def test_what_dir_shows_is_public() -> None:
    flashmoe_cupy.flash_attention(**DENSE)
    assert dir(flashmoe_cupy) == sorted(flashmoe_cupy.__all__)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.int8])
def test_an_integer_bias_may_be_a_mask_or_numbers(dtype: Any) -> None:
    """A cast alone would add 0 and 1 to the scores where a mask was meant."""
    bias = np.tril(np.ones((6, 6), dtype))
    (reason,) = refused("flash_attention", bias=bias).reasons
    words = "for a mask, where True attends, give (.*); numbers to add: cast with (.*)$"
    found = re.search(words, reason)
    assert found is not None, reason
    mask, numbers = (eval(one, {"np": np, "bias": bias}) for one in found.groups())
    assert mask.dtype == bool and numbers.dtype == np.float32
    causal = flashmoe_cupy.flash_attention(**DENSE, causal=True)
    np.testing.assert_array_equal(flashmoe_cupy.flash_attention(**DENSE, bias=mask), causal)
    torch = pytest.importorskip("torch")
    arrays = {n: torch.from_numpy(x) for n, x in DENSE.items()}
    with pytest.raises(UnsupportedProblem, match=r"give bias\.bool\(\); .*cast with bias\.to\(torch\.float32\)"):
        flashmoe_cupy.flash_attention(**arrays, bias=torch.from_numpy(bias))


def test_a_mask_of_keys_comes_with_its_axes() -> None:
    keep = np.arange(6) < np.array([[4], [5]])
    (reason,) = refused("flash_attention", bias=keep).reasons
    assert reason.endswith("for one per key of each batch entry give bias[:, None, None, :]")
    flashmoe_cupy.flash_attention(**DENSE, bias=keep[:, None, None, :])
    (reason,) = refused("flash_attention", bias=f32(2, 6, 6)).reasons
    assert reason.endswith("for the same in all heads give bias[:, None]")
    flashmoe_cupy.flash_attention(**DENSE, bias=f32(2, 6, 6)[:, None])


def test_swapped_arguments_are_told() -> None:
    ids, weights = MOE["topk_ids"], MOE["topk_weights"]
    error = refused("fused_moe", topk_weights=ids, topk_ids=weights)
    want = "topk_weights is int32 and topk_ids is float32: they look swapped; topk_weights comes first"
    assert error.reasons[0] == want
    gate_up, down = f32(2, 48, 8), f32(2, 8, 24)
    error = refused("fused_moe", w_gate_up=down, w_down=gate_up)
    assert len(error.reasons) == 1 and "they look swapped; w_gate_up comes first" in error.reasons[0]
    gate_up = f32(2, 24, 8)  # (E, n, d) and (E, d, n): to swap them and to transpose both is one thing
    error = refused("fused_moe", w_gate_up=down, w_down=gate_up, activation="relu")
    assert "they look swapped, or both are transposed" in error.reasons[0]
    assert "swapped" not in str(refused("fused_moe", w_gate_up=gate_up, w_down=down))


@pytest.mark.parametrize(
    ("q", "k", "layout", "asks"),
    [
        ((2, 16, 1, 64), (2, 16, 512, 64), "bshd", True), ((2, 16, 8, 64), (2, 4, 512, 64), "bshd", True),
        ((2, 1, 16, 64), (2, 512, 16, 64), "bhsd", True), ((2, 6, 3, 16), (2, 6, 2, 16), "bshd", False),
        ((2, 5, 3, 16), (2, 6, 2, 16), "bshd", False), ((2, 16, 1, 60), (2, 16, 512, 64), "bhsd", False),
    ],
)  # fmt: skip
def test_the_other_layout_is_named_where_it_fits(
    q: tuple[int, ...], k: tuple[int, ...], layout: str, asks: bool
) -> None:
    error = refused("flash_attention", q=f32(*q), k=f32(*k), v=f32(*k), layout=layout)
    other = {"bshd": "bhsd", "bhsd": "bshd"}[layout]
    assert (f"did you mean layout='{other}'?" in error.hint) is asks


def test_a_number_in_an_array_is_told_how_to_become_one() -> None:
    torch = pytest.importorskip("torch")
    for name, change in (
        ("flash_attention", {"softmax_scale": torch.tensor(0.1)}), ("flash_attention", {"causal": torch.tensor(True)}),
        ("flash_attention", {"softcap": np.array(1.0)}), ("fused_moe", {"swiglu_limit": torch.tensor(7.0)}),
        ("moe_route", {"routed_scaling_factor": np.array(1.0)}),
    ):  # fmt: skip
        (reason,) = refused(name, **change).reasons
        assert reason.endswith("without dimensions; its .item() is a Python value"), reason
    assert ".item()" not in str(refused("flash_attention", softmax_scale=np.ones(2)))


def test_offsets_that_look_like_lengths(caplog: pytest.LogCaptureFixture) -> None:
    """Rows in front of the first sequence are allowed, so such offsets run, with a word; others are refused with it."""
    from flashmoe_cupy.cpu import offsets

    word = "look like lengths"
    error = refused("flash_attention_varlen", cu_seqlens_q=i32(4, 2), cu_seqlens_k=i32(0, 4))
    assert word in error.hint and "np.cumsum([0, *lengths], dtype=np.int32)" in error.hint
    assert word in refused("grouped_gemm", offsets=i32(3, 1, 0)).hint
    assert word not in refused("flash_attention_varlen", cu_seqlens_q=i32(0, 5, 2)).hint
    caplog.set_level("WARNING", "flashmoe_cupy")
    offsets._warned.clear()
    flashmoe_cupy.flash_attention_varlen(**PACKED | {"cu_seqlens_q": i32(1, 4), "cu_seqlens_k": i32(0, 4)})
    flashmoe_cupy.grouped_gemm(**GEMM)
    assert not caplog.records
    for _ in range(2):
        flashmoe_cupy.flash_attention_varlen(**PACKED | {"cu_seqlens_q": i32(2, 4), "cu_seqlens_k": i32(0, 4)})
        flashmoe_cupy.grouped_gemm(**GEMM | {"offsets": i32(1, 1, 2)})
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all(word in one for one in said), said
    assert said[0].startswith("cu_seqlens_q = [2, 4]") and said[1].startswith("offsets = [1, 1, 2]")


def test_the_command_line_knows_names_of_gpus() -> None:
    from flashmoe_cupy.service import named_arch

    for name, arch in (
        ("h100", "H100 is sm_90a"), ("A100", "A100 is sm_80"), ("l4", "L4 is sm_89"), ("4090", "RTX 4090 is sm_89"),
        ("NVIDIA B200", "B200 is sm_100"), ("rtx-5090", "RTX 5090 is sm_120"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"unknown arch '{name}'; {arch}; known: sm_80"):
            named_arch(name)
    with pytest.raises(ValueError, match="unknown arch 'v100'; known: sm_80"):
        named_arch("v100")


def test_a_problem_without_arrays_names_no_library() -> None:
    for op in ("attention", "moe"):
        with pytest.raises(UnsupportedProblem, match="cast it to float32") as caught:
            flashmoe_cupy.explain(op, dtype="float64")
        assert "cupy" not in str(caught.value)


@pytest.mark.parametrize("installed", [[], ["cupy-cuda12x"]])
def test_a_warm_up_without_a_device_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, installed: list[str]) -> None:
    from flashmoe_cupy import _cupy
    from flashmoe_cupy.service import warm

    monkeypatch.setattr(warm, "devices", lambda: ())
    monkeypatch.setattr(_cupy, "installed", lambda: installed)
    with pytest.raises(UnsupportedProblem) as caught:
        flashmoe_cupy.warmup()
    assert "give an arch, for example sm_90a, to compile only" in caught.value.hint
    assert ("needs CuPy and its compiler NVRTC but no GPU: pip install" in caught.value.hint) is (not installed)


def test_all_that_need_a_gradient_are_told_with_what_else_is_wrong() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.ones(2, 6, 4, 12, requires_grad=needs) for needs in (True, True, False))
    with pytest.raises(UnsupportedProblem) as caught:
        flashmoe_cupy.flash_attention(q, k, v, causal=True)
    error = caught.value
    shown = ", ".join(f"{name}=float32[2, 6, 4, 12]" for name in "qkv")
    assert error.asked == f"flash_attention({shown}, causal=True)"
    assert [reason.split()[0] for reason in error.reasons] == ["head_dim", "head_dim_v"]  # which it has
    moe = {name: torch.from_numpy(x) for name, x in MOE.items()}
    for name in ("w_gate_up", "w_down"):
        moe[name] = torch.nn.Parameter(moe[name])
    with pytest.raises(UnsupportedProblem, match=r"w_gate_up, w_down \(torch.nn.parameter.Parameter\): each requires"):
        flashmoe_cupy.fused_moe(**moe)
    with torch.no_grad():
        flashmoe_cupy.fused_moe(**moe)
    bias = torch.ones(8, requires_grad=True)
    with pytest.raises(UnsupportedProblem, match=r"e_score_correction_bias .*it requires grad.*\n.*top_k is 9"):
        flashmoe_cupy.moe_route(torch.ones(3, 8), top_k=9, e_score_correction_bias=bias)


FAULTS: list[tuple[str, Callable[[Any], Any]]] = [
    ("complex128 is not supported", lambda x: x.astype(complex)),
    ("non-native byte order", lambda x: x.astype(x.dtype.newbyteorder())),
    ("object is not supported", lambda x: x.astype(object)),
    ("the mask would be lost", np.ma.masked_array),
    ("layout torch.sparse_coo is not strided", lambda x: pytest.importorskip("torch").from_numpy(x).to_sparse()),
    ("device meta is neither", lambda x: pytest.importorskip("torch").from_numpy(x).to("meta")),
]


@pytest.mark.parametrize(("fault", "change"), FAULTS)
@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("flash_attention", "q", "v"), ("flash_attention_varlen", "k", "cu_seqlens_q"), ("moe_permute", "topk_ids", ""),
        ("grouped_gemm", "w", "offsets"), ("fused_moe", "w_down", "topk_ids"), ("moe_route", "logits", ""),
    ],
)
def test_every_argument_with_a_fault_is_named(
    name: str, first: str, second: str, fault: str, change: Callable[[Any], Any]
) -> None:
    changed = {one: change(GOOD[name][one]) for one in (first, second) if one}
    error = refused(name, **changed)
    assert error.asked.startswith(f"{name}(")
    told = [reason.partition(" (")[0] for reason in error.reasons if fault in reason or "is not supported" in reason]
    assert {one for names in told for one in names.split(", ")} == {*changed}, error


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("name", "lists"),
    [
        ("flash_attention", ("k", "v")), ("flash_attention", ("sinks",)),
        ("flash_attention_varlen", ("cu_seqlens_q", "cu_seqlens_k")), ("fused_moe", ("topk_weights", "topk_ids")),
        ("moe_route", ("e_score_correction_bias",)), ("grouped_gemm", ("offsets",)),
    ],
)
def test_lists_are_named_with_what_makes_them_arrays(name: str, lists: tuple[str, ...], library: str) -> None:
    arrays = GOOD[name] | {one: SMALL[one] for one in lists if one in SMALL}
    given: Arrays = {one: x.tolist() if one in lists else x for one, x in arrays.items() if hasattr(x, "tolist")}
    given = {**arrays, **given}
    module: Any = np
    if library == "torch":
        module = pytest.importorskip("torch")
        given = {one: module.from_numpy(x) if isinstance(x, np.ndarray) else x for one, x in given.items()}
    with pytest.raises(TypeError) as caught:
        getattr(flashmoe_cupy, name)(**given)
    text = str(caught.value)
    assert text.startswith(f"{lists[0]} must be an array of NumPy, CuPy, torch or JAX")
    assert all(f"{one} is a builtins.list" in text for one in lists[1:])
    repairs = text.rpartition("; give ")[2]
    made = eval(f"[{repairs}]", {"np": np, "torch": module, **{one: given[one] for one in lists}})
    getattr(flashmoe_cupy, name)(**given | dict(zip(lists, made, strict=True)))


@pytest.mark.jax
def test_lists_beside_arrays_of_jax_are_told_alike() -> None:
    jnp = pytest.importorskip("jax").numpy
    x = jnp.ones((2, 6, 4, 16))
    with pytest.raises(UnsupportedProblem) as caught:
        flashmoe_cupy.flash_attention(x, x, x, sinks=[0.0] * 4, alibi_slopes=np.zeros(4, np.float32))
    assert caught.value.reasons == (
        "sinks is a builtins.list, not a JAX array; give jnp.asarray(sinks)",
        "alibi_slopes is a numpy.ndarray, not a JAX array",
    )


@pytest.mark.parametrize("softcap", [{}, {"softcap": 0}, {"softcap": 0.0}, {"softcap": 2}], ids=str)
def test_a_call_is_told_without_defaults(softcap: Arrays) -> None:
    assert ("softcap" in str(refused("flash_attention", bias=f32(7, 7), **softcap))) == (softcap == {"softcap": 2})
    assert "return_lse=0" in str(refused("flash_attention", return_lse=0, **softcap))
