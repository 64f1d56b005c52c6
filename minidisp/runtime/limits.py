"""A memory limit for code that parses untrusted files."""

import contextlib
import os
import sys
from collections.abc import Iterator

STATM = "/proc/self/statm"  # on Linux: the address space in use, in pages


@contextlib.contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """Inside the block, the process can allocate at most `more` bytes; beyond, allocations raise MemoryError.

    Linux only; elsewhere, there is no limit.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    descriptor = os.open(STATM, os.O_RDONLY)  # four times faster than open(), and called for every dialogue
    in_use = int(os.read(descriptor, 100).split()[0]) * resource.getpagesize()
    os.close(descriptor)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    ceiling = min([in_use + more, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
