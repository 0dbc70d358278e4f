"""Device functions that rules call by name. A kernel's source holds those that it uses."""

HELPERS: dict[str, str] = {}


def _helper(text: str) -> None:
    name = text.split("def ", 1)[1].split("(", 1)[0]
    HELPERS[name] = "@triton.jit\n" + text.strip() + "\n"


# Eager writes each op's result to memory in its dtype; a register must hold the value that would be read back.
_helper("""
def to_bf16(x):
    return x.to(tl.bfloat16).to(tl.float32)
""")
_helper("""
def to_fp16(x):
    return x.to(tl.float16).to(tl.float32)
""")
_helper("""
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
""")
_helper("""
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
""")
# The other operand where one is NaN, as C's functions of these names.
_helper("""
def fmax(a, b):
    return tl.maximum(a, b)
""")
_helper("""
def fmin(a, b):
    return tl.minimum(a, b)
""")
# Python's remainder has the sign of the divisor, the hardware's that of the dividend.
_helper("""
def floor_mod(a, b):
    r = a % b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)
""")
_helper("""
def floor_div(a, b):
    q = a // b
    return tl.where((a % b != 0) & ((a < 0) != (b < 0)), q - 1, q)
""")
_helper("""
def remainder(a, b):
    r = libdevice.fmod(a, b)
    return tl.where((r != 0) & ((b < 0) != (r < 0)), r + b, r)
""")
# Nearest to the floor of the exact quotient: the division of (a - remainder) rounds, at most by half.
_helper("""
def snap(quotient, zero):
    floored = libdevice.floor(quotient)
    floored = tl.where(quotient - floored > 0.5, floored + 1.0, floored)
    return tl.where(quotient != 0, floored, libdevice.copysign(0.0 * floored, zero))
""")
# x, its square and so on are separate kernels in eager, chosen on the host by the exponent.
_helper("""
def pow_scalar(x, e):
    if e == 2.0:
        y = x * x
    elif e == 3.0:
        y = x * x * x
    elif e == 0.5:
        y = tl.sqrt_rn(x)
    elif e == -0.5:
        y = libdevice.rsqrt(x)
    elif e == -1.0:
        y = tl.div_rn(1.0, x)
    elif e == -2.0:
        y = tl.div_rn(1.0, x * x)
    elif e == 1.0:
        y = x
    elif e == 0.0:
        y = tl.where(x == x, 1.0, 1.0)
    else:
        y = libdevice.pow(x, e)
    return y
""")
# As above where each product is rounded to bfloat16.
_helper("""
def pow_scalar_bf16(x, e):
    if e == 3.0:
        y = to_bf16(x * x) * x
    elif e == -2.0:
        y = tl.div_rn(1.0, to_bf16(x * x))
    else:
        y = pow_scalar(x, e)
    return y
""")
_helper("""
def pow_scalar_fp16(x, e):
    if e == 3.0:
        y = to_fp16(x * x) * x
    elif e == -2.0:
        y = tl.div_rn(1.0, to_fp16(x * x))
    else:
        y = pow_scalar(x, e)
    return y
""")
# The accumulated value is taken as it is when the factor is one: a fused multiply-add of the two operands.
_helper("""
def add_product(a, b, c, value):
    return tl.where(value == 1.0, libdevice.fma(b, c, a), libdevice.fma(value, b * c, a))
""")
_helper("""
def lerp(start, end, weight):
    between = end - start
    near = libdevice.fma(weight, between, start)
    # Not start - end, which has another sign where it is zero.
    far = libdevice.fma(between * -1.0, 1.0 - weight, end)
    return tl.where(tl.abs(weight) < 0.5, near, far)
""")
# 2 to a power as the hardware has it, whose result is not below the normal numbers here.
_helper("""
def ex2(x):
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
""")
# The error function of CUDA 13 in every bit: an odd polynomial near zero, and 1 - 2 ** polynomial beyond. The library chooses
# coefficient by coefficient, with two moves for each of seven; both polynomials take 8 instructions less for an element, of 54 in
# the backward of an activation, and half as many of those that start every other cycle only.
_helper("""
def erf(x):
    square = x * x
    near = libdevice.fma(square, 8.483494457323104e-05, -0.0008213091641664505)
    near = libdevice.fma(near, square, 0.005213488824665546)
    near = libdevice.fma(near, square, -0.026868773624300957)
    near = libdevice.fma(near, square, 0.11284004896879196)
    near = libdevice.fma(near, square, -0.37612664699554443)
    near = libdevice.fma(near, square, 0.12837915122509003)
    size = tl.abs(x)
    far = libdevice.fma(size, 0.00011219871521461755, -0.0013275252422317863)
    far = libdevice.fma(far, size, 0.00839653518050909)
    far = libdevice.fma(far, size, -0.04024658352136612)
    far = libdevice.fma(far, size, 0.15950430929660797)
    far = libdevice.fma(far, size, 0.9129176735877991)
    far = libdevice.fma(far, size, 0.6290600299835205)
    far = libdevice.copysign(1.0 - ex2(libdevice.fma(far, -size, -size)), x)
    return tl.where(size >= 1.002959966659546, far, libdevice.fma(near, x, x))
""")

# Helpers that the interpreter has bodies of its own for.
INTERPRETED = ("to_bf16", "fmax", "fmin", "ex2")
# Helpers that call others.
CALLS = {
    "pow_scalar_bf16": ("to_bf16", "pow_scalar"),
    "pow_scalar_fp16": ("to_fp16", "pow_scalar"),
    "erf": ("ex2",),
}


def helper_texts(used: set[str]) -> list[str]:
    """The sources of the helpers in `used` and of those that they call, callees first."""
    needed = used | {callee for name in used for callee in CALLS.get(name, ())}
    return [text for name, text in HELPERS.items() if name in needed]
