"""Kernels with reductions: a block works on a tile of some rows and some of their columns, its text being the same for all sizes.

Each statement is made for every element or once for a row, and belongs to a phase: the number of reductions after each other
that it depends on. Where rows are held in registers the statements stand as they come. Where they are too long, each phase
goes through the row in a loop of its own, and makes what it needs of the elements anew from what it loads. The loop is written
twice: over whole tiles, without a comparison of any column, and over what is left. So a row of 50257 elements is read 128 bits at
a time where its beginning is aligned.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from kitsune.codegen.body import Body, Named
from kitsune.codegen.lowering import Reduce
from kitsune.codegen.machine_code import INDEX
from kitsune.codegen.reducers import at_once, begin, end, first, turn
from kitsune.codegen.tiles import inner, is_looped
from kitsune.codegen.walks import Part, accesses, coordinates, counted, form_of, is_read
from kitsune.ir.plan import Access
from kitsune.ir.program import Extent, Size, Stride

# Bytes that a thread loads together.
VECTOR = 16
# Bytes of an element that are to be under way in several turns. With one turn at a time ResNet-50's largest statistics took 43 us
# of an H200 and the sums behind its first rectifier 83; with four and with two 34 and 57, where the bytes take 24 and 48. Copied
# ahead, ViT-B/16's activation's backward with a bias gradient took 76 instead of 85, of 54; four operands and a result
# (127 instead of 128) gained nothing.
UNDER_WAY = 8
_WORD = re.compile(r"[A-Za-z_]\w*")
# A coordinate along one of several dimensions of a row.
_CUT = re.compile(r"\bj\d")


@dataclass(frozen=True, slots=True)
class Statement:
    """What gives `targets` their values: a text, or a reduction (`kind`) of it. `full`: it is made for every element.

    `phase` is the first in which it can be made. Of a reduction, `spread` says whether elements are made of its result, and
    `neighbours` how many elements of a row a thread loads together.
    """

    targets: tuple[str, ...]
    text: str
    full: bool
    phase: int
    comment: str = ""
    kind: str = ""
    dtype: torch.dtype = torch.float32
    spread: bool = False
    neighbours: int = 1

    @property
    def line(self) -> str:
        """As a line of the text."""
        return f"{self.targets[0]} = {self.text}" + (f"  # {self.comment}" if self.comment else "")


@dataclass(slots=True)
class Rows(Body):
    """A kernel over rows."""

    blocks: ClassVar[str] = "XBLOCK: tl.constexpr, RBLOCK: tl.constexpr"
    places: ClassVar[tuple[str, ...]] = ("row = (block * XBLOCK + tl.arange(0, XBLOCK))[:, None]", "in_rows = row < rows")

    statements: list[Statement] = field(default_factory=list)
    # Of each name: is it a value for every element, and since which phase is it known?
    known: dict[str, tuple[bool, int]] = field(default_factory=lambda: {"column": (True, 0)})
    # Names of rows of zeros but for a number at a position, and that number, or 0 if it is beyond the row: their sum.
    lone: dict[str, str] = field(default_factory=dict)
    inner: bool = True
    # Where neighbours are loaded together only if the length of a row is a multiple of them.
    counts_columns: bool = True

    @property
    def extents(self) -> list[Named]:
        """The numbers of rows and of columns."""
        return [
            Named("rows", INDEX, Extent(False, not self.inner)),
            Named("columns", INDEX, Extent(True, self.counts_columns)),
        ]

    @property
    def reducer(self) -> Reduce:
        """Writes reductions."""
        return self.reduce

    def write(self) -> None:
        """Loads, steps and stores."""
        self.inner = inner(self.kernel)
        forms = [form_of(self.kernel, a) for a in accesses(self.kernel)]
        self.counts_columns = self.inner and (not is_looped(self.kernel) or any(form.rows == "columns" for form in forms))
        self.multiples |= {"columns"} if self.counts_columns else set() if self.inner else {"rows"}
        offsets = [self._offset(i, a) for i, a in enumerate(accesses(self.kernel))]
        for i in range(len(self.kernel.loads)):
            self.load(i, offsets[i], _mask(forms[i].rows != 0, forms[i].columns != 0))
        for number, step in enumerate(self.kernel.steps):
            self.step(number, step)
        cut = len(self.kernel.domain) - self.kernel.reduced
        rows = self._coordinates(self.kernel.first, cut, "row", "i", [form.rows for form in forms])
        columns = self._coordinates(cut, len(self.kernel.domain), "column", "j", [form.columns for form in forms])
        stores = []
        for i in range(len(self.kernel.stores)):
            k = len(self.kernel.loads) + i
            full = forms[k].columns != 0
            # A single row is its number 0.
            offset = offsets[k] or "row"
            mask = _mask(forms[k].rows != 0 or not full, full)
            text = self.stored(i)
            phase = max((self.known[w][1] for w in self._words(text)), default=0)
            stores.append((i, Statement((), f"tl.store(out{i} + {offset}, {text}, mask={mask})", full, phase)))
        self._spread([s for _, s in stores])
        self.lines = [*rows, *(self._loops(stores, columns) if is_looped(self.kernel) else self._held(stores, columns))]

    def _held(self, stores: list[tuple[int, Statement]], columns: list[str]) -> list[str]:
        """The statements as they stand, of rows that lie in registers."""
        lines = [*PLACES_IN_ROW, *columns]
        lines += [line for s in self.statements for line in (at_once(s) if s.kind else [s.line])]
        return lines + [s.text for _, s in stores]

    def say(self, target: str, text: str, comment: str = "") -> None:
        """The statement that gives `target` its value."""
        full, phase = self._nature(text)
        self.known[target] = (full, phase)
        if text in self.lone:
            self.lone[target] = self.lone[text]
        self.statements.append(Statement((target,), text, full, phase, comment))

    def reduce(self, kind: str, dtype: torch.dtype, text: str) -> tuple[str, ...]:
        """The names of a reduction's results."""
        text = self.let(text)
        _, phase = self._nature(text)
        if kind.startswith("pick "):
            return (self._pick(text, kind.removeprefix("pick "), dtype, phase),)
        if kind.startswith("place "):
            return (self._place(text, kind.removeprefix("place ")),)
        if kind == "sum" and text in self.lone:
            return (self.lone[text],)
        names = []
        for _ in range(2 if kind in ("moments", "softmax", "first max", "first min") else 1):
            names.append(f"a{self.n_temporaries}")
            self.n_temporaries += 1
            self.known[names[-1]] = (False, phase + 1)
        self.statements.append(Statement(tuple(names), text, True, phase, "", kind, dtype, neighbours=self._neighbours()))
        return tuple(names)

    def _neighbours(self) -> int:
        cut = len(self.kernel.domain) - self.kernel.reduced
        sizes = [a.value.type.dtype.itemsize for a in self.kernel.loads if any(a.strides[cut:])]
        return VECTOR // max(min(sizes), 2) if self.inner and sizes else 1

    def _pick(self, text: str, position: str, dtype: torch.dtype, phase: int) -> str:
        """The element of a row at a position: where there is a loop, from what is loaded there alone."""
        found = self._made_of(text)
        if not is_looped(self.kernel) or any(_CUT.search(s.text) for s in found):
            return self.reduce("sum", dtype, f"tl.where(column == {position}, {text}, 0.0)")[0]
        mark = f"_at{self.n_temporaries}"
        self.n_temporaries += 1
        names = {s.targets[0]: s.targets[0] + mark for s in found} | {"column": position}
        mask = f"mask=in_rows & ({position} >= 0) & ({position} < columns)"
        for s in found:
            there = _WORD.sub(lambda word: names.get(word[0], word[0]), s.text)
            there = there.replace("mask=inside", mask).replace("mask=in_columns", mask)
            name = names[s.targets[0]]
            self.known[name] = (False, s.phase)
            self.statements.append(Statement((name,), there, False, s.phase, s.comment))
        return names[text]

    def _place(self, text: str, position: str) -> str:
        """A row of zeros but for a number at a position, whose sum need not be added up."""
        name = self.let(f"tl.where(column == {position}, {text}, 0.0)")
        self.lone[name] = self.let(f"tl.where(({position} >= 0) & ({position} < columns), {text}, 0.0)")
        return name

    def _made_of(self, text: str) -> list[Statement]:
        """The statements for every element behind a text, in order."""
        wanted, found = set(self._words(text)), []
        for s in reversed(self.statements):
            if s.full and not s.kind and s.targets[0] in wanted:
                found.append(s)
                wanted.update(self._words(s.text))
        return found[::-1]

    def _spread(self, stores: list[Statement]) -> None:
        """Note of each reduction whether something is made of its result for every element."""
        used = {word for s in (*self.statements, *stores) if s.full for word in self._words(s.text)}
        for s in reversed(self.statements):
            if not s.full and not s.kind and s.targets[0] in used:
                used.update(self._words(s.text))
        self.statements = [replace(s, spread=not used.isdisjoint(s.targets)) if s.kind else s for s in self.statements]

    def _words(self, text: str) -> Iterable[str]:
        return (word for word in _WORD.findall(text) if word in self.known)

    def _nature(self, text: str) -> tuple[bool, int]:
        natures = [self.known[word] for word in self._words(text)]
        # A load moves along the columns if its mask says so.
        full = any(nature[0] for nature in natures) or "mask=inside" in text or "mask=in_columns" in text
        return full, max((nature[1] for nature in natures), default=0)

    def _offset(self, index: int, access: Access) -> str:
        name = self.pointer(index, access.value.type.dtype)
        form = form_of(self.kernel, access)
        if form.rows != 0 or form.columns != 0:
            self.multiples.add(name)
        cut = len(self.kernel.domain) - self.kernel.reduced
        terms = [*self._terms(index, name, form.rows, self.kernel.first, cut, "row", "i")]
        terms += self._terms(index, name, form.columns, cut, len(self.kernel.domain), "column", "j")
        if self.kernel.gathered and access.strides[0]:
            terms.append(f"turn * {self.size(f'{name}_turn', Stride(index, 0, form.columns != 0))}")
        return " + ".join(terms)

    def _terms(self, index: int, name: str, part: Part, first: int, end: int, whole: str, letter: str) -> Iterable[str]:
        dims = [first + d for d in counted(self.kernel.domain[first:end])]
        if part == "columns":
            yield "row * columns"
        elif type(part) is tuple:
            for position, (d, stride) in enumerate(zip(dims, part, strict=True)):
                if stride != 0:
                    yield self._term(f"{letter}{position}", stride, f"{name}_{letter}{position}", Stride(index, d))
        elif part != 0:
            assert part is None or part == 1
            yield self._term(whole, part, f"{name}_{whole}", Stride(index, dims[-1]) if dims else Stride(index, first))

    def _term(self, place: str, stride: int | None, name: str, meaning: Stride) -> str:
        return place if stride == 1 else f"{place} * {self.size(name, meaning)}"

    def _coordinates(self, first: int, end: int, index: str, letter: str, parts: list[Part]) -> list[str]:
        needed = {p for part in parts if type(part) is tuple for p, stride in enumerate(part) if stride != 0}
        dims = [first + d for d in counted(self.kernel.domain[first:end])]
        if not needed:
            return []
        # Only along what neighbours in memory differ in must they keep together.
        counts = (letter == "j") == self.inner

        def size(position: int) -> str:
            return self.size(f"size_{letter}{position}", Size(dims[position], counts))

        return list(coordinates(index, letter, f"{letter}_rest", needed, len(dims), size))

    def _loops(self, stores: list[tuple[int, Statement]], columns: list[str]) -> list[str]:
        """A loop for each phase in which elements are reduced or stored, with what is made once for a row before it."""
        last = max([s.phase for s in self.statements if s.kind] + [s.phase for _, s in stores if s.full], default=0)
        due: dict[int, list[Statement]] = {}
        for i, store in stores:
            if store.full:
                # What is still to be read of this memory must be what was there before.
                due.setdefault(last if is_read(self.kernel, self.kernel.stores[i]) else store.phase, []).append(store)
        lines = ["whole = columns // RBLOCK * RBLOCK"]
        for phase in range(last + 1):
            lines += [s.line for s in self.statements if not s.full and not s.kind and s.phase == phase]
            reductions = [s for s in self.statements if s.kind and s.phase == phase]
            if reductions or phase in due:
                lines += self._loop(reductions, due.get(phase, []), columns)
        lines += [s.line for s in self.statements if not s.full and not s.kind and s.phase > last]
        return lines + [s.text for _, s in stores if not s.full]

    def _loop(self, reductions: list[Statement], stores: list[Statement], columns: list[str]) -> list[str]:
        ahead = [line for s in reductions for line in first(s)]
        if ahead:
            near = " ".join(s.text for s in reductions if first(s))
            # What the loop carries is as wide before it.
            wide = [PLACES_IN_ROW[0], "if WIDE:", "    column = column.to(tl.int64)", *_INSIDE]
            ahead = [*wide, *columns, *(s.line for s in self._made_of(near)), *ahead]
        body = [*columns, *(s.line for s in self._made_of(" ".join(s.text for s in (*reductions, *stores))))]
        body += [line for s in reductions for line in turn(s)] + [s.text for s in stores]
        lines = [*ahead, *(line for s in reductions for line in begin(s))]
        under_way = self._under_way(body)
        whole = f"tl.range(0, whole, RBLOCK, {under_way})" if under_way else "range(0, whole, RBLOCK)"
        for turns, places in ((whole, _WHOLE), ("range(whole, columns, RBLOCK)", _INSIDE)):
            lines.append(f"for start in {turns}:")
            lines += [f"    {line}" for line in ("column = start + tl.arange(0, RBLOCK)[None, :]", *places, *body)]
        return lines + [line for s in reductions for line in end(s)]

    def _under_way(self, body: list[str]) -> str:
        """How a loop over short pieces of many rows has more on its way than a turn: a thread loads 16 bytes of each operand.

        Several turns' loads come first where nothing is written between them; else memory is copied ahead to shared memory.
        """
        text = " ".join(body)
        sizes = [a.value.type.dtype.itemsize for i, a in enumerate(self.kernel.loads) if f"tl.load(in{i} + " in text]
        if self.inner or not sizes or sum(sizes) > UNDER_WAY // 2:
            return ""
        return "num_stages=3" if "tl.store(" in text else f"loop_unroll_factor={UNDER_WAY // sum(sizes)}"


_INSIDE = ["in_columns = column < columns", "inside = in_rows & in_columns"]
# What the compiler sees to be true it does not compare.
_WHOLE = ["in_columns = tl.full([1, RBLOCK], 1, tl.int1)", _INSIDE[1]]
PLACES_IN_ROW = ["column = tl.arange(0, RBLOCK)[None, :]", *_INSIDE]


def _mask(along_rows: bool, along_columns: bool) -> str:
    if along_columns:
        return "inside" if along_rows else "in_columns"
    # Where a turn has one number for all of its rows, that is no block, and Triton refuses a mask that is one.
    return "in_rows" if along_rows else ""
