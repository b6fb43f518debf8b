"""Which axes weights came with. Shapes that do not fit are tried in every order, so that the refusal can name it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashmoe_cupy.plan.checks import check_eights, check_ranks, check_small, show

if TYPE_CHECKING:
    from flashmoe_cupy.arrays import View

# Orders of three axes, the likely ones first: order[i] is which of our axes stands at place i of an array.
_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 1, 0), (1, 0, 2), (2, 0, 1))


def _ours(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of our axes if those of an array came in `order`."""
    return tuple([shape[order.index(axis)] for axis in range(len(order))])


def _transposed(name: str, x: View, order: tuple[int, ...], names: tuple[str, ...]) -> str:
    """The reason for an array whose axes have another order, with the words that repair it."""
    have, want = ", ".join([names[axis] for axis in order]), ", ".join(names)
    back = ", ".join([str(order.index(axis)) for axis in range(len(order))])
    if x.library == "torch":
        repair = f"{name}.permute({back}).contiguous()"
    else:
        module = {"jax": "jnp", "cupy": "cupy"}.get(x.library, "np")
        repair = f"{module}.ascontiguousarray({name}.transpose({back}))"
    return f"{name} must be ({want}), but its shape {x.shape} looks like ({have}): transpose with {repair}"


def check_w(why: list[str], x: View, w: View, offsets: View | None, group_sizes: View | None) -> tuple[int, int]:
    """(E, n). The number of experts is that of w, which the lists and x's first axis must share."""
    d = x.shape[-1]
    length = None
    if group_sizes is not None:
        length = group_sizes.shape[0] if len(group_sizes.shape) == 1 else None
    elif offsets is not None:
        length = offsets.shape[0] - 1 if len(offsets.shape) == 1 else None
    if w.shape[2] != d:
        names = ("E", "n", "d")
        for order in _ORDERS[1:]:
            e, n, width = _ours(w.shape, order)
            if width == d and length in (None, e):
                why.append(_transposed("w", w, order, names))
                return e, n
        why.append(f"x and w differ in d: x has {d}, w of shape (E, n, d) = {w.shape} has {w.shape[2]}")
    experts = w.shape[0]
    if experts < 1:
        why.append("w holds no expert")
    if length is not None and length != experts:
        name, want = ("group_sizes", experts) if group_sizes is not None else ("offsets", experts + 1)
        have = length if group_sizes is not None else length + 1
        why.append(f"{name} must have shape ({want},) for the {experts} experts of w, but has ({have},)")
    if len(x.shape) == 3 and x.shape[0] != experts:
        why.append(f"x has rows for {x.shape[0]} experts, but w has {experts}")
    return experts, w.shape[1]


def check_weights(
    why: list[str], gate_up: View, down: View, hidden: int, factor: int, activation: object
) -> tuple[int, int]:
    """(E, n) of the experts' weights; n is 0 when the shapes do not tell it."""
    rows = "2n" if factor == 2 else "n"
    found = None
    m, columns = down.shape[1:]  # of w_gate_up, if the two are swapped
    swapped = gate_up.shape == (down.shape[0], hidden, m // factor) and m % factor == 0
    if swapped and columns == hidden != gate_up.shape[2]:
        said = f"w_gate_up has shape {gate_up.shape} and w_down {down.shape}: each has the other's, so they look "
        said += "swapped"
        if factor == 1:
            why.append(f"{said}, or both are transposed")
        else:
            why.append(f"{said}; w_gate_up comes first")
            gate_up, down = down, gate_up  # further reasons speak of them in their places
    for first in _ORDERS:
        experts, m, width = _ours(gate_up.shape, first)
        for second in _ORDERS:
            fits = width == hidden and m % factor == 0 and _ours(down.shape, second) == (experts, hidden, m // factor)
            cost = _ORDERS.index(first) + _ORDERS.index(second)
            if fits and (found is None or cost < found[0]):
                found = cost, first, second, experts, m // factor
    if found is not None:
        _, first, second, experts, n = found
        if first != _ORDERS[0]:
            why.append(_transposed("w_gate_up", gate_up, first, ("E", rows, "hidden")))
        if second != _ORDERS[0]:
            why.append(_transposed("w_down", down, second, ("E", "hidden", "n")))
    else:
        (experts, m, width), n = gate_up.shape, 0
        if width != hidden:
            have = f"but has {gate_up.shape}"
            why.append(f"w_gate_up must have shape (E, {rows}, {hidden}) for x of width {hidden}, {have}")
        elif factor == 2 and down.shape == (experts, hidden, m):
            gated = f"is gated and needs 2n = {2 * m} rows in w_gate_up"
            why.append(f"activation {show(activation)} {gated}, which has {m}; 'gelu' and 'relu' are not gated")
        elif factor == 1 and down.shape == (experts, hidden, m // 2):
            gated = f"is not gated and needs n = {m // 2} rows in w_gate_up"
            why.append(f"activation {show(activation)} {gated}, which has {m}; 'swiglu' and 'geglu' are gated")
        elif m % factor:
            why.append(f"w_gate_up has {m} rows per expert, but a gated activation needs an even number, 2n")
        else:
            want = (experts, hidden, m // factor)
            why.append(f"w_down must have shape (E, hidden, n) = {want} beside this w_gate_up, but has {down.shape}")
    if experts < 1:
        why.append("w_gate_up holds no expert")
    check_eights(why, ("d", hidden, "x, the columns of w_gate_up and the rows of w_down"))
    if found is not None:
        check_eights(why, ("n", n, "gate and up in w_gate_up (and b_gate_up) and the columns of w_down"))
    return experts, n


def check_shared(
    why: list[str], x: View, gate_up: View | None, down: View | None, gate: View | None, hidden: int | None, factor: int
) -> int:
    """s of the shared expert, 0 without one."""
    if gate_up is None or down is None:
        if gate_up is not None or down is not None:
            why.append("shared_w_gate_up and shared_w_down go together, but one of them is missing")
        elif gate is not None:
            why.append("shared_gate weighs a shared expert, but shared_w_gate_up and shared_w_down are missing")
        return 0
    s = 0
    rows = "2s" if factor == 2 else "s"
    check_ranks(why, 2, (("shared_w_gate_up", gate_up), ("shared_w_down", down)))
    if hidden is not None and len(gate_up.shape) == len(down.shape) == 2:
        columns_fit, rows_fit = gate_up.shape[1] == hidden, down.shape[0] == hidden
        if not columns_fit and gate_up.shape[0] == hidden:
            why.append(_transposed("shared_w_gate_up", gate_up, (1, 0), (rows, "hidden")))
        elif not columns_fit:
            why.append(f"shared_w_gate_up must have shape ({rows}, {hidden}), but has {gate_up.shape}")
        if not rows_fit and down.shape[1] == hidden:
            why.append(_transposed("shared_w_down", down, (1, 0), ("hidden", "s")))
        elif not rows_fit:
            why.append(f"shared_w_down must have shape ({hidden}, s), but has {down.shape}")
        if columns_fit and rows_fit:
            s = down.shape[1]
            if gate_up.shape[0] != factor * s:
                have = f"has {gate_up.shape[0]} rows, but shared_w_down has s = {s} columns"
                why.append(f"shared_w_gate_up {have}, so {factor * s} rows are needed")
            check_eights(why, ("s", s, "the shared weights"))
    if gate is not None:
        tokens = x.shape[0] if x.shape else 0
        check_small(why, "shared_gate", gate, x.dtype, "x", (tokens, 1) if len(gate.shape) == 2 else (tokens,))
    return s
