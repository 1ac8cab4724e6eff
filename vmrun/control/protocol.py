"""The control protocol: what a line on a machine's control socket may be. Both ends; docs/control.md is the
specification.

A request is one JSON object a line, {"v": 1, "id": 7, "command": "stop", "force": true}; its response is
{"v": 1, "id": 7, "ok": true, "result": {...}} or, with "ok": false, an "error" of "message" and "exit_code".
The other end is not trusted: lines are bounded, and each value is checked where it is used.
"""

import json
from typing import Any

from vmrun.errors import EXIT_USAGE

VERSION = 1
MAX_LINE = 1 << 16  # bytes of a request, its newline included
MAX_RESPONSE = 1 << 20

Message = dict[str, Any]


class BadRequest(Exception):
    """The request cannot be served: one line for the user, and vmrun's exit code for it."""

    def __init__(self, message: str, exit_code: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Request:
    """One request: its command, and the rest of its keys by `flag`, `number` and `text`."""

    __slots__ = ("command", "id", "keys")

    def __init__(self, number: int, command: str, keys: Message) -> None:
        self.id = number
        self.command = command
        self.keys = keys

    def flag(self, key: str) -> bool:
        """A key that is true or false; false when it is not there."""
        value = self.keys.pop(key, False)
        if not isinstance(value, bool):
            raise BadRequest(f"{self.command}: {key} must be true or false")
        return value

    def number(self, key: str, default: int, maximum: int) -> int:
        """A key that is a whole number from 0 to `maximum`."""
        value = self.keys.pop(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= maximum:
            raise BadRequest(f"{self.command}: {key} must be a whole number from 0 to {maximum}")
        return value

    def text(self, key: str) -> str:
        """A key that must be there, and is a string without control characters."""
        value = self.keys.pop(key, None)
        if not isinstance(value, str) or not value or any(ord(character) < 32 for character in value):
            raise BadRequest(f"{self.command}: {key} must be a string")
        return value

    def no_more(self) -> None:
        """After all keys were taken: any other is an error, so that a misspelt one does no harm."""
        if self.keys:
            raise BadRequest(f"{self.command}: unknown key {sorted(self.keys)[0]!r}")


def parse_request(line: bytes) -> Request:
    """Raises BadRequest. Its `id`, if there is a usable one, is also the response's: see `request_id`."""
    message = _parse(line)
    if message is None:
        raise BadRequest("not a JSON object")
    version = message.pop("v", None)
    number = message.pop("id", 0)
    command = message.pop("command", None)
    if version != VERSION:
        raise BadRequest(f"version {version!r} of the protocol is not spoken here; this is version {VERSION}")
    if isinstance(number, bool) or not isinstance(number, int):
        raise BadRequest("id must be a whole number")
    if not isinstance(command, str):
        raise BadRequest("command must be a string")
    return Request(number, command, message)


def request_id(line: bytes) -> int | None:
    """The id of a request that is wrong otherwise, if it has one."""
    message = _parse(line)
    number = message.get("id") if message is not None else None
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def _parse(line: bytes) -> Message | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, nested a thousand deep, a number of miles
        return None
    return message if isinstance(message, dict) else None


def encode(message: Message) -> bytes:
    return json.dumps({"v": VERSION, **message}, separators=(",", ":")).encode() + b"\n"


def response(number: int | None, result: Message) -> bytes:
    return encode({"id": number, "ok": True, "result": result})


def failure(number: int | None, message: str, exit_code: int = EXIT_USAGE) -> bytes:
    return encode({"id": number, "ok": False, "error": {"message": message, "exit_code": exit_code}})
