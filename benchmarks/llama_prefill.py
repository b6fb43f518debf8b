"""Prefill of a model of Llama-3.1-8B's shape, end to end: our attention against SDPA on cuDNN and on FA2.

    python benchmarks/llama_prefill.py --device cuda --out FILE.json      # needs transformers and 20 GB on the device
    python benchmarks/llama_prefill.py --padded left --out FILE.json      # a padded batch, 16 layers; 40 GB

One model with random bfloat16 weights, switched between the implementations in interleaved rounds; batch 1, no KV
cache, logits of the last token only. The time is that of the whole forward pass, of which attention is a part. The
last logits of all implementations must agree, and how far rivals are from each other says what "agree" means.

--padded measures a batch of prompts of `--lengths` with an attention_mask: ours, SDPA, ours on the same batch without
the mask, and the attention calls alone (`llama_padded`). Its bars are printed and written; the exit status is about
answers only.
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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: the repository takes the place of this folder on the path
    sys.path[0] = str(ROOT)

from benchmarks import llama_padded  # noqa: E402
from benchmarks.cases import OURS  # noqa: E402
from benchmarks.llama_padded import SDPA, UNPADDED, Batch  # noqa: E402
from benchmarks.timing import CpuTimer, GpuTimer, Timer, machine  # noqa: E402

HEAD_DIM = 128
# ||a - b|| / ||b|| of the last logits. Rounding to bfloat16 grows with the depth (eager against SDPA on the CPU, width
# 4096: 0.017 after 2 layers, 0.033 after 6), so the yardstick is how far two rivals are apart. Attention that is wrong
# (no causal mask, half the keys lost) is 0.5 apart and more.
DIFFERENCE_LIMITS = (0.05, 0.25)
# Options that the kind of batch decides, where they are not given: (one prompt, a padded batch).
DEFAULTS = {"layers": (32, 16), "vocab": (128256, 32000), "rounds": (9, 5)}


class Implementation(NamedTuple):
    """transformers' name of an attention, and the back end that SDPA is held to ("" = as it likes).

    masked: False = without the batch's attention_mask.
    """

    attention: str
    backend: str = ""
    masked: bool = True

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Entered around forward passes."""
        if not self.backend:
            return contextlib.nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        scope: contextlib.AbstractContextManager[Any] = sdpa_kernel([getattr(SDPBackend, self.backend)])
        return scope


def implementations(device: str, padded: bool = False) -> dict[str, Implementation]:
    """Ours first, then the rivals that the device has. padded: those that take a mask, and ours without it."""
    from flashmoe_cupy.integrations.transformers import register

    ours, sdpa = {OURS: Implementation(register())}, {SDPA: Implementation("sdpa")}
    if padded:
        ours[UNPADDED] = Implementation(register(), masked=False)
    if not device.startswith("cuda"):
        return ours | sdpa
    cudnn, flash = Implementation("sdpa", "CUDNN_ATTENTION"), Implementation("sdpa", "FLASH_ATTENTION")
    if padded:  # FA2 in torch takes no mask; "efficient" is there so that two rivals show how far apart they are
        efficient = Implementation("sdpa", "EFFICIENT_ATTENTION")
        return ours | sdpa | {"sdpa_cudnn": cudnn, "sdpa_efficient": efficient}
    return ours | {"sdpa_cudnn": cudnn, "sdpa_flash": flash}


def shape(
    hidden: int, layers: int, vocab: int, tokens: int, head_dim: int = HEAD_DIM, intermediate: int = 0
) -> dict[str, Any]:
    """LlamaConfig's arguments. hidden 4096, 32 layers, vocab 128256 are Llama-3.1-8B; others keep its proportions.

    Llama-3.2-1B: hidden 2048, 16 layers, head_dim 64, intermediate 8192.
    """
    heads = hidden // head_dim
    if heads < 1 or hidden % head_dim or (heads > 4 and heads % 4):
        raise ValueError(f"hidden={hidden}: it must be {head_dim} times 1 to 4, or times a multiple of 4")
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate or hidden * 7 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": head_dim,
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


def forward_pass(model: Any, batch: Batch, masked: bool = True) -> Any:
    """The logits of the places that the batch keeps."""
    mask = batch.mask if masked else None
    return model(input_ids=batch.ids, attention_mask=mask, use_cache=False, logits_to_keep=batch.keep).logits


