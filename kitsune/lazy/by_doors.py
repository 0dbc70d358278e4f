"""Calls that are not followed, and come by the doors that no place in torch has: of operators by their names, of products."""

from typing import Any

from kitsune.lazy.replaced import DOORS, original_of


class ByDoors:
    """Takes the calls of one accelerating thread where the call lane does not."""

    def call(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make one call of torch's API (the `__torch_function__` of the pipeline's mode)."""
        door = DOORS.get(func)
        return (door or original_of(func) or func)(*args, **(kwargs or {}))
