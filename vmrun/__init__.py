"""vmrun: a microVM runner for Linux/KVM."""

__version__ = "0.1.0"
