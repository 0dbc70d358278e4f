"""What the sweep expects to differ from eager, each row with its reason. A row that is equal fails the sweep."""

from __future__ import annotations

# (entry, part of the sweep): reason. "*" is every part.
EXPECTED: dict[tuple[str, str], str] = {
    ("prod", "float16"): "torch's other formula for its gradient is more than a rounding away, 1.2e-3 where 1e-3 is allowed",
    ("masked.prod", "float16"): "as prod",
    ("masked.prod", "complex64"): "as prod: 2.1e-6 where 1.3e-6 is allowed",
    ("custom/NumpyNonzeroCustomOp", "bool"): "the database cannot make its sample: it multiplies a bool tensor by integers",
    (
        "tensor_split",
        "pending",
    ): "the database bound torch.tensor_split before a door stood there; tests/parity/test_found.py has both",
}


def expected_reason(entry: str, part: str) -> str | None:
    return EXPECTED.get((entry, part)) or EXPECTED.get((entry, "*"))
