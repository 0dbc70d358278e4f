"""Where the recording of a KitsuneOptimizer begins and ends."""

import gc
import threading

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

import kitsune
from kitsune import KitsuneOptimizer
from kitsune.binding import ASK_AGAIN, PATIENCE, _before_forward

X = torch.ones(3, 4)


@pytest.fixture(autouse=True)
def clean():
    kitsune.reset()
    with kitsune.config.patch(device="cpu"):  # these models are there, also on a machine that has a GPU
        yield
    gc.collect()
    assert _get_current_dispatch_mode_stack() == []
    assert _before_forward not in torch_module._global_forward_pre_hooks.values()


def sgd(*models: nn.Module, **options) -> KitsuneOptimizer:
    parameters = [parameter for model in models for parameter in model.parameters()]
    return KitsuneOptimizer(torch.optim.SGD, parameters, lr=0.1, warmup=0, **options)


def recording(opt: KitsuneOptimizer) -> bool:
    return opt._binding.recording


def test_begins_at_the_forward_and_ends_at_the_step():
    model = nn.Linear(4, 2)
    opt = sgd(model)
    assert not recording(opt)
    model(X).sum().backward()
    opt.zero_grad()
    assert recording(opt)
    opt.step()
    assert not recording(opt)
    assert kitsune.counters()["recorded"] > 0


def test_recording_goes_on_over_several_forwards():
    model = nn.Linear(4, 2)
    opt = sgd(model)
    for _ in range(3):
        model(X).sum().backward()
        assert recording(opt)
    opt.step()
    assert not recording(opt)


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_evaluation_is_not_recorded(quiet):
    model = nn.Linear(4, 2)
    opt = sgd(model)
    with quiet():
        model(X)
    assert not recording(opt)
    assert kitsune.counters()["recorded"] == 0


def test_nothing_begins_when_switched_off():
    model = nn.Linear(4, 2)
    opt = sgd(model)
    with kitsune.config.patch(enabled=False):
        model(X).sum().backward()
        assert not recording(opt)
        opt.step()
    assert kitsune.counters()["recorded"] == 0


