"""The table of steps: what a random program may do."""

from __future__ import annotations

from tests.property.strategies import BINARY, DTYPES, REDUCTIONS, SCALARS, SHAPES, UNARY, Builder, make, pick, step


@step()
def create(b: Builder, i: int, j: int, k: int) -> str:
    return f"{b.new()} = {make(pick(SHAPES, i), k, pick(DTYPES, j))}"


@step()
def create_leaf(b: Builder, i: int, j: int, k: int) -> str:
    return f"{b.new()} = {make(pick(SHAPES, i), k, pick(('float32', 'float64'), j), grad=True)}"


@step()
def create_filled(b: Builder, i: int, j: int, k: int) -> str:
    source = pick(("zeros", "ones"), k)
    like = (
        f"torch.{source}({pick(SHAPES, i) or '()'}, dtype=torch.{pick(DTYPES, j)})",
        f"torch.{source}_like({b.any(i)})",
    )
    return f"{b.new()} = {pick((*like, 'torch.arange(3.0)', 'torch.full((2, 3), 0.25)', 'torch.eye(3)'), j)}"


@step()
def create_from_data(b: Builder, i: int, j: int, k: int) -> str:
    data = (f"[[{i % 5}.5, 1, 2]]", f"[{k % 3}, 1]", f"{j % 9}.25", "np.arange(3.0)", "[True, False, True]")
    make_it = "from_numpy" if k % 5 == 3 else "tensor"
    return f"{b.new()} = torch.{make_it}({pick(data, k)})"


@step(3)
def unary(b: Builder, i: int, j: int, k: int) -> str:
    return f"{b.new()} = torch.{pick(UNARY, k)}({b.any(i)})"


