"""Signed models: only what a trusted key has signed is loaded, and every refusal states its reason."""

import base64
import json
import os
import re
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey
from support import ROOT, commands
from support.networks import random_network

from edge_ssm.errors import ArtifactError, InputRefused, SignatureRefused, UsageError
from edge_ssm.formats import artifact, signatures
from edge_ssm.model.network import fingerprint
from edge_ssm_build.export import signing


class Signed:
    """A folder with two key pairs and a model that the first one signed."""

    def __init__(self, folder):
        self.folder = folder
        self.private, self.public, self.id = signing.keygen(folder / "a")
        self.other_private, self.other, self.other_id = signing.keygen(folder / "b")
        self.model = folder / "m.safetensors"
        self.digest = artifact.save(self.model, random_network(), {"seed": 1})
        self.sig, _ = signing.sign(self.model, [self.private])
        self.envelope = json.loads(self.sig.read_bytes())

    def refused(self, *keys):
        """The message for this model and these keys: one line."""
        with pytest.raises(SignatureRefused) as caught:
            signatures.load(self.model, list(keys) or [self.public])
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < 1000
        return message

    def sign_payload(self, payload):
        key = signing.load_private_key(self.private)
        self.sig.write_bytes(signing.envelope(payload, [key]))


@pytest.fixture
def signed(tmp_path):
    return Signed(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """As ``signed``, for tests that restore what they change."""
    return Signed(tmp_path_factory.mktemp("signed"))


def test_a_model_signed_by_a_trusted_key_is_loaded(signed):
    loaded = signatures.load(signed.model, [signed.other, signed.public])
    assert fingerprint(loaded.network) == fingerprint(random_network())
    assert signatures.verify(signed.model, loaded.digest, [signed.public]) == signed.id
    assert issubclass(SignatureRefused, InputRefused)
    assert SignatureRefused.exit_status == 2


def test_a_signature_is_reproducible_and_valid_for_a_renamed_model(signed):
    before = signed.sig.read_bytes()
    assert signing.sign(signed.model, [signed.private])[0].read_bytes() == before
    moved = signed.folder / "renamed.safetensors"
    signed.model.rename(moved)
    signed.sig.rename(signatures.signature_path(moved))
    assert signatures.load(moved, [signed.public]).digest == signed.digest


def test_one_of_several_signatures_is_enough(signed):
    signing.sign(signed.model, [signed.other_private, signed.private])
    assert signatures.verify(signed.model, signed.digest, [signed.public]) == signed.id
    assert signatures.verify(signed.model, signed.digest, [signed.other]) == signed.other_id


def test_the_statement_is_as_specified(signed):
    statement = json.loads(base64.b64decode(signed.envelope["payload"]))
    assert statement == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "m.safetensors", "digest": {"sha256": signatures.file_digest(signed.model)}}],
        "predicateType": "https://edge_ssm/signature/v1",
        "predicate": {"artifact_digest": signed.digest},
    }
    assert signed.envelope["payloadType"] == "application/vnd.in-toto+json"
    (signature,) = signed.envelope["signatures"]
    assert signature["keyid"] == signed.id


def test_another_library_verifies_the_envelope(signed):
    """securesystemslib, the DSSE implementation of in-toto and TUF."""
    public = signing.load_private_key(signed.private).public_key()
    stranger = signing.load_private_key(signed.other_private).public_key()
    envelope = Envelope.from_dict(signed.envelope)
    assert envelope.verify([SSlibKey.from_crypto(public, signed.id)], 1)
    with pytest.raises(Exception, match="threshold"):
        envelope.verify([SSlibKey.from_crypto(stranger, signed.id)], 1)


