"""What the machine of two worlds does besides the steps of short programs: modules, out=, complex numbers, hooks, copies."""

from __future__ import annotations

from tests.property import steps, steps_autograd  # noqa: F401  (they fill the table)
from tests.property.strategies import DTYPES, STEPS, Builder, Step, make, pick, step

MACHINE: dict[str, Step] = dict(STEPS)
OPTIMIZERS = (
    "SGD(net.parameters(), lr=0.1)",
    "SGD(net.parameters(), lr=0.1, momentum=0.9)",
    "Adam(net.parameters(), lr=0.01)",
    "AdamW(net.parameters(), lr=0.01, foreach=True)",
    "AdamW(net.parameters(), lr=0.01, fused=True)",
    "RMSprop(net.parameters(), lr=0.01)",
)
NET = (
    "net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Dropout(0.25), torch.nn.LayerNorm(4), "
    "torch.nn.Linear(4, 3))",
    "net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(inplace=True), "
    "torch.nn.Linear(4, 3, bias=False))",
)


def begin(b: Builder, k: int) -> None:
    """Parameters, data, a model and its optimizer."""
    lines = b.program.inside
    b.add(f"{b.new()} = {make('3, 3', k, 'float32', grad=True)}", lines)
    b.add(f"{b.new()} = {make('3', k + 1, 'float32', grad=True)}", lines)
    b.add(f"{b.new()} = {make('2, 3', k + 2, 'float32')}", lines)
    b.add(f"{b.new()} = torch.zeros(2, 3)", lines)
    b.add(pick(NET, k), lines)
    b.add("w1, b1, w2 = net[0].weight, net[0].bias, net[-1].weight", lines)
    b.add(f"opt = torch.optim.{pick(OPTIMIZERS, k // 2)}", lines)


@step(2, MACHINE)
def fresh_data(b: Builder, i: int, j: int, k: int) -> str:
    """Numbers that are neither zero nor infinite, after a long program."""
    x = b.any(i)
    shape, dtype = list(b.world.tensors[x].shape), str(b.world.tensors[x].dtype).removeprefix("torch.")
    data = make(", ".join(map(str, shape)), k, dtype)
    calls = (f"with torch.no_grad(): {x}.copy_({data})", f"t3 = {make('2, 3', k, 'float32')}", f"{b.leaf(i)}.grad = None")
    return pick(calls, j)


