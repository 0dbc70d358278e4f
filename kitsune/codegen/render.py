"""A kernel of the plan as the text of a Triton kernel, in a module that can be run on its own."""

import keyword
import re
from dataclasses import dataclass, field

import torch

from kitsune.codegen.dtypes import HALF, MEMORY
from kitsune.codegen.helpers import HELPERS, helper_texts
from kitsune.codegen.keys import operands_by_value, why_not_batched
from kitsune.codegen.lower import lower
from kitsune.codegen.machine_code import INDEX
from kitsune.codegen.walks import LINEAR, ONE, Parameter, Walk, accesses, counted, walk
from kitsune.ir.graph import Slot
from kitsune.ir.plan import Access, Kernel, Load, Local, Pointer, Program, Scalar, Size, SlotAddress, Step, Stride

HEADER = """import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice
"""


def render(kernel: Kernel, batched: bool = False, slots_in_memory: bool = False) -> Program:
    """The kernel's text and parameters. Raises NotLowered for an op that `why_not_lowered` warned of.

    A batched program takes a table with a row per kernel instead: the values of `parameters` in order, then the number of
    its first block; and for each block the number of its row. With `slots_in_memory` the program takes the address of each
    moving number instead of the number, so that a CUDA graph that has captured the launch can be given other numbers.
    """
    if batched and (reason := why_not_batched(kernel)):
        raise ValueError(f"{kernel.name} cannot be batched: {reason}.")
    body = _Body(kernel, slots_in_memory)
    body.write()
    name = _identifier(kernel.name)
    function = _batched_function(name, body) if batched else _function(name, body)
    signature = {p.name: p.type for p in body.parameters}
    if batched:
        signature = {"table": "*i64", "blocks": "*i32"}
    multiples = "" if batched else "".join(f'"{p.name}", ' for p in body.parameters if p.name in body.multiples)
    parts = [
        f'"""{_summary(kernel)}"""\n',
        HEADER,
        f"SIGNATURE = {_dict_text(signature)}",
        f"MULTIPLES = ({multiples.removesuffix(' ')})\n",
        *("\n" + text for text in helper_texts(body.used)),
        "\n" + function,
    ]
    return Program(name, "\n".join(parts), tuple(p.meaning for p in body.parameters), batched)


def _identifier(name: str) -> str:
    """A function's name that hides nothing which the text calls."""
    name = re.sub(r"\W", "_", name)
    taken = keyword.iskeyword(name) or name in HELPERS or name in ("tl", "triton", "libdevice", "SIGNATURE", "MULTIPLES")
    return name if name.isidentifier() and not taken else f"kernel_{name}"


def parameters_of(kernel: Kernel, slots_in_memory: bool = False) -> tuple[Parameter, ...]:
    """What to pass to the program of a kernel with the same `text_key`."""
    body = _Body(kernel, slots_in_memory)
    body.write()
    return tuple(p.meaning for p in body.parameters)


def _summary(kernel: Kernel) -> str:
    names = [step.op.target._schema.name.rpartition("::")[2] for step in kernel.steps]
    return ", ".join(names) + "."


def _dict_text(items: dict[str, str]) -> str:
    return "{" + ", ".join(f'"{key}": "{value}"' for key, value in items.items()) + "}"


@dataclass(frozen=True, slots=True)
class _Named:
    name: str
    type: str
    meaning: Parameter


