"""An emulated board with an INA3221 in separate namespaces: hwmon files under /sys, and the real jtop service.

The power follows a model whose energy is known. ``enter(command)`` runs a command beside the board; one such command is
``python emulated_board.py measure ...``.
"""

import argparse
import json
import math
import mmap
import os
import random
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
RAILS = ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC")
MILLIVOLTS = 5000
QUANTUM_MA = 8
"""40 uV over 5 milliohm."""
NOISE_S = 0.05
"""Time constant of the noise in seconds."""
MAX_STALL_S = 0.05
"""A run in which the board itself got no processor time for longer is repeated."""
SHARE = (1.0, 0.4, 0.25)
"""Share of the power in each rail."""


def namespace_problem():
    """Return why a command cannot be run beside the board; empty if it can."""
    if shutil.which("unshare") is None:
        return "unshare is missing"
    command = ["unshare", "-U", "-r", "-m", "-p", "-f", "--mount-proc", "true"]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"namespaces cannot be created here ({done.stderr.strip()})"


def jtop_problem():
    """Return why jtop's service cannot be started; empty if it can."""
    return "" if find_spec("jtop") else "jetson-stats is missing: pip install 'edge-ssm[jetson]'"


def make_tree(root):
    """Create the part of /sys that jtop and the meter read; return the hwmon folder."""
    (root / "devices/virtual/dmi/id").mkdir(parents=True)
    for i in range(os.cpu_count() or 1):
        (root / f"devices/system/cpu/cpu{i}").mkdir(parents=True)
    hwmon = root / "bus/i2c/devices/1-0040/hwmon/hwmon1"
    hwmon.mkdir(parents=True)
    for folder in (hwmon.parent.parent, hwmon):
        (folder / "name").write_text("ina3221\n")
    for i, rail in enumerate(RAILS, 1):
        (hwmon / f"in{i}_label").write_text(f"{rail}\n")
        (hwmon / f"in{i}_input").write_text(f"{MILLIVOLTS}\n")
        (hwmon / f"curr{i}_input").write_text("000400\n")
        (hwmon / f"curr{i}_max").write_text("4000\n")
        (hwmon / f"curr{i}_crit").write_text("5000\n")
    (root / "class/thermal/thermal_zone0").mkdir(parents=True)
    (root / "class/thermal/thermal_zone0/type").write_text("cpu-thermal\n")
    (root / "class/thermal/thermal_zone0/temp").write_text("45000\n")
    (root / "class/hwmon").mkdir(parents=True)
    (root / "class/hwmon/hwmon1").symlink_to("../../bus/i2c/devices/1-0040/hwmon/hwmon1")
    return hwmon


