"""The prefill benchmark in a tiny configuration on the CPU: what reaches the attention functions, and the figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import llama_padded, llama_prefill  # noqa: E402
from benchmarks.cases import OURS  # noqa: E402
from benchmarks.llama_padded import SDPA, UNPADDED, Span  # noqa: E402
from benchmarks.timing import CpuTimer, GpuTimer  # noqa: E402
from flashmoe_cupy.integrations import transformers as integration  # noqa: E402
from flashmoe_cupy.jit.source import ENTRY  # noqa: E402
from flashmoe_cupy.ops.attention import flash_attention, flash_attention_varlen  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # what transformers deprecates of its own or of torch is not for this test to judge
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),
]
LENGTHS = (48, 31, 7, 31)
TINY = ["--device", "cpu", "--layers", "2", "--tokens", "64", "--hidden", "256", "--vocab", "512", "--rounds", "2"]


def test_the_shape_is_that_of_llama() -> None:
    made = llama_prefill.shape(4096, 32, 128256, 8192)
    assert (made["intermediate_size"], made["num_attention_heads"], made["num_key_value_heads"]) == (14336, 32, 8)
    assert made["head_dim"] * made["num_attention_heads"] == made["hidden_size"] == 4096
    assert made["rope_parameters"]["rope_theta"] == 500000.0 and made["vocab_size"] == 128256
    assert llama_prefill.shape(256, 2, 512, 64)["num_key_value_heads"] == 1
    small = llama_prefill.shape(2048, 16, 128256, 4096, head_dim=64, intermediate=8192)  # Llama-3.2-1B
    assert (small["num_attention_heads"], small["num_key_value_heads"], small["intermediate_size"]) == (32, 8, 8192)
    for hidden in (64, 200, 640):
        with pytest.raises(ValueError, match="hidden"):
            llama_prefill.shape(hidden, 2, 512, 64)


def test_causal_prefill_reaches_both_without_a_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dense mask would keep SDPA from its fast back ends, and ours from skipping tiles: neither may get one."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    theirs: list[dict[str, Any]] = []
    ours: list[dict[str, Any]] = []

    def spy_sdpa(q: Any, k: Any, v: Any, **options: Any) -> Any:
        theirs.append(options | {"heads": (q.shape[1], k.shape[1]), "tokens": q.shape[2]})
        return sdpa(q, k, v, **options)

    def spy_ours(q: Any, k: Any, v: Any, **options: Any) -> Any:
        ours.append(options | {"heads": (q.shape[2], k.shape[2]), "tokens": q.shape[1]})
        return flash_attention(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy_sdpa)
    monkeypatch.setattr(integration, "flash_attention", spy_ours)
    out = tmp_path / "prefill.json"
    assert llama_prefill.main([*TINY, "--out", str(out)]) == 0
    assert "all as it must be" in capsys.readouterr().out
    result = json.loads(out.read_text(encoding="utf-8"))
    assert len(theirs) == len(ours) == 2 * (1 + result["rounds"])  # two layers; one untimed pass, then the rounds
    for call in theirs:
        assert call["attn_mask"] is None and call["is_causal"] is True and call["enable_gqa"] is True
    for call in ours:
        assert call["bias"] is None and call["causal"] is True and call["window_size"] == (-1, -1)
    assert {(call["heads"], call["tokens"]) for call in theirs + ours} == {((2, 1), 64)}

    rows = result["implementations"]
    assert list(rows) == [OURS, "sdpa"]
    for row in rows.values():
        assert row["status"] == "ok" and row["finite"] and row["ms_best"] <= row["ms"] <= row["ms_worst"]
        assert row["tokens_per_s"] == pytest.approx(64e3 / row["ms"], rel=1e-3)
    assert result["speed_over"]["sdpa"] == pytest.approx(rows["sdpa"]["ms"] / rows[OURS]["ms"], rel=1e-3)
    assert 0 < result["difference"][f"{OURS} to sdpa"] < 0.05 and result["wrong"] == []
    for key in ("device", "driver", "commit", "dirty", "versions", "parameters", "tokens"):
        assert key in result
    assert result["versions"]["transformers"] and result["versions"][OURS]


def test_attention_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def not_causal(q: Any, k: Any, v: Any, **options: Any) -> Any:
        return flash_attention(q, k, v, **options | {"causal": False})

    monkeypatch.setattr(integration, "flash_attention", not_causal)
    assert llama_prefill.main(TINY) == 1
    assert f"last logits, {OURS} to sdpa" in capsys.readouterr().out.splitlines()[-1]


def test_a_back_end_that_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama_prefill.build(llama_prefill.shape(256, 1, 64, 16), "cpu", 0)
    batch = llama_padded.whole(torch.arange(16)[None])
    chosen = llama_prefill.implementations("cpu")
    # cuDNN has nothing for CPU tensors, which is how a refusal looks on a GPU
    chosen["sdpa_cudnn"] = llama_prefill.Implementation("sdpa", "CUDNN_ATTENTION")
    result = llama_prefill.measure(model, batch, CpuTimer(), chosen, 1)
    assert result["implementations"]["sdpa_cudnn"]["status"] == "failed"
    assert result["implementations"]["sdpa_cudnn"]["reason"].startswith("RuntimeError")
    assert list(result["speed_over"]) == ["sdpa"] and llama_prefill.wrong(result) == []
    del chosen["sdpa"]
    result = llama_prefill.measure(model, batch, CpuTimer(), chosen, 1)
    assert llama_prefill.wrong(result) == ["no rival to compare with"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch(
    side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, list[Any]] = {"ours": [], "packed": [], "sdpa": []}
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy_sdpa(q: Any, k: Any, v: Any, **options: Any) -> Any:
        seen["sdpa"].append(options["attn_mask"])
        return sdpa(q, k, v, **options)

    def spy_ours(q: Any, k: Any, v: Any, **options: Any) -> Any:
        seen["ours"].append(options)
        return flash_attention(q, k, v, **options)

    def spy_packed(q: Any, k: Any, v: Any, **options: Any) -> Any:
        seen["packed"].append((len(q), options))
        return flash_attention_varlen(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy_sdpa)
    monkeypatch.setattr(integration, "flash_attention", spy_ours)
    monkeypatch.setattr("flashmoe_cupy.ops.attention.flash_attention_varlen", spy_packed)
    out = tmp_path / "padded.json"
    lengths = [str(n) for n in LENGTHS]
    arguments = ["--device", "cpu", "--layers", "2", "--hidden", "256", "--vocab", "512", "--rounds", "1"]
    code = llama_prefill.main([*arguments, "--padded", side, "--lengths", *lengths, "--out", str(out)])
    printed, result = capsys.readouterr().out, json.loads(out.read_text(encoding="utf-8"))
    assert code == 0 and result["wrong"] == [], printed

    rows = result["implementations"]
    assert list(rows) == [OURS, UNPADDED, SDPA] and {row["status"] for row in rows.values()} == {"ok"}
    assert (result["padded"], result["lengths"], result["batch"], result["tokens"]) == (side, list(LENGTHS), 4, 48)
    assert list(result["difference"]) == [f"{OURS} to sdpa"] and list(result["speed_over"]) == ["sdpa"]
    assert rows[OURS]["tokens_per_s"] == pytest.approx(1e3 * sum(LENGTHS) / rows[OURS]["ms"], rel=1e-3)
    assert rows[UNPADDED]["tokens_per_s"] == pytest.approx(1e3 * 4 * 48 / rows[UNPADDED]["ms"], rel=1e-3)
    assert all(mask.shape == (4, 1, 48, 48) for mask in seen["sdpa"])
    with_lengths = [call for call in seen["ours"] if "seqused_k" in call]
    assert len(seen["ours"]) - len(with_lengths) == 2 * 2  # two layers without the mask, once untimed and once timed
    ends = [48] * 4 if side == "left" else list(LENGTHS)
    assert all(call["seqused_k"].tolist() == ends for call in with_lengths)
    assert {(n, call["cu_seqlens_q"].tolist()[-1], call["causal"]) for n, call in seen["packed"]} == {(117, 117, True)}

    alone = result["attention"]
    assert alone["calls"] == 2 and alone["difference"] < 1e-2 and alone["samples"] == llama_padded.PROFILES
    assert alone["attention_us"] > alone["mask_us"] > 0 and alone["packed_us"] > 0
    bars = [(bar["value"], bar["limit"]) for bar in result["bars"]]
    assert bars == [
        (pytest.approx(rows[OURS]["ms"] / rows[SDPA]["ms"]), 0.70),
        (pytest.approx(rows[OURS]["ms"] / rows[UNPADDED]["ms"]), 1.0),
        (alone["over_packed"], 1.12),
    ]
    assert {bar["verdict"] for bar in result["bars"]} == {"not judged"} and printed.count("not judged: ") == 3


def test_a_padded_batch_says_where_its_tokens_are() -> None:
    ids = torch.arange(4 * 6).reshape(4, 6)
    left, right = (llama_padded.padded(ids, (6, 4, 1, 4), side) for side in ("left", "right"))
    assert left.mask.tolist() == [[1] * 6, [0, 0, 1, 1, 1, 1], [0] * 5 + [1], [0, 0, 1, 1, 1, 1]]
    assert right.mask.tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0], [1] + [0] * 5, [1, 1, 1, 1, 0, 0]]
    logits = ids[..., None]
    assert left.last(logits[:, -left.keep :])[:, 0].tolist() == [5, 11, 17, 23]
    assert right.last(logits[:, right.keep])[:, 0].tolist() == [5, 9, 12, 21]
    assert llama_padded.whole(ids).mask is None
    for lengths in ((6, 4, 1), (7, 4, 1, 4), (6, 0, 1, 4)):
        with pytest.raises(ValueError, match="lengths"):
            llama_padded.padded(ids, lengths, "left")


@pytest.mark.parametrize(
    "options", [["--lengths", "3"], ["--padded", "left", "--lengths", "0", "3"], ["--padded", "left", "--tokens", "99"]]
)
def test_lengths_that_do_not_fit_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        llama_prefill.parse(options)
    made = llama_prefill.parse(["--padded", "right"])
    assert (made.layers, made.tokens, tuple(made.lengths), made.vocab) == (16, 4096, llama_padded.LENGTHS, 32000)


def test_padded_attention_that_is_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def deaf(q: Any, k: Any, v: Any, **options: Any) -> Any:
        if "leftpad_k" in options:  # padding counts as keys
            options |= {"bias": None, "leftpad_k": torch.zeros_like(options["leftpad_k"])}
            options |= {"leftpad_q": torch.zeros_like(options["leftpad_q"])}
        return flash_attention(q, k, v, **options)

    monkeypatch.setattr(integration, "flash_attention", deaf)
    arguments = ["--device", "cpu", "--layers", "1", "--hidden", "256", "--vocab", "512", "--rounds", "1"]
    assert llama_prefill.main([*arguments, "--padded", "left", "--lengths", "48", "9"]) == 1
    assert "attention of the last layer, padded to packed" in capsys.readouterr().out.splitlines()[-1]


def test_what_is_counted_of_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums, on a device that is made up: each of our calls two kernels that overlap, and the second a memset."""
    log: list[Span] = []

    def launch(name: str, begin: float, us: float) -> None:
        start = 1000.0 * len(log) + begin
        log.append(Span(name, start, start + us))

    def ours(q: Any, k: Any, v: Any, **options: Any) -> Any:
        launch(ENTRY, 0, 300)
        launch(ENTRY, -800, 600)
        launch("Memset (Device)", 0, 7)
        return flash_attention(q, k, v, **options)

    def packed(q: Any, k: Any, v: Any, **options: Any) -> Any:
        launch(f"{ENTRY}(Params)", 0, 400)
        return flash_attention_varlen(q, k, v, **options)

    def mask(**options: Any) -> Any:
        launch("reduce_kernel", 0, 11)
        return made_mask(**options)

    def profile(runs: Any, _: Any) -> list[list[Span]]:
        log.clear()
        for place, run in enumerate(runs):
            if place:
                launch("at::spin_kernel(long)", 0, 1)
            run()
        return llama_padded.split(log[::-1], len(runs))

    name = integration.register()
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as TABLE

    made_mask = TABLE[name]
    monkeypatch.setitem(TABLE._global_mapping, name, mask)
    monkeypatch.setattr(integration, "flash_attention", ours)
    monkeypatch.setattr("flashmoe_cupy.ops.attention.flash_attention_varlen", packed)
    monkeypatch.setattr(llama_padded, "profile", profile)
    model = llama_prefill.build(llama_prefill.shape(256, 3, 64, 16), "cpu", 0)
    model.set_attn_implementation(name)
    batch = llama_padded.padded(torch.arange(32).reshape(2, 16), (16, 5), "left")

    def forward() -> Any:
        launch("gemm", 0, 90)
        return llama_prefill.forward_pass(model, batch)

    with torch.inference_mode():
        found = llama_padded.attention_alone(forward, name, batch, object.__new__(GpuTimer))
    want = {"forward_us": 3 * 900, "mask_us": 11, "attention_us": 3 * 907 + 11, "repeated_us": 3 * 907 + 11}
    want |= {"packed_us": 3 * 400, "busy_us": 3 * 800, "packed_busy_us": 3 * 400}
    assert {key: found[key] for key in want} == want
    assert found["over_packed"] == found["repeated_over_packed"] == round((3 * 907 + 11) / 1200, 4)
    assert found["launches"] == {"forward": 6, "repeated": 6, "packed": 3, "mask": 1}
    assert found["others_us"] == {"Memset (Device)": 21}
    assert llama_padded.wrong(found) == [] and TABLE[name] is mask
    lost = found | {"launches": {"forward": 0, "repeated": 6}, "difference": math.nan}
    assert len(llama_padded.wrong(lost)) == 2
    with pytest.raises(RuntimeError, match="1 marks between 3 parts"):
        llama_padded.split([Span("spin_kernel", 0, 1)], 3)


