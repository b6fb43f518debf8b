"""The experts of Hugging Face transformers models on `fused_moe`. Tested with transformers 5.17.0 and 5.24.0.

    from flashmoe_cupy.integrations.transformers_moe import register
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation=register())

or `model.set_experts_implementation(register())`: Mixtral, Qwen-MoE, DeepSeek and the others whose experts transformers
dispatches. The router stays the model's own. gpt-oss stores its weights the other way round: call `turn(model)` once.
Forward only: use `torch.no_grad()`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from ..errors import DependencyError, UnsupportedProblem
from ..ops.moe import fused_moe
from . import transformers_models

if TYPE_CHECKING:
    import torch

NAME, TESTED = "fmc_experts", "5.17.0"
_GATED, _PLAIN = ("swiglu", "geglu", "geglu_tanh", "swigluoai"), ("relu2", "relu", "gelu", "gelu_tanh")
_TOLERANCE = 1e-5  # within which two activations are the same; gelu and its tanh form differ by 5e-4


def register(name: Any = NAME) -> str:
    """Register the experts in transformers under `name` and return `name`. May be called again.

    Models built with it are refused from then on if transformers dispatches no experts of theirs (see
    `transformers_models`).
    Raises ValueError for a name that is taken, DependencyError if transformers is missing or too old.
    """
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
    except ImportError as error:  # not installed, or from before this interface
        raise DependencyError(f"transformers does not fit ({error}): pip install 'transformers>={TESTED}'") from error
    run = _uncompiled()
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name={name!r}: use letters, digits and '_', such as {NAME!r}")
    if name == "eager" or name in ALL_FP8_EXPERTS_FUNCTIONS or ALL_EXPERTS_FUNCTIONS.get(name, run) is not run:
        raise ValueError(f"name={name!r}: transformers has experts of this name; use another one")
    transformers_models.watch(experts=name)
    ExpertsInterface.register(name, run)
    return name


@cache
def _uncompiled() -> Any:
    """`experts`, opaque to torch.compile: generate() compiles the decoding step of a static cache."""
    import torch

    return torch.compiler.disable(experts)


def experts(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states (T, d), top_k_index (T, K) and top_k_weights (T, K) -> new (T, d), with the weights of `self`.

    Ids of experts that are elsewhere (`num_experts` under expert parallelism) contribute nothing. Raises
    UnsupportedProblem for an activation that `fused_moe` does not have, for a norm behind each expert, and for weights
    (E, d, 2n) as transformers loads them; after `turn` these run in place.
    """
    kind = _kinds.get(self)
    if kind is None:
        _no_more_than_products(self)
        kind = _kinds[self] = _kind(self)
    up = "gate_up_proj" if self.has_gate else "up_proj"
    w1, w2 = getattr(self, up), self.down_proj
    if self.is_transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
        stored = [
            f"{name} has shape {tuple(w.mT.shape)} and is contiguous along its last dimension; the kernels read rows "
            f"of {tuple(w.shape)} that are"
            for name, w in ((up, w1), ("down_proj", w2))
            if w.stride(2) != 1
        ]
        if stored:
            hint = "flashmoe_cupy.integrations.transformers_moe.turn(model), once, after the weights are loaded"
            raise UnsupportedProblem(f"the experts of {type(self).__name__}", stored, hint)
    biases = {"b_gate_up": getattr(self, f"{up}_bias"), "b_down": self.down_proj_bias} if self.has_bias else {}
    plain = top_k_weights.dtype == hidden_states.dtype
    result: torch.Tensor = fused_moe(
        hidden_states, w1, w2, (top_k_weights if plain else top_k_weights.float()).contiguous(),
        top_k_index.contiguous(), **biases, **kind._asdict(),
    )  # fmt: skip
    return result


