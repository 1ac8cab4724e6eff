"""A machine that lives its whole life imports nothing that only other machines need: that is what keeps
`scripts/bench_startup.py` where it is.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Each of these costs a start a millisecond at least.
HEAVY = {
    *("typer", "rich", "pyroute2", "psutil", "pydantic", "asyncio", "argparse", "subprocess", "logging"),
    *("calendar", "secrets", "tempfile", "devices.scsi", "devices.vhost.frontend", "vmrun.machine.workers"),
}


def test_a_life_without_what_it_does_not_need(bare_kernel: Callable[[str], Path], tmp_path: Path) -> None:
    program = (
        "import sys; from vmrun import cli\n"
        "assert cli.run(['boot', '--kernel', sys.argv[1]]) == 0\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    guest = bare_kernel("mov edx, 0x501; xor eax, eax; out dx, al; spin: jmp spin")
    command = [sys.executable, "-c", program, str(guest)]
    environment = {"VMRUN_RUNTIME": str(tmp_path / "run")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout == "[]\n", run.stderr
