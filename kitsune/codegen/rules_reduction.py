"""Rows of reductions: sums, extremes, positions, moments, softmax. What a row of the tensor is, the kernel knows."""

from collections.abc import Callable

import torch

from kitsune.codegen.lowering import Lowering, Promotion, Rule, Typed, lower_rules


def _sum(c: Lowering) -> str:
    return c.reduce("sum", c.tensor("self", c.compute))


def _mean(c: Lowering) -> str:
    return c.divide(c.reduce("sum", c.tensor("self", c.compute)), c.count)


def _extreme(c: Lowering, kind: str) -> str:
    """The largest or smallest; NaN where there is one."""
    if c.common is torch.bool:
        raise c.refuse("compares booleans")
    return c.reduce(kind, c.let(c.tensor("self")), c.compute)


def _position(c: Lowering, kind: str) -> tuple[str, Typed]:
    """The extreme and where it first is."""
    if c.common is torch.bool:
        raise c.refuse("compares booleans")
    found, first = c.reduce_to(f"first {kind}", c.let(c.tensor("self")), c.compute)
    return found, Typed(f"{first}.to(tl.int64)", torch.int64)


def _extreme_or_position(kind: str) -> Callable[[Lowering], str | tuple[str, ...]]:
    return lambda c: _position(c, kind) if len(c.op.results) == 2 else _extreme(c, kind)


def _variance(c: Lowering) -> tuple[str, str]:
    """Variance and mean."""
    if "correction" in c.arguments:
        correction = c.number("correction") if c.given("correction") else c.constant(1)
    else:
        correction = c.constant(int(c.arguments.get("unbiased", True)))
    mean, squares = c.reduce_to("moments", c.tensor("self", c.compute))
    degrees = c.let(f"{c.count} - {correction}")
    return c.divide(squares, c.call("maximum", degrees, c.constant(0))), mean


def _deviation(c: Lowering) -> tuple[str, str]:
    variance, mean = _variance(c)
    return c.square_root(variance), mean


def _norm(c: Lowering) -> str:
    order = next((c.arguments[name] for name in ("ord", "p") if c.given(name)), 2)
    if type(order) not in (int, float) or order != 2:
        raise c.refuse("is of another order than 2")
    x = c.let(c.tensor("self", c.compute))
    return c.square_root(c.reduce("sum", f"{x} * {x}"))


def _largest_and_total(c: Lowering, x: str) -> tuple[str, str]:
    """Of a softmax. A row with an infinity has no distances from it: eager's are NaN, and so is their sum."""
    top, total = c.reduce_to("softmax", x)
    return top, c.let(f"tl.where({top} == float('inf'), float('nan'), {total})")


def _softmax(c: Lowering) -> str:
    x = c.let(c.tensor("self", c.compute))
    top, total = _largest_and_total(c, x)
    # As in the sum, so that a row in registers has its exponentials made once.
    near = c.let(f"tl.where(tl.abs({top}) == float('inf'), 0.0, {top})")
    each = c.let(f"libdevice.exp({x} - {near})")
    if c.compute is not torch.float32:
        return c.divide(each, total)
    # What `divide` gives: the exponentials are at most 1, the total is not below, and its reciprocal is rounded correctly, and
    # the remainder makes the quotient right. (Below 1e-31 a remainder loses bits, and a result may be the next number.) Divisions
    # of each element were half of all instructions: a softmax of 1,024 took 100 us of an H200, and takes 68.
    share = c.let(c.divide(c.constant(1), total))
    quotient = c.let(f"{each} * {share}")
    return c.fma(c.fma(f"-{quotient}", total, each), share, quotient)


def _log_softmax(c: Lowering) -> str:
    x = c.let(c.tensor("self", c.compute))
    top, total = _largest_and_total(c, x)
    return f"{x} - {top} - {c.let(f'libdevice.log({total})')}"


def _log_sum_exp(c: Lowering) -> str:
    x = c.let(c.tensor("self", c.compute))
    top, total = c.reduce_to("softmax", x)
    return f"tl.where(tl.abs({top}) == float('inf'), 0.0, {top}) + libdevice.log({total})"


def _loss(c: Lowering) -> str:
    """Minus the number at the target of each row; NaN for a target beyond the row, at which eager stops the program."""
    target = c.let(c.tensor("target", torch.int64))
    ignored = f"{target} == {c.number('ignore_index', dtype=torch.int64)}"
    known = f"({target} >= 0) & ({target} < columns)"
    found = c.negative(c.pick(c.let(c.tensor("self", c.compute)), target))
    return f"tl.where({ignored}, 0.0, tl.where({known}, {found}, float('nan')))"


def _loss_backward(c: Lowering) -> str:
    target, grad = c.let(c.tensor("target", torch.int64)), c.tensor("grad_output", c.compute)
    if c.arguments["reduction"] == 1:
        grad = c.divide(grad, c.tensor("total_weight", c.compute))
    known = f"({target} != {c.number('ignore_index', dtype=torch.int64)}) & ({target} >= 0) & ({target} < columns)"
    return c.place(c.let(c.negative(grad)), c.let(f"tl.where({known}, {target}, -1).to(tl.int32)"))


def _softmax_backward(c: Lowering) -> str:
    grad, y = c.let(c.tensor("grad_output", c.compute)), c.let(c.tensor("output", c.compute))
    return f"({grad} - {c.reduce('sum', f'{grad} * {y}')}) * {y}"


def _log_softmax_backward(c: Lowering) -> str:
    grad, y = c.let(c.tensor("grad_output", c.compute)), c.let(c.tensor("output", c.compute))
    return f"{grad} - libdevice.exp({y}) * {c.reduce('sum', grad)}"


def _fill_table() -> None:
    result = Promotion.RESULT
    lower_rules["sum"] = Rule(_sum, result)
    lower_rules["mean"] = Rule(_mean, result)
    for name, kind in (("max", "max"), ("min", "min")):
        lower_rules[f"a{name}"] = Rule(lambda c, kind=kind: _extreme(c, kind), result)  # type: ignore[misc]
        lower_rules[name] = Rule(_extreme_or_position(kind), result)
        lower_rules[f"arg{name}"] = Rule(lambda c, kind=kind: _position(c, kind)[1], operands=("self",))  # type: ignore[misc]
    lower_rules["var"] = Rule(lambda c: _variance(c)[0], result)
    lower_rules["var_mean"] = Rule(_variance, result)
    lower_rules["std"] = Rule(lambda c: _deviation(c)[0], result)
    lower_rules["std_mean"] = Rule(_deviation, result)
    lower_rules["norm"] = lower_rules["linalg_vector_norm"] = Rule(_norm, result)
    lower_rules["_softmax"] = Rule(_softmax, operands=("self",))
    lower_rules["_log_softmax"] = Rule(_log_softmax, operands=("self",))
    lower_rules["logsumexp"] = Rule(_log_sum_exp)
    lower_rules["nll_loss_forward"] = Rule(_loss, operands=("self",))
    lower_rules["nll_loss_backward"] = Rule(_loss_backward, operands=("self",), literals=frozenset(("reduction",)))
    lower_rules["_softmax_backward_data"] = Rule(_softmax_backward, operands=("grad_output",))
    lower_rules["_log_softmax_backward_data"] = Rule(_log_softmax_backward, operands=("grad_output",))


_fill_table()
