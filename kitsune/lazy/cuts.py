"""A program looks at a number while a backward is still owed: what is pending is run, and the region goes on behind that cut.

Loops ask whether their loss is finite before they go backward. If the region ended there, all calls would have to be made again
for their graph. So it goes on, and what autograd would have saved is kept: which values that are is known from a run of the same
calls in which autograd had them. What of it nobody else sees may be handed over to the rest of the region in any form: see
`kitsune/pairs.py`.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, compress
from typing import Any

from kitsune.ir import Barrier, Handover
from kitsune.lazy.cell import Cell, is_leaf, left_in, numbers_of, serial_of, walks
from kitsune.lazy.holds import Holds
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.trie import Node
from kitsune.lazy.used_again import are_held, give_back

# Cuts of one region, and calls with a graph between two of them: questions about a loss, and the sum of a few losses. A model
# that is evaluated with gradients on has more, and its steps are to be regions of their own.
MAX_CUTS, MAX_CALLS = 4, 2
# Backwards that came, less those that did not, are counted up to here.
SURE = 4


class Absent:
    """Stands in an owed call for what the call has made, which the program does not hold any more; `spent` is as a cell's."""

    __slots__ = ("cell", "made", "spent")
    is_leaf = False

    def __init__(self, cell: Cell, made: Any) -> None:
        self.cell, self.made = cell, made
        self.spent: Any = False

    @property
    def requires_grad(self) -> bool:
        """Has it a place in the autograd graph?"""
        return self.made.graded is not None


def goes_on(region: Any, cause: Barrier) -> bool:
    """Does a region go on behind a read? It does where a backward of its calls may come, or they are just being made again."""
    if walks(region):
        return True
    past, cuts = region.past, region.cuts
    if cause is not Barrier.ITEM or not past or past[-1].is_backward or not region.node.expects:
        return False
    return not cuts or _came(region) or (len(cuts) < MAX_CUTS and len(past) - cuts[-1][1] <= MAX_CALLS)


def go_on(recorder: Any, region: Any, cause: Barrier, site: Any) -> None:
    """Run what is pending; the region goes on."""
    node, since, observed = region.node, region.cut, region.observed_from is not None
    if region.cuts and region.past and _came(region):
        judge(region)
        region.cuts.clear()
    # Before calls are made again: it is what is known of them. In an open block, autocast keeps casts for whoever comes next.
    key = (region.past, recorder.lane.modes[False][2])
    saved: frozenset[int] = frozenset()
    if observed:
        live = numbers_of(computed_since(region))
    else:
        left: list[Any] = []
        if walks(region):
            saved = recorder.walk.wants()
        elif region.calls:
            saved, left = _left_by_calls(recorder, region, key)
        recorder.tally.recorded += node.depth - depth_of(since)
        live = recorder.run_so_far(region, saved, left)
    here = {cell.ref.id: cell.real for cell in region.computed()}
    wanted = frozenset(here).union(saved)
    if region.real:
        node.saved = {**(node.saved or {}), (tuple(key[0]), key[1]): wanted}
        node.holds = None
    kept = {number: tensor for number, tensor in region.kept.items() if number in wanted}
    # What was written since the last cut is known by another number now.
    region.kept = kept | {number: tensor for number, tensor in here.items() if tensor is not None}
    region.cut = node
    region.cuts.append((node, len(region.past or ())))
    recorder.closed(node, live, cause, site, observed, since)


def _left_by_calls(recorder: Any, region: Any, key: tuple[list[Any], Any]) -> tuple[frozenset[int], list[Any]]:
    """What autograd saves of the owed calls, and what they have made and nobody holds, as far as they still refer to it. If it is
    not known, or the program holds something without the graph that it had, all calls are made again for theirs."""
    node = region.node
    if node.holds is not None and node.holds[0] == key:
        _, saved, holds = node.holds
        left = holds.left_again(region.calls)
        if left is not None:
            return saved, left
    saved, holds = (node.saved or {}).get((tuple(key[0]), key[1])), Holds(region.calls)
    leave_results(region)
    if saved is None or not _had_graph(region, saved):
        recorder.lane.own_up()
        return saved or frozenset(), []
    if holds.is_sure:
        holds.found(region.calls)
        node.holds = ([*key[0]], key[1]), saved, holds
    return saved, []


