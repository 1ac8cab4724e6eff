"""A SCSI target with one CD-ROM drive: commands in, data, status and sense out. Nothing of virtio, PCI or
the guest's memory layout is known here; `devices.virtio.scsi` carries the commands.
"""
