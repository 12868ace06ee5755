"""Reading files and showing text that other people wrote: bounded, without waiting, and on one safe line."""

import os
import tracemalloc
from pathlib import Path

import pytest

from edge_ssm import files
from edge_ssm.errors import InputRefused, UsageError
from edge_ssm.text import encodable, sanitize


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 100)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def test_a_regular_file_is_read_through_links_up_to_its_limit(folder):
    assert files.read_regular_file(folder / "file", 100) == b"x" * 100
    assert files.read_regular_file(str(folder / "link"), 100) == b"x" * 100
    assert files.read_regular_file("/proc/self/cmdline", 1 << 20)  # whose size is 0, as the system says
    with pytest.raises(OSError, match="symbolic links"):
        files.open_regular_file(folder / "link", follow_symlinks=False)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("file", "larger than 99 bytes"),
        ("pipe", "not a regular file"),
        (".", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("dangling", "cannot be read (No such file or directory)"),
        ("a\0b", "cannot be read (embedded null byte)"),
    ],
)
def test_everything_else_is_refused_in_one_line_of_the_callers_error(folder, name, problem):
    path = os.path.join(folder, name)
    with pytest.raises(UsageError) as caught:
        files.read_regular_file(path, 99, error=UsageError, remedy="expected a key")
    assert str(caught.value) == f"{path}: {problem}; expected a key"


def test_a_large_file_is_refused_before_memory_is_taken(folder):
    with open(folder / "file", "wb") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    with pytest.raises(InputRefused, match="larger than 4294967296 bytes"):
        files.read_regular_file(folder / "file", 1 << 32)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_file_that_grows_while_it_is_read_keeps_to_the_limit(folder):
    with files.open_regular_file(folder / "file") as file:
        content = file.read(50)
        (folder / "file").write_bytes(b"x" * 300)
        with pytest.raises(OSError, match="larger than 200 bytes"):
            content += files.read_at_most(file, 200)
    assert len(content) == 50


def test_the_first_line_of_a_secret(tmp_path):
    path = Path(tmp_path / "secret")
    for content, line in [(b"pass word \r\nrest", "pass word "), (b"", ""), ("kä".encode(), "kä")]:
        path.write_bytes(content)
        assert files.read_first_line(path) == line
    path.write_bytes(b"\xff")
    with pytest.raises(OSError, match="not UTF-8 text"):
        files.read_first_line(path)


def test_text_from_outside_stays_on_its_line_and_moves_no_cursor():
    assert sanitize("pump 3 \u00e4\u4e2d") == "pump 3 \u00e4\u4e2d"
    assert sanitize("a\x1b[31m\nb\u202e\udc80\u2028") == "a?[31m?b???"
    assert sanitize("x" * 2000) == "x" * 997 + "..."
    assert sanitize("x" * 2000, None) == "x" * 2000
    assert sanitize("x" * 20, 20) == "x" * 20
    assert encodable("a\udc80b") == "a?b"
