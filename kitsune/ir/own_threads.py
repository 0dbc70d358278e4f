"""Kitsune's own threads: what they do to tensors, threads and random states is no act of the program's."""

import threading

_idents: set[int] = set()


def is_own() -> None:
    """The calling thread is one of Kitsune's, for as long as it lives."""
    _idents.add(threading.get_ident())


def in_own_thread() -> bool:
    """Is the calling thread one of Kitsune's?"""
    return threading.get_ident() in _idents