def test_the_reader_in_the_documentation_runs(signed):
    page = (ROOT / "docs" / "signing.md").read_text()
    namespace = {}
    exec(re.search(r"```python\n(.*?)```", page, re.S).group(1), namespace)
    assert namespace["check"](signed.model, signed.public)["predicate"]["artifact_digest"] == signed.digest
    with pytest.raises(ValueError, match="key"):
        namespace["check"](signed.model, signed.other)
    content = bytearray(signed.model.read_bytes())
    content[-1] ^= 1
    signed.model.write_bytes(content)
    with pytest.raises(ValueError, match="another"):
        namespace["check"](signed.model, signed.public)


def test_a_missing_signature_is_refused(signed):
    signed.sig.unlink()
    assert signed.refused().startswith(
        f"{signed.sig}: cannot be read (No such file or directory); expected the signature of {signed.model}"
    )


def test_a_missing_model_is_refused(signed):
    signed.model.unlink()
    assert (
        signed.refused()
        == f"{signed.model}: cannot be read (No such file or directory); expected a .safetensors artifact"
    )


def test_no_key_at_all_is_refused(signed):
    with pytest.raises(SignatureRefused, match="no key given"):
        signatures.load(signed.model, [])


def test_a_signature_by_an_untrusted_key_is_refused(signed):
    message = signed.refused(signed.other)
    assert message.startswith(f"{signed.sig}: signed by '{signed.id[:16]}...', expected one of {signed.other_id[:16]}")


def test_a_signature_without_a_key_id_is_tried_with_every_key(signed):
    del signed.envelope["signatures"][0]["keyid"]
    signed.sig.write_text(json.dumps(signed.envelope))
    assert signatures.verify(signed.model, signed.digest, [signed.other, signed.public]) == signed.id
    assert "signed by 'a key without an id'" in signed.refused(signed.other)


def test_a_borrowed_key_id_does_not_help(signed):
    signing.sign(signed.model, [signed.other_private])
    envelope = json.loads(signed.sig.read_bytes())
    envelope["signatures"][0]["keyid"] = signed.id
    signed.sig.write_text(json.dumps(envelope))
    assert "the signature is not valid for the key that it names" in signed.refused()


def test_the_signature_of_another_model_is_refused(signed):
    network = random_network(seed=2)
    artifact.save(signed.model, network, {})
    assert "m.safetensors' with SHA-256" in signed.refused()


def test_a_file_in_which_only_white_space_changed_is_refused(signed):
    """The artifact's digest is the same, the file is not: it is not what was signed."""
    content = signed.model.read_bytes()
    padded = int.from_bytes(content[:8], "little")
    signed.model.write_bytes(
        (padded + 8).to_bytes(8, "little") + content[8 : 8 + padded] + b" " * 8 + content[8 + padded :]
    )
    assert artifact.load(signed.model).digest == signed.digest
    assert "with SHA-256" in signed.refused()


def test_the_digest_of_the_loaded_model_decides(signed):
    """As if the file had been exchanged between a look at it and its loading."""
    other = artifact.save(signed.folder / "other.safetensors", random_network(seed=2), {})
    with pytest.raises(SignatureRefused, match=r"signs artifact digest .* the loaded model has"):
        signatures.verify(signed.model, other, [signed.public])


def test_a_file_that_changes_after_loading_changes_nothing_in_memory(signed):
    loaded = signatures.load(signed.model, [signed.public])
    before = fingerprint(loaded.network)
    with open(signed.model, "r+b") as file:
        file.write(b"\xff" * signed.model.stat().st_size)
    assert fingerprint(loaded.network) == before


def test_unsigned_bytes_are_not_parsed(signed):
    signed.model.write_bytes(b"\xff" * 100)
    with pytest.raises(ArtifactError):
        artifact.load(signed.model)
    assert "with SHA-256" in signed.refused()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "statement: "),
        (b"{}", "statement: Object missing required field `_type`"),
        (b"[" * 40000, "statement: "),
        (b"\xff", "statement: "),
    ],
)
def test_a_signed_payload_that_is_no_statement_is_refused(signed, payload, message):
    signed.sign_payload(payload)
    assert message in signed.refused()
    assert "the key signed something other than a model" in signed.refused()


