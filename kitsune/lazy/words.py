"""Words of torch's errors, as eager has them."""

import re

# Of a view that was written, eager's autograd knows no more than its strides. While Kitsune records, it knows how it was taken.
# Where torch numbers the formulas of an operator (`SqueezeBackward2`), as_strided has one.
_VIEWS = "Alias Diagonal Expand Permute ReshapeAlias Select Slice Squeeze T Transpose Unfold Unsqueeze View"
_OUTPUT = re.compile(rf"(which is output \d+ of )(?:{'|'.join(_VIEWS.split())})(Backward)?\d*(?=, is at version)")


def in_eagers_words(error: RuntimeError) -> None:
    """Change the words of an error of a backward to those that eager has for it."""
    if error.args and isinstance(error.args[0], str) and "modified by an inplace operation" in error.args[0]:
        error.args = (_OUTPUT.sub(_as_strided, error.args[0]), *error.args[1:])


def _as_strided(found: re.Match[str]) -> str:
    return found[1] + ("AsStridedBackward0" if found[2] else "AsStrided")
