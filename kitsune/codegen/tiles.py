"""How a kernel goes through memory: by elements, by rows or by columns, with a whole row at once or in a loop.

The first choice of a tile is made from sizes alone, and is the same wherever and whenever it is made. `candidates` are those
that a measurement may find to be faster.
"""

import math
from collections.abc import Iterable

from kitsune.codegen.machine_code import ELEMENTS
from kitsune.codegen.walks import accesses, counted
from kitsune.ir import Kind, Op
from kitsune.ir.plan import Access, Kernel, Local, touched_bytes
from kitsune.ir.program import Tile

# Elements of a row that a block holds in registers; longer rows are read once for each reduction that depends on another.
PERSISTENT = 4096
# A loop reads a row once more for what is written along it. Rows up to WRITTEN are held by MOST_WARPS instead, if all operands
# together have HELD elements or fewer: a layer norm of 16384 takes 98 registers of a thread, one of 32768 would spill.
WRITTEN, HELD = 16384, 49152
# The same where neighbours in memory belong to different rows, a block having some dozens of them at a time. Fewer are held
# where a loop would not read them again: the bias gradient behind ViT-B/16's activation took 104 us of an H200 with 64 held, 92
# with 16.
PERSISTENT_OUTER, PERSISTENT_ONCE = 128, 32
# Elements of a block where rows are short, and of a turn of the loop where they are long. A position is kept beside each: with
# half as many argmax of 30,522 takes 68 us of an H200, with as many 77.
SHORT, LONG = 1024, 2048
# Rows of which a block reads neighbouring elements: 128 bytes of a 16-bit type.
NEIGHBOURS = 64
OUTER = 4096
# Widths for a row that is the only one. It is the work of one block, of which eight times the widest would be done before another
# launch has begun (`scheduler.cost.ONE_BLOCK`); with a width for each power of two, a mean of 1,000 batch sizes had 12 kernels.
ONLY_ROW = (256, 1024, PERSISTENT)
# Blocks that fill the largest device known, twice over. With fewer, smaller ones are taken.
ENOUGH = 264
# With fewer blocks of rows that are long, each has more on its way. Ops that leave room for twice the elements.
FEW, MANY_COLUMNS, FEW_STEPS = 2 * ENOUGH, 256, 4
# Elements that a thread holds of each operand: about, where a kernel reduces, and at most, which is half of its registers.
PER_THREAD, MOST_PER_THREAD = 8, 128
# Elements of all operands that a thread holds of rows in registers that are only read, twice as many rows in a block; and of one
# operand whose rows are written. The fewer warps share a row, the less they wait for each other. On an H200, in us, of 1,024
# elements with four warps and with one: sums 43 and 33, softmax 80 and 68, layer norm 73 and 68; means of 196, four rows by four
# warps and eight by one: 84 and 50. Where two operands are added first, a layer norm's 32 are as fast with four warps.
READ_PER_THREAD, WRITTEN_PER_THREAD = 64, 32
# Warps that keep the largest device known busy: with fewer rows, more of them share one.
BUSY = 4224
MOST_WARPS = 16
# Where few columns of many rows are read once: a mean of 196 takes 53 us of an H200 so, with 64, 16, 4 it takes 64.
FEW_TURNS = (256, 2, 4)
# Elements of a row that one place of a tile adds up, one after the other: more in no tile but the first choice, for a sum loses
# half an epsilon with each.
MOST_TERMS = 128
# Tiles that are tried, the first choice among them.
TRIED = 6
# Reductions of which no bit depends on the order in which they are made.
IN_ANY_ORDER = frozenset("amax amin max min argmax argmin".split())


def inner(kernel: Kernel) -> bool:
    """Do most bytes lie so that neighbours in memory belong to one row?"""
    first = len(kernel.domain) - kernel.reduced
    votes = 0
    for access in accesses(kernel):
        moves = [(access.strides[d], d) for d in counted(kernel.domain) if access.strides[d]]
        if moves and moves[-1][1] >= first:
            votes += touched_bytes(access, kernel.domain) * (1 if min(moves)[1] >= first else -1)
    return votes >= 0


def is_looped(kernel: Kernel) -> bool:
    """Is a row too long to be held in registers?"""
    if not inner(kernel):
        return kernel.n_columns > (PERSISTENT_ONCE if _reads_once(kernel) else PERSISTENT_OUTER)
    return kernel.n_columns > PERSISTENT and not _is_held(kernel)


def keeps_rows(kernel: Kernel) -> bool:
    """Can each block have one row after the other in registers, and are there enough blocks?"""
    return inner(kernel) and kernel.n_columns <= PERSISTENT and kernel.n_rows * _power(kernel.n_columns) >= ENOUGH * SHORT


