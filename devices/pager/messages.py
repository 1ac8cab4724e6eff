"""What the VMM and its pager say to each other. Framed by `devices.vhost.channel`, without replies."""

import struct


class Request:
    """From the VMM."""

    ADD_CLIENT = 1  # CLIENT, then a MAPPING for each region; brings a userfaultfd. Replaces the slot's former
    PREFETCH = 2  # bring everything in


class Report:
    """From the pager, which ends after each of them."""

    COMPLETE = 1  # every chunk with data is in
    BAD_CHUNK = 2  # CHUNK: its bytes are not what they were; nobody has got them


CLIENT = struct.Struct("=II")  # slot, number of mappings
MAPPING = struct.Struct("=QQQ")  # address in the client, size, offset in guest RAM's file
CHUNK = struct.Struct("=Q")  # its number

VMM_SLOT = 0  # the client through whose address space memory is filled
