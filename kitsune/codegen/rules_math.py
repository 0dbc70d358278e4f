"""Rows of functions of one or two numbers, as the C library has them."""

from collections.abc import Callable

import torch

from kitsune.codegen.dtypes import HALF
from kitsune.codegen.lowering import Lowering, Promotion, Rule, lower_rules

# Eager's kernels call these of the CUDA library; libdevice is that library as bitcode.
UNARY = {
    name: name
    for name in "exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh "
    "erfc erfinv rsqrt lgamma".split()
}
ALIASES = {
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "special_expm1": "expm1",
    "special_exp2": "exp2",
}
ROUNDINGS = {"floor": "floor", "ceil": "ceil", "trunc": "trunc", "round": "nearbyint", "fix": "trunc"}


def _library(function: str) -> Callable[[Lowering], str]:
    return lambda c: f"libdevice.{function}({c.tensor('self')})"


def _library_of_two(function: str) -> Callable[[Lowering], str]:
    return lambda c: f"libdevice.{function}({c.value('self')}, {c.value('other', rounded=True)})"


def _copysign(c: Lowering) -> str:
    sign = c.value("other", rounded=True)
    if c.common is torch.float16:  # as for signbit
        sign = f"tl.where({sign} == {sign}, {sign}, 0.0)"
    return f"libdevice.copysign({c.value('self')}, {sign})"


def _rounding(function: str) -> Callable[[Lowering], str]:
    def lower(c: Lowering) -> str:
        if c.arguments.get("decimals"):
            raise c.refuse("rounds to decimals")
        return f"libdevice.{function}({c.tensor('self')})" if c.is_float else c.tensor("self")

    return lower


def _frac(c: Lowering) -> str:
    x = c.tensor("self")
    if not c.is_float:
        raise c.refuse("takes the fraction of an integer")
    return f"{x} - libdevice.trunc({x})"


def _abs(c: Lowering) -> str:
    return c.tensor("self") if c.common in (torch.bool, torch.uint8) else f"tl.abs({c.tensor('self')})"


def _sign(c: Lowering) -> str:
    x = c.tensor("self")
    if c.common is torch.bool:
        return x
    # As numbers, so that NaN and -0.0 give +0.0.
    kind = {torch.float64: "tl.float64"}.get(c.common, "tl.float32" if c.is_float else "tl.int8")
    return f"({x} > 0).to({kind}) - ({x} < 0).to({kind})"


def _signbit(c: Lowering) -> str:
    x = c.tensor("self")
    if not c.is_float:
        return f"{x} < 0" if c.common is not torch.bool else f"{x} & ({x} == 0)"
    bits = "tl.int64" if c.compute is torch.float64 else "tl.int32"
    text = f"{x}.to({bits}, bitcast=True) < 0"
    # Widening a float16 NaN loses its sign in eager.
    return f"({text}) & ({x} == {x})" if c.common is torch.float16 else text


def _is_nan(c: Lowering) -> str:
    return f"{c.tensor('self')} != {c.tensor('self')}"


def _is_inf(text: str) -> Callable[[Lowering], str]:
    def lower(c: Lowering) -> str:
        x = c.tensor("self")
        return text.format(x=x) if c.is_float else f"{x} != {x}"

    return lower


def _is_finite(c: Lowering) -> str:
    x = c.tensor("self")
    return f"tl.abs({x}) < float('inf')" if c.is_float else f"{x} == {x}"


def _reciprocal(c: Lowering) -> str:
    return c.divide(c.constant(1), c.tensor("self"))


def _larger(which: str, helper: str, boolean: str) -> Callable[[Lowering], str]:
    def lower(c: Lowering) -> str:
        a, b = c.tensor("self"), c.value("other", rounded=True)
        if c.common is torch.bool:
            return f"{a} {boolean} {b}"
        return c.call(helper, a, b) if c.is_float else f"tl.{helper}({a}, {b})"

    def of_list(c: Lowering) -> str:
        # The list kernels compare, which keeps the second of two zeros where the instruction orders them.
        other = next(name for name in ("other", "scalar", "scalars") if name in c.arguments)
        a, b = c.tensor("self"), c.value(other)
        return f"tl.where(({a} != {a}) | ({a} {which} {b}), {a}, {b})" if c.common is not torch.bool else f"{a} {boolean} {b}"

    return lambda c: (of_list if "_foreach_" in str(c.op.target) else lower)(c)


