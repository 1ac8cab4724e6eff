"""Taking saved state apart: a JSON-able dict whose fields are checked one by one. VMM process.

The state comes from a file that may be damaged or made up. Whatever is wrong with it is a ValueError with a
sentence that names the device and the field, before anything is done with it.
"""

from typing import Any, TypeVar

T = TypeVar("T")


class SavedState:
    """The dict `state` of `name`. The methods return a field, or raise ValueError when it is not there or not
    what they ask for. Fields nobody asks for are ignored.
    """

    __slots__ = ("_fields", "name")

    def __init__(self, name: str, state: object) -> None:
        self.name = name
        if not isinstance(state, dict):
            raise ValueError(f"the saved state of {name} is not a dictionary")
        self._fields: dict[str, Any] = state

    def wrong(self, key: str, why: str) -> ValueError:
        """The error to raise when field `key` cannot be."""
        return ValueError(f"the saved state of {self.name}: {key} {why}")

    def _get(self, key: str) -> Any:
        if key not in self._fields:
            raise self.wrong(key, "is missing")
        return self._fields[key]

    def number(self, key: str, most: int, least: int = 0) -> int:
        value = self._get(key)
        # True is an int to Python, but not to whoever wrote the state.
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(key, f"is not a number in {least} to {most}")
        return value

    def bits(self, key: str, allowed: int) -> int:
        """A number of which only bits in the mask `allowed` are set."""
        value = self.number(key, allowed)
        if value & ~allowed:
            raise self.wrong(key, f"has bits other than {allowed:#x}")
        return value

    def flag(self, key: str) -> bool:
        value = self._get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "is neither true nor false")
        return value

    def data(self, key: str, most: int, least: int = 0) -> bytes:
        """Bytes, saved in hexadecimal: from `least` to `most` of them."""
        value = self._get(key)
        if not isinstance(value, str) or not value.isascii() or not 2 * least <= len(value) <= 2 * most:
            raise self.wrong(key, f"is not {least} to {most} bytes in hexadecimal")
        try:
            data = bytes.fromhex(value)
        except ValueError:
            data = b""
        if data.hex() != value:
            raise self.wrong(key, "is not hexadecimal")
        return data

    def exactly(self, key: str, size: int) -> bytes:
        """`size` bytes."""
        return self.data(key, size, size)

    def absent(self, key: str) -> bool:
        """Whether the field is None: there is nothing of this kind."""
        return self._get(key) is None

    def record(self, key: str) -> "SavedState":
        """A dictionary within this one."""
        return SavedState(f"{self.name}, {key}", self._get(key))

    def records(self, key: str, count: int) -> list["SavedState"]:
        """A list of `count` dictionaries."""
        return [
            SavedState(f"{self.name}, {key} {number}", item)
            for number, item in enumerate(self.items(key, count, count))
        ]

    def items(self, key: str, most: int, least: int = 0) -> list[Any]:
        """A list of `least` to `most` things, unchecked."""
        value = self._get(key)
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise self.wrong(key, f"is not a list of {least} to {most}")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A dictionary as it is, for somebody else to check."""
        value = self._get(key)
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise self.wrong(key, "is not a dictionary")
        return value

    def choice(self, key: str, choices: tuple[T, ...]) -> T:
        """One of `choices`."""
        value = self._get(key)
        for choice in choices:
            if type(value) is type(choice) and value == choice:
                return choice
        raise self.wrong(key, f"is not one of {choices}")

    def same(self, key: str, value: object, what: str) -> None:
        """Raises ValueError unless the field is `value`, which is what this machine has; `what` is a noun."""
        saved = self._get(key)
        if type(saved) is not type(value) or saved != value:
            raise ValueError(f"{self.name} has another {what} ({value!r}) than when it was saved ({saved!r})")
