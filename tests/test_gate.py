"""The gate's decisions, with a clock that the test turns: no time of this machine is in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest

from kitsune import gate as module
from kitsune.gate import BLOCK, BLOCKS, MANY, NO_STEPS, ON_A_CPU, REVISIT, SHOWN, Gate, Progress
from kitsune.profiler import Tally


class Optimizer:
    """All that a gate wants of one."""


class Quiet:
    """What works beside the steps: it needs so many steps to come to an end."""

    def __init__(self) -> None:
        self.n_asked = self.takes = 0
        self.is_on = False

    def ask(self) -> bool:
        self.is_on, self.n_asked = True, self.n_asked + 1
        return self.n_asked > self.takes

    def end(self) -> None:
        self.is_on, self.n_asked = False, 0


class Program:
    """Steps with a length each way, in front of a gate."""

    def __init__(self, eager: float = 1.0, kitsune: float = 0.5, kernels: bool = True, room: bool = True) -> None:
        self.eager, self.kitsune, self.room = eager, kitsune, room
        self.now, self.n_ops, self.n_new, self.n_made, self.n_unfused, self.asked, self.n_steps = 0.0, 0, 0, 0, 0, 0, 0
        # Does a step have to do without its kernels?
        self.lacks: Callable[[], bool] = lambda: False
        self.tally, self.optimizer, self.quiet = Tally(), Optimizer(), Quiet()
        # The steps so far, each time that eager is to have memory, and that it is given back.
        self.made_way: list[int] = []
        self.relieved: list[int] = []
        memory = lambda: self.made_way.append(self.n_steps), lambda: self.relieved.append(self.n_steps)
        asked = (lambda: self.room), (lambda: self.asked)
        self.gate = Gate(kernels, self.progress, lambda: self.now, *asked, *memory, self.quiet, self.tally)

    def progress(self) -> Progress:
        return Progress(self.n_ops, self.n_new, self.n_made, self.n_unfused)

    def step(self, new: bool = False, optimizer: object = None) -> bool:
        """One step; was it recorded?"""
        records = self.gate.records
        self.now += self.kitsune if records else self.eager
        if records:
            self.n_ops += 100
            self.n_new += 100 * new
            self.n_unfused += self.lacks()
        self.n_steps += 1
        self.asked += 10_000 + self.n_steps * new
        self.gate.end_of_step(optimizer or self.optimizer)
        return records

    def steps(self, n: int, new: Iterable[bool] = ()) -> list[bool]:
        news = itertools.chain(new, itertools.repeat(False))
        return [self.step(next(news)) for _ in range(n)]

    def until_decided(self, new: Callable[[int], bool] = lambda _: False) -> int:
        for n in range(500):
            if self.gate._decided:
                return n
            self.step(new(n))
        raise AssertionError("never decided")


def decided(program: Program) -> list[str]:
    return list(program.tally.gate)


def test_on_a_cpu_a_few_steps_are_recorded_and_the_rest_are_left_for_good() -> None:
    program = Program(kernels=False)
    assert program.steps(SHOWN + 5000).count(True) == SHOWN
    assert program.gate.left == ON_A_CPU
    assert decided(program) == [f"{ON_A_CPU}: the step is left to eager"]
    assert program.tally.gate_left == 5000
    assert program.tally.gate_revisited == 0


def test_a_program_that_is_faster_recorded_stays_recorded_and_is_told_with_its_figures() -> None:
    program = Program(eager=1.0, kitsune=0.5)
    program.until_decided()
    assert program.gate.left is None
    assert all(program.steps(100))
    assert decided(program) == [f"It took 0.50 times as long as eager's over {BLOCKS * BLOCK} steps: the step is recorded"]
    assert program.tally.gate_left == 0


def test_what_eager_steps_needed_goes_back_once_they_are_measured_and_not_wanted() -> None:
    program = Program(eager=1.0, kitsune=0.5)
    decided_after = program.until_decided()
    assert program.relieved == [decided_after]
    # Three times five steps of eager, each of which is followed by as many of ours.
    assert program.made_way == [decided_after - n * (BLOCK + 1) for n in (6, 4, 2)]
    looked_at = program.tally.gate_revisited
    while program.tally.gate_revisited == looked_at:
        program.step()
    assert len(program.relieved) == 1
    program.steps(100)
    assert len(program.relieved) == 2


def test_a_program_that_is_slower_recorded_is_left_to_eager() -> None:
    program = Program(eager=1.0, kitsune=1.32)
    program.until_decided()
    # Eager's steps go on, in that memory.
    assert program.relieved == []
    assert program.gate.left == f"It took 1.32 times as long as eager's over {BLOCKS * BLOCK} steps"
    assert not any(program.steps(100))


@pytest.mark.parametrize("ratio", [0.97, 1.0, 1.04])
def test_within_the_margin_nothing_changes(ratio: float) -> None:
    program = Program(kitsune=ratio)
    program.until_decided()
    assert program.gate.left is None
    slower = Program(kitsune=1.5)
    slower.until_decided()
    slower.kitsune = ratio
    slower.steps(2 * REVISIT)
    assert slower.gate.left is not None


def test_a_decision_is_looked_at_again_ever_more_rarely() -> None:
    program = Program(kitsune=1.5)
    program.until_decided()
    recorded = [n for n, records in enumerate(program.steps(22 * REVISIT)) if records]
    looks = [n for n, m in zip(recorded, [0, *recorded], strict=False) if n - m > REVISIT / 2]
    assert program.tally.gate_revisited == len(looks) == 3
    gaps = [b - a for a, b in itertools.pairwise([0, *looks])]
    assert gaps[0] == REVISIT
    assert 4 * REVISIT < gaps[1] < 5 * REVISIT
    assert 16 * REVISIT < gaps[2] < 17 * REVISIT


def test_a_decision_about_short_steps_is_looked_at_again_after_as_many_more_as_its_blocks_are_longer() -> None:
    program = Program(eager=0.001, kitsune=0.0015)
    program.until_decided()
    before = program.tally.gate_revisited
    program.steps(MANY // BLOCK * REVISIT - 1)
    assert program.tally.gate_revisited == before == 0
    program.steps(2)
    assert program.tally.gate_revisited == 1


def test_noise_does_not_make_it_oscillate() -> None:
    program = Program()
    rates = itertools.cycle([0.9, 1.1, 1.3, 0.7, 1.0])
    switches, was = 0, True
    for _ in range(50_000):
        program.kitsune = next(rates)
        records = program.step()
        switches, was = switches + (records is not was), records
    assert switches <= 2 * BLOCKS * (program.tally.gate_revisited + 1)
    assert program.tally.gate_revisited <= 4


def test_a_program_that_became_faster_is_recorded_again() -> None:
    program = Program(kitsune=1.5)
    program.until_decided()
    program.kitsune = 0.5
    program.steps(REVISIT + 60)
    assert program.gate.left is None
    assert program.step()


def test_one_disturbed_block_decides_nothing() -> None:
    program = Program(kitsune=0.9)
    while not (program.gate.records and program.tally.gate_left == 0 and program.now > 6):
        program.step()
    program.now += 1000.0
    program.until_decided()
    assert program.gate.left is None


class AfterSwitches(Program):
    """Its first two eager steps after each switch take three times as long."""

    n_eager = 0

    def step(self, new: bool = False, optimizer: object = None) -> bool:
        self.n_eager = 0 if self.gate.records else self.n_eager + 1
        self.now += 2 * self.eager * (0 < self.n_eager <= 2)
        return super().step(new, optimizer)


@pytest.mark.parametrize(("eager", "left", "n"), [(0.05, False, 12), (0.002, True, 51)])
def test_short_steps_are_measured_over_more_of_them(eager: float, left: bool, n: int) -> None:
    program = AfterSwitches(eager, 1.2 * eager)
    program.until_decided()
    assert (program.gate.left is not None) == left
    assert f"over {n} steps" in decided(program)[0]


def test_steps_that_are_always_new_are_left_to_eager_and_not_recorded_again() -> None:
    program = Program(kitsune=0.1)
    n = program.until_decided(lambda _: True)
    assert n <= 32
    assert program.gate.left == "Its operators or shapes were new in 24 of its last 24 recorded steps"
    assert program.steps(6 * REVISIT, itertools.repeat(True)).count(True) == 0
    # From some time on they are the same again and again.
    assert True in program.steps(2 * REVISIT)
    program.steps(2 * REVISIT)
    assert program.gate.left is None


def test_new_steps_that_allocate_the_same_are_looked_at_rarely() -> None:
    program = Program(kitsune=0.1)
    program.until_decided(lambda _: True)
    recorded = []
    for _ in range(6 * REVISIT):
        recorded.append(program.step(new=True))
        program.asked -= program.n_steps
    assert 0 < sum(recorded) <= 2 * module.LATER.steps


@pytest.mark.parametrize("n_kinds", [1, 2, 4, 12, 20])
def test_a_few_known_kinds_of_step_in_turn_are_not_a_program_that_changes(n_kinds: int) -> None:
    program = Program(kitsune=0.5)
    program.until_decided(lambda n: n < n_kinds)
    assert program.gate.left is None


def test_what_it_keeps_measuring_around_is_new_steps_now_and_then() -> None:
    program = Program(kitsune=0.5)
    program.until_decided(lambda n: n % 3 == 0)
    assert program.gate.left is None


def test_a_kept_program_that_begins_to_change_is_left() -> None:
    program = Program(kitsune=0.5)
    program.until_decided()
    program.steps(32, itertools.repeat(True))
    assert program.gate.left is not None


def test_what_a_reset_makes_new_is_not_held_against_it() -> None:
    program = Program(kitsune=0.5)
    program.until_decided()
    program.n_ops = program.n_new = 0
    program.gate.restart()
    program.until_decided()
    assert program.gate.left is None


def test_without_room_for_an_eager_step_none_is_tried() -> None:
    program = Program(kitsune=2.0, room=False)
    assert all(program.steps(200))
    assert decided(program) == [f"{module.NO_ROOM}: the step is recorded"]


def test_two_optimizers_in_turn_make_one_step() -> None:
    program, other = Program(kernels=False), Optimizer()
    for _ in range(SHOWN):
        assert program.gate.records
        program.step()
        program.step(optimizer=other)
    assert not program.gate.records


def test_an_optimizer_that_is_gone_ends_no_steps() -> None:
    program = Program(kernels=False)
    program.step()
    program.optimizer = Optimizer()
    assert program.steps(SHOWN + 1).count(False)


def test_another_optimizer_is_another_program() -> None:
    program = Program(kitsune=1.5)
    program.until_decided()
    program.kitsune, program.optimizer = 0.5, Optimizer()
    program.step()
    assert program.gate.records
    program.until_decided()
    assert program.gate.left is None


def test_contexts_without_an_optimizer_are_steps() -> None:
    program = Program(kernels=False)
    for _ in range(NO_STEPS + SHOWN):
        assert program.gate.records
        program.gate.end_of_context()
    assert not program.gate.records


def test_contexts_around_steps_are_none() -> None:
    program = Program(kernels=False)
    for _ in range(SHOWN):
        for _ in range(NO_STEPS):
            program.gate.end_of_context()
        assert program.gate.records
        program.step()
    assert not program.gate.records


def test_an_interrupt_while_it_reads_the_clock_does_not_break_the_steps_that_follow() -> None:
    program = Program(kitsune=0.5)

    def interrupted() -> float:
        program.gate._clock = lambda: program.now
        raise KeyboardInterrupt

    program.gate._clock = interrupted
    with pytest.raises(KeyboardInterrupt):
        program.until_decided()
    program.until_decided()
    assert program.gate.left is None


def test_steps_that_lack_their_kernels_are_not_timed() -> None:
    program = Program(eager=9.0, kitsune=9.0)
    program.lacks = lambda: program.n_steps < 100
    assert all(program.steps(100)) and not program.quiet.is_on
    program.eager, program.kitsune = 1.0, 1.5
    assert program.until_decided() <= 4 * BLOCKS * BLOCK
    assert decided(program) == [f"It took 1.50 times as long as eager's over {BLOCKS * BLOCK} steps: the step is left to eager"]


def test_steps_that_lack_kernels_now_and_then_are_timed() -> None:
    program = Program()
    program.lacks = lambda: program.n_steps % 10 == 0
    assert program.until_decided() <= 50


def test_kernels_are_waited_for_some_time_however_short_the_steps_are() -> None:
    program = Program(eager=0.001, kitsune=0.0005)
    program.lacks = lambda: True
    n = 20 * module.WAITS_FOR_KERNELS
    assert all(program.steps(n)) and not decided(program)
    program.now += module.WAITS_SECONDS
    program.until_decided()
    assert program.gate.left is None and program.n_steps < n + module.WAITS_FOR_KERNELS + 500


def test_kernels_are_not_waited_for_for_ever() -> None:
    program = Program(eager=1.0, kitsune=0.5)
    program.lacks = lambda: True
    assert all(program.steps(2 * module.WAITS_FOR_KERNELS))
    program.until_decided()
    assert program.gate.left is None and program.n_steps < 2 * module.WAITS_FOR_KERNELS + 100


@pytest.mark.parametrize("takes", [0, 7])
def test_steps_are_timed_once_it_is_quiet_and_as_long_as_it_stays_so(takes: int) -> None:
    program, asked = Program(), []
    program.quiet.takes = takes
    while not decided(program):
        recorded = program.step()
        asked.append(program.quiet.n_asked)
        assert recorded or program.quiet.n_asked > takes
    first = next(n for n, times in enumerate(asked) if times)
    # From the first time on it is asked for at the end of each step but the first of a block.
    assert first < 10 and asked[-1] == 0
    assert asked[-2] >= takes + 2 * BLOCKS * BLOCK and all(b - a in (0, 1) for a, b in itertools.pairwise(asked[first:-1]))


def test_after_a_decision_and_a_reset_it_is_loud_again() -> None:
    program = Program(kitsune=1.5)
    program.until_decided()
    assert not program.quiet.is_on
    program.gate.restart()
    while not program.quiet.is_on:
        program.step()
    program.gate.restart()
    assert not program.quiet.is_on


def test_a_program_that_keeps_changing_is_left_before_its_kernels_are_there() -> None:
    program = Program()
    program.lacks = lambda: True
    n = program.until_decided(lambda _: True)
    assert n < 40 and program.gate.left is not None
