"""Guest memory in a file: sparse, complete, and refused when it is not what was saved."""

import os
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devices.memory import PAGE_SIZE
from devices.pager.checksums import CHUNK_SIZE, MAX_RANGES, Checksums, build
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.snapshot.memory_file import MemoryFacts, checksums_path, extents, open_memory, write_memory

SIZE = 32 * CHUNK_SIZE
PAGES = SIZE // PAGE_SIZE


@pytest.fixture
def ram() -> Iterator[int]:
    fd = os.memfd_create("test-ram")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory"


def fill(fd: int, page: int, byte: int, count: int = 1) -> None:
    os.pwrite(fd, bytes((byte,)) * PAGE_SIZE * count, page * PAGE_SIZE)


def contents(path: Path, facts: MemoryFacts) -> bytes:
    with open_memory(path, facts) as memory:
        memory.verify_all()
        return b"".join(memory.read_chunk(chunk) for chunk in range(memory.checksums.chunks))


def file_pages(path: Path) -> int:
    """Pages of the file that are no holes."""
    with path.open("rb") as file:
        return sum(end - start for start, end in extents(file.fileno(), SIZE)) // PAGE_SIZE


def test_round_trip(ram: int, path: Path) -> None:
    fill(ram, 0, 1)
    fill(ram, 40, 2, 30)
    fill(ram, PAGES - 1, 3)
    facts = write_memory(ram, SIZE, path)
    assert facts.size == path.stat().st_size == SIZE
    assert contents(path, facts) == os.pread(ram, SIZE, 0)
    assert file_pages(path) == 32
    assert facts.data_chunks == 1 + 3 + 1


def test_pages_of_zeros_are_holes(ram: int, path: Path) -> None:
    fill(ram, 0, 0, PAGES)
    fill(ram, 17, 1)
    facts = write_memory(ram, SIZE, path)
    assert (facts.data_chunks, file_pages(path)) == (1, 1)
    # Nor does saving bring memory into being.
    os.ftruncate(ram, 0)
    os.ftruncate(ram, SIZE)
    path.unlink()
    checksums_path(path).unlink()
    write_memory(ram, SIZE, path)
    assert os.fstat(ram).st_blocks == 0


def test_memory_need_not_be_whole_chunks(ram: int, path: Path) -> None:
    size = SIZE - 3 * PAGE_SIZE
    fill(ram, PAGES - 4, 7)
    facts = write_memory(ram, size, path)
    assert path.stat().st_size == size
    assert contents(path, facts) == os.pread(ram, size, 0)


def test_an_older_snapshot_is_not_overwritten(ram: int, path: Path) -> None:
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        write_memory(ram, SIZE, path)
    assert path.read_bytes() == b"precious"


pages = st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(0, 3)), max_size=40)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=pages, after=pages)
def test_what_was_not_brought_in_comes_from_the_older_file(
    tmp_path: Path, before: list[tuple[int, int]], after: list[tuple[int, int]]
) -> None:
    """`after` is what a restored machine touched: those pages count, even when they are zeros now."""
    expected = bytearray(SIZE)
    paths = tmp_path / "first", tmp_path / "second"
    for path in paths:
        path.unlink(missing_ok=True)
        checksums_path(path).unlink(missing_ok=True)
    fds = [os.memfd_create("test-ram") for _ in paths]
    try:
        for fd, touched in zip(fds, (before, after), strict=True):
            os.ftruncate(fd, SIZE)
            for page, byte in touched:
                fill(fd, page, byte)
                expected[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes((byte,)) * PAGE_SIZE
        facts = write_memory(fds[0], SIZE, paths[0])
        with open_memory(paths[0], facts) as source:
            facts = write_memory(fds[1], SIZE, paths[1], source)
    finally:
        for fd in fds:
            os.close(fd)
    assert contents(paths[1], facts) == expected
    zero = bytes(PAGE_SIZE)
    used = sum(expected[at : at + PAGE_SIZE] != zero for at in range(0, SIZE, PAGE_SIZE))
    assert file_pages(paths[1]) == used


def refused(path: Path, facts: MemoryFacts) -> str:
    with pytest.raises(UserError) as caught:
        open_memory(path, facts)
    assert caught.value.code == EXIT_IMAGE
    return str(caught.value)


@pytest.mark.parametrize("length", [0, PAGE_SIZE, SIZE - 1, SIZE + PAGE_SIZE])
def test_a_memory_file_of_another_length(ram: int, path: Path, length: int) -> None:
    facts = write_memory(ram, SIZE, path)
    os.truncate(path, length)
    text = refused(path, facts)
    assert str(path) in text
    assert ("is truncated" in text) == (length < SIZE)


def test_missing_files(ram: int, path: Path) -> None:
    facts = write_memory(ram, SIZE, path)
    path.rename(path.with_name("elsewhere"))
    assert "no such file or directory: the snapshot is incomplete" in refused(path, facts)
    path.mkdir()
    assert "not a file" in refused(path, facts)
    checksums_path(path).unlink()
    assert str(checksums_path(path)) in refused(path, facts)


def test_another_snapshots_files(ram: int, path: Path, tmp_path: Path) -> None:
    fill(ram, 3, 1)
    other = write_memory(ram, SIZE, tmp_path / "other")
    fill(ram, 3, 2)
    write_memory(ram, SIZE, path)
    assert "belongs to another snapshot" in refused(path, other)
    # Its checksums with our memory: found when the chunk is read.
    os.replace(checksums_path(tmp_path / "other"), checksums_path(path))
    with open_memory(path, other) as memory, pytest.raises(UserError, match="damaged at offset 0x0"):
        memory.verify_all()


def test_a_damaged_chunk(ram: int, path: Path) -> None:
    fill(ram, 20, 1, 16)
    facts = write_memory(ram, SIZE, path)
    with path.open("r+b") as file:
        file.seek(33 * PAGE_SIZE + 5)
        file.write(b"\0")
    with open_memory(path, facts) as memory:
        memory.read_chunk(1)
        with pytest.raises(UserError, match="damaged at offset 0x20000"):
            memory.read_chunk(2)
        with pytest.raises(UserError, match="damaged at offset 0x20000"):
            memory.verify_all()


def test_data_where_there_was_none(ram: int, path: Path) -> None:
    facts = write_memory(ram, SIZE, path)
    with path.open("r+b") as file:
        file.seek(5 * CHUNK_SIZE + 9)
        file.write(b"x")
    with open_memory(path, facts) as memory:
        assert memory.read_chunk(5) == bytes(CHUNK_SIZE)  # the checksum file says so
        with pytest.raises(UserError, match="damaged at offset 0x50000"):
            memory.verify_all()


CHECKSUM_FILE = build(10 * CHUNK_SIZE, b"\1\0" * 5, [5, 0] * 5)


@settings(max_examples=200, deadline=None)
@given(bit=st.integers(0, 8 * len(CHECKSUM_FILE) - 1))
def test_every_flipped_bit_of_the_checksum_file_is_seen(bit: int) -> None:
    damaged = bytearray(CHECKSUM_FILE)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match=r"^(is|has|contradicts) "):
        Checksums(bytes(damaged))


