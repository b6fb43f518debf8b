"""Prefill of a model of Llama-3.1-8B's shape, end to end: our attention against SDPA on cuDNN and on FA2.

    python benchmarks/llama_prefill.py --device cuda --out FILE.json      # needs transformers and 20 GB on the device

One model with random bfloat16 weights, switched between the implementations in interleaved rounds; batch 1, no KV
cache, logits of the last token only. The time is that of the whole forward pass, of which attention is a part. The
last logits of all implementations must agree, and how far cuDNN and FA2 are from each other says what "agree" means.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: the repository takes the place of this folder on the path
    sys.path[0] = str(ROOT)

from benchmarks.cases import OURS  # noqa: E402
from benchmarks.timing import CpuTimer, GpuTimer, Timer, machine  # noqa: E402

HEAD_DIM = 128
# ||a - b|| / ||b|| of the last logits. Rounding to bfloat16 grows with the depth (eager against SDPA on the CPU, width
# 4096: 0.017 after 2 layers, 0.033 after 6), so the yardstick is how far two rivals are apart. Attention that is wrong
# (no causal mask, half the keys lost) is 0.5 apart and more.
DIFFERENCE_LIMITS = (0.05, 0.25)


class Implementation(NamedTuple):
    """transformers' name of an attention, and the back end that SDPA is held to ("" = as it likes)."""

    attention: str
    backend: str = ""

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Entered around forward passes."""
        if not self.backend:
            return contextlib.nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        scope: contextlib.AbstractContextManager[Any] = sdpa_kernel([getattr(SDPBackend, self.backend)])
        return scope


def implementations(device: str) -> dict[str, Implementation]:
    """Ours first, then the rivals that the device has."""
    from flashmoe_cupy.integrations.transformers import register

    ours = {OURS: Implementation(register())}
    if not device.startswith("cuda"):
        return ours | {"sdpa": Implementation("sdpa")}
    cudnn, flash = Implementation("sdpa", "CUDNN_ATTENTION"), Implementation("sdpa", "FLASH_ATTENTION")
    return ours | {"sdpa_cudnn": cudnn, "sdpa_flash": flash}


def shape(hidden: int, layers: int, vocab: int, tokens: int) -> dict[str, Any]:
    """LlamaConfig's arguments. hidden 4096, 32 layers, vocab 128256 are Llama-3.1-8B; others keep its proportions."""
    heads = hidden // HEAD_DIM
    if heads < 1 or hidden % HEAD_DIM or (heads > 4 and heads % 4):
        raise ValueError(f"hidden={hidden}: it must be 128 times 1 to 4, or times a multiple of 4")
    return {
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": HEAD_DIM,
        "vocab_size": vocab,
        "max_position_embeddings": max(131072, tokens),
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
    }


