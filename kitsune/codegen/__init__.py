"""Kernels of the plan as Triton source, and that source compiled. Importing this imports no Triton."""

from kitsune.codegen.background import BackgroundCompiler
from kitsune.codegen.choices import Choice, Choices, why_not_tried
from kitsune.codegen.compile_pool import CompilePool, WorkerFailed, compile_pool, default_workers
from kitsune.codegen.compiler import Compiler
from kitsune.codegen.dtypes import HALF
from kitsune.codegen.exactness import UNROUNDED, Difference, differences, distance, why_not_exact
from kitsune.codegen.keys import text_key, why_not_batched
from kitsune.codegen.libdevice import toolkit_libdevice
from kitsune.codegen.lower import why_not_lowered
from kitsune.codegen.lowering import NotLowered, base_name
from kitsune.codegen.pages import COPY_RESULT, COPY_TENSORS, PAGE_PROGRAMS, READ_PAGE
from kitsune.codegen.render import parameters_of, render, write
from kitsune.codegen.tiles import candidates, is_looped, keeps_bits, keeps_rows, tile_of
from kitsune.codegen.windows import is_window

__all__ = [
    "COPY_RESULT",
    "COPY_TENSORS",
    "HALF",
    "PAGE_PROGRAMS",
    "READ_PAGE",
    "UNROUNDED",
    "BackgroundCompiler",
    "Choice",
    "Choices",
    "CompilePool",
    "Compiler",
    "Difference",
    "NotLowered",
    "WorkerFailed",
    "base_name",
    "candidates",
    "compile_pool",
    "default_workers",
    "differences",
    "distance",
    "is_looped",
    "is_window",
    "keeps_bits",
    "keeps_rows",
    "parameters_of",
    "render",
    "text_key",
    "tile_of",
    "toolkit_libdevice",
    "why_not_batched",
    "why_not_exact",
    "why_not_lowered",
    "why_not_tried",
    "write",
]
