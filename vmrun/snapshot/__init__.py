"""Snapshots: what a machine's state looks like in files, and how a machine comes out of them again."""