def _number_of_two(function: str, plain: str) -> Callable[[Lowering], str]:
    def lower(c: Lowering) -> str:
        a, b = c.tensor("self"), c.tensor("other")
        if c.common is torch.bool:
            return f"{a} {'|' if plain == 'maximum' else '&'} {b}"
        return c.call(function, a, b) if c.is_float else f"tl.{plain}({a}, {b})"

    return lower


def _clamp(
    lower_name: str | None, upper_name: str | None, of_list: Callable[[Lowering], str] | None = None
) -> Callable[[Lowering], str]:
    def lower(c: Lowering) -> str:
        if of_list is not None and "_foreach_" in str(c.op.target):
            return of_list(c)  # the kernels of _foreach_maximum and _foreach_minimum, whose bound has another name
        text = c.tensor("self")
        for name, helper in ((lower_name, "maximum"), (upper_name, "minimum")):
            if name is not None and c.given(name):
                bound = c.value(name)
                text = c.call(helper, text, bound) if c.is_float else f"tl.{helper}({text}, {bound})"
        return text

    return lower


# Exponents for which eager has kernels of their own. A text that chooses among them as it runs takes 80 registers of a thread in
# the backward of GPT-2's activation, and a seventh of its instructions would do.
POWERS = frozenset((0.0, 1.0, 2.0, 3.0, 0.5, -0.5, -1.0, -2.0))


def _pow(c: Lowering) -> str:
    base, exponent = c.arguments["self"], c.arguments["exponent"]
    if not c.is_float:
        return _whole_power(c, exponent)
    if c.is_tensor("exponent"):
        return f"libdevice.pow({c.value('self', rounded=True)}, {c.tensor('exponent')})"
    x = c.tensor("self")
    if "_foreach_" in str(c.op.target):
        return f"libdevice.pow({x}, {c.number('exponent')})"
    if type(exponent) is int or (type(exponent) is float and exponent in POWERS):
        return _literal_power(c, x, exponent)
    if c.common is torch.float64:
        raise c.refuse("raises float64 to a power that moves")
    assert base is not None
    suffix = {torch.bfloat16: "_bf16", torch.float16: "_fp16"}.get(c.common, "")
    return c.call(f"pow_scalar{suffix}", x, c.number("exponent", rounded=True))


def _literal_power(c: Lowering, x: str, exponent: float) -> str:
    if exponent == 0.5:
        return c.square_root(x)
    if exponent == -0.5:
        return f"libdevice.rsqrt({x})"
    if exponent == 0:
        return f"tl.where({x} == {x}, 1.0, 1.0)"
    if exponent in (1, 2):
        return " * ".join([x] * int(exponent))
    if exponent == 3:
        return f"{_square(c, x)} * {x}"
    if exponent == -1:
        return c.divide(c.constant(1), x)
    if exponent == -2:
        return c.divide(c.constant(1), _square(c, x))
    return f"libdevice.pow({x}, {_power(c, exponent)})"


def _power(c: Lowering, exponent: float) -> str:
    return c.constant(torch.tensor(float(exponent), dtype=c.common).item())


def _square(c: Lowering, x: str) -> str:
    return c.rounded(f"({x} * {x})") if c.common in HALF else f"({x} * {x})"


def _whole_power(c: Lowering, exponent: object) -> str:
    if type(exponent) is not int or not 0 < exponent <= 8 or c.common is torch.bool:
        raise c.refuse("raises integers to a power that is not a small number")
    return " * ".join([c.tensor("self")] * exponent)


