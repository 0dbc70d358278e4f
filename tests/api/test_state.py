"""All optimizers of torch, wrapped: the same parameters after ten steps, and every way to carry a state over."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kitsune import KitsuneOptimizer
from kitsune.amp import AMPConfig
from tests.api.training import batches, differences, small_model, train

with warnings.catch_warnings():
    # Of the libraries that torch's own test helpers import.
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_optimizers import optim_db

INFOS = {info.optim_cls.__name__: info for info in optim_db}
HALF = AMPConfig(dtype=torch.float16, init_scale=2.0**12, growth_interval=2)


def parts(name: str) -> tuple[nn.Module, Any]:
    """A model that an optimizer takes, and what it is to be given of it."""
    if name == "SparseAdam":
        torch.manual_seed(0)
        model = nn.Embedding(16, 4, sparse=True)
        return model, list(model.parameters())
    model = small_model()
    return model, [p for p in model.parameters() if p.dim() == 2] if name == "Muon" else list(model.parameters())


def settings(name: str) -> dict[str, Any]:
    """The first inputs of torch's own tests of an optimizer, on a CPU."""
    inputs = INFOS[name].optim_inputs_func(device="cpu")
    chosen = dict(inputs[1].kwargs if len(inputs) > 1 else inputs[0].kwargs)
    # It evaluates its closure 20 times in a step otherwise, each a region of its own.
    return {**chosen, "max_iter": 3} if name == "LBFGS" else chosen


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(model, nn.Embedding):
        return model(y).square().sum()
    return nn.functional.cross_entropy(model(x), y)


def step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    if isinstance(getattr(optimizer, "base_optimizer", optimizer), torch.optim.LBFGS):
        return optimizer.step(closure).detach()
    loss = closure()
    optimizer.step()
    return loss.detach()


def wrapped(name: str, **options: Any) -> tuple[nn.Module, KitsuneOptimizer]:
    model, parameters = parts(name)
    return model, KitsuneOptimizer(INFOS[name].optim_cls(parameters, **settings(name)), device="cpu", **options)


def test_every_optimizer_of_torch_is_here() -> None:
    shipped = {n for n, kind in vars(torch.optim).items() if isinstance(kind, type) and n != "Optimizer"}
    assert shipped == INFOS.keys() and len(INFOS) >= 14


@pytest.mark.parametrize("name", INFOS)
def test_ten_steps_end_where_plain_torch_ends(name: str) -> None:
    model, parameters = parts(name)
    expected = train(model, INFOS[name].optim_cls(parameters, **settings(name)), 10, step)
    model, optimizer = wrapped(name)
    assert not differences(expected, train(model, optimizer, 10, step))


def through_pickle(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


def through_weights_only(pair: tuple[nn.Module, KitsuneOptimizer]) -> Any:
    model, optimizer = pair
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other, fresh = wrapped(type(optimizer.base_optimizer).__name__)
    other.load_state_dict(loaded["model"])
    fresh.load_state_dict(loaded["optimizer"])
    return other, fresh


@pytest.mark.parametrize("carry", [copy.deepcopy, through_pickle, through_weights_only])
@pytest.mark.parametrize("name", INFOS)
def test_training_goes_on_from_a_copy(name: str, carry: Any) -> None:
    model, parameters = parts(name)
    plain = INFOS[name].optim_cls(parameters, **settings(name))
    train(model, plain, 5, step)
    if name == "Adafactor":
        try:
            train(*copy.deepcopy((model, plain)), 1, step)
        except KeyError as missing:
            # torch 2.11, where there is a CUDA device.
            pytest.skip(f"a copy of torch's own does not go on: it has no {missing}")
    expected = train(model, plain, 5, step, first=5)
    pair = wrapped(name)
    train(*pair, 5, step)
    model, optimizer = carry(pair)
    assert optimizer is not pair[1]
    assert not differences(expected, train(model, optimizer, 5, step, first=5))


@pytest.mark.parametrize("name", INFOS)
def test_a_state_loads_in_plain_torch_and_back(name: str) -> None:
    model, optimizer = wrapped(name)
    train(model, optimizer, 3, step)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, 3, step, first=3)
    other, parameters = parts(name)
    plain = INFOS[name].optim_cls(parameters, **settings(name))
    other.load_state_dict(saved[0])
    plain.load_state_dict(saved[1])
    again, ours = wrapped(name)
    again.load_state_dict(saved[0])
    ours.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert not differences(expected, train(other, plain, 3, step, first=3))
    assert not differences(expected, train(again, ours, 3, step, first=3))


@pytest.mark.parametrize("carry", [copy.deepcopy, through_pickle, None], ids=["deepcopy", "pickle", "state_dict"])
def test_the_scale_goes_along(carry: Any) -> None:
    def pair() -> tuple[nn.Module, KitsuneOptimizer]:
        model = small_model()
        return model, KitsuneOptimizer(torch.optim.AdamW(model.parameters()), enable_amp=True, amp_config=HALF)

    model, optimizer = pair()
    train(model, optimizer, 5)
    own = optimizer.state_dict()["kitsune"]
    assert own["scale"] == 2.0**14 and own["growth_tracker"] == 1 and own["steps"] == 5 and own["optimizer"] == "AdamW"
    if carry is None:
        other, copied = pair()
        other.load_state_dict(model.state_dict())
        copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        other, copied = carry((model, optimizer))
    assert copied.state_dict()["kitsune"] == own
    assert not differences(train(model, optimizer, 5, first=5), train(other, copied, 5, first=5))
    assert optimizer.state_dict()["kitsune"] == copied.state_dict()["kitsune"]


