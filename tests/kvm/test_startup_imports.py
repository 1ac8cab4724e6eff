"""A machine that lives its whole life imports nothing that only other machines need: that is what keeps
`scripts/bench_startup.py` where it is.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from vmrun.errors import EXIT_TIMEOUT

ROOT = Path(__file__).parents[2]

# Each of these costs a start a millisecond at least.
HEAVY = {
    *("typer", "rich", "pyroute2", "psutil", "pydantic", "asyncio", "argparse", "subprocess", "logging"),
    *("calendar", "secrets", "tempfile", "devices.scsi", "devices.vhost.frontend", "vmrun.machine.workers"),
    # inspect (with ast) comes in for the first dataclass without a docstring.
    *("hashlib", "shutil", "ast"),
}


def test_a_life_without_what_it_does_not_need(bare_kernel: Callable[[str], Path], tmp_path: Path) -> None:
    program = (
        "import sys; from vmrun import cli\n"
        "cli.late.delay('inspect')\n"
        "assert cli.run(['boot', '--kernel', sys.argv[1]]) == 0\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    guest = bare_kernel("mov edx, 0x501; xor eax, eax; out dx, al; spin: jmp spin")
    command = [sys.executable, "-c", program, str(guest)]
    environment = {"VMRUN_RUNTIME": str(tmp_path / "run")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout == "[]\n", run.stderr


def test_a_restored_life_loads_nothing_and_knows_no_inspect(
    bare_kernel: Callable[[str], Path], tmp_path: Path
) -> None:
    environment = {**os.environ, "VMRUN_RUNTIME": str(tmp_path / "run")}
    guest, saved = bare_kernel("spin: jmp spin"), tmp_path / "saved"
    for arguments in (["boot", "-d", "--name", "a", "--kernel", guest], ["snapshot", "a", saved, "--stop"]):
        command = [sys.executable, "-m", "vmrun", *map(str, arguments)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=60)
    program = (
        "import sys; from vmrun import cli\n"
        "cli.late.delay('inspect')\n"
        f"assert cli.run(['restore', sys.argv[1], '--timeout', '1s']) == {EXIT_TIMEOUT}\n"
        f"print(sorted({HEAVY | {'vmrun.boot.loader'}!r} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, str(saved)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout == "[]\n", run.stderr
