"""Inject the faults of the field into a real service, and record what became of every sample.

    python benchmarks/faults/run.py [--only sigkill,broker] [--kills 100] [--output benchmarks/faults/results.json]

``edge-ssm run`` runs as a process of its own with the demo model. Its recording is repeated at a thousand samples per
second, with a decision every 20 samples (windows overlap). In the results,

- ``missing`` are decisions that the same samples give without any fault, and that nobody received. If a policy drops
  them, the run counts them in ``dropped``, and they are included here too;
- ``repeated`` are decisions that were received more than once;
- ``longest_resume_s`` is how much of a killed run's work was repeated, at most;
- ``longest_silence_s`` is the longest time from a kill to the next new decision.

Needs mosquitto, paho-mqtt (pip install 'edge-ssm[mqtt]'), faketime for the clock, and root for the full disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from support.mosquitto import Broker, free_port

from edge_ssm.engines.registry import create
from edge_ssm.formats import artifact
from edge_ssm.io.codecs.framed import encode

MODEL = ROOT / "examples" / "demo.safetensors"
RATE, HOP = 1000, 20
INTERVAL_S = 0.5
NETWORK = artifact.load(MODEL).network
RECORDED = np.array(
    [[float(v) for v in line.split(",")[:6]] for line in (ROOT / "examples/demo.csv").read_text().splitlines()[1:]]
)


def sample(number):
    return RECORDED[number % len(RECORDED)]


def expected(samples):
    """Return the label of every decision over so many samples, by (start, end); None if it is too close to call."""
    found, window = {}, NETWORK.window
    engine = create("cpu", NETWORK)
    for start in range(0, samples - window + 1, HOP):
        engine.reset()
        pooled = engine.chunk(np.array([sample(n) for n in range(start, start + window)])).mean(axis=0)
        order = np.sort(pooled)
        sure = order[-1] - order[-2] > 1e-3
        found[start, start + window] = NETWORK.labels[int(pooled.argmax())] if sure else None
    return found


class Service:
    """A run of edge-ssm that can be killed and started again with the same arguments."""

    def __init__(self, folder, *arguments, environment=None):
        self.folder = folder
        self._arguments = [
            sys.executable, "-c", "from edge_ssm.cli.app import main; main()", "run", str(arguments[0]),
            "--hop", str(HOP), "--engine", "cpu", "--profile", "none", *map(str, arguments[1:]),
        ]  # fmt: skip
        self._status = folder / "run"
        self._status.mkdir(exist_ok=True)
        paths = {"PYTHONPATH": str(ROOT), "EDGE_SSM_RUN": str(self._status)}
        self._environment = {**os.environ, **paths, **(environment or {})}
        self.process = None

    def start(self):
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self._arguments, stderr=log, stdout=log, stdin=subprocess.DEVNULL, env=self._environment
            )
        return self

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.terminate()
        self.process.wait(60)
        return self.account()

    def status(self):
        """Return what the run says of itself; empty before it says anything."""
        try:
            return json.loads((self._status / f"{self.process.pid}.status").read_text())
        except FileNotFoundError:
            return {}

    def has_taken(self, samples):
        """Return whether so many samples went through, counting those that snapshots brought from earlier runs."""
        return self.status().get("samples", 0) >= samples

    @property
    def log(self):
        return (self.folder / "log").read_text(errors="replace")

    def account(self):
        """Return the counts of the last run, from its summary."""
        said = self.log
        samples, gaps, malformed = re.findall(r"^samples +(\d+), gaps (.*), malformed rows (\d+)", said, re.M)[-1]
        return {"samples": int(samples), "gaps": gaps, "malformed": int(malformed)}


class Decisions:
    """The decisions that were received, by window."""

    def __init__(self):
        self.times, self.labels, self.events = {}, {}, []
        self.count = Counter()

    def take(self, line, at):
        found = json.loads(line)
        if "event" in found:
            self.events.append((at, found))
            return
        key = found["start"], found["end"]
        self.count[key] += 1
        self.times.setdefault(key, at)
        self.labels.setdefault(key, set()).add(found["label"])

    @property
    def last(self):
        return max((end for _, end in self.count), default=0)

    def row(self, truth):
        wrong = [k for k, labels in self.labels.items() if truth.get(k) not in (None, *labels) or len(labels) > 1]
        return {
            "decided": len(self.count),
            "missing": len(set(truth) - set(self.count)),
            "repeated": sum(self.count.values()) - len(self.count),
            "wrong": len(wrong),
        }


class Subscriber(Decisions):
    def __init__(self, broker, topic):
        import paho.mqtt.client as paho

        super().__init__()
        self._client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, "benchmark", protocol=paho.MQTTv311, clean_session=False
        )
        self._client.on_message = lambda _c, _d, message: self.take(message.payload, time.monotonic())
        self._client.on_connect = lambda client, *_: client.subscribe(topic, 1)
        self._client.reconnect_delay_set(0.1, 0.5)
        self._client.connect("127.0.0.1", broker.port)
        self._client.loop_start()

    def close(self):
        self._client.disconnect()
        self._client.loop_stop()


class Written:
    """The last decision in an output file, whenever it is asked for."""

    def __init__(self, path):
        self._path = path

    @property
    def last(self):
        return File(self._path).last


class File(Decisions):
    """The decisions in an output file."""

    def __init__(self, path):
        super().__init__()
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            self.take(line, 0.0)


class Sensor:
    """Sends numbered samples at RATE until it is stopped.

    It stops after the last sample of a decision, so that whoever receives that decision knows that all samples arrived.
    """

    BATCH = 10

    def __init__(self, send):
        self._send, self._stop, self.sent = send, threading.Event(), 0
        self.rate = RATE
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        due = time.monotonic()
        while not self._stop.is_set() or (self.sent - NETWORK.window) % HOP:
            try:
                self._send(range(self.sent, self.sent + self.BATCH))
            except OSError:
                if self._stop.is_set():
                    break
                time.sleep(0.05)
                continue
            self.sent += self.BATCH
            due = max(due + self.BATCH / self.rate, time.monotonic() - 1)
            time.sleep(max(0.0, due - time.monotonic()))

    def stop(self):
        self._stop.set()
        self._thread.join(30)
        return self.sent


def ndjson(numbers):
    return "".join(json.dumps({"seq": n, "values": sample(n).tolist()}) + "\n" for n in numbers).encode()


def csv(numbers):
    return "".join(",".join(map(repr, sample(n).tolist())) + "\n" for n in numbers).encode()


def framed(numbers):
    return encode(np.array([sample(n) for n in numbers]), numbers[0], boot=1)


def publisher(broker):
    """Return a client that delivers each message to the broker, in order, however often the broker fails."""
    import paho.mqtt.client as paho

    client = paho.Client(paho.CallbackAPIVersion.VERSION2, "sensor", protocol=paho.MQTTv311, clean_session=False)
    client.reconnect_delay_set(0.1, 0.5)
    client.max_queued_messages_set(0)
    client.max_inflight_messages_set(1)  # a redelivery never overtakes
    client.connect("127.0.0.1", broker.port)
    client.loop_start()

    def send(numbers):
        client.publish("sensor", ndjson(numbers), qos=1)

    return client, send


LIMIT_S = 120.0
"""No condition takes so long to come true, however busy the machine is."""


def until(condition, required=True):
    """Wait for what must come true. Where it is a result of the campaign, it is not ``required``: the row shows it."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end:
            if required:
                raise TimeoutError(f"nothing happened within {LIMIT_S:.0f} s")
            return
        time.sleep(0.02)


