"""Every entry of torch's databases, every sample, every dtype, on the replay executor: the whole of what CI samples.

    make test-full SHARD=1/4                               one of four shards; it writes sweep-1-of-4.jsonl
    python -m tests.parity.sweep --merge sweep-*.jsonl     what all of them found, in one table
    python -m tests.parity.sweep --only add --parts int64  one entry, one dtype

A shard exits with 1 if a sample differs from eager or crashes and no row of `expected.py` says so, or if one that a row
says so of is equal. What differs from eager is compared with eager under a mode that does nothing, too: to have its every bit is
equal (column "of_any_mode"), and where torch refuses a sample under such a mode nothing can be shown: it is left out, as is one
that the database itself cannot make. Each entry runs in a process of its own, so that one which takes the interpreter down is
counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

import kitsune
from tests import _moduleinfo, _opinfo
from tests.parity import sights
from tests.parity.expected import expected_reason, may_be_left

DTYPES = ("float32", "bfloat16", "float16", "float64", "complex64", "int64", "uint8", "bool")
PARTS = (*DTYPES, "no gradient", "pending", "in place", "vmap", "errors", "gradcheck", "gradgradcheck")
# What the tests set, and why, is in tests/conftest.py.
SWITCHES = {"gate": False, "verify": True, "compile_workers": 0, "numerics": "bitwise"}
COUNTS = ("run", "equal", "different", "crashed")
# Of those that were run: eager differs from itself; torch differs from eager while any mode is on, and Kitsune not from that.
NOTED = ("unstable", "of_any_mode")
# Verdicts of samples of which Kitsune has left nothing to eager; the rest name their reasons.
TOOK_PART = ("followed", "recorded", "observed", "no operator", "raised", "did not raise", "fails in eager")
SECONDS = 900  # for one entry; the longest takes a third of it on a busy machine
Row = dict[str, Any]


def names() -> list[str]:
    return [*_opinfo.names(("", "function", "custom")), *_moduleinfo.modules(), *_moduleinfo.optimizers()]


Check = Callable[[Any], sights.Verdict]


def work(name: str, part: str) -> tuple[Check, Iterator[Any]]:
    """What is done with which samples of an entry, in one part of the sweep."""
    if part in DTYPES:
        return sights.four_sights, sights.samples(name, getattr(torch, part))
    if name.partition("/")[0] in ("module", "optimizer"):
        return sights.four_sights, iter(())
    if part == "no gradient":
        return sights.four_sights, _opinfo.ungraded_samples(name, "cpu")
    if part in ("pending", "in place"):
        return sights.four_sights, _opinfo.pending_samples(name, "cpu", part == "in place")
    if part == "vmap":
        return sights.four_sights, _opinfo.mapped_samples(name, "cpu")
    if part == "errors":
        return sights.raised_alike, _opinfo.error_samples(name, "cpu")
    if part == "gradgradcheck" and not _opinfo.supports_second_gradients(name):
        return sights.four_sights, iter(())
    samples = (s for s in _opinfo.samples(name, "cpu", torch.float64) if any(t.requires_grad for t in s.tensors()))
    return partial(sights.checked_gradients, order=1 if part == "gradcheck" else 2), samples


def made(samples: Iterator[Any]) -> tuple[list[Any], str]:
    """All of them, up to one that the database cannot make, and why it cannot."""
    found = []
    try:
        for sample in samples:
            found.append(sample)
    except _opinfo.Unmade as error:
        return found, str(error)
    return found, ""


def swept(name: str, part: str, most: int) -> Row:
    """Run one part of one entry. What is kept of differences is enough to find them again."""
    began = time.perf_counter()
    row: Row = {
        "entry": name,
        "part": part,
        **dict.fromkeys(COUNTS, 0),
        "took_part": Counter(),
        "told": [],
        "unstable": 0,
        "of_any_mode": 0,
        "left_out": 0,
        "why_left_out": Counter(),
    }
    try:
        check, given = work(name, part)
        samples, unmade = made(given)
        row["left_out"] = max(0, len(samples) - most)
        if unmade:
            _leave_out(row, unmade)
        for index in range(0, len(samples), -(-len(samples) // most) or 1):
            _judge(row, check(samples[index]), index)
    except Exception:  # of the harness or out of Kitsune: either way the part is not shown to be equal
        row["crashed"] += 1
        row["told"].append(traceback.format_exc(limit=-4)[-600:])
    row["seconds"] = round(time.perf_counter() - began, 3)
    return row


def _judge(row: Row, verdict: sights.Verdict, index: int) -> None:
    if verdict.left_out:
        return _leave_out(row, f"torch refuses it under any mode: {verdict.left_out}")
    row["run"] += 1
    row["different" if verdict.differences else "equal"] += 1
    row["unstable"] += bool(verdict.unstable)
    row["of_any_mode"] += bool(verdict.of_any_mode)
    row["took_part"][verdict.took_part] += 1
    if verdict.differences and len(row["told"]) < 5:
        row["told"].append(f"sample {index}: " + "; ".join(verdict.differences)[:400])


def _leave_out(row: Row, reason: str) -> None:
    row["left_out"] += 1
    row["why_left_out"][reason.partition("\n")[0][:200]] += 1


def in_a_process(name: str, parts: Sequence[str], most: int) -> list[Row]:
    """The rows of one entry; where its process dies or hangs, the part that it was at counts as crashed."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_report, args=(name, parts, most, send))
    child.start()
    send.close()
    rows: list[Row] = []
    try:
        while len(rows) < len(parts) and receive.poll(SECONDS):
            rows.append(receive.recv())
    except EOFError:
        pass
    child.join(0 if len(rows) < len(parts) else None)
    if child.is_alive():
        child.kill()
        child.join()
    if len(rows) < len(parts):
        how = f"ended with {child.exitcode} (negative: by a signal) or took more than {SECONDS} s for one part"
        lost = {"entry": name, "part": parts[len(rows)], **dict.fromkeys(COUNTS, 0), "crashed": 1}
        rows += [{**lost, "took_part": {}, "told": [how], "unstable": 0, "of_any_mode": 0, "left_out": 0}]
        rows[-1] |= {"why_left_out": {}, "seconds": 0.0}
        rows += in_a_process(name, parts[len(rows) :], most) if len(rows) < len(parts) else []
    return rows


