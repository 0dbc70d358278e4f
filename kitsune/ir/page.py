"""What the host tells each replay of a graph, and the device reads itself: how it lies in the host's memory.

A page is a word with how many numbers have changed (all of them, or none), the addresses of the tensors that come in, and the
numbers; words have 8 bytes. Replay number k reads page k modulo `N_PAGES`.
"""

# The host may be one replay less than this ahead of the device.
N_PAGES = 64
# Words before the addresses.
HEAD = 1
