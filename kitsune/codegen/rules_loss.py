"""Rows of the backwards of losses and of dropout. Those of losses round each step to the tensors' dtype, as eager does."""

import torch

from kitsune.codegen.dtypes import HALF
from kitsune.codegen.lowering import Lowering, Rule, lower_rules
from kitsune.ir.program import Scalar


def _dropout_backward(c: Lowering) -> str:
    mask = f"{c.tensor('mask', torch.bool)}.to({'tl.float64' if c.compute is torch.float64 else 'tl.float32'})"
    return f"{mask} * {c.tensor('grad_output')} * {c.number('scale')}"


def _steps(c: Lowering, *factors: str) -> str:
    """A product from left to right, each step rounded to the tensors' dtype."""
    text = factors[0]
    for factor in factors[1:]:
        text = c.rounded(f"({text} * {factor})")
    return text


def _norm(c: Lowering, factor: float) -> str:
    """factor, or its mean over the elements, as the tensors' dtype."""
    n = max(c.op.outputs[0].type.shape.numel(), 1)
    number = factor / n if c.arguments["reduction"] == 1 else factor
    name = c.scalar_name(Scalar(number, "fp64" if c.compute is torch.float64 else "fp32"))
    return c.rounded(name) if c.common in HALF else name


def _difference(c: Lowering) -> str:
    return c.rounded(f"({c.tensor('self')} - {c.tensor('target')})")


def _mse_backward(c: Lowering) -> str:
    return _steps(c, _norm(c, 2.0), _difference(c), c.tensor("grad_output"))


def _smooth_l1_backward(c: Lowering) -> str:
    grad, beta, norm = c.tensor("grad_output"), c.let(c.number("beta", rounded=True)), _norm(c, 1.0)
    x = _difference(c)
    flat = _steps(c, norm, grad)
    steep = c.divide(_steps(c, norm, x, grad), beta)
    return f"tl.where({x} < -{beta}, {c.negative(flat)}, tl.where({x} > {beta}, {flat}, {steep}))"


def _huber_backward(c: Lowering) -> str:
    grad, delta, norm = c.tensor("grad_output"), c.let(c.number("delta", rounded=True)), _norm(c, 1.0)
    x = _difference(c)
    flat = _steps(c, norm, grad, delta)
    steep = _steps(c, norm, x, grad)
    return f"tl.where({x} < -{delta}, {c.negative(flat)}, tl.where({x} > {delta}, {flat}, {steep}))"


lower_rules["native_dropout_backward"] = Rule(_dropout_backward, operands=("grad_output",))
lower_rules["mse_loss_backward"] = Rule(_mse_backward)
lower_rules["smooth_l1_loss_backward"] = Rule(_smooth_l1_backward)
lower_rules["huber_loss_backward"] = Rule(_huber_backward)
