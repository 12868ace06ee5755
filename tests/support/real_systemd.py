"""A real systemd as system manager, in namespaces of its own over an overlay of /, with edge-ssm installed in
/opt/edge-ssm there: nothing of this machine is touched, and everything is gone afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import edge_ssm

SYSTEMD = Path("/lib/systemd/systemd")
HOME = Path("/opt/edge-ssm")
COMMAND = HOME / "bin/edge-ssm"

# $1 an empty folder, $2 the Python installation, $3... folders of packages. Runs in new namespaces, as their process 1.
SCRIPT = r"""
set -eu
work=$1 base=$2; shift 2
mount -t tmpfs tmpfs "$work"
mkdir "$work/upper" "$work/work" "$work/root"
mount -t overlay overlay -o lowerdir=/,upperdir="$work/upper",workdir="$work/work" "$work/root"
cd "$work/root"

# None of the machine's own services.
rm -rf etc/systemd/system usr/lib/systemd/system/*.wants usr/lib/environment.d etc/environment.d
mkdir -p etc/systemd/system
rm -f etc/fstab etc/machine-id
echo 00000000000000000000000000000001 > etc/machine-id
printf '[Unit]\nWants=systemd-journald.socket\n' > etc/systemd/system/test.target

# What a device has after `python -m venv /opt/edge-ssm` and `pip install edge-ssm`.
rm -rf opt/edge-ssm
mkdir -p opt/edge-ssm/bin opt/edge-ssm/base
mount --bind "$base" opt/edge-ssm/base
mkdir -p "opt/edge-ssm/lib/$PYTHON/site-packages"
for packages in "$@"; do
  n=$((${n:-0} + 1))
  mkdir "opt/edge-ssm/packages$n"
  mount --bind "$packages" "opt/edge-ssm/packages$n"
  echo "/opt/edge-ssm/packages$n" >> "opt/edge-ssm/lib/$PYTHON/site-packages/edge-ssm.pth"
done
printf 'home = /opt/edge-ssm/base/bin\ninclude-system-site-packages = false\n' > opt/edge-ssm/pyvenv.cfg
ln -s "/opt/edge-ssm/base/bin/$PYTHON" opt/edge-ssm/bin/python
printf '#!/opt/edge-ssm/bin/python\nfrom edge_ssm.cli.app import main\nmain()\n' > opt/edge-ssm/bin/edge-ssm
chmod 755 opt/edge-ssm/bin/edge-ssm
echo /opt/edge-ssm/base/lib > etc/ld.so.conf.d/edge-ssm.conf
ldconfig -r . 2> /dev/null

mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
for folder in run tmp; do mount -t tmpfs tmpfs $folder; done
chmod 1777 tmp
mount -t tmpfs -o mode=755 tmpfs dev
for node in null zero full random urandom tty; do touch dev/$node; mount --bind /dev/$node dev/$node; done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
mount -t tmpfs tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mkdir .old
pivot_root . .old
umount -l .old
exec env -i container=unshare PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --unit=test.target \
  --log-level=info --log-target=journal
"""


def why_not() -> str:
    """Why there can be no real systemd here; empty if there can."""
    if os.geteuid() != 0:
        return "a system manager of our own needs root"
    for needed in ("unshare", "nsenter", "systemctl", "systemd-analyze", "pivot_root"):
        if shutil.which(needed) is None:
            return f"{needed} is missing; apt-get install systemd util-linux"
    if not SYSTEMD.exists():
        return "systemd is not installed"
    if _cgroups() is None:
        return "no cgroup v2 hierarchy that can be written to"
    probe = ["unshare", "--mount", "--pid", "--fork", "--net", "--propagation", "private", "mount", "-t", "tmpfs", "x"]
    done = subprocess.run([*probe, "/mnt"], capture_output=True, text=True)
    return f"no namespaces of our own ({done.stderr.strip()})" if done.returncode else ""


def _cgroups() -> Path | None:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2" and "rw" in options.split(",") and os.access(place, os.W_OK):
            return Path(place)
    return None


class Manager:
    """A running system manager. ``path`` leads from here to a file of its file system."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def path(self, inside: str | Path) -> Path:
        return Path(f"/proc/{self._pid}/root") / str(inside).lstrip("/")

    def run(self, *command: str | Path, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["nsenter", "--target", str(self._pid), "--all", "--wd=/", *map(str, command)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            env={
                "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
        )
        if check:
            assert done.returncode == 0, f"{command}: {done.stderr}\n{self.journal()}"
        return done

    def edge_ssm(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(COMMAND, *arguments, check=check)

    def show(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", unit, "--value", "--property", name).stdout.strip()

    def kill(self, unit: str, number: signal.Signals) -> None:
        self.run("systemctl", "kill", "--kill-who=main", f"--signal={number.name}", unit)

    def journal(self, *arguments: str) -> str:
        return self.run("journalctl", "--no-pager", "--output=cat", "--lines=100", *arguments, check=False).stdout


@contextmanager
def system_manager(folder: Path) -> Iterator[Manager]:
    """Boots in the empty ``folder``."""
    cgroups = _cgroups()
    assert cgroups is not None
    own = cgroups / f"edge-ssm-test-{os.getpid()}"
    own.mkdir()
    packages = [
        str(Path(edge_ssm.__file__).parent.parent),
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
    ]
    spaces = ["--mount", "--pid", "--cgroup", "--uts", "--ipc", "--net"]
    shell = f'echo $$ > "{own}/cgroup.procs"; exec unshare {" ".join(spaces)} --fork --kill-child'
    arguments = [str(folder), sys.base_prefix, *dict.fromkeys(packages)]
    process = subprocess.Popen(
        ["bash", "-c", f'{shell} --propagation private bash -c "$@"', "-", SCRIPT, "-", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHON": f"python{sys.version_info[0]}.{sys.version_info[1]}"},
    )
    try:
        yield _booted(process)
    finally:
        process.kill()  # and with it, its child, which is process 1 there: the kernel ends all the others
        process.wait()
        _remove(own)


def _booted(process: subprocess.Popen[bytes]) -> Manager:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if process.poll() is not None:
            assert process.stdout is not None
            raise RuntimeError(process.stdout.read().decode())
        with suppress(OSError, ValueError, AssertionError):
            manager = Manager(int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()))
            if manager.path("run/systemd/private").exists():
                manager.run("systemctl", "is-active", "test.target")
                return manager
        time.sleep(0.05)
    raise RuntimeError("systemd did not come up within 20 s")


def _remove(cgroup: Path) -> None:
    end = time.monotonic() + 10
    while cgroup.exists() and time.monotonic() < end:
        for path in [*sorted((p for p in cgroup.rglob("*") if p.is_dir()), reverse=True), cgroup]:
            with suppress(OSError):
                path.rmdir()
        time.sleep(0.02)
