"""What a run was like, in JSON, as a table and as a picture; and the same run with several kernels."""

from __future__ import annotations

import json
import sys
import tracemalloc
import xml.etree.ElementTree as ET
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


def run_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """What `vmrun run` does from now on. $5 is the kernel."""
    program = tmp_path / "vmrun"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_the_worst_code_and_a_row_for_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    run_is(
        monkeypatch,
        tmp_path,
        'test "$*" = "-m vmrun run --kernel $5 -- true" || exit 99\n'
        "echo from $5; case $5 in bad) exit 3;; killed) kill -9 $$;; esac",
    )
    names = ["good", "bad", "killed"]
    assert matrix.run_each([Path(name) for name in names], 1 << 20, ["--", "true"]) == 128 + 9
    out, err = capfdbinary.readouterr()
    assert sorted(out.split(b"== ")[1:]) == sorted(f"{name}\nfrom {name}\n".encode() for name in names)
    rows = [line.split()[:2] for line in err.decode().splitlines()]
    assert rows == [["KERNEL", "CODE"], ["good", "0"], ["bad", "3"], ["killed", "137"]]


def test_of_output_without_end_the_last_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """In a file: the memory of a run's owner is not the guest's to fill."""
    monkeypatch.setattr(matrix, "OUTPUT_LIMIT", 1_000_000)
    run_is(monkeypatch, tmp_path, "head -c 100000000 /dev/zero; echo the end; echo short >&2; exit 3")
    tracemalloc.start()
    try:
        assert matrix.run_each([Path("k")], 1 << 20, []) == 3
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000
    out, err = capfdbinary.readouterr()
    said = b"the end\n"
    assert out == b"== k\n[vmrun: 99000008 bytes of output left out]\n" + bytes(10**6 - len(said)) + said
    assert err.startswith(b"== k\nshort\nKERNEL")


@pytest.mark.parametrize(
    "pieces", [[], [b"abc"], [b"abcdefgh"], [b"abc", b"defghijklmn", b"", b"o"], [b"x" * 99]]
)
def test_a_spool_keeps_the_last(tmp_path: Path, pieces: list[bytes]) -> None:
    whole = b"".join(pieces)
    with open(tmp_path / "spool", "w+b") as file:
        spool = matrix.Spool(file, 8)
        for piece in pieces:
            spool.append(piece)
        assert b"".join(spool.pieces()) == whole[-8:]
        assert spool.lost == len(whole) - len(whole[-8:])


def test_never_more_at_once_than_memory_allows() -> None:
    assert matrix._at_once(8, 1 << 60) == 1
    assert 1 <= matrix._at_once(8, 1) <= 8
