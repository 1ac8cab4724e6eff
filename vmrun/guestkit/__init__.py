"""The guest kit: a small Linux kernel, an initramfs and a disk, built here from Debian's packages.

`kit` is the door: `find()` and `build()`. Nothing in this package runs in a worker.
"""
