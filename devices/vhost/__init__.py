"""vhost-user: the protocol between the VMM (front end) and the process a device lives in (back end)."""