def _came(region: Any) -> bool:
    """Has a backward come behind the first cut?"""
    return any(edge.is_backward for edge in region.past[region.cuts[0][1] :])


def judge(region: Any) -> None:
    """The region ends: was it right that it went on?"""
    if region.cuts and region.past is not None:
        for node, _ in region.cuts:
            node.expects = min(node.expects + 1, SURE) if _came(region) else max(node.expects - 1, 0)


def regret(losses: list[Any], region: Any) -> None:
    """A backward comes: should a region before this one have gone on?"""
    for loss in losses:
        before = loss.cell.region if type(loss) is LazyTensor else None
        if before is not None and before is not region:
            before.node.expects = min(before.node.expects + 1, SURE)


def computed_since(region: Any) -> Iterator[Cell]:
    """The cells that have their values, and got them behind the cut."""
    first = 0 if region.cut is None else region.cut.n_values
    yield from (cell for cell in region.computed() if cell.ref.id >= first)


def depth_of(cut: Node | None) -> int:
    """How many ops are before a cut."""
    return 0 if cut is None else cut.depth


def _had_graph(region: Any, saved: frozenset[int]) -> bool:
    """Had all that the program holds a graph, when it was seen what autograd saves? What had been dropped by then had none."""
    made = [(k, t) for k, (*_, results, _) in enumerate(region.calls) for t in results]
    held = [(k, t) for k, t in made if type(t) is LazyTensor and t.requires_grad]
    behind = calls_behind(region.calls, [t for _, t in held if t.cell.ref.id in saved])
    return behind is not None and all(k in behind for k, _ in held)


def calls_behind(calls: list[Any], tensors: list[Any]) -> set[int] | None:
    """Which calls lead to these tensors; None if one has a history that they have not made."""
    makers: dict[int, list[int]] = {}
    # Who writes to a tensor's memory, maybe through a view, is one of its makers as well.
    writers: dict[int, list[int]] = {}
    given = [flat for _, _, _, flat, _, _ in calls]
    for k, (edge, *_, made, _) in enumerate(calls):
        for t in made:
            makers.setdefault(id(t), []).append(k)
        for storage in edge.dirty:
            writers.setdefault(storage, []).append(k)
    waiting, found = list(tensors), set[int]()
    while waiting:
        tensor = waiting.pop()
        if not tensor.requires_grad or is_leaf(tensor):
            continue
        if id(tensor) not in makers:
            return None
        for k in {*makers[id(tensor)], *writers.get(tensor.cell.storage, ())} - found:
            found.add(k)
            waiting += given[k]
    return found


def leave_results(region: Any) -> None:
    """Let go of what the owed calls have made and the program does not hold: it need not be computed for their sake."""
    wrappers = [t for t, _ in _made(region) if type(t) is LazyTensor]
    made = {id(t): _absent(region, t.cell, m) for t, m in _made(region) if type(t) is LazyTensor}
    # Whatever comes in between, as an interrupt: what the program may hold stays what its call has made.
    try:
        region.calls = [_swapped_call(call, made) for call in region.calls]
        # In place: another list would hold them, too.
        wrappers[:] = give_back(wrappers)
        wrappers[:] = [t for t, is_held in zip(wrappers, are_held(wrappers), strict=True) if is_held]
    finally:
        back = {id(made[id(t)]): t for t in wrappers if t.cell.region is region}
        if back:
            region.calls = [_swapped_call(call, back) for call in region.calls]


def _absent(region: Any, cell: Cell, made: Any) -> Absent:
    return Absent(Cell(region, cell.ref, cell.type, cell.storage), made)


def recall_results(region: Any) -> None:
    """Undo it: the calls are to be made again for their graph, with wrappers of what they had made."""
    restore(region)
    region.handover = None
    # Also what calls have been given whose makers are gone: a backward has used these up.
    absent = {id(t): t for _, _, _, flat, made, _ in region.calls for t in (*flat, *made) if type(t) is Absent}
    first = 0 if region.cut is None else region.cut.n_values
    # What was left, but not taken from them.
    ours = [*{id(t): t for _, _, _, *both, _ in region.calls for t in chain(*both) if type(t) is LazyTensor}.values()]
    left = [t.cell for t in compress(ours, left_in(region, ours))]
    region.see(left)
    for cell in left:
        cell.real = region.kept.get(cell.ref.id)
    wrappers: dict[int, Any] = {}
    for number, token in absent.items():
        wrapper, cell = token.made.make(), token.cell
        wrapper.cell, cell.owed, cell.spent = cell, token.made, token.spent
        wrappers[number] = wrapper
        if cell.ref.id < first:
            cell.real = region.kept.get(cell.ref.id)
            region.see([cell])
        else:
            region.produced.append(cell)
    if wrappers:
        region.calls = [_swapped_call(call, wrappers) for call in region.calls]