def mqtt_service(folder, broker, *arguments):
    source = f"mqtt://127.0.0.1:{broker.port}/sensor?client_id=device"
    return Service(
        folder, MODEL, "--input", source, "--format", "ndjson", "--output", f"mqtt://127.0.0.1:{broker.port}/decisions",
        "--state", folder / "state", "--snapshot-interval", INTERVAL_S, *arguments,
    )  # fmt: skip


def drained(service, subscriber, sent):
    """Wait until every sample went through the run, and its decisions came out.

    The decisions alone do not tell: a run that was killed may have sent them all, and the next one, which begins at the
    last snapshot, not have come so far yet.
    """
    until(lambda: subscriber.last + HOP > sent, required=False)
    until(lambda: service.has_taken(sent), required=False)


def sigkill(folder, kills):
    broker = Broker(folder).start()
    subscriber = Subscriber(broker, "decisions")
    service = mqtt_service(folder, broker).start()
    until(lambda: "connected" in service.log or subscriber.events)
    client, send = publisher(broker)
    sensor = Sensor(send)
    until(lambda: subscriber.count)
    rng, runs = random.Random(0), []
    started = time.monotonic()
    for _ in range(kills):
        time.sleep(rng.uniform(0.1, 1.6))  # at any moment, while starting too
        service.kill()
        runs.append((started, time.monotonic()))
        service.start()
        started = time.monotonic()
    sent = sensor.stop()
    drained(service, subscriber, sent)
    until(lambda: any(at > started and event["event"] == "connected" for at, event in subscriber.events))
    account = service.stop()
    client.loop_stop()
    subscriber.close()
    broker.kill()
    # The work that a kill undid: since the snapshot that the next run began with, or since the killed run's own start.
    undone = [0.0]
    for at, event in subscriber.events:
        before = [run for run in runs if run[1] < at]
        if event["event"] == "resumed" and before:
            undone.append(before[-1][1] - max(before[-1][0], at - event["age_s"]))
    # What was repeated is made again from the last snapshot on; a new decision is one that none made before.
    times = sorted(subscriber.times.values())
    silence = [next((t for t in times if t > at), at) - at for _, at in runs]
    return {
        "runs": kills,
        "accepted": account["samples"],
        "sent": sent,
        **subscriber.row(expected(sent)),
        "gaps": account["gaps"],
        "longest_resume_s": round(max(undone), 3),
        "snapshot_interval_s": INTERVAL_S,
        "longest_silence_s": round(max(silence), 3),
    }


