"""Commands for signatures: keygen, sign."""

from __future__ import annotations

from pathlib import Path

import click

from edge_ssm.formats import signatures
from edge_ssm_build.cli.options import make_folder


@click.command()
@click.option(
    "--output", required=True, metavar="DIR/NAME", help="Keys to write: NAME.pem, private, and NAME.pub.pem, public."
)
def keygen(output: str) -> None:
    """Make an Ed25519 key pair for signing models.

    The private key is not encrypted: store it where nobody else can read it, and not on a device.
    """
    signatures.require_cryptography()
    from edge_ssm_build.export import signing

    make_folder(str(Path(output).parent))
    private, public, key = signing.keygen(Path(output))
    click.echo(f"{private}: signs models; keep it secret, off the devices")
    click.echo(f"{public}: goes on the devices; key {key}")


@click.command()
@click.argument("model")
@click.option(
    "--key",
    "keys",
    multiple=True,
    required=True,
    metavar="PRIVATE.pem",
    help="Private key to sign with. Can be repeated; each key adds one signature.",
)
def sign(model: str, keys: tuple[str, ...]) -> None:
    """Sign MODEL, an artifact or an exported file: write MODEL.sig next to it (docs/signing.md)."""
    signatures.require_cryptography()
    from edge_ssm_build.export import signing

    path, ids = signing.sign(Path(model), [Path(key) for key in keys])
    click.echo(f"{path}: signed by key {', '.join(ids)}")
