"""The documents say what is there: command lines parse, files exist, links lead somewhere, tables are
whole.
"""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmrun import errors, units
from vmrun.cli import app, declare, fast_path, options
from vmrun.cli.exec import exec
from vmrun.cli.run_command import run
from vmrun.cli.snapshot import clone, restore, snapshot
from vmrun.control import server
from vmrun.run import report
from vmrun.run.command import Outcome
from vmrun.run.phases import Phases

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = sorted((ROOT / "docs" / "ci").rglob("*.sh")) + sorted((ROOT / "docs" / "ci").rglob("*.yml"))
SOURCES = {
    path.name for folder in ("vmrun", "devices", "tests", "scripts") for path in (ROOT / folder).rglob("*")
}
NOT_OURS = ("docs/interop/",)  # of QEMU's tree

FENCE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^()\s]+)\)")
SEPARATORS = {"|", "||", "&", "&&", ";", ";;", "(", ")"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: str) -> str:
    return (ROOT / path).read_text()


def logical_lines(text: str) -> Iterator[str]:
    yield from text.replace("\\\n", " ").splitlines()


def simple_commands(line: str) -> Iterator[list[str]]:
    """The commands of a line of shell, each as its words, without redirections."""
    for inner in re.findall(r"\$\(([^()]*)\)", line):
        yield from simple_commands(inner)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    redirected = False
    try:
        for word in lexer:
            if word in SEPARATORS:
                yield words
                words = []
            elif word[:1] in ("<", ">"):
                redirected = True
                if words and words[-1].isdigit():
                    words.pop()  # the 2 of 2>file
            elif redirected:
                redirected = False
            elif word != "$@":
                words.append(word)
    except ValueError:
        return  # prose with an apostrophe
    yield words


def vmrun_commands(text: str, *, indented: bool) -> Iterator[list[str]]:
    """The words after `vmrun` of each command line in `text`; of a document, in what is set off by blanks."""
    for line in logical_lines(text):
        if indented and not line.startswith("    "):
            continue
        for words in simple_commands(line.strip()):
            while words and (words[0] in ("run:", "if", "-") or re.fullmatch(r"[A-Z_]+=.*", words[0])):
                words.pop(0)
            if words and words[0] in ("vmrun", ".venv/bin/vmrun"):
                yield words[1:]


COMMANDS = [
    pytest.param(words, id=f"{name(path)}: {shlex.join(words)[:60]}")
    for path in [*DOCUMENTS, *SCRIPTS]
    for words in vmrun_commands(path.read_text(), indented=path.suffix == ".md")
    if words and words != ["--version"] and all(word.isascii() for word in words) and "..." not in words
]


def test_commands_are_found() -> None:
    """The tests below would be content with none."""
    assert len(COMMANDS) > 60
    found = [words for words in vmrun_commands("    vmrun ps; a | vmrun log 'b c' >x\n", indented=True)]
    assert found == [["ps"], ["log", "b c"]]


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_line_parses(words: list[str]) -> None:
    understood = fast_path.parse(words)
    assert understood is not None
    values = understood[1]
    for key, parse in (("nic", options.parse_nic), ("disk", options.parse_any_disk)):
        value = values.get(key) or []
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and "{" not in text:
                parse(text)
    if isinstance(values.get("timeout"), str) and "$" not in values["timeout"]:
        units.parse_duration("--timeout", values["timeout"])
    if isinstance(values.get("mem"), str):
        units.parse_size("--mem", values["mem"])


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_every_command_in_a_sentence_is_one(path: Path) -> None:
    known = {command: file for group in app.GROUPS.values() for command, file in group.items()}
    for code in FENCE.findall(path.read_text()):
        words = code.split()
        if words[0] != "vmrun" or len(words) == 1 or words[1].startswith("-"):
            continue
        assert words[1] in known, code
        found = app.load(words[1], known[words[1]])
        if hasattr(found, "COMMANDS") and len(words) > 2 and re.fullmatch("[a-z]+", words[2]):
            assert words[2] in found.COMMANDS, code


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_every_file_that_is_named_exists(path: Path) -> None:
    for code in FENCE.findall(path.read_text()):
        for found in re.findall(r"(?<![\w./-])(?:vmrun|devices|docs|tests|scripts)/[\w./*-]*\w", code):
            assert found.startswith(NOT_OURS) or any(ROOT.glob(found)), found
        if re.fullmatch(r"\w+\.py", code):
            assert code in SOURCES, code


