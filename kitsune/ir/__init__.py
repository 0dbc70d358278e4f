"""The nouns that every stage shares. This package imports nothing of Kitsune."""

from kitsune.ir.barrier import Barrier, Site
from kitsune.ir.graph import Effects, Graph, Kind, Op, Operand, OpRow, OutputSpec, Result, Slot, Value
from kitsune.ir.output_spec import describe_result
from kitsune.ir.tensor_type import TensorType, default_type, storage_of, tensor_type, type_of
from kitsune.ir.text import graph_text
from kitsune.ir.verify import verify

__all__ = [
    "Barrier",
    "Effects",
    "Graph",
    "Kind",
    "Op",
    "OpRow",
    "Operand",
    "OutputSpec",
    "Result",
    "Site",
    "Slot",
    "TensorType",
    "Value",
    "default_type",
    "describe_result",
    "graph_text",
    "storage_of",
    "tensor_type",
    "type_of",
    "verify",
]