def turn(model: torch.nn.Module) -> int:
    """Store transposed expert weights (gpt-oss) so that `fused_moe` can read them in place; returns how many.

    Each parameter keeps its shape, values and name; only its strides change, so that eager experts and checkpoints go
    on working. It needs room for a second copy of one parameter at a time. Those stored so already are left alone.
    """
    count = 0
    for module in model.modules():
        if getattr(module, "is_transposed", False):
            for name in ("gate_up_proj", "up_proj", "down_proj"):
                weight = getattr(module, name, None)
                if weight is not None and weight.stride(1) != 1:
                    weight.data = weight.data.mT.contiguous().mT
                    count += 1
    return count


def _no_more_than_products(module: torch.nn.Module) -> None:
    """Refuse what transformers' decorator declares beside gate and bias, such as a norm of each expert's output."""
    more = [name for name, value in vars(module).items() if name.startswith("has_") and value]
    reasons = [f"{name}: not supported" for name in more if name not in ("has_gate", "has_bias")]
    if reasons:
        hint = 'experts_implementation="grouped_mm" or "eager"'
        raise UnsupportedProblem(f"the experts of {type(module).__name__}", reasons, hint)


class _Kind(NamedTuple):
    """Options of `fused_moe` that say what an experts class does between its two products."""

    activation: str
    interleaved: bool
    swiglu_alpha: float | None
    swiglu_limit: float | None


_kinds: WeakKeyDictionary[torch.nn.Module, _Kind] = WeakKeyDictionary()


def _kind(module: torch.nn.Module) -> _Kind:
    """What the module computes, found by trying: its names do not tell, for classes replace `_apply_gate` at will."""
    import torch

    # Values dense around 0, some beyond every clamp, and in every column values of all sizes.
    values = torch.linspace(-9, 8.5, 1024, device="cpu").sinh()
    given = values[torch.arange(1024, device="cpu") * 389 % 1024].reshape(64, 16)
    with torch.no_grad():
        activate = module._apply_gate if module.has_gate else module.act_fn
        want = activate(given.to(module.down_proj.device)).float().cpu()
        alpha, limit = _number(module, "alpha"), _number(module, "limit")
        names = _GATED if module.has_gate else _PLAIN
        options: list[tuple[str, float | None, float | None]] = [(name, None, None) for name in names]
        if module.has_gate:  # first with the numbers that the module declares, as DeepSeek-V4 and GLM-5 do
            options = [("swiglu", None, limit), ("swigluoai", alpha, limit), *options]
        for activation, *numbers in options:
            for interleaved in (False, True) if module.has_gate else (False,):
                kind = _Kind(activation, interleaved, *numbers)
                if torch.allclose(_ours(given, kind), want, rtol=_TOLERANCE, atol=_TOLERANCE):
                    return kind
    act = getattr(module, "act_fn", None)
    reason = f"its activation ({'no act_fn' if act is None else act}, limit {getattr(module, 'limit', None)}) is none "
    reason += f"of {', '.join(_GATED if module.has_gate else _PLAIN)}"
    asked = f"the experts of {type(module).__name__}"
    raise UnsupportedProblem(asked, [reason], 'experts_implementation="grouped_mm" or "eager"')


def _number(module: torch.nn.Module, name: str) -> float | None:
    """The module's own `alpha` or `limit`, by either of the names that transformers' classes give it."""
    value = getattr(module, name, getattr(module, f"swiglu_{name}", None))
    return float(value) if value else None


def _ours(given: torch.Tensor, kind: _Kind) -> torch.Tensor:
    """The activation alone: one expert whose weights are identities."""
    import torch

    rows, columns = given.shape
    one = torch.eye(columns, device="cpu")
    keep = columns if kind.activation in _PLAIN else columns // 2
    ids = torch.zeros(rows, 1, dtype=torch.int32, device="cpu")
    weights = torch.ones(rows, 1, device="cpu")
    out: torch.Tensor = fused_moe(given, one[None], one[None, :, :keep].contiguous(), weights, ids, **kind._asdict())
    return out[:, :keep]