@given(length=st.integers(0, len(CHECKSUM_FILE) - 1))
def test_a_truncated_checksum_file(length: int) -> None:
    with pytest.raises(ValueError, match=r"^(is|has) "):
        Checksums(CHECKSUM_FILE[:length])


def test_a_checksum_file_of_the_right_size_for_other_memory(ram: int, path: Path) -> None:
    facts = write_memory(ram, SIZE, path)
    assert "belongs to another snapshot" in refused(path, replace(facts, size=SIZE + CHUNK_SIZE))
    checksums_path(path).write_bytes(b"x" * 1000)
    assert "is not one of vmrun's" in refused(path, facts)


def test_a_checksum_file_that_is_too_long_is_not_read(ram: int, path: Path) -> None:
    facts = write_memory(ram, SIZE, path)
    os.truncate(checksums_path(path), 1 << 30)
    tracemalloc.start()
    try:
        assert "belongs to another snapshot" in refused(path, facts)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        # Nor when the manifest says that there is a guest for it.
        assert "too much here" in refused(path, replace(facts, size=1 << 60))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("beside", [False, True])
def test_a_pipe_is_not_waited_for(ram: int, path: Path, beside: bool) -> None:
    facts = write_memory(ram, SIZE, path)
    pipe = checksums_path(path) if beside else path
    pipe.unlink()
    os.mkfifo(pipe)
    assert "not a file: the snapshot is incomplete" in refused(path, facts)


@given(kinds=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 40)), min_size=1, max_size=800))
@settings(max_examples=50, deadline=None)
def test_ranges_cover_all_data_and_are_few(kinds: list[tuple[int, int]]) -> None:
    table = b"".join(bytes((kind,)) * count for kind, count in kinds)
    size = len(table) * CHUNK_SIZE - PAGE_SIZE
    ranges = Checksums(build(size, table, [0] * len(table))).ranges()
    assert len(ranges) <= MAX_RANGES
    covered = bytearray(len(table))
    end = -1
    for start, length in ranges:
        assert start > end and start % CHUNK_SIZE == 0 and table[start // CHUNK_SIZE] == 1
        end = start + length
        assert end <= size
        covered[start // CHUNK_SIZE : -(-end // CHUNK_SIZE)] = b"\1" * (-(-length // CHUNK_SIZE))
    assert all(covered[chunk] for chunk, kind in enumerate(table) if kind)


def test_facts_survive_the_manifest() -> None:
    facts = MemoryFacts(1 << 20, CHUNK_SIZE, 3, "ab" * 32)
    assert MemoryFacts.load(facts.save()) == facts
    for key, value in (("size", -1), ("size", True), ("data_chunks", "3"), ("sha256", None), ("sha256", 7)):
        with pytest.raises(ValueError, match="memory file"):
            MemoryFacts.load({**facts.save(), key: value})