def _report(name: str, parts: Sequence[str], most: int, send: Any) -> None:
    for part in parts:
        send.send(swept(name, part, most))


def surprises(row: Row) -> list[str]:
    """What fails the sweep: a difference that no row of the table expects, or an expected one that is not there."""
    where = f"{row['entry']}[{row['part']}]"
    reason = expected_reason(row["entry"], row["part"])
    left = {how: n for how, n in row["took_part"].items() if how not in TOOK_PART}
    # What is mapped is run as in eager, whatever it is.
    if left and row["part"] != "vmap" and not may_be_left(row["entry"]):
        return [f"{where}: {sum(left.values())} samples were left to eager: {', '.join(left)}"]
    wrong = row["different"] + row["crashed"]
    if wrong and not reason:
        return [f"{where}: {told}" for told in row["told"]]
    if reason and row["run"] and not row["left_out"] and not wrong:
        return [f"{where}: equal by now, take it out of tests/parity/expected.py ({reason})"]
    return []


def table(rows: Sequence[Row]) -> str:
    """Counts by part, and how far Kitsune took part."""
    lines = [f"{'':14s}" + "".join(f"{name:>12s}" for name in (*COUNTS, *NOTED, "followed", "recorded", "neither", "minutes"))]
    for part in (*PARTS, "all"):
        here = [row for row in rows if part in (row["part"], "all")]
        took = sum((Counter(row["took_part"]) for row in here), Counter[str]())
        numbers = [sum(row[name] for row in here) for name in (*COUNTS, *NOTED)]
        parts = [took["followed"], took["recorded"], took.total() - took["followed"] - took["recorded"]]
        minutes = sum(row["seconds"] for row in here) / 60
        lines.append(f"{part:14s}" + "".join(f"{number:12d}" for number in (*numbers, *parts)) + f"{minutes:12.1f}")
    return "\n".join(lines)


def not_as_in_eager(rows: Sequence[Row]) -> list[str]:
    """What could not be judged, and why, by entry and part; and the entries that are as under any mode, and not as in eager."""
    of_any_mode = sorted({row["entry"] for row in rows if row["of_any_mode"]})
    named = ["as under any mode: " + ", ".join(of_any_mode)] if of_any_mode else []
    return named + [
        f"{row['entry']}[{row['part']}]: {n} left out: {why}" for row in rows for why, n in row["why_left_out"].items()
    ]


def told(rows: Sequence[Row]) -> int:
    """Print the table, what could not be judged, and what is wrong; the exit status."""
    wrong = list(chain.from_iterable(map(surprises, rows)))
    print("\n".join([*not_as_in_eager(rows), *wrong]))
    print(table(rows))
    print(f"{len({row['entry'] for row in rows})} entries; {len(wrong)} lines above are unexpected")
    return 1 if wrong else 0


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", default="1/1", help="k/n: the k-th of n equal parts of all entries")
    parser.add_argument("--parts", default=",".join(PARTS), help="which dtypes and checks, separated by commas")
    parser.add_argument("--only", default="", help="entries, separated by commas")
    parser.add_argument("--most", type=int, default=sys.maxsize, help="so many samples of each entry and part, evenly spread")
    parser.add_argument("--out", type=Path, help="write what is found to this file, a line of JSON each")
    parser.add_argument("--merge", type=Path, nargs="+", help="say what these files hold, and run nothing")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    if options.merge:
        return told([json.loads(line) for file in options.merge for line in file.read_text().splitlines()])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.out:
        options.out.write_text("")
    shard, n = map(int, options.shard.split("/"))
    chosen = options.only.split(",") if options.only else names()[shard - 1 :: n]
    # What only the first sample pays (imports of torch's own, doors) is paid before processes are forked. With another warmup,
    # since a child's contexts of options that its parent has used stay paused.
    sights.four_sights(next(sights.samples("add", torch.float32)), warmup=0)
    # A third of the time went into collections that looked at all of torch's modules again.
    gc.freeze()
    rows: list[Row] = []
    for name in chosen:
        found = in_a_process(name, options.parts.split(","), options.most)
        rows += found
        if options.out:
            with options.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
    return told(rows)


if __name__ == "__main__":
    with kitsune.config.patch(**SWITCHES):
        sys.exit(main())
