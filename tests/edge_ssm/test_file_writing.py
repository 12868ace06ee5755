"""What writing a file replaces, and what it must leave unchanged."""

import os
import stat
import subprocess
import sys
import threading

import pytest

from edge_ssm import files

NO_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")


def test_a_file_is_replaced_completely_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "f"
    for content in (b"one", b"two"):
        files.check_writable(path)
        files.write(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "far").mkdir()
    target, link, dangling = tmp_path / "far" / "f", tmp_path / "link", tmp_path / "dangling"
    target.write_bytes(b"old")
    link.symlink_to("far/f")
    dangling.symlink_to(tmp_path / "far" / "new")
    for path in (link, dangling):
        files.check_writable(path)
        files.write(path, b"new")
        assert path.is_symlink()
        assert path.read_bytes() == b"new"
    assert target.read_bytes() == b"new"
    assert sorted(p.name for p in (tmp_path / "far").iterdir()) == ["f", "new"]


def test_a_circular_link_is_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for do in (files.check_writable, lambda path: files.write(path, b"x")):
        with pytest.raises(OSError, match="symbolic links"):
            do(tmp_path / "a")


def test_a_pipe_is_written_directly(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    files.check_writable(pipe)  # without a reader, and without waiting for one
    heard = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_bytes()))
    reader.start()
    content = os.urandom(1 << 20)  # more than the capacity of a pipe
    files.write(pipe, content)
    reader.join(30)
    assert heard == [content]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_device_is_written_directly(tmp_path):
    """Write through a link, so that a failure would replace the link and not the machine's /dev/null."""
    for device, expected in (("/dev/null", None), ("/dev/full", "No space left on device")):
        link = tmp_path / device[5:]
        link.symlink_to(device)
        files.check_writable(link)
        if expected is None:
            files.write(link, b"x")
        else:
            with pytest.raises(OSError, match=expected):
                files.write(link, b"x")
        assert link.is_symlink()
        assert stat.S_ISCHR(os.stat(link).st_mode)


@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1"])
def test_standard_output_continues_at_its_position(tmp_path, name):
    """A file that standard output is redirected to is neither replaced nor overwritten from its start."""
    code = (
        "import os; from pathlib import Path; from edge_ssm import files as atomic\n"
        f"os.write(1, b'before\\n'); atomic.check_writable(Path({name!r}))\n"
        f"atomic.write(Path({name!r}), b'content\\n')\n"
        "os.write(1, b'after\\n')"
    )
    with open(tmp_path / "out", "wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True, timeout=60)
    assert (tmp_path / "out").read_bytes() == b"before\ncontent\nafter\n"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("place", "said"),
    [("/proc/x", "No such file"), ("/nowhere/x", "No such file"), ("/tmp", "is a folder"), ("/proc/self", "folder")],
)
def test_an_unwritable_path_is_detected_beforehand(place, said):
    for do in (files.check_writable, lambda path: files.write(path, b"x")):
        with pytest.raises(OSError, match=said):
            do(files.Path(place))


@NO_ROOT
def test_a_device_without_permission_is_detected_beforehand():
    with pytest.raises(PermissionError):
        files.check_writable(files.Path("/dev/mem"))