def measure(model: Any, batch: Batch, timer: Timer, chosen: dict[str, Implementation], rounds: int) -> dict[str, Any]:
    """Milliseconds and tokens per second of each implementation, ours over each rival, and how their logits differ.

    A difference is that of the batch's worst entry. An implementation that fails is left out, with its reason; so is a
    rival whose logits are not finite.
    """
    import torch

    def run(masked: bool, _: int) -> Any:
        return forward_pass(model, batch, masked)

    logits: dict[str, Any] = {}
    failed: dict[str, str] = {}
    samples: dict[str, list[float]] = {}
    with torch.inference_mode():
        for name, one in chosen.items():
            model.set_attn_implementation(one.attention)
            try:
                with one.scope():
                    # untimed: kernels are compiled and chosen at their first use
                    found = batch.last(run(one.masked, 0))
                    timer.synchronize()
            except RuntimeError as error:  # a back end that refuses, or memory
                failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            else:
                if bool(found.isfinite().all()) or name in (OURS, UNPADDED):
                    logits[name], samples[name] = found, []
                else:
                    failed[name] = "logits that are not finite"
        order = list(samples)
        for turn in range(rounds):
            first = turn % max(1, len(order))
            for name in order[first:] + order[:first]:
                model.set_attn_implementation(chosen[name].attention)
                with chosen[name].scope():
                    samples[name].append(timer.sample(partial(run, chosen[name].masked), 1) / 1000.0)
    middle = {name: statistics.median(times) for name, times in samples.items()}
    rows: dict[str, Any] = {name: {"status": "failed", "reason": reason} for name, reason in failed.items()}
    for name, times in samples.items():
        count = sum(batch.lengths) if chosen[name].masked else batch.ids.numel()
        rows[name] = {
            "status": "ok",
            "ms": round(middle[name], 3),
            "ms_best": round(min(times), 3),
            "ms_worst": round(max(times), 3),
            "tokens_per_s": round(1000.0 * count / middle[name], 1),
            "finite": bool(torch.isfinite(logits[name]).all()),
        }
    comparable = [name for name in samples if name != UNPADDED]  # without its mask the batch is another one
    rivals = [name for name in comparable if name != OURS]
    pairs = [(a, b) for place, a in enumerate(comparable) for b in comparable[place + 1 :]]
    differences = {
        f"{a} to {b}": max(difference(x, y) for x, y in zip(logits[a], logits[b], strict=True)) for a, b in pairs
    }
    return {
        "implementations": {name: rows[name] for name in chosen},
        "speed_over": {name: round(middle[name] / middle[OURS], 4) for name in rivals if OURS in middle},
        "difference": differences,
        "difference_limit": limit(differences),
    }


def wrong(result: dict[str, Any]) -> list[str]:
    """What is not as it must be. A rival that cannot is no fault of ours, but without any there is no result."""
    rows = result["implementations"]
    ours = [name for name in (OURS, UNPADDED) if name in rows]
    found = [f"{name}: {rows[name]['reason']}" for name in ours if rows[name]["status"] != "ok"]
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
    both = {name: "default: {}, with --padded {}".format(*values) for name, values in DEFAULTS.items()}
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the figures, as JSON, are written here")
    parser.add_argument("--tokens", type=int, help="length of the prompt (default: 8192, with --padded the longest)")
    parser.add_argument("--layers", type=int, help=both["layers"])
    parser.add_argument("--hidden", type=int, default=4096, help="width (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=HEAD_DIM, help="width of a head (default: %(default)s)")
    parser.add_argument("--intermediate", type=int, default=0, help="width of the MLP (default: 3.5 times --hidden)")
    parser.add_argument("--vocab", type=int, help=both["vocab"])
    parser.add_argument("--rounds", type=int, help=f"samples of every implementation ({both['rounds']})")
    parser.add_argument("--padded", choices=("left", "right"), help="a batch of prompts, padded on this side")
    parser.add_argument("--lengths", type=int, nargs="+", help=f"of --padded (default: {llama_padded.LENGTHS})")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.lengths and not options.padded:
        parser.error("--lengths needs --padded")
    for name, values in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, values[bool(options.padded)])
    if options.padded:
        options.lengths = options.lengths or list(llama_padded.LENGTHS)
        options.tokens = max(options.lengths) if options.tokens is None else options.tokens
        if not 1 <= min(options.lengths) <= max(options.lengths) <= options.tokens:
            parser.error(f"--lengths: they must be 1 to {options.tokens}")
    elif options.tokens is None:
        options.tokens = 8192
    return options


def write(result: dict[str, Any], out: Path | None) -> None:
    """The figures so far."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure_padded(model: Any, batch: Batch, timer: Timer, result: dict[str, Any]) -> None:
    """Adds the attention calls alone and the bars to `result`; they are judged on a GPU only."""
    import torch

    from flashmoe_cupy.integrations.transformers import register

    if result["implementations"][OURS]["status"] == "ok":
        name = register()
        model.set_attn_implementation(name)
        with torch.inference_mode():
            alone = llama_padded.attention_alone(lambda: forward_pass(model, batch), name, batch, timer)
        result["attention"] = alone
        result["wrong"] += llama_padded.wrong(alone)
    result["bars"] = []
    for one in llama_padded.bars(result):
        word = one.word() if isinstance(timer, GpuTimer) else "not judged"
        result["bars"].append(one._asdict() | {"verdict": word})


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
    count, padded = len(options.lengths or "1"), bool(options.padded)
    config = shape(
        options.hidden, options.layers, options.vocab, options.tokens, options.head_dim, options.intermediate
    )
    result: dict[str, Any] = machine(timer) | {"model": config, "dtype": "bfloat16", "weights": "random"}
    result["batch"] = count
    result["versions"]["transformers"] = importlib.metadata.version("transformers")
    model = build(config, options.device, options.seed)
    result |= {"parameters": sum(p.numel() for p in model.parameters()), "tokens": options.tokens}
    draw = torch.Generator(device=options.device).manual_seed(options.seed + 1)
    ids = torch.randint(0, options.vocab, (count, options.tokens), generator=draw, device=options.device)
    batch = llama_padded.padded(ids, options.lengths, options.padded) if padded else llama_padded.whole(ids)
    result |= {"padded": options.padded, "lengths": options.lengths} if padded else {}
    result |= {"rounds": options.rounds, "seed": options.seed}
    result |= measure(model, batch, timer, implementations(options.device, padded), max(1, options.rounds))
    result["wrong"] = wrong(result)
    if padded:
        write(result, options.out)  # what follows may fail by itself
        measure_padded(model, batch, timer, result)
    print(json.dumps(result, indent=1))
    write(result, options.out)
    for one in result.get("bars", ()):
        value = "" if one["value"] is None else f"{one['value']:.3f}, "
        print(f"{one['verdict']}: {one['text']}: {value}at most {one['limit']:.2f}")
    print("\n".join(result["wrong"]) or "all as it must be")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
