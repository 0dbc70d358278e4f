"""Steps of programs that every executor computes to the last bit: nothing is approximated, and no sum is taken in another order.

`D` is the device; `s` and `r` are numbers that another run of the same program may change. 16 bits hold them exactly: the CPU
rounds a number, or a tensor with no dimensions, to 16 bits in other ops than a GPU does.
"""

from __future__ import annotations

from tests.property.strategies import Builder, Step, make, pick, step

EXACT: dict[str, Step] = {}

SHAPES = ("5, 7", "7", "5, 1", "1", "", "0, 7", "2, 5, 7", "1, 7", "1100", "5, 5", "3, 0")
DTYPES = ("float32", "float32", "float16", "int64", "bool", "bfloat16")
FLOATS = ("float32", "float16", "bfloat16")


def begin(builder: Builder, k: int) -> None:
    """The device, the numbers that move, and tensors of every dtype."""
    outside = builder.program.outside
    for line in ("D = 'cpu'", "s = 0.375", "r = -1.75"):
        builder.add(line, outside)
    for i, dtype in enumerate(("float32", "float32", *DTYPES)):
        shape = SHAPES[0] if i == 0 else pick(SHAPES, k + 3 * i)
        builder.add(f"{builder.new()} = {make(shape, k + i, dtype)}.to(D)", outside)


def number(k: int) -> str:
    return pick(("s", "r", "2", "-3", "0.5", "s"), k)


def dtype_of(b: Builder, name: str) -> str:
    return str(b.world.tensors[name].dtype).removeprefix("torch.")


def floating(b: Builder, i: int) -> str:
    names = [n for n, t in b.world.tensors.items() if t.dtype.is_floating_point]
    return names[i % len(names)]


def partner(b: Builder, i: int, name: str) -> str:
    """A tensor that broadcasts with the named one, and that no executor rounds before the op."""
    x, y = b.world.tensors[name], b.fitting(i, name)
    other = b.world.tensors[y]
    return y if other.dtype is x.dtype or (x.dim() and other.dim()) else name


def alone(b: Builder, name: str) -> tuple[str, ...]:
    """Ops of one operand. The CPU's root of float32 is not always the nearest number."""
    return ("neg", "abs", "sqrt") if dtype_of(b, name) in ("float16", "bfloat16") else ("neg", "abs")


def writable(b: Builder, i: int) -> str:
    """A tensor that does not overlap itself."""
    names = [n for n, t in b.world.tensors.items() if 0 not in t.stride()]
    return names[i % len(names)]


