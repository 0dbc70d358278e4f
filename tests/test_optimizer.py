"""KitsuneOptimizer as an Optimizer: schedulers, scalers, hooks, pickling and state behave as on the wrapped one."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, optimizer as torch_optimizer

import kitsune
from kitsune import KitsuneOptimizer


@pytest.fixture(autouse=True)
def on_the_cpu():
    with kitsune.config.patch(device="cpu"):  # these models are there, also on a machine that has a GPU
        yield


def tiny_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def batch(step: int) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(step))


def train(model, opt, n_steps: int = 5, first: int = 0, after=None) -> list[torch.Tensor]:
    for step in range(first, first + n_steps):
        opt.zero_grad()
        model(batch(step)).square().mean().backward()
        opt.step()
        if after is not None:
            after()
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def pair(optimizer=torch.optim.AdamW, **options):
    """A plain optimizer and a wrapped one, each with its own copy of one model."""
    plain, wrapped = tiny_model(), tiny_model()
    ours = KitsuneOptimizer(optimizer(wrapped.parameters(), **options), warmup=0)
    return (plain, optimizer(plain.parameters(), **options)), (wrapped, ours)


DENSE = {
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "SGD": {"momentum": 0.9, "nesterov": True, "lr": 0.1},
}


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("name", DENSE)
def test_five_steps_end_where_plain_torch_ends(name, warmup):
    optimizer, plain, wrapped = getattr(torch.optim, name), tiny_model(), tiny_model()
    theirs = train(plain, optimizer(plain.parameters(), **DENSE[name]))
    kitsune.reset()
    ours = train(wrapped, KitsuneOptimizer(optimizer, wrapped.parameters(), warmup=warmup, **DENSE[name]))
    assert_same(ours, theirs)
    assert kitsune.counters()["recorded"] > 0


def test_every_torch_optimizer_is_tried():
    tried = {*DENSE, "LBFGS", "Muon", "SparseAdam", "Optimizer"}
    shipped = {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)}
    assert shipped <= tried


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_on_matrices():
    results = []
    for wrap in (lambda opt: opt, functools.partial(KitsuneOptimizer, warmup=0)):
        model = tiny_model()
        opt = wrap(torch.optim.Muon([model[0].weight, model[2].weight], lr=0.01))
        results.append(train(model, opt))
    assert_same(*results)


def test_sparse_adam_on_an_embedding():
    results = []
    for wrap in (lambda opt: opt, functools.partial(KitsuneOptimizer, warmup=0)):
        torch.manual_seed(0)
        table = nn.Embedding(10, 3, sparse=True)
        opt = wrap(torch.optim.SparseAdam(table.parameters()))
        for step in range(5):
            opt.zero_grad()
            table(torch.tensor([step, 2, 2])).square().sum().backward()
            opt.step()
        results.append([table.weight.detach()])
    assert_same(*results)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_closures(line_search):
    results = []
    for wrap in (lambda opt: opt, functools.partial(KitsuneOptimizer, warmup=0)):
        model = tiny_model()
        opt = wrap(torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn=line_search))
        losses = [opt.step(functools.partial(_closure, model, opt, step)) for step in range(3)]
        results.append([torch.stack([loss.detach() for loss in losses]), *(p.detach() for p in model.parameters())])
    assert_same(*results)


def _closure(model, opt, step):
    opt.zero_grad()
    loss = model(batch(step)).square().mean()
    loss.backward()
    return loss


def test_step_returns_what_the_closure_does():
    _, (model, opt) = pair()
    _closure(model, opt, 0)
    assert opt.step() is None
    assert opt.step(closure=None) is None
    loss = opt.step(closure=lambda: _closure(model, opt, 1))
    assert loss.item() > 0
    assert opt.step(lambda: 0.25) == 0.25


SCHEDULERS = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=6),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.5)], milestones=[2]
    ),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 1 / (epoch + 1)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_the_wrapped_optimizer(name):
    (plain, theirs), (model, ours) = pair(torch.optim.Adam, lr=0.05)
    scheduler, expected = SCHEDULERS[name](ours), SCHEDULERS[name](theirs)
    assert_same(train(model, ours, after=scheduler.step), train(plain, theirs, after=expected.step))
    assert scheduler.get_last_lr() == expected.get_last_lr() == [ours.base_optimizer.param_groups[0]["lr"]]


def test_plateau_scheduler_and_tensor_learning_rate():
    _, (model, opt) = pair(torch.optim.SGD, lr=torch.tensor(0.1))
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    train(model, opt, after=lambda: scheduler.step(1.0))
    assert opt.param_groups[0]["lr"] < 0.1


def test_scheduler_made_before_wrapping_still_sees_the_steps():
    model = tiny_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(inner, 1)
    train(model, KitsuneOptimizer(inner), n_steps=1, after=scheduler.step)  # a warning is an error in these tests
    assert inner._opt_called


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_scales_and_skips_as_in_plain_torch(fused):
    plain, wrapped = pair(torch.optim.AdamW, lr=0.05, fused=fused)
    assert_same(_train_scaled(*wrapped), _train_scaled(*plain))


def _train_scaled(model, opt, device="cpu") -> list[torch.Tensor]:
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=2)
    for step in range(5):
        opt.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = model(batch(step).to(device)).float().square().mean() * (float("inf") if step == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
    return [torch.tensor(scaler.get_scale()), *(p.detach().clone() for p in model.parameters())]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_grad_scaler_on_cuda(options):
    results = []
    for wrap in (lambda opt: opt, functools.partial(KitsuneOptimizer, device="cuda")):
        model = tiny_model().cuda()
        opt = wrap(torch.optim.AdamW(model.parameters(), lr=0.05, **options))
        results.append(_train_scaled(model, opt, "cuda"))
    assert_same(*results)


def test_scaler_attributes_reach_the_wrapped_optimizer_and_go_again():
    _, (_, opt) = pair()
    names = ("grad_scale", "found_inf", "_step_supports_amp_scaling")
    for name in names:
        assert not hasattr(opt, name)
        setattr(opt, name, torch.ones(()))
        assert getattr(opt.base_optimizer, name) is getattr(opt, name)
        delattr(opt, name)
        assert not hasattr(opt, name) and not hasattr(opt.base_optimizer, name)
    assert pair(fused=True)[1][1]._step_supports_amp_scaling is True


def test_each_hook_runs_once():
    _, (model, opt) = pair()
    ran = []

    def note(name):
        return lambda *args: ran.append(name)

    handles = [
        opt.register_step_pre_hook(note("step pre")),
        opt.register_step_post_hook(note("step post")),
        opt.register_state_dict_pre_hook(note("save pre")),
        opt.register_state_dict_post_hook(note("save post")),
        opt.register_load_state_dict_pre_hook(note("load pre")),
        opt.register_load_state_dict_post_hook(note("load post")),
        torch_optimizer.register_optimizer_step_pre_hook(note("any step pre")),
        torch_optimizer.register_optimizer_step_post_hook(note("any step post")),
    ]
    train(model, opt, n_steps=1)
    opt.load_state_dict(opt.state_dict())
    for handle in handles:
        handle.remove()
    train(model, opt, n_steps=1)
    expected = ["any step pre", "step pre", "step post", "any step post"]
    assert ran == [*expected, "save pre", "save post", "load pre", "load post"]


def test_step_is_profiled_once():
    _, (model, opt) = pair(torch.optim.SGD)
    opt._patch_step_function()
    train(model, opt, n_steps=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        opt.step()
    names = [event.name for event in profile.events() if event.name.startswith("Optimizer.step#")]
    assert names == ["Optimizer.step#SGD.step"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_train_on_as_the_original(copied):
    _, (model, opt) = pair(torch.optim.Adam, lr=0.05)
    scheduler = lr_scheduler.StepLR(opt, 2)  # puts a closure into opt.step, which cannot be pickled
    train(model, opt, after=scheduler.step)
    model(batch(5))  # leaves a recording open
    other_model, other = copied((model, opt))
    assert "step" not in vars(other) and not other._binding.recording
    assert other.param_groups[0]["params"][0] is other_model[0].weight
    assert_same(train(other_model, other, first=6), train(model, opt, first=6))


def test_state_dict_is_the_plain_one_and_loads_both_ways():
    (plain, theirs), (model, ours) = pair(torch.optim.AdamW, lr=0.05)
    train(plain, theirs)
    train(model, ours)
    assert pickle.dumps(ours.state_dict()["param_groups"]) == pickle.dumps(theirs.state_dict()["param_groups"])
    assert ours.state_dict().keys() - theirs.state_dict().keys() == {"kitsune"}
    for name, value in theirs.state_dict()["state"][0].items():
        assert torch.equal(value, ours.state_dict()["state"][0][name])
        assert type(ours.state_dict()["state"][0][name]) is torch.Tensor
    saved, other = copy.deepcopy(ours.state_dict()), tiny_model()
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    fresh = torch.optim.AdamW(other.parameters())
    fresh.load_state_dict(saved)
    other.load_state_dict(plain.state_dict())
    assert_same(train(model, ours, first=5), train(plain, theirs, first=5))
    assert_same(train(other, fresh, first=5), [p.detach() for p in plain.parameters()])


def test_groups_state_and_defaults_are_those_of_the_wrapped_one():
    _, (model, opt) = pair(torch.optim.SGD, lr=0.1)
    inner = opt.base_optimizer
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.5})
    assert inner.param_groups[1]["lr"] == 0.5
    opt.param_groups = groups = [inner.param_groups[0]]
    opt.state, opt.defaults = state, defaults = {}, {"lr": 3}
    assert inner.param_groups is groups and inner.state is state and inner.defaults is defaults
    opt.zero_grad(set_to_none=False)
    model(batch(0)).sum().backward()
    opt.zero_grad(set_to_none=False)
    assert not model[0].weight.grad.any()
    opt.zero_grad()
    assert model[0].weight.grad is None


def test_other_attributes_are_forwarded():
    class Marked(torch.optim.SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.1)
            self.mark = 1

    opt = KitsuneOptimizer(Marked, tiny_model().parameters())
    opt.mark, opt.mine = 2, 3
    assert (opt.base_optimizer.mark, opt.mark, opt.mine) == (2, 2, 3)
    assert not hasattr(opt.base_optimizer, "mine")
    assert repr(opt) == f"KitsuneOptimizer({opt.base_optimizer!r})"
    with pytest.raises(AttributeError, match="'Marked' object has no attribute 'nothing'"):
        _ = opt.nothing


def test_a_wrapped_optimizer_can_be_wrapped_again():
    (plain, theirs), (model, ours) = pair()
    assert_same(train(model, KitsuneOptimizer(ours)), train(plain, theirs))


def test_wrong_arguments_are_sentences():
    model = tiny_model()
    inner = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match=r"takes a torch\.optim\.Optimizer, or a class of one, but got Sequential object\."):
        KitsuneOptimizer(model)
    with pytest.raises(TypeError, match="but got the class Linear"):
        KitsuneOptimizer(nn.Linear, model.parameters())
    with pytest.raises(TypeError, match=r"unexpected: 'warmpu'\. Did you mean 'warmup'\?"):
        KitsuneOptimizer(inner, warmpu=1)
    with pytest.raises(TypeError, match=r"unexpected: a positional list object, 'lr', 'enable_amp'\."):
        KitsuneOptimizer(inner, [], enable_amp=True, lr=0.1)
    with pytest.raises(ValueError, match="warmup=-1 is not possible"):
        KitsuneOptimizer(inner, warmup=-1)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        KitsuneOptimizer(inner, model=[model])
    with pytest.raises(ValueError, match="Linear owns none of the parameters"):
        KitsuneOptimizer(inner).attach(nn.Linear(2, 2))
