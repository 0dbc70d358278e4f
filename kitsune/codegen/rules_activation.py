"""Rows of activations and their backwards.

Where a product feeds a sum inside one op, nvcc contracts the two in eager's kernel, and the rule writes the same fma.
"""

from collections.abc import Callable
from math import pi, sqrt

import torch

from kitsune.codegen.dtypes import HALF
from kitsune.codegen.lowering import Lowering, Promotion, Rule, lower_rules

KAPPA = 0.044715


def _sigmoid(c: Lowering, x: str) -> str:
    one = c.constant(1)
    return c.divide(one, f"({one} + libdevice.exp(-{x}))")


def _silu(c: Lowering) -> str:
    x = c.tensor("self")
    return c.divide(x, f"({c.constant(1)} + libdevice.exp(-{x}))")


def _silu_backward(c: Lowering) -> str:
    grad, x, one = c.tensor("grad_output"), c.tensor("self"), c.constant(1)
    s = c.let(_sigmoid(c, x))
    return f"{grad} * {s} * {c.fma(x, f'{one} - {s}', one)}"


def _sigmoid_backward(c: Lowering) -> str:
    grad, y, one = c.tensor("grad_output"), c.tensor("output"), c.constant(1)
    if c.common not in HALF:
        return f"{grad} * ({one} - {y}) * {y}"
    step = c.rounded(f"({one} - {y})")
    return f"{c.rounded(f'({grad} * {step})')} * {y}"


def _tanh_backward(c: Lowering) -> str:
    grad, y, one = c.tensor("grad_output"), c.tensor("output"), c.constant(1)
    if c.common not in HALF:
        return f"{grad} * {c.fma(f'-{y}', y, one)}"
    square = c.rounded(f"({y} * {y})")
    return f"{grad} * {c.rounded(f'({one} - {square})')}"


def _relu(c: Lowering) -> str:
    x = c.tensor("self")
    return c.call("maximum", x, c.constant(0)) if c.is_float else f"tl.maximum({x}, 0)"


def _threshold(c: Lowering) -> str:
    x = c.tensor("self")
    return f"tl.where({x} <= {c.number('threshold', rounded=True)}, {c.number('value', rounded=True)}, {x})"


def _threshold_backward(c: Lowering) -> str:
    threshold = c.number("threshold", rounded=True)
    return f"tl.where({c.tensor('self')} <= {threshold}, {c.constant(0)}, {c.tensor('grad_output')})"


def _hardtanh_backward(c: Lowering) -> str:
    x = c.tensor("self")
    outside = f"({x} <= {c.number('min_val')}) | ({x} >= {c.number('max_val')})"
    return f"tl.where({outside}, {c.constant(0)}, {c.tensor('grad_output')})"


def _leaky_relu(c: Lowering) -> str:
    x = c.tensor("self")
    return f"tl.where({x} > 0, {x}, {x} * {c.number('negative_slope')})"


def _leaky_relu_backward(c: Lowering) -> str:
    grad = c.tensor("grad_output")
    return f"tl.where({c.tensor('self')} > 0, {grad}, {grad} * {c.number('negative_slope')})"


def _six(c: Lowering, x: str) -> str:
    """relu6(x + 3)."""
    return c.call("minimum", c.call("maximum", f"{x} + {c.constant(3)}", c.constant(0)), c.constant(6))


def _sixth(c: Lowering) -> str:
    # Eager's constant is a float32 even for float64.
    return c.constant(torch.tensor(1 / 6, dtype=torch.float32).item())


def _hardswish(c: Lowering) -> str:
    x = c.tensor("self")
    return f"{x} * {_six(c, x)} * {_sixth(c)}"


def _hardswish_backward(c: Lowering) -> str:
    grad, x = c.tensor("grad_output"), c.tensor("self")
    inside = f"{grad} * ({c.divide(x, c.constant(3))} + {c.constant(0.5)})"
    return f"tl.where({x} <= -3.0, {c.constant(0)}, tl.where({x} < 3.0, {inside}, {grad}))"