def test_the_bars_of_a_padded_batch() -> None:
    def rows(ours: float, unpadded: float, sdpa: float | None) -> dict[str, Any]:
        ms = {OURS: ours, UNPADDED: unpadded, SDPA: sdpa}
        return {name: {"status": "failed"} if x is None else {"status": "ok", "ms": x} for name, x in ms.items()}

    def words(**result: Any) -> list[str]:
        return [bar.word() for bar in llama_padded.bars(result)]

    assert words(implementations=rows(140, 141, 201), attention={"over_packed": 1.12}) == ["pass"] * 3
    assert words(implementations=rows(142, 141, 201), attention={"over_packed": 1.13}) == ["FAIL"] * 3
    assert words(implementations=rows(140, 141, None)) == ["not measured", "pass", "not measured"]


def test_a_rival_that_is_not_finite_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As SDPA's can be where a query sees no key."""
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def nan(q: Any, k: Any, v: Any, **options: Any) -> Any:
        return sdpa(q, k, v, **options) * math.nan

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", nan)
    model = llama_prefill.build(llama_prefill.shape(256, 1, 64, 16), "cpu", 0)
    batch = llama_padded.whole(torch.arange(16)[None])
    result = llama_prefill.measure(model, batch, CpuTimer(), llama_prefill.implementations("cpu"), 1)
    reason = {"status": "failed", "reason": "logits that are not finite"}
    assert result["implementations"]["sdpa"] == reason and result["difference"] == {}
    assert llama_prefill.wrong(result) == ["no rival to compare with"]


def test_the_limit_follows_the_rivals() -> None:
    pair = f"{OURS} to sdpa_cudnn"
    assert llama_prefill.limit({pair: 0.01}) == 0.25
    assert llama_prefill.limit({pair: 0.01, "sdpa_cudnn to sdpa_flash": 0.04}) == 0.08
    assert llama_prefill.limit({pair: 0.01, "sdpa_cudnn to sdpa_flash": 0.001}) == 0.05
    assert llama_prefill.limit({pair: 0.01, "sdpa_cudnn to sdpa_flash": math.inf}) == 0.25
    a = torch.tensor([3.0, 4.0])
    assert llama_prefill.difference(a * 1.5, a) == pytest.approx(0.5)
    assert llama_prefill.difference(a * math.nan, a) == math.inf


def test_without_a_device_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert llama_prefill.main(["--layers", "1"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
