"""Whatever a static function depends on is changed in mid-run: it is noticed, and the numbers are eager's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import kitsune
from tests.runtime.repeated import graphs
from tests.static.programs import Training, adamw, agree, compare, dropping, meddling, normed, sgd, straight

# Steps with Python until the first without, and what a change costs at most: its programs are learned anew.
WARM, AGAIN = 5, 5


@pytest.fixture(autouse=True, params=["op by op", "replayed"])
def executor(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways to run a region on a CPU."""
    kitsune.reset()
    if request.param == "replayed":
        with graphs(kernels=False):
            yield
    else:
        yield
    kitsune.reset()


def frozen_bias(t: Training) -> None:
    t.model[0].bias.requires_grad_(False)
    t.model[0].bias.grad = None


def evaluation_mode(t: Training) -> None:
    t.model.eval()


def one_module_in_evaluation(t: Training) -> None:
    t.model[1].eval()


def other_probability(t: Training) -> None:
    t.model[1].p = 0.9


def replaced_parameter(t: Training) -> None:
    t.model[0].weight = nn.Parameter(t.model[0].weight.detach() * 2)


def replaced_module(t: Training) -> None:
    t.model[0] = nn.Linear(6, 8)


def replaced_model(t: Training) -> None:
    t.model = copy.deepcopy(t.model)


def replaced_optimizer(t: Training) -> None:
    t.optimizer = sgd(t.model.parameters())


def replaced_buffer(t: Training) -> None:
    t.model[1].running_mean = torch.full_like(t.model[1].running_mean, 0.5)


def other_memory(t: Training) -> None:
    t.model[0].weight.data = t.model[0].weight.data.clone() * 2


def other_strides(t: Training) -> None:
    t.model[0].weight.data = t.model[0].weight.data.t().contiguous().t()


def loaded_model(t: Training) -> None:
    t.model.load_state_dict({name: x * 0.5 for name, x in t.model.state_dict().items()})


def loaded_optimizer(t: Training) -> None:
    state = copy.deepcopy(t.optimizer.state_dict())
    for held in state["state"].values():
        for name, value in held.items():
            if isinstance(value, Tensor):
                held[name] = value * 0.5
    t.optimizer.load_state_dict(state)


def dropped_state(t: Training) -> None:
    t.optimizer.state.clear()


def replaced_state(t: Training) -> None:
    for held in t.optimizer.state.values():
        held["momentum_buffer"] = held["momentum_buffer"] * 0.5


def other_rate(t: Training) -> None:
    t.optimizer.param_groups[0]["lr"] = 0.003


def no_weight_decay(t: Training) -> None:
    t.optimizer.param_groups[0]["weight_decay"] = 0.0


def other_option(t: Training) -> None:
    t.optimizer.param_groups[0]["maximize"] = True


def fewer_parameters(t: Training) -> None:
    t.optimizer.param_groups[0]["params"].pop()


def another_group(t: Training) -> None:
    last = t.optimizer.param_groups[0]["params"].pop()
    t.optimizer.add_param_group({"params": [last], "lr": 0.5})


def hook_on_a_module(t: Training) -> None:
    t.model[0].register_forward_hook(lambda module, args, out: out * 0.5)


def pre_hook_on_a_module(t: Training) -> None:
    t.model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def hook_on_a_parameter(t: Training) -> None:
    t.model[0].weight.register_hook(lambda grad: grad * 0.5)


def hook_after_accumulation(t: Training) -> None:
    t.model[0].weight.register_post_accumulate_grad_hook(lambda p: t.kept.append(p.grad.clone()))


def hook_on_a_step(t: Training) -> None:
    t.optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: t.kept.append(torch.ones(1)))


def hook_on_all_modules(t: Training) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: out * 0.9)
    t.kept.append(t.step(t.xs[0], t.ys[0]))
    handle.remove()


def hook_on_all_optimizers(t: Training) -> None:
    handle = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: t.kept.append(torch.ones(1)))
    t.kept.append(t.step(t.xs[0], t.ys[0]))
    handle.remove()


def no_gradients_from_before(t: Training) -> None:
    t.optimizer.zero_grad()


def gradients_from_before(t: Training) -> None:
    for p in t.model.parameters():
        p.grad = torch.ones_like(p)


def other_default_dtype(t: Training) -> None:
    torch.set_default_dtype(torch.float64)
    t.kept.append(t.step(t.xs[0], t.ys[0]))
    torch.set_default_dtype(torch.float32)


def other_seed(t: Training) -> None:
    torch.manual_seed(77)


