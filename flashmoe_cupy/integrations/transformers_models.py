"""Which transformers models take a registered implementation, and the refusal of all others.

transformers asks a model class only about implementations of its own. With another name, a model that has attention of
its own runs on, with a mask made for somebody else. Here the class's own word decides, as it does for `sdpa`: nothing
is known of any model by name. It is asked when a model is built, by torch's hook for registered submodules (a model's
first submodule comes after its configuration and before its attention), and at a forward pass, since
`set_attn_implementation` builds nothing. transformers itself is left as it is.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedProblem

if TYPE_CHECKING:
    import torch

_attention: set[str] = set()  # names under which our attention is registered
_experts: set[str] = set()  # and our experts
_passed: set[type] = set()  # configuration classes whose models take our attention


def watch(*, attention: str | None = None, experts: str | None = None) -> None:
    """Refuse models, from now on, that are built with the named implementation and would not call it."""
    _attention.update({attention} if attention else ())
    _experts.update({experts} if experts else ())
    _hook()


@cache
def _hook() -> Any:
    from torch.nn.modules.module import register_module_module_registration_hook
    from transformers import PreTrainedModel

    def built(module: torch.nn.Module, name: str, submodule: torch.nn.Module) -> None:  # noqa: ARG001
        if isinstance(module, PreTrainedModel):
            config: Any = module.__dict__.get("config")
            kind: Any = type(module)
            if getattr(config, "_attn_implementation", None) in _attention:
                _refuse("attn_implementation", config._attn_implementation, kind, why_no_attention(kind))
            if getattr(config, "_experts_implementation", None) in _experts:
                _refuse("experts_implementation", config._experts_implementation, kind, why_no_experts(kind))

    return register_module_module_registration_hook(built)


def check_config(config: Any) -> None:
    """Raise UnsupportedProblem if no model of this configuration takes our attention: for the forward pass."""
    kind = type(config)
    if kind in _passed:
        return
    from transformers import PreTrainedModel

    models = [m for m in _below(PreTrainedModel) if m.config_class is kind]
    # Of several with this configuration, one that holds another has no attention; one with more parts declares less.
    wrong = models if all(map(why_no_attention, models)) else [m for m in models if _why_not_as_built(m)]
    for model in wrong:
        _refuse("attn_implementation", getattr(config, "_attn_implementation", None), model, why_no_attention(model))
    _passed.add(kind)


def _refuse(option: str, name: str | None, kind: type, reasons: tuple[str, ...]) -> None:
    if reasons:
        hint = f'{option}="eager" runs it; another part of the same model can still have {name!r}, by the name of its '
        hint += f'configuration, such as {option}={{"text_config": {name!r}}}'
        raise UnsupportedProblem(f"{option}={name!r} in {kind.__name__}", reasons, hint)


@cache
def why_no_attention(model: Any) -> tuple[str, ...]:
    """Why models of this class cannot take a registered attention; () if they can. Submodels answer for themselves."""
    # Where sdpa itself lacks a feature that a model needs (softcap, sinks), the model still says that it dispatches.
    backend = model._supports_attention_backend and any(m._can_set_attn_implementation() for m in _models(model))
    if model._supports_sdpa or backend:
        return _why_not_as_built(model)
    return (
        f"{model.__name__} declares neither that it supports transformers' own sdpa (_supports_sdpa) nor that all its "
        "attention goes through ALL_ATTENTION_FUNCTIONS (_supports_attention_backend): attention code of its own would "
        "run, and could misread the mask",
        *_why_not_as_built(model),
    )


@cache
def _why_not_as_built(model: Any) -> tuple[str, ...]:
    reasons = [
        f"{part} takes its attention from {table}, which knows {', '.join(keys)} only"
        for part, table, keys in _tables(model)
    ]
    if model._supports_attention_backend and not model._supports_sdpa:
        reasons += [
            f"{part} changes its mask, and {model.__name__} does not declare that it knows the masks of sdpa, which "
            "are boolean or None (_supports_sdpa)"
            for part in _own_masks(model)
        ]
    return tuple(reasons)


@cache
def why_no_experts(model: Any) -> tuple[str, ...]:
    """Why models of this class cannot take registered experts; () if they can. Submodels answer for themselves."""
    if any(m._can_set_experts_implementation() for m in _models(model)):
        return ()
    reason = f"{model.__name__} has no experts that transformers dispatches (@use_experts_implementation)"
    return (f"{reason}: the option would do nothing; transformers refuses its own `grouped_mm` there, too",)


def _models(model: type) -> list[Any]:
    """The class and its bases, as far as they are models."""
    from transformers import PreTrainedModel

    shared = PreTrainedModel.__module__  # its bases serve many models and say nothing of one
    return [base for base in model.__mro__ if issubclass(base, PreTrainedModel) and base.__module__ != shared]


def _below(kind: Any) -> Iterator[Any]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


def _parts(model: type) -> Iterator[tuple[Any, list[tuple[str, Any]]]]:
    """The model's class and the classes of its parts, submodels left out, each with what its constructor names."""
    import torch
    from transformers import PreTrainedModel

    visited, todo = {model}, [model]
    while todo:
        part = todo.pop()
        named = list(_named_by_constructor(part, set(PreTrainedModel.__mro__)))
        yield part, named
        for _, value in named:
            if isinstance(value, type) and issubclass(value, torch.nn.Module) and value not in visited:
                visited.add(value)
                if not issubclass(value, PreTrainedModel) and not value.__module__.startswith("torch."):
                    todo.append(value)


def _tables(model: type) -> list[tuple[str, str, list[str]]]:
    """(part, table, its keys) where a part of the model looks up its class by implementation, among fixed ones."""
    return [
        (part.__name__, name, sorted(map(str, value)))
        for part, named in _parts(model)
        for name, value in named
        if isinstance(value, dict) and "eager" in value and all(isinstance(v, type) for v in value.values())
    ]


def _own_masks(model: type) -> list[str]:
    """Parts that dispatch their attention with a mask that they change or replace."""
    found = []
    for part, _ in _parts(model):
        code = getattr(inspect.unwrap(getattr(part, "forward", None) or len), "__code__", None)
        if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
            stored = [i.argval for i in dis.get_instructions(code) if i.opname.startswith("STORE_FAST")]
            if any(name == "attention_mask" or "attention_mask" in tuple(name) for name in stored):
                found.append(part.__name__)
    return found


def _named_by_constructor(part: type, end: set[type]) -> Iterator[tuple[str, Any]]:
    """Global names, with their values, in the constructors of a class and of its bases outside `end`."""
    for base in part.__mro__:
        constructor = inspect.unwrap(vars(base).get("__init__", object.__init__))
        if base not in end and hasattr(constructor, "__code__"):
            for name in dict.fromkeys(_names(constructor.__code__)):
                if name in constructor.__globals__:
                    yield name, constructor.__globals__[name]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:  # code of comprehensions and inner functions
        if isinstance(constant, CodeType):
            yield from _names(constant)