def test_step_without_a_forward_is_plain():
    model = nn.Linear(4, 2)
    opt = sgd(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = model.weight.detach().clone()
    opt.step(closure=None)
    assert torch.equal(model.weight, before - 0.1)
    assert kitsune.counters()["recorded"] == 0


def test_other_modules_begin_nothing():
    model, teacher, loss = nn.Linear(4, 2), nn.Linear(4, 2), nn.MSELoss()
    opt = sgd(model)
    loss(teacher(X), X[:, :2])
    assert not recording(opt)


def test_part_of_a_model_begins_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    opt = sgd(model)
    model[0](X)
    assert recording(opt)
    opt.close()


def test_only_the_attached_model_begins():
    one, two = nn.Sequential(nn.Linear(4, 2)), nn.Linear(4, 2)
    opt = sgd(one, two, model=one)
    two(X)
    one[0](X)
    assert not recording(opt)
    one(X)
    assert recording(opt)
    opt.step()
    opt.attach(two)
    two(X)
    assert recording(opt)
    opt.close()


def test_parameters_added_later_begin_too():
    model, head = nn.Linear(4, 2), nn.Linear(4, 2)
    opt = sgd(model)
    head(X)
    assert not recording(opt)
    opt.add_param_group({"params": head.parameters()})
    head(X)
    assert recording(opt)
    opt.close()


def test_replaced_parameters_are_noticed():
    model = nn.Linear(4, 2, bias=False)
    opt = sgd(model)
    model(X).sum().backward()
    opt.step()
    model.weight = nn.Parameter(torch.ones(2, 4))
    model(X)
    assert not recording(opt)
    opt.param_groups[0]["params"] = [model.weight]
    for _ in range(ASK_AGAIN):
        model(X)
    assert recording(opt)
    opt.close()


def test_module_without_a_hash():
    class Odd(nn.Linear):
        __hash__ = None

        def __eq__(self, other):
            return False

    model = nn.Linear(4, 4)
    opt, odd = sgd(model), Odd(4, 4)
    _before_forward(odd, ())
    assert not recording(opt)


def test_failed_forward_is_continued_by_the_next():
    class Fails(nn.Linear):
        fail = True

        def forward(self, x):
            if self.fail:
                raise RuntimeError("no")
            return super().forward(x)

    model = Fails(4, 2)
    opt = sgd(model)
    with pytest.raises(RuntimeError, match="no"):
        model(X)
    model.fail = False
    model(X).sum().backward()
    opt.step()
    assert not recording(opt)


def test_failed_step_ends_the_recording():
    model = nn.Linear(4, 2)
    opt = sgd(model)
    handle = opt.register_step_pre_hook(lambda *args: 1 / 0)
    model(X).sum().backward()
    with pytest.raises(ZeroDivisionError):
        opt.step()
    assert not recording(opt)
    handle.remove()


def test_foreign_dispatch_mode_keeps_recording_off():
    class Passes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    model = nn.Linear(4, 2)
    opt = sgd(model)
    with Passes():
        model(X)
        assert not recording(opt)


def test_forward_under_vmap_or_tracing_begins_nothing():
    model = nn.Linear(4, 2)
    opt = sgd(model)
    torch.vmap(model)(X)
    torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    assert not recording(opt)


def test_recomputation_in_backward_begins_nothing():
    model = nn.Linear(4, 4)
    opt = sgd(model)
    out = checkpoint(model, X, use_reentrant=False)
    opt.step()
    out.sum().backward()
    assert not recording(opt)


@pytest.mark.gpu
def test_recomputation_in_the_thread_of_the_autograd_engine():
    model = nn.Linear(4, 4).cuda()
    opt, threads = sgd(model, device="cuda"), set()
    # Of the module, so it runs after the one that begins recordings. A recomputed forward may stop before its end.
    model.register_forward_pre_hook(lambda *args: threads.add((threading.get_ident(), recording(opt))))
    for inside in (True, False):  # the backward of the second one runs after its step
        out = checkpoint(model, X.cuda().requires_grad_(), use_reentrant=False)
        if inside:
            out.sum().backward()
            opt.step()
    opt.step()
    out.sum().backward()
    here = threading.get_ident()
    assert {thread == here for thread, _ in threads} == {True, False}
    assert all(thread == here for thread, open_there in threads if open_there)


def test_inside_accelerate_by_hand():
    model = nn.Linear(4, 2)
    opt = sgd(model)
    with kitsune.accelerate(warmup=0):
        model(X).sum().backward()
        opt.step()
        assert not recording(opt)
        assert len(_get_current_dispatch_mode_stack()) == 1


def test_adversaries_take_turns_as_in_plain_torch():
    results = []
    for wrap in (lambda opt: opt, lambda opt: KitsuneOptimizer(opt, warmup=0)):
        torch.manual_seed(0)
        maker, judge = nn.Linear(4, 4), nn.Linear(4, 1)
        opt_m = wrap(torch.optim.Adam(maker.parameters()))
        opt_j = wrap(torch.optim.Adam(judge.parameters()))
        for _ in range(4):
            opt_j.zero_grad()
            made = maker(X)
            (judge(X).mean() - judge(made.detach()).mean()).backward()
            opt_j.step()
            opt_m.zero_grad()
            judge(made).mean().backward()
            opt_m.step()
            if isinstance(opt_j, KitsuneOptimizer):
                opt_j.close()  # the generator's step ran the judge too
        results.append([p.detach() for model in (maker, judge) for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kitsune.counters()["recorded"] > 0


def test_one_optimizer_on_two_models_and_two_on_one():
    one, two = nn.Linear(4, 4), nn.Linear(4, 2)
    both, first, second = sgd(one, two), sgd(one), sgd(two)
    two(one(X)).sum().backward()
    assert recording(both) and recording(first) and recording(second)
    for opt in (first, both, second):
        opt.step()
        assert not recording(opt)


def test_step_ends_the_recording_of_its_own_thread():
    model = nn.Linear(4, 2)
    opt, seen = sgd(model), []

    def work():
        model(X).sum().backward()
        seen.append(recording(opt))
        opt.step()
        seen.append(recording(opt))

    def in_a_thread():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    in_a_thread()
    assert seen == [True, False] and not recording(opt)
    model(X)
    in_a_thread()  # runs plainly: nothing looks for forwards while the optimizer has a recording
    assert seen[2:] == [False, False] and recording(opt)
    opt.close()


def test_module_hook_is_gone_while_recording():
    model = nn.Linear(4, 2)
    opt = sgd(model)
    for _ in range(2):
        assert _before_forward in torch_module._global_forward_pre_hooks.values()
        model(X).sum().backward()
        assert _before_forward not in torch_module._global_forward_pre_hooks.values()
        opt.step()


def watched() -> bool:
    return _before_forward in torch_module._global_forward_pre_hooks.values()


def step(model: nn.Module, opt: KitsuneOptimizer) -> bool:
    """A step; were forwards watched within?"""
    model(X).sum().backward()
    found = watched()
    opt.step()
    return found


def test_an_optimizer_that_is_not_used_any_more_does_not_watch_the_steps_of_others():
    model, old = nn.Linear(4, 2), nn.Linear(4, 2)
    opt, unused = sgd(model), sgd(old)
    assert [step(model, opt) for _ in range(PATIENCE + 2)] == [True] * (PATIENCE - 1) + [False] * 3
    assert watched(), "between them"
    old(X).sum().backward()
    assert recording(unused) and watched(), "for the other one, which is in use"
    unused.step()
    assert step(model, opt)


def test_an_optimizer_that_is_used_again_within_the_steps_of_another_is_recorded_from_its_second_step_on():
    model, old = nn.Linear(4, 2), nn.Linear(4, 2)
    opt, unused = sgd(model), sgd(old)
    for _ in range(PATIENCE):
        step(model, opt)
    for again in (False, True):
        model(X).sum().backward()
        old(X).sum().backward()
        assert recording(unused) is again and recording(opt)
        unused.step()
        opt.step()


def test_an_optimizer_waits_when_the_others_are_gone():
    model, old = nn.Linear(4, 2), nn.Linear(4, 2)
    opt, unused = sgd(model), sgd(old)
    for _ in range(PATIENCE):
        step(model, opt)
    del opt
    gc.collect()
    old(X).sum().backward()
    assert recording(unused)
    unused.step()


def test_mixed_precision_is_watched_for_always():
    model, old = nn.Linear(4, 2), nn.Linear(4, 2)
    opt, _ = sgd(model), sgd(old, enable_amp=True)
    assert all(step(model, opt) for _ in range(PATIENCE + 2))
    model(X).sum().backward()
    with torch.no_grad():
        plain = old(X)
    assert not torch.equal(old(X), plain), "in bfloat16"
    opt.step()


def test_hooks_come_and_go_without_a_new_handle():
    """Of a new one, the next backward would ask whether it is at a leaf's node."""
    model = nn.Linear(4, 2)
    opt = sgd(model)
    handles = set()
    for _ in range(4):
        model(X).sum().backward()
        opt.step()
        handles.add(RemovableHandle.next_id)
    assert len(handles) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_compiled_models_are_left_to_torch_compile(nested):
    inner = nn.Linear(4, 4)
    opt = sgd(inner)
    inner.compile(backend="eager")  # compiles nothing before the first call
    _before_forward(nn.Sequential(inner) if nested else inner, ())
    assert not recording(opt)


def test_dropped_optimizer_takes_its_hook_and_its_recording_along():
    model = nn.Linear(4, 2)
    opt, other = sgd(model), sgd(model)
    opt.register_step_post_hook(lambda *args, keep=opt: None)  # a cycle through the wrapped optimizer's hooks
    out = model(X)
    other.close()
    del opt
    gc.collect()
    assert _get_current_dispatch_mode_stack() == []
    assert _before_forward in torch_module._global_forward_pre_hooks.values()
    assert out.shape == (3, 2)
    del other
    assert _before_forward not in torch_module._global_forward_pre_hooks.values()
