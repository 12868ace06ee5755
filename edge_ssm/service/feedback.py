"""A check that a run does not write what it reads.

Opening a file for decisions empties it, and decisions that a broker sends back as samples cause decisions without end.
"""

from __future__ import annotations

from contextlib import suppress

from edge_ssm.errors import UsageError
from edge_ssm.formats import signatures
from edge_ssm.io import address, mqtt
from edge_ssm.io.sinks import registry as sinks
from edge_ssm.io.sources import registry as sources
from edge_ssm.service.settings import Settings


def check(settings: Settings) -> None:
    """Raise UsageError if a run with these settings would write to one of its inputs."""
    models = [settings.model, *settings.member]
    signed = [str(signatures.signature_path(model)) for model in models]
    source = address.parse_endpoint(settings.input, sources.SCHEMES)
    secrets = [path for option, path in source.options.items() if option.endswith("_file")]
    address.check_not_an_input(
        settings.output, [*models, *signed, *settings.require_signature, settings.input, *secrets]
    )
    sink = address.parse_endpoint(settings.output, sinks.SCHEMES)
    if {source.scheme, sink.scheme} <= set(mqtt.PORTS):
        subscription = mqtt.parse_topic_address(source.text, wildcards=True)
        publication = mqtt.parse_topic_address(sink.text, wildcards=False)
        with suppress(ImportError):  # Whoever opens the source reports that paho-mqtt is missing.
            if mqtt.is_loop(subscription, publication):
                raise UsageError(
                    f"--output {sink.redacted}: the run reads it ({source.redacted}), and would take its own decisions "
                    "for samples; use another topic"
                )
