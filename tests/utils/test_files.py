"""Hashes of files that are asked for again and again."""

import os

import pytest

from pmc_fast.utils import files
from pmc_fast.utils.files import FileHashes, file_sha256


@pytest.fixture
def read(monkeypatch):
    """The files that were read, in order."""
    seen = []
    monkeypatch.setattr(files, "file_sha256", lambda path: seen.append(path) or file_sha256(path))
    return seen


def test_a_file_is_read_once(tmp_path, read):
    path, hashes = tmp_path / "a", FileHashes()
    path.write_bytes(b"one")
    assert [hashes.sha256(path) for _ in range(3)] == [file_sha256(path)] * 3
    assert read == [path]


def wait_for_the_clock(path):
    """Wait until the file system's clock, which ticks every few ms, has moved on since `path` was written."""
    probe = path.with_name("probe")
    probe.touch()
    while probe.stat().st_ctime_ns <= path.stat().st_ctime_ns:
        probe.touch()


def in_place(path):
    with path.open("r+b") as file:
        file.write(b"two")


def replaced(path):
    path.with_name("b").write_bytes(b"two")
    os.utime(path.with_name("b"), ns=(1, 1))
    path.with_name("b").rename(path)


def with_its_old_time(path):
    in_place(path)
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [in_place, replaced, with_its_old_time])
def test_a_changed_file_is_read_again(tmp_path, change):
    path, hashes = tmp_path / "a", FileHashes()
    path.write_bytes(b"one")
    os.utime(path, ns=(1, 1))
    before = hashes.sha256(path)
    wait_for_the_clock(path)
    change(path)
    assert hashes.sha256(path) == file_sha256(path) != before
