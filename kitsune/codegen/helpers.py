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

# Helpers that the interpreter has bodies of its own for.
INTERPRETED = ("to_bf16", "fmax", "fmin")
# Helpers that call others.
CALLS = {
    "pow_scalar_bf16": ("to_bf16", "pow_scalar"),
    "pow_scalar_fp16": ("to_fp16", "pow_scalar"),
}


def helper_texts(used: set[str]) -> list[str]:
    """The sources of the helpers in `used` and of those that they call, callees first."""
    needed = used | {callee for name in used for callee in CALLS.get(name, ())}
    return [text for name, text in HELPERS.items() if name in needed]
