"""Codecs: the same frames however the bytes arrive, and no input does harm."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_ssm.errors import FrameError, UsageError
from edge_ssm.io.codecs.lines import MAX_LINE
from edge_ssm.io.codecs.registry import FORMATS, decoder, guess_format
from edge_ssm.io.messages import Frame, Malformed
from edge_ssm.model.network import InputSpec

SPEC = InputSpec(("ax", "ay"), np.zeros(2), np.ones(2))


def decode(codec, *blocks, spec=SPEC, **options):
    reader = decoder(codec, spec, **options)
    items = [item for block in blocks for item in reader.feed(block)]
    return items + list(reader.finish())


def plain(items):
    """Return items as comparable values, with None for NaN."""
    return [
        ([None if math.isnan(v) else v for v in item.values], item.time, item.label)
        if isinstance(item, Frame)
        else (item.where, item.problem)
        for item in items
    ]


def test_csv_with_a_header_takes_columns_by_name():
    text = b"time,ay,label,junk,ax\n0.5,2,walk,x,1\nnoon,4,,y,3\n"
    assert plain(decode("csv", text)) == [([1, 2], 0.5, "walk"), ([3, 4], "noon", None)]


def test_csv_without_a_header_takes_columns_in_order():
    assert plain(decode("csv", b"1,2\n 3 ,4e-1")) == [([1, 2], None, None), ([3, 0.4], None, None)]


def test_csv_dialects():
    text = '\ufeff"ax","ay","label"\r\n1,2,"a, b"\r\n\r\n3,4,c\r\n'.encode()
    assert plain(decode("csv", text)) == [([1, 2], None, "a, b"), ([3, 4], None, "c")]


@pytest.mark.parametrize("field", ["", "nan", "NaN", "NA", "null", " "])
def test_a_missing_value_is_nan(field):
    assert plain(decode("csv", f"ax,ay\n1,{field}\n".encode())) == [([1, None], None, None)]


def test_malformed_rows_are_reported_with_their_line_and_decoding_continues():
    text = b"ax,ay\n1,2\nfoo,2\n1\n1,2,3\n1_0,2\n\xff\xfe,1\n3,4\n"
    items = decode("csv", text)
    assert [i.where for i in items if isinstance(i, Malformed)] == [f"line {n}" for n in (3, 4, 5, 6, 7)]
    assert plain(items)[0] == ([1, 2], None, None)
    assert plain(items)[-1] == ([3, 4], None, None)
    assert "channel 'ax': 'foo' is not a number" in items[1].problem


def test_infinite_and_huge_numbers_are_frames_for_the_gap_policy_to_handle():
    items = decode("csv", b"ax,ay\ninf,1e400\n-inf,1\n")
    assert [list(i.values) for i in items] == [[math.inf, math.inf], [-math.inf, 1]]


@pytest.mark.parametrize(
    ("header", "problem"),
    [("ax,b", "no column for channel 'ay'"), ("ax,ay,ay", "more than one column for channel 'ay'")],
)
def test_a_header_without_a_channel_is_refused(header, problem):
    with pytest.raises(FrameError, match=f"line 1: {problem}; expected a header with ax, ay"):
        decode("csv", f"{header}\n1,2,3\n".encode())


def test_a_trailing_comma_is_a_column_without_a_name():
    assert plain(decode("csv", b"ax,ay,\n1,2,\n")) == [([1, 2], None, None)]


def test_a_device_greeting_is_not_a_header():
    items = decode("csv", b"SensorTag ready\n1,2\nax\n")
    assert [type(i) for i in items] == [Malformed, Frame, Malformed]
    with pytest.raises(FrameError, match="no column for channel 'ax'"):
        decode("csv", b"ax;ay\n1;2\n")


@pytest.mark.parametrize("codec", ["csv", "ndjson"])
def test_an_endless_line_takes_bounded_memory_and_costs_one_report(codec):
    reader = decoder(codec, SPEC)
    good = b"1,2\n" if codec == "csv" else b"[1,2]\n"
    items = list(reader.feed(good))
    for _ in range(50):
        items += reader.feed(b"7" * MAX_LINE)
        assert len(reader._tail) <= 2 * MAX_LINE
    items += [*reader.feed(b"\n" + good), *reader.finish()]
    assert [type(i) for i in items] == [Frame, Malformed, Frame]
    assert "longer than" in items[1].problem
    assert items[1].where == "line 2"


def test_ndjson_forms():
    lines = [
        '{"ax": 1, "ay": 2, "time": 3.5, "label": "walk", "other": {}}',
        '{"ax": 1}',
        "[1, null]",
        '{"values": [5, 6], "time": "noon"}',
        '{"ax": 1, "ay": 1, "time": 1e999}',
        "[NaN, 1e999]",
        "[1" + "0" * 400 + ", 2]",
    ]
    items = decode("ndjson", "\n".join(lines).encode())
    assert plain(items) == [
        ([1, 2], 3.5, "walk"),
        ([1, None], None, None),
        ([1, None], None, None),
        ([5, 6], "noon", None),
        ([1, 1], None, None),
        ([None, math.inf], None, None),
        ([math.inf, 2], None, None),
    ]


def test_ndjson_text_and_times_that_no_sink_can_write_are_replaced():
    """A lone surrogate is not UTF-8, and a number of more than 64 bits fits no field: found by fuzzing."""
    lines = [
        r'{"ax": 1, "ay": 2, "time": "\ud83d", "label": "a\ud83d"}',
        r'{"ax": 1, "ay": 2, "time": "\ud83d\ude00", "label": "\ud83d\ude00"}',
        '{"ax": 1, "ay": 2, "time": 18446744073709551616, "label": 18446744073709551616}',
        '{"ax": 1, "ay": 2, "time": -9223372036854775808}',
        '{"ax": 1, "ay": 2, "time": 1' + "0" * 400 + "}",
    ]
    assert plain(decode("ndjson", "\n".join(lines).encode())) == [
        ([1, 2], "?", "a?"),
        ([1, 2], "\U0001f600", "\U0001f600"),
        ([1, 2], 2.0**64, "18446744073709551616"),
        ([1, 2], -(2**63), None),
        ([1, 2], None, None),
    ]


@pytest.mark.parametrize(
    "line", ["{}", "[1]", "[1,2,3]", "3", '"x"', "[true, 1]", '["1", 2]', "[[1], 2]", "{", "[" * 30000, '{"values": 3}']
)
def test_ndjson_that_is_not_a_frame_is_malformed(line):
    (item,) = decode("ndjson", line.encode())
    assert isinstance(item, Malformed)
    assert item.where == "line 1"


def test_binary_frames():
    values = np.arange(6, dtype="<f4").reshape(3, 2) - 2
    assert [list(f.values) for f in decode("f32le", values.tobytes())] == values.tolist()
    raw = (values * 100).astype("<i2")
    assert np.allclose([f.values for f in decode("i16le", raw.tobytes(), scale=(0.01, 0.02))], values * [1, 2])
    *_, last = decode("i16le", raw.tobytes() + b"abc")
    assert last == Malformed("byte 12", "3 bytes at the end, a frame has 4")
    with pytest.raises(UsageError, match="scale"):
        decoder("i16le", SPEC, (1.0, 2.0, 3.0))
    with pytest.raises(UsageError, match="scale"):
        decoder("i16le", SPEC, (0.0,))


@given(data=st.data())
@pytest.mark.parametrize("codec", FORMATS)
def test_frames_do_not_depend_on_how_the_bytes_arrive(codec, data):
    rows = data.draw(st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32)), max_size=20))
    if codec == "csv":
        content = b"ax,ay\n" + b"".join(f"{a},{b}\r\n".encode() for a, b in rows) + b"x\n"
    elif codec == "ndjson":
        content = b"".join(json.dumps(row).encode() + b"\n" for row in rows) + b"x"
    else:
        content = np.array(rows, dtype="<f4").tobytes() + b"x"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=8)))
    parts = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    assert plain(decode(codec, *parts)) == plain(decode(codec, content))


@given(content=st.binary(max_size=400), cut=st.integers(0, 400))
@pytest.mark.parametrize("codec", FORMATS)
def test_any_bytes_give_frames_or_reports(codec, content, cut):
    try:
        items = decode(codec, content[:cut], content[cut:])
    except FrameError as error:
        assert "\n" not in str(error)
        return
    for item in items:
        assert isinstance(item, (Frame, Malformed))
        if isinstance(item, Frame):
            assert item.values.shape == (2,)
        else:
            assert "\n" not in item.problem


def test_the_format_is_guessed_from_the_file_name():
    assert [guess_format(p) for p in ("-", "a.csv", "b/c.NDJSON", "d.jsonl", "e.f32", "x.y/z")] == [
        "csv",
        "csv",
        "ndjson",
        "ndjson",
        "f32le",
        "csv",
    ]
