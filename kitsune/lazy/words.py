"""Words of torch's errors, as eager has them."""

import re

# Of a view that was written, eager's autograd knows no more than its strides. While Kitsune records, it knows how it was taken.
# Where torch numbers the formulas of an operator (`SqueezeBackward2`), as_strided has one.
_VIEWS = "Alias Diagonal Expand Permute ReshapeAlias Select Slice Squeeze T Transpose Unfold Unsqueeze View"
_OUTPUT = re.compile(rf"(which is output \d+ of )(?:{'|'.join(_VIEWS.split())})(Backward)?\d*(?=, is at version)")


# Torch would take such a view once more, and finds that what it is of wants no gradient; eager goes by the strides alone.
_NO_NODE = "new_fn INTERNAL ASSERT FAILED"
LOST = (
    "this is a view of a tensor that was written and then stopped wanting a gradient (requires_grad_(False), detach_()): while "
    "Kitsune records, torch cannot tell the view's history, which leads nowhere in eager. Take the view again behind that, or "
    "detach it before."
)


def in_eagers_words(error: RuntimeError) -> None:
    """Change the words of an error of autograd's to those that eager has for it, or to a sentence where eager has none."""
    if not error.args or not isinstance(error.args[0], str):
        return
    if "modified by an inplace operation" in error.args[0]:
        error.args = (_OUTPUT.sub(_as_strided, error.args[0]), *error.args[1:])
    elif _NO_NODE in error.args[0]:
        error.args = (LOST, *error.args[1:])


def _as_strided(found: re.Match[str]) -> str:
    return found[1] + ("AsStridedBackward0" if found[2] else "AsStrided")