def _hardsigmoid(c: Lowering) -> str:
    return f"{_six(c, c.tensor('self'))} * {_sixth(c)}"


def _hardsigmoid_backward(c: Lowering) -> str:
    x = c.tensor("self")
    return f"tl.where(({x} > -3.0) & ({x} < 3.0), {c.tensor('grad_output')} * {_sixth(c)}, {c.constant(0)})"


def _hardshrink(c: Lowering, value: str = "self") -> str:
    x = c.tensor("self")
    limit = c.let(c.number("lambd", rounded=True))
    return f"tl.where(({x} >= -{limit}) & ({x} <= {limit}), {c.constant(0)}, {c.tensor(value)})"


def _elu(c: Lowering) -> str:
    x, scale = c.tensor("self"), c.number("scale")
    negative = f"libdevice.expm1({x} * {c.number('input_scale')}) * ({c.number('alpha')} * {scale})"
    return f"tl.where({x} > 0, {x} * {scale}, {negative})"


def _elu_backward(c: Lowering) -> str:
    grad, x = c.tensor("grad_output"), c.tensor("self_or_result")
    scale, inner = c.number("scale"), c.number("input_scale")
    factor = c.let(f"{c.number('alpha')} * {scale}")
    if c.arguments["is_result"]:
        negative = f"{grad} * {inner} * ({x} + {factor})"
    else:
        negative = f"{grad} * {inner} * {factor} * libdevice.exp({x} * {inner})"
    return f"tl.where({x} <= 0, {negative}, {grad} * {scale})"


def _softplus(c: Lowering) -> str:
    x, beta = c.tensor("self"), c.number("beta")
    scaled = c.let(f"{x} * {beta}")
    soft = c.divide(f"libdevice.log1p(libdevice.exp({scaled}))", beta)
    return f"tl.where({scaled} > {c.number('threshold')}, {x}, {soft})"


def _softplus_backward(c: Lowering) -> str:
    grad, x = c.tensor("grad_output"), c.tensor("self")
    scaled = c.let(f"{x} * {c.number('beta')}")
    z = c.let(f"libdevice.exp({scaled})")
    return f"tl.where({scaled} > {c.number('threshold')}, {grad}, {c.divide(f'({grad} * {z})', f'({z} + {c.constant(1)})')})"


def _log_sigmoid(c: Lowering) -> tuple[str, str]:
    x, zero = c.tensor("self"), c.constant(0)
    # The second result is a buffer that only the CPU fills.
    buffer = "tl.full((), 0, tl.float32)"
    return f"tl.where({x} < 0, {x}, {zero}) - libdevice.log1p(libdevice.exp(-tl.abs({x})))", buffer


def _log_sigmoid_backward(c: Lowering) -> str:
    grad, x, one, zero = c.tensor("grad_output"), c.tensor("self"), c.constant(1), c.constant(0)
    z = c.let(f"libdevice.exp(-tl.abs({x}))")
    part = c.let(c.divide(z, f"({one} + {z})"))
    return f"{grad} * (tl.where({x} < 0, {one}, {zero}) - tl.where({x} < 0, {part}, -{part}))"


def _mish(c: Lowering) -> str:
    x = c.tensor("self")
    return f"{x} * libdevice.tanh(libdevice.log1p(libdevice.exp({x})))"


def _mish_backward(c: Lowering) -> str:
    grad, x = c.tensor("grad_output"), c.tensor("self")
    s = c.let(_sigmoid(c, x))
    t = c.let(f"libdevice.tanh(libdevice.log1p(libdevice.exp({x})))")
    slope = c.fma(f"-{t}", t, c.constant(1))
    return f"{grad} * {c.fma(f'{x} * {s}', slope, t)}"


def _gelu(c: Lowering) -> str:
    x, half, one = c.tensor("self"), c.constant(0.5), c.constant(1)
    if c.arguments["approximate"] == "tanh":
        return f"{half} * {x} * ({one} + libdevice.tanh({_gelu_inner(c, x, f'{x} * {x} * {x}')}))"
    return f"{x} * {half} * ({one} + {c.erf(f'{x} * {c.constant(sqrt(0.5))}')})"


