"""One machine: its configuration, the board that wires it together, vCPU threads, lifecycle."""
