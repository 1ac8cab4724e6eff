"""`--nic`: every key, and what the parser says to wrong ones."""

import pytest

from vmrun.cli.options import parse_nic
from vmrun.errors import UserError
from vmrun.machine.config import NicConfig


def test_every_key() -> None:
    assert parse_nic("t,bridge=br0,mtu=9000,locked,ip=fd00::1/64") == NicConfig(
        "t", address="fd00::1/64", mtu=9000, locked=True, bridge="br0"
    )
    assert parse_nic("t,local,boot=a,,b.0") == NicConfig("t", local=True, boot_file="a,b.0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t,mtu=many", r"mtu=many: give a number of bytes"),
        ("t,mtu=-9", r"mtu=-9: give a number"),
        ("t,mtu=999999", r"mtu=999999: give a number"),
        ("t,mtu=67", r"mtu=67: give 68 to 65521"),
        ("t,mtu=", r"mtu takes a value"),
        ("t,bridge=", r"bridge takes a value"),
        ("t,bridge=br%d", r"^bridge='br%d': not an interface name"),
        ("t,locked=yes", r"locked takes no value"),
        ("t,loked", r"did you mean locked\?"),
        ("t,local,ip=10.0.0.1/8", r"local is a link with the host alone"),
        ("t,local,bridge=br0", r"local is a link with the host alone"),
        ("t,boot=x", r"add local"),
    ],
)
def test_wrong_ones(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_nic(text)
