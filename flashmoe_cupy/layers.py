"""Layers that hold weights of any array library: plain objects, without a framework's module system."""

from __future__ import annotations

from typing import Any

from flashmoe_cupy.arrays import view
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.ops.moe import fused_moe
from flashmoe_cupy.ops.plans import adapter
from flashmoe_cupy.ops.route import moe_route

_GATED = ("swiglu", "geglu", "geglu_tanh", "swigluoai")


class FlashMoELayer:
    """A mixture-of-experts layer for inference: router, experts and, if wanted, a shared expert.

    hidden_size d, num_experts E (those of the router), top_k K, intermediate_size n.
    router_weight: (E, d), router_bias: (E,): logits = x @ router_weight.T + router_bias in float32, by the array's own
        library. Kept in float32. None = every call gives its logits.
    w_gate_up: (E, 2n, d), or (E, n, d) when not gated. w_down: (E, d, n). With expert_map as many experts as are here.
    shared_gate_weight: (d,): the shared expert's weight is the sigmoid of x @ shared_gate_weight, as in Qwen2-MoE.
    All others: those of `moe_route` and `fused_moe`, with the same names, meanings and defaults. batch_invariant holds
        for the experts; the router's product is the library's own, which may depend on the number of tokens.

    Arrays are NumPy, CuPy, torch or JAX, all of one library on one device. They are held, not copied (except where the
    router's are cast), and are attributes of the same names. Raises UnsupportedProblem with every reason when shapes
    do not fit each other; what only the operations can see, they refuse at the first call.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        intermediate_size: int,
        *,
        w_gate_up: Any,
        w_down: Any,
        router_weight: Any = None,
        router_bias: Any = None,
        scoring_func: str = "softmax",
        renormalize: bool = False,
        routed_scaling_factor: float = 1.0,
        e_score_correction_bias: Any = None,
        num_expert_group: int = 1,
        topk_group: int = 1,
        capacity_factor: float | None = None,
        activation: str = "swiglu",
        b_gate_up: Any = None,
        b_down: Any = None,
        interleaved: bool = False,
        swiglu_alpha: float | None = None,
        swiglu_limit: float | None = None,
        expert_map: Any = None,
        apply_router_weight_on_input: bool = False,
        shared_w_gate_up: Any = None,
        shared_w_down: Any = None,
        shared_gate_weight: Any = None,
        batch_invariant: bool = False,
    ) -> None:
        d, n, rows = hidden_size, intermediate_size, intermediate_size * (2 if activation in _GATED else 1)
        here = num_experts if expert_map is None or not hasattr(w_down, "shape") else w_down.shape[0]
        why = []
        for name, array, want in (
            ("router_weight", router_weight, (num_experts, d)), ("router_bias", router_bias, (num_experts,)),
            ("w_gate_up", w_gate_up, (here, rows, d)), ("w_down", w_down, (here, d, n)),
            ("shared_gate_weight", shared_gate_weight, (d,)), ("expert_map", expert_map, (num_experts,)),
        ):  # fmt: skip
            if array is not None and (shape := _shape(array, name)) != want:
                why.append(f"{name} must have shape {want}, but has {shape}")
        if router_weight is None and router_bias is not None:
            why.append("router_bias is added to x @ router_weight.T, but router_weight is missing")
        if shared_gate_weight is not None and shared_w_gate_up is None:
            why.append("shared_gate_weight weighs a shared expert, but shared_w_gate_up is missing")
        if why:
            asked = f"FlashMoELayer({hidden_size}, {num_experts}, {top_k}, {intermediate_size})"
            hint = "the sizes are hidden_size, num_experts, top_k, intermediate_size; w_gate_up is (experts, "
            raise UnsupportedProblem(asked, why, hint + f"{'2 * ' * (rows > n)}intermediate, hidden)")
        self.hidden_size, self.num_experts = hidden_size, num_experts
        self.top_k, self.intermediate_size = top_k, intermediate_size
        self.router_weight, self.router_bias = _float32(router_weight), _float32(router_bias)
        self.shared_gate_weight = _float32(shared_gate_weight)
        self.w_gate_up, self.w_down = w_gate_up, w_down
        self.route_options: dict[str, Any] = {
            "scoring_func": scoring_func, "renormalize": renormalize, "routed_scaling_factor": routed_scaling_factor,
            "e_score_correction_bias": e_score_correction_bias, "num_expert_group": num_expert_group,
            "topk_group": topk_group, "capacity_factor": capacity_factor,
        }  # fmt: skip
        self.expert_options: dict[str, Any] = {
            "activation": activation, "b_gate_up": b_gate_up, "b_down": b_down, "interleaved": interleaved,
            "swiglu_alpha": swiglu_alpha, "swiglu_limit": swiglu_limit, "expert_map": expert_map,
            "apply_router_weight_on_input": apply_router_weight_on_input, "shared_w_gate_up": shared_w_gate_up,
            "shared_w_down": shared_w_down, "batch_invariant": batch_invariant,
        }  # fmt: skip

    def __call__(self, x: Any, *, router_logits: Any = None, return_stats: bool = False) -> Any:
        """x (..., d) to (..., d) in x's dtype; with return_stats also the `RouterStats` of the call.

        router_logits: (..., E), instead of those of router_weight. Raises as `moe_route` and `fused_moe` do.
        """
        rows = x.reshape(-1, self.hidden_size)
        if router_logits is not None:
            logits = router_logits.reshape(-1, self.num_experts)
        elif self.router_weight is not None:
            logits = _float32(rows) @ self.router_weight.T
            if self.router_bias is not None:
                logits = logits + self.router_bias
        else:
            reason = "the layer has no router_weight, so the call must give router_logits"
            raise UnsupportedProblem(f"{self!r}", [reason], "router_logits of shape (..., num_experts)")
        routed = moe_route(logits, top_k=self.top_k, return_stats=return_stats, **self.route_options)
        gate = None
        if self.shared_gate_weight is not None:
            score = (_float32(rows) @ self.shared_gate_weight).reshape(-1, 1)
            gate = moe_route(score, top_k=1, scoring_func="sigmoid")[0]  # the sigmoid, in whatever library
        out = fused_moe(
            rows, self.w_gate_up, self.w_down, routed[0], routed[1], shared_gate=gate, **self.expert_options
        )  # fmt: skip
        out = out.reshape(x.shape)
        return (out, routed[2]) if return_stats else out

    def __repr__(self) -> str:
        sizes = f"{self.hidden_size}, {self.num_experts}, {self.top_k}, {self.intermediate_size}"
        return f"FlashMoELayer({sizes}, activation={self.expert_options['activation']!r})"


def _float32(array: Any) -> Any:
    """The array in float32, by its own library; itself where it is float32 already."""
    if array is None:
        return None
    if str(array.dtype).removeprefix("torch.") == "float32":  # traced arrays have no memory, so no view
        return array
    return array.float() if hasattr(array, "data_ptr") else array.astype("float32")


def _shape(array: Any, name: str) -> tuple[int, ...]:
    return tuple(array.shape) if adapter(array) is not None else view(array, name).shape
