"""When two kernels have the same text, told without writing it; and when they may share a launch."""

from collections.abc import Hashable, Iterator
from functools import lru_cache
from typing import Any

import kitsune.codegen.rules  # noqa: F401 -- fills the table
from kitsune.codegen.lowering import Rule, arguments_of, base_name, lower_rules
from kitsune.codegen.tiles import inner, is_looped
from kitsune.codegen.walks import ONE, accesses, counted, form_of, is_read, operands_by_value, walk, walks
from kitsune.codegen.windows import is_window, window_key
from kitsune.ir import Slot, Value
from kitsune.ir.plan import Kernel, Step

# Numbers that choose between formulas instead of taking part in one.
STRUCTURAL = frozenset("decimals is_result maximize amsgrad nesterov is_first_step".split())
# What a reduction reduces is the kernel's to know, and is in no text.
UNSEEN = frozenset("dim keepdim normalized_shape output_mask half_to_float dtype input_dtype".split())
# A kernel's row in the table of a batch: its addresses and numbers. More would not pay for the loads of the row.
MAX_COLUMNS = 64


# Asked for when kernels are put together, written and passed their parameters: ResNet-50's 700 three times.
@lru_cache(2048)
def text_key(kernel: Kernel) -> tuple[Any, ...]:
    """Equal for two kernels exactly if `render` gives them the same text but for the name, moving numbers in memory or not."""
    if is_window(kernel):
        return window_key(kernel)
    key = _rows_key(kernel) if kernel.reduced else _elements_key(kernel)
    return key if kernel.rounds else (*key, "rounds what it stores")


def _elements_key(kernel: Kernel) -> tuple[Any, ...]:
    domain = kernel.domain
    n_dims = len(counted(domain))
    forms = [(a.value.type.dtype, walk(domain, a.strides)) for a in kernel.loads]
    stores = [(s.source, s.access.value.type.dtype, walk(domain, s.access.strides)) for s in kernel.stores]
    strided = any(type(form.kind) is tuple for _, form in forms) or any(type(s[2].kind) is tuple for s in stores)
    return (n_dims if strided else 0, tuple(forms), tuple(stores), tuple(_step_key(step) for step in kernel.steps))


def call_key(kernel: Kernel) -> Hashable:
    """Equal only for kernels with equal texts that are also started with equal parameters, but for addresses."""
    strides = tuple(access.strides for access in accesses(kernel))
    numbers = [a for step in kernel.steps for a in arguments_of(step.op).values() if type(a) is not Value]
    # Of an image whose neighbours are read, the domain does not tell the size.
    sizes = tuple(access.value.type.shape for access in kernel.loads) if is_window(kernel) else ()
    # As text: -0.0 is another number than 0.0, and 1 than 1.0 and True.
    return text_key(kernel), kernel.domain, kernel.reduced, strides, sizes, repr(numbers)


def _rows_key(kernel: Kernel) -> tuple[Any, ...]:
    forms = [form_of(kernel, a) for a in accesses(kernel)]
    cut = len(kernel.domain) - kernel.reduced
    n_rows = len(counted(kernel.domain[kernel.first : cut])) if any(type(form.rows) is tuple for form in forms) else 0
    n_columns = len(counted(kernel.domain[cut:])) if any(type(form.columns) is tuple for form in forms) else 0
    types = tuple(a.value.type.dtype for a in accesses(kernel))
    sources = tuple(store.source for store in kernel.stores)
    # Whether the loop's stores may come early depends on what else is read of their memory.
    again = tuple(is_read(kernel, store) for store in kernel.stores) if is_looped(kernel) else ()
    steps = tuple(_step_key(step) for step in kernel.steps)
    turns = (kernel.gathered, tuple(a.strides[0] != 0 for a in accesses(kernel))) if kernel.gathered else ()
    return (inner(kernel), is_looped(kernel), n_rows, n_columns, tuple(forms), types, sources, again, steps, turns)


def _step_key(step: Step) -> tuple[Any, ...]:
    op = step.op
    operands = operands_by_value(step)
    rule = lower_rules[base_name(op)]
    # Beside a floating-point tensor, the kind of a number makes no difference.
    is_float = any(v.type.dtype.is_floating_point for v in op.inputs)
    arguments = tuple(_argument_key(name, value, operands, rule, is_float) for name, value in arguments_of(op).items())
    results = tuple((v.type.dtype, operands.get(before)) for v, before in _written(step))
    return (op.target, arguments, results)


def _written(step: Step) -> Iterator[tuple[Value, int]]:
    for value in step.op.results:
        yield value, -1
    for before, after in step.op.rewritten:
        yield after, before.id


def _argument_key(name: str, value: Any, operands: dict[int, Any], rule: Rule, is_float: bool) -> Any:
    cls = type(value)
    if name in UNSEEN:
        return None
    if cls is Value:
        return (operands.get(value.id), value.type.dtype, not value.type.shape)
    if cls is Slot:
        return Slot
    if cls in (int, float) and name in rule.literals and value in rule.floats:
        return value if is_float else (cls, value)
    if cls in (int, bool):
        return (cls, value) if name in STRUCTURAL or name in rule.literals else float if is_float else cls
    if cls is str or value is None:
        return value
    return cls


def why_not_batched(kernel: Kernel) -> str | None:
    """A sentence saying why a kernel cannot share a launch with others of the same text; None if it can."""
    if is_window(kernel):
        return "it is over windows"
    if len(kernel.loads) + len(kernel.stores) > MAX_COLUMNS:
        return f"it has more than {MAX_COLUMNS} operands"
    if not kernel.reduced and all(form.kind == ONE for form in walks(kernel)):
        return "it computes a single number for many elements"
    return None
