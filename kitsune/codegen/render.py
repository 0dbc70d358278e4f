"""A kernel of the plan as the text of a Triton kernel, in a module that can be run on its own."""

import keyword
import re
from collections.abc import Hashable
from typing import TypeVar

from kitsune.codegen.body import Body, Named, indented
from kitsune.codegen.helpers import HELPERS, helper_texts
from kitsune.codegen.keys import call_key, why_not_batched
from kitsune.codegen.machine_code import INDEX
from kitsune.codegen.rows import Rows
from kitsune.codegen.tiles import tile_of
from kitsune.codegen.turns import Turns
from kitsune.codegen.walks import LINEAR, ONE, Walk, accesses, coordinates, counted, walk
from kitsune.codegen.windows import Windows, is_window
from kitsune.ir.plan import Access, Kernel
from kitsune.ir.program import Parameter, Program, Size, Stride, Written

HEADER = """import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait, libdevice
"""

# What a launch has to come after is over from here on, and all that it wrote can be seen.
WAIT = ("if EARLY:", "    gdc_wait()")

T = TypeVar("T")


class _Known(dict[Hashable, T]):
    """What was made of kernels before: of the 710 of BERT's step, 59 differ in more than their addresses."""

    def keep(self, key: Hashable, made: T) -> T:
        """Returns what it keeps."""
        if len(self) >= MAX_KNOWN:
            self.clear()
        self[key] = made
        return made


MAX_KNOWN = 4096
_programs: _Known[Program] = _Known()
_parameters: _Known[tuple[Parameter, ...]] = _Known()


def render(kernel: Kernel, batched: bool = False, slots_in_memory: bool = False) -> Program:
    """The kernel's text and parameters. Raises NotLowered for an op that `why_not_lowered` warned of.

    A batched program takes a table with a row per kernel instead: the values of `parameters` in order, then the number of
    its first block; and for each block the number of its row. With `slots_in_memory` the program takes the address of each
    moving number instead of the number, so that a CUDA graph that has captured the launch can be given other numbers. The tile
    is the first choice; the text is the same for any.
    """
    if batched and (reason := why_not_batched(kernel)):
        raise ValueError(f"{kernel.name} cannot be batched: {reason}.")
    key = (call_key(kernel), kernel.name, batched, slots_in_memory)
    return _programs.get(key) or _programs.keep(key, _rendered(kernel, batched, slots_in_memory))


def write(kernels: tuple[Kernel, ...], slots_in_memory: bool = False) -> Written:
    """What to keep with a launch of these kernels, so that nothing has to be rendered for it again. Raises NotLowered."""
    program = render(kernels[0], len(kernels) > 1, slots_in_memory)
    return Written(program, tuple(parameters_of(kernel, slots_in_memory) for kernel in kernels[1:]), slots_in_memory)


def _rendered(kernel: Kernel, batched: bool, slots_in_memory: bool) -> Program:
    body = body_of(kernel, slots_in_memory)
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
    return Program(name, "\n".join(parts), tuple(p.meaning for p in body.parameters), batched, tile_of(kernel))


def body_of(kernel: Kernel, slots_in_memory: bool) -> Body:
    """A kernel's statements and parameters."""
    rows = Turns if kernel.gathered else Rows
    kind = Windows if is_window(kernel) else rows if kernel.reduced else _Pointwise
    body = kind(kernel, slots_in_memory)
    body.write()
    return body


def _identifier(name: str) -> str:
    """A function's name that hides nothing which the text calls."""
    name = re.sub(r"\W", "_", name)
    taken = keyword.iskeyword(name) or name in HELPERS or name in ("tl", "triton", "libdevice", "SIGNATURE", "MULTIPLES")
    return name if name.isidentifier() and not taken else f"kernel_{name}"


def parameters_of(kernel: Kernel, slots_in_memory: bool = False) -> tuple[Parameter, ...]:
    """What to pass to the program of a kernel with the same `text_key`."""
    key = (call_key(kernel), slots_in_memory)
    known = _parameters.get(key)
    if known is None:
        known = _parameters.keep(key, tuple(p.meaning for p in body_of(kernel, slots_in_memory).parameters))
    return known


def _summary(kernel: Kernel) -> str:
    names = [step.op.target._schema.name.rpartition("::")[2] for step in kernel.steps]
    return ", ".join(names) + "."


