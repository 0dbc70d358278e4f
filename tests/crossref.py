"""What Kitsune predicts of a call's results beside what the call gives: dtype, shape, strides, offset, and who shares memory.

    KITSUNE_CROSSREF=1 python -m pytest tests       compares every call that any test replays; writes crossref-suite.jsonl
    python -m tests.crossref --shard 1/4            every sample of torch's database, its tensors laid out in four other ways

The program is told what was predicted before anything runs, so a wrong prediction is a wrong answer even where values are right.
The second command calls each operator lazily from the first on, so that nothing has been observed before, and compares results,
gradients and aliases with eager's as well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

import kitsune
from kitsune.ir import Op, type_of
from kitsune.runtime import calls

# The package has a function of the same name.
replay = sys.modules["kitsune.runtime.replay"]
SUITE = Path("crossref-suite.jsonl")


@dataclass
class CrossRef:
    """Makes calls as the replay executor does, and looks at what they define."""

    call: Callable[..., None]
    compared: int = 0
    differences: list[str] = field(default_factory=list)

    def __call__(self, op: Op, values: Any, scalars: list[float]) -> None:
        memory = [(value, _memory(values[value.id])) for value in op.inputs]
        self.call(op, values, scalars)
        self.compared += 1
        for value in op.results:
            found = type_of(values[value.id])
            if found is not value.type:
                self.tell(op, f"{_said(found)} instead of {_said(value.type)}")
            memory.append((value, _memory(values[value.id])))
        for (a, at), (b, there) in itertools.combinations(memory, 2):
            if None not in (at, there) and (a.storage == b.storage) is not (at == there):
                self.tell(op, f"{a} and {b} {'share' if at == there else 'do not share'} memory")

    def tell(self, op: Op, words: str) -> None:
        self.differences.append(f"{op.target} at {op.site}: {words}")


def _said(type_: Any) -> str:
    bits = "".join(f", {name}" for name in ("conj", "neg") if getattr(type_, name))
    return f"{type_} with strides {type_.stride} at {type_.offset}{bits}"


def _memory(tensor: Any) -> int | None:
    """Where a tensor's memory is; None where it has none, and shares it with nobody."""
    if tensor.layout is not torch.strided or tensor._is_zerotensor():
        return None
    return tensor.untyped_storage().data_ptr() or None


@contextmanager
def comparing() -> Iterator[CrossRef]:
    """Compares all calls that the replay executor makes."""
    reference = CrossRef(lambda op, *rest: calls.call_of(op)(op, *rest))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "call_of", lambda op: reference)
        # A result in another layout would be copied into the one that was predicted, with a warning.
        patch.setattr(calls, "_conform", lambda result, expected, op: result)
        yield reference


@pytest.fixture(autouse=True)
def predicted(request: pytest.FixtureRequest) -> Iterator[None]:
    """For every test, where tests/conftest.py takes it in."""
    with comparing() as reference:
        yield
    row = {"part": "suite", "entry": request.node.nodeid, "run": reference.compared, "told": reference.differences[:5]}
    with SUITE.open("a") as file:
        file.write(json.dumps({**row, **_counted(reference.compared, len(reference.differences))}) + "\n")
    assert not reference.differences


def _counted(run: int, different: int) -> dict[str, int]:
    different = min(different, run)
    return {"run": run, "equal": run - different, "different": different, "crashed": 0}


def _permuted(t: torch.Tensor) -> torch.Tensor | None:
    """The last dimension outermost in memory."""
    return None if t.dim() < 2 else t.movedim(-1, 0).contiguous().movedim(0, -1)


def _channels_last(t: torch.Tensor) -> torch.Tensor | None:
    return None if t.dim() != 4 else t.contiguous(memory_format=torch.channels_last)


def _offset(t: torch.Tensor) -> torch.Tensor | None:
    """One element into its memory, of which `as_strided` reads the first as well."""
    memory = t.new_zeros(t.numel() + 1)
    return memory[1:].view(t.shape).copy_(t)


def _contiguous(t: torch.Tensor) -> torch.Tensor | None:
    return None if t.is_contiguous() else t.contiguous()


VARIANTS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "contiguous": _contiguous,
    "permuted": _permuted,
    "channels_last": _channels_last,
    "storage_offset=1": _offset,
}


def laid_out(sample: Any, variant: str) -> Any | None:
    """The sample with its tensors in another geometry; None where that changes none of them."""
    changed = []

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided or leaf.is_conj() or leaf.is_neg():
            return leaf
        new = VARIANTS[variant](leaf.detach())
        changed.append(new is not None)
        return leaf if new is None else new.requires_grad_(leaf.requires_grad)

    inputs = tree_map(one, sample.inputs)
    return replace(sample, inputs=inputs) if any(changed) else None


def crossed(sample: Any, variant: str) -> tuple[int, list[str]] | None:
    """How many calls were predicted for one sample, and what was wrong; None where the variant changes nothing."""
    from tests.parity.outcomes import differences, is_as_under_any_mode, run

    if laid_out(sample.fresh(), variant) is None:
        return None
    kitsune.reset()
    expected = run(laid_out(sample.fresh(), variant), nullcontext())
    with comparing() as reference:
        got = run(laid_out(sample.fresh(), variant), kitsune.accelerate(warmup=0, device="cpu"))
    told = list(differences(sample.name, expected, got))
    if told and list(differences(sample.name, expected, run(laid_out(sample.fresh(), variant), nullcontext()))):
        told = []  # eager differs from itself
    if told and is_as_under_any_mode(laid_out(sample.fresh(), variant), got):
        told = []
    return reference.compared, [*reference.differences, *told]


def swept(name: str, most: int | None = None) -> dict[str, Any]:
    """The samples of one entry in all variants."""
    from tests import _opinfo

    row: dict[str, Any] = {"part": "variants", "entry": name, "compared": 0, "told": []}
    counts: Counter[str] = Counter()
    for sample, variant in itertools.product(itertools.islice(_opinfo.samples(name, "cpu", torch.float32), most), VARIANTS):
        try:
            found = crossed(sample, variant)
        except Exception as error:
            counts.update(run=1, crashed=1)
            row["told"].append(f"{variant}: {type(error).__name__}: {error}"[:400])
            continue
        if found is not None:
            row["compared"] += found[0]
            counts.update(["run", "different" if found[1] else "equal"])
            row["told"] += [f"{variant}: {words}"[:400] for words in found[1]]
    return {**row, "told": row["told"][:5], **{key: counts[key] for key in ("run", "equal", "different", "crashed")}}


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", default="1/1")
    parser.add_argument("--only", default="", help="entries, separated by commas")
    parser.add_argument("--most", type=int, help="so many samples of each entry")
    parser.add_argument("--out", type=Path, default=Path("crossref-variants.jsonl"))
    options = parser.parse_args(given)
    from tests import _opinfo

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    k, n = map(int, options.shard.split("/"))
    rows = []
    with options.out.open("w") as file:
        for name in options.only.split(",") if options.only else _opinfo.names()[k - 1 :: n]:
            rows.append(swept(name, options.most))
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            print("\n".join(f"{name}: {told}" for told in rows[-1]["told"]), end="\n" if rows[-1]["told"] else "")
    sums = {key: sum(row[key] for row in rows) for key in ("run", "equal", "different", "crashed", "compared")}
    print(f"variants {options.shard}:", ", ".join(f"{number} {key}" for key, number in sums.items()))
    return int(sums["equal"] < sums["run"])


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (its settings are those of the tests)

    sys.exit(main())
