"""When a thread's operators are not Kitsune's: while the program captures them, or has them take memory from a pool of its own.

What Kitsune made meanwhile would be a part of the program's graph, or lie in its pool: a graph of Kitsune's that was captured
there would share its memory with whatever the program makes there later.
"""

import threading

from kitsune.ir import streams

# The threads that use a pool, by what tells the uses apart.
_threads: dict[object, int] = {}


def begin(use: object) -> None:
    """This thread takes memory from a pool of the program's, until `end` is called with the same object."""
    _threads[use] = threading.get_ident()


def end(use: object) -> None:
    """In any thread, and as often as one likes."""
    _threads.pop(use, None)


def is_plain() -> bool:
    """Is all that this thread calls to run as plain PyTorch?"""
    return streams.is_captured() or uses_pool()


def uses_pool() -> bool:
    """Does this thread take memory from a pool of the program's?"""
    return bool(_threads) and threading.get_ident() in list(_threads.values())