def _dict_text(items: dict[str, str]) -> str:
    return "{" + ", ".join(f'"{key}": "{value}"' for key, value in items.items()) + "}"


class _Pointwise(Body):
    """A kernel over elements, by one index."""

    blocks = "BLOCK: tl.constexpr"
    places = ("index = block * BLOCK + tl.arange(0, BLOCK)", "inside = index < n")

    @property
    def extents(self) -> list[Named]:
        """The number of elements."""
        return [Named("n", INDEX, Size())]

    def write(self) -> None:
        """Loads, steps and stores."""
        self.multiples.add("n")
        offsets = [self._offset(i, a) for i, a in enumerate(accesses(self.kernel))]
        self._write_coordinates()
        for i in range(len(self.kernel.loads)):
            self.load(i, offsets[i], "inside")
        for number, step in enumerate(self.kernel.steps):
            self.step(number, step)
        for i in range(len(self.kernel.stores)):
            self.lines.append(f"tl.store(out{i} + {offsets[len(self.kernel.loads) + i]}, {self.stored(i)}, mask=inside)")

    def _offset(self, index: int, access: Access) -> str:
        name = self.pointer(index, access.value.type.dtype)
        form = walk(self.kernel.domain, access.strides)
        if form.kind == LINEAR or (form.kind == ONE and index >= len(self.kernel.loads)):
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
                terms.append(f"i{position} * {self.size(f'{name}_stride{position}', Stride(index, d, form.kind[-1] == 1))}")
        return " + ".join(terms)

    def _write_coordinates(self) -> None:
        forms = [walk(self.kernel.domain, a.strides).kind for a in accesses(self.kernel)]
        strided = [kind for kind in forms if isinstance(kind, tuple)]
        if not strided:
            return
        dims = counted(self.kernel.domain)
        needed = {p for kind in strided for p, stride in enumerate(kind) if stride != 0}

        def size(position: int) -> str:
            # Where neighbours in memory are to be one access: only the innermost size says where a row of them ends.
            return self.size(f"size{position}", Size(dims[position], position == len(dims) - 1))

        self.lines += coordinates("index", "i", "r", needed, len(dims), size)


def _function(name: str, body: Body) -> str:
    """The function that Triton compiles."""
    names = ", ".join(p.name for p in body.parameters)
    start = [*WAIT, "block = tl.program_id(0)", "if WIDE:", "    block = block.to(tl.int64)"]
    head = f"@triton.jit\ndef {name}({names}, EARLY: tl.constexpr, WIDE: tl.constexpr, {body.blocks}):\n"
    return head + indented([*start, *body.places, *body.lines])


def _batched_function(name: str, body: Body) -> str:
    """The same for many kernels, with the parameters of each in an entry of a table."""
    columns = body.parameters
    start = [f"entry = table + tl.load(blocks + tl.program_id(0)).to(tl.int64) * {len(columns) + 1}"]
    start += [f"{p.name} = {_column(i, p)}" for i, p in enumerate(columns)]
    start.append("if ALIGNED:")
    start += [f"    {p.name} = tl.multiple_of({p.name}, 16)" for p in columns if p.name in body.multiples]
    start += [f"block = tl.program_id(0) - tl.load(entry + {len(columns)})", "if not WIDE:", "    block = block.to(tl.int32)"]
    start += [f"    {p.name} = {p.name}.to(tl.int32)" for p in columns if p.type == INDEX]
    # Behind the table, which no kernel writes.
    start += WAIT
    constants = "ALIGNED: tl.constexpr, EARLY: tl.constexpr, WIDE: tl.constexpr"
    head = f"@triton.jit\ndef {name}(table, blocks, {constants}, {body.blocks}):\n"
    return head + indented([*start, *body.places, *body.lines])


_POINTEE = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "u8": "uint8"}


def _column(i: int, parameter: Named) -> str:
    text = f"tl.load(entry + {i})"
    if parameter.type.startswith("*"):
        pointee = parameter.type[1:]
        return f"{text}.to(tl.pointer_type(tl.{_POINTEE.get(pointee, pointee.replace('i', 'int'))}))"
    if parameter.type == "fp64":
        return f"{text}.to(tl.float64, bitcast=True)"
    if parameter.type == "fp32":
        return f"{text}.to(tl.float64, bitcast=True).to(tl.float32)"
    return text
