"""Folders of plain files: checksums, single files, what is refused, and what only web servers and S3 do."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import ipaddress
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FILES, SHARD, TOKEN
from hypothesis import given
from hypothesis import strategies as st
from test_sources_hub import named
from tests.sources.fake_server import FakeFolder, FakeS3, sums

from loadstone.config import RetryConfig
from loadstone.errors import CheckpointError, ConfigurationError, SourceError
from loadstone.sources import _fsspec, http, resolve
from loadstone.sources.folder import parse_sums
from loadstone.telemetry import Event

GGUF = b"GGUF" + bytes(5000)
ONCE = RetryConfig(max_attempts=1)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def names_asked(folder: FakeFolder) -> list[str]:
    return [one.path.rpartition("/")[2] for one in folder.asked]


# A list of checksums


def test_a_folder_needs_its_slash_no_more_than_a_shell_does(folder: FakeFolder) -> None:
    assert resolve(folder.url) == resolve(folder.url.rstrip("/"))


def test_only_files_that_a_model_may_need_are_looked_at(folder: FakeFolder) -> None:
    resolve(folder.url)
    assert not {"README.md", "pytorch_model.bin", "model.onnx"} & set(names_asked(folder))


def test_a_folder_without_checksums_is_refused_with_the_command_that_makes_them(folder: FakeFolder) -> None:
    del folder.files["SHA256SUMS"]
    with pytest.raises(SourceError, match="has no SHA256SUMS") as caught:
        resolve(folder.url)
    assert "sha256sum * > SHA256SUMS" in str(caught.value.hint)
    assert names_asked(folder) == ["SHA256SUMS"]


def test_a_file_that_is_listed_and_not_there_is_named(folder: FakeFolder) -> None:
    del folder.files["tokenizer.json"]
    with pytest.raises(SourceError, match=r"tokenizer\.json does not exist"):
        resolve(folder.url)


@pytest.mark.parametrize(
    "line",
    [
        b"not a checksum",
        b"d41d8cd98f00b204e9800998ecf8427e  model.safetensors",
        b"\xff\xfe",
        b"0" * 64,
        b"0" * 63 + b"  a",
    ],
)
def test_a_list_that_is_none_is_refused(folder: FakeFolder, line: bytes) -> None:
    folder.files["SHA256SUMS"] += line + b"\n"
    with pytest.raises(CheckpointError, match="SHA256SUMS"):
        resolve(folder.url)


def test_a_file_of_two_checksums_is_refused(folder: FakeFolder) -> None:
    folder.files["SHA256SUMS"] += b"0" * 64 + b"  config.json\n"
    with pytest.raises(CheckpointError, match="different checksums"):
        resolve(folder.url)


def test_a_list_without_end_is_not_read_to_it(folder: FakeFolder) -> None:
    folder.files["SHA256SUMS"] = b"#" * (2**20 + 1)
    with pytest.raises(SourceError, match="more than 1048576 bytes"):
        resolve(folder.url)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/evil.safetensors", "sub/evil.safetensors"])
def test_a_listed_path_is_no_file_of_the_folder(folder: FakeFolder, name: str) -> None:
    folder.files = {"config.json": b"{}", "SHA256SUMS": sums({"config.json": b"{}", name: b"evil"})}
    with pytest.raises(CheckpointError, match="no weights are there"):
        resolve(folder.url)
    assert not [one for one in folder.asked if "evil" in one.path]


@pytest.mark.parametrize("name", ["..\\evil.safetensors", "C:evil.safetensors"])
def test_a_listed_name_that_leaves_the_folder_elsewhere_is_refused(folder: FakeFolder, name: str) -> None:
    files = {"config.json": b"{}", name: b"evil"}
    folder.files = {**files, "SHA256SUMS": sums(files)}
    with pytest.raises(CheckpointError, match="must lie in the folder"):
        resolve(folder.url)


@pytest.mark.parametrize("name", ["a b%2f?#.gguf", "模型-Q4_K_M.gguf"])
def test_a_name_is_asked_for_as_it_is(folder: FakeFolder, name: str) -> None:
    folder.files = {name: GGUF, "SHA256SUMS": sums({name: GGUF})}
    assert resolve(folder.url).weights[0].name == name


@given(
    st.dictionaries(st.from_regex(r"\w[\w .*#-]{0,20}\w", fullmatch=True), st.binary(max_size=8), max_size=4),
    st.sampled_from(["  ", " *", "  ./"]),
)
def test_what_sha256sum_writes_is_read(files: dict[str, bytes], between: str) -> None:
    lines = [f"{sha256(data)}{between}{name}\n" for name, data in files.items()]
    listed = "".join(["# made today\r\n", "\n", *lines]).encode()
    assert parse_sums(listed, "x") == {name: sha256(data) for name, data in files.items()}


# Single files


@pytest.fixture
def single(folder: FakeFolder) -> FakeFolder:
    folder.files = {"model.gguf": GGUF, "other.gguf": b"other"}
    return folder


def test_a_single_file_with_its_checksum_beside_it(single: FakeFolder) -> None:
    single.files["model.gguf.sha256"] = sums({"model.gguf": GGUF})
    assert resolve(f"{single.url}model.gguf").weights[0].read_bytes() == GGUF
    assert "other.gguf" not in names_asked(single)


def test_a_single_file_of_a_folder_with_a_list(single: FakeFolder) -> None:
    single.files["SHA256SUMS"] = sums(single.files)
    assert resolve(f"{single.url}other.gguf").weights[0].read_bytes() == b"other"


def test_a_single_file_whose_checksum_the_user_says(single: FakeFolder) -> None:
    name = f"{single.url}model.gguf#sha256={sha256(GGUF).upper()}"
    assert resolve(name).weights[0].read_bytes() == GGUF
    single.asked.clear()
    assert resolve(name).weights[0].read_bytes() == GGUF
    assert single.asked == []  # it cannot change


def test_a_single_file_without_a_checksum_is_refused(single: FakeFolder) -> None:
    with pytest.raises(SourceError, match="has no checksum") as caught:
        resolve(f"{single.url}model.gguf")
    assert "#sha256=" in str(caught.value.hint)
    assert "model.gguf" not in names_asked(single)


def test_a_single_file_of_another_checksum_is_not_accepted(single: FakeFolder) -> None:
    with pytest.raises(SourceError, match="does not have the hash"):
        resolve(f"{single.url}model.gguf#sha256={'0' * 64}")


def test_a_folder_whose_list_has_the_checksum_that_the_user_says(folder: FakeFolder) -> None:
    pinned = f"{folder.url}#sha256={sha256(folder.files['SHA256SUMS'])}"
    first = resolve(pinned)
    folder.asked.clear()
    assert resolve(pinned) == first
    assert folder.asked == []
    with pytest.raises(SourceError, match="is not the list"):
        resolve(f"{folder.url}#sha256={'1' * 64}")


# Names


@pytest.mark.parametrize(
    "name",
    ["https://", "https:host/folder", "https:///", "https://host/a?token=secret", "https://user:secret@host/a?b",
     "https://host/a b", "https://host/../x", "https://host/./x", "https://user:secret@host/x", "https://host:99999/x",
     "https://[::1/x", "https://host/x#sha1=00", "https://host/x#sha256=00", "s3://", "s3://bucket/../x", "s3:bucket"],
)  # fmt: skip
def test_what_cannot_be_a_folder_is_refused_before_anything_is_asked(name: str, cache: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolve(name)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["example.com", "192.168.1.7", "10.0.0.1:8000", "127.0.0.1.example.com", "[fe80::1]"])
def test_http_from_elsewhere_needs_a_checksum_that_the_user_says(host: str, cache: Path) -> None:
    with pytest.raises(ConfigurationError, match="may be altered"):
        resolve(f"http://{host}/folder/", retry=ONCE)
    with pytest.raises(SourceError, match="offline was asked for"):
        resolve(f"http://{host}/folder/#sha256={'0' * 64}", offline=True)


def test_a_revision_is_mentioned_as_unused(folder: FakeFolder, events: list[Event]) -> None:
    resolve(folder.url, revision="main")
    assert "only hubs have revisions" in named(events, "source.warning")[0].fields["message"]


def test_two_folders_never_share_a_place_in_the_cache(folder: FakeFolder) -> None:
    from loadstone.sources import Terms
    from loadstone.sources.web import Https

    source = Https()
    names = ["https://h/a--b", "https://h/a/b", "https://h/A/b", "https://h/" + "x" * 500, "https://h/" + "x" * 501]
    places = {source.cache(source.reference(name, Terms())).name.lower() for name in names}
    assert len(places) == len(names)
    assert all(len(place) < 100 for place in places)


# Servers as they are


def test_a_server_without_parts_of_files_is_read_from_the_start(
    folder: FakeFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(http, "MOST_PASSED_OVER", 1000)
    folder.fault("model.safetensors", times=2, change=lambda data: data[:-7])  # asked for its size, then for all of it
    with pytest.raises(SourceError):
        resolve(folder.url, retry=ONCE)
    partial = next((tmp_path / "own").rglob("blobs"), None)
    assert partial is not None
    (partial / f"{sha256(SHARD)}.incomplete").write_bytes(SHARD[:5000])
    folder.fault("model.safetensors", times=99, ignores_range=True)
    assert resolve(folder.url).weights[0].read_bytes() == SHARD


def test_a_server_that_tells_no_size_is_refused(folder: FakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.sources.fake_server import Answer

    def answer(path: str, query: object) -> Answer:
        if path.endswith("SHA256SUMS"):
            return Answer(body=folder.files["SHA256SUMS"], is_file=True)
        return Answer(206, b"x", {"Content-Range": "bytes 0-0/*"})

    monkeypatch.setattr(folder, "answer", answer)
    with pytest.raises(SourceError, match="does not tell the size"):
        resolve(folder.url)


def test_an_empty_file_is_fetched(folder: FakeFolder) -> None:
    files = FILES | {"merges.txt": b""}
    folder.files = {**files, "SHA256SUMS": sums(files)}
    assert (resolve(folder.url).folder / "merges.txt").read_bytes() == b""


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate of loopback that signs itself, and what a server needs to show it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    file = tmp_path / "certificate.pem"
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    both = tmp_path / "both.pem"
    plain = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    both.write_bytes(file.read_bytes() + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    return file, context


@pytest.fixture
def secure(cache: Path, certificate: tuple[Path, ssl.SSLContext]) -> Iterator[FakeFolder]:
    with FakeFolder(FILES, secure=certificate[1]) as running:
        yield running


@pytest.fixture
def trusted(certificate: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The certificate is trusted, as one of a proxy's would be."""
    import huggingface_hub

    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    huggingface_hub.close_session()  # one is kept, and it reads the certificates when it is made
    yield
    huggingface_hub.close_session()


