"""What the host tells each replay of a graph, and the device reads itself: how it lies in the host's memory.

A page is a word with how many numbers have changed (all of them, or none), the addresses of the tensors that come in, those of
where results are to be copied, and the numbers; words have 8 bytes. Replay number k reads page k modulo `N_PAGES`.
"""

# The host may be one replay less than this ahead of the device.
N_PAGES = 64
# The device tells how far it is at each replay whose number is a multiple of this: the kernel that writes the host's memory ends
# only when that has been written.
TOLD_EVERY = 16
# Words before the addresses.
HEAD = 1
# Results that a graph may copy to where it is told, and the most bytes that one may have.
N_COPIES = 2
FEW_BYTES = 16