@step(5)
def binary(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    return f"{b.new()} = torch.{pick(BINARY, k)}({x}, {b.fitting(j, x)})"


@step(2)
def binary_scalar(b: Builder, i: int, j: int, k: int) -> str:
    x, scalar, sign = b.any(i), pick(SCALARS, j), pick(("+", "-", "*", "/", "**", "<"), k)
    return f"{b.new()} = {f'{scalar} {sign} {x}' if j % 2 else f'{x} {sign} {scalar}'}"


@step()
def ternary(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    y, z = b.fitting(j, x), b.fitting(k, x)
    calls = (
        f"torch.where({x} > 0, {y}, {z})",
        f"torch.addcmul({x}, {y}, {z}, value=0.5)",
        f"torch.lerp({x}, {y}, 0.3)",
        f"{x}.clamp(-1, 1)",
        f"torch.add({x}, {y}, alpha=2)",
    )
    return f"{b.new()} = {pick(calls, i + j + k)}"


@step()
def cast(b: Builder, i: int, j: int, k: int) -> str:
    return f"{b.new()} = {b.any(i)}.to(torch.{pick(DTYPES, j)})"


@step(4)
def view(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    d = b.dim(x, j)
    n = b.size(x, d)
    calls = (
        f"{x}.view(-1)",
        f"{x}.reshape(-1, 1)",
        f"{x}.t()",
        f"{x}.transpose(0, -1)",
        f"{x}.select({d}, {k % (n or 1)})",
        f"{x}.narrow({d}, {min(1, n - 1)}, 1)",
        f"{x}[1:]",
        f"{x}[..., ::2]",
        f"{x}.unsqueeze({d})",
        f"{x}.squeeze()",
        f"{x}.expand(2, *{x}.shape)",
        f"{x}.diagonal()",
        f"{x}.detach()",
        f"{x}.view_as({x})",
        f"{x}.movedim(0, -1)",
        f"{x}.as_strided((2,), (1,), {k % 2})",
        f"{x}.flatten()",
        f"{x}.unflatten({d}, (1, -1))",
        f"{x}[None]",
        f"{x}.data",
    )
    return f"{b.new()} = {pick(calls, k)}"


@step()
def split(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    d = b.dim(x, j)
    calls = (f"{x}.split(1, {d})", f"{x}.chunk(2, {d})", f"{x}.unbind({d})", f"torch.tensor_split({x}, 2, {d})")
    return f"{b.new()}, *_ = {pick(calls, k)}; {b.new()} = _[0]; del _"


@step()
def gather(b: Builder, i: int, j: int, k: int) -> str:
    x, d = b.any(i), b.dim(b.any(i), j)
    calls = (
        f"torch.cat([{x}, {x}], {d})",
        f"torch.stack([{x}, {x}])",
        f"{x}[torch.tensor([0, 0])]",
        f"{x}[{x} > 0]",
        f"{x}.index_select({d}, torch.tensor([0]))",
        f"{x}.flip({d})",
        f"{x}.contiguous()",
        f"{x}.repeat(2, 1)",
        f"torch.nonzero({x})",
        f"{x}.sort({d})[0]",
        f"torch.broadcast_to({x}, (2, 2, 3)).contiguous()",
    )
    return f"{b.new()} = {pick(calls, k)}"


@step(5)
def in_place(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    y = b.fitting(j, x)
    calls = (
        f"{x}.add_({y})",
        f"{x}.mul_({y})",
        f"{x}.copy_({y})",
        f"{x}.zero_()",
        f"{x}.fill_({j % 5})",
        f"{x}.relu_()",
        f"{x}.masked_fill_({x} > 0.5, 0.25)",
        f"{x}.sub_(0.5)",
        f"{x}.add_({y}, alpha=0.5)",
        f"{x}.clamp_(-1, 1)",
        f"{x}.mul_(0.9)",
        f"{x} += {y}",
        f"{x} *= 2",
        f"torch.add({x}, {y}, out={x}.detach())",
        f"{x}.detach().add_(1)",
        f"{x}.data.mul_(2)",
    )
    return pick(calls, k)


@step()
def in_place_geometry(b: Builder, i: int, j: int, k: int) -> str:
    """Not with a history: eager remakes that of a base's views by as_strided, a replay of the views cannot."""
    names = [name for name, t in b.world.tensors.items() if not t.requires_grad]
    return f"{names[i % len(names)]}.{pick(('t_()', 'squeeze_()', 'unsqueeze_(0)'), k)}" if names else "pass"


@step(3)
def set_item(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    y = b.fitting(j, x)
    calls = (
        f"{x}[0] = {j % 7}",
        f"{x}[..., 0] = {y}.sum() if {x}.is_floating_point() else {y}.detach().sum()",
        f"{x}[:] = {y}",
        f"{x}[{x} > 0] = 0.5",
        f"{x}[1:] = {y}[:-1]",
        f"{x}[torch.tensor([0])] = {j % 3}.5",
        f"{x}.index_put_((torch.tensor([0, 0]),), torch.tensor(1.5), accumulate=True)",
        f"{x}.index_add_(0, torch.tensor([0]), {x}[:1].clone())",
        f"{x}[0].add_(1)",
        f"{x}.t().mul_(2)",
        f"{x}.view(-1)[0] = 4",
    )
    return pick(calls, k)


@step(3)
def reduction(b: Builder, i: int, j: int, k: int) -> str:
    x, name = b.any(i), pick(REDUCTIONS, k)
    d = b.dim(x, j)
    needs_dim = name in ("cumsum", "softmax", "logsumexp")
    dims = (f"dim={d}",) if needs_dim else ("", f"dim={d}", f"dim={d}, keepdim=True")
    return f"{b.new()} = {x}.{name}({pick(dims, j)})"


@step(2)
def matmul(b: Builder, i: int, j: int, k: int) -> str:
    x, y = b.any(i), b.any(j)
    calls = (
        f"{x} @ {y}",
        f"{x} @ {x}.t()",
        f"F.linear({x}, t1)",
        f"torch.bmm({x}[None], {x}.t()[None])",
        f"F.linear({x}, t1, t2)",
        f"torch.addmm({x}, {x}, {y})",
        f"torch.outer({x}, {x})",
        f"{x}.mv({y})",
    )
    return f"{b.new()} = {pick(calls, k)}"


@step()
def foreach(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    y = b.alike(j, x)
    s, t = b.new(), b.new()
    calls = (
        f"torch._foreach_add_([{x}, {y}], 1.5)",
        f"torch._foreach_mul_([{x}, {y}], [{x}, {y}])",
        f"torch._foreach_zero_([{x}])",
        f"{s}, {t} = torch._foreach_mul([{x}, {y}], 2.0)",
        f"torch._foreach_lerp_([{x}], [{y}], 0.5)",
        f"{s}, = torch._foreach_norm([{x}])",
        f"torch._foreach_copy_([{x}], [{y}])",
    )
    return pick(calls, k)


@step()
def random(b: Builder, i: int, j: int, k: int) -> str:
    x, t = b.any(i), b.new()
    calls = (
        f"{t} = F.dropout({x}, 0.5)",
        f"{t} = torch.rand_like({x})",
        f"{t} = torch.randn(2, 3)",
        f"{x}.normal_()",
        f"{x}.bernoulli_(0.5)",
        f"{t} = torch.randperm(3)",
        f"torch.manual_seed({j % 3})",
        f"{t} = torch.rand(3) + {x}",
        "seen = torch.get_rng_state().sum().item()",
        f"F.dropout({x}, 0.5, inplace=True)",
        f"{t} = torch.bernoulli(torch.rand_like({x}))",
    )
    return pick(calls, k)
