"""The nouns that every stage shares. This package imports nothing of Kitsune."""

from kitsune.ir.barrier import Barrier, Site
from kitsune.ir.edges import awaited, bits, happens_before, meetings, predecessors, roots
from kitsune.ir.graph import (
    BACKWARDS_WITH_PLANS,
    FORWARDS_WITH_PLANS,
    OVERWRITES,
    UNREAD,
    WITH_PLANS,
    Effects,
    Graph,
    Kind,
    Op,
    Operand,
    OpRow,
    OutputSpec,
    Result,
    Slot,
    Value,
    may_have_drawn,
    n_values,
    reads_slots,
    slots_in,
    values_in,
)
from kitsune.ir.handover import Carried, Handover
from kitsune.ir.lent import LentMemory, lent_memory, mark_lent, own
from kitsune.ir.output_spec import describe_result
from kitsune.ir.own_threads import in_own_thread, is_own
from kitsune.ir.plan import Access, Kernel, Launch, Load, Local, Plan, Refusal, Step, Store, touched_bytes, window_order
from kitsune.ir.plan_serial import dump_plan, graph_digest, load_plan, load_plan_ahead
from kitsune.ir.plan_text import plan_text
from kitsune.ir.program import Extent, Pending, Pointer, Program, Scalar, Size, SlotAddress, Stride, Tile, Written
from kitsune.ir.quiet_times import quiet
from kitsune.ir.reductions import Reduction, argument_names, left_of, named, reduction_of
from kitsune.ir.serial import dump_graph, load_graph
from kitsune.ir.tensor_type import TensorType, default_type, storage_of, tensor_type, type_of
from kitsune.ir.text import graph_text
from kitsune.ir.verify import verify
from kitsune.ir.verify_plan import storages_of, verify_plan
from kitsune.ir.versions import count_writes_to, list_writes_counted, versions_kept

__all__ = [
    "BACKWARDS_WITH_PLANS",
    "FORWARDS_WITH_PLANS",
    "OVERWRITES",
    "UNREAD",
    "WITH_PLANS",
    "Access",
    "Barrier",
    "Carried",
    "Effects",
    "Extent",
    "Graph",
    "Handover",
    "Kernel",
    "Kind",
    "Launch",
    "LentMemory",
    "Load",
    "Local",
    "Op",
    "OpRow",
    "Operand",
    "OutputSpec",
    "Pending",
    "Plan",
    "Pointer",
    "Program",
    "Reduction",
    "Refusal",
    "Result",
    "Scalar",
    "Site",
    "Size",
    "Slot",
    "SlotAddress",
    "Step",
    "Store",
    "Stride",
    "TensorType",
    "Tile",
    "Value",
    "Written",
    "argument_names",
    "awaited",
    "bits",
    "count_writes_to",
    "default_type",
    "describe_result",
    "dump_graph",
    "dump_plan",
    "graph_digest",
    "graph_text",
    "happens_before",
    "in_own_thread",
    "is_own",
    "left_of",
    "lent_memory",
    "list_writes_counted",
    "load_graph",
    "load_plan",
    "load_plan_ahead",
    "mark_lent",
    "may_have_drawn",
    "meetings",
    "n_values",
    "named",
    "own",
    "plan_text",
    "predecessors",
    "quiet",
    "reads_slots",
    "reduction_of",
    "roots",
    "slots_in",
    "storage_of",
    "storages_of",
    "tensor_type",
    "touched_bytes",
    "type_of",
    "values_in",
    "verify",
    "verify_plan",
    "versions_kept",
    "window_order",
]
