"""Keeps the memory that a program frees for what it allocates next, as steps on a CPU want it.

By default glibc maps each large block anew, gives it back to the system when it is freed, and cuts off the free end of
its heap. All tensors of a step on a CPU then come in new pages, which the system clears one by one.
`python -m benchmarks.memory` counts them. (mallopt(3); PyTorch's tuning guide takes another allocator for that.)
"""

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_MOST = 2**31 - 1  # bytes: what an int holds
_MOST_OF_OLDER = 2**25  # what an older glibc takes (half of its HEAP_MAX_SIZE): it refuses more
_OF_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory(device_type: str) -> None:
    """Tell glibc to keep what is freed, for as long as the process lives.

    Does nothing where the tensors are not in the memory of a CPU, libc is another, or one of the variables
    MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_ and GLIBC_TUNABLES tells glibc what the user wants.
    """
    if device_type != "cpu" or platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _OF_THE_USER):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_TRIM_THRESHOLD, _MOST)
    if not libc.mallopt(_MMAP_THRESHOLD, _MOST):
        libc.mallopt(_MMAP_THRESHOLD, _MOST_OF_OLDER)
