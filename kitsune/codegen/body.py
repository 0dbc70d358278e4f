"""What the texts of all kernels have in common: parameters with their names, loads, steps and stores, one statement each."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from kitsune.codegen.dtypes import HALF, MEMORY, cast
from kitsune.codegen.lower import lower
from kitsune.codegen.lowering import Reduce
from kitsune.codegen.machine_code import INDEX
from kitsune.codegen.walks import operands_by_value
from kitsune.ir.graph import Op, Slot
from kitsune.ir.plan import Kernel, Load, Local, Step
from kitsune.ir.program import Parameter, Pointer, Scalar, SlotAddress


@dataclass(frozen=True, slots=True)
class Named:
    """A parameter: its name, its type in the signature, and what is passed for it."""

    name: str
    type: str
    meaning: Parameter


@dataclass(slots=True)
class Body:
    """The statements of a kernel and its parameters, while they are written."""

    # The sizes of a block, as the function takes them, and the lines that say what of the domain a block is for.
    blocks: ClassVar[str]
    places: ClassVar[tuple[str, ...]]

    kernel: Kernel
    slots_in_memory: bool = False
    lines: list[str] = field(default_factory=list)
    pointers: list[Named] = field(default_factory=list)
    sizes: dict[Parameter, Named] = field(default_factory=dict)
    scalars: list[Named] = field(default_factory=list)
    locals: dict[Local, str] = field(default_factory=dict)
    loads: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    # Parameters that have a variant's divisibility: all but the addresses of single elements and numbers.
    multiples: set[str] = field(default_factory=set)
    n_temporaries: int = 0

    def write(self) -> None:
        """Loads, steps and stores."""
        raise NotImplementedError

    @property
    def extents(self) -> list[Named]:
        """What bounds the kernel's indices."""
        raise NotImplementedError

    @property
    def parameters(self) -> list[Named]:
        """In the order of the function's signature."""
        return [*self.pointers, *self.extents, *self.sizes.values(), *self.scalars]

    @property
    def reducer(self) -> Reduce | None:
        """What writes reductions, if this kernel has any."""
        return None

    def say(self, target: str, text: str, comment: str = "") -> None:
        """The statement that gives `target` its value."""
        self.lines.append(f"{target} = {text}" + (f"  # {comment}" if comment else ""))

    def pointer(self, index: int, dtype: torch.dtype) -> str:
        """The name of access number `index`, loads first."""
        n_loads = len(self.kernel.loads)
        name = f"in{index}" if index < n_loads else f"out{index - n_loads}"
        self.pointers.append(Named(name, "*" + MEMORY[dtype], Pointer(index)))
        return name

    def size(self, name: str, meaning: Parameter) -> str:
        """The name of a size or stride, which several may share."""
        named = self.sizes.setdefault(meaning, Named(name, INDEX, meaning))
        if getattr(meaning, "counts", True):
            self.multiples.add(named.name)
        return named.name

    def load(self, i: int, offset: str, mask: str) -> None:
        """Load number `i`; without an offset or a mask, of a single element."""
        dtype = self.kernel.loads[i].value.type.dtype
        place = f"in{i} + {offset}" if offset else f"in{i}"
        text = f"tl.load({place}, mask={mask})" if offset and mask else f"tl.load({place})"
        if dtype in HALF:
            text = f"{text}.to(tl.float32)"
        elif dtype is torch.bool:
            text = f"({text} != 0)"
        self.say(f"x{i}", text, str(dtype).removeprefix("torch."))
        self.loads.append(f"x{i}")

    def step(self, number: int, step: Step) -> None:
        """The statements of an op."""
        registers = {}
        for value, operand in operands_by_value(step).items():
            if operand is not None:
                registers[value] = self.loads[operand.index] if isinstance(operand, Load) else self.locals[operand]
        rounds = self.kernel.rounds or decides(step.op)
        if rounds and not self.kernel.rounds:
            self._round(step.op, registers)
        texts = lower(step.op, registers, self.scalar, self.let, self.used, self.reducer, rounds)
        overload = str(step.op.target).removeprefix("aten.")
        for output, text in enumerate(texts):
            name = f"v{number}" if len(texts) == 1 else f"v{number}_{output}"
            self.say(name, text, overload)
            self.locals[Local(number, output)] = name

    def _round(self, op: Op, registers: dict[int, str]) -> None:
        """What the steps before have left wide, as the values that eager has."""
        for value in op.inputs:
            if value.id in registers and value.type.dtype in HALF:
                registers[value.id] = self.let(cast(registers[value.id], torch.float32, value.type.dtype, self.used))

    def stored(self, i: int) -> str:
        """What store number `i` writes, as memory has it."""
        store = self.kernel.stores[i]
        text, dtype = self.locals[store.source], store.access.value.type.dtype
        if dtype in HALF and not self.kernel.rounds:
            text = cast(text, torch.float32, dtype, self.used)
        # The register was rounded before: this conversion is exact.
        text = f"{text}.to(tl.{'bfloat16' if MEMORY[dtype] == 'bf16' else 'float16'})" if dtype in HALF else text
        return f"{text}.to(tl.int8)" if dtype is torch.bool else text

    def scalar(self, scalar: Scalar) -> str:
        """The name of a Python number."""
        name = f"s{len(self.scalars)}"
        if self.slots_in_memory and isinstance(scalar.value, Slot):
            # The same conversion that a number passed by value goes through on its way into the arguments.
            rounded = "" if scalar.type == "fp64" else ".to(tl.float32)"
            self.scalars.append(Named(f"{name}_at", "*fp64", SlotAddress(scalar.value.index)))
            self.say(name, f"tl.load({name}_at){rounded}")
        else:
            self.scalars.append(Named(name, scalar.type, scalar))
        return name

    def let(self, text: str) -> str:
        """A name for a text that is used more than once."""
        if text.isidentifier():
            return text
        name = f"t{self.n_temporaries}"
        self.n_temporaries += 1
        self.say(name, text)
        return name


def decides(op: Op) -> bool:
    """Does an op make a choice or a whole number of its operands, which a difference in their last bit may turn over?"""
    return any(not v.type.dtype.is_floating_point for v in op.outputs)


def indented(lines: list[str]) -> str:
    """As the body of a function."""
    return "".join(f"    {line}\n" for line in lines)
