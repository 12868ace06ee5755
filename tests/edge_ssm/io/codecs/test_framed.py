"""The codec framed: byte for byte as docs/framing.md specifies; damage neither spreads nor passes for a sample."""

import ctypes
import re
import shutil
import subprocess
import zlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from edge_ssm.errors import UsageError
from edge_ssm.io.codecs.framed import MAX_PACKET, FramedDecoder, cobs_decode, cobs_encode, encode
from edge_ssm.io.codecs.registry import decoder, guess_format
from edge_ssm.io.messages import Frame, Malformed
from edge_ssm.model.network import InputSpec
from edge_ssm.runtime.reordering import LONGEST_LOSS

SPEC = InputSpec(("ax", "ay"), np.zeros(2), np.ones(2))
PAGE = ROOT / "docs" / "framing.md"


def decode(*blocks, reader=None):
    reader = reader or decoder("framed", SPEC)
    return [item for block in blocks for item in reader.feed(block)] + list(reader.finish())


def plain(items):
    return [
        (item.values.tolist(), item.time, item.sequence) if isinstance(item, Frame) else (item.where, item.problem)
        for item in items
    ]


def numbers(items):
    return [item.sequence for item in items if isinstance(item, Frame)]


def problems(items):
    return [item.problem.split(":")[0] for item in items if isinstance(item, Malformed)]


def test_the_example_in_the_documentation_is_correct():
    blocks = re.findall(r"```hex\n(.*?)```", PAGE.read_text(), re.S)
    before, after = (bytes.fromhex("".join(line.split("#")[0] for line in b.splitlines(True))) for b in blocks)
    values = [[1.0, -2.5], [0.0, 3.0]]
    assert encode(values, 258, boot=7, time_us=1_700_000_000_000_000, period_ns=10_000_000) == after
    assert cobs_encode(before) == after[1:-1]
    first, second = decode(after)
    assert (first.values.tolist(), first.time) == ([1.0, -2.5], 1.7e9)
    assert (second.values.tolist(), second.time) == ([0.0, 3.0], 1.7e9 + 0.01)
    assert [n & (1 << 44) - 1 for n in (first.sequence, second.sequence)] == [258, 259]