def broker_fault(folder, runs, number):
    broker = Broker(folder).start()
    subscriber = Subscriber(broker, "decisions")
    service = mqtt_service(folder, broker).start()
    until(lambda: subscriber.events)
    client, send = publisher(broker)
    sensor = Sensor(send)
    until(lambda: subscriber.count)
    for _ in range(runs):
        time.sleep(1.5)
        broker._process.send_signal(number)
        broker._process.wait()
        time.sleep(0.5)
        broker.start()
    time.sleep(1.5)
    sent = sensor.stop()
    drained(service, subscriber, sent)
    account = service.stop()
    client.loop_stop()
    subscriber.close()
    broker.kill()
    return {
        "runs": runs,
        "accepted": account["samples"],
        "sent": sent,
        **subscriber.row(expected(sent)),
        "gaps": account["gaps"],
        "longest_resume_s": None,
    }


def tcp_sender(port):
    """A client that connects when it can and sends whole batches."""
    held = {}

    def send(content):
        if "socket" not in held:
            held["socket"] = socket.create_connection(("127.0.0.1", port), 1)
        try:
            held["socket"].sendall(content)
        except OSError:
            held.pop("socket").close()
            raise

    return send


def tcp_sensor(port, form=ndjson):
    """One that sends to a service, once that listens."""
    until(lambda: _open(port))
    send = tcp_sender(port)
    return Sensor(lambda numbers: send(form(numbers)))


def tcp_service(folder, *arguments, form="ndjson", environment=None, output=None):
    port = free_port()
    service = Service(
        folder, MODEL, "--input", f"tcp-listen://127.0.0.1:{port}", "--format", form,
        "--output", output or folder / "out", "--append", *arguments, environment=environment,
    )  # fmt: skip
    return service, port


def finished(service, sensor, out, lines=True):
    sent = sensor.stop()
    if lines:
        drained(service, Written(out), sent)
    account = service.stop()
    decisions = File(out) if lines else Decisions()
    return sent, account, decisions


