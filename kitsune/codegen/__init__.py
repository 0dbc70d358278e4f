"""Kernels of the plan as Triton source, and that source compiled. Importing this imports no Triton."""

from kitsune.codegen.compiler import Compiler
from kitsune.codegen.exactness import distance, why_not_exact
from kitsune.codegen.keys import text_key, why_not_batched
from kitsune.codegen.libdevice import toolkit_libdevice
from kitsune.codegen.lower import why_not_lowered
from kitsune.codegen.lowering import NotLowered
from kitsune.codegen.render import parameters_of, render

__all__ = [
    "Compiler",
    "NotLowered",
    "distance",
    "parameters_of",
    "render",
    "text_key",
    "toolkit_libdevice",
    "why_not_batched",
    "why_not_exact",
    "why_not_lowered",
]