def _reads_once(kernel: Kernel) -> bool:
    """Is nothing reduced or written along a row that depends on what was reduced before?"""
    first = len(kernel.domain) - kernel.reduced
    known: set[int] = set()
    for number, step in enumerate(kernel.steps):
        behind = any(isinstance(operand, Local) and operand.step in known for operand in step.operands)
        if step.op.kind is Kind.REDUCTION and behind:
            return False
        if behind or step.op.kind is Kind.REDUCTION:
            known.add(number)
    return not any(store.source.step in known and any(store.access.strides[first:]) for store in kernel.stores)


def _is_held(kernel: Kernel) -> bool:
    first = len(kernel.domain) - kernel.reduced
    along = [a for a in accesses(kernel) if any(a.strides[first:])]
    written = any(store.access in along for store in kernel.stores)
    words = sum(max(a.value.type.dtype.itemsize // 4, 1) for a in along if a in kernel.loads)
    return written and kernel.n_columns <= WRITTEN and _power(kernel.n_columns) * words <= HELD


def tile_of(kernel: Kernel) -> Tile:
    """The first choice for a kernel, by its sizes; no text depends on it."""
    if not kernel.reduced:
        much = kernel.n_elements >= 2 * ELEMENTS[0] * ENOUGH and any(step.op.target._opname == "gelu" for step in kernel.steps)
        # Two vectors a thread of what its arithmetic limits: the GELU of 25 million elements takes 31 us of an H200 so, else 34.
        return Tile(2 * ELEMENTS[0], 0, ELEMENTS[2]) if much else Tile(*ELEMENTS)
    rows, columns = max(kernel.n_rows, 1), max(kernel.n_columns, 1)
    if not inner(kernel) and not any(step.op.kind is Kind.REDUCTION for step in kernel.steps):
        return Tile(_fitting(rows, 2 * NEIGHBOURS, 16), _power(columns), 4)
    if kernel.gathered:
        width = _whole(kernel)
        height = _fitting(rows, SHORT // width, 1)
        return Tile(height, width, min(max(_power(height * width // (32 * PER_THREAD)), 1), MOST_WARPS))
    if inner(kernel):
        if not is_looped(kernel):
            return _held(kernel, rows)
        width = min(_power(columns), LONG // 2 if _finds_positions(kernel) else LONG)
        height = _fitting(rows, SHORT // width, 1)
    elif is_looped(kernel):
        if _takes_few(kernel, rows):
            return Tile(*FEW_TURNS)
        height = _fitting(rows, NEIGHBOURS, 16)
        # With fewer neighbours a turn takes more of each row: less turns, and shorter sums in every place of the tile.
        width = min(_power(columns), _turn(kernel, math.ceil(rows / height)) * NEIGHBOURS // height)
        return Tile(height, width, min(8 if width > NEIGHBOURS // 2 else 4, _warps(height, width)))
    else:
        width = min(_power(columns), PERSISTENT_OUTER)
        height = _fitting(rows, min(NEIGHBOURS, OUTER // width), 16)
    return Tile(height, width, _warps(height, width))


def _held(kernel: Kernel, rows: int) -> Tile:
    """Whole rows in registers."""
    width, reads = _whole(kernel), _reads_once(kernel)
    height = _fitting(rows, (2 * SHORT if reads else SHORT) // width, 1)
    if width > PERSISTENT:
        return Tile(height, width, MOST_WARPS)
    operands = max(len(_moving(kernel, kernel.loads)), 1)
    per_thread = READ_PER_THREAD // _power(operands) if reads else WRITTEN_PER_THREAD if operands == 1 else PER_THREAD
    # A float64 takes two registers, and what many ops make of it, or the library's functions, takes some beside them.
    types = [value.type.dtype for step in kernel.steps for value in step.op.inputs]
    is_double = any(dtype.is_floating_point and dtype.itemsize > 4 for dtype in types)
    per_thread = max(per_thread >> (is_double + (len(kernel.steps) > FEW_STEPS)), PER_THREAD)
    warps = max(height * width // (32 * per_thread), 1)
    while warps < _warps(height, width) and math.ceil(rows / height) * warps < BUSY:
        warps *= 2
    return Tile(height, width, warps)


def _takes_few(kernel: Kernel, rows: int) -> bool:
    """Is one operand read in few turns, by many blocks?"""
    height, width, _ = FEW_TURNS
    is_one = len(_moving(kernel, accesses(kernel))) == 1
    return is_one and _only_adds(kernel) and kernel.n_columns <= MOST_TERMS * width and rows >= FEW * height


def _finds_positions(kernel: Kernel) -> bool:
    return any(
        step.op.target._opname in ("argmax", "argmin") or (len(step.op.results) == 2 and step.op.target._opname in ("max", "min"))
        for step in kernel.steps
    )


def keeps_bits(kernel: Kernel) -> bool:
    """Are a kernel's results the same to the last bit with any tile? A sum depends on the order in which it is made, that on
    which thread holds which elements, and that on the tile."""
    return all(_in_any_order(step.op) for step in kernel.steps if step.op.kind is Kind.REDUCTION)


def _in_any_order(op: Op) -> bool:
    return op.target._opname in IN_ANY_ORDER or not any(v.type.dtype.is_floating_point for v in (*op.inputs, *op.results))


def candidates(kernel: Kernel) -> tuple[Tile, ...]:
    """Tiles that may be faster than the first, which is the first choice: the nearest ones, with more or fewer warps for the same
    elements, or more or fewer elements."""
    first = tile_of(kernel)
    found = {first: None}
    for tile in _others(kernel, first):
        if _is_possible(kernel, tile) and _is_as_exact(kernel, tile, first):
            found[tile] = None
    return tuple(found)[:TRIED]


def _others(kernel: Kernel, first: Tile) -> Iterable[Tile]:
    rows, columns, warps = first.rows, first.columns, first.warps
    if not kernel.reduced:
        return (Tile(n, 0, w) for n, w in ((512, 4), (1024, 4), (1024, 8), (2048, 8), (2048, 4), (512, 2)))
    if not is_looped(kernel):
        heights = ((rows, 2 * warps), (rows, warps // 2), (2 * rows, 2 * warps), (rows, 4 * warps), (rows // 2, warps))
        return (Tile(height, columns, n) for height, n in heights)
    if inner(kernel):
        return (Tile(rows, width, n) for width, n in ((1024, 4), (LONG, 4), (4096, 8), (4096, 16), (1024, 8)))
    shapes = [(64, 16, 4), (64, 32, 4), (64, 64, 8), (128, 32, 4), (128, 64, 8), (128, 16, 4)]
    if rows < NEIGHBOURS:
        half = columns // 2
        shapes = [(rows, half, 4), (rows, columns, 4), (rows, columns, 8), (2 * rows, half, 4), (2 * rows, half, 8)]
    return (Tile(*shape) for shape in shapes)


def _is_possible(kernel: Kernel, tile: Tile) -> bool:
    """Has every thread something to do, and room for it?"""
    per_thread = tile.rows * max(tile.columns, 1) / (32 * max(tile.warps, 1))
    fits = tile.rows >= 1 and 1 <= tile.warps <= MOST_WARPS and 1 <= per_thread <= MOST_PER_THREAD
    return fits and tile.rows <= _power(kernel.n_rows) and tile.columns <= _whole(kernel)


def _is_as_exact(kernel: Kernel, tile: Tile, first: Tile) -> bool:
    return tile.columns >= first.columns or kernel.n_columns <= MOST_TERMS * tile.columns


def _turn(kernel: Kernel, blocks: int) -> int:
    """Columns of a turn where neighbours belong to different rows and a row is long, by what moves with both.

    Times on an H200, in us, with 64, 16, 4 and 64, 32, 4. One operand, ResNet-50's statistics: 34 and 69. Two: the sums behind
    its first rectifier, 85 and 58; with a result, ViT-B/16's activation's backward, 82 and 78, but GPT-2's of 22 ops, whose
    numbers fill the registers, 63 and 68. The sums behind an addition, of four and a result: 126 and 160, but of 128 columns 54
    and 49; of five: 169 and 158. The bias gradient of BERT's words, one operand of 477 blocks: 298 and 285, and 89 with 64, 64,
    8 and turns under way.
    """
    moving = _moving(kernel, accesses(kernel))
    loads = [a for a in moving if a in kernel.loads]
    if len(moving) == 1:
        few = blocks < FEW and kernel.n_columns >= MANY_COLUMNS and _only_adds(kernel)
        return 64 if few else 16
    two = len(loads) == 2 and (len(moving) == 2 or len(kernel.steps) <= FEW_STEPS)
    many = len(moving) > 5 or (len(moving) == 5 and kernel.n_columns < MANY_COLUMNS)
    return 32 if two or many else 16


def _moving(kernel: Kernel, found: Iterable[Access]) -> list[Access]:
    """Those that have an element of their own for each row and column."""
    first = len(kernel.domain) - kernel.reduced
    return [a for a in found if any(a.strides[:first]) and any(a.strides[first:])]


def _only_adds(kernel: Kernel) -> bool:
    return all(step.op.target._opname in ("sum", "mean") for step in kernel.steps if step.op.kind is Kind.REDUCTION)


def _warps(height: int, width: int) -> int:
    return min(max(_power(height * width // (32 * PER_THREAD)), 1), 8)


def _whole(kernel: Kernel) -> int:
    """The width of a tile that has a whole row."""
    power = _power(kernel.n_columns)
    return next((width for width in ONLY_ROW if width >= power), power) if kernel.n_rows <= 1 else power


def _fitting(rows: int, most: int, least: int) -> int:
    """As many rows as a block may take, with enough blocks left."""
    height = min(max(most, 1), _power(rows))
    while height > least and math.ceil(rows / height) < ENOUGH:
        height //= 2
    return height


def _power(n: int) -> int:
    """The power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
