"""The codec ``ndjson``: one JSON value per line."""

from __future__ import annotations

import json
import math

import numpy as np

from edge_ssm.io.codecs.base import Codec
from edge_ssm.io.codecs.lines import SEQUENCE_COLUMN, LineDecoder, json_time, valid_sequence
from edge_ssm.io.messages import Frame, Malformed
from edge_ssm.text import encodable


class NdjsonDecoder(LineDecoder):
    """Decodes lines of JSON.

    A line is an array of the channels in order, or an object with a member per channel or with an array ``values``.
    ``null`` and an absent channel are missing values. An object may also have ``time``, ``label`` and ``seq``.
    """

    def _parse(self, text: str) -> Frame | Malformed | None:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            return self._malformed(f"not JSON ({' '.join(str(error).split())[:80]})")
        time = label = sequence = None
        if isinstance(document, dict):
            if not any(name in document for name in self.channels):
                document.setdefault("values", None)
                items = document["values"]
            else:
                items = [document.get(name) for name in self.channels]
            time, label, sequence = document.get("time"), document.get("label"), document.get(SEQUENCE_COLUMN)
        else:
            items = document
        if not isinstance(items, list) or len(items) != len(self.channels):
            return self._malformed(
                f"expected an array of {len(self.channels)} numbers or an object with {', '.join(self.channels)}"
            )
        values = np.empty(len(items))
        for i, item in enumerate(items):
            if item is None:
                values[i] = math.nan
            elif isinstance(item, (int, float)) and not isinstance(item, bool):
                try:
                    values[i] = item
                except OverflowError:
                    values[i] = math.inf
            else:
                return self._malformed(f"channel {self.channels[i]!r}: {str(item)[:40]!r} is not a number")
        return Frame(
            values,
            json_time(time),
            encodable(str(label)) if isinstance(label, (str, int, float)) else None,
            valid_sequence(sequence),
        )


CODEC = Codec("ndjson", lambda spec, scale: NdjsonDecoder(spec), (".ndjson", ".jsonl"), is_scaled=False)