def _log_add_exp(c: Lowering) -> str:
    a, b = c.tensor("self"), c.tensor("other")
    top = c.let(c.call("fmax", a, b))
    same = f"({a} == {b}) & (tl.abs({a}) == float('inf'))"
    return f"tl.where({same}, {a}, {top} + libdevice.log1p(libdevice.exp(-tl.abs({a} - {b}))))"


def _xlogy(c: Lowering) -> str:
    x, y = c.value("self"), c.value("other")
    product = f"tl.where({x} == 0, 0.0, {x} * libdevice.log({y}))"
    return f"tl.where({y} != {y}, {y}, {product})"


def _logit(c: Lowering) -> str:
    x = c.tensor("self")
    if c.given("eps"):
        raise c.refuse("clamps its input")
    return f"libdevice.log({c.divide(x, f'({c.constant(1)} - {x})')})"


def _fill_table() -> None:
    float_ = Promotion.FLOAT
    both = ("self", "other", "scalar", "scalars")
    for name in UNARY:
        lower_rules[name] = Rule(_library(UNARY[name]), float_)
    lower_rules["erf"] = lower_rules["special_erf"] = Rule(lambda c: c.erf(c.tensor("self")), float_)
    for name, function in ALIASES.items():
        lower_rules[name] = lower_rules[function]
    for name, function in ROUNDINGS.items():
        lower_rules[name] = Rule(_rounding(function))
    lower_rules["sqrt"] = Rule(lambda c: c.square_root(c.tensor("self")), float_)
    lower_rules["square"] = Rule(lambda c: f"{c.tensor('self')} * {c.tensor('self')}")
    lower_rules["frac"] = Rule(_frac)
    lower_rules["abs"] = lower_rules["absolute"] = Rule(_abs, exact=True)
    lower_rules["sign"] = lower_rules["sgn"] = Rule(_sign)
    lower_rules["signbit"] = Rule(_signbit, boolean=True)
    lower_rules["isnan"] = Rule(_is_nan, boolean=True)
    lower_rules["isinf"] = Rule(_is_inf("tl.abs({x}) == float('inf')"), boolean=True)
    lower_rules["isposinf"] = Rule(_is_inf("{x} == float('inf')"), boolean=True)
    lower_rules["isneginf"] = Rule(_is_inf("{x} == float('-inf')"), boolean=True)
    lower_rules["isfinite"] = Rule(_is_finite, boolean=True)
    lower_rules["reciprocal"] = Rule(_reciprocal, float_)
    for name, sign, helper, boolean in (("maximum", ">", "maximum", "|"), ("minimum", "<", "minimum", "&")):
        lower_rules[name] = Rule(_larger(sign, helper, boolean), operands=both)
    lower_rules["fmax"] = Rule(_number_of_two("fmax", "maximum"), exact=True)
    lower_rules["fmin"] = Rule(_number_of_two("fmin", "minimum"), exact=True)
    lower_rules["clamp"] = lower_rules["clip"] = Rule(_clamp("min", "max"), operands=("self", "min", "max"))
    lower_rules["clamp_min"] = Rule(_clamp("min", None, _larger(">", "maximum", "|")), operands=("min", *both))
    lower_rules["clamp_max"] = Rule(_clamp(None, "max", _larger("<", "minimum", "&")), operands=("max", *both))
    lower_rules["hardtanh"] = Rule(_clamp("min_val", "max_val"))
    for name, function in (("atan2", "atan2"), ("arctan2", "atan2"), ("hypot", "hypot")):
        lower_rules[name] = Rule(_library_of_two(function), float_, both)
    lower_rules["copysign"] = Rule(_copysign, float_, both)
    lower_rules["pow"] = Rule(_pow, operands=("self", "exponent"), literals=frozenset(("exponent",)), floats=POWERS)
    lower_rules["logaddexp"] = Rule(_log_add_exp)
    lower_rules["xlogy"] = lower_rules["special_xlogy"] = Rule(_xlogy, float_, both)
    lower_rules["logit"] = Rule(_logit, float_)


_fill_table()