def _made(region: Any) -> Iterator[tuple[Any, Any]]:
    for edge, _, _, _, made, _ in region.calls:
        yield from zip(made, edge.made, strict=True)


def _swapped_call(call: Any, by_id: dict[int, Any]) -> Any:
    edge, args, kwargs, flat, made, epoch = call
    # A step of BERT has 300 calls, and all but one are looked at in vain when what the program holds is put back.
    if not by_id.keys().isdisjoint(map(id, flat)):
        flat, args, kwargs = [by_id.get(id(t), t) for t in flat], _swapped(args, by_id), _swapped(kwargs, by_id)
    elif by_id.keys().isdisjoint(map(id, made)):
        return call
    return edge, args, kwargs, flat, [by_id.get(id(t), t) for t in made], epoch


def _swapped(tree: Any, by_id: dict[int, Any]) -> Any:
    cls = type(tree)
    if cls is LazyTensor or cls is Absent:
        return by_id.get(id(tree), tree)
    if cls is tuple or cls is list:
        return cls([_swapped(x, by_id) for x in tree])
    if cls is dict:
        return {name: _swapped(x, by_id) for name, x in tree.items()}
    if isinstance(tree, tuple):  # a named tuple, or one of torch.return_types
        return cls([_swapped(x, by_id) for x in tree])
    return tree


def keeping(region: Any, cells: list[Cell], saved: Iterable[int]) -> tuple[int, ...]:
    """The numbers of what a part before a cut leaves: what cells stand for, and what is saved of its results."""
    first = 0 if region.cut is None else region.cut.n_values
    node, held = region.node, numbers_of(cells)
    if node.keeps is None or node.keeps[0] is not saved or node.keeps[1] != (first, held):
        kept = frozenset(number for number in saved if number >= first).difference(held)
        node.keeps = saved, (first, held), kept, tuple(sorted(kept.union(held)))
    *_, kept, live = node.keeps
    if kept and region.cut is None and region.recorder.watcher is None:
        # Nobody else sees it.
        region.handover = Handover(kept)
    return live  # type: ignore[no-any-return]


def restore(region: Any) -> None:
    """Somebody else than was expected is to see what is kept: let it be as it was recorded."""
    handover = region.handover
    if handover is not None and handover.carried is not None:
        region.kept.update(handover.carried.restored())
        handover.carried = None


def put_kept(region: Any, graph: Any, values: list[Any], is_last: bool) -> None:
    """Put in what a graph that begins behind a cut has from before it, maybe the region's last. What was written is the tensor
    that it was before that."""
    if region.cut is None:
        return
    handover = region.handover
    if handover is not None and not (is_last and handover.goes_to(graph)) and handover.concerns(graph):
        restore(region)
        for number, tensor in region.kept.items():
            values[number] = tensor
        if not is_last:
            region.handover = None
    carried = region.handover.kept if region.handover is not None and region.handover.carried is not None else frozenset()
    lacking = [value for value in graph.inputs if values[value.id] is None and value.id not in carried]
    before = {after.id: old for node in region.cut.path() for _, old, after, _ in node.written} if lacking else {}
    for value in lacking:
        number = value.id
        while values[number] is None:
            if number not in before:
                raise RuntimeError(
                    f"{value} was computed before a number was read, and not kept. This is a bug in Kitsune: please report it."
                )
            number = before[number]
        values[value.id] = values[number]


def keep(region: Any, live: tuple[int, ...], cells: list[Cell], values: list[Any]) -> None:
    """Keep what was computed up to the cut that is made now."""
    carried = region.handover.kept if region.handover is not None and region.handover.carried is not None else frozenset()
    region.kept.update((number, values[number]) for number in live if number not in carried)
    for cell in cells:
        # Who reaches their memory by a plain tensor is to be known.
        region.storages.setdefault(serial_of(values[cell.ref.id]), cell.storage)