def test_options_go_along_with_a_copy() -> None:
    model = small_model()
    optimizer = KitsuneOptimizer(torch.optim.SGD(model.parameters()), enable_fusion=True, num_streams=6, profile=True)
    for copied in (copy.deepcopy(optimizer), through_pickle(optimizer)):
        assert copied._options == optimizer._options and copied.profiler is not None


# Bad input.


def test_the_state_of_another_optimizer_is_refused_by_name() -> None:
    adam, sgd = (kind(small_model().parameters(), lr=0.1) for kind in (torch.optim.Adam, torch.optim.SGD))
    for state, said in (
        (KitsuneOptimizer(sgd).state_dict(), "The state is of SGD and cannot be loaded into Adam"),
        (sgd.state_dict(), r"of another optimizer \(its options are dampening, momentum, nesterov\)"),
    ):
        with pytest.raises(ValueError, match=said):
            KitsuneOptimizer(adam).load_state_dict(state)


def test_names_that_schedulers_add_are_no_reason_to_refuse() -> None:
    one, two = (torch.optim.SGD(small_model().parameters(), lr=0.1) for _ in range(2))
    torch.optim.lr_scheduler.OneCycleLR(one, 0.1, total_steps=4)
    KitsuneOptimizer(two).load_state_dict(one.state_dict())
    assert two.param_groups[0]["max_lr"] == 0.1


def test_what_is_no_state_is_refused() -> None:
    optimizer = KitsuneOptimizer(torch.optim.SGD(small_model().parameters()))
    with pytest.raises(TypeError, match=r"takes the dictionary that state_dict\(\) returns, not 3"):
        optimizer.load_state_dict(3)
    with pytest.raises(ValueError, match=r"The state has no 'param_groups', .+ Did you mean 'param_group'\?"):
        optimizer.load_state_dict({"state": {}, "param_group": []})


# The protocol of distributed checkpointing.


@pytest.mark.parametrize("amp", [False, True])
def test_distributed_checkpointing_reads_and_writes_the_state(amp: bool) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    options: dict[str, Any] = {"enable_amp": True, "amp_config": HALF} if amp else {}
    model, other = small_model(), small_model()
    optimizer = KitsuneOptimizer(torch.optim.AdamW(model.parameters()), **options)
    train(model, optimizer, 3)
    state = get_optimizer_state_dict(model, optimizer)
    assert state["state"]["0.weight"]["exp_avg"].shape == (16, 8)
    fresh = KitsuneOptimizer(torch.optim.AdamW(other.parameters()), **options)
    set_optimizer_state_dict(other, fresh, copy.deepcopy(state))
    other.load_state_dict(model.state_dict())
    if amp:
        fresh.load_state_dict({**fresh.state_dict(), "kitsune": optimizer.state_dict()["kitsune"]})
    assert not differences(train(model, optimizer, 3, first=3), train(other, fresh, 3, first=3))


# Several optimizers, and parameters that come and go.


def both(run: Any) -> None:
    """The same with plain optimizers and with wrapped ones."""
    expected, got = run(lambda o: o), run(lambda o: KitsuneOptimizer(o, device="cpu"))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_two_optimizers_on_one_model() -> None:
    def run(wrap: Any) -> list[Tensor]:
        model = small_model()
        one = wrap(torch.optim.SGD(model[0].parameters(), lr=0.1))
        two = wrap(torch.optim.AdamW([*model[2].parameters(), *model[3].parameters()]))
        for x, y in batches(6):
            for optimizer in (one, two):
                optimizer.zero_grad()
            loss_of(model, x, y).backward()
            one.step()
            two.step()
        return [p.detach() for p in model.parameters()]

    both(run)


def test_one_optimizer_on_two_models() -> None:
    def run(wrap: Any) -> list[Tensor]:
        first, second = nn.Linear(8, 8), small_model(1)
        torch.manual_seed(3)
        nn.init.normal_(first.weight), nn.init.zeros_(first.bias)
        optimizer = wrap(torch.optim.AdamW([*first.parameters(), *second.parameters()], lr=0.01))
        for x, y in batches(6):
            optimizer.zero_grad()
            loss_of(second, first(x), y).backward()
            optimizer.step()
        return [p.detach() for model in (first, second) for p in model.parameters()]

    both(run)


def test_parameters_are_frozen_and_added_in_mid_run() -> None:
    def run(wrap: Any) -> list[Tensor]:
        model = small_model()
        optimizer = wrap(torch.optim.AdamW(model[3].parameters(), lr=0.01))
        for k, (x, y) in enumerate(batches(18)):
            if k == 6:
                optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.02})
            if k == 12:
                model[3].bias.requires_grad_(False)
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    both(run)
