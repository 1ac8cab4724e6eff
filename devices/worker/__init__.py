"""The process a blk or net device lives in: entry point, sandbox, and the launcher the VMM uses."""
