"""Words of torch's errors, as eager has them."""

import re

# Of a view that was written, eager's autograd knows no more than its strides. While Kitsune records, it knows how it was taken.
_VIEWS = "Alias Diagonal Expand Permute ReshapeAlias Select Slice Squeeze Squeeze1 Squeeze2 T Transpose Unfold Unsqueeze View"
_OUTPUT = re.compile(rf"(which is output \d+ of )(?:{'|'.join(_VIEWS.split())})(?=(?:Backward\d+)?, is at version)")


def in_eagers_words(error: RuntimeError) -> None:
    """Change the words of an error of a backward to those that eager has for it."""
    if error.args and isinstance(error.args[0], str) and "modified by an inplace operation" in error.args[0]:
        error.args = (_OUTPUT.sub(r"\1AsStrided", error.args[0]), *error.args[1:])
