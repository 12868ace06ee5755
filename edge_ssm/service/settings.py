"""The settings of a run. Each is declared once: as an annotated field of ``Settings``.

From a declaration follow the option of ``edge-ssm run`` (``edge_ssm.cli.run``), the key of the TOML file
(``edge_ssm.service.settings_file``), ``systemd/example.toml`` and the table in docs/service.md
(``python -m edge_ssm.service.settings_reference``), and the settings that ``edge-ssm service check`` prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from edge_ssm.engines.registry import ENGINES
from edge_ssm.errors import UsageError
from edge_ssm.io.codecs.registry import FORMATS
from edge_ssm.io.sinks.queue import Overflow
from edge_ssm.runtime.gaps import GapPolicy
from edge_ssm.service.declaration import Setting, declarations, sections

Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e12)]
Count = Annotated[int, msgspec.Meta(ge=1, lt=1 << 40)]
CountOrNone = Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a user can choose about a run.

    None stands for a value that follows from the model, the board or the source (``RunPlan`` has the result).
    """

    model: Annotated[
        Text,
        Setting(
            "model.path",
            "Model to run: an artifact of edge-ssm-build, or a .onnx or .tflite file exported from one.",
            example="model.safetensors",
            is_path=True,
        ),
    ]
    reload: Annotated[
        bool,
        Setting(
            "model.reload",
            "Switch to a new model without a restart, on SIGHUP or when the model's file changes.",
            details="Always on in a service.",
        ),
    ] = False

    input: Annotated[
        Text,
        Setting(
            "source.input",
            "Source of the samples: a file, - for standard input, or an address: serial:///dev/ttyUSB0?baud=115200, "
            "tcp://HOST:PORT, tcp-listen://HOST:PORT, udp://HOST:PORT, unix:///PATH, unix-listen:///PATH, "
            "mqtt://HOST/TOPIC, mqtts://HOST/TOPIC or iio://NAME.",
            metavar="FILE|-|ADDRESS",
            link="[addresses](#addresses)",
        ),
    ] = "-"
    format: Annotated[
        str | None,
        Setting(
            "source.format",
            "Input format.",
            unset="by the suffix of the file's name, else csv",
            example="csv",
            choices=FORMATS,
            link="[framed](framing.md)",
        ),
    ] = None
    scale: Annotated[
        Text,
        Setting(
            "source.scale",
            "Factor from raw numbers to the model's units, one for all channels or one for each; for the formats "
            "i16le, f32le and framed.",
            metavar="S[,S...]",
        ),
    ] = "1"
    follow: Annotated[
        bool,
        Setting(
            "source.follow",
            "Continue at the end of a file as it grows or is replaced; for a named pipe, wait for the next writer.",
            excludes=(("pace", "a file that grows sets the pace itself"),),
        ),
    ] = False
    strict: Annotated[bool, Setting("source.strict", "Stop at the first malformed row.")] = False
    pace: Annotated[
        bool, Setting("source.pace", "Replay a recording, from a file or standard input, at its sample rate.")
    ] = False
    stale_after: Annotated[
        Positive | None,
        Setting(
            "source.stale_after",
            "Report a sensor that has been silent for this time, in {unit}.",
            unit="seconds",
            unset="never",
            example=5.0,
            metavar="S",
        ),
    ] = None
    time_gaps: Annotated[
        bool,
        Setting(
            "source.time_gaps",
            "Treat time stamps that skip samples as a gap.",
            details="Time stamps are in seconds: a column time, timestamp or t, or a member time.",
        ),
    ] = False

    hop: Annotated[
        int | None,
        Setting(
            "window.hop",
            "Number of samples between two decisions; a hop shorter than the window makes windows overlap.",
            unset="the window",
            example=50,
            metavar="N",
        ),
    ] = None
    carry: Annotated[
        bool, Setting("window.carry", "Keep the state across windows instead of starting each window from zero.")
    ] = False
    sample_rate: Annotated[
        float | None,
        Setting(
            "window.sample_rate",
            "Sample rate of the stream in {unit}, where it differs from the rate of training; the step size is "
            "rescaled.",
            unit="hertz",
            unset="the rate of training",
            example=50.0,
            metavar="HZ",
        ),
    ] = None

    gap: Annotated[
        GapPolicy,
        Setting(
            "gap.policy",
            "Handling of missing samples: hold repeats the last sample, skip lets the state decay, reset discards "
            "the open window.",
        ),
    ] = "hold"
    max_gap: Annotated[
        CountOrNone | None,
        Setting(
            "gap.max",
            "Longest gap in {unit} to which the policy applies; a longer one resets.",
            unit="samples",
            unset="the window; 100 without pooling",
            example=100,
            metavar="N",
        ),
    ] = None

    engine: Annotated[
        Text,
        Setting(
            "engine.name",
            f"Engine: auto for the fastest by measurement, or one of {', '.join(ENGINES)}.",
            details="For a .onnx or .tflite file, auto is its own engine.",
            metavar="NAME",
        ),
    ] = "auto"
    threads: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=256)] | None,
        Setting(
            "engine.threads", "Number of threads of the engines onnx and tflite.", unset="1", example=1, metavar="N"
        ),
    ] = None
    board: Annotated[
        Text,
        Setting(
            "engine.profile",
            "Board and power mode (edge-ssm boards list), auto to detect them, or none. They determine the cores to "
            "run on, the engines for auto, how the CPU waits for a GPU, and limits.",
            metavar="NAME|auto|none",
            hidden_flags=("--profile",),
        ),
    ] = "auto"
    chunk: Annotated[
        Text | Count | None,
        Setting(
            "engine.chunk",
            "Number of samples per call of the engine, never across the end of a window; auto for as many as the "
            "latency budget allows.",
            unset="the board's; 1",
            example=1,
            metavar="N|auto",
        ),
    ] = None
    latency_budget: Annotated[
        Positive | None,
        Setting(
            "engine.latency_budget",
            "Time in {unit} that the engine may take from the last sample of a chunk to its outputs; requires the "
            "chunk auto.",
            unit="milliseconds",
            unset="none",
            example=5.0,
            metavar="MS",
        ),
    ] = None
    deadline: Annotated[
        Positive | None,
        Setting(
            "engine.deadline",
            "Time in {unit} after which a decision counts as late.",
            unit="sample periods",
            unset="the board's; 1",
            example=1.0,
            metavar="PERIODS",
        ),
    ] = None
    fifo: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=98)] | None,
        Setting(
            "engine.fifo",
            "Real-time priority (SCHED_FIFO) of the thread that runs the pipeline, from 1 to 98.",
            unset="none",
            example=50,
            metavar="PRIORITY",
        ),
    ] = None
    affinity: Annotated[
        list[CountOrNone] | None,
        Setting("engine.affinity", "CPU cores to run on.", unset="the board's; any", example=[5], metavar="CORE"),
    ] = None

    output: Annotated[
        Text,
        Setting(
            "sink.output",
            "Destination of the decisions: a file, - for standard output, or an address: tcp://HOST:PORT, "
            "udp://HOST:PORT, unix:///PATH, mqtt://HOST/TOPIC, mqtts://HOST/TOPIC, http://HOST/PATH or "
            "https://HOST/PATH.",
            details="A service may write files below /var/lib/edge-ssm/NAME only; its standard output is the journal.",
            metavar="FILE|-|ADDRESS",
            link="[addresses](#addresses)",
        ),
    ] = "-"
    output_format: Annotated[
        Literal["ndjson", "csv", "text"] | None,
        Setting(
            "sink.format",
            "Output format.",
            unset="csv for *.csv, text on a terminal, else ndjson",
            example="ndjson",
        ),
    ] = None
    logits: Annotated[bool, Setting("sink.logits", "Add the logits to every decision.")] = False
    truth: Annotated[
        bool,
        Setting(
            "sink.truth",
            "Add the recording's own label, from the column label, to every decision; the format text always does.",
        ),
    ] = False
    append: Annotated[
        bool,
        Setting(
            "sink.append",
            "Append to the output file instead of replacing it.",
            details="Always on where snapshots are kept; there, an unfinished last line that a power cut left is "
            "removed, and its decision is made again.",
        ),
    ] = False
    rotate_bytes: Annotated[
        CountOrNone,
        Setting(
            "sink.rotate_bytes",
            "Size in {unit} at which a new output file is started; 0 for no limit.",
            unit="bytes",
            metavar="N",
        ),
    ] = 0
    rotate_keep: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=1000)],
        Setting("sink.rotate_keep", "Number of earlier output files to keep.", metavar="N"),
    ] = 5
    queue: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=1 << 20)],
        Setting("sink.queue", "Number of decisions that may wait for a slow reader.", metavar="N"),
    ] = 1024
    overflow: Annotated[
        Overflow | None,
        Setting(
            "sink.overflow",
            "Behaviour of a full queue: drop the oldest decision, drop the newest, or wait for the reader.",
            unset="wait for samples from a file or standard input, else drop-oldest",
            example="drop-oldest",
        ),
    ] = None

    state: Annotated[
        Text | None,
        Setting(
            "state.folder",
            "Folder for snapshots, from the last of which the next run resumes.",
            unset="none; a service has /var/lib/edge-ssm/NAME",
            example="/var/lib/edge-ssm/NAME",
            metavar="DIR",
        ),
    ] = None
    snapshot_interval: Annotated[
        Positive,
        Setting("state.interval", "Time between two snapshots, in {unit}.", unit="seconds", metavar="S"),
    ] = 10.0

    member: Annotated[
        list[Text],
        Setting(
            "adaptive.members",
            "Smaller models of the same family to switch to under pressure, the largest first.",
            metavar="FILE",
            is_path=True,
        ),
    ] = []
    max_misses: Annotated[
        Annotated[float, msgspec.Meta(ge=0, le=1)],
        Setting(
            "adaptive.max_misses", "Share of late decisions above which a smaller model takes over.", metavar="SHARE"
        ),
    ] = 0.01
    max_power: Annotated[
        Positive | None,
        Setting(
            "adaptive.max_power",
            "Power in {unit} above which a smaller model takes over.",
            unit="watts",
            unset="the board's",
            example=12.0,
            metavar="W",
        ),
    ] = None
    max_temperature: Annotated[
        Positive | None,
        Setting(
            "adaptive.max_temperature",
            "Temperature in {unit} above which a smaller model takes over.",
            unit="degrees Celsius",
            unset="the board's",
            example=85.0,
            metavar="C",
        ),
    ] = None
    settle: Annotated[
        Positive,
        Setting("adaptive.settle", "Shortest time between two switches, in {unit}.", unit="seconds", metavar="S"),
    ] = 30.0

    listen: Annotated[
        Text | None,
        Setting(
            "metrics.listen",
            "Address of the status page, /healthz and /readyz; :PORT listens on loopback only.",
            unset="none",
            example="127.0.0.1:9464",
            metavar="HOST:PORT",
            link="[observing](observing.md)",
        ),
    ] = None
    prometheus: Annotated[
        bool, Setting("metrics.prometheus", "Serve metrics for Prometheus at /metrics as well.", requires=("listen",))
    ] = False

    require_signature: Annotated[
        list[Text],
        Setting(
            "security.require_signature",
            "Files with public Ed25519 keys; only models that one of them signed are accepted.",
            metavar="KEYFILE",
            is_path=True,
            link="[signing](signing.md)",
        ),
    ] = []


