"""The room that a confined VMM can take on the host's disks, and what its owner reads of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vmrun.control import runtime
from vmrun.host.console_log import LOG_LIMIT
from vmrun.run import ending

ROOT = Path(__file__).parents[2]

# A process with the limits of a confined VMM writes its two logs, and then as one that was taken over.
PROGRAM = """
import errno, json, os, sys
from pathlib import Path
from vmrun.host.console_log import ConsoleLog
from vmrun.machine import confine

place = Path(sys.argv[1])
vmm_log = os.open(place / "vmm.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
disk = os.open(place / "disk", os.O_RDWR | os.O_CREAT)
with ConsoleLog(place / "console.log") as log:
    confine._limit(1)
    for number in range(50):
        log.append(bytes([number]) * 100_000)
    log.append(b"the log went on")
    kept = log.read()
    failures = []
    for fd, offset in ((vmm_log, 0), (log._fd, 0), (disk, 1 << 30)):
        try:
            os.lseek(fd, offset, os.SEEK_SET)
            for _ in range(50):
                os.write(fd, bytes(100_000))
            failures.append("none")
        except OSError as error:
            failures.append(errno.errorcode[error.errno])
    try:
        os.ftruncate(vmm_log, 1 << 40)
    except OSError as error:
        failures.append(errno.errorcode[error.errno])
print(json.dumps([failures, kept.endswith(b"the log went on") and b"lost" not in kept]))
"""


def test_its_logs_have_all_the_room_they_need_and_no_more(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["EFBIG"] * 4, True]
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes == {"disk": 0} | dict.fromkeys(("vmm.log", "console.log", "console.log.1"), LOG_LIMIT)


def test_the_owner_reads_the_end_of_a_console_log_of_any_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VMRUN_RUNTIME", str(tmp_path))
    (tmp_path / "web").mkdir()
    log = tmp_path / "web" / runtime.CONSOLE_LOG
    log.write_bytes(b"short")
    assert ending.last_words("web") == "short"
    with open(log, "r+b") as file:
        file.truncate(1 << 42)  # more than fits into any memory
        file.seek(-5000, 2)
        file.write(b"\xc3\xa9" * 2500)
    assert ending.last_words("web") == "é" * 2048
    log.unlink()
    assert ending.last_words("web") == ""


def test_a_console_is_printable() -> None:
    said = "\x1b[31mwörds\x1b[0m\r\n\tmore\x07\x9b2J\u202e\ud800"
    assert ending.printable(said) == "?[31mwörds?[0m\n\tmore??2J??"
