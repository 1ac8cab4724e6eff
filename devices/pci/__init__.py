"""PCI: configuration space, BARs, capabilities, MSI-X, INTx, and the bus that joins them."""