def enter(command, jtop, timeout):
    """Run ``command`` beside an emulated board, with ``jtop`` beside its service too; return its standard output."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        make_tree(root / "sys")
        (root / "group").write_text(Path("/etc/group").read_text() + "jtop:x:0:\n")
        processors = os.cpu_count() or 1
        line = "cpu{} 100 0 100 10000 0 0 0 0 0 0\n"
        (root / "stat").write_text("".join(line.format(i) for i in ("", *range(processors))))
        config = Path(sys.base_prefix) / "local"
        mounts = [
            "mount -t tmpfs none /run",
            f"mount --rbind {root}/sys /sys",
            f"mount --bind {root}/group /etc/group",
            f"mount --bind {root}/stat /proc/stat",
        ]
        service = ""
        if jtop:
            config.mkdir(exist_ok=True)
            mounts.append(f"mount -t tmpfs none {config}")
            service = (
                f"JTOP_SERVICE=True {shlex.quote(str(Path(sys.executable).parent / 'jtop'))} --force "
                f"> {root}/jtop.log 2>&1 & service=$!\n"
                f"for i in $(seq 200); do\n"
                f"[ -S /run/jtop.sock ] && grep -q ready {root}/jtop.log && break\nsleep 0.1\ndone\n"
                f"export JTOP_PID=$service\n"
            )
        script = root / "run.sh"
        script.write_text("set -e\n" + "\n".join(mounts) + "\n" + service + shlex.join(map(str, command)) + "\n")
        outer = ["unshare", "-U", "-r", "-m", "-p", "-f", "--mount-proc", "--kill-child", "bash", str(script)]
        done = subprocess.run(outer, capture_output=True, text=True, timeout=timeout)
        log = root / "jtop.log"
        tail = log.read_text()[-2000:] if log.exists() else ""
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:] + tail
        return done.stdout


class Shared:
    """Memory through which the measuring process tells the board since when it works, and the model of the run."""

    FORMAT, STALL = "=d6d", "=d"

    def __init__(self, path):
        path = Path(path)
        if not path.exists():
            path.write_bytes(bytes(struct.calcsize(self.FORMAT) + struct.calcsize(self.STALL)))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def put(self, since, model):
        """Write the time since when the workload runs (0: idle), and the model."""
        struct.pack_into(self.FORMAT, self._map, 0, since, *model)

    def stall_s(self, seconds=None):
        """Return the longest time in seconds that the board got no processor; set it first if ``seconds`` is given."""
        offset = struct.calcsize(self.FORMAT)
        if seconds is not None:
            struct.pack_into(self.STALL, self._map, offset, seconds)
        return struct.unpack_from(self.STALL, self._map, offset)[0]

    def get(self):
        """Return what ``put`` has written."""
        since, *model = struct.unpack_from(self.FORMAT, self._map, 0)
        return since, model


def emulate(shared_path):
    """Write the currents of the model until killed.

    A model is idle power, dynamic power, ramp, noise (watts), drift, and the duration of a block.
    """
    shared = Shared(shared_path)
    files = [os.open(f"/sys/class/hwmon/hwmon1/curr{i}_input", os.O_WRONLY) for i in (1, 2, 3)]
    rng, noise, last = random.Random(1), 0.0, time.monotonic()
    while True:
        now = time.monotonic()
        since, (idle, dynamic, ramp, sigma, drift, block) = shared.get()
        if now - last > shared.stall_s():
            shared.stall_s(now - last)
        keep = math.exp(-(now - last) / NOISE_S)
        noise = keep * noise + sigma * math.sqrt(1 - keep**2) * rng.gauss(0, 1)
        watts = idle + drift * math.sin(now / 7) + noise
        if since:
            watts += dynamic * (1 + ramp * (min((now - since) / block, 1) - 0.5))
        write(files, watts)
        last = now
        time.sleep(0.002)


def write(files, watts):
    """Write the currents of a total power."""
    for file, share in zip(files, SHARE, strict=True):
        milliamperes = round(share * watts / MILLIVOLTS * 1e6 / QUANTUM_MA) * QUANTUM_MA
        os.pwrite(file, b"%06d\n" % max(milliamperes, 0), 0)


def follow(idle, dynamic):
    """Draw ``dynamic`` watts more, and warm up, while a profile computes; used for pictures."""
    files = [os.open(f"/sys/class/hwmon/hwmon1/curr{i}_input", os.O_WRONLY) for i in (1, 2, 3)]
    thermometer = Path("/sys/class/thermal/thermal_zone0/temp")
    celsius, last, rng = 45.0, {}, random.Random(0)
    while True:
        busy = False
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                if b"\0profile\0" in (path.parent / "cmdline").read_bytes():
                    ticks = sum(map(int, path.read_text().rpartition(")")[2].split()[11:13]))
                    busy = busy or ticks > last.get(path, ticks)
                    last[path] = ticks
            except OSError:
                continue
        watts = idle + dynamic * busy + rng.gauss(0, 0.02)
        celsius += 0.05 / 20 * (40 + 2 * watts - celsius)
        write(files, watts)
        thermometer.write_text(f"{1000 * celsius:.0f}\n")
        time.sleep(0.05)


def models(runs):
    """Yield name and model of each run: step, ramp and noise in turn, with powers like those of an Orin Nano."""
    rng = random.Random(0)
    for i in range(runs):
        kind = ("step", "ramp", "noise")[i % 3]
        idle, dynamic = rng.uniform(3, 6), rng.uniform(1.5, 4)
        ramp = rng.uniform(-0.3, 0.3) if kind == "ramp" else 0.0
        noise = rng.uniform(0.1, 0.3) if kind == "noise" else 0.02
        yield kind, [idle, dynamic, ramp, noise, 0.05 if kind == "noise" else 0.0]


def measure(arguments):
    """Print the stated and the true energy of each run as a line of JSON."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
    from edge_ssm.engines.registry import create
    from edge_ssm.profiler import protocol, sampler
    from edge_ssm.profiler.energy import energy_per_step
    from support.networks import random_network, samples_for

    path = f"/run/shared-{os.getpid()}"
    shared = Shared(path)
    shared.put(0.0, [4.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    board = subprocess.Popen([sys.executable, __file__, "emulate", path])
    network = random_network(h=32, pairs=8, layers=2)
    engine = create("cpu", network)
    waiting, repeated, number = list(models(arguments.runs)), 0, 0
    try:
        while waiting:
            number += 1
            kind, model = waiting[0]
            whole = [*model, arguments.block]

            def on_block(kind, stage, whole=whole):
                shared.put(time.monotonic() if kind != "idle" and stage == "begin" else 0.0, whole)

            shared.put(0.0, whole)
            shared.stall_s(0.0)
            workload = protocol.Workload("work", engine, samples_for(network, 0, 256))
            meter = sampler.start_selected(arguments.meter)[0]
            run = protocol.run([workload], meter, arguments.rounds, arguments.block, number, on_block=on_block)
            if shared.stall_s() > MAX_STALL_S and repeated < arguments.runs:
                repeated += 1
                continue
            energy = energy_per_step(run.trace, run.blocks, "work")
            if energy is None:  # too few readings in a block
                if repeated == arguments.runs:
                    raise SystemExit("too few readings in the blocks; this machine is too busy to measure")
                repeated += 1
                continue
            waiting.pop(0)
            work = [b for b in run.blocks if b.kind == "work"]
            mean = 1e6 * sum(b.end_s - b.begin_s for b in work) / sum(b.steps for b in work)
            row = {
                "kind": kind,
                "meter": run.trace.meter.name,
                "dynamic": energy.dynamic,
                "low": energy.low,
                "high": energy.high,
                "true_dynamic": model[1] * mean,
                "total": energy.total,
                "total_low": energy.total_low,
                "total_high": energy.total_high,
                "true_total": (model[0] + model[1]) * mean,
                "readings": len(run.trace.time_s),
                "repeated": repeated,
                "notes": run.notes,
            }
            print(json.dumps(row), flush=True)
    finally:
        board.kill()


def main():
    """Run the command that the arguments name."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("emulate").add_argument("path")
    command = commands.add_parser("follow")
    command.add_argument("idle", type=float)
    command.add_argument("dynamic", type=float)
    command = commands.add_parser("measure")
    command.add_argument("meter")
    command.add_argument("--runs", type=int, default=1)
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--block", type=float, default=0.6)
    arguments = parser.parse_args()
    if arguments.command == "emulate":
        emulate(arguments.path)
    elif arguments.command == "follow":
        follow(arguments.idle, arguments.dynamic)
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