@pytest.mark.parametrize(
    "change",
    [
        {"_type": "https://in-toto.io/Statement/v0.1"},
        {"predicateType": "https://model_signing/signature/v1.0"},
        {"subject": []},
        {"subject": [{"name": "m", "digest": {"sha256": "0" * 64}}] * 2},
        {"subject": [{"name": "m", "digest": {"sha512": "0" * 64}}]},
        {"predicate": {"artifact_digest": "0"}},
        {"predicate": {"artifact_digest": "A" * 64}},
        {"predicate": {}},
    ],
)
def test_a_statement_of_another_kind_is_refused(signed, change):
    statement = json.loads(base64.b64decode(signed.envelope["payload"])) | change
    signed.sign_payload(json.dumps(statement).encode())
    assert "statement: " in signed.refused()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Input data was truncated"),
        (b"\xff\xfe", "m.safetensors.sig: "),
        (b"[]", "Expected `object`"),
        (b"{}", "missing required field `payload`"),
        (b"[" * 60000, "m.safetensors.sig: "),
        (b'{"x":' + b"[" * 60000, "m.safetensors.sig: "),
        (b" " * 65537, "larger than 65536 bytes"),
        (b'{"payload":"","payloadType":"application/vnd.in-toto+json","signatures":[]}', "signatures"),
        (b'{"payload":"","payloadType":"text/plain","signatures":[{"sig":""}]}', "payloadType 'text/plain'"),
        (
            b'{"payload":"*","payloadType":"application/vnd.in-toto+json","signatures":[{"sig":""}]}',
            "payload: not base64",
        ),
        (
            b'{"payload":"","payloadType":"application/vnd.in-toto+json","signatures":[{"sig":"a"}]}',
            "[0].sig: not base64",
        ),
        (
            b'{"payload":"","payloadType":"application/vnd.in-toto+json","signatures":[{"sig":"\xc3\xa9"}]}',
            "not base64",
        ),
    ],
)
def test_a_damaged_or_hostile_signature_file_is_refused(signed, content, message):
    signed.sig.write_bytes(content)
    assert message in signed.refused()


def test_too_many_signatures_are_refused_before_any_is_tried(signed):
    signed.envelope["signatures"] *= signatures.MAX_SIGNATURES + 1
    signed.sig.write_text(json.dumps(signed.envelope))
    assert "length <= 16" in signed.refused()
    with pytest.raises(UsageError, match="expected 1 to 16"):
        signing.sign(signed.model, [signed.private] * 17)


def test_base64_of_either_alphabet_is_read(signed):
    for value in ("payload", "sig"):
        part = signed.envelope if value == "payload" else signed.envelope["signatures"][0]
        part[value] = part[value].replace("+", "-").replace("/", "_")
    signed.sig.write_text(json.dumps(signed.envelope | {"extra": [1, {}]}))
    assert signatures.verify(signed.model, signed.digest, [signed.public]) == signed.id


def test_anything_but_a_regular_file_is_refused_at_once(signed):
    signed.sig.unlink()
    os.mkfifo(signed.sig)
    assert signed.refused().startswith(f"{signed.sig}: not a regular file")
    assert signed.refused(Path("/dev/zero")).startswith("/dev/zero: not a regular file")
    assert signed.refused(signed.folder).startswith(f"{signed.folder}: cannot be read (Is a directory)") or (
        "not a regular file" in signed.refused(signed.folder)
    )


