"""Intercept: the dispatch mode, what is known of each op, and what a call would return."""

from kitsune.dispatch.call_mode import CallMode
from kitsune.dispatch.metadata import infer
from kitsune.dispatch.mode import RecordMode, below_autograd, foreign_modes, keep_out_of_dynamo, kept_out_by
from kitsune.dispatch.op_table import describe

__all__ = ["CallMode", "RecordMode", "below_autograd", "describe", "foreign_modes", "infer", "keep_out_of_dynamo", "kept_out_by"]
