"""What a machine's root can come from: `--image`. Runs in the VMM's command line, never in a worker.

`resolve()` is the door. It takes the guest kit's root, a directory, a disk, an OCI layout, a `docker save`
tar or a root tar, and gives a read-only disk that runs put overlays over. docs/images.md tells users.
"""

from vmrun.image.config import Image, ImageConfig
from vmrun.image.limits import Limits
from vmrun.image.resolve import resolve

__all__ = ["Image", "ImageConfig", "Limits", "resolve"]
