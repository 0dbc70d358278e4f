"""How a kernel with reductions goes through memory: by rows or by columns, with a whole row at once or in a loop."""

import math

from kitsune.codegen.walks import accesses, counted
from kitsune.ir.plan import Kernel, Tile, touched_bytes

# Elements of a row that a block holds in registers; longer rows are read once for each reduction that depends on another.
PERSISTENT = 4096
# The same where neighbours in memory belong to different rows: a block holds some dozens of them at a time.
PERSISTENT_OUTER = 128
# Elements of a block where rows are short, and of a turn of the loop where they are long.
SHORT, LONG = 1024, 2048
# Rows of which a block reads neighbouring elements: 128 bytes of a 16-bit type.
NEIGHBOURS = 64
OUTER = 4096
# Blocks that fill the largest device known, twice over. With fewer, smaller ones are taken.
ENOUGH = 264
# Elements that a thread holds of each operand.
PER_THREAD = 8


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
    return kernel.n_columns > (PERSISTENT if inner(kernel) else PERSISTENT_OUTER)


def tile_of(kernel: Kernel) -> Tile | None:
    """The tile of a kernel with reductions, by its sizes; no text depends on it."""
    if not kernel.reduced:
        return None
    rows, columns = max(kernel.n_rows, 1), max(kernel.n_columns, 1)
    if inner(kernel):
        width = min(_power(columns), LONG) if is_looped(kernel) else _power(columns)
        height = _fitting(rows, SHORT // width, 1)
    elif is_looped(kernel):
        most, width, warps = _looped_outer(kernel)
        height = _fitting(rows, most, 16)
        # With fewer neighbours a turn takes more of each row: less turns, and shorter sums in every place of the tile.
        width = min(_power(columns), width * most // height)
        return Tile(height, width, min(warps, _warps(height, width)))
    else:
        width = min(_power(columns), PERSISTENT_OUTER)
        height = _fitting(rows, min(NEIGHBOURS, OUTER // width), 16)
    return Tile(height, width, _warps(height, width))


def _looped_outer(kernel: Kernel) -> tuple[int, int, int]:
    """Rows, columns and warps where neighbours belong to different rows and a row is long, by what moves with both.

    Times on an H200 against 64, 64, 8, in us: batch norm's statistics (one operand) 31 to 27, its backward behind a threshold
    (four) 272 to 157, the same with an addition (six) 257 to 241, layer norm's parameters (32 bits) 47 to 39.
    """
    first = len(kernel.domain) - kernel.reduced
    moving = [a for a in accesses(kernel) if any(a.strides[:first]) and any(a.strides[first:])]
    if any(a.value.type.dtype.itemsize > 2 for a in moving):
        return NEIGHBOURS, 16, 4
    if len(moving) > 4:
        return 2 * NEIGHBOURS, 64, 8
    if len(moving) == 4:
        return 2 * NEIGHBOURS, 32, 4
    return (NEIGHBOURS, 32, 4) if len(moving) == 1 else (NEIGHBOURS, 64, 8)


def _warps(height: int, width: int) -> int:
    return min(max(_power(height * width // (32 * PER_THREAD)), 1), 8)


def _fitting(rows: int, most: int, least: int) -> int:
    """As many rows as a block may take, with enough blocks left."""
    height = min(max(most, 1), _power(rows))
    while height > least and math.ceil(rows / height) < ENOUGH:
        height //= 2
    return height


def _power(n: int) -> int:
    """The power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
