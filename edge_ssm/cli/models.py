"""``edge-ssm inspect`` and ``edge-ssm verify-signature``: commands about a model file."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edge_ssm.formats import description, loading, signatures
from edge_ssm.text import sanitize


@click.command("inspect")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def inspect(model: str, as_json: bool) -> None:
    """Show what MODEL contains: layers, channels, cost of a step, provenance."""
    document = description.describe_model(loading.load(model), signatures.find_signature(model))
    click.echo(json.dumps(document, indent=1) if as_json else description.render(document))


@click.command("verify-signature")
@click.argument("model")
@click.option(
    "--key",
    "keys",
    multiple=True,
    required=True,
    metavar="PUBLIC.pem",
    help="Public key to trust. May be repeated.",
)
def verify_signature(model: str, keys: tuple[str, ...]) -> None:
    """Check that MODEL.sig is the signature of MODEL by one of the keys. Exit status 2 if it is not."""
    loaded, key = signatures.load_with_key(model, [Path(key) for key in keys])
    click.echo(f"{sanitize(model)}: signed by key {key}, artifact digest {loaded.digest}")
