"""Tensors that get a history from a call that writes them: zeros that are added to, buffers that are filled step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune

STEPS = 10
pytestmark = pytest.mark.usefixtures("repeatable")
INDEX, SOURCE = torch.arange(20) * 7 % 8, torch.arange(20) * 3 % 8
PLACES = SOURCE[:8, None].expand(8, 16)


@pytest.fixture(params=[0, 1], ids=["warmup=0", "warmup=1"])
def kitsunes(request: pytest.FixtureRequest) -> Any:
    kitsune.reset()
    return lambda: kitsune.accelerate(device="cpu", warmup=request.param)


def added_by_index(h: Tensor) -> Tensor:
    return torch.zeros(8, 16).index_add_(0, INDEX, h[SOURCE])


def spread_as(h: Tensor) -> Tensor:
    """Which is known by its shape alone."""
    return h.new_zeros(8, 16).scatter_add_(0, SOURCE[:8].view(-1, 1).expand_as(h), h)


def scattered(h: Tensor) -> Tensor:
    return h.new_zeros(8, 16).scatter_add_(0, PLACES, h)


def added_twice(h: Tensor) -> Tensor:
    z = torch.zeros(8, 16)
    z.index_add_(0, INDEX, h[SOURCE])
    z.index_add_(0, SOURCE, h[INDEX])
    return z


def filled_in_turn(h: Tensor) -> Tensor:
    z = torch.zeros(8, 4, 16)
    for t in range(4):
        h = torch.tanh(h)
        z[:, t] = h
    return z.sum(1)


def halves(h: Tensor) -> Tensor:
    z = torch.empty(8, 32)
    z[:, :16], z[:, 16:] = h, h * 2
    return z[:, :16] + z[:, 16:]


def rows(h: Tensor) -> Tensor:
    z = torch.zeros(8, 16)
    z[INDEX[:4]] = h[:4]
    return z


def copied(h: Tensor) -> Tensor:
    return torch.empty_like(h).copy_(h)


def written_before(h: Tensor) -> Tensor:
    return torch.ones(8, 16).zero_().add_(1.0).add_(h)


def read_before(h: Tensor) -> Tensor:
    z = torch.ones(8, 16)
    a = h + z
    return a + z.add_(h)


def in_a_list(h: Tensor) -> Tensor:
    a, b = torch.zeros(8, 16), torch.zeros(8, 16)
    torch._foreach_add_([a, b], [h, h * 2])
    return a + b


def without_gradients_later(h: Tensor) -> Tensor:
    z = torch.zeros(8, 16).add_(h)
    with torch.no_grad():
        z.add_(1.0)
    return z * 1


def viewed_later(h: Tensor) -> Tensor:
    z = torch.zeros(8, 16).add_(h)
    z.view(4, 32).mul_(2.0)
    return z * 1


def by_scaled_rows(h: Tensor) -> Tensor:
    return torch.zeros(8, 16).addmm_(h, torch.full((16, 16), 0.01)).lerp_(h, 0.5)


FOLLOWED = [
    added_by_index,
    scattered,
    spread_as,
    added_twice,
    filled_in_turn,
    halves,
    rows,
    copied,
    written_before,
    read_before,
    in_a_list,
    without_gradients_later,
    viewed_later,
    by_scaled_rows,
]


def viewed_before(h: Tensor) -> Tensor:
    """The view gets a history as well."""
    z = torch.zeros(8, 16)
    v = z.view(-1)
    z.add_(h)
    return v.view(8, 16) * 1


def detached_before(h: Tensor) -> Tensor:
    z = torch.zeros(8, 16)
    d = z.detach()
    return z.add_(h) + d


def a_part(h: Tensor) -> Tensor:
    z = torch.zeros(8, 32)[:, :16]
    return z.add_(h) * 1


OTHERS = [viewed_before, detached_before, a_part]


def train(body: Callable[[Tensor], Tensor], reads_every: int, device: str = "cpu") -> list[Any]:
    torch.manual_seed(0)
    first, head = nn.Linear(6, 16).to(device), nn.Linear(16, 3).to(device)
    parameters = [*first.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    x, y, losses = torch.randn(8, 6).to(device), (torch.arange(8) % 3).to(device), list[Any]()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(head(body(first(x))), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach() if step % reads_every else loss.item())
    return [t.tolist() if isinstance(t, Tensor) else t for t in (*losses, *parameters)]


@pytest.mark.parametrize("reads_every", [1, 3])
@pytest.mark.parametrize("body", FOLLOWED, ids=lambda body: body.__name__)
def test_a_backward_through_what_was_written_is_followed(
    body: Callable[[Tensor], Tensor], reads_every: int, kitsunes: Any
) -> None:
    expected = train(body, reads_every)
    with kitsune.config.patch(gate=False), kitsunes():
        assert train(body, reads_every) == expected
    counters = kitsune.counters()
    assert counters["backwards_followed"] >= STEPS - 4, kitsune.explain()


@pytest.mark.parametrize("body", OTHERS, ids=lambda body: body.__name__)
def test_what_shares_its_memory_has_its_history_from_autograd(body: Callable[[Tensor], Tensor], kitsunes: Any) -> None:
    expected = train(body, 3)
    with kitsune.config.patch(gate=False), kitsunes():
        assert train(body, 3) == expected
    assert not kitsune.counters()["backwards_followed"]


ASKED: dict[str, Callable[[Tensor], Any]] = {
    "of its history": lambda z: (z.requires_grad, z.is_leaf, type(z.grad_fn).__name__),
    "whether it has one": lambda z: (z.requires_grad, z.is_leaf),
    "how often it was written": lambda z: (z._version, z.add_(1.0)._version),
    "what it is": lambda z: repr(z)[-30:],
    "for its gradient": lambda z: z.retain_grad(),
    "to copy it": lambda z: refused(z.__deepcopy__, {}),
    "for a leaf": lambda z: refused(z.requires_grad_, False),
}


def refused(call: Callable[..., Any], argument: Any) -> str:
    with pytest.raises(RuntimeError) as error:
        call(argument)
    return str(error.value)[:40]


@pytest.mark.parametrize("question", ASKED.values(), ids=ASKED)
def test_what_was_written_answers_as_in_eager(question: Callable[[Tensor], Any], kitsunes: Any) -> None:
    answers, hooked = list[Any](), list[Any]()

    def body(h: Tensor) -> Tensor:
        z = torch.zeros(8, 16).zero_()
        z.add_(h)
        # From the fifth step on: those before were followed.
        if len(answers) >= 5:
            answers.append(question(z))
            z.register_hook(lambda grad: hooked.append(grad.sum().item()))
        else:
            answers.append(None)
        return z * 2

    expected = train(body, 3), [*answers], [*hooked]
    answers.clear()
    hooked.clear()
    with kitsune.config.patch(gate=False), kitsunes():
        assert (train(body, 3), answers, hooked) == expected
    assert len(hooked) == STEPS - 5 and kitsune.counters()["backwards_followed"] > 0


def test_what_the_program_keeps_of_it_is_used_up_as_in_eager(kitsunes: Any) -> None:
    kept = list[Tensor]()

    def body(h: Tensor) -> Tensor:
        z = torch.zeros(8, 16).addcmul_(h, h)
        kept.append(z)
        return z * z

    def end() -> list[Any]:
        with pytest.raises(RuntimeError, match="second time"):
            kept[-1].sum().backward()
        return [(z.requires_grad, z.is_leaf, z.detach().sum().item()) for z in kept]

    expected = train(body, 3), end()
    kept.clear()
    with kitsune.config.patch(gate=False), kitsunes():
        assert (train(body, 3), end()) == expected


def test_a_view_from_before_has_the_history_too(kitsunes: Any) -> None:
    def seen() -> list[Any]:
        torch.manual_seed(0)
        layer, found = nn.Linear(6, 16), list[Any]()
        for _ in range(STEPS):
            z = torch.zeros(8, 16) + 1
            v = z.view(-1)
            # What was made so far is in a region of its own.
            found.append(v.sum().item())
            layer.weight.grad = None
            a = z * 2
            z.add_(layer(torch.ones(8, 6)))
            (v.view(8, 16).square().sum() + (a * z).sum()).backward()
            found.append(layer.weight.grad.sum().item())
        return found

    expected = seen()
    with kitsune.config.patch(gate=False), kitsunes():
        assert seen() == expected


def test_what_the_program_dropped_by_a_read_is_written_again_for_its_graph(kitsunes: Any) -> None:
    sums, asks = list[float](), False

    def body(h: Tensor) -> Tensor:
        z = torch.zeros(8, 16).add_(h).add_(h.tanh())
        out = z.square() * 2
        del z
        sums.append(out.sum().item())
        if asks and len(sums) % 3 == 2:
            sums.append(float(type((out * 2).grad_fn).__name__ == "MulBackward0"))
        return out * 0.1

    def seen() -> list[Any]:
        nonlocal asks
        sums.clear()
        asks = False
        found = [train(body, 3), [*sums]]
        asks = True
        return [*found, train(body, 3), [*sums]]

    expected = seen()
    with kitsune.config.patch(gate=False), kitsunes():
        assert seen() == expected


def test_a_write_that_spoils_what_was_saved_is_refused_as_in_eager(kitsunes: Any) -> None:
    spoils = False

    def body(h: Tensor) -> Tensor:
        z = torch.zeros(8, 16).add_(h)
        a = h * z
        return a + z.mul_(2.0) if spoils else a + z

    def refused() -> str:
        nonlocal spoils
        spoils = False
        train(body, 3)
        spoils = True
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as error:
            train(body, 3)
        return str(error.value)

    refused()
    with kitsune.config.patch(gate=False), kitsunes():
        refused()


def test_what_was_detached_of_an_owed_tensor_counts_its_writes(kitsunes: Any) -> None:
    """Such counts were left as they were when the calls were made again, and with them that of the tensor itself."""
    versions = list[int]()

    def body(h: Tensor) -> Tensor:
        z = h * 1.0
        z.add_(h)
        z.add_(z.detach())
        versions.append(z._version)
        return h + z

    expected = train(body, 3), [*versions]
    versions.clear()
    with kitsune.config.patch(gate=False), kitsunes():
        assert (train(body, 3), versions) == expected
    assert versions == [2] * STEPS


@pytest.mark.parametrize("after", ["it is added to", "a part is set"])
def test_calls_that_no_backward_needed_are_made_again_behind_a_read(after: str, kitsunes: Any) -> None:
    """What they were given, and the program had dropped by the read, was not known to be used up: an internal error."""
    sums = list[float]()

    def body(h: Tensor) -> Tensor:
        z = h * 1.0
        z.mul_(h * 0.1 + 1)
        h = torch.tanh(h)
        sums.append(z.sum().item())
        if after == "a part is set":
            z[:, 6] = h[:, 2]
        else:
            z.add_(h)
        return h

    expected = train(body, 3), [*sums]
    sums.clear()
    with kitsune.config.patch(gate=False), kitsunes():
        assert (train(body, 3), sums) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("body", [filled_in_turn, halves, copied, written_before, without_gradients_later])
def test_a_step_that_fills_a_buffer_is_a_graph(body: Callable[[Tensor], Tensor]) -> None:
    kitsune.reset()
    torch.set_default_device("cuda")
    try:
        expected = train(body, 3, "cuda")
        with kitsune.config.patch(gate=False, fuse=False), kitsune.accelerate(device="cuda"):
            assert train(body, 3, "cuda") == expected
    finally:
        torch.set_default_device("cpu")
    counters = kitsune.counters()
    assert counters["replayed"] >= STEPS - 6 and not counters["graph_refused"], counters


MADE = [
    "torch.zeros(8, 16)",
    "torch.ones(8, 16)",
    "h.new_zeros(8, 16)",
    "torch.empty_like(h).fill_(0.5)",
    "h.detach() * 1",
    "h * 1",
]
GIVEN = ["h", "h.tanh()", "z.detach()", "h * 2", "w.detach()"]
WRITTEN = [
    "z.add_({})",
    "z.index_add_(0, INDEX, ({})[SOURCE])",
    "z.mul_(({}) * 0.1 + 1)",
    "z[:, 3] = ({})[:, 1]",
    "z[2:4] = ({})[5:7]",
    "z[ROWS] = ({})[ROWS]",
    "z.copy_({})",
    "z.scatter_add_(0, PLACES, {})",
    "w.add_({})",
]
OTHER = [
    "z.mul_(0.5)",
    "z.zero_()",
    "z.relu_()",
    "z[MASK] = 0.25",
    "h = h + z[MASK].mean()",
    "h = h + z[ROWS].sum(0)",
    "h = h * z",
    "h = torch.tanh(h)",
    "h = h + z[:, :8].sum(1, keepdim=True)",
    "v = z.view(-1)",
    "v.mul_(0.9)",
    "h = h + v.sum()",
    "d = z.detach()",
    "h = h + d * 0.1",
    "with torch.no_grad(): z.add_(0.1)",
    "w = z; z = torch.zeros(8, 16)",
    "held.append(z)",
    "asked.append(z.requires_grad)",
    "asked.append(z._version)",
    "asked.append(z.sum().item())",
    "z = z.clone()",
]
lines = st.one_of(st.builds(str.format, st.sampled_from(WRITTEN), st.sampled_from(GIVEN)), st.sampled_from(OTHER))
ENDS = ["h + z", "h * z", "z + w", "h + z * w", "h + v.sum()", "h"]


@settings(max_examples=60)
@given(st.sampled_from(MADE), st.lists(lines, min_size=2, max_size=7), st.sampled_from(ENDS), st.sampled_from([1, 3]))
def test_any_writes_and_reads_of_it_are_as_in_eager(made: str, body: list[str], end: str, reads_every: int) -> None:
    text = [f"z = {made}", "w, v, d = torch.zeros(8, 16), torch.zeros(8, 16), torch.zeros(8, 16)", *body, f"return {end}"]
    asked, held = list[Any](), list[Tensor]()
    names: dict[str, Any] = {"torch": torch, "asked": asked, "held": held, "INDEX": INDEX, "SOURCE": SOURCE, "PLACES": PLACES}
    names |= {"MASK": torch.arange(128).view(8, 16) % 3 == 0, "ROWS": torch.arange(8) % 3 > 0}
    exec("def body(h):\n" + "\n".join(f"    {line}" for line in text), names)

    def seen() -> list[Any]:
        asked.clear()
        held.clear()
        try:
            found = train(names["body"], reads_every)
        except RuntimeError as error:
            # What a backward finds spoilt.
            return [str(error)[:60]]
        return [*map(repr, found), *map(repr, asked), *[repr(z.detach().sum().item()) for z in held]]

    expected = seen()
    kitsune.reset()
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu"):
        assert seen() == expected
