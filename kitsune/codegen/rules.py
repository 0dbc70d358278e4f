"""The lowering table: arithmetic, comparison, selection and conversion. Importing it fills in the rows of the other files too."""

from collections.abc import Callable

import torch

import kitsune.codegen.rules_activation
import kitsune.codegen.rules_loss
import kitsune.codegen.rules_math
import kitsune.codegen.rules_norm
import kitsune.codegen.rules_optimizer
import kitsune.codegen.rules_reduction  # noqa: F401
from kitsune.codegen.dtypes import HALF, LANGUAGE
from kitsune.codegen.lowering import Lowering, Promotion, Rule, lower_rules
from kitsune.ir import Slot


def _add(c: Lowering) -> str:
    if c.common is torch.bool:
        return f"{c.tensor('self')} | {c.value('other')}"
    return _scaled_sum(c, c.value("self"), c.value("other"), "+")


def _sub(c: Lowering) -> str:
    return _scaled_sum(c, c.value("self"), c.value("other"), "-")


def _rsub(c: Lowering) -> str:
    return _scaled_sum(c, c.value("other"), c.value("self"), "-")


def _scaled_sum(c: Lowering, a: str, b: str, sign: str) -> str:
    """a + alpha * b: one rounding for floats, as eager's kernel is contracted."""
    if c.common is torch.bool:
        raise c.refuse("subtracts booleans")
    alpha = c.arguments.get("alpha", 1)
    if type(alpha) is int and alpha == 1:
        return f"{a} {sign} {b}"
    scale = c.number("alpha") if type(alpha) is not int else c.constant(alpha)
    if not c.is_float:
        return f"{a} {sign} {scale} * {b}"
    return c.fma(scale if sign == "+" else f"-({scale})", b, a)


def _mul(c: Lowering) -> str:
    return f"{c.value('self')} {'&' if c.common is torch.bool else '*'} {c.value('other')}"


def _div(c: Lowering) -> str:
    mode = c.arguments.get("rounding_mode")
    if mode is None:
        return _quotient(c)
    if mode == "floor":
        return _floor_divide(c)
    if not c.is_float:
        return f"{c.tensor('self')} // {c.value('other')}"
    return f"libdevice.trunc({_quotient(c)})"


def _quotient(c: Lowering) -> str:
    if c.is_tensor("other"):
        return c.divide(c.value("self"), c.tensor("other"))
    # Eager multiplies by the reciprocal that the host made, but for a list of numbers, by which it divides.
    name = next(name for name in ("other", "scalar", "scalars") if name in c.arguments)
    if name == "scalars":
        return c.divide(c.tensor("self"), c.number(name))
    if c.arguments.get("rounding_mode") is None:
        return f"{c.tensor('self')} * {c.reciprocal(name)}"
    return f"{c.tensor('self')} * {_sure_reciprocal(c)}"


def _sure_reciprocal(c: Lowering) -> str:
    """1 / a number where it was not measured whether eager divides in float32 or in float64: refused unless that is the same."""
    value = c.arguments["other"]
    if c.compute is not torch.float64:
        single = None if type(value) is Slot else torch.tensor(float(value))
        if single is None or not torch.equal(1 / single, (1 / single.new_tensor(value, dtype=torch.float64)).float()):
            raise c.refuse("divides and rounds by a number whose reciprocal depends on the precision that it is made in")
    return c.divide(c.constant(1), c.number("other"))


def _floor_divide(c: Lowering) -> str:
    a = c.tensor("self")
    if c.common is torch.uint8:
        return f"{a} // {c.value('other')}"
    if not c.is_float:
        return c.call("floor_div", a, c.value("other"))
    if c.common in HALF:
        raise c.refuse("rounds each of its steps to 16 bits")
    b = c.let(c.value("other"))
    quotient = (lambda x: c.divide(x, b)) if c.is_tensor("other") else (lambda x: f"{x} * {_sure_reciprocal(c)}")
    mod = c.let(f"libdevice.fmod({a}, {b})")
    near = c.let(quotient(f"({a} - {mod})"))
    near = c.let(f"tl.where(({mod} != 0) & (({b} < 0) != ({mod} < 0)), {near} - 1.0, {near})")
    exact = c.let(quotient(a))
    return f"tl.where({b} == 0, {exact}, {c.call('snap', near, exact)})"


