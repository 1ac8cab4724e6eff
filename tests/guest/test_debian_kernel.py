"""Debian's cloud kernel, unmodified, gets past the points where a KVM without VMX or SVM stops it under
QEMU.

There it would take ten minutes and more to init, so the test looks at the console as far as the PCI bus.
"""

from pathlib import Path

import pytest

from tests.guest.conftest import boot
from vmrun.guestkit.kit import GuestKit

# Its periodic tick is what such a slow kernel can still keep up with; the high-resolution one is not.
PARAMETERS = "console=ttyS0 earlyprintk=serial,ttyS0 highres=off nosoftlockup mitigations=off panic=-1"


@pytest.mark.slow
@pytest.mark.timeout(720)
def test_debian_cloud_kernel(guest_kit: GuestKit, cloud_kernel: Path) -> None:
    landmark = "PCI: Using configuration type 1"
    result = boot(
        "--kernel", cloud_kernel, "--initrd", guest_kit.initramfs, "--append", PARAMETERS,
        timeout=600, until=landmark,
    )  # fmt: skip
    for text in (
        "SLUB: HWalign",  # CMPXCHG16B
        "using 'standard' format",  # XSAVE
        "Freeing SMP alternatives memory",  # INT3, CLAC and STAC
        landmark,
    ):
        assert text in result.console, (text, result)
    assert "KVM cannot emulate" not in result.stderr