def test_https_with_a_trusted_certificate(secure: FakeFolder, trusted: None) -> None:
    assert secure.url.startswith("https://")
    assert resolve(secure.url).weights[0].read_bytes() == SHARD


def test_https_with_a_certificate_that_nobody_trusts_is_refused(secure: FakeFolder) -> None:
    with pytest.raises(SourceError, match="is not trusted") as caught:
        resolve(secure.url, retry=ONCE)
    assert "SSL_CERT_FILE" in str(caught.value.hint)


def test_https_does_not_lead_to_http(secure: FakeFolder, folder: FakeFolder, trusted: None) -> None:
    secure.fault("SHA256SUMS", status=302, headers={"Location": f"{folder.url}SHA256SUMS"}, times=9)
    with pytest.raises(SourceError, match="redirects from https to http, which is not followed"):
        resolve(secure.url)
    assert folder.asked == []


def test_http_may_lead_to_https(secure: FakeFolder, folder: FakeFolder, trusted: None) -> None:
    folder.fault("model.safetensors", status=308, headers={"Location": f"{secure.url}model.safetensors"}, times=9)
    assert resolve(folder.url).weights[0].read_bytes() == SHARD
    assert folder.asked_for("model.safetensors")
    assert secure.asked_for("model.safetensors")


# S3


