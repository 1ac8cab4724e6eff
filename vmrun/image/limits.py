"""How much an image may make the host do. An archive of a few kilobytes can ask for petabytes."""

from __future__ import annotations

from dataclasses import dataclass

from vmrun.errors import EXIT_IMAGE, UserError


@dataclass(frozen=True)
class Limits:
    """Bounds of a conversion; going beyond one is a UserError that names it and the option that raises it."""

    size: int = 32 << 30
    """Bytes of all files of all layers together; `streams` is made of it."""
    entries: int = 1_000_000
    """Entries of all archives of the image together, and directories made because an entry lies in them."""
    ratio: int = 300
    """Decompressed bytes for a compressed one, once a stream is beyond `RATIO_FREE` bytes."""
    depth: int = 256
    """Directories a path may lead through; the merging of layers recurses as deep, so no option raises it."""
    metadata: int = 512 << 20
    """Bytes of memory for names, link targets, attributes and the maps of sparse files."""

    @property
    def streams(self) -> int:
        """Bytes of all layers together when decompressed, or of an archive that is not in layers: room for
        headers, padding and what is skipped, beside contents within the limit.
        """
        return self.size + self.size // 4 + (64 << 20)

    def over_size(self, what: str) -> UserError:
        return refused(f"{what}: more than {self.size >> 20} MiB of files: raise it with --max-size")

    def over_entries(self, what: str) -> UserError:
        return refused(f"{what}: more than {self.entries} files: raise it with --max-entries")

    def over_ratio(self, what: str) -> UserError:
        return refused(
            f"{what}: a byte of it becomes more than {self.ratio}, like a decompression bomb:"
            " raise it with --max-ratio"
        )

    def over_metadata(self, what: str) -> UserError:
        return refused(
            f"{what}: more than {self.metadata >> 20} MiB of names and attributes:"
            " raise it with --max-metadata"
        )

    def over_depth(self, what: str) -> UserError:
        return refused(f"{what}: a path of more than {self.depth} directories")


RATIO_FREE = 64 << 20
"""Small things may be as dense as they like: a file of zeros is no attack."""

MAX_NAME = 255
MAX_LINK_TARGET = 4095
MAX_LINKS = 65000  # EXT4_LINK_MAX
MAX_FILE = (16 << 40) - 4096  # the largest ext4 file with 4 KiB blocks
MAX_XATTRS = 3800  # bytes of names and values of a file: ext4 gives them one block
MAX_METADATA = 1 << 20  # bytes of headers that one archive entry may need
MAX_JSON = 4 << 20  # bytes of a manifest, an index or a configuration
MAX_INDEXES = 8 << 20  # bytes of all indexes of an image: parsed, a byte may take 30


def refused(text: str) -> UserError:
    """What is wrong with an image, with the exit code for it."""
    return UserError(text, EXIT_IMAGE)


def shown(name: bytes | str) -> str:
    """A name from an archive, for a message: short, printable, one line."""
    if isinstance(name, str):
        name = name.encode("utf-8", "replace")  # JSON may have half a character in it
    text = name if len(name) <= 120 else name[:80] + b"..." + name[-30:]
    return repr(text.decode("utf-8", "backslashreplace"))[1:-1]