@dataclass(slots=True)
class _Body:
    """The statements of a kernel and its parameters, while they are written."""

    kernel: Kernel
    slots_in_memory: bool = False
    lines: list[str] = field(default_factory=list)
    pointers: list[_Named] = field(default_factory=list)
    sizes: dict[Parameter, _Named] = field(default_factory=dict)
    scalars: list[_Named] = field(default_factory=list)
    locals: dict[Local, str] = field(default_factory=dict)
    loads: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    # Parameters that are multiples of 16 in the aligned variant: all but the addresses of single elements and numbers.
    multiples: set[str] = field(default_factory=lambda: {"n"})
    n_temporaries: int = 0

    @property
    def parameters(self) -> list[_Named]:
        """In the order of the function's signature."""
        return [*self.pointers, _Named("n", INDEX, Size()), *self.sizes.values(), *self.scalars]

    def write(self) -> None:
        """Loads, steps and stores."""
        offsets = [self._offset(i, a) for i, a in enumerate(accesses(self.kernel))]
        self._write_coordinates()
        for i, access in enumerate(self.kernel.loads):
            self._write_load(i, access, offsets[i])
        for number, step in enumerate(self.kernel.steps):
            self._write_step(number, step)
        for i, store in enumerate(self.kernel.stores):
            text, dtype = self.locals[store.source], store.access.value.type.dtype
            # The register was rounded before: this conversion is exact.
            text = f"{text}.to(tl.{'bfloat16' if MEMORY[dtype] == 'bf16' else 'float16'})" if dtype in HALF else text
            text = f"{text}.to(tl.int8)" if dtype is torch.bool else text
            self.lines.append(f"tl.store(out{i} + {offsets[len(self.kernel.loads) + i]}, {text}, mask=inside)")

    def _offset(self, index: int, access: Access) -> str:
        n_loads = len(self.kernel.loads)
        name = f"in{index}" if index < n_loads else f"out{index - n_loads}"
        self.pointers.append(_Named(name, "*" + MEMORY[access.value.type.dtype], Pointer(index)))
        form = walk(self.kernel.domain, access.strides)
        if form.kind == LINEAR or (form.kind == ONE and index >= n_loads):
            self.multiples.add(name)
            return "index"
        if form.kind == ONE:
            return ""
        self.multiples.add(name)
        return self._strided(index, name, form)

    def _strided(self, index: int, name: str, form: Walk) -> str:
        terms = []
        for position, (d, stride) in enumerate(zip(counted(self.kernel.domain), form.kind, strict=True)):
            if stride == 0:
                continue
            if stride == 1:
                terms.append(f"i{position}")
            else:
                terms.append(f"i{position} * {self._size(f'{name}_stride{position}', Stride(index, d))}")
        return " + ".join(terms)

    def _size(self, name: str, meaning: Parameter) -> str:
        self.multiples.add(name)
        return self.sizes.setdefault(meaning, _Named(name, INDEX, meaning)).name

    def _write_coordinates(self) -> None:
        forms = [walk(self.kernel.domain, a.strides).kind for a in accesses(self.kernel)]
        strided = [kind for kind in forms if isinstance(kind, tuple)]
        if not strided:
            return
        dims = counted(self.kernel.domain)
        needed = {p for kind in strided for p, stride in enumerate(kind) if stride != 0}
        rest = "index"
        for position in range(len(dims) - 1, -1, -1):
            if position == 0:
                self.lines.append(f"i0 = {rest}")
            elif any(p <= position for p in needed):
                size = self._size(f"size{position}", Size(dims[position]))
                if position in needed:
                    self.lines.append(f"i{position} = {rest} % {size}")
                if any(p < position for p in needed):
                    self.lines.append(f"r{position} = {rest} // {size}")
                    rest = f"r{position}"
                else:
                    break

    def _write_load(self, i: int, access: Access, offset: str) -> None:
        dtype = access.value.type.dtype
        text = f"tl.load(in{i} + {offset}, mask=inside)" if offset else f"tl.load(in{i})"
        if dtype in HALF:
            text = f"{text}.to(tl.float32)"
        elif dtype is torch.bool:
            text = f"({text} != 0)"
        self.lines.append(f"x{i} = {text}  # {access.value.type.dtype}".replace("torch.", ""))
        self.loads.append(f"x{i}")

    def _write_step(self, number: int, step: Step) -> None:
        registers = {}
        for value, operand in operands_by_value(step).items():
            if operand is not None:
                registers[value] = self.loads[operand.index] if isinstance(operand, Load) else self.locals[operand]
        texts = lower(step.op, registers, self._scalar, self._let, self.used)
        overload = str(step.op.target).removeprefix("aten.")
        for output, text in enumerate(texts):
            name = f"v{number}" if len(texts) == 1 else f"v{number}_{output}"
            self.lines.append(f"{name} = {text}  # {overload}")
            self.locals[Local(number, output)] = name

    def _scalar(self, scalar: Scalar) -> str:
        name = f"s{len(self.scalars)}"
        if self.slots_in_memory and isinstance(scalar.value, Slot):
            # The same conversion that a number passed by value goes through on its way into the arguments.
            rounded = "" if scalar.type == "fp64" else ".to(tl.float32)"
            self.scalars.append(_Named(f"{name}_at", "*fp64", SlotAddress(scalar.value.index)))
            self.lines.append(f"{name} = tl.load({name}_at){rounded}")
        else:
            self.scalars.append(_Named(name, scalar.type, scalar))
        return name

    def _let(self, text: str) -> str:
        if text.isidentifier():
            return text
        name = f"t{self.n_temporaries}"
        self.n_temporaries += 1
        self.lines.append(f"{name} = {text}")
        return name


def _indented(lines: list[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)


def _function(name: str, body: _Body) -> str:
    names = ", ".join(p.name for p in body.parameters)
    start = [
        "block = tl.program_id(0)",
        "if WIDE:",
        "    block = block.to(tl.int64)",
        "index = block * BLOCK + tl.arange(0, BLOCK)",
        "inside = index < n",
    ]
    return f"@triton.jit\ndef {name}({names}, WIDE: tl.constexpr, BLOCK: tl.constexpr):\n" + _indented(start + body.lines)


def _batched_function(name: str, body: _Body) -> str:
    columns = body.parameters
    start = [f"row = table + tl.load(blocks + tl.program_id(0)).to(tl.int64) * {len(columns) + 1}"]
    start += [f"{p.name} = {_column(i, p)}" for i, p in enumerate(columns)]
    start.append("if ALIGNED:")
    start += [f"    {p.name} = tl.multiple_of({p.name}, 16)" for p in columns if p.name in body.multiples]
    start += [
        f"block = tl.program_id(0) - tl.load(row + {len(columns)})",
        "if not WIDE:",
        "    block = block.to(tl.int32)",
        "    n = n.to(tl.int32)",
        "index = block * BLOCK + tl.arange(0, BLOCK)",
        "inside = index < n",
    ]
    head = f"@triton.jit\ndef {name}(table, blocks, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):\n"
    return head + _indented(start + body.lines)


_POINTEE = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "u8": "uint8"}


def _column(i: int, parameter: _Named) -> str:
    text = f"tl.load(row + {i})"
    if parameter.type.startswith("*"):
        pointee = parameter.type[1:]
        return f"{text}.to(tl.pointer_type(tl.{_POINTEE.get(pointee, pointee.replace('i', 'int'))}))"
    if parameter.type == "fp64":
        return f"{text}.to(tl.float64, bitcast=True)"
    if parameter.type == "fp32":
        return f"{text}.to(tl.float64, bitcast=True).to(tl.float32)"
    return text