def test_a_file_without_a_public_key_is_refused(signed):
    key = signed.folder / "key"
    assert signed.refused(key).startswith(
        f"{key}: cannot be read (No such file or directory); expected an Ed25519 public key in PEM"
    )
    for content in (b"", b"\xff" * 100, b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):
        key.write_bytes(content)
        assert signed.refused(key).startswith(f"{key}: not a public key in PEM; expected an Ed25519 public key")
    key.write_bytes(b"x" * 70000)
    assert "larger than 65536 bytes" in signed.refused(key)
    rsa = generate_private_key(65537, 2048)
    key.write_bytes(rsa.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert f"{key}: a key of another kind (RSAPublicKey)" in signed.refused(key)
    assert "contains a private key, which must not be on a device" in signed.refused(signed.private)
    # One key that cannot be read spoils all: a typing error must not leave fewer keys than were meant.
    assert signed.refused(signed.public, signed.folder / "typo").startswith(f"{signed.folder / 'typo'}: cannot be read")


def test_a_file_without_a_private_key_is_refused(signed):
    key = signed.folder / "key"
    private = Ed25519PrivateKey.generate()
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))
    with pytest.raises(SignatureRefused, match=f"{key}: the key is encrypted"):
        signing.sign(signed.model, [key])
    with pytest.raises(SignatureRefused, match="no private key in PEM"):
        signing.sign(signed.model, [signed.public])
    rsa = generate_private_key(65537, 2048)
    key.write_bytes(rsa.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(SignatureRefused, match=r"another kind \(RSAPrivateKey\)"):
        signing.sign(signed.model, [key])


def test_a_model_that_a_device_would_refuse_is_not_signed(signed):
    signed.sig.unlink()
    signed.model.write_bytes(signed.model.read_bytes()[:-1])
    with pytest.raises(ArtifactError):
        signing.sign(signed.model, [signed.private])
    assert not signed.sig.exists()


def test_a_signature_overwrites_neither_key_nor_model(signed):
    signed.sig.unlink()
    key = signed.private.rename(signed.sig)
    before = key.read_bytes()
    with pytest.raises(InputRefused, match=r"m\.safetensors\.sig: is --key .*m\.safetensors\.sig too, which would be"):
        signing.sign(signed.model, [key])
    assert key.read_bytes() == before
    signed.sig.unlink()
    signed.sig.symlink_to(signed.model)
    with pytest.raises(InputRefused, match=r"m\.safetensors\.sig: is MODEL too, which would be lost"):
        signing.sign(signed.model, [signed.other_private])


def test_keys_are_private_and_never_replaced(tmp_path):
    old = os.umask(0)
    try:
        private, public, _ = signing.keygen(tmp_path / "k")
    finally:
        os.umask(old)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert stat.S_IMODE(public.stat().st_mode) == 0o644
    assert private.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    before = private.read_bytes()
    with pytest.raises(UsageError, match="already exists"):
        signing.keygen(tmp_path / "k")
    public.unlink()
    with pytest.raises(UsageError, match="already exists"):
        signing.keygen(tmp_path / "k")
    assert private.read_bytes() == before
    assert not public.exists()


def flipped(content, place, flip):
    changed = bytearray(content)
    changed[int(place * len(content))] ^= flip
    return bytes(changed)


PLACES = {"place": st.floats(0, 1, exclude_max=True), "flip": st.integers(1, 255)}


@given(**PLACES)
def test_a_changed_byte_of_the_model_is_refused(shared, place, flip):
    content = shared.model.read_bytes()
    try:
        shared.model.write_bytes(flipped(content, place, flip))
        shared.refused()
    finally:
        shared.model.write_bytes(content)


@given(**PLACES)
def test_a_changed_byte_of_the_key_is_refused_or_means_the_same(shared, place, flip):
    content = shared.public.read_bytes()
    key = shared.folder / "flipped.pem"
    key.write_bytes(flipped(content, place, flip))
    try:
        found = signatures.load_key(key)
    except SignatureRefused:
        return
    if found.id == shared.id:  # white space of PEM
        assert signatures.verify(shared.model, shared.digest, [key]) == shared.id
    else:
        shared.refused(key)


@given(**PLACES)
def test_a_changed_byte_of_the_signature_changes_nothing_that_is_signed(shared, place, flip):
    content = shared.sig.read_bytes()
    changed = flipped(content, place, flip)
    key = signatures.load_key(shared.public)
    try:
        statement, _ = signatures.verify_envelope(changed, [key])
    except SignatureRefused as error:
        assert "\n" not in str(error)
        return
    # White space, a member's name that is not known then, or the key's id where that leaves it unnamed.
    assert statement == signatures.verify_envelope(content, [key])[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(member=st.sampled_from(["payload", "payloadType", "signatures", "sig", "keyid"]), value=JSON, drop=st.booleans())
def test_a_changed_envelope_is_refused_or_says_the_same(shared, member, value, drop):
    envelope = json.loads(json.dumps(shared.envelope))
    part = envelope["signatures"][0] if member in ("sig", "keyid") else envelope
    part.pop(member) if drop else part.update({member: value})
    key = signatures.load_key(shared.public)
    try:
        statement, found = signatures.verify_envelope(json.dumps(envelope).encode(), [key])
    except SignatureRefused as error:
        assert "\n" not in str(error)
        return
    assert (statement.predicate.artifact_digest, found.id) == (shared.digest, shared.id)


@given(content=st.binary(max_size=300))
def test_any_bytes_are_refused(shared, content):
    with pytest.raises(SignatureRefused):
        signatures.verify_envelope(content, [signatures.load_key(shared.public)])
    with pytest.raises(SignatureRefused):
        signatures.parse_key(content)


# --- the commands ----------------------------------------------------------------------------------------------


def run(program, *arguments, env=None, data=b""):
    module = {"edge-ssm": "edge_ssm.cli.app", "edge-ssm-build": "edge_ssm_build.cli.app"}[program]
    code = f"import sys; sys.argv[0] = {program!r}; from {module} import main; main()"
    if env is None:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return commands.run(command, input=data, capture_output=True, timeout=300)
    command = [sys.executable, "-S", "-c", code, *map(str, arguments)]
    return subprocess.run(command, input=data, capture_output=True, env=env, timeout=300)


def error_line(done):
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    return line


@pytest.mark.slow
def test_keygen_sign_and_verify(tmp_path):
    model = tmp_path / "m.safetensors"
    digest = artifact.save(model, random_network(), {})
    done = run("edge-ssm-build", "keygen", "--output", tmp_path / "keys" / "me")
    assert done.returncode == 0, done.stderr
    private, public = tmp_path / "keys" / "me.pem", tmp_path / "keys" / "me.pub.pem"
    assert b"not checked" not in run("edge-ssm", "inspect", model).stdout
    assert run("edge-ssm-build", "sign", model, "--key", private).returncode == 0
    for program in ("edge-ssm", "edge-ssm-build"):
        done = run(program, "verify-signature", model, "--key", public)
        assert done.returncode == 0, done.stderr
        assert digest in done.stdout.decode()
    assert b"m.safetensors.sig, not checked" in run("edge-ssm", "inspect", model).stdout
    assert json.loads(run("edge-ssm", "inspect", model, "--json").stdout)["signature"] == "m.safetensors.sig"
    options = ("--engine", "reference", "--profile", "none", "--require-signature", public)
    done = run("edge-ssm", "run", model, *options, data=b"1,2\n" * 10)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    signatures.signature_path(model).unlink()
    assert "m.safetensors.sig: cannot be read" in error_line(
        run("edge-ssm", "run", model, *options, data=b"1,2\n" * 10)
    )
    assert "m.safetensors.sig: cannot be read" in error_line(
        run("edge-ssm", "verify-signature", model, "--key", public)
    )


def test_without_cryptography_everything_but_signatures_works(signed, tmp_path):
    """A real Python process with all packages of this one except cryptography."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(folder).iterdir():
            if not entry.name.startswith("cryptography") and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tools", packages]))}
    assert run("edge-ssm", "inspect", signed.model, env=env).returncode == 0
    for done in (
        run("edge-ssm", "verify-signature", signed.model, "--key", signed.public, env=env),
        run("edge-ssm-build", "sign", signed.model, "--key", signed.private, env=env),
        run("edge-ssm-build", "keygen", "--output", tmp_path / "k", env=env),
    ):
        assert "pip install 'edge-ssm[signing]'" in error_line(done)