def build(arguments: dict[str, Any], device: str, seed: int) -> Any:
    """The model, made on the device; the same seed and device kind give the same weights."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**arguments)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def difference(a: Any, b: Any) -> float:
    """||a - b|| / ||b||; infinity where either is not finite."""
    a, b = a.double(), b.double()
    found = float((a - b).norm() / b.norm())
    return found if math.isfinite(found) else math.inf


def limit(differences: dict[str, float]) -> float:
    """How far ours may be from a rival: twice what the rivals are from each other, within DIFFERENCE_LIMITS."""
    low, high = DIFFERENCE_LIMITS
    among = [value for pair, value in differences.items() if OURS not in pair]
    return min(high, max(low, 2 * max(among))) if among else high


def measure(model: Any, ids: Any, timer: Timer, chosen: dict[str, Implementation], rounds: int) -> dict[str, Any]:
    """Milliseconds and tokens per second of each implementation, ours over each rival, and how their logits differ.

    An implementation that fails is left out, with its reason.
    """
    import torch

    def forward(_: int) -> Any:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    logits: dict[str, Any] = {}
    failed: dict[str, str] = {}
    samples: dict[str, list[float]] = {}
    with torch.inference_mode():
        for name, one in chosen.items():
            model.set_attn_implementation(one.attention)
            try:
                with one.scope():
                    logits[name] = forward(0).float()  # untimed: kernels are compiled and chosen at their first use
                    timer.synchronize()
            except RuntimeError as error:  # a back end that refuses, or memory
                failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            else:
                samples[name] = []
        order = list(samples)
        for turn in range(rounds):
            first = turn % max(1, len(order))
            for name in order[first:] + order[:first]:
                model.set_attn_implementation(chosen[name].attention)
                with chosen[name].scope():
                    samples[name].append(timer.sample(forward, 1) / 1000.0)
    count = ids.numel()
    middle = {name: statistics.median(times) for name, times in samples.items()}
    rows: dict[str, Any] = {name: {"status": "failed", "reason": reason} for name, reason in failed.items()}
    for name, times in samples.items():
        rows[name] = {
            "status": "ok",
            "ms": round(middle[name], 3),
            "ms_best": round(min(times), 3),
            "ms_worst": round(max(times), 3),
            "tokens_per_s": round(1000.0 * count / middle[name], 1),
            "finite": bool(torch.isfinite(logits[name]).all()),
        }
    rivals = [name for name in samples if name != OURS]
    pairs = [(a, b) for place, a in enumerate(samples) for b in list(samples)[place + 1 :]]
    differences = {f"{a} to {b}": difference(logits[a], logits[b]) for a, b in pairs}
    return {
        "implementations": {name: rows[name] for name in chosen},
        "speed_over": {name: round(middle[name] / middle[OURS], 4) for name in rivals if OURS in middle},
        "difference": differences,
        "difference_limit": limit(differences),
    }


def wrong(result: dict[str, Any]) -> list[str]:
    """What is not as it must be. A rival that cannot is no fault of ours, but without any there is no result."""
    rows = result["implementations"]
    found = [f"{OURS}: {rows[OURS]['reason']}"] if rows[OURS]["status"] != "ok" else []
    found += [f"{name}: logits that are not finite" for name, row in rows.items() if not row.get("finite", True)]
    if not found and not result["speed_over"]:
        found.append("no rival to compare with")
    for pair, value in result["difference"].items():
        if value > result["difference_limit"] and OURS in pair:
            found.append(f"last logits, {pair}: {value:.2%} apart")
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/llama_prefill.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the figures, as JSON, are written here")
    parser.add_argument("--tokens", type=int, default=8192, help="length of the prompt (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=4096, help="width; heads of 128 (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=128256, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="samples of every implementation (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all is as it must be, 1 when not, 2 when nothing could be measured."""
    options = parse(arguments)
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        print(f"needs PyTorch and transformers: {error}", file=sys.stderr)
        return 2
    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print("no CUDA device; --device cpu with a small --hidden, --layers, --tokens runs anywhere", file=sys.stderr)
        return 2
    timer: Timer = GpuTimer(options.device) if on_gpu else CpuTimer()
    config = shape(options.hidden, options.layers, options.vocab, options.tokens)
    result: dict[str, Any] = machine(timer) | {"model": config, "dtype": "bfloat16", "weights": "random", "batch": 1}
    result["versions"]["transformers"] = importlib.metadata.version("transformers")
    model = build(config, options.device, options.seed)
    result |= {"parameters": sum(p.numel() for p in model.parameters()), "tokens": options.tokens}
    draw = torch.Generator(device=options.device).manual_seed(options.seed + 1)
    ids = torch.randint(0, options.vocab, (1, options.tokens), generator=draw, device=options.device)
    result |= {"rounds": options.rounds, "seed": options.seed}
    result |= measure(model, ids, timer, implementations(options.device), max(1, options.rounds))
    result["wrong"] = wrong(result)
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(result["wrong"]) or "all as it must be")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