def disk_full(folder, runs):
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", disk], check=True)
    try:
        service, port = tcp_service(
            folder, "--state", disk / "state", "--snapshot-interval", 0.2, "--queue", 100_000, output=disk / "out"
        )
        service.start()
        sensor = tcp_sensor(port)
        for _ in range(runs):
            time.sleep(1)
            ballast = (disk / "ballast").open("wb")
            try:
                while ballast.write(b"x" * 4096):
                    ballast.flush()
            except OSError:
                pass
            time.sleep(2)
            with contextlib.suppress(OSError):
                ballast.close()
            (disk / "ballast").unlink()
        time.sleep(1)
        sent, account, decisions = finished(service, sensor, disk / "out")
        said = service.log
        return {
            "runs": runs, "accepted": account["samples"], "sent": sent, **decisions.row(expected(sent)),
            "longest_resume_s": None, "said": "No space left" in said,
        }  # fmt: skip
    finally:
        subprocess.run(["umount", "-l", disk], check=False)


def _open(port):
    """Whether the service listens, without being a client of its."""
    wanted = f":{port:04X} 00000000:0000 0A"
    return wanted in Path("/proc/net/tcp").read_text()


def clock_stepped(folder, runs):
    library = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
    if library is None:
        raise SystemExit("faketime is not installed")
    clock = folder / "clock"
    clock.write_text("+0\n")
    environment = {
        "LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    service, port = tcp_service(
        folder, "--state", folder / "state", "--snapshot-interval", 0.2, "--stale-after", 2, environment=environment
    )
    service.start()
    sensor = tcp_sensor(port)
    for i in range(runs):
        time.sleep(0.5)
        (folder / "clock.new").write_text(("-10d", "+400d", "-1h", "+7")[i % 4] + "\n")
        os.replace(folder / "clock.new", clock)  # half a file would make the clock itself fail
    time.sleep(0.5)
    sent, account, decisions = finished(service, sensor, folder / "out")
    return {
        "runs": runs, "accepted": account["samples"], "sent": sent, **decisions.row(expected(sent)),
        "longest_resume_s": None, "events": sorted({event["event"] for _, event in decisions.events}),
    }  # fmt: skip


def sensor_fault(folder, runs, what):
    form = "framed" if what == "garbage" else "ndjson"
    stale = 1.0 if what == "silent" else 3600.0  # a busy machine may keep any sensor from sending for a while
    service, port = tcp_service(folder, "--stale-after", stale, "--queue", 100_000, form=form)
    service.start()
    until(lambda: _open(port))
    send = tcp_sender(port)
    silent, rng = threading.Event(), random.Random(0)
    garbage = {"bytes": 0}

    def one(numbers):
        while silent.is_set():
            time.sleep(0.02)
        if what == "garbage" and rng.random() < 0.3:
            noise = rng.randbytes(rng.randrange(1, 3000))
            garbage["bytes"] += len(noise)
            send(b"\0" + noise + b"\0")
        send((framed if form == "framed" else ndjson)(numbers))

    sensor = Sensor(one)

    def events(name):
        return sum(event["event"] == name for _, event in File(folder / "out").events)

    for _ in range(runs):
        time.sleep(0.7)
        if what == "silent":
            before = events("stale")
            silent.set()
            until(lambda before=before: events("stale") > before, required=False)
            silent.clear()
            until(lambda before=before: events("flowing") > before, required=False)
        elif what == "babbling":
            sensor.rate = 1_000_000
            time.sleep(1.0)
            sensor.rate = RATE
    time.sleep(0.5)
    sent, account, decisions = finished(service, sensor, folder / "out")
    counts = Counter(event["event"] for _, event in decisions.events)
    return {
        "runs": runs, "accepted": account["samples"], "sent": sent, **decisions.row(expected(sent)),
        "malformed": account["malformed"], **({"garbage_bytes": garbage["bytes"]} if what == "garbage" else {}),
        "longest_resume_s": None, "events": dict(counts),
    }  # fmt: skip


