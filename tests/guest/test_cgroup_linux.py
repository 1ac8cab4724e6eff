"""What a cgroup allows is all that is had: `vmrun.host.cgroup` on a kernel with every controller, which is
Debian's, in QEMU without KVM. Hosts of tests seldom have a version 2 hierarchy with controllers to spare.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guest.conftest import REPOSITORY, MakeInitramfs

CHECK = Path(__file__).with_name("cgroup_check.py")
MODULE = REPOSITORY / "vmrun/host/cgroup.py"
INIT = b"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t cgroup2 cgroup2 /sys/fs/cgroup
PYTHONHOME=/python /python/bin/python3 -S /check/cgroup_check.py 2>&1
/bin/busybox poweroff -f
"""
LIST = """
import json, signal, sys, cgroup
print(json.dumps([getattr(module, "__file__", None) for module in sys.modules.values()]))
"""


def python(check: Path) -> dict[str, Path | bytes]:
    """The interpreter that runs this, and of its library and of others' what the check takes."""
    executable = Path(sys.executable).resolve()
    listed = subprocess.run(
        [executable, "-S", "-c", LIST], cwd=check, check=True, capture_output=True, text=True
    ).stdout
    home = Path(sys.base_prefix).resolve()
    modules = [Path(name) for name in json.loads(listed) if name and Path(name).parent != check]
    library = home / f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
    files: dict[str, Path | bytes] = {
        f"python/{path.relative_to(home)}": path for path in (*modules, library / "os.py")
    }
    files["python/bin/python3"] = executable
    objects = [executable, *(path for path in modules if path.suffix == ".so")]
    for line in subprocess.run(["ldd", *objects], check=True, capture_output=True, text=True).stdout.split():
        if line.startswith("/") and not line.endswith(":"):
            files[line.lstrip("/")] = Path(line).resolve()
    return files


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_kernel_keeps_the_limits(cloud_kernel: Path, initramfs: MakeInitramfs, tmp_path: Path) -> None:
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("no QEMU (Debian: qemu-system-x86)")
    check = tmp_path / "check"
    check.mkdir()
    shutil.copy(MODULE, check)
    shutil.copy(CHECK, check)
    archive = initramfs(
        {
            "init": INIT,
            "bin/busybox": Path("/bin/busybox"),
            **{f"check/{path.name}": path for path in check.glob("*.py")},
            **python(check),
        }
    )
    command = [qemu, "-accel", "tcg", "-m", "512", "-nodefaults", "-display", "none", "-no-reboot"]
    command += ["-serial", "stdio", "-kernel", str(cloud_kernel), "-initrd", str(archive)]
    command += ["-append", "console=ttyS0 quiet panic=-1"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=500)
    said = [line for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert said == ["ok place", "ok memory", "ok pids", "ok end", "ok cpu"], done.stdout + done.stderr
