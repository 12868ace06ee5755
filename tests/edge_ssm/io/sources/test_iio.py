"""IIO capture against a tree of files like sysfs and a FIFO as the device's node. No real device was at hand.

Layouts and types are those of the kernel's Documentation/iio/iio_devbuf.rst.
"""

import math
import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.io.backoff import Backoff
from edge_ssm.io.codecs.iio import Element, IioDecoder, Layout, parse_type
from edge_ssm.io.messages import Malformed
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.sources.base import Batch, Discontinuity
from edge_ssm.io.sources.iio import IioSource
from edge_ssm.model.network import InputSpec


def spec(*channels):
    return InputSpec(channels, np.zeros(len(channels)), np.ones(len(channels)))


ACCELEROMETER = {"in_accel_x": "le:s12/16>>4", "in_accel_y": "le:s12/16>>4", "in_accel_z": "le:s12/16>>4"}
STAMPED = ACCELEROMETER | {"in_timestamp": "le:s64/64>>0"}
SPEC = spec("accel_x", "accel_z")


class Tree:
    """The files that the kernel shows of one device."""

    def __init__(self, folder, elements, files=None, number=0, name="lis2dh12"):
        self.sysfs, self.dev = folder / "sys", folder / "dev"
        self.device, self.node = self.sysfs / f"iio:device{number}", self.dev / f"iio:device{number}"
        self.dev.mkdir(exist_ok=True)
        content = {"name": name, "buffer/enable": 0, "buffer/length": 2, **(files or {})}
        for index, (element, kind) in enumerate(elements.items()):
            content |= {
                f"scan_elements/{element}_{what}": value
                for what, value in (("type", kind), ("index", index), ("en", 0))
            }
        for path, value in content.items():
            (self.device / path).parent.mkdir(parents=True, exist_ok=True)
            (self.device / path).write_text(f"{value}\n")
        os.mkfifo(self.node)

    def source(self, device="iio:device0", channels=SPEC, **options):
        return IioSource(device, channels, sysfs=self.sysfs, dev=self.dev, backoff=Backoff(0.2), **options)

    def __getitem__(self, path):
        return (self.device / path).read_text().strip()


@pytest.fixture
def stop():
    with ShutdownSignal() as stop:
        yield stop


def layout(*types):
    return Layout(tuple(Element(f"in_{k}", k, *parse_type("in", text)) for k, text in enumerate(types)))


def test_layouts_match_the_documentation_of_the_kernel():
    both = layout("be:u16/16>>0", "be:u32/32>>0", "be:u32/32>>0", "be:u64/64>>0")
    assert (both.offsets, both.size) == ((0, 4, 8, 16), 24)
    some = layout("be:u16/16>>0", "be:u64/64>>0")
    assert (some.offsets, some.size) == ((0, 8), 16)
    assert layout("le:s32/32", "le:s16/16").size == 8
    quaternion = layout("le:s16/32X4>>0", "le:s64/64")
    assert (quaternion.offsets, quaternion.size) == ((0, 16), 32)


