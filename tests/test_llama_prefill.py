"""The prefill benchmark in a tiny configuration on the CPU: what reaches the attention functions, and the figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import llama_prefill  # noqa: E402
from benchmarks.cases import OURS  # noqa: E402
from flashmoe_cupy.integrations import transformers as integration  # noqa: E402
from flashmoe_cupy.ops.attention import flash_attention  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # what transformers deprecates of its own or of torch is not for this test to judge
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),
]
TINY = ["--device", "cpu", "--layers", "2", "--tokens", "64", "--hidden", "256", "--vocab", "512", "--rounds", "2"]


def test_the_shape_is_that_of_llama() -> None:
    made = llama_prefill.shape(4096, 32, 128256, 8192)
    assert (made["intermediate_size"], made["num_attention_heads"], made["num_key_value_heads"]) == (14336, 32, 8)
    assert made["head_dim"] * made["num_attention_heads"] == made["hidden_size"] == 4096
    assert made["rope_parameters"]["rope_theta"] == 500000.0 and made["vocab_size"] == 128256
    assert llama_prefill.shape(256, 2, 512, 64)["num_key_value_heads"] == 1
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
    from benchmarks.timing import CpuTimer

    model = llama_prefill.build(llama_prefill.shape(256, 1, 64, 16), "cpu", 0)
    ids = torch.arange(16)[None]
    chosen = llama_prefill.implementations("cpu")
    # cuDNN has nothing for CPU tensors, which is how a refusal looks on a GPU
    chosen["sdpa_cudnn"] = llama_prefill.Implementation("sdpa", "CUDNN_ATTENTION")
    result = llama_prefill.measure(model, ids, CpuTimer(), chosen, 1)
    assert result["implementations"]["sdpa_cudnn"]["status"] == "failed"
    assert result["implementations"]["sdpa_cudnn"]["reason"].startswith("RuntimeError")
    assert list(result["speed_over"]) == ["sdpa"] and llama_prefill.wrong(result) == []
    del chosen["sdpa"]
    result = llama_prefill.measure(model, ids, CpuTimer(), chosen, 1)
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
