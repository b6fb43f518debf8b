"""Layers that hold weights of any array library: plain objects, without a framework's module system."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any, Literal, Never, overload

from flashmoe_cupy import dtypes
from flashmoe_cupy._types import Activation, Array, Scoring
from flashmoe_cupy.arrays import View, row_major
from flashmoe_cupy.errors import UnsupportedProblem
from flashmoe_cupy.layer_arrays import fits, float32, kind_name, kind_of, make_pytree, views_of
from flashmoe_cupy.ops.moe import fused_moe
from flashmoe_cupy.ops.names import no_argument, strict
from flashmoe_cupy.ops.route import RouterStats, moe_route
from flashmoe_cupy.plan.checks import ACTIVATIONS, GATED, SHORT, asked, check_dtypes, check_last, check_places, count
from flashmoe_cupy.plan.hints import hint, layer
from flashmoe_cupy.plan.moe.problem import moe_problem
from flashmoe_cupy.plan.moe.routing import route_problem
from flashmoe_cupy.torch_reasons import no_strides

_HELD = ("router_weight", "router_bias", "shared_gate_weight", "w_gate_up", "w_down")  # arrays that are attributes
_ROUTE_ARRAYS = ("e_score_correction_bias",)
_EXPERT_ARRAYS = ("b_gate_up", "b_down", "expert_map", "shared_w_gate_up", "shared_w_down")
_SIZES = ("hidden_size", "num_experts", "top_k", "intermediate_size")
_WEIGHTS = ("w_gate_up", "w_down", "shared_w_gate_up", "shared_w_down")  # arrays that must share one dtype
_TOLD = re.compile(r"arguments must be of one library|dtypes differ|(x|(shared_)?w_(gate_up|down)) has dtype")
_ROUTER_FLOATS = (dtypes.BF16, dtypes.FP16, dtypes.FP32, dtypes.FP64)


class FlashMoELayer:
    """A mixture-of-experts layer for inference: router, experts and, if wanted, a shared expert.

    hidden_size d, num_experts E (those of the router), top_k K, intermediate_size n.
    router_weight: (E, d), router_bias: (E,): logits = x @ router_weight.T + router_bias in float32, by the array's own
        library. Kept in float32. None = every call gives its logits. A NaN among the logits counts as their lowest
        value, as in `moe_route`: with one in router_bias that expert comes last, and one in a row of x makes all its
        logits equal. The result looks right; FLASHMOE_CHECK=1 finds it.
    w_gate_up: (E, 2n, d), or (E, n, d) when not gated. w_down: (E, d, n). With expert_map as many experts as are here.
    shared_gate_weight: (d,): the shared expert's weight is the sigmoid of x @ shared_gate_weight, as in Qwen2-MoE.
    All others: those of `moe_route` and `fused_moe`, with the same names, meanings and defaults. batch_invariant holds
        for the experts; the router's product is the library's own, which may depend on the number of tokens.

    Arrays are NumPy, CuPy, torch or JAX, all of one library on one device. They are held, not copied (except where the
    router's are cast), and are attributes of the same names. Raises UnsupportedProblem with every reason for sizes,
    options, dtypes, strides and shapes that do not run together, TypeError for what is no array.

    A layer of JAX arrays is a pytree: it can be an argument and a result of `jax.jit` and its kin, with its arrays as
    leaves. A layer of torch tensors is no nn.Module: `torch.compile` takes it as it is, but it has no parameters(),
    to() or state_dict(). An nn.Module, `flashmoe_cupy.torch.FlashMoE`, is planned: it comes with training.
    """

    _strided: Any = None  # torch.strided in a layer of torch tensors; None in all others

    @strict
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
        scoring_func: Scoring = "softmax",
        renormalize: bool = False,
        routed_scaling_factor: float = 1.0,
        e_score_correction_bias: Any = None,
        num_expert_group: int = 1,
        topk_group: int = 1,
        capacity_factor: float | None = None,
        activation: Activation = "swiglu",
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
        **unknown: Never,
    ) -> None:
        if unknown:
            raise no_argument(FlashMoELayer.__init__, unknown, "FlashMoELayer")
        route: dict[str, Any] = {
            "scoring_func": scoring_func, "renormalize": renormalize, "routed_scaling_factor": routed_scaling_factor,
            "e_score_correction_bias": e_score_correction_bias, "num_expert_group": num_expert_group,
            "topk_group": topk_group, "capacity_factor": capacity_factor,
        }  # fmt: skip
        experts: dict[str, Any] = {
            "activation": activation, "b_gate_up": b_gate_up, "b_down": b_down, "interleaved": interleaved,
            "swiglu_alpha": swiglu_alpha, "swiglu_limit": swiglu_limit, "expert_map": expert_map,
            "apply_router_weight_on_input": apply_router_weight_on_input, "shared_w_gate_up": shared_w_gate_up,
            "shared_w_down": shared_w_down, "batch_invariant": batch_invariant,
        }  # fmt: skip
        held = dict(zip(_HELD, (router_weight, router_bias, shared_gate_weight, w_gate_up, w_down), strict=True))
        sizes = dict(zip(_SIZES, (hidden_size, num_experts, top_k, intermediate_size), strict=True))
        _check(sizes, held, route, experts)
        self.hidden_size, self.num_experts = hidden_size, num_experts
        self.top_k, self.intermediate_size = top_k, intermediate_size
        self.router_weight, self.router_bias = float32(router_weight), float32(router_bias)
        self.shared_gate_weight = float32(shared_gate_weight)
        self.w_gate_up, self.w_down = w_gate_up, w_down
        self.route_options, self.expert_options = route, experts
        self._kind: Any = kind_of(w_down)
        library = self._kind.__module__.partition(".")[0]
        if library == "jax":
            make_pytree(FlashMoELayer)
        elif library == "torch":
            self._strided = sys.modules["torch"].strided

    @overload
    def __call__(self, x: Array, *, router_logits: Any = None, return_stats: Literal[False] = False) -> Array: ...
    @overload
    def __call__(
        self, x: Array, *, router_logits: Any = None, return_stats: Literal[True]
    ) -> tuple[Array, RouterStats[Array]]: ...
    @overload
    def __call__(
        self, x: Array, *, router_logits: Any = None, return_stats: bool
    ) -> Array | tuple[Array, RouterStats[Array]]: ...
    def __call__(self, x: Any, *, router_logits: Any = None, return_stats: bool = False) -> Any:
        """x (..., d) to (..., d) in x's dtype; with return_stats also the `RouterStats` of the call.

        router_logits: (..., E) with the leading axes of x, instead of those of router_weight. Raises as `moe_route` and
        `fused_moe` do, TypeError for what is no array.
        """
        if not isinstance(x, self._kind) or self._scattered(x) or not x.shape:
            self._refuse(x, router_logits)
        width = x.shape[-1]
        known = not isinstance(width, self._kind)  # under torch.jit.trace sizes are tensors; the operators check them
        if known and width != self.hidden_size:
            self._refuse(x, router_logits)
        rows = x.reshape(-1, width)
        if router_logits is not None:
            wanted = (*x.shape[:-1], self.num_experts)
            if (
                not isinstance(router_logits, self._kind) or self._scattered(router_logits)
                or (known and router_logits.shape != wanted)
            ):  # fmt: skip
                self._refuse(x, router_logits)
            logits = router_logits.reshape(-1, router_logits.shape[-1])
        elif self.router_weight is not None:
            logits = float32(rows) @ self.router_weight.T
            if self.router_bias is not None:
                logits = logits + self.router_bias
        else:
            reason = "the layer has no router_weight, so the call must give router_logits"
            raise UnsupportedProblem(f"{self!r}", [reason], "router_logits of shape (..., num_experts)")
        routed: Any = moe_route(logits, top_k=self.top_k, return_stats=return_stats, **self.route_options)
        gate = None
        if self.shared_gate_weight is not None:
            score = (float32(rows) @ self.shared_gate_weight).reshape(-1, 1)
            gate = moe_route(score, top_k=1, scoring_func="sigmoid")[0]  # the sigmoid, in the library of the arrays
        out = fused_moe(
            rows, self.w_gate_up, self.w_down, routed[0], routed[1], shared_gate=gate, **self.expert_options
        )  # fmt: skip
        out = out.reshape(x.shape)
        return (out, routed[2]) if return_stats else out

    def _scattered(self, x: Any) -> bool:
        """Whether this is a tensor without strides: nested or sparse."""
        return self._strided is not None and (x.is_nested or x.layout is not self._strided)

    def _refuse(self, x: Any, router_logits: Any) -> None:
        """Raise what is wrong with the arguments of a call."""
        why, named, scattered = [], [("x", x), ("router_logits", router_logits)], False
        for name, array in named if router_logits is not None else named[:1]:
            if not hasattr(type(array), "shape"):  # of a nested tensor, reading the shape raises
                have = "None" if array is None else f"a {type(array).__qualname__}"
                kind = f"an array, a {kind_name(self._kind)} like the layer's weights"
                raise TypeError(f"{name} must be {kind}, but is {have}")
            scattered = scattered or getattr(array, "is_nested", False)
            if not isinstance(array, self._kind):
                have = kind_name(type(array))
                why.append(f"{name} is a {have}, but the layer's weights are a {kind_name(self._kind)} each")
            elif self._scattered(array):
                why.append(f"{name}: {no_strides(sys.modules['torch'], array)}")
                scattered = True
        if scattered:  # a nested tensor has no shape, so nothing more can be checked
            raise UnsupportedProblem(f"{self!r}", why, "dense tensors, whose shape every row has")
        shape = tuple(x.shape)
        if not shape or shape[-1] != self.hidden_size:
            why.append(f"x must have shape (..., hidden_size) = (..., {self.hidden_size}), but has {shape}")
        elif router_logits is not None and tuple(router_logits.shape) != (want := (*shape[:-1], self.num_experts)):
            have = f"but has {tuple(router_logits.shape)}"
            why.append(f"router_logits must have shape (..., num_experts) = {want} beside x of shape {shape}, {have}")
        raise UnsupportedProblem(f"{self!r}", why, "the last axis of x is hidden_size; reshape x so that it is")

    def __getattr__(self, name: str) -> Any:
        text = f"'FlashMoELayer' object has no attribute {name!r}"
        module = getattr(getattr(sys.modules.get("torch"), "nn", None), "Module", None)
        if not name.startswith("_") and hasattr(module, name):
            text += "; it is no nn.Module (flashmoe_cupy.torch.FlashMoE, which will be one, comes with training)"
        raise AttributeError(text)

    def _tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        leaves = tuple([getattr(self, name) for name in _HELD])
        for options, names in ((self.route_options, _ROUTE_ARRAYS), (self.expert_options, _EXPERT_ARRAYS)):
            leaves += tuple([options[name] for name in names])
        sizes = tuple([getattr(self, name) for name in _SIZES])
        values = [
            tuple([(name, value) for name, value in options.items() if name not in names])
            for options, names in ((self.route_options, _ROUTE_ARRAYS), (self.expert_options, _EXPERT_ARRAYS))
        ]
        return leaves, (sizes, *values, self._kind)

    @classmethod
    def _tree_unflatten(cls, known: Any, leaves: Any) -> FlashMoELayer:
        made = cls.__new__(cls)  # leaves may be placeholders of any type, so nothing is checked
        sizes, route, experts, made._kind = known
        leaves = iter(leaves)
        for name, value in zip((*_SIZES, *_HELD), (*sizes, *[next(leaves) for _ in _HELD]), strict=True):
            setattr(made, name, value)
        made.route_options = dict(route) | {name: next(leaves) for name in _ROUTE_ARRAYS}
        made.expert_options = dict(experts) | {name: next(leaves) for name in _EXPERT_ARRAYS}
        return made

    def __repr__(self) -> str:
        sizes = f"{self.hidden_size}, {self.num_experts}, {self.top_k}, {self.intermediate_size}"
        return f"FlashMoELayer({sizes}, activation={self.expert_options['activation']!r})"


def _check(sizes: dict[str, Any], held: dict[str, Any], route: dict[str, Any], experts: dict[str, Any]) -> None:
    """Raise UnsupportedProblem with all that is known to be wrong before a call."""
    why: list[str] = []
    hints: list[str] = []
    # A size that is no int is unknown; its name stands for it.
    d, e, _, n = [count(why, name, value) or name for name, value in sizes.items()]
    given = held | {name: experts[name] for name in _EXPERT_ARRAYS} | {name: route[name] for name in _ROUTE_ARRAYS}
    given = {name: array for name, array in given.items() if array is not None or name in ("w_gate_up", "w_down")}
    views = views_of(why, hints, given)
    activation = experts["activation"]
    known = isinstance(activation, str) and activation in ACTIVATIONS
    rows = 1 if known and activation not in GATED else 2
    first = next((views[name] for name in ("w_down", "w_gate_up") if name in views and views[name].shape), None)
    here = first.shape[0] if first is not None and "expert_map" in given else e
    wanted: dict[str, tuple[int | str, ...]] = {
        "router_weight": (e, d), "router_bias": (e,), "w_down": (here, d, n), "shared_gate_weight": (d,),
        "expert_map": (e,),
    }  # fmt: skip
    if known:
        wanted["w_gate_up"] = here, n if rows == 1 else 2 * n if isinstance(n, int) else f"2 * {n}", d
    wrong = {name for name, want in wanted.items() if name in views and not fits(views[name].shape, want)}
    for name in given:
        if name in wrong:
            want = ", ".join(map(str, wanted[name])) + "," * (len(wanted[name]) == 1)
            why.append(f"{name} must have shape ({want}), but has {views[name].shape}")
            if name in ("w_gate_up", "w_down", "expert_map"):
                check_last(why, name, views[name])
    weights = [(name, views[name]) for name in _WEIGHTS if name in views]
    if weights:
        check_dtypes(why, weights)
    for name in ("router_weight", "router_bias", "shared_gate_weight"):
        if name in views and views[name].dtype not in _ROUTER_FLOATS:
            why.append(f"{name} has dtype {views[name].dtype}, which must be a floating one; it is cast to float32")
    if views:
        check_places(why, list(views.items()))
    if "router_bias" in given and "router_weight" not in given:
        why.append("router_bias is added to x @ router_weight.T, but router_weight is missing")
    if "shared_gate_weight" in given and "shared_w_gate_up" not in given:
        why.append("shared_gate_weight weighs a shared expert, but shared_w_gate_up is missing")
    good = {name: v for name, v in views.items() if name not in wrong and (known or name != "w_gate_up")}
    why += _check_route(good.get("e_score_correction_bias"), e, sizes["top_k"], route)
    why += _check_experts(good, (d, n, here), rows, experts)
    if why:
        why = list(dict.fromkeys(why))
        hints = [hint(why, layer(rows)), *hints]
        raise UnsupportedProblem(_asked(views, sizes | route | experts), why, "; ".join(filter(None, hints)))


def _check_route(bias: View | None, experts: int | str, top_k: Any, route: dict[str, Any]) -> list[str]:
    """What the router says to one token. experts: how many, or no number."""
    shape = (1, experts) if isinstance(experts, int) else (1,)
    logits = View(0, shape, row_major(shape), dtypes.FP32, -1, "", False, None)
    if bias is not None:
        logits = logits._replace(library=bias.library, device=bias.device)
    options = {name: value for name, value in route.items() if name not in _ROUTE_ARRAYS}
    try:
        route_problem(logits, bias, top_k=top_k, **options)
    except UnsupportedProblem as error:  # where the number of experts is unknown, reasons about logits say nothing
        return [reason for reason in error.reasons if len(shape) == 2 or not reason.startswith("logits")]
    return []


def _check_experts(
    good: dict[str, View], known: tuple[int | str, ...], rows: int, options: dict[str, Any]
) -> list[str]:
    """What the experts say to one token, beside what is known to be wrong: such weights are taken as they should be."""
    d, n, here = [size if isinstance(size, int) else 0 for size in known]
    for name, many in (("w_down", 1), ("w_gate_up", rows)):
        if name in good and len(good[name].shape) == 3:
            e, *sides = good[name].shape
            width, depth = sides if name == "w_down" else sides[::-1]
            d, n, here = d or width, n or depth // many, here or e
    d, n, here = d or 8, n or 8, here or 1
    dtype_of = {v.dtype for name, v in good.items() if name in _WEIGHTS and v.dtype in SHORT}
    dtype = dtype_of.pop() if len(dtype_of) == 1 else dtypes.FP32
    some = next(iter(good.values()), None)

    def one(*shape: int, of: dtypes.DType = dtype) -> View:
        made = View(0, shape, row_major(shape), of, -1, "", False, None)
        return made if some is None else made._replace(library=some.library, device=some.device)

    arrays: dict[str, Any] = {name: good.get(name) for name in _EXPERT_ARRAYS}
    for name in ("b_gate_up", "b_down"):  # the dtype of the weights is unknown then, and these may have it
        if dtype_of and name in good and good[name].dtype in SHORT:
            arrays[name] = good[name]._replace(dtype=dtypes.FP32)
    shared = ("shared_w_gate_up", "shared_w_down")
    if any(options[name] is not None and name not in good for name in shared):  # one of the two cannot be read
        arrays |= dict.fromkeys(shared)
    try:
        moe_problem(
            one(1, d), good.get("w_gate_up", one(here, rows * n, d)), good.get("w_down", one(here, d, n)),
            one(1, 1, of=dtypes.FP32), one(1, 1, of=dtypes.INT32), **options | arrays,
        )  # fmt: skip
    except UnsupportedProblem as error:
        return [reason for reason in error.reasons if not _TOLD.match(reason)]
    return []


def _asked(views: dict[str, View], options: dict[str, Any]) -> str:
    """The layer in one line, as the functions show their calls."""
    arrays, given = (*_ROUTE_ARRAYS, *_EXPERT_ARRAYS), inspect.signature(FlashMoELayer).parameters
    scalars = [(name, value, given[name].default) for name, value in options.items() if name not in arrays]
    return asked("FlashMoELayer", list(views.items()), scalars)
