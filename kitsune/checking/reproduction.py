"""A region that went wrong, as a Python file that runs it again: eagerly and by plan."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kitsune.backends import Backend, backend_of
from kitsune.checking.inputs import Draws, Start
from kitsune.checking.judge import judge
from kitsune.checking.narrow import first_of
from kitsune.checking.plan_run import executor_of, op_by_op
from kitsune.checking.search import Ran
from kitsune.config import config
from kitsune.dispatch import below_autograd
from kitsune.ir import Graph, Launch, Site, dump_graph, load_graph, n_values
from kitsune.planning import planner_for

SCRIPT = '''r"""{sentence}

It was written by Kitsune's check, and needs torch, kitsune and the file {data} beside it: with its tensors the operators
below are run one by one, as eager does, and by Kitsune's plan. It prints what differs, and exits with 1 if something does.

{graph}
"""

from kitsune.checking import reproduce

raise SystemExit(reproduce(__file__))
'''


def write(
    folder: Path,
    graph: Graph,
    inputs: dict[int, torch.Tensor],
    scalars: list[float],
    state: Any,
    how: dict[str, Any],
    sentence: str,
) -> Path:
    """Write a region with its inputs, and how it was planned. Returns the script's path. Raises OSError."""
    text = dump_graph(graph)
    last = graph.ops[-1].target._opname if graph.ops else "empty"
    name = f"{last}_{hashlib.sha256((text + repr(how)).encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "graph": text,
        "sites": [None if op.site is None else tuple(op.site) for op in graph.ops],
        "inputs": {number: tensor.detach() for number, tensor in inputs.items()},
        "scalars": list(scalars),
        "state": state,
        "how": how,
    }
    torch.save(content, folder / f"{name}.pt")
    path = folder / f"{name}.py"
    path.write_text(SCRIPT.format(sentence=_quoted(sentence), data=f"{name}.pt", graph=_quoted(str(graph))))
    return path


def _quoted(text: str) -> str:
    return text.replace('"""', "'''")


def how_now(arch: str, numerics: str, fuse: bool) -> dict[str, Any]:
    """How regions are planned at present, as a script keeps it."""
    return {"arch": arch, "fuse": fuse, "knobs": {"numerics": numerics, "fuel": config.fuel, "layouts": config.layouts}}


def reproduce(script: str) -> int:
    """Run a region again that was written beside a script: by eager's operators, and by plan. Returns the exit status."""
    content = torch.load(Path(script).with_suffix(".pt"), weights_only=True)
    how = content["how"]
    with config.patch(compile_workers=0, **how["knobs"]):
        fault, differs = _again(content, how)
    if fault is None:
        rounded = "; some values differ in rounding, as the grade of numerics allows" if differs else ""
        print(f"Eager and the plan are equal{rounded}.")
        return 0
    where = "" if fault.op is None else f"{fault.op.target} at {fault.op.site or 'no line of Python'}: "
    kernel = f", in the kernel {fault.launch.name}" if fault.launch is not None and fault.launch.kernels else ""
    print(f"Eager and the plan differ{kernel}: {where}{fault.sentence}")
    return 1


def graph_in(content: dict[str, Any]) -> Graph:
    """The region in a file, with the lines of its operators."""
    graph = load_graph(content["graph"])
    sites = [None if site is None else Site(*site) for site in content["sites"]]
    return replace(graph, ops=tuple(replace(op, site=site) for op, site in zip(graph.ops, sites, strict=True)))


def _again(content: dict[str, Any], how: dict[str, Any]) -> tuple[Any, bool]:
    graph, scalars = graph_in(content), content["scalars"]
    given: list[Any] = [None] * n_values(graph)
    for number, tensor in content["inputs"].items():
        given[number] = tensor
    device = next((v.type.device for op in graph.ops for v in op.outputs if v.type.device.type != "cpu"), torch.device("cpu"))
    backend = backend_of(device)
    if not isinstance(backend, Backend):
        print(f"{backend} Each kernel's operators are run one by one instead.")
    prepare = backend.prepare_launch if isinstance(backend, Backend) else no_kernels
    with below_autograd(), torch.no_grad():
        draws = Draws(device)
        draws.set(content["state"])
        start = Start(graph, given)
        values = start.values()
        planner = planner_for(how["arch"])
        plan = planner.plan(graph) if how["fuse"] else op_by_op(graph)
        executor = executor_of(prepare)
        executor.run(executor.prepare(plan), values, scalars)
        # What it has written are copies, so that `start` still has what it began with.
        ran = Ran(graph, start, values, scalars, content["state"], draws.now(), device, plan, prepare, config.numerics)
        verdict = judge(ran)
        fault = None if verdict.fault is None else first_of(ran, verdict.fault, planner.plan)
    return fault, not verdict.same


def no_kernels(launch: Launch) -> Any:
    """Makes no launch ready: its ops are run one by one."""
    raise RuntimeError("there are no kernels for this device")