@step(2, MACHINE)
def out_form(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    y, z, t = b.fitting(j, x), b.alike(k, x), b.new()
    calls = (
        f"torch.add({x}, {y}, out={z})",
        f"{t} = torch.empty(0); torch.mul({x}, {y}, out={t})",
        f"{t} = torch.mul({x}.detach(), 2, out={z}.detach())",
        # Eager makes room for the result before it sees that there is none, and what is in that nobody knows.
        f"try: torch.matmul({x}, {y}, out={z})\nexcept RuntimeError: {z}.detach().zero_(); raise",
        f"torch.cat([{x}.detach(), {y}.detach()], out={z}.detach())",
        f"torch.neg({x}.detach(), out={x}.detach().t())",
    )
    return pick(calls, i + j + k)


@step(2, MACHINE)
def odd_view(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    n = b.world.tensors[x].numel()
    calls = (
        f"{x}.as_strided(({max(n - 1, 0)},), (1,), {min(1, n)})",
        f"{x}.as_strided((2, 2), (1, 1))",
        f"{x}.expand_as({x}).transpose(0, -1)",
        f"{x}.T",
        f"{x}.view(torch.int32)",
        f"{x}.unfold(0, 2, 1)",
        f"{x}.swapaxes(0, -1)[..., 1:]",
        f"{x}.reshape(-1)[::2]",
        f"{x}.reshape({x}.shape[::-1])",
        f"{x}.view(-1).view({x}.shape)",
        f"{x}[:0]",
        f"torch.as_strided({x}, ({n},), (1,)).view({x}.shape)",
        f"{x}.split(1)[-1]",
        f"torch.atleast_2d({x}).mT",
    )
    return f"{b.new()} = {pick(calls, k)}"


@step(2, MACHINE)
def complex_number(b: Builder, i: int, j: int, k: int) -> str:
    x, t = b.any(i), b.new()
    found = [name for name, tensor in b.world.tensors.items() if tensor.is_complex()]
    c = found[j % len(found)] if found else x
    calls = (
        f"{t} = torch.complex({x}, {x} * 0.5)",
        f"{t} = {c}.conj()",
        f"{t} = {c}.imag",
        f"{t} = {c}.conj().imag",
        f"{t} = torch.view_as_real({c})",
        f"{t} = {c}.conj() * {c}",
        f"{t} = {c}.real",
        f"{c}.mul_(1j)",
        f"{t} = {c}.conj().imag.neg()",
        f"{t} = {c}.abs()",
        f"{c}.conj().imag.add_(1)",
        f"{t} = {c}.resolve_conj()",
        f"{t} = {c}.conj().reshape(-1)",
        f"{t} = {x}.to(torch.complex64)",
        f"{c}.imag[...] = 2",
        f"{t} = {c} @ {c}.mH",
    )
    return pick(calls, k)


@step(2, MACHINE)
def module(b: Builder, i: int, j: int, k: int) -> str:
    x, t = b.any(i), b.new()
    calls = (
        f"{t} = net({x})",
        f"{t} = net[0]({x})",
        f"net.{pick(('eval', 'train', 'train'), j)}()",
        f"net[-1].requires_grad_({bool(j % 3)})",
        f"{t} = F.layer_norm({x}, {x}.shape[-1:])",
        f"{t} = F.cross_entropy(net(t3), torch.tensor([0, 2]))",
        f"{t} = F.mse_loss(net({x}), {x})",
        f"net.zero_grad(set_to_none={bool(j % 2)})",
        f"{t} = F.gelu({x})",
        "net.load_state_dict({key: value * 0.5 for key, value in net.state_dict().items()})",
        "torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)",
        f"opt.param_groups[0]['lr'] = {j % 5} / 40",
        "opt.step()",
        "opt.zero_grad()",
        "net(t3).square().mean().backward()",
        f"{t} = torch.func.functional_call(net, dict(net.named_parameters()), (t3,))",
    )
    return pick(calls, k)


@step(2, MACHINE)
def loop_of_a_new_leaf(b: Builder, i: int, j: int, k: int) -> str:
    """A leaf that is made inside of a context, and what it collects in regions after that."""
    x, t = b.any(i), b.new()
    makers = ("torch.rand(3, 3).requires_grad_()", "torch.ones(3, requires_grad=True)", f"({x}.detach() * 2).requires_grad_()")
    reads = (f"seen = {x}.sum().item()", f"seen = {t}.detach().sum().item()", "pass")
    step = pick(
        (
            f"({t} * {t}).sum().backward(); seen = {t}.grad.tolist()",
            f"({t} * 2).sum().backward(); {t}.data.sub_({t}.grad)",
            f"{t}.grad = None; net({t}.expand(2, 3) if {t}.dim() == 1 else {t}).square().mean().backward()",
        ),
        i + k,
    )
    return f"{t} = {pick(makers, j)}\nfor _ in range(5): {pick(reads, k)}; {step}"


@step(2, MACHINE)
def hook(b: Builder, i: int, j: int, k: int) -> str:
    x, p = b.graded(i), b.leaf(j)
    calls = (
        f"{x}.is_leaf; handle = {x}.register_hook(lambda g: g * 0.5)",
        f"handle = {p}.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.5))",
        "handle.remove()",
        f"{x}.retain_grad()",
        "handle = net[0].register_forward_hook(lambda m, x, y: y * 2)",
        "handle = net[0].register_full_backward_hook(lambda m, gi, go: None)",
        f"seen = {x}.grad_fn is None",
        f"with torch.autograd.graph.save_on_cpu(): {b.new()} = ({x} * {x}).exp()",
        f"with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t): {b.new()} = {x}.sin() * {x}",
    )
    return pick(calls, k)


@step(2, MACHINE)
def double_backward(b: Builder, i: int, j: int, k: int) -> str:
    p, t = b.leaf(i), b.new()
    inner = f"torch.autograd.grad(({p} * {p}).sin().sum(), {p}, create_graph=True)"
    calls = (
        f"{t}, = {inner}; {t}.square().sum().backward()",
        f"{t}, = {inner}; {p}.grad = None; {t}.sum().backward()",
        f"{t} = torch.func.grad(lambda x: (x * x).sin().sum())({b.any(j)})",
        f"{t} = torch.func.vmap(lambda x: x * 2 + 1)({b.any(j)})",
        f"{t} = torch.func.jvp(torch.sin, ({p}.detach(),), (torch.ones_like({p}),))[1]",
        f"{t} = torch.autograd.functional.vjp(lambda x: x.exp(), {p}.detach(), torch.ones_like({p}))[1]",
    )
    return pick(calls, k)


@step(1, MACHINE)
def copies(b: Builder, i: int, j: int, k: int) -> str:
    x, t = b.any(i), b.new()
    calls = (
        f"import copy; {t} = copy.deepcopy({x}.detach())",
        f"import pickle; {t} = pickle.loads(pickle.dumps({x}.detach()))",
        f"import copy; {t} = copy.copy({x})",
        f"import io; buffer = io.BytesIO(); torch.save({x}.detach(), buffer); seen = len(buffer.getvalue()) > 0",
        f"import copy; other = copy.deepcopy(net); {t} = other[0].weight",
        "import copy; state = copy.deepcopy(opt.state_dict())",
        "opt.load_state_dict(state)",
    )
    return pick(calls, k)


@step(1, MACHINE)
def under_mode(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    t = b.new()
    calls = (
        f"with torch.no_grad(): {t} = {x} * 2",
        f"with torch.inference_mode(): {t} = {x}.clone() * 2\n{t} = {t}.clone()",
        f"with torch.autocast('cpu', torch.bfloat16): {t} = net(t3)",
        f"with torch.enable_grad(): {t} = {x} * 2",
        f"with kitsune.disable(): {t} = {x} + 1",
        f"with torch.no_grad(): {x}.mul_(0.5)",
        "with torch.autocast('cpu', torch.bfloat16): (net(t3).float().square().mean()).backward()",
        f"with torch.random.fork_rng(devices=[]): {t} = torch.rand_like({x})",
    )
    return pick(calls, k)


@step(1, MACHINE)
def metadata_change(b: Builder, i: int, j: int, k: int) -> str:
    x = b.any(i)
    # No more than it has: the memory of a loss may be larger than the loss, and nobody has written the rest.
    n = min(b.world.tensors[x].numel(), 2)
    calls = (
        f"{x}.resize_({x}.numel())",
        f"{x}.set_({b.alike(j, x)})",
        f"{x}.data = {b.alike(j, x)}.data",
        f"{x}.detach_()",
        f"{x}.swapdims_(0, -1)",
        f"{x}.as_strided_(({n},), (1,))",
        f"{x} = {x}.{pick(('half', 'double', 'bfloat16'), k)}()",
        f"del {x}; {x} = torch.ones(2, 3, dtype=torch.{pick(DTYPES, j)})",
    )
    return pick(calls, k)
