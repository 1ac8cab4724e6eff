"""Debian's own dynamically linked CPython as PID 1: a dynamic loader, shared libraries, big tables, much
memory.
"""

import re
import subprocess
from pathlib import Path

import pytest

from tests.guest.conftest import MakeInitramfs, boot
from vmrun.errors import EXIT_PANIC
from vmrun.guestkit.kit import GuestKit

PYTHON = Path("/usr/bin/python3")


def _shared_libraries(program: Path) -> list[Path]:
    listing = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    return [Path(name) for name in re.findall(r"(/\S+) \(0x", listing)]


@pytest.fixture
def python_initramfs(initramfs: MakeInitramfs) -> Path:
    program = PYTHON.resolve()
    library = Path("/usr/lib") / program.name
    files = [program, *_shared_libraries(program)]
    # -S and frozen modules leave only the codecs to be imported from files.
    files += [*sorted((library / "encodings").glob("*.py")), library / "os.py"]
    contents = {str(file.relative_to("/")): file for file in files}
    return initramfs({"usr/bin/python3": program, **contents})


@pytest.mark.slow
@pytest.mark.timeout(230)
def test_dynamically_linked_python(guest_kit: GuestKit, python_initramfs: Path) -> None:
    program = "print(sum(range(10**6)),sorted({1.5:2,0.25:3}),2**200,flush=True)"
    result = boot(
        "--initrd",
        python_initramfs,
        "--append",
        f'rdinit=/usr/bin/python3 PYTHONHOME=/usr -- -I -S -c "{program}"',
        timeout=200,
    )
    assert f"499999500000 [0.25, 1.5] {2**200}" in result.console, result
    assert result.code == EXIT_PANIC  # PID 1 ended
