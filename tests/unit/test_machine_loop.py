"""The VMM's event loop, where its other users do not show it."""

import os

from vmrun.machine.loop import EventLoop


def test_a_late_caller_writes_to_nobody() -> None:
    """After the loop's end its descriptor's number may be a disk's."""
    loop = EventLoop()
    number = loop._wake_fd
    loop.close()
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    try:
        os.dup2(write_end, number)
        loop.call_soon(lambda: None)
        loop.stop()
        try:
            assert os.read(read_end, 100) == b"", "somebody wrote"
        except BlockingIOError:
            pass
    finally:
        for fd in {read_end, write_end, number}:
            os.close(fd)
