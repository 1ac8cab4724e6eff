"""SHA-256 as Python has it built in. VMM process.

`hashlib` has the same of OpenSSL, whose loading takes longer than all there is to check when a machine is
restored. The built-in module goes by another name from Python 3.12 on; it may be left out of a Python.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashlib import sha256
else:
    try:
        from _sha2 import sha256
    except ImportError:
        try:
            from _sha256 import sha256
        except ImportError:
            from hashlib import sha256

__all__ = ["sha256"]
