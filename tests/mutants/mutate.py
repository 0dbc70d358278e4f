"""Mutants: small changes of one expression or statement, found in a source by its syntax tree."""

from __future__ import annotations

import ast
import copy
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What is run before the first test: tables and the bodies of classes.
AT_IMPORT = "at import"
# The planner and what renders its kernels. What compiles, keeps and starts machine code needs a device or other processes.
PARTS = (
    "planning.py scheduler/*.py fusion/*.py memory/*.py ir/clocks.py ir/edges.py ir/plan.py ir/reductions.py ir/verify.py "
    "ir/verify_plan.py codegen/body.py codegen/choices.py codegen/dtypes.py codegen/exactness.py codegen/helpers.py "
    "codegen/keys.py codegen/lower.py codegen/lowering.py codegen/reducers.py codegen/render.py codegen/rows.py "
    "codegen/rules*.py codegen/tiles.py codegen/walks.py codegen/windows.py"
).split()
COMPARISONS: dict[type[ast.cmpop], ast.cmpop] = {
    ast.Lt: ast.LtE(),
    ast.LtE: ast.Lt(),
    ast.Gt: ast.GtE(),
    ast.GtE: ast.Gt(),
    ast.Eq: ast.NotEq(),
    ast.NotEq: ast.Eq(),
    ast.Is: ast.IsNot(),
    ast.IsNot: ast.Is(),
    ast.In: ast.NotIn(),
    ast.NotIn: ast.In(),
}
ARITHMETIC: dict[type[ast.operator], ast.operator] = {
    ast.Add: ast.Sub(),
    ast.Sub: ast.Add(),
    ast.Mult: ast.Add(),
    ast.FloorDiv: ast.Mult(),
    ast.Mod: ast.FloorDiv(),
    ast.BitOr: ast.BitAnd(),
    ast.BitAnd: ast.BitOr(),
    ast.BitXor: ast.BitOr(),
    ast.LShift: ast.RShift(),
    ast.RShift: ast.LShift(),
}
CALLED = {"min": "max", "max": "min", "any": "all", "all": "any"}
DTYPES = {
    "float32": "float16",
    "float64": "float32",
    "float16": "bfloat16",
    "bfloat16": "float16",
    "int64": "int32",
    "bool": "uint8",
}
# In the text of kernels: what is found (a pattern), and what takes its place.
TEXTS = {
    "skipped mask": (r", mask=\w+|\bin\w+ & ", ""),
    "swapped cast": (r"tl\.float32|tl\.float64|tl\.int64|fp32|fp64", {"tl.float32": "tl.float16", "tl.float64": "tl.float32"}),
    "other comparison": (r" <= | < | >= | > | == ", {" < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > ", " == ": " != "}),
    "other arithmetic": (r" \+ | - | \* | // ", {" + ": " - ", " - ": " + ", " * ": " + ", " // ": " * "}),
}
OTHER_TEXTS = {"fp32": "fp16", "fp64": "fp32", "tl.int64": "tl.int32"}


@dataclass(frozen=True)
class Mutant:
    """`before`, at these places of a file (line from 1, column in bytes), becomes `after`."""

    path: str
    within: str
    kind: str
    before: str
    after: str
    start: tuple[int, int]
    end: tuple[int, int]
    # Of equal changes in one function, the first is 0.
    nth: int = 0

    @property
    def key(self) -> str:
        """The same wherever the function stands in its file."""
        nth = f" ({self.nth})" if self.nth else ""
        return f"{self.path} {self.within}{nth}: {' '.join(self.before.split())} -> {self.after}"

    def applied(self, source: str) -> str:
        lines = source.encode().splitlines(keepends=True)
        (first, from_), (last, to) = self.start, self.end
        tail = b"".join([lines[last - 1][to:], *lines[last:]])
        return b"".join([*lines[: first - 1], lines[first - 1][:from_], self.after.encode(), tail]).decode()


