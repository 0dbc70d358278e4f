"""The kernels of a captured graph that deal with its host: one reads what that has written for this replay, one copies the batch
in, one copies a result out.

The host writes a page into pinned memory, and the device reads it there itself. A static step of an MLP takes the host of an H200
56 us (median) this way, 68 where the driver copies the loss, and 77 where it copies the batch, too.
"""

from kitsune.ir.page import FEW_BYTES, HEAD, N_PAGES, TOLD_EVERY
from kitsune.ir.program import Program, Tile

# Bytes that a block copies.
COPIED = 8192

_HEADER = "import triton\nimport triton.language as tl\nfrom triton.language.extra.cuda import gdc_wait\n"

READ_PAGE = Program(
    "read_page",
    f'''"""Reads the next page of a ring in the host's memory."""

{_HEADER}
SIGNATURE = {{"ring": "*i64", "over": "*i64", "count": "*i64", "places": "*i64", "numbers": "*i64", "n": "i64", "words": "i64"}}
MULTIPLES = ()


@triton.jit
def read_page(ring, over, count, places, numbers, n, words, EARLY: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    if EARLY:
        gdc_wait()
    k = tl.load(count)
    # The replays before this one have read theirs: the host may write those pages again.
    if k % {TOLD_EVERY} == 0:
        tl.store(over, k, cache_modifier=".wt")
    page = ring + (k % {N_PAGES}) * words
    n_numbers = tl.load(page, volatile=True)
    page += {HEAD}
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(places + i, tl.load(page + i, mask=i < n, volatile=True), mask=i < n)
    page += n
    for start in range(0, n_numbers, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(numbers + i, tl.load(page + i, mask=i < n_numbers, volatile=True), mask=i < n_numbers)
    # No thread may find the count of the next replay.
    tl.debug_barrier()
    tl.store(count, k + 1)
''',
    (),
    False,
    # One warp: a page is a few words.
    Tile(64, 0, 1),
)

COPY_TENSORS = Program(
    "copy_tensors",
    f'''"""Copies tensors whose addresses lie in memory, each block its part of one."""

{_HEADER}
SIGNATURE = {{"places": "*i64", "rows": "*i64", "owners": "*i32"}}
MULTIPLES = ()


@triton.jit
def copy_tensors(places, rows, owners, EARLY: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    if EARLY:
        gdc_wait()
    k = tl.load(owners + tl.program_id(0))
    source = tl.load(places + k)
    target, size = tl.load(rows + k * 3), tl.load(rows + k * 3 + 1)
    start = (tl.program_id(0) - tl.load(rows + k * 3 + 2)) * BLOCK
    end = tl.minimum(start + BLOCK, size)
    # At no address there is nothing to copy, this time.
    if source != 0:
        done = start
        if (source | target) % 8 == 0:
            words = (end - start) // 8
            i = tl.arange(0, BLOCK // 8)
            from_words = (source + start).to(tl.pointer_type(tl.int64))
            to_words = (target + start).to(tl.pointer_type(tl.int64))
            tl.store(to_words + i, tl.load(from_words + i, mask=i < words), mask=i < words)
            done += words * 8
        from_bytes = source.to(tl.pointer_type(tl.uint8))
        to_bytes = target.to(tl.pointer_type(tl.uint8))
        for first in range(done, end, BLOCK // 8):
            i = first + tl.arange(0, BLOCK // 8)
            tl.store(to_bytes + i, tl.load(from_bytes + i, mask=i < end), mask=i < end)
''',
    (),
    False,
    Tile(COPIED, 0, 4),
)

COPY_RESULT = Program(
    "copy_result",
    f'''"""Copies a few bytes to an address that lies in memory."""

{_HEADER}
SIGNATURE = {{"place": "*i64", "source": "*u8", "size": "i64"}}
MULTIPLES = ()


@triton.jit
def copy_result(place, source, size, EARLY: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    if EARLY:
        gdc_wait()
    target = tl.load(place)
    if target != 0:
        i = tl.arange(0, BLOCK)
        tl.store(target.to(tl.pointer_type(tl.uint8)) + i, tl.load(source + i, mask=i < size), mask=i < size)
''',
    (),
    False,
    Tile(FEW_BYTES, 0, 1),
)

# In the order in which `kitsune.runtime.PageReader` takes them.
PAGE_PROGRAMS = (READ_PAGE, COPY_TENSORS, COPY_RESULT)
