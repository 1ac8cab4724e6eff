"""The few PC devices a guest expects beside PCI: serial port, clock, keyboard controller, a way to exit."""