@given(
    value=st.integers(-(2**63), 2**64 - 1),
    junk=st.integers(0, 2**64 - 1),
    kind=st.sampled_from(["s", "u"]),
    order=st.sampled_from(["be", "le"]),
    storage=st.sampled_from([8, 16, 32, 64]),
    data=st.data(),
)
def test_any_integer_at_any_position_is_decoded(value, junk, kind, order, storage, data):
    bits = data.draw(st.integers(1, storage))
    shift = data.draw(st.integers(0, storage - bits))
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if kind == "s" else (0, (1 << bits) - 1)
    value = low + value % (high - low + 1)
    mask = (1 << bits) - 1
    word = (junk & ~(mask << shift) | (value & mask) << shift) & ((1 << storage) - 1)
    content = word.to_bytes(storage // 8, "big" if order == "be" else "little")
    one = layout(f"{order}:{kind}{bits}/{storage}>>{shift}")
    scans = np.frombuffer(content * 2, np.uint8).reshape(2, -1)
    assert one.values(scans, one.elements[0]).tolist() == [value, value]


def test_floats_are_decoded():
    one = layout("be:f32/32", "le:f64/64")
    content = struct.pack(">f4x", 1.5) + struct.pack("<d", math.pi)
    scans = np.frombuffer(content, np.uint8).reshape(1, -1)
    assert [one.values(scans, element)[0] for element in one.elements] == [1.5, math.pi]


def test_a_device_is_set_up_and_read(tmp_path, stop):
    files = {"in_accel_scale": "0.5", "in_accel_x_offset": "-2", "in_accel_z_scale": "2", "sampling_frequency": "1"}
    tree = Tree(tmp_path, STAMPED, files | {"trigger/current_trigger": "", "buffer/watermark": 1})
    source = tree.source("lis2dh12", length=64, watermark=8, trigger="hr0", sampling_frequency=12.5)
    enabled = {name: tree[f"scan_elements/{name}_en"] for name in STAMPED}
    assert enabled == {"in_accel_x": "1", "in_accel_y": "0", "in_accel_z": "1", "in_timestamp": "1"}
    assert [tree[f"buffer/{name}"] for name in ("length", "watermark", "enable")] == ["64", "8", "0"]
    assert tree["trigger/current_trigger"] == "hr0"
    assert tree["sampling_frequency"] == "12.5"
    assert source.read(stop, 1) == Discontinuity("connected", True)
    assert tree["buffer/enable"] == "1"
    node = os.open(tree.node, os.O_WRONLY)
    samples = [(-3, 5, 1_500_000_000), (2047, -2048, 2_500_000_000)]
    content = b"".join(struct.pack("<hh4xq", x << 4 | 7, z << 4, t) for x, z, t in samples)
    frames = []
    for part in (content[:5], content[5:30], content[30:]):
        os.write(node, part)
        frames += source.decoder.feed(source.read(stop, 1).content)
    assert [(frame.values.tolist(), frame.time) for frame in frames] == [
        ([(-3 - 2) * 0.5, 10.0], 1.5),
        ([(2047 - 2) * 0.5, -4096.0], 2.5),
    ]
    os.close(node)
    assert source.read(stop, 1) == Discontinuity("lost: the device is gone", False)
    assert tree["buffer/enable"] == "0"
    assert source.read(stop, 1) == Discontinuity("connected", True)
    source.close()
    assert tree["buffer/enable"] == "0"


def test_a_device_that_vanishes_and_returns_is_reopened(tmp_path, stop):
    tree = Tree(tmp_path, ACCELEROMETER)
    source = tree.source("lis2dh12")
    source.read(stop, 1)
    node = os.open(tree.node, os.O_WRONLY)
    tree.device.rename(tmp_path / "away")
    os.close(node)
    assert not source.read(stop, 1).connected
    gone = source.read(stop, 1)
    assert "no such IIO device; available: none" in gone.reason
    (tmp_path / "away").rename(tree.sysfs / "iio:device3")  # under another number
    tree.node = tree.node.rename(tree.dev / "iio:device3")
    tree.device = tree.sysfs / "iio:device3"
    assert source.read(stop, 2) == Discontinuity("connected", True)
    node = os.open(tree.node, os.O_WRONLY)
    os.write(node, bytes(4))
    assert source.read(stop, 1) == Batch(bytes(4))
    os.close(node)
    source.close()
    (tree.device / "scan_elements" / "in_accel_x_type").write_text("be:s12/16>>4")
    source._backoff.reset()
    with pytest.raises(RunFailed, match="came back with other elements"):
        source.read(stop, 1)


def test_raw_values_and_elements_by_name(tmp_path):
    tree = Tree(tmp_path, {"in_voltage0": "be:u10/16", "in_voltage0-voltage1": "be:s8/8"}, {"in_voltage_scale": "3"})
    source = tree.source(channels=spec("a", "b"), elements=("in_voltage0-voltage1", "voltage0"), raw=True)
    (frame,) = source.decoder.feed(b"\x02\x01\xff\x00")
    assert frame.values.tolist() == [-1, 513]
    assert source._elements[0].scale == 3
    assert source._elements[1].scale == 1


def test_the_newer_names_of_buffers_are_found(tmp_path):
    tree = Tree(tmp_path, ACCELEROMETER)
    (tree.device / "buffer").rename(tree.device / "buffer0")
    for file in (tree.device / "scan_elements").iterdir():
        file.rename(tree.device / "buffer0" / file.name)
    (tree.device / "scan_elements").rmdir()
    source = tree.source(length=9)
    assert tree["buffer0/length"] == "9"
    assert source.decoder._layout.size == 4


@given(blocks=st.lists(st.binary(max_size=60), max_size=6))
def test_arbitrary_bytes_produce_frames_or_one_report(blocks):
    one = layout("le:s12/16>>4", "le:f32/32", "be:u64/64")
    reader = IioDecoder(spec("a", "b"), one, ("in_0", "in_1"))
    items = [item for block in blocks for item in reader.feed(block)] + list(reader.finish())
    assert len(items) == -(-sum(map(len, blocks)) // 16)
    assert all(not isinstance(item, Malformed) for item in items[:-1])


@pytest.mark.parametrize(
    ("device", "options", "problem"),
    [
        ("iio:device7", {}, r"no such IIO device; available: iio:device0 \(lis2dh12\)"),
        ("../../etc", {}, "no such IIO device"),
        ("iio:device0", {"channels": spec("gyro_x")}, "no element 'gyro_x'; the model's channels are gyro_x"),
        ("iio:device0", {"elements": ["accel_x"]}, "1 elements for 2 channels"),
        ("iio:device0", {"elements": ["accel_x"] * 2}, "1 elements for 2 channels"),
        ("iio:device0", {"watermark": 5000}, "watermark <= length"),
        ("iio:device0", {"trigger": "x"}, "current_trigger: x cannot be written"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, device, options, problem):
    with pytest.raises(UsageError, match=problem):
        Tree(tmp_path, ACCELEROMETER).source(device, **options)


@pytest.mark.parametrize(
    "text", ["", "le:s12/16>>5", "xx:s8/8", "le:s8/24", "le:s33/32", "le:s0/8", "le:f16/32", "le:s8"]
)
def test_invalid_types_are_refused(text):
    with pytest.raises(UsageError, match="expected"):
        parse_type("in_x", text)


def test_invalid_sysfs_files_are_refused(tmp_path):
    for file, value in {"in_accel_scale": "nan", "scan_elements/in_accel_x_index": "-1"}.items():
        folder = tmp_path / file.replace("/", "_")
        folder.mkdir()
        tree = Tree(folder, ACCELEROMETER)
        (tree.device / file).write_text(value)
        with pytest.raises(UsageError, match="expected a number"):
            tree.source()
