"""Debian's cloud kernel, unmodified, gets past the points where a KVM without VMX or SVM stops it under
QEMU.

There it would take ten minutes and more to init, so the test looks at the console as far as the PCI bus.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.guest.conftest import boot
from vmrun.guestkit import cache
from vmrun.guestkit.kit import GuestKit

META_PACKAGE = "linux-image-cloud-amd64"
# Its periodic tick is what such a slow kernel can still keep up with; the high-resolution one is not.
PARAMETERS = "console=ttyS0 earlyprintk=serial,ttyS0 highres=off nosoftlockup mitigations=off panic=-1"


def _image_package() -> str:
    depends = subprocess.run(
        ["apt-cache", "depends", META_PACKAGE], check=True, capture_output=True, text=True, env=_environment()
    ).stdout
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    assert found, depends
    return found[1]


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


@pytest.fixture(scope="session")
def cloud_kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vmlinuz of Debian's package, which is downloaded to the cache once."""
    directory = cache.directory() / "debian"
    directory.mkdir(parents=True, exist_ok=True)
    package = _image_package()
    if not list(directory.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", package], cwd=directory, check=True, env=_environment())
    archive = max(directory.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime)
    unpacked = tmp_path_factory.mktemp("debian")
    subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
    (kernel,) = (unpacked / "boot").glob("vmlinuz-*")
    return kernel


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
