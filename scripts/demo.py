"""The demo: a Linux guest with a qcow2 root and a network card, doing what a guest does, and the proof that
it did.

    .venv/bin/python scripts/demo.py        (as root; `make demo` sets everything up first)

A copy of the guest kit's disk is booted with `vmrun boot`; the guest's /etc/vmrun/demo prints its kernel,
writes a file, answers our pings, fetches a page from a web server here, and powers off. Then the image is
checked, and the file is read out of it.
"""

import http.server
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from vmrun.guestkit import kit

TAP = "vmrundemo0"
HOST, GUEST = "172.31.77.1", "172.31.77.2"
PAGE = b"Hello from the host.\n"
GUEST_SECONDS = 180  # the guest's kernel may be interpreted; see `vmrun doctor`


class Page(http.server.BaseHTTPRequestHandler):
    """Answers only once the pings are done: the guest stays up that long."""

    pinged = threading.Event()

    def do_GET(self) -> None:
        self.pinged.wait(timeout=30)
        self.send_response(200)
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, format: str, *args: object) -> None:
        say(f"web server: {format % args}")


def say(text: str) -> None:
    print(f"\033[1m[demo] {text}\033[0m" if sys.stdout.isatty() else f"[demo] {text}", flush=True)


def ping() -> bool:
    """Whether the guest answers three pings, once it answers at all."""
    say(f"pinging {GUEST}")
    command = ["ping", "-n", "-c", "3", "-i", "0.3", "-w", "30", GUEST]
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0


def start_web_server() -> http.server.HTTPServer:
    # The tap and its address appear when vmrun starts: bind to every address, which needs neither.
    server = http.server.HTTPServer(("0.0.0.0", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def boot(disk: Path, port: int, cpus: int) -> tuple[int, bool]:
    """Run the guest, its console on our stdout; returns vmrun's exit code and whether the pings were
    answered.
    """
    words = f"vmrun.ip={GUEST}/24 vmrun.fetch=http://{HOST}:{port}/ vmrun.run=/etc/vmrun/demo"
    command = [sys.executable, "-m", "vmrun", "boot", "--disk", f"{disk},format=qcow2", "--mem", "128M"]
    command += ["--nic", f"{TAP},ip={HOST}/24", "--cpus", str(cpus), "--append", words]
    command += ["--timeout", f"{GUEST_SECONDS}s"]
    say(" ".join(["vmrun", *command[3:]]))
    answered = False
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as machine:
        for line in machine.stdout or ():
            print(line.decode("utf-8", "replace").rstrip(), flush=True)
            if b"ready for pings" in line:
                answered = ping()
                Page.pinged.set()
    return machine.returncode, answered


def main() -> int:
    if os.geteuid() != 0:
        print("demo: needs root, for the tap interface", file=sys.stderr)
        return 64
    found = kit.find()
    if found is None:
        print("demo: no guest kit yet: run `make guest`", file=sys.stderr)
        return 66
    server = start_web_server()
    with tempfile.TemporaryDirectory(prefix="vmrun-demo-") as folder:
        disk = Path(folder) / "demo.qcow2"
        shutil.copyfile(found.disk, disk)
        code, answered = boot(disk, server.server_address[1], cpus=2)
        check = subprocess.run(["qemu-img", "check", disk], capture_output=True, text=True)
        raw = Path(folder) / "demo.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", disk, raw], check=True)
        read = subprocess.run(["debugfs", "-R", "cat /root/hello", raw], capture_output=True, text=True)
    server.shutdown()
    results = {
        "the guest ran and powered off (vmrun's exit code is 0)": code == 0,
        "the guest answered pings": answered,
        "qemu-img finds the image clean": check.returncode == 0,
        f"the file is in the image: {read.stdout.strip()!r}": read.stdout.startswith("written by the guest"),
        "the tap is gone": not Path(f"/sys/class/net/{TAP}").exists(),
    }
    for what, good in results.items():
        say(f"{'ok  ' if good else 'FAIL'} {what}")
    if not all(results.values()):
        return 1
    say("try it: .venv/bin/vmrun run -- uname -a")
    return 0


if __name__ == "__main__":
    sys.exit(main())
