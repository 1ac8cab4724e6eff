"""Disk formats. Worker process: a format gets open descriptors and never opens anything itself."""
