"""Calls of every op that is lowered: what the interpreter, the compiler and the parity tests all run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

aten = torch.ops.aten

F = (torch.float32, torch.bfloat16, torch.float16)
D = (torch.float64,)
I = (torch.int64, torch.int32, torch.uint8)  # noqa: E741 -- one letter per class of dtypes, as in the table
B = (torch.bool,)


@dataclass(frozen=True)
class Sample:
    """A call of one op on `n` tensors; `like` draws them: "any", "unit" (-1, 1), "positive", "mask" (last is bool), "adam"."""

    rule: str
    call: Callable[..., Any]
    n: int
    dtypes: tuple[torch.dtype, ...] = F
    like: str = "any"
    moving: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        return self.rule


UNARY = (
    "exp exp2 expm1 sin cos tan atan sinh tanh asinh erf erfc cosh floor ceil "
    " trunc round frac abs sign sgn neg reciprocal sqrt rsqrt "
    "square relu silu sigmoid mish hardswish hardsigmoid gelu log log2 log10 log1p lgamma"
).split()
UNARY_UNIT = "asin acos atanh erfinv logit".split()
TESTS = "isnan isinf isposinf isneginf isfinite signbit logical_not".split()
BINARY = "add sub rsub mul div maximum minimum fmax fmin atan2 hypot copysign fmod remainder xlogy".split()
COMPARISONS = "eq ne lt le gt ge".split()


def _call(name: str, *rest: Any, **kwargs: Any) -> Callable[..., Any]:
    op = getattr(aten, name)
    return lambda *tensors: op(*tensors, *rest, **kwargs)


def _rows() -> list[Sample]:
    rows = [
        Sample(name, _call(name), 1, F + (D if name in ("exp", "floor", "relu", "neg", "sqrt", "gelu", "silu") else ()))
        for name in UNARY
    ]
    rows += [Sample(name, _call(name), 1, F, "unit") for name in UNARY_UNIT]
    rows += [Sample("acosh", _call("acosh"), 1, F, "positive")]
    rows += [Sample("special_expit", _call("special_expit"), 1)]
    rows += [Sample(name, _call(name), 1, F + I[:1]) for name in TESTS if name in ("signbit", "isnan", "isinf")]
    rows += [Sample("signbit", _call("signbit"), 1, (*I[1:], *B))]
    rows += [Sample(name, _call(name), 1, F[:1]) for name in TESTS if hasattr(aten, name) and name != "isfinite"]
    rows += [Sample(name, _call(name), 2, F + D) for name in BINARY]
    rows += [
        Sample(name, _call(name), 2, I)
        for name in ("add", "mul", "sub", "div", "maximum", "fmin", "floor_divide", "remainder", "fmod")
    ]
    rows += [Sample(name, _call(name), 2, (*F, *I, *B)) for name in COMPARISONS]
    rows += [Sample(f"logical_{n}", _call(f"logical_{n}"), 2, (*F[:1], *I[:1], *B)) for n in ("and", "or", "xor")]
    rows += [Sample(f"bitwise_{n}", _call(f"bitwise_{n}"), 2, (*I, *B)) for n in ("and", "or", "xor")]
    rows += [
        Sample("bitwise_not", _call("bitwise_not"), 1, (*I, *B)),
        Sample("neg", _call("neg"), 1, I),
        Sample("abs", _call("abs"), 1, I),
    ]
    rows += [Sample(n, _call(n), 2, B) for n in ("add", "mul", "maximum", "minimum")]
    return rows + _numbers() + _selections() + _activations() + _lists() + _optimizers()


def _numbers() -> list[Sample]:
    """Ops that take Python numbers."""
    rows = [Sample(n, _call(n, 0.3), 1, F + I[:1], moving=m) for n in ("add", "sub", "mul", "div") for m in ((), (0.3,))]
    # Of 1.1 the reciprocal is another float32 if it is made of a float32.
    rows += [Sample("div", _call("div", 1.1), 1, F + I[:1], moving=m) for m in ((), (1.1,))]
    rows += [
        Sample(n, _call(n, 3), 1, F + I)
        for n in ("add", "sub", "mul", "div", "remainder", "fmod", "floor_divide")
        if n != "floor_divide"
    ]
    rows += [Sample(n, _call(n, 0.37), 1, F + I[:1], moving=(0.37,)) for n in COMPARISONS]
    rows += [Sample(n, _call(n, alpha=0.7), 2, F + D, moving=(0.7,)) for n in ("add", "sub", "rsub")]
    rows += [Sample("add", _call("add", alpha=2), 2, F + I), Sample("rsub", _call("rsub", 1.5), 1)]
    rows += [Sample("div", _call("div", rounding_mode=m), 2, F[:1] + D + I) for m in ("floor", "trunc")]
    rows += [Sample("div", _call("div", 0.7, rounding_mode=m), 1, F[:1]) for m in ("floor", "trunc")]
    rows += [
        Sample("floor_divide", _call("floor_divide"), 2, F[:1]),
        Sample("floor_divide", _call("floor_divide", 3), 1, F[:1] + I),
    ]
    rows += [Sample("remainder", _call("remainder", 0.7), 1), Sample("fmod", _call("fmod", 0.7), 1)]
    rows += [Sample("pow", _call("pow", e), 1, F) for e in (0, 1, 2, 3, -1, -2, 4)] + [
        Sample("pow", _call("pow", e), 1, I) for e in (2, 3)
    ]
    powers = (2.0, 3.0, 0.5, -0.5, -1.0, -2.0, 1.7, 0.0, 1.0)
    rows += [Sample("pow", _call("pow", e), 1, F, "positive", m) for e in powers for m in ((), (e,))]
    rows += [Sample("pow", _call("pow", e), 1, D, "positive") for e in (3.0, -0.5)]
    rows += [Sample("pow", _call("pow"), 2, F, "positive"), Sample("pow", lambda x: aten.pow(2.5, x), 1, F)]
    rows += [Sample("clamp", _call("clamp", -0.5, 0.5), 1, F + D), Sample("clamp", _call("clamp", -2, 3), 1, F + I[:2])]
    rows += [
        Sample("clamp", _call("clamp"), 3, F),
        Sample("clamp_min", _call("clamp_min", 0.1), 1),
        Sample("clamp_max", _call("clamp_max", 2), 1),
    ]
    rows += [Sample("addcmul", _call("addcmul", value=v), 3, F + D, moving=(0.3,)) for v in (1, 0.3, 2)]
    rows += [Sample("addcdiv", _call("addcdiv", value=v), 3, F + D, moving=(0.3,)) for v in (1, 0.3)]
    rows += [Sample("lerp", _call("lerp", w), 2, F + D, moving=(0.3, 0.8)) for w in (0.3, 0.8)] + [
        Sample("lerp", _call("lerp"), 3),
        # At a weight of a half, a difference that overflows says from which end eager begins.
        Sample("lerp", lambda x: aten.lerp(x * 3e38, x * -3e38, 0.5), 1, F[:1]),
    ]
    rows += [Sample("logaddexp", _call("logaddexp"), 2, F[:1]), Sample("nan_to_num", _call("nan_to_num"), 1)]
    # Infinities of one sign, of which the difference is none.
    rows += [Sample("logaddexp", lambda x: aten.logaddexp(aten.div(x, 0.0), aten.div(x, 0.0)), 1, F[:1])]
    rows += [Sample("nan_to_num", _call("nan_to_num", 1.5, 2.5, -2.5), 1), Sample("hardtanh", _call("hardtanh", -1.0, 1.5), 1)]
    return rows


def _selections() -> list[Sample]:
    where = lambda x, y, m: aten.where(m, x, y)  # noqa: E731
    rows = [Sample("where", where, 3, F + I[:1] + B, "mask"), Sample("where", lambda x, m: aten.where(m, x, 0.5), 2, F, "mask")]
    rows += [
        Sample("masked_fill", lambda x, m: aten.masked_fill(x, m, -1.5), 2, F, "mask"),
        Sample("clone", _call("clone"), 1, F + I + B),
    ]
    rows += [
        Sample("_to_copy", lambda x, d=d: aten._to_copy(x, dtype=d), 1, (*F, *D, *I, *B))
        for d in (*F, *D, *I, torch.int8, torch.int16, *B)
    ]
    rows += [Sample("copy", lambda x, y: aten.copy_(x, y.float()), 2, F), Sample("fill", lambda x: aten.fill_(x, 0.3), 1, F)]
    rows += [Sample("zero", lambda x: aten.zero_(x), 1, F + I + B), Sample("ones_like", _call("ones_like"), 1, F + I + B)]
    rows += [Sample("full_like", _call("full_like", 2.5), 1, F), Sample("zeros_like", _call("zeros_like"), 1, F + B)]
    rows += [
        Sample("add", lambda x, y: aten.add_(x, y), 2, F + I),
        Sample("mul", lambda x: aten.mul_(x, 0.9), 1, F, moving=(0.9,)),
    ]
    return rows


def _activations() -> list[Sample]:
    two = "silu_backward sigmoid_backward tanh_backward mish_backward hardswish_backward hardsigmoid_backward"
    rows = [Sample(n, _call(n), 2, F + D) for n in two.split()]
    rows += [Sample("gelu", _call("gelu", approximate="tanh"), 1, F + D)]
    rows += [Sample("gelu_backward", _call("gelu_backward", approximate=a), 2, F + D) for a in ("none", "tanh")]
    rows += [
        Sample("threshold", _call("threshold", 0.1, 2.0), 1),
        Sample("threshold", lambda x: aten.threshold(aten.round(x), 1.0, 7.0), 1),
        Sample("threshold_backward", _call("threshold_backward", 0), 2, F + D),
    ]
    rows += [
        Sample("hardtanh_backward", _call("hardtanh_backward", -1.0, 0.5), 2),
        Sample("leaky_relu", _call("leaky_relu", 0.01), 1),
    ]
    rows += [Sample("leaky_relu_backward", _call("leaky_relu_backward", 0.01, False), 2)]
    rows += [Sample("elu", _call("elu", a, 1, 1), 1) for a in (1, 0.3)]
    rows += [Sample("elu_backward", lambda g, x, r=r: aten.elu_backward(g, 0.7, 1.1, 1, r, x), 2) for r in (False, True)]
    rows += [Sample("softplus", _call("softplus", b, 20), 1) for b in (1, 0.7)]
    rows += [Sample("softplus_backward", _call("softplus_backward", 0.7, 20), 2)]
    rows += [Sample("log_sigmoid_forward", lambda x: aten.log_sigmoid_forward(x)[0], 1)]
    rows += [Sample("log_sigmoid_backward", _call("log_sigmoid_backward"), 3)]
    rows += [
        Sample("hardshrink", _call("hardshrink", 0.5), 1),
        Sample("hardshrink_backward", _call("hardshrink_backward", 0.5), 2),
    ]
    rows += [Sample("softshrink_backward", _call("softshrink_backward", 0.5), 2)]
    rows += [Sample("native_dropout_backward", lambda g, m: aten.native_dropout_backward(g, m, 1.25), 2, F, "mask")]
    rows += [Sample("mse_loss_backward", _call("mse_loss_backward", r), 3, F) for r in (0, 1)]
    rows += [Sample("smooth_l1_loss_backward", _call("smooth_l1_loss_backward", 1, 0.7), 3, F)]
    rows += [Sample("huber_loss_backward", _call("huber_loss_backward", 1, 0.7), 3, F)]
    rows += [
        Sample("_prelu_kernel", _call("_prelu_kernel"), 2),
        Sample("_prelu_kernel_backward", _call("_prelu_kernel_backward"), 3),
        # Infinite gradients at zero.
        Sample("_prelu_kernel_backward", lambda g, x, w: aten._prelu_kernel_backward(g / 0.0, x * 0.0, w), 3, F[:1]),
    ]
    return rows


def _first(op: Any, *rest: Any, **kwargs: Any) -> Callable[..., Any]:
    """A list form on lists of one tensor each, for its effect on the first."""

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        result = op(*([t] for t in tensors), *rest, **kwargs)
        return tensors[0] if result is None else result[0]

    return call


def _lists() -> list[Sample]:
    rows = [
        Sample(n, _first(getattr(aten, f"_foreach_{n}_"), 0.3), 1, F, moving=(0.3,))
        for n in ("add", "sub", "mul", "div", "maximum", "clamp_min", "clamp_max")
    ]
    names = ("add", "sub", "mul", "div", "minimum", "clamp_min", "clamp_max")
    rows += [Sample(n, _first(getattr(aten, f"_foreach_{n}_")), 2) for n in names]
    rows += [Sample(n, _first(getattr(aten, f"_foreach_{n}_"), [0.3]), 1) for n in ("add", "mul", "div")]
    rows += [
        Sample("add", _first(aten._foreach_add_, alpha=0.7), 2, F, moving=(0.7,)),
        Sample("zero", _first(aten._foreach_zero_), 1),
    ]
    rows += [
        Sample(n, _first(getattr(aten, f"_foreach_{n}")), 1, F, "positive") for n in ("sqrt", "neg", "reciprocal", "exp", "abs")
    ]
    rows += [Sample("lerp", _first(aten._foreach_lerp_, w), 2, F, moving=(0.1, 0.9)) for w in (0.1, 0.9)]
    rows += [Sample(n, _first(getattr(aten, f"_foreach_{n}_"), 0.3), 3, F, moving=(0.3,)) for n in ("addcmul", "addcdiv")]
    rows += [Sample(n, _first(getattr(aten, f"_foreach_{n}_"), [-0.3]), 3) for n in ("addcmul", "addcdiv")]
    rows += [Sample("copy", _first(aten._foreach_copy_), 2), Sample("pow", _first(aten._foreach_pow_, 2.0), 1, F, "positive")]
    rows += [Sample("mul", _list_times_tensor, 1, F)]
    return rows


def _list_times_tensor(x: torch.Tensor) -> torch.Tensor:
    aten._foreach_mul_([x], x.new_full((), 0.37))
    return x


ADAM = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False, "maximize": False}


def _adam(op: Any, **changes: Any) -> Callable[..., Any]:
    options = {
        "lr": 0.1,
        "beta1": 0.9,
        "beta2": 0.99,
        "weight_decay": 0.1,
        "eps": 1e-8,
        "amsgrad": False,
        "maximize": False,
    } | changes

    def call(
        p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, largest: torch.Tensor, step: torch.Tensor
    ) -> Any:
        op([p], [g], [m], [v], [largest] if options["amsgrad"] else [], [step], **options)
        return [p, m, v, largest] if options["amsgrad"] else [p, m, v]

    return call


SGD = {"weight_decay": 0.1, "momentum": 0.9, "lr": 0.1, "dampening": 0.1, "nesterov": False, "maximize": False}


def _sgd(with_buffer: bool, **changes: Any) -> Callable[..., Any]:
    options = {**SGD, "is_first_step": False, **changes}

    def call(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor) -> list[torch.Tensor]:
        aten._fused_sgd_([p], [g], [m] if with_buffer else [], **options)
        return [p, m] if with_buffer else [p]

    return call


def _optimizers() -> list[Sample]:
    moving = (0.1, 0.9, 0.99, 1e-8)
    adams = ((aten._fused_adam_, {}), (aten._fused_adam_, {"amsgrad": True}), (aten._fused_adam_, {"weight_decay": 0.0}))
    adamws = ((aten._fused_adamw_, {}), (aten._fused_adamw_, {"maximize": True}))
    rows = [Sample(str(op).removeprefix("aten."), _adam(op, **o), 6, F, "adam", moving) for op, o in adams + adamws]
    rows += [
        Sample("_fused_sgd_", _sgd(True, **o), 3, F)
        for o in ({}, {"nesterov": True}, {"is_first_step": True}, {"weight_decay": 0.0})
    ]
    rows += [Sample("_fused_sgd_", _sgd(False, momentum=0.0, **o), 3, F) for o in ({}, {"maximize": True})]
    return rows


SAMPLES = _rows()


def draw(sample: Sample, dtype: torch.dtype, shape: tuple[int, ...], device: str = "cpu", seed: int = 0) -> list[torch.Tensor]:
    """Tensors for a sample: random, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [_drawn(sample.like, dtype, shape, generator).to(device) for _ in range(sample.n)]
    if sample.like == "mask":
        tensors[-1] = (torch.rand(shape, generator=generator) < 0.5).to(device)
    if sample.like == "adam":
        tensors[3:5] = [t.abs() for t in tensors[3:5]]
        tensors[5] = torch.tensor(3.0, device=device)
    return tensors


def _drawn(like: str, dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not dtype.is_floating_point:
        low = 1 if dtype is torch.uint8 else -9
        numbers = torch.randint(low, 9, shape, generator=generator)
        return torch.where(numbers == 0, 5, numbers).to(dtype)
    if like == "unit":
        return (torch.rand(shape, generator=generator) * 2 - 1).to(dtype)
    numbers = torch.randn(shape, generator=generator) * 2
    return (numbers.abs() + 1.0 if like == "positive" else numbers).to(dtype)