def _gelu_inner(c: Lowering, x: str, cube: str) -> str:
    return f"{c.constant(sqrt(2 / pi))} * {c.fma(c.constant(KAPPA), cube, x)}"


def _gelu_backward(c: Lowering) -> str:
    grad, x, half, one = c.tensor("grad_output"), c.tensor("self"), c.constant(0.5), c.constant(1)
    if c.arguments["approximate"] != "tanh":
        mass = f"({one} + {c.erf(f'{x} * {c.constant(sqrt(0.5))}')})"
        density = c.let(f"libdevice.exp({c.constant(-0.5)} * {x} * {x}) * {c.constant(1 / sqrt(2 * pi))}")
        return f"{grad} * {c.fma(half, mass, f'{x} * {density}')}"
    square = c.let(f"{x} * {x}")
    t = c.let(f"libdevice.tanh({_gelu_inner(c, x, f'{square} * {x}')})")
    # Three kappas, as a product of two float32 constants.
    triple = (
        torch.tensor(3.0) * torch.tensor(KAPPA) if c.compute is torch.float32 else torch.tensor(3 * KAPPA, dtype=torch.float64)
    )
    inner = f"({c.constant(sqrt(2 / pi))} * {c.fma(c.constant(triple.item()), square, one)})"
    right = f"{half} * {x} * {c.fma(f'-{t}', t, one)} * {inner}"
    return f"{grad} * {c.fma(half, f'({one} + {t})', right)}"


def _prelu(c: Lowering) -> str:
    x = c.tensor("self")
    return f"tl.where({x} > 0, {x}, {c.tensor('weight')} * {x})"


def _prelu_backward(c: Lowering) -> tuple[str, str]:
    grad, x, zero = c.tensor("grad_output"), c.tensor("self"), c.constant(0)
    to_input = f"tl.where({x} > 0, {grad}, {c.tensor('weight')} * {grad})"
    return to_input, f"tl.where({x} > 0, {zero}, {x} * {grad})"


_ROWS: dict[str, Callable[[Lowering], str | tuple[str, ...]]] = {
    "sigmoid": lambda c: _sigmoid(c, c.tensor("self")),
    "special_expit": lambda c: _sigmoid(c, c.tensor("self")),
    "silu": _silu,
    "silu_backward": _silu_backward,
    "sigmoid_backward": _sigmoid_backward,
    "tanh_backward": _tanh_backward,
    "threshold": _threshold,
    "threshold_backward": _threshold_backward,
    "hardtanh_backward": _hardtanh_backward,
    "leaky_relu": _leaky_relu,
    "leaky_relu_backward": _leaky_relu_backward,
    "hardswish": _hardswish,
    "hardswish_backward": _hardswish_backward,
    "hardsigmoid": _hardsigmoid,
    "hardsigmoid_backward": _hardsigmoid_backward,
    "hardshrink": _hardshrink,
    "hardshrink_backward": lambda c: _hardshrink(c, "grad_out"),
    "softshrink_backward": lambda c: _hardshrink(c, "grad_output"),
    "elu": _elu,
    "elu_backward": _elu_backward,
    "softplus": _softplus,
    "softplus_backward": _softplus_backward,
    "log_sigmoid_forward": _log_sigmoid,
    "log_sigmoid_backward": _log_sigmoid_backward,
    "mish": _mish,
    "mish_backward": _mish_backward,
    "gelu": _gelu,
    "gelu_backward": _gelu_backward,
    "_prelu_kernel": _prelu,
    "_prelu_kernel_backward": _prelu_backward,
}


def _fill_table() -> None:
    for name, lower in _ROWS.items():
        promotion = Promotion.FLOAT if name in ("sigmoid", "special_expit") else Promotion.COMMON
        lower_rules[name] = Rule(lower, promotion, literals=frozenset())
    lower_rules["relu"] = Rule(_relu, exact=True)
    for name in ("threshold", "threshold_backward", "hardtanh_backward"):
        lower_rules[name] = Rule(_ROWS[name], exact=True)


_fill_table()
