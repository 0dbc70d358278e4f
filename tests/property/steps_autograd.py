"""Steps that differentiate, train, read, and look: the rest of the table."""

from __future__ import annotations

from tests.property.strategies import Builder, pick, step


@step(3)
def backward(b: Builder, i: int, j: int, k: int) -> str:
    x = b.graded(i)
    loss = pick((f"{x}.sum()", f"({x} * {x}).mean()", x), j)
    return f"({loss}).backward({pick(('', 'retain_graph=True'), k)})"


@step()
def loss_backward_twice(b: Builder, i: int, j: int, k: int) -> str:
    t = b.new()
    x, keep = b.leaf(i), pick(("", "retain_graph=True"), j)
    return f"{t} = ({x} * 2).tanh().sum(); {t}.backward({keep}); {t}.backward()"


@step()
def autograd_grad(b: Builder, i: int, j: int, k: int) -> str:
    create = pick(("create_graph=True", "allow_unused=True", "retain_graph=True"), k)
    return f"{b.new()}, = torch.autograd.grad({b.graded(i)}.exp().sum(), {b.leaf(j)}, {create})"


@step(2)
def grad_field(b: Builder, i: int, j: int, k: int) -> str:
    p = b.leaf(i)
    calls = (
        f"{p}.grad = None",
        f"{p}.grad.zero_()",
        f"{b.new()} = {p}.grad",
        f"{p}.grad = torch.ones_like({p})",
        f"{p}.grad.mul_(0.5)",
        f"{p}.grad = {b.any(j)}",
        f"seen = {p}.grad is None",
        f"seen = {p}.grad.norm().item()",
        f"torch.nn.utils.clip_grad_norm_([{p}], 0.1)",
    )
    return pick(calls, k)


@step()
def grad_mode(b: Builder, i: int, j: int, k: int) -> str:
    return f"torch.set_grad_enabled({bool(k % 3)})"


@step()
def no_grad_update(b: Builder, i: int, j: int, k: int) -> str:
    p = b.leaf(i)
    update = pick((f"{p}.sub_(0.1 * {p}.grad)", f"{p}.mul_(0.9)", f"{p}.copy_({b.fitting(j, p)})", f"{p}.add_(1)"), k)
    return f"with torch.no_grad(): {update}"


@step()
def graph_edit(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    calls = (
        f"{x}.requires_grad_()",
        f"{x}.detach_()",
        f"{x}.retain_grad()",
        # Plain torch 2.13 crashes on a hook for a view whose base was written, unless its history was asked for before.
        f"{x}.is_leaf; {x}.register_hook(lambda g: g * 2)",
        f"{b.new()} = Doubled.apply({x})",
        f"{x}.requires_grad_(False)",
        f"{x}.data = {x}.data.flip(0)",
        f"{b.new()} = torch.nn.Parameter({x}.detach().clone())",
        f"{x}.data = {b.alike(j, x)}",
    )
    return pick(calls, k)


@step()
def checkpoint(b: Builder, i: int, j: int, k: int) -> str:
    t, reentrant = b.new(), bool(k % 2)
    body = "lambda x: F.dropout(x.sin() * t2, 0.5)"
    return f"{t} = torch.utils.checkpoint.checkpoint({body}, {b.leaf(i)}, use_reentrant={reentrant}); {t}.sum().backward()"


@step(2)
def optimizer(b: Builder, i: int, j: int, k: int) -> str:
    known = b.optimizer(i)
    if known and j % 4:
        return f"{known}.{pick(('step()', 'step()', 'zero_grad()', 'zero_grad(set_to_none=False)'), k)}"
    b.count += 1
    makers = (
        "SGD([{}], lr=0.1)",
        "SGD([{}], lr=0.1, momentum=0.9)",
        "Adam([{}])",
        "AdamW([{}], foreach=False)",
        "AdamW([{}], foreach=True)",
        "Adagrad([{}])",
        "RMSprop([{}])",
        "NAdam([{}])",
    )
    return f"o{b.count} = torch.optim.{pick(makers, k).format(b.leaf(i))}"


@step(3)
def read(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    return f"seen = {pick(READS, k).format(x=x)}"


READS = (
    "{x}.tolist()",
    "{x}.sum().item()",
    "{x}.detach().numpy().tolist()",
    "bool({x}.any())",
    "len({x})",
    "{x}.data_ptr() != 0",
    "float({x}.double().mean())",
    "repr({x}.detach())",
    "str({x}.shape)",
    "[float(v.sum()) for v in {x}]",
    "np.asarray({x}.detach()).sum()",
    "{x}.equal({x}.clone())",
    "{x}.is_contiguous()",
    "{x}.untyped_storage().nbytes()",
    "torch.allclose({x}, {x})",
    "f'{{{x}.max():.3f}}'",
    "{x}.detach().numpy().shape",
)


@step(2)
def look(b: Builder, i: int, j: int, k: int) -> str:
    """What a program can see without a value."""
    x = b.any(i)
    if k % 9 == 1 and not b.world.is_gradient(b.world.tensors[x]):
        return f"note_writes('{x}')"
    facts = (
        "stride(), {x}.storage_offset()",
        "shape",
        "requires_grad, {x}.is_leaf",
        "dtype, {x}.device",
        "_base is None",
        "grad is None",
        "is_set_to({x})",
        "output_nr",
        "nbytes",
    )
    return f"seen = {x}.{pick(facts, k).format(x=x)}"


@step()
def write_through_numpy(b: Builder, i: int, j: int, k: int) -> str:
    return f"{b.any(i)}.detach().numpy()[...] = {j % 3}"


@step()
def delete(b: Builder, i: int, j: int, k: int) -> str:
    names = [name for name in b.world.tensors if name not in ("t1", "t2", "t3")]
    return f"del {names[i % len(names)]}" if names else "pass"


@step()
def flush(b: Builder, i: int, j: int, k: int) -> str:
    return pick(("kitsune.flush()", "with kitsune.disable(): seen = " + b.any(i) + ".tolist()"), k)


@step()
def illegal(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    calls = (
        "torch.zeros(2, 3) @ torch.zeros(2, 3)",
        f"{x}.view(-7)",
        f"torch.cat([{x}, torch.zeros(5, 5, 5, 5)])",
        f"{x}.expand(0, -1)",
        f"{x}.add_(torch.zeros(9, 9, 9))",
        "torch.zeros(3).add_('no')",
        f"{x}.sum(dim=9)",
        f"{x}[[[9]]] + torch.zeros(5, 7)",
        f"{x}.squeeze(7)",
        f"raise ValueError({i})",
        "torch.nonexistent()",
    )
    return pick(calls, k)
