"""The commands as processes of their own, forked from a server that has imported them already.

``run`` and ``Process`` take what ``subprocess.run`` and ``subprocess.Popen`` take, for ``python -c CODE ARGUMENTS``.
What they start has its own standard streams, environment, folder, signals and exit status, and ends as any interpreter
ends; it only saves the seconds that the imports take. Tests of imports, of memory or of variables that Python reads at
its start need ``subprocess`` itself.
"""

import atexit
import contextlib
import io
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import warnings
from functools import cache
from importlib import import_module

EDGE_SSM = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()"]
EDGE_SSM_BUILD = [sys.executable, "-c", "from edge_ssm_build.cli.app import main; main()"]
PRELOADED = {
    "edge_ssm": (
        "edge_ssm.cli.app",
        "edge_ssm.engines.cpu.engine",
        "edge_ssm.engines.selection",
        "edge_ssm.profiler.run",
        "edge_ssm.service.run",
        "edge_ssm.telemetry.top",
    ),
    "edge_ssm_build": (
        "edge_ssm_build.cli.app",
        "torch",
        "tqdm",
        "onnx",
        "flatbuffers",
        "edge_ssm_build.training.loop",
        "edge_ssm.engines.cpu.engine",
    ),
}
"""What each server imports. What is missing is left out: the command says so itself. Graph runtimes are not here: they
have threads of their own, and wait for them for ever after a fork."""


class _Server:
    def __init__(self, package):
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, package, str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        atexit.register(self.stop)

    def stop(self):
        self._control.close()
        self._process.wait()

    def fork(self, code, arguments, env, cwd, descriptors):
        """Return (pid, descriptor): the exit status can be read from the descriptor once the process has ended."""
        status, theirs = os.pipe()
        request = {"code": code, "arguments": arguments, "env": dict(env), "cwd": os.fspath(cwd)}
        content = json.dumps(request).encode()
        with open(os.memfd_create("request"), "w+b") as file:  # no limit of a message's length applies
            file.write(content)
            file.flush()
            socket.send_fds(self._control, [b"\0"], [file.fileno(), theirs, *descriptors])
        os.close(theirs)
        return _number(status), status


@cache
def _server(package):
    return _Server(package)


def _number(descriptor):
    content = os.read(descriptor, 8)
    if len(content) < 8:
        raise RuntimeError("the server of commands has ended")
    return struct.unpack("<q", content)[0]


class Process:
    """A running command, as ``subprocess.Popen`` shows it."""

    def __init__(
        self, args, *, stdin=None, stdout=None, stderr=None, env=None, cwd=None, text=False, universal_newlines=False
    ):
        python, option, code, *arguments = map(os.fsdecode, args)
        assert (python, option) == (sys.executable, "-c"), args
        self.args, self.returncode, self._text = args, None, text or universal_newlines
        package = "edge_ssm_build" if "edge_ssm_build" in code else "edge_ssm"
        with contextlib.ExitStack() as opened:
            ours, theirs = [None] * 3, []
            for number, choice in enumerate((stdin, stdout, stderr)):
                if choice == subprocess.PIPE:
                    ends = os.pipe()
                    ours[number], end = ends if number else ends[::-1]
                    opened.callback(os.close, end)
                elif choice == subprocess.DEVNULL:
                    end = os.open(os.devnull, os.O_RDWR)
                    opened.callback(os.close, end)
                elif choice == subprocess.STDOUT:
                    end = theirs[1]
                else:
                    end = number if choice is None else choice if isinstance(choice, int) else choice.fileno()
                theirs.append(end)
            self.pid, self._status = _server(package).fork(
                code, arguments, os.environ if env is None else env, os.getcwd() if cwd is None else cwd, theirs
            )
        mode = "" if self._text else "b"
        self.stdin, self.stdout, self.stderr = (
            None if end is None else os.fdopen(end, ("r" if number else "w") + mode, -1 if number or self._text else 0)
            for number, end in enumerate(ours)
        )

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = _number(self._status)
            os.close(self._status)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, input=None, timeout=None):
        parts = {}

        def feed():
            with contextlib.suppress(BrokenPipeError), self.stdin:
                if input:
                    self.stdin.write(input)

        def read(name, file):
            with file:
                parts[name] = file.read()

        threads = [threading.Thread(target=feed, daemon=True)] if self.stdin is not None else []
        for name in ("stdout", "stderr"):
            if (file := getattr(self, name)) is not None and not file.closed:
                threads.append(threading.Thread(target=read, args=(name, file), daemon=True))
        for thread in threads:
            thread.start()
        self.wait(timeout)
        for thread in threads:
            thread.join(timeout)
        return parts.get("stdout"), parts.get("stderr")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._close()
        self.wait()

    def __del__(self):
        self._close()
        if self.returncode is None:
            with contextlib.suppress(OSError):
                os.close(self._status)

    def _close(self):
        for file in (self.stdout, self.stderr, self.stdin):
            if file is not None:
                with contextlib.suppress(BrokenPipeError):
                    file.close()


def run(args, *, input=None, capture_output=False, check=False, timeout=None, **options):
    """``subprocess.run`` for ``python -c CODE ARGUMENTS``."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Process(args, **options) as process:
        try:
            stdout, stderr = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, args, stdout, stderr)
    return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)


def serve(package, control):
    """Fork what is asked for until the other end is closed. In a forked process, return (code, arguments)."""
    for name in PRELOADED[package]:
        with contextlib.suppress(ImportError):
            import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever presses Ctrl-C means the tests
    poll, ended = select.poll(), {}
    poll.register(control, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor != control.fileno():
                poll.unregister(descriptor)
                pid, status = ended.pop(descriptor)
                number = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.close(descriptor)
                with contextlib.suppress(BrokenPipeError):
                    os.write(status, struct.pack("<q", number))
                os.close(status)
                continue
            message, descriptors, _, _ = socket.recv_fds(control, 1, 5)
            if not message:
                os._exit(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # OpenBLAS has threads, and survives a fork
                pid = os.fork()
            if not pid:
                control.close()
                for open_one in (d for pair in ended.items() for d in (pair[0], pair[1][1])):
                    os.close(open_one)
                return _prepare(*descriptors)
            request, status, *streams = descriptors
            for open_one in (request, *streams):
                os.close(open_one)
            os.write(status, struct.pack("<q", pid))
            watch = os.pidfd_open(pid)
            ended[watch] = pid, status
            poll.register(watch, select.POLLIN)


def _prepare(request, status, *streams):
    """Make this process what a new interpreter would be. Return its code and arguments."""
    os.close(status)
    with open(request, "rb") as file:
        file.seek(0)
        wanted = json.load(file)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    for descriptor in streams:
        os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)
        raw = io.FileIO(number, "w" if number else "r", closefd=False)
        buffered = io.BufferedWriter(raw) if number else io.BufferedReader(raw)
        new = io.TextIOWrapper(buffered, old.encoding, old.errors, line_buffering=number == 2 or os.isatty(number))
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    os.chdir(wanted["cwd"])
    os.environ.clear()
    os.environ.update(wanted["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return wanted["code"], wanted["arguments"]


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[2])) as _control:
        sys.path[0] = ""  # as ``python -c`` has it, and not the tests' folder
        _code, sys.argv[1:] = serve(sys.argv[1], _control)
    sys.argv[0] = "-c"
    exec(compile(_code, "<string>", "exec"), {"__name__": "__main__"})