def test_a_bucket_is_asked_with_the_users_own_keys(s3: FakeS3) -> None:
    resolve("s3://shelf/models/tiny/")
    assert all("AKIAMADEUP" in str(one.authorization) for one in s3.asked)
    assert not any(TOKEN in f"{one.headers} {one.query}" for one in s3.asked)


def test_a_large_file_comes_in_blocks(s3: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fsspec, "BLOCK", 100_000)
    assert resolve("s3://shelf/models/tiny").weights[0].read_bytes() == SHARD
    starts = [one.start for one in s3.asked_for("model.safetensors") if one.method == "GET"]
    assert starts == [0, 100_000, 200_000]


def test_a_single_file_in_a_bucket(s3: FakeS3) -> None:
    s3.files = {"model.gguf": GGUF, "model.gguf.sha256": sums({"model.gguf": GGUF})}
    assert resolve("s3://shelf/models/tiny/model.gguf").weights[0].read_bytes() == GGUF


def test_without_keys_the_error_says_how_to_log_in(s3: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(SourceError, match="is not shown to you") as caught:
        resolve("s3://shelf/models/tiny")
    assert "FSSPEC_S3_ANON" in str(caught.value.hint)
    assert s3.asked == []


@pytest.mark.parametrize("missing", ["fsspec", "s3fs"])
def test_without_its_libraries_the_error_says_how_to_install_them(
    missing: str, s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fsspec._made.cache_clear()
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(SourceError, match="needs fsspec with s3fs") as caught:
        resolve("s3://shelf/models/tiny")
    assert "pip install s3fs" in str(caught.value.hint)