CHANGES: list[tuple[Callable[[Training], None], dict[str, Any]]] = [
    (frozen_bias, {}),
    (evaluation_mode, {"model": dropping}),
    (evaluation_mode, {"model": normed}),
    (one_module_in_evaluation, {"model": dropping}),
    (other_probability, {"model": dropping}),
    (replaced_parameter, {}),
    (replaced_module, {}),
    (replaced_model, {}),
    (replaced_optimizer, {}),
    (replaced_buffer, {"model": normed}),
    (other_memory, {}),
    (loaded_model, {"model": normed}),
    (loaded_optimizer, {}),
    (loaded_optimizer, {"optimizer": adamw}),
    (dropped_state, {"optimizer": adamw}),
    (replaced_state, {}),
    (other_rate, {}),
    (other_rate, {"optimizer": adamw}),
    (no_weight_decay, {}),
    (other_option, {}),
    (fewer_parameters, {}),
    (another_group, {}),
    (no_gradients_from_before, {}),
    (other_default_dtype, {"model": normed}),
    (other_seed, {"model": dropping}),
]
# These run Python in each step from then on.
HOOKS = [hook_on_a_module, pre_hook_on_a_module, hook_on_a_parameter, hook_after_accumulation, hook_on_a_step]


@pytest.mark.parametrize(("change", "how"), CHANGES, ids=lambda x: getattr(x, "__name__", ""))
def test_a_change_is_noticed_and_learned(change: Callable[[Training], None], how: dict[str, Any]) -> None:
    compare(meddling(change, at=9, n=24), at_most=WARM + AGAIN, **how)


def test_other_strides_are_noticed() -> None:
    # The regions of such a parameter are new each time, so nothing is skipped any more.
    compare(meddling(other_strides, at=9, n=24), at_most=24)


@pytest.mark.parametrize("change", HOOKS, ids=lambda f: f.__name__)
def test_a_hook_runs_from_then_on(change: Callable[[Training], None]) -> None:
    compare(meddling(change, at=9, n=24), at_most=24, at_least=WARM + 15)
    assert "hook" in str(kitsune.explain())


@pytest.mark.parametrize("change", [hook_on_all_modules, hook_on_all_optimizers], ids=lambda f: f.__name__)
def test_hooks_on_all_modules_or_optimizers_run(change: Callable[[Training], None]) -> None:
    compare(meddling(change, at=9), at_most=WARM + 1, at_least=WARM + 1)


def test_the_tests_of_changes_would_fail_if_nothing_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitsune.static.guards.Guards.hold", lambda self, roots, call: True)
    unnoticed = []
    for change, how in [*CHANGES, *[(hook, {}) for hook in HOOKS]]:
        try:
            compare(meddling(change, at=9, n=24), at_most=24, **how)
        except Exception:
            continue
        unnoticed.append(change.__name__)
    # Numbers and seeds are where they were; a model or an optimizer that dies takes its programs along; a dtype is in the key.
    numbers, others = ["loaded_model", "other_memory", "other_seed"], ["no_gradients_from_before", "other_default_dtype"]
    assert sorted(unnoticed) == sorted([*numbers, *others, "replaced_model", "replaced_optimizer"])


