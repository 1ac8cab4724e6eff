"""What a run was like, in JSON, as a table and as a picture; and the same run with several kernels."""

from __future__ import annotations

import json
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import pytest

from vmrun.run import matrix, report
from vmrun.run.command import Outcome
from vmrun.run.phases import Phases

SVG = "{http://www.w3.org/2000/svg}"


def phases(*names: str) -> Phases:
    made = Phases()
    for name in names:
        with made.phase(name):
            pass
    return made


def test_a_picture_has_a_bar_for_each_phase() -> None:
    names = ("image", 'a <name> & "more"', "command")
    root = ET.fromstring(report.timeline(phases(*names)))
    texts = [each.text for each in root.iter(f"{SVG}text")]
    assert [text for text in texts if text in names] == list(names)
    bars = list(root.iter(f"{SVG}rect"))[1:]
    assert len(bars) == 3
    for bar in bars:
        assert float(bar.attrib["x"]) + float(bar.attrib["width"]) <= float(root.attrib["width"])


def test_a_picture_of_nothing() -> None:
    assert ET.fromstring(report.timeline(Phases())).tag == f"{SVG}svg"


def test_a_table_has_a_line_for_each_phase() -> None:
    lines = report.table(phases("image", "command")).splitlines()
    assert [line.split()[0] for line in lines] == ["phase", "image", "command", "all"]


def test_json() -> None:
    told = report.describe(Outcome(67, "it panicked", own=True), phases("one"), {"memory": 1}, Path("/log"))
    facts = json.loads(told)
    assert "\n" not in told
    assert (facts["code"], facts["reason"], facts["own"]) == (67, "it panicked", True)
    assert (facts["usage"], facts["console"]) == ({"memory": 1}, "/log")
    assert facts["phases"][0]["name"] == "one"


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--kernel", "a", "--mem", "1G", "--kernel=b", "--", "x"], ["--mem", "1G", "--", "x"]),
        (["--kernel", "a", "--", "make", "--kernel", "c"], ["--", "make", "--kernel", "c"]),
        ([], []),
    ],
)
def test_the_other_words_are_kept(words: list[str], kept: list[str]) -> None:
    assert matrix.without_kernels(words) == kept


def test_the_worst_code_and_a_row_for_each(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    codes = {"good": 0, "bad": 3, "killed": -9}
    real = subprocess.run

    def fake(command: Sequence[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        kernel = command[command.index("--kernel") + 1]
        assert command[command.index("--kernel") + 2 :] == ["--", "true"]
        script = f"echo from {kernel}; exit {max(codes[kernel], 0)}"
        done: subprocess.CompletedProcess[bytes] = real(
            ["sh", "-c", script], capture_output=True, check=False
        )
        return subprocess.CompletedProcess(command, codes[kernel], done.stdout, done.stderr)

    monkeypatch.setattr(subprocess, "run", fake)
    assert matrix.run_each([Path(name) for name in codes], 1 << 20, ["--", "true"]) == 128 + 9
    out, err = capfdbinary.readouterr()
    assert sorted(out.split(b"== ")[1:]) == sorted(f"{name}\nfrom {name}\n".encode() for name in codes)
    rows = [line.split()[:2] for line in err.decode().splitlines()]
    assert rows == [["KERNEL", "CODE"], ["good", "0"], ["bad", "3"], ["killed", "137"]]


def test_never_more_at_once_than_memory_allows() -> None:
    assert matrix._at_once(8, 1 << 60) == 1
    assert 1 <= matrix._at_once(8, 1) <= 8
