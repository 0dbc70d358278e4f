"""product, softmax, product in a function or module become one call of the library's attention."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

PRODUCTS = {torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm", "__matmul__"}
SOFTMAX = {torch.softmax, F.softmax, "softmax"}
SCALINGS = {operator.mul: False, torch.mul: False, "mul": False, operator.truediv: True, torch.div: True, "div": True}


def with_attention(fn: Any) -> tuple[Any, int, str | None]:
    """The function or module with its attentions replaced, how many there were, and why they could not be looked for."""
    try:
        traced = fx.symbolic_trace(fn)
    except Exception as error:
        return fn, 0, f"no attention was looked for: {type(error).__name__} while following the code ({error})"
    n_found = 0
    for node in list(traced.graph.nodes):
        n_found += _replace(traced, node)
    if not n_found:
        return fn, 0, None
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced, n_found, None


def _replace(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Is this the second product of an attention? Then it is the whole of it from now on."""
    if not _is(node, PRODUCTS) or len(node.args) != 2 or node.kwargs:
        return False
    weights, value = node.args
    if not isinstance(weights, fx.Node) or not _is_softmax(traced, weights) or len(weights.users) != 1:
        return False
    scores = weights.args[0] if weights.args else weights.kwargs.get("input")
    product, scale = _unscaled(scores)
    if product is None or not _is(product, PRODUCTS) or len(product.args) != 2 or len(product.users) != 1:
        return False
    query, key = product.args
    graph = traced.graph
    with graph.inserting_before(node):
        turned = graph.call_method("transpose", (key, -2, -1))
        attention = graph.call_function(F.scaled_dot_product_attention, (query, turned, value), {"scale": scale})
    node.replace_all_uses_with(attention)
    return True


def _is(node: Any, targets: set[Any]) -> bool:
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


def _is_softmax(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Over the last dimension, in the precision that it is given."""
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        return isinstance(module, nn.Softmax) and bool(module.dim == -1)
    if not _is(node, SOFTMAX):
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return bool(dim == -1) and node.kwargs.get("dtype") is None


def _unscaled(scores: Any) -> tuple[fx.Node | None, float]:
    """The first product, and the number that it is multiplied by before the softmax."""
    if not isinstance(scores, fx.Node):
        return None, 1.0
    divides = SCALINGS.get(scores.target) if scores.op in ("call_function", "call_method") else None
    if divides is None:
        return scores, 1.0
    product, factor = scores.args if len(scores.args) == 2 else (None, None)
    if not isinstance(product, fx.Node) or not isinstance(factor, (int, float)) or len(scores.users) != 1:
        return None, 1.0
    return product, 1 / factor if divides else float(factor)