def without_zeroing(t: Training, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(t.model(x), y)
    loss.backward()
    t.optimizer.step()
    return loss.detach()


def test_gradients_that_the_program_leaves_are_added_to() -> None:
    def drive(t: Training) -> None:
        for i in range(30):
            if i % 7 != 6:
                t.optimizer.zero_grad()
            t.take(i)

    static, _ = compare(drive, at_most=14, body=without_zeroing)
    with pytest.raises(AssertionError):
        agree(list(static.found()), Training(body=without_zeroing).found())


def test_gradients_that_are_zeroed_in_place_outside() -> None:
    def drive(t: Training) -> None:
        for i in range(30):
            t.take(i)
            t.optimizer.zero_grad(set_to_none=i == 20)

    compare(drive, at_most=12, body=without_zeroing)


def test_gradients_put_there_by_hand() -> None:
    def body(t: Training, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(t.model(x), y)
        loss.backward()
        t.optimizer.step()
        t.optimizer.zero_grad()
        return loss.detach()

    compare(meddling(gradients_from_before, at=9, n=24), at_most=WARM + AGAIN, body=body)


def test_another_autocast_outside() -> None:
    def drive(t: Training) -> None:
        for i in range(40):
            with torch.autocast("cpu", torch.bfloat16, enabled=i % 10 == 9, cache_enabled=False):
                t.take(i)

    compare(drive, at_most=16)


def test_another_grad_mode_outside() -> None:
    def body(t: Training, x: Tensor, y: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return Training.plain(t, x, y)
        return F.cross_entropy(t.model(x), y)

    def drive(t: Training) -> None:
        for i in range(40):
            with torch.set_grad_enabled(i % 4 != 3):
                t.take(i)

    compare(drive, at_most=2 * WARM, body=body, model=dropping)


def test_a_frozen_parameter_without_grad_mode_is_no_change() -> None:
    def body(t: Training, x: Tensor, y: Tensor) -> Tensor:
        return t.model(x)

    def drive(t: Training) -> None:
        with torch.no_grad():
            straight(12)(t)

    compare(drive, at_most=WARM, body=body)


def test_arguments_that_begin_to_share_memory() -> None:
    ran = []

    @kitsune.accelerate(static=True, device="cpu")
    def write(a: Tensor, b: Tensor) -> Tensor:
        ran.append(1)
        a.add_(1)
        return a * b

    for _ in range(8):
        a, b = torch.ones(3), torch.ones(3)
        assert write(a, b).tolist() == [2.0] * 3
    n = len(ran)
    assert n < 8
    shared = torch.ones(4)
    assert write(shared[:3], shared[1:]).tolist() == [4.0, 4.0, 2.0]
    assert len(ran) == n + 1


def test_an_error_inside_leaves_things_as_eager_does() -> None:
    """Of a call without Python: the class is no class, which the operator itself says."""

    def body(t: Training, x: Tensor, y: Tensor) -> Tensor:
        t.optimizer.zero_grad()
        loss = F.nll_loss(t.model(x), y)
        loss.backward()
        t.optimizer.step()
        return loss.detach()

    def drive(t: Training) -> None:
        for i in range(20):
            y = torch.tensor([0, 1, 2, 9 if i == 12 else 0])
            try:
                t.kept.append(t.step(t.xs[i], y))
            except IndexError as error:
                t.kept.append(str(error))

    with kitsune.config.patch(graphs=False):
        # After the error there are no gradients from before, for once.
        compare(drive, at_most=WARM + 1, body=body)


def test_an_error_in_the_functions_python_is_raised_as_it_is() -> None:
    t = Training(static=True, body=lambda t, x, y: Training.plain(t, x, y) if len(t.kept) != 3 else 1 / 0)
    straight(3)(t)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            t.take(3)
    t.kept.append(None)
    straight(8)(t)
    assert t.n_python < 13


def test_a_variable_that_is_assigned_is_noticed() -> None:
    weight = 0.5

    def drive(t: Training) -> None:
        nonlocal weight
        weight = 0.5
        for i in range(24):
            if i == 12:
                weight = 0.25
            t.take(i)

    def body(t: Training, x: Tensor, y: Tensor) -> Tensor:
        t.optimizer.zero_grad()
        loss = F.cross_entropy(t.model(x), y) * weight
        loss.backward()
        t.optimizer.step()
        return loss.detach()

    compare(drive, at_most=WARM + AGAIN, body=body)


class Settings:
    """As programs have them, and trainers with attributes of their own."""

    def __init__(self) -> None:
        self.weight, self.weights, self.named = 0.5, [0.5, 2.0], {"weight": {"now": 0.5}}
        self.others = [float(k) for k in range(100)]


# What is read, and what is written between two steps.
PARTS: dict[str, tuple[Callable[[Any], float], Callable[[Any], Any]]] = {
    "an attribute": (lambda s: s.weight, lambda s: setattr(s, "weight", 0.25)),
    "an item": (lambda s: s.weights[0], lambda s: s.weights.__setitem__(0, 0.25)),
    "an item that is appended": (lambda s: s.weights[-1], lambda s: setattr(s, "weights", [0.5, 0.25])),
    "an entry": (lambda s: s.named["weight"]["now"], lambda s: s.named["weight"].update(now=0.25)),
    "another type": (lambda s: 0.5 if s.weight is True else 0.25, lambda s: setattr(s, "weight", True)),
}


@pytest.mark.parametrize("by", ["a variable", "the training"])
@pytest.mark.parametrize("name", PARTS)
def test_a_number_in_what_a_variable_holds_is_noticed(name: str, by: str) -> None:
    """Of objects, dictionaries and short lists, under a name that the function has in its text."""
    read, write = PARTS[name]
    settings = Settings()

    def drive(t: Training) -> None:
        nonlocal settings
        t.settings = settings = Settings()
        for i in range(24):
            if i == 12:
                write(settings)
            t.take(i)

    def body(t: Training, x: Tensor, y: Tensor) -> Tensor:
        t.optimizer.zero_grad()
        loss = F.cross_entropy(t.model(x), y) * read(settings if by == "a variable" else t.settings)
        loss.backward()
        t.optimizer.step()
        return loss.detach()

    compare(drive, at_most=WARM + AGAIN, body=body)


def test_a_number_that_a_step_counts_and_does_not_use_costs_no_further_python() -> None:
    """What has changed while the step did the same is looked at no more."""

    def body(t: Training, x: Tensor, y: Tensor) -> Tensor:
        t.counted = getattr(t, "counted", 0) + 1
        return Training.plain(t, x, y)

    def drive(t: Training) -> None:
        for i in range(24):
            t.counted = 10 * i
            t.take(i)

    compare(drive, at_most=WARM + 1, body=body)


def test_a_tensor_in_a_variable_is_noticed() -> None:
    mask = torch.ones(5, 8)

    def drive(t: Training) -> None:
        nonlocal mask
        mask = torch.ones(5, 8)
        for i in range(24):
            if i == 12:
                mask = torch.zeros(5, 8)
            t.take(i)

    def body(t: Training, x: Tensor, y: Tensor) -> Tensor:
        return (t.model[0](x) * mask[:4]).sum().detach()

    compare(drive, at_most=WARM + AGAIN, body=body)
