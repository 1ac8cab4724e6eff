"""virtio 1.x devices: the split queue, the PCI transport, and a file per device type."""
