"""Rows of the fused optimizers: one step of one parameter, in the order and precision of eager's kernels."""

import torch

from kitsune.codegen.lowering import Lowering, Rule, lower_rules
from kitsune.ir import Value


def _by_write(c: Lowering, texts: dict[str, str]) -> tuple[str, ...]:
    """The texts in the order of the op's outputs; what is written but did not change keeps its register."""
    names = {value.id: name for name, value in c.arguments.items() if type(value) is Value}
    return tuple(texts.get(names[before.id], c.registers.get(before.id, "0.0")) for before, _ in c.op.rewritten)


def _check_scaler(c: Lowering) -> None:
    if c.given("grad_scale") or c.given("found_inf"):
        raise c.refuse("unscales gradients")


def _learning_rate(c: Lowering) -> str:
    if c.is_tensor("lr"):
        return c.tensor("lr", c.compute)
    return c.number("lr", dtype=c.compute)


def _adam(decoupled: bool) -> Rule:
    def lower(c: Lowering) -> tuple[str, ...]:
        _check_scaler(c)
        if c.compute is not torch.float32:
            raise c.refuse("keeps its state in float64")
        lr, decay = c.let(_learning_rate(c)), c.number("weight_decay")
        param, grad = c.tensor("self"), c.tensor("grads")
        if c.arguments["maximize"]:
            grad = c.let(c.negative(grad))
        # Without a decay the products are not made, which matters for infinities.
        if decoupled:
            param = c.let(f"tl.where({decay} != 0, {c.fma(f'-({lr} * {decay})', param, param)}, {param})")
        else:
            grad = c.let(f"tl.where({decay} != 0, {c.fma(param, decay, grad)}, {grad})")
        return _moments(c, param, grad, lr)

    return Rule(lower, operands=("self",))


def _moments(c: Lowering, param: str, grad: str, lr: str) -> tuple[str, ...]:
    beta1, beta2, step = c.number("beta1"), c.number("beta2"), c.tensor("state_steps", torch.float32)
    average = c.let(c.fma(beta1, c.tensor("exp_avgs"), c.fma(f"-{beta1}", grad, grad)))
    square = c.let(f"{grad} * {grad}")
    square = c.let(c.fma(beta2, c.tensor("exp_avg_sqs"), c.fma(f"-{beta2}", square, square)))
    texts = {"exp_avgs": average, "exp_avg_sqs": square}
    first = c.let(c.divide(lr, f"(1.0 - libdevice.pow({beta1}, {step}))"))
    second = c.let(f"tl.sqrt_rn(1.0 - libdevice.pow({beta2}, {step}))")
    if c.arguments["amsgrad"]:
        largest = c.tensor("max_exp_avg_sqs")
        square = texts["max_exp_avg_sqs"] = c.let(f"tl.where({largest} < {square}, {square}, {largest})")
    denominator = c.let(f"{c.divide(c.square_root(square), second)} + {c.number('eps')}")
    texts["self"] = f"{param} - {c.divide(f'({first} * {average})', denominator)}"
    return _by_write(c, texts)


def _sgd(c: Lowering) -> tuple[str, ...]:
    _check_scaler(c)
    if c.compute is not torch.float32:
        raise c.refuse("computes in float64")
    lr, decay, momentum = c.let(_learning_rate(c)), c.number("weight_decay"), c.number("momentum")
    param, grad = c.tensor("self"), c.tensor("grads")
    if c.arguments["maximize"]:
        grad = c.let(c.negative(grad))
    grad = c.let(f"tl.where({decay} != 0, {c.fma(decay, param, grad)}, {grad})")
    texts = {}
    if c.is_tensor("momentum_buffer_list"):
        buffer = grad
        if not c.arguments["is_first_step"]:
            kept = f"{momentum} * {c.tensor('momentum_buffer_list')}"
            buffer = c.let(c.fma(f"1.0 - {c.number('dampening')}", grad, kept))
        texts["momentum_buffer_list"] = buffer
        grad = c.let(c.fma(momentum, buffer, grad)) if c.arguments["nesterov"] else buffer
    texts["self"] = c.fma(f"-{lr}", grad, param)
    return _by_write(c, texts)


lower_rules["_fused_adam_"] = _adam(decoupled=False)
lower_rules["_fused_adamw_"] = _adam(decoupled=True)
lower_rules["_fused_sgd_"] = Rule(_sgd, operands=("self",))
