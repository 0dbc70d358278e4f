"""The text of a reduction: of what a block holds at once, or of a loop that begins, turns and ends.

In a loop every place of the tile gathers the elements that come by there, and only at the end are the places of a row put
together: a sum of long rows is as exact as one by pairs. What lies beyond a row's end must not count, whatever was loaded.

The largest and smallest of floats are NaN where there is one, though `tl.max` and `tl.min` pass NaN over: comparing keeps it in a
place of the tile, and it is looked for among the places.
"""

from typing import Protocol

import torch

from kitsune.codegen.dtypes import FLOATING, LANGUAGE

# Larger than any position.
NOWHERE = 2**31 - 1


class Reduced(Protocol):
    """What is reduced: the text of the elements, the names of the results, and the dtype to reduce in.

    `spread`: is something made of a result for every element? `neighbours` in a row lie in one thread's registers.
    """

    @property
    def targets(self) -> tuple[str, ...]: ...

    @property
    def text(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def spread(self) -> bool: ...

    @property
    def neighbours(self) -> int: ...


def at_once(s: Reduced) -> list[str]:
    """The row lies in registers."""
    x, names = s.text, s.targets
    if s.kind == "moments":
        mean, squares = names
        apart = f"({x} - {mean})"
        return [f"{mean} = {_per_column(_sum(x), s.dtype)}", f"{squares} = {_sum(f'{apart} * {apart}')}"]
    if s.kind == "softmax":
        top, total = names
        return [
            f"{top} = {_whole('max', x, s.dtype)}",
            f"{top}_near = {_finite(top)}",
            f"{total} = {_sum(f'libdevice.exp({x} - {top}_near)')}",
        ]
    inside = f"tl.where(in_columns, {x}, {identity(s.kind, s.dtype)})"
    if s.kind.startswith("first "):
        return _first(s, inside, "column")
    return _extreme(s, inside) if s.kind != "sum" else [f"{names[0]} = {_of_rows(s, s.kind, inside)}"]


def first(s: Reduced) -> list[str]:
    """Of the row's first elements, before the loop: the mean of them."""
    if s.kind != "moments":
        return []
    share = _reciprocal(f"tl.minimum(columns, RBLOCK).to({LANGUAGE[s.dtype]})", s.dtype)
    return [f"{s.targets[0]}_first = {_over('sum', f'tl.where(in_columns, {s.text}, 0.0)')} * {share}"]


def begin(s: Reduced) -> list[str]:
    """Before the loop: what each place of the tile gathers."""
    if s.kind == "moments":
        return [_full(f"{name}_each", "0.0", s.dtype) for name in s.targets]
    if s.kind == "softmax":
        top, total = s.targets
        places = f"RBLOCK // {s.neighbours}"
        return [
            _full(f"{top}_each", "float('-inf')", s.dtype, places),
            _full(f"{total}_each", "0.0", s.dtype, places),
        ]
    # As wide as what counts the columns.
    number = "tl.int64 if WIDE else tl.int32"
    positions = [f"{s.targets[1]}_each = tl.full([XBLOCK, RBLOCK], {NOWHERE}, {number})"] if s.kind.startswith("first ") else []
    return [_full(f"{s.targets[0]}_each", identity(s.kind, s.dtype), s.dtype), *positions]


def turn(s: Reduced) -> list[str]:
    """Inside of the loop."""
    x = s.text
    each = [f"{name}_each" for name in s.targets]
    if s.kind == "moments":
        # The sum, and that of the squares of distances from the mean of the row's first elements, which is near that of all: they
        # lose little more than the additions round. A running mean takes a division more, and was limited by its arithmetic
        # (ResNet-50's largest images on an H200: 142 us, of which the bytes take 24).
        apart = f"{s.targets[0]}_apart"
        return [
            f"{apart} = tl.where(in_columns, {x} - {s.targets[0]}_first, 0.0)",
            f"{each[0]} = tl.where(in_columns, {each[0]} + {x}, {each[0]})",
            f"{each[1]} = libdevice.fma({apart}, {apart}, {each[1]})",
        ]
    if s.kind == "softmax":
        top, total = each
        # Neighbours have one maximum, so that what was gathered shrinks once for all of them: 16 instructions for an element of
        # 16 bits instead of 29 with a maximum for each place of the tile.
        tile, now, near = (f"{s.targets[0]}_{word}" for word in ("tile", "now", "near"))
        shape = f"(XBLOCK, RBLOCK // {s.neighbours}, {s.neighbours})"
        return [
            f"{tile} = tl.reshape(tl.where(in_columns, {x}, float('-inf')), {shape})",
            f"{now} = tl.maximum({top}, tl.max({tile}, 2))",
            f"{near} = {_finite(now)}",
            f"{total} = {total} * libdevice.exp({top} - {near}) + tl.sum(libdevice.exp({tile} - {near}[:, :, None]), 2)",
            f"{top} = {now}",
        ]
    if s.kind.startswith("first "):
        further = f"({x} {'>' if s.kind.endswith('max') else '<'} {each[0]})"
        if s.dtype in FLOATING:
            # Also a NaN behind numbers: one comparison that is true of it, and one of what was found.
            further = f"~({x} {'<=' if s.kind.endswith('max') else '>='} {each[0]}) & ({each[0]} == {each[0]})"
        better = f"{s.targets[0]}_better"
        return [
            f"{better} = in_columns & {further}",
            f"{each[0]} = tl.where({better}, {x}, {each[0]})",
            f"{each[1]} = tl.where({better}, column, {each[1]})",
        ]
    keeps = ", propagate_nan=tl.PropagateNan.ALL" if s.dtype in FLOATING else ""
    joined = f"{each[0]} + {x}" if s.kind == "sum" else f"tl.{s.kind}imum({each[0]}, {x}{keeps})"
    return [f"{each[0]} = tl.where(in_columns, {joined}, {each[0]})"]


def end(s: Reduced) -> list[str]:
    """After the loop: the places of a row put together."""
    each = [f"{name}_each" for name in s.targets]
    if s.kind == "moments":
        mean, squares = s.targets
        n, own, place = f"{mean}_n", f"{mean}_own", "tl.arange(0, RBLOCK)[None, :]"
        apart = f"({own} - {mean})"
        return [
            f"{n} = tl.where({place} < columns, (columns - 1 - {place}) // RBLOCK + 1, 0).to({LANGUAGE[s.dtype]})",
            f"{own} = {each[0]} * {_reciprocal(f'tl.where({n} > 0, {n}, 1.0)', s.dtype)}",
            f"{each[1]} = {each[1]} - {n} * ({own} - {mean}_first) * ({own} - {mean}_first)",
            f"{mean} = {_per_column(_over('sum', each[0]), s.dtype)}",
            f"{squares} = {_over('sum', f'{each[1]} + {n} * {apart} * {apart}')}",
        ]
    if s.kind == "softmax":
        top, total = s.targets
        return [
            f"{top} = {_over('max', each[0])}",
            f"{top}_near = {_finite(top)}",
            f"{total} = {_over('sum', f'{each[1]} * libdevice.exp({each[0]} - {top}_near)')}",
        ]
    if s.kind.startswith("first "):
        # Of a place where nothing was better than nothing, all elements are alike, and the first is that of the first turn.
        place = "tl.arange(0, RBLOCK)[None, :]"
        return _first(s, each[0], f"tl.where({each[1]} == {NOWHERE}, {place}, {each[1]})")
    return _extreme(s, each[0]) if s.kind != "sum" else [f"{s.targets[0]} = {_of_rows(s, s.kind, each[0])}"]


def _extreme(s: Reduced, x: str) -> list[str]:
    """The largest or smallest of a tile."""
    if s.dtype not in FLOATING:
        return [f"{s.targets[0]} = {_of_rows(s, s.kind, x)}"]
    tile = f"{s.targets[0]}_tile"
    unordered = _of_rows(s, "max", f"({tile} != {tile}).to(tl.int32)")
    return [
        f"{tile} = {x}",
        f"{s.targets[0]} = tl.where({unordered} > 0, float('nan'), {_of_rows(s, s.kind, tile)})",
    ]


def _first(s: Reduced, x: str, position: str) -> list[str]:
    """The extreme of a tile, and the first position where it is; of a NaN, where the first of those is."""
    value, place = s.targets
    kind, tile = s.kind.removeprefix("first "), f"{value}_tile"
    lines, found, after = [f"{tile} = {x}", f"{value} = {_over(kind, tile)}"], f"{tile} == {value}", list[str]()
    if s.dtype in FLOATING:
        lines.append(f"{value}_nan = {_over('max', f'({tile} != {tile}).to(tl.int32)')} > 0")
        found = f"tl.where({value}_nan, {tile} != {tile}, {found})"
        after.append(f"{value} = tl.where({value}_nan, float('nan'), {value})")
    # A tile may be wider than a row: what lies beyond it looks like the smallest.
    counts = f"(tl.arange(0, RBLOCK)[None, :] < columns) & ({found})"
    return [*lines, f"{place} = {_of_rows(s, 'min', f'tl.where({counts}, {position}, {NOWHERE})')}", *after]


def identity(kind: str, dtype: torch.dtype) -> str:
    """What changes no result."""
    kind = kind.removeprefix("first ")
    if kind == "sum":
        return "0.0" if dtype in FLOATING else "0"
    if dtype in FLOATING:
        return "float('-inf')" if kind == "max" else "float('inf')"
    limits = torch.iinfo(dtype)
    return str(limits.min if kind == "max" else limits.max)


def _finite(top: str) -> str:
    """What exponentials are taken relative to: of an infinity there are no distances."""
    return f"tl.where(tl.abs({top}) == float('inf'), 0.0, {top})"


def _reciprocal(x: str, dtype: torch.dtype) -> str:
    return f"(1.0 / {x})" if dtype is torch.float64 else f"tl.div_rn(1.0, {x})"


def _per_column(x: str, dtype: torch.dtype) -> str:
    return f"{x} / columns" if dtype is torch.float64 else f"tl.div_rn({x}, columns.to(tl.float32))"


def _sum(x: str) -> str:
    return _whole("sum", x, torch.float32)


def _whole(kind: str, x: str, dtype: torch.dtype) -> str:
    return _over(kind, f"tl.where(in_columns, {x}, {identity(kind, dtype)})")


def _of_rows(s: Reduced, kind: str, x: str) -> str:
    """A number of each row. Where only such are made of it, Triton 3.6 does not compile the form that can be spread over a row
    ("operand #1 does not dominate this use", in the pass that removes conversions between layouts)."""
    return _over(kind, x) if s.spread else f"tl.reshape(tl.{kind}({x}, 1), (XBLOCK, 1))"


def _over(kind: str, x: str) -> str:
    return f"tl.{kind}({x}, 1, keep_dims=True)"


def _full(name: str, number: str, dtype: torch.dtype, places: str = "RBLOCK") -> str:
    return f"{name} = tl.full([XBLOCK, {places}], {number}, {LANGUAGE[dtype]})"
