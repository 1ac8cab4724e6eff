"""The host's side of a machine: taps, disk files, the terminal, and what this host can do. VMM process."""
