"""Kitsune's own threads: what they do to tensors, threads and random states is no act of the program's."""

import threading


class _Thread(threading.local):
    """What is known of the calling thread. (Not by its number: another one has that once it has ended.)"""

    is_own = False


_this = _Thread()


def is_own() -> None:
    """The calling thread is one of Kitsune's, for as long as it lives."""
    _this.is_own = True


def in_own_thread() -> bool:
    """Is the calling thread one of Kitsune's?"""
    return _this.is_own