def _remainder(c: Lowering) -> str:
    a, b = c.value("self"), c.value("other", rounded=True)
    if c.common is torch.uint8:
        return f"{a} % {b}"
    return c.call("remainder" if c.is_float else "floor_mod", a, b)


def _fmod(c: Lowering) -> str:
    a, b = c.value("self"), c.value("other", rounded=True)
    return f"libdevice.fmod({a}, {b})" if c.is_float else f"{a} % {b}"


def _neg(c: Lowering) -> str:
    return c.negative(c.tensor("self")) if c.is_float else f"0 - {c.tensor('self')}"


def _compare(sign: str) -> Callable[[Lowering], str]:
    return lambda c: f"{c.tensor('self')} {sign} {c.value('other', rounded=True)}"


def _logical(sign: str) -> Callable[[Lowering], str]:
    def lower(c: Lowering) -> str:
        return f"{c.tensor('self', torch.bool)} {sign} {c.tensor('other', torch.bool)}"

    return lower


def _bitwise(sign: str) -> Callable[[Lowering], str]:
    return lambda c: f"{c.value('self')} {sign} {c.value('other')}"


def _bitwise_not(c: Lowering) -> str:
    x = c.tensor("self")
    if c.common is torch.bool:
        return f"{x} == 0"
    return f"{x} ^ 255" if c.common is torch.uint8 else f"~{x}"


def _where(c: Lowering) -> str:
    return f"tl.where({c.tensor('condition', torch.bool)}, {c.value('self', rounded=True)}, {c.value('other', rounded=True)})"


def _masked_fill(c: Lowering) -> str:
    return f"tl.where({c.tensor('mask', torch.bool)}, {c.value('value', rounded=True)}, {c.tensor('self')})"


def _same(name: str) -> Callable[[Lowering], str]:
    return lambda c: c.tensor(name)


def _filled(name: str) -> Callable[[Lowering], str]:
    return lambda c: c.value(name, rounded=True)


def _constant(number: int) -> Callable[[Lowering], str]:
    def lower(c: Lowering) -> str:
        return f"tl.full((), {number}, {LANGUAGE[c.compute]})"

    return lower


def _nan_to_num(c: Lowering) -> str:
    x = c.tensor("self")
    if not c.is_float:
        return x
    limits = torch.finfo(c.common)
    text = x
    for name, default, found in (
        ("neginf", limits.min, f"{x} == float('-inf')"),
        ("posinf", limits.max, f"{x} == float('inf')"),
        ("nan", 0.0, f"{x} != {x}"),
    ):
        number = c.number(name, rounded=True) if c.given(name) else c.constant(default)
        text = f"tl.where({found}, {number}, {text})"
    return text


def _addcmul(c: Lowering) -> str:
    a, b, d = c.tensor("self"), c.tensor("tensor1"), c.tensor("tensor2")
    name, value = _factor(c)
    if not c.is_float:
        return f"{a} + {c.number(name)} * {b} * {d}"
    if type(value) is int and value == 1:
        return c.fma(b, d, a)
    return c.call("add_product", a, b, d, c.number(name))


def _addcdiv(c: Lowering) -> str:
    a, quotient = c.tensor("self"), c.divide(c.tensor("tensor1"), c.tensor("tensor2"))
    if not c.is_float:
        raise c.refuse("divides integers")
    # A factor of one gives the same: one rounding of an exact product and a sum.
    return c.fma(c.number(_factor(c)[0]), quotient, a)


