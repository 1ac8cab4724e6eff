"""What `vmrun disk` does, without the command line: a file for each verb. User side of the VMM process.

Everything here opens images as `vmrun boot` does (`vmrun.host.disks`): by stated format or suffix, locked, so
that an image in use is refused. An image that is made gets its name last, when it is whole (`output`).
"""