def deaf_sink(folder, runs):
    """A server that takes the connection and never reads: what can't be told is counted, and no sample waits."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        service, port = tcp_service(
            folder, "--queue", 64, "--logits", output=f"tcp://127.0.0.1:{server.getsockname()[1]}"
        )
        service.start()
        sensor = tcp_sensor(port)
        sensor.rate = 20 * RATE
        time.sleep(20 * runs)
        sent = sensor.stop()

        until(lambda: service.has_taken(sent))
        time.sleep(1.5)
        last = service.status()
        account = service.stop()
    truth = expected(sent)
    dropped = last["dropped"].get("output_overflow", 0)
    return {
        "runs": runs, "accepted": account["samples"], "sent": sent, "decided": last["decisions"],
        "missing": len(truth) - last["decisions"] + dropped, "repeated": 0, "dropped": dropped,
        "queue": last["queue"], "longest_resume_s": None,
    }  # fmt: skip


def corrupt_snapshot(folder, runs):
    rng, refused, sent_all, decided, missing = random.Random(0), 0, 0, 0, 0
    for i in range(runs):
        here = folder / str(i)
        here.mkdir()
        service, port = tcp_service(here, "--state", here / "state", "--snapshot-interval", 0.1, form="csv")
        service.start()
        first = tcp_sensor(port, csv)
        until((here / "state" / "snapshot").exists)
        time.sleep(0.3)
        first.stop()
        service.kill()
        path = here / "state" / "snapshot"
        content = bytearray(path.read_bytes())
        if i % 2:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        (here / "out").unlink()
        service.start()
        second = tcp_sensor(port, csv)
        time.sleep(0.6)
        sent, _, decisions = finished(service, second, here / "out")
        row = decisions.row(expected(sent))
        refused += path.with_name("snapshot.refused").exists()
        sent_all, decided, missing = sent_all + sent, decided + row["decided"], missing + row["missing"]
    return {
        "runs": runs, "accepted": sent_all, "sent": sent_all, "decided": decided, "missing": missing, "repeated": 0,
        "refused": refused, "longest_resume_s": None,
    }  # fmt: skip


def reloads(folder, runs):
    models = [folder / "a.safetensors", folder / "b.safetensors"]
    for i, path in enumerate(models):
        artifact.save(path, NETWORK, {"number": i})  # the same network under another digest: decisions must not differ
    model = folder / "model.safetensors"
    shutil.copy(models[0], model)
    service, port = tcp_service(folder, "--reload")
    service._arguments[4] = str(model)
    service.start()
    sensor = tcp_sensor(port)
    done = 0
    for i in range(runs):
        shutil.copy(models[(i + 1) % 2], folder / "next")
        os.replace(folder / "next", model)
        service.process.send_signal(signal.SIGHUP)
        until(lambda i=i: service.log.count(": reloaded, digest") == i + 1, required=False)
        done = service.log.count(": reloaded, digest")
        time.sleep(0.1)
    sent, account, decisions = finished(service, sensor, folder / "out")
    return {
        "runs": runs, "reloaded": done, "accepted": account["samples"], "sent": sent,
        **decisions.row(expected(sent)), "longest_resume_s": None,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results.json")
    arguments = parser.parse_args()
    faults = {
        "sigkill": lambda folder: sigkill(folder, arguments.kills),
        "broker stopped": lambda folder: broker_fault(folder, 5, signal.SIGTERM),
        "broker killed": lambda folder: broker_fault(folder, 5, signal.SIGKILL),
        "disk full": lambda folder: disk_full(folder, 3),
        "clock stepped": lambda folder: clock_stepped(folder, 12),
        "sensor silent": lambda folder: sensor_fault(folder, 5, "silent"),
        "sensor babbling": lambda folder: sensor_fault(folder, 5, "babbling"),
        "sensor sends garbage": lambda folder: sensor_fault(folder, 5, "garbage"),
        "sink never reads": lambda folder: deaf_sink(folder, 1),
        "corrupt snapshot": lambda folder: corrupt_snapshot(folder, 10),
        "reload under load": lambda folder: reloads(folder, 50),
    }
    wanted = [part for part in arguments.only.split(",") if part]
    rows = json.loads(arguments.output.read_text()) if wanted and arguments.output.exists() else []
    for name, inflict in faults.items():
        if wanted and not any(part in name for part in wanted):
            continue
        folder = Path(tempfile.mkdtemp(prefix="edge-ssm-faults-"))
        try:
            row = {"fault": name, **inflict(folder)}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(row, flush=True)
        rows = [r for r in rows if r["fault"] != name] + [row]
    order = {name: i for i, name in enumerate(faults)}
    rows.sort(key=lambda r: order[r["fault"]])
    arguments.output.write_text("[\n " + ",\n ".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