def test_every_test_of_the_table_of_devices_exists() -> None:
    for folder, test in re.findall(
        r"\b(unit|kvm|guest|conformance)/(test_[\w*]+)", text_of("docs/devices.md")
    ):
        assert any((ROOT / "tests" / folder).glob(f"{test}.py")), f"{folder}/{test}"


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub and GitLab make them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_resolve(path: Path) -> None:
    for link in LINK.findall(path.read_text()):
        if link.startswith(("http:", "https:")):
            continue
        target, _, anchor = link.partition("#")
        file = path.parent / target if target else path
        assert file.exists(), link
        if anchor:
            assert anchor in anchors(file.read_text()), link


@pytest.mark.parametrize(
    ("command", "path"),
    [
        (run, "docs/run.md"),
        (exec, "docs/run.md"),
        (app.load("boot", "boot"), "docs/guide.md"),
        (restore, "docs/snapshots.md"),
        (clone, "docs/snapshots.md"),
        (snapshot, "docs/snapshots.md"),
    ],
)
def test_every_option_is_documented(command: declare.Command, path: str) -> None:
    text = text_of(path)
    for parameter in declare.parameters(command):
        for option in parameter.names:
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), option


@pytest.mark.parametrize("keys", [options.DISK_KEYS, options.NIC_KEYS], ids=["disk", "nic"])
def test_every_key_of_disks_and_cards_is_documented(keys: options.Keys) -> None:
    text = text_of("docs/guide.md")
    for key, takes_value in keys.items():
        assert re.search(rf"`{key}{'=[^`]+' if takes_value else ''}`", text), key


@pytest.mark.parametrize("path", ["docs/guide.md", "docs/run.md"])
def test_every_exit_code_is_documented(path: str) -> None:
    text = text_of(path)
    for constant, code in vars(errors).items():
        if constant.startswith("EXIT_"):
            assert f"| {code} |" in text, constant


def rows(text: str, heading: str) -> list[str]:
    """The first column of the table whose first heading is `heading`."""
    table = text[text.index(f"| {heading} |") :].split("\n\n")[0].splitlines()[2:]
    return [row.split("|")[1].strip() for row in table]


def test_every_command_of_the_control_socket_is_documented() -> None:
    text = text_of("docs/control.md")
    assert sorted(rows(text, "command")) == sorted(f"`{command}`" for command in server.COMMANDS)
    source = Path(server.__file__).read_text()
    told = set(re.findall(r'\.tell\("(\w+)"', source))
    assert told == set(re.findall(r"`(\w+)`", " ".join(rows(text, "event"))))


def test_every_state_and_key_of_a_status_is_documented() -> None:
    source = text_of("vmrun/machine/control.py")
    status = source[source.index("def status") : source.index("def inspect")]
    keys = set(re.findall(r'^            "(\w+)":', status, re.MULTILINE))
    text = text_of("docs/control.md")
    section = text[text.index("The result of `status`") : text.index("Programs must ignore keys")]
    assert keys and keys == set(re.findall(r"`(\w+)`", " ".join(rows(section, "key"))))
    state = source[source.index("def _state") : source.index("def stop")]
    for word in re.findall(r'"(\w+)"', state):
        assert f"`{word}`" in section, word


def test_every_key_of_json_is_documented() -> None:
    described: dict[str, Any] = json.loads(report.describe(Outcome(0, "exit code 0"), Phases(), {}, None))
    assert [f"`{key}`" for key in described] == rows(text_of("docs/run.md"), "key")


def test_every_phase_is_documented() -> None:
    named = {
        phase
        for file in ("cli/run_command.py", "run/sandbox.py", "run/command.py")
        for phase in re.findall(r'phases\.phase\("([^"]+)"\)', text_of(f"vmrun/{file}"))
    }
    assert named == {row.strip("`") for row in rows(text_of("docs/run.md"), "phase")}