class _Finder(ast.NodeVisitor):
    """Collects (node, kind, replacement) of everything that is run; what is only said or annotated is left alone."""

    def __init__(self) -> None:
        self.found: list[tuple[ast.AST, str, str, str]] = []
        self.within: list[str] = []

    def add(self, node: ast.AST, kind: str, after: ast.AST | str) -> None:
        if isinstance(after, ast.AST):
            text = ast.unparse(ast.fix_missing_locations(after))
            after = f"({text})" if isinstance(after, ast.expr) else text
        self.found.append((node, kind, after, ".".join(self.within) or "module"))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in ("__str__", "__repr__"):
            return
        self.within.append(node.name)
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(default)
        self._body(node.body)
        self.within.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.within.append(node.name)
        self._body(node.body)
        self.within.pop()

    def _body(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        # Names of types, and what a module offers.
        if not self.within and (isinstance(node.value, ast.BinOp) or "__all__" in names):
            return
        if any(isinstance(target, ast.Subscript) for target in node.targets):
            self.add(node, "dropped statement", "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add(node, "dropped statement", "pass")
        self.visit(node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.add(node, "dropped statement", "pass")
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self.add(node.test, "negated condition", negated(node.test))
        if len(node.body) == 1 and isinstance(node.body[0], (ast.Return, ast.Raise, ast.Continue)) and not node.orelse:
            self.add(node.test, "removed guard", "False")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.add(node.test, "negated condition", negated(node.test))
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.add(test, "removed guard", "True")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        changed = copy.deepcopy(node)
        changed.ops[0] = COMPARISONS[type(node.ops[0])]
        self.add(node, "other comparison", changed)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        changed = copy.deepcopy(node)
        changed.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        self.add(node, "and for or", changed)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, (ast.Not, ast.Invert, ast.USub)):
            self.add(node, "dropped not", node.operand)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in ARITHMETIC and not any(_is_text(side) for side in (node.left, node.right)):
            changed = copy.deepcopy(node)
            changed.op = ARITHMETIC[type(node.op)]
            self.add(node, "other arithmetic", changed)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add(node, "negated condition", str(not node.value))
        elif isinstance(node.value, int):
            self.add(node, "off by one", str(node.value + 1))
        elif isinstance(node.value, str):
            self._text(node, [node])

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        changed = copy.deepcopy(node)
        self._text(node, [part for part in changed.values if isinstance(part, ast.Constant)], changed)
        for k, part in enumerate(node.values[:-1]):
            if isinstance(part, ast.Constant) and part.value.endswith(", mask="):
                left = [*node.values[:k], ast.Constant(part.value.removesuffix(", mask=")), *node.values[k + 2 :]]
                self.add(node, "skipped mask in a kernel", ast.unparse(ast.JoinedStr(left)))

    def _text(self, node: ast.AST, parts: Sequence[ast.Constant], whole: ast.AST | None = None) -> None:
        """One mutant for each thing found in a text, of a kernel for instance."""
        for part in parts:
            old = part.value
            for kind, (pattern, instead) in TEXTS.items():
                for match in re.finditer(pattern, old):
                    here = instead if isinstance(instead, str) else {**instead, **OTHER_TEXTS}[match.group()]
                    part.value = old[: match.start()] + here + old[match.end() :]
                    self.add(node, f"{kind} in a kernel", ast.unparse(whole or ast.Constant(part.value)))
            part.value = old

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in CALLED:
            changed = copy.deepcopy(node)
            changed.func = ast.Name(CALLED[node.func.id])
            self.add(node, "min for max, any for all", changed)
        if isinstance(node.func, ast.Name) and node.func.id in ("sorted", "reversed") and len(node.args) == 1:
            self.add(node, "other order", ast.Call(ast.Name("list"), node.args, []))
        if isinstance(node.func, ast.Name) and node.func.id == "range":
            changed = copy.deepcopy(node)
            changed.args[-1] = ast.BinOp(changed.args[-1], ast.Sub(), ast.Constant(1))
            self.add(node, "off by one", changed)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr in DTYPES:
            self.add(node, "swapped dtype", f"torch.{DTYPES[node.attr]}")
        self.generic_visit(node)

    def visit_Set(self, node: ast.Set) -> None:
        if len(node.elts) > 1:
            self.add(node, "lost element", ast.Set(node.elts[1:]))
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        # That of zip: an assertion.
        if node.arg != "strict":
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Sentences."""

    visit_Assert = visit_Import = visit_ImportFrom = visit_Raise


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def negated(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), test)


def mutants_of(path: Path, root: Path = ROOT) -> list[Mutant]:
    source = path.read_text()
    lines = source.encode().splitlines(keepends=True)
    finder = _Finder()
    finder._body(ast.parse(source).body)
    seen: Counter[tuple[str, ...]] = Counter()
    found = []
    for node, kind, after, within in finder.found:
        assert isinstance(node, (ast.expr, ast.stmt)) and node.end_lineno is not None and node.end_col_offset is not None
        place = ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        text = b"".join(lines[node.lineno - 1 : node.end_lineno])[node.col_offset :]
        rest = len(lines[node.end_lineno - 1]) - node.end_col_offset
        before = text[: len(text) - rest].decode()
        same = (within, before, after)
        found.append(Mutant(str(path.relative_to(root)), within, kind, before, after, *place, nth=seen[same]))
        seen[same] += 1
    return found


@cache
def all_mutants(root: Path = ROOT) -> tuple[Mutant, ...]:
    files = chain.from_iterable(sorted((root / "kitsune").glob(part)) for part in PARTS)
    return tuple(chain.from_iterable(mutants_of(path, root) for path in files if path.name != "__init__.py"))


def chosen(mutants: Sequence[Mutant], n: int, seed: int) -> list[Mutant]:
    """So many of them, the kinds in turn. The choice of one does not depend on the others of its kind, or on where it stands."""
    by_kind: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in sorted(mutants, key=lambda m: hashlib.sha256(f"{seed} {m.key}".encode()).digest()):
        by_kind[mutant.kind].append(mutant)
    turns = zip_longest(*(by_kind[kind] for kind in sorted(by_kind)))
    return [mutant for turn in turns for mutant in turn if mutant is not None][:n]
