"""From a plan to the list of instructions that a run goes through: what needs a tensor, from when to when, and where."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from kitsune.ir import Access, Launch, Op, Plan, TensorType, Value, n_values
from kitsune.runtime.frame import Layout
from kitsune.runtime.instructions import Alias, Allocate, Call, Drop, Instruction, Publish, library_call
from kitsune.runtime.out_forms import out_form, out_names, takes_memory
from kitsune.runtime.places import Places


class Assembly:
    """The instructions of a plan as they come about. `start(launch)` makes the one for a launch of kernels.

    A value is `ready` from the instruction on after which a run has a tensor for it. Values in the arena are ready from the
    start: `furnish` lists those that need a tensor.
    """

    def __init__(self, plan: Plan, places: Places, start: Callable[[Launch], Instruction]) -> None:
        self.plan, self.places, self.start = plan, places, start
        self.instructions: list[Instruction] = []
        self.furnish: dict[int, Value] = {}
        self._ready = set(places.inputs)
        self._allocated: set[int] = set()
        self._input_storages = {v.storage for v in plan.graph.inputs}
        self._arena = self._roots_in_arena()
        self._kept = {places.root[v.id].id for v in plan.graph.outputs} | places.inputs
        # (root, is it the start of the root's memory) of the addresses that kernels ask for, in the order of their slots.
        self._slots: dict[tuple[int, bool], int] = {}
        self._accessed = {a.value.id: a.value for launch in plan.launches for a in accesses_of(launch)}
        self._bases = {(p.root, p.from_start) for p in map(places.place, self._accessed.values())}
        self._assemble()

    def layout(self) -> Layout:
        """Where the memory of the plan is."""
        found: dict[int, tuple[int, int]] = {}
        for number, value in self._accessed.items():
            place = self.places.place(value)
            if place.root in self._arena:
                found[number] = (0, self._arena[place.root][0] + place.nbytes)
            else:
                found[number] = (self._slot(place.root, place.from_start), place.nbytes)
        inputs = tuple((slot, n, start) for (n, start), slot in self._slots.items() if n in self.places.inputs)
        return Layout(found, self._arena, inputs, len(self._slots) + 1, n_values(self.plan.graph))

    def _roots_in_arena(self) -> dict[int, tuple[int, TensorType]]:
        by_kernel = {v.id for launch in self.plan.launches if launch.kernels for op in launch.ops for v in op.results}
        found = {}
        for number, op in self.places.maker.items():
            value = self.places.root[number]
            offset = self.plan.offsets.get(value.storage)
            if offset is not None and (number in by_kernel or takes_memory(op)):
                found[number] = (offset, value.type)
        return found

    def _assemble(self) -> None:
        outputs: dict[int, list[Value]] = {}
        for value in self.plan.graph.outputs:
            outputs.setdefault(self._awaited(value).id, []).append(value)
        self._need(v for number in self.places.inputs for v in outputs.get(number, ()))
        drops = self.plan.drops or ((),) * len(self.plan.launches)
        for number, (launch, dropped) in enumerate(zip(self.plan.launches, drops, strict=True)):
            first = len(self.instructions)
            if launch.kernels:
                self._kernels(launch)
            else:
                assert launch.op is not None
                self._library(launch.op)
            # As soon as they can be had: a later launch may fail.
            self._need(v for op in launch.ops for made in op.outputs for v in outputs.get(made.id, ()))
            self._drop(dropped)
            for instruction in self.instructions[first:]:
                instruction.at = number
        self._need(self.plan.graph.outputs)

    def _awaited(self, value: Value) -> Value:
        """What must have been computed before a view can be handed out."""
        while value.id in self.places.view_op:
            value = self.places.view_op[value.id].inputs[0]
        return value

    def _kernels(self, launch: Launch) -> None:
        for access in accesses_of(launch):
            root = self.places.root[access.value.id]
            if root.id in self.places.maker:
                self._allocate(root)
        kernels = tuple(kernel for kernel in launch.kernels if kernel.n_elements)
        if not kernels:
            return
        if len(kernels) < len(launch.kernels):
            launch = replace(launch, kernels=kernels, written=None)
        instruction = self.start(launch)
        written = {store.access.value.storage for kernel in kernels for store in kernel.stores}
        instruction.commits = not written.isdisjoint(self._input_storages) or any(op.effects.random for op in launch.ops)
        self.instructions.append(instruction)

    def _library(self, op: Op) -> None:
        if all(v.id in self.places.view_op for v in op.results) and not op.rewritten:
            return self._need(op.results)
        if op.allocates:
            for value in op.results:
                if value.id not in self._arena:
                    self._make(value)
            return self._ready.update(v.id for v in op.results)
        self._need(op.inputs)
        form = out_form(op) if any(v.id in self._arena for v in op.results) else None
        if form is not None:
            for value in op.results:
                self._allocate(value)
                self._need_in_arena(value)
            self.instructions.append(library_call(op, self._input_storages, form=form, names=out_names(form)))
        else:
            addresses = tuple((v.id, self._slot(v.id, False)) for v in op.results if (v.id, False) in self._bases)
            self.instructions.append(library_call(op, self._input_storages, addresses=addresses))
            self._allocated.update(v.id for v in op.results)
        self._ready.update(v.id for v in op.outputs)

    def _slot(self, root: int, from_start: bool) -> int:
        return self._slots.setdefault((root, from_start), len(self._slots) + 1)

    def _allocate(self, root: Value) -> None:
        if root.id not in self._arena and root.id not in self._allocated:
            self._allocated.add(root.id)
            self.instructions.append(Allocate(root.id, self._slot(root.id, False), root.type))

    def _need(self, values: Iterable[Value]) -> None:
        """From here on there must be tensors for these values."""
        for value in values:
            if self.places.root[value.id].id in self._arena:
                self._need_in_arena(value)
            elif value.id not in self._ready:
                self._make(value)

    def _need_in_arena(self, value: Value) -> None:
        if self.places.root[value.id].id in self._arena:
            self.furnish[value.id] = value

    def _make(self, value: Value) -> None:
        """One by one, and not each by the one before: there may be thousands of views, each of the last."""
        waiting = [value]
        while waiting:
            value = waiting[-1]
            sources = self._made_from(value)
            self._need(v for v in sources if self.places.root[v.id].id in self._arena)
            missing = [v for v in sources if v.id not in self._ready and self.places.root[v.id].id not in self._arena]
            if not missing:
                self._make_now(waiting.pop(), sources)
            waiting += missing

    def _made_from(self, value: Value) -> tuple[Value, ...]:
        places = self.places
        if value.id not in places.before:
            return places.view_op[value.id].inputs if value.id in places.view_op else ()
        before = places.before[value.id]
        # Each write makes a new value of the same tensor, of which nobody may want those in between.
        while before.id in places.before and before.id not in self._ready:
            before = places.before[before.id]
        return (before,)

    def _make_now(self, value: Value, sources: tuple[Value, ...]) -> None:
        if value.id in self.places.before:
            self.instructions.append(Alias(value.id, sources[0].id))
        elif value.id in self.places.view_op:
            op = self.places.view_op[value.id]
            self.instructions.append(Call(op))
            self._ready.update(v.id for v in op.results)
        else:
            self._allocate(value)
            self.instructions.append(Publish(value.id))
        self._ready.add(value.id)

    def _drop(self, storages: tuple[int, ...]) -> None:
        """What somebody outside holds is kept: an output and, for addresses and views yet to be made, its family."""
        numbers = {number for storage in storages for number in self.places.by_storage.get(storage, ())}
        numbers = {n for n in numbers if (root := self.places.root[n].id) not in self._kept and root not in self._arena}
        if numbers:
            self._ready -= numbers
            self.instructions.append(Drop(tuple(sorted(numbers))))


def accesses_of(launch: Launch) -> list[Access]:
    """Everything that the kernels of a launch read and write."""
    return [a for kernel in launch.kernels for a in (*kernel.loads, *(s.access for s in kernel.stores))]
