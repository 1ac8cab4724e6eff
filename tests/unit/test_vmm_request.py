"""What is asked of a machine's process comes to a fresh interpreter as it was said."""

import json
from pathlib import Path

from vmrun.control.vmm import VmmRequest, parse_request
from vmrun.machine.config import DiskConfig, MachineConfig, Mount, NicConfig


def test_a_request_survives_json() -> None:
    plain = VmmRequest(config=MachineConfig(disks=(DiskConfig(Path("/d"), "raw", quota=5),)))
    full = VmmRequest(
        snapshot=Path("/s"),
        disks=(Path("/a"), Path("/b")),
        nics=(NicConfig("tap0", mac=bytes.fromhex("525400123456")),),
        throw_away=False,
        quota=7,
        hold=True,
        mounts=(Mount(Path("/h"), "tag", read_only=True),),
        greet=False,
        confined=True,
        cgroup=Path("/sys/fs/cgroup/x"),
        name="name",
        timeout=1.5,
    )
    for request in (plain, full):
        assert parse_request(json.loads(json.dumps(request.describe()))) == request
