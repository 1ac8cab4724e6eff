"""The `vmrun` command: runs one of the commands of `app.py` and turns every way to fail into one line and a
code.

User side of the VMM process. Nothing is imported here but what every call needs: `vmrun --version` costs no
more than Python's own start, and a command line without mistakes no Typer.
"""

import gc
import os
import sys

from vmrun.cli import late
from vmrun.errors import EXIT_VMM, UserError

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, likewise


def main() -> None:
    """The console script: never returns, exits with a documented code (docs/guide.md)."""
    # Starting makes many objects and next to no garbage: to look for some seventy times costs 2 ms.
    gc.set_threshold(20_000)
    late.delay("inspect")  # dataclasses have it for those without a docstring: 4 ms
    _fill_standard_fds()
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:
        # Whoever read our output has gone (`vmrun doctor | head -1`); what is left would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)
    _exit(code)


def _exit(code: int) -> None:
    """End the process without taking the interpreter apart, module by module, which takes 8 ms.

    Everything of ours is closed by now: what is open has an owner that closes it. A thread that still runs is
    waited for, which only the interpreter itself can do.
    """
    threading = sys.modules.get("threading")
    if os.environ.get("VMRUN_DEBUG") == "1" or (threading is not None and threading.active_count() > 1):
        sys.exit(code)
    import atexit

    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code & 0xFF)


def run(arguments: list[str]) -> int:
    """Run the command line and return the exit code. With VMRUN_DEBUG=1 errors keep their traceback."""
    try:
        if arguments == ["--version"]:
            return print_version()
        return _run_app(arguments)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return EXIT_BROKEN_PIPE
        if os.environ.get("VMRUN_DEBUG") == "1":
            import traceback

            traceback.print_exc()
        else:
            print(f"vmrun: {one_line(error)}", file=sys.stderr)
        return error.code if isinstance(error, UserError) else EXIT_VMM


def print_version() -> int:
    import vmrun

    print(f"vmrun {vmrun.__version__}")
    return 0


def _run_app(arguments: list[str]) -> int:
    from vmrun.cli import fast_path

    understood = fast_path.parse(arguments)
    if understood is None:
        from vmrun.cli import typer_app

        return typer_app.run(arguments)
    command, values = understood
    return command(**values)


def _reader_is_gone() -> bool:
    """Whether it is our stdout that is a broken pipe, and not some descriptor of the machine's."""
    import select

    poll = select.poll()
    poll.register(1, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def one_line(error: Exception) -> str:
    """What is wrong, for the user."""
    if isinstance(error, UserError):
        text = str(error)
    elif isinstance(error, OSError):
        # strerror is None for the messages our own code gives to OSError(errno, text) without an errno.
        text = error.strerror or str(error)
        if error.filename is not None:
            text = f"{os.fsdecode(error.filename)}: {text}"
    else:
        text = f"internal error: {type(error).__name__}: {error} (VMRUN_DEBUG=1 shows where)"
    text = " ".join(text.split())
    # A hostile image chooses words in it (the name of its backing file): they do not steer the terminal.
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _fill_standard_fds() -> None:
    """Open /dev/null for each of stdin, stdout and stderr that the caller closed.

    Otherwise the next file opened, a disk maybe, would get that number, and be written to by a mere print.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # open(2) returns the lowest free number, which is `fd`; it has to survive exec like any standard
            # fd.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