SETTINGS = declarations(Settings)
"""The declaration of every setting, by the name of its field."""
SECTIONS = sections(SETTINGS)


def merge(file_values: Mapping[str, Any], option_values: Mapping[str, Any]) -> Settings:
    """Return the settings of a configuration file and of the command line, which takes precedence.

    Raises UsageError for a value that is not allowed, or for settings that contradict each other.
    """
    values = dict(file_values)
    for name, value in option_values.items():
        values[name] = SETTINGS[name].convert(value, SETTINGS[name].flag)
    if "model" not in values:
        raise UsageError("MODEL: missing; give an artifact, or --config FILE")
    settings = Settings(**values)
    check_combinations(settings)
    return settings


def check_combinations(settings: Settings) -> None:
    """Raise UsageError if a setting lacks one that it requires, or contradicts another."""
    for setting in SETTINGS.values():
        if getattr(settings, setting.name) in (setting.default, None):
            continue
        for other in (SETTINGS[name] for name in setting.requires):
            if getattr(settings, other.name) is None:
                needed = f"{other.key} ({other.flag} {other.metavar})"
                raise UsageError(f"{setting.flag}: needs {needed}", setting=setting.name)
        for other, reason in ((SETTINGS[name], reason) for name, reason in setting.excludes):
            if getattr(settings, other.name) not in (other.default, None):
                raise UsageError(f"{setting.flag}: not with {other.key} ({other.flag}), {reason}", setting=setting.name)