@step(2, EXACT)
def unary(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    return f"{b.new()} = {f'~{x}' if dtype_of(b, x) == 'bool' else f'{x}.{pick(alone(b, x), k)}()'}"


@step(4, EXACT)
def binary(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    return f"{b.new()} = torch.{pick(('add', 'sub', 'mul', 'div', 'add', 'mul'), k)}({x}, {partner(b, j, x)})"


@step(1, EXACT)
def extreme(b: Builder, i: int, j: int, k: int) -> str:
    """Of two zeros with other signs either may be taken; adding 0 forgets the sign."""
    x = b.any(i)
    return f"{b.new()} = torch.{pick(('maximum', 'minimum'), k)}({x}, {partner(b, j, x)}) + 0"


@step(3, EXACT)
def with_number(b: Builder, i: int, j: int, k: int) -> str:
    x, n = b.any(i), number(j)
    return f"{b.new()} = {pick((f'{x} + {n}', f'{x} - {n}', f'{x} * {n}', f'{n} - {x}', f'{x} / 2', f'{x} / 0.25'), k)}"


@step(1, EXACT)
def clamp(b: Builder, i: int, j: int, k: int) -> str:
    return f"{b.new()} = {floating(b, i)}.clamp({pick(('-1, 2', 'min=s', 'max=r', 'r, s', 'min=-2, max=s'), k)}) + 0"


@step(2, EXACT)
def where(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    y = partner(b, j, x)
    return f"{b.new()} = torch.where({pick((f'{x} > {y}', f'{x} != 0', f'{y} <= s'), k)}, {x}, {y})"


@step(1, EXACT)
def compare(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    other = partner(b, j, x) if k % 3 else number(j)
    return f"{b.new()} = torch.{pick(('eq', 'ne', 'lt', 'le', 'gt', 'ge'), k)}({x}, {other})"


@step(2, EXACT)
def cast(b: Builder, i: int, j: int, k: int) -> str:
    """What is no number, or too large, has no whole number."""
    x, dtype = b.any(i), pick(DTYPES, k)
    if dtype == "int64":
        x = f"torch.where({x} == {x}, {x}, torch.zeros_like({x})).mul(8).clamp(-1000, 1000)"
    return f"{b.new()} = {x}.to(torch.{dtype})"


@step(3, EXACT)
def in_place(b: Builder, i: int, j: int, k: int) -> str:
    x = writable(b, i)
    y, op = b.alike(j, x), pick(("add_", "sub_", "mul_", "copy_", "div_", "add_"), k)
    return f"{x}.{op}({y if k % 4 else number(j)})" if op not in ("copy_", "div_") else f"{x}.{op}({y})"


@step(1, EXACT)
def in_place_alone(b: Builder, i: int, j: int, k: int) -> str:
    x = writable(b, i)
    forms = [f"{op}_()" for op in alone(b, x)] + ["fill_(s)", "fill_(2)", "zero_()", f"masked_fill_({x} > 1, r)"]
    return f"{x}.{forms[k % len(forms)]}"


@step(1, EXACT)
def copy_casting(b: Builder, i: int, j: int, k: int) -> str:
    x = writable(b, i)
    return f"{x}.copy_({partner(b, j, x)})" if dtype_of(b, x) in (*FLOATS, "bool") else f"{x}.add_(1)"


@step(3, EXACT)
def view(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    d, rank = b.dim(x, j), b.world.tensors[x].dim()
    forms = ["t()" if rank <= 2 else f"transpose({d}, 0)", "reshape(-1)", f"unsqueeze({d})", "permute(*range(X.dim())[::-1])"]
    forms += ["expand(2, *X.shape)"] + ([f"select({d}, -1)", f"narrow({d}, 0, 1)"] if b.size(x, d) and rank else [])
    return f"{b.new()} = {x}.{forms[k % len(forms)].replace('X', x)}"


@step(2, EXACT)
def part(b: Builder, i: int, j: int, k: int) -> str:
    return f"{b.new()} = {b.any(i)}[{pick(('1:', '..., ::2', '..., 1:3', ':2', '..., None', 'None'), k)}]"


@step(2, EXACT)
def write_to_part(b: Builder, i: int, j: int, k: int) -> str:
    x = writable(b, i)
    return f"{x}[{pick(('1:', '..., ::2', '..., 1:3', ':2'), j)}].{pick(('add_(1)', 'mul_(2)', 'zero_()', 'fill_(3)'), k)}"


@step(1, EXACT)
def lists(b: Builder, i: int, j: int, k: int) -> str:
    x = floating(b, i)
    y, z = b.alike(j, x), b.alike(k, x)
    forms = (f"mul([{x}, {y}], s)", f"add([{x}, {y}], 2)", f"mul([{x}, {y}], [{y}, {y}])", f"add([{y}, {z}], [{z}, {z}])")
    return f"{b.new()}, {b.new()} = torch._foreach_{pick(forms, k)}"


@step(1, EXACT)
def lists_in_place(b: Builder, i: int, j: int, k: int) -> str:
    x = writable(b, i)
    y = b.alike(j, x)
    # On a GPU one launch writes all of them, and which write of shared memory is the last is chance, in eager, too.
    shared = b.world.tensors[x].untyped_storage()._cdata == b.world.tensors[y].untyped_storage()._cdata
    names = f"[{x}]" if x == y else f"[{x}, {y}][: 1 + (D == 'cpu')]" if shared else f"[{x}, {y}]"
    return f"torch._foreach_{pick((f'mul_({names}, 2)', f'add_({names}, 1)', f'neg_({names})', f'zero_({names})'), k)}"


@step(1, EXACT)
def reduction(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    d = b.dim(x, j)
    forms = (f"sum({d})", "sum()", f"amax({d})", f"amax({d}, keepdim=True)", f"sum({d}, keepdim=True)")
    return f"{b.new()} = {x}.{pick(forms, k)}"


@step(1, EXACT)
def product(b: Builder, i: int, j: int, k: int) -> str:
    x = floating(b, i)
    rows = b.size(x, 0)
    return f"{b.new()} = torch.mm({x}.reshape({rows}, -1), {x}.reshape({rows}, -1).t())"


@step(1, EXACT)
def end(b: Builder, i: int, j: int, k: int) -> str:
    return pick(("kitsune.flush()", f"seen = {b.any(i)}.sum().item()", f"seen = {b.any(j)}.tolist()"), k)