def test_the_c_code_in_the_documentation_produces_the_same_bytes(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) here")
    (code,) = re.findall(r"```c\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "frame.c").write_text(code)
    subprocess.run(
        [compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-o", "frame.so", "frame.c"], cwd=tmp_path, check=True
    )
    send_frame = ctypes.CDLL(str(tmp_path / "frame.so")).frame_encode
    rng = np.random.default_rng(0)
    for samples in (1, 2, 31, 32, 200):
        values = np.where(rng.random((samples, 2)) < 0.3, 0, rng.normal(size=(samples, 2))).astype("<f4")
        out = ctypes.create_string_buffer(4096)
        size = send_frame(
            out, values.ctypes.data_as(ctypes.c_void_p), 2, samples, ctypes.c_uint16(9), ctypes.c_uint32(70000)
        )
        assert out.raw[:size] == encode(values, 70000, boot=9)


contents = st.lists(
    st.one_of(st.just(b"\0"), st.binary(max_size=4), st.sampled_from([b"x" * n for n in (253, 254, 255, 508)])),
    max_size=8,
).map(b"".join)


@given(contents)
def test_cobs_leaves_no_zero_and_is_reversible(content):
    packet = cobs_encode(content)
    assert b"\0" not in packet
    assert len(packet) <= len(content) + len(content) // 254 + 1
    assert cobs_decode(packet) == content


@st.composite
def frames(draw):
    """Generate frames of a stream, each with the samples that the decoder should yield."""
    out, number = [], draw(st.integers(0, 2**32 - 1))
    for _ in range(draw(st.integers(1, 6))):
        samples = draw(st.integers(1, 5))
        int16 = draw(st.booleans())
        time = draw(st.none() | st.integers(0, 2**53))
        element = st.integers(-32768, 32767) if int16 else st.floats(width=32, allow_nan=False)
        rows = draw(st.lists(st.tuples(element, element), min_size=samples, max_size=samples))
        period = draw(st.integers(1, 2**32 - 1))
        content = encode(rows, number, 3, time, period, int16)
        expected = [
            ([float(v) for v in row], None if time is None else time / 1e6 + k * (period / 1e9), 3 << 44 | number + k)
            for k, row in enumerate(rows)
        ]
        out.append((content, expected))
        number += samples
    return out


@given(stream=frames(), cuts=st.lists(st.integers(0, 2000), max_size=8))
def test_round_trip_however_the_bytes_arrive(stream, cuts):
    content = b"".join(c for c, _ in stream)
    edges = [0, *sorted(min(c, len(content)) for c in cuts), len(content)]
    items = decode(*(content[a:b] for a, b in pairwise(edges)))
    assert plain(items) == [sample for _, samples in stream for sample in samples]


@given(stream=frames(), garbage=st.lists(st.binary(max_size=40), min_size=7, max_size=7))
def test_garbage_between_frames_costs_no_frame(stream, garbage):
    content = garbage[0] + b"".join(c + junk for (c, _), junk in zip(stream, garbage[1:], strict=False))
    items = [item for item in decode(content) if isinstance(item, Frame)]
    assert plain(items) == [sample for _, samples in stream for sample in samples]


@given(stream=frames(), data=st.data())
def test_damage_costs_the_frames_it_touches_and_produces_no_wrong_ones(stream, data):
    content = bytearray(b"".join(c for c, _ in stream))
    hit = data.draw(st.integers(0, len(content) - 1))
    length = data.draw(st.integers(1, 4))
    action = data.draw(st.sampled_from(["flip", "drop", "insert"]))
    if action == "flip":
        for bit in data.draw(st.lists(st.integers(0, 8 * length - 1), min_size=1, max_size=3, unique=True)):
            if hit + bit // 8 < len(content):
                content[hit + bit // 8] ^= 1 << bit % 8
    elif action == "drop":
        del content[hit : hit + length]
    else:
        content[hit:hit] = data.draw(st.binary(min_size=length, max_size=length))
    kept, at = [], 0
    for encoded, samples in stream:
        end = at + len(encoded)
        if end <= hit or (at >= hit + length and action != "insert") or (at >= hit and action == "insert"):
            kept += samples
        at = end
    # A receiver that lost everything before cannot know whether a number has wrapped.
    found = [
        (values, time, number % (1 << 32))
        for values, time, number in plain(item for item in decode(bytes(content)) if isinstance(item, Frame))
    ]
    everything = [(values, time, number % (1 << 32)) for _, rows in stream for values, time, number in rows]
    kept = [(values, time, number % (1 << 32)) for values, time, number in kept]
    assert all(sample in everything for sample in found)
    assert all(sample in found for sample in kept)


@given(blocks=st.lists(st.binary(max_size=200), max_size=6))
def test_arbitrary_bytes_produce_only_reports(blocks):
    assert all(isinstance(item, Malformed) for item in decode(*blocks))


def test_every_single_flipped_bit_is_detected():
    content = encode([[1.5, 2.5]], 5, time_us=0)
    for bit in range(8, 8 * len(content) - 8):
        bad = bytearray(content)
        bad[bit // 8] ^= 1 << bit % 8
        assert not numbers(decode(bytes(bad)))


def reframed(**fields):
    """Return a frame with another header and a correct checksum."""
    body = bytearray(cobs_decode(encode([[1, 2]], 0)[1:-1])[:-4])
    for place, value in fields.items():
        body[int(place[1:])] = value
    return b"\0" + cobs_encode(bytes(body) + zlib.crc32(body).to_bytes(4, "little")) + b"\0"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\0abc\0", "length: cut short"),
        (b"\0\x02a\0", "length: 1 bytes, a frame has at least 16"),
        (b"\0" + cobs_encode(bytes(20)) + b"\0", "checksum: does not match"),
        (reframed(_0=2), "version: 2, expected 1"),
        (reframed(_1=4), "flags: 0x4, expected none but"),
        (reframed(_2=3), "channel count: 3, expected 2 (ax, ay)"),
        (reframed(_4=0), "length: 24 bytes, 0 samples make 16"),
        (reframed(_4=9), "length: 24 bytes, 9 samples make 88"),
        (reframed(_1=1), "length: 24 bytes, 1 samples make 36"),
    ],
)
def test_a_report_names_the_problem_and_its_byte(content, problem):
    items = decode(b"\0" + content + encode([1, 2], 0))
    assert [type(item) for item in items] == [Malformed, Frame]
    assert items[0].where == "byte 2"
    assert items[0].problem.startswith(problem)


def test_a_line_without_zero_bytes_takes_bounded_memory_and_costs_one_report():
    reader = decoder("framed", SPEC)
    items = []
    for _ in range(50):
        items += reader.feed(b"\x07" * MAX_PACKET)
        assert len(reader._tail) <= MAX_PACKET
    items += [*reader.feed(b"\0\0" + encode([1, 2], 0) + b"x"), *reader.finish()]
    assert [type(item) for item in items] == [Malformed, Frame, Malformed]
    assert items[2].where == f"byte {50 * MAX_PACKET + 2 + len(encode([1, 2], 0))}"


def test_a_datagram_may_lack_its_last_delimiter():
    assert numbers(decode(encode([1, 2], 5)[1:-1])) == [5]


def test_int16_takes_a_scale_and_float32_does_not():
    reader = decoder("framed", SPEC, (0.5, 2))
    items = decode(encode([1, 2], 0, int16=True), encode([1, 2], 1), reader=reader)
    assert [item.values.tolist() for item in items] == [[0.5, 4], [1, 2]]
    with pytest.raises(UsageError, match="scale"):
        decoder("framed", SPEC, (0.0,))


def test_without_a_period_only_the_first_sample_has_a_time():
    assert [item.time for item in decode(encode([[1, 2], [3, 4]], 0, time_us=2_000_000))] == [2.0, None]


def test_numbers_continue_where_those_of_the_device_wrap():
    start = 2**32 - 3
    items = decode(*(encode([[0, 0]] * 2, start + 2 * k) for k in range(4)))
    assert numbers(items) == list(range(start, start + 8))
    resumed = FramedDecoder(SPEC)
    resumed.resume({"newest": str(3 * 2**32 - 1)})
    assert numbers(decode(encode([0, 0], 0), reader=resumed)) == [3 * 2**32]


def test_repeats_keep_their_numbers():
    sent = [encode([[0, 0]] * 2, n, boot=1) for n in (10, 12, 10, 12, 14)]
    assert [n - (1 << 44) for n in numbers(decode(*sent))] == [10, 11, 12, 13, 10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize("boots", [(1, 2, 3), (9, 4, 4000), (5, 65535, 0)])
def test_a_restart_of_the_device_is_detected_and_numbers_still_grow(boots):
    found = numbers(decode(*(encode([[0, 0]] * 2, 100, boot=boot) for boot in boots)))
    assert found == sorted(set(found))
    assert [b - a > LONGEST_LOSS for a, b in pairwise(found)] == [False, True, False, True, False]


def test_a_large_step_back_without_boot_numbers_is_a_restart():
    found = numbers(decode(encode([0, 0], 1 << 21), encode([0, 0], 0), encode([0, 0], 1)))
    assert found[1] - found[0] > LONGEST_LOSS
    assert found[1] == found[2] - 1


def test_values_that_do_not_fit_are_not_encoded():
    for values, options in [
        ([1.5, 0], {"int16": True}),
        ([40000, 0], {"int16": True}),
        ([np.nan, 0], {"int16": True}),
        (np.zeros((0, 2)), {}),
        (np.zeros((9000, 2)), {}),
        ([0, 0], {"boot": 1 << 16}),
        ([0, 0], {"time_us": -1}),
        ([0, 0], {"time_us": 0, "period_ns": 1 << 32}),
    ]:
        with pytest.raises(UsageError, match="framed: "):
            encode(values, 0, **options)


def test_the_format_is_recognised_by_name():
    assert guess_format("log.framed") == "framed"
    assert isinstance(decoder("framed", SPEC), FramedDecoder)


def test_text_formats_carry_numbers_too():
    rows = [b'{"ax":1,"ay":2,"seq":%s}\n' % n for n in (b"7", b"true", b"1.0", b"-1", b"9223372036854775808", b'"7"')]
    items = list(decoder("ndjson", SPEC).feed(b"".join(rows)))
    assert numbers(items) == [7, None, None, None, None, None]
    fields = (b"7", b" 8 ", b"", b"1.0", b"-1", b"1_0", b"9223372036854775808", b"9" * 5000, b"9223372036854775807")
    items = list(decoder("csv", SPEC).feed(b"seq,ax,ay\n" + b"".join(n + b",1,2\n" for n in fields)))
    assert numbers(items) == [7, 8, None, None, None, None, None, None, 2**63 - 1]