def _factor(c: Lowering) -> tuple[str, object]:
    name = "value" if "value" in c.arguments else "scalars"
    if c.is_tensor(name):
        raise c.refuse("takes its factors from a tensor on the host")
    return name, c.arguments[name]


def _lerp(c: Lowering) -> str:
    end = "end" if "end" in c.arguments else "tensors1"
    weight = "weight" if "weight" in c.arguments else "weights"
    return c.call("lerp", c.tensor("self"), c.tensor(end), c.value(weight))


_BOTH = ("self", "other", "scalar", "scalars")


def _fill_table() -> None:
    plain, result = Promotion.COMMON, Promotion.RESULT
    lower_rules["add"] = Rule(_sum_of(_add), plain, _BOTH)
    lower_rules["sub"] = lower_rules["subtract"] = Rule(_sum_of(_sub), plain, _BOTH)
    lower_rules["rsub"] = Rule(_rsub, plain, _BOTH)
    lower_rules["mul"] = lower_rules["multiply"] = Rule(_sum_of(_mul), plain, _BOTH)
    for name in ("div", "divide", "true_divide"):
        lower_rules[name] = Rule(_div, Promotion.FLOAT, _BOTH)
    lower_rules["div.mode"] = Rule(_div, plain, _BOTH)
    lower_rules["floor_divide"] = Rule(_floor_divide, plain, _BOTH)
    lower_rules["remainder"] = Rule(_remainder, plain, _BOTH)
    lower_rules["fmod"] = Rule(_fmod, plain, _BOTH)
    lower_rules["neg"] = lower_rules["negative"] = Rule(_neg, plain, exact=True)
    lower_rules["addcmul"] = Rule(_addcmul, literals=frozenset(("value",)))
    lower_rules["addcdiv"] = Rule(_addcdiv)
    lower_rules["lerp"] = Rule(_lerp)
    lower_rules["nan_to_num"] = Rule(_nan_to_num)
    for name, sign in (("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")):
        lower_rules[name] = Rule(_compare(sign), plain, _BOTH, boolean=True)
    for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
        lower_rules[f"logical_{name}"] = Rule(_logical(sign), boolean=True)
        lower_rules[f"bitwise_{name}"] = lower_rules[f"__{name}__"] = Rule(_bitwise(sign), plain, _BOTH)
    lower_rules["logical_not"] = Rule(lambda c: f"{c.tensor('self')} == 0", boolean=True)
    lower_rules["bitwise_not"] = Rule(_bitwise_not)
    lower_rules["where"] = Rule(_where, plain, ("self", "other"), exact=True)
    lower_rules["masked_fill"] = Rule(_masked_fill, result, exact=True)
    lower_rules["copy"] = Rule(_copied, result, exact=True)
    for name in ("clone", "_to_copy", "alias", "lift_fresh_copy"):
        lower_rules[name] = Rule(_same("self"), result, exact=True)
    lower_rules["fill"] = Rule(_filled("value"), result, exact=True)
    lower_rules["scalar_tensor"] = Rule(_filled("s"), result, exact=True)
    lower_rules["full"] = lower_rules["full_like"] = lower_rules["new_full"] = Rule(_filled("fill_value"), result, exact=True)
    for prefix in ("zero", "zeros", "zeros_like", "new_zeros"):
        lower_rules[prefix] = Rule(_constant(0), result, exact=True)
    for prefix in ("ones", "ones_like", "new_ones"):
        lower_rules[prefix] = Rule(_constant(1), result, exact=True)


def _sum_of(lower: Callable[[Lowering], str]) -> Callable[[Lowering], str]:
    """The list forms name their second operand otherwise."""

    def with_other(c: Lowering) -> str:
        for name in ("scalar", "scalars"):
            if "other" not in c.arguments and name in c.arguments:
                c.arguments["other"] = c.arguments[name]
        return lower(c)

    return with_other


def _copied(c: Lowering) -> str:
    return c.tensor("src")


_fill_table()
