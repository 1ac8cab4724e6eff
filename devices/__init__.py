"""What a guest sees: buses, PCI, virtio, disk formats, and the processes devices live in.

Nothing in this package knows of KVM or of `vmrun`: a device reaches the machine it is plugged into through
`devices.board` only. Worker processes (blk, net) import from here and from nowhere else.
"""
