"""Rows of normalisations over a row. As in eager, everything inside is float32 for the half types, rounded once at the end."""

from kitsune.codegen.lowering import Lowering, Rule, lower_rules


def _layer_norm(c: Lowering) -> tuple[str, str, str]:
    x = c.let(c.tensor("input", c.compute))
    mean, squares = c.reduce_to("moments", x)
    rstd = c.let(f"libdevice.rsqrt({c.divide(squares, c.count)} + {c.number('eps')})")
    y = f"({x} - {mean}) * {rstd}"
    if c.given("weight"):
        y = f"{y} * {c.tensor('weight', c.compute)}"
    if c.given("bias"):
        y = f"{y} + {c.tensor('bias', c.compute)}"
    return y, mean, rstd


def _layer_norm_backward(c: Lowering) -> str:
    """The gradient of the input."""
    grad, x = c.tensor("grad_out", c.compute), c.tensor("input", c.compute)
    rstd = c.tensor("rstd", c.compute)
    if c.given("weight"):
        grad = f"{grad} * {c.tensor('weight', c.compute)}"
    grad, unit = c.let(grad), c.let(f"({x} - {c.tensor('mean', c.compute)}) * {rstd}")
    along = c.let(c.divide(c.reduce("sum", f"{grad} * {unit}"), c.count))
    mean = c.let(c.divide(c.reduce("sum", grad), c.count))
    return f"({grad} - {mean} - {unit} * {along}) * {rstd}"


lower_rules["native_layer_norm"] = Rule(_layer_norm, operands=("input",))
lower_rules["native_layer_norm_backward"] = Rule(_layer_norm_backward, operands=("grad_out",))
