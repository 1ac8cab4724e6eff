"""What a network card does with frames beside moving them: reading them, answering DHCP. Worker process."""
