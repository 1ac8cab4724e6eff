"""How running machines are found and talked to: their names, runtime directories and control sockets."""
