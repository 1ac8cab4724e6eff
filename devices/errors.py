"""The errors a device may raise, in the VMM and in workers alike. Host failures are plain `OSError`."""


class GuestError(Exception):
    """The guest broke the protocol: a ring, a descriptor or a register makes no sense.

    Never fatal for the machine: whoever catches it marks the device DEVICE_NEEDS_RESET (virtio 1.2, 2.1.2),
    tells the guest by a configuration interrupt, and goes on.
    """


class ImageError(Exception):
    """A disk image is damaged, hostile, or uses something we refuse. The text is one line for the user."""
