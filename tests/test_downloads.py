"""A download survives what networks do, or an error says what went wrong; nothing leaves loopback."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from headstart import downloads, sources
from tests import servers
from tests.servers import DATA, DIGEST, Loopback, in_process, partial, refused, serving

own_world, server, closed = servers.own_world, servers.server, servers.closed


# Interruptions


def test_a_dropped_connection_goes_on_where_it_stopped(server: Loopback) -> None:
    server.drops = [300_000, 400_000]
    assert sources.fetch(f"{server.url}/data.zip").read_bytes() == DATA
    first, *others = server.downloads("/data.zip")
    starts = [int(wanted.removeprefix("bytes=").removesuffix("-")) for wanted in others]
    assert first == ""
    assert 200_000 < starts[0] <= 300_000
    assert starts[0] < starts[1] < len(DATA)


def test_a_killed_download_goes_on_with_the_rest_only(server: Loopback, tmp_path: Path) -> None:
    server.hold = 700_000
    process = in_process(f"{server.url}/data.zip", DIGEST)
    while not any(path.stat().st_size >= 600_000 for path in partial(tmp_path)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    server.release.set()
    (part,) = partial(tmp_path)
    there = part.stat().st_size
    assert sources.fetch(f"{server.url}/data.zip", DIGEST).read_bytes() == DATA
    assert server.downloads("/data.zip") == ["", f"bytes={there}-"]


@pytest.mark.parametrize("pinned", [True, False])
def test_a_server_without_ranges_starts_over(pinned: bool, server: Loopback) -> None:
    server.ranges, server.drops = False, [500_000]
    assert sources.fetch(f"{server.url}/data.zip", DIGEST if pinned else None).read_bytes() == DATA


def test_a_file_that_changed_in_between_starts_over(server: Loopback, tmp_path: Path) -> None:
    server.drops = [500_000, 0, 0, 0]
    assert refused(f"{server.url}/data.zip").transient
    assert partial(tmp_path)[0].stat().st_size > 0
    server.files["/data.zip"] = other = os.urandom(1 << 20)
    server.drops.clear()
    assert sources.fetch(f"{server.url}/data.zip").read_bytes() == other


def test_a_file_that_became_shorter_starts_over(server: Loopback) -> None:
    server.tagged, server.drops = False, [500_000, 0, 0, 0]
    short = os.urandom(1000)
    refused(f"{server.url}/data.zip", hashlib.sha256(short).hexdigest())
    server.files["/data.zip"] = short
    server.drops.clear()
    assert sources.fetch(f"{server.url}/data.zip", hashlib.sha256(short).hexdigest()).read_bytes() == short


def test_without_a_tag_only_a_pinned_sha256_lets_it_go_on(server: Loopback) -> None:
    server.tagged, server.drops = False, [500_000]
    sources.fetch(f"{server.url}/data.zip")
    assert server.downloads("/data.zip") == ["", ""]
    server.asked.clear()
    server.files["/more.zip"], server.drops = DATA, [500_000]
    assert sources.fetch(f"{server.url}/more.zip", DIGEST).read_bytes() == DATA
    assert server.downloads("/more.zip")[1].startswith("bytes=")


def test_a_download_that_was_complete_when_killed_is_taken_as_it_is(server: Loopback, tmp_path: Path) -> None:
    kept = sources.fetch(f"{server.url}/data.zip", DIGEST)
    entry = kept.parents[1]
    kept.rename(entry / sources.PART)
    tag = f'"{DIGEST}"'
    (entry / f"{sources.PART}.json").write_text(
        json.dumps({"url": f"{server.url}/data.zip", "validator": tag})
    )
    server.asked.clear()
    assert sources.fetch(f"{server.url}/data.zip", DIGEST).read_bytes() == DATA
    assert server.downloads("/data.zip") == [f"bytes={len(DATA)}-"]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_asked_again(status: int, server: Loopback) -> None:
    server.statuses = [(status, {}), (status, {})]
    assert sources.fetch(f"{server.url}/data.zip").read_bytes() == DATA


def test_a_server_says_when_to_come_back(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(downloads, "time", SimpleNamespace(sleep=pauses.append, time=lambda: 1_000_000_000.0))
    server.statuses = [(503, {"Retry-After": "7"}), (429, {"Retry-After": "Sun, 09 Sep 2001 01:46:50 GMT"})]
    sources.fetch(f"{server.url}/data.zip")
    assert pauses == [7, 10]


@pytest.mark.parametrize("when", ["nan", "-inf", "soon", "Mon, 01 Jan 0001 00:00:00 -0000", "-7"])
def test_a_server_that_says_nonsense_about_when_is_asked_again(when: str, server: Loopback) -> None:
    server.statuses = [(503, {"Retry-After": when})]
    assert sources.fetch(f"{server.url}/data.zip").read_bytes() == DATA


@pytest.mark.parametrize("length", ["x", "-5", "1.5"])
def test_a_length_that_is_none_is_not_heeded(length: str, server: Loopback) -> None:
    server.headers["/data.zip"] = {"Content-Length": length}
    assert sources.fetch(f"{server.url}/data.zip", DIGEST).read_bytes() == DATA


def test_pauses_grow_and_differ(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(downloads, "time", SimpleNamespace(sleep=pauses.append))
    monkeypatch.setattr(downloads, "BACKOFF", 8)
    server.statuses = [(503, {})] * 3
    sources.fetch(f"{server.url}/data.zip")
    for pause, most in zip(pauses, [8, 16, 32], strict=True):
        assert most / 2 <= pause <= most
    assert not all(float(pause).is_integer() for pause in pauses)


def test_trouble_that_lasts_is_an_error_worth_another_try(server: Loopback) -> None:
    server.statuses = [(503, {})] * 99
    error = refused(f"{server.url}/data.zip")
    assert error.transient
    assert "503" in error.what
    assert len(server.asked) == downloads.ATTEMPTS


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_what_will_not_get_better_is_an_error_at_once(status: int, server: Loopback) -> None:
    server.statuses = [(status, {})]
    assert not refused(f"{server.url}/data.zip").transient
    assert len(server.asked) == 1


def test_no_network_is_an_error_that_says_what_to_do(closed: str) -> None:
    error = refused(f"{closed}/data.zip")
    assert error.transient
    assert "Connection refused" in error.what
    assert f"{closed}/data.zip" in error.where
    assert "HEADSTART_MIRRORS" in error.do


def test_a_full_disk_is_an_error_and_the_download_goes_on_later(server: Loopback, tmp_path: Path) -> None:
    limited = (
        "import resource, sys; from headstart import sources; from headstart.errors import HeadstartError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "try: sources.fetch(*sys.argv[1:])\n"
        "except HeadstartError as error: sys.exit(str(error))\n"
    )
    command = [sys.executable, "-c", limited, f"{server.url}/data.zip", DIGEST]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "could not write to the cache" in done.stderr
    assert "free disk space" in done.stderr
    assert "Traceback" not in done.stderr
    there = partial(tmp_path)[0].stat().st_size
    assert sources.fetch(f"{server.url}/data.zip", DIGEST).read_bytes() == DATA
    assert server.downloads("/data.zip") == ["", f"bytes={there}-"]


def test_on_a_full_disk_what_cannot_go_on_is_removed(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.tagged = False

    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, _: int) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads, "bar", lambda **_: Full())
    error = refused(f"{server.url}/data.zip")
    assert "No space left" in error.what
    assert partial(tmp_path) == []


# Addresses


def test_a_mirror_is_asked_instead_and_the_recipe_stays(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "HEADSTART_MIRRORS",
        f"https://a.invalid/=http://b.invalid/  https://example.invalid/files/={server.url}/",
    )
    kept = sources.fetch("https://example.invalid/files/data.zip", DIGEST)
    assert kept.read_bytes() == DATA
    monkeypatch.delenv("HEADSTART_MIRRORS")
    assert sources.fetch("https://example.invalid/files/data.zip", DIGEST) == kept


def test_a_mirror_that_is_misspelt_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_MIRRORS", "https://example.invalid/")
    assert "PREFIX=PREFIX" in refused("https://example.invalid/data.zip").what


def test_credentials_are_used_and_never_told(
    server: Loopback, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.login = "someone:p@ss"
    secret = f"http://someone:p%40ss@{server.host}"
    with caplog.at_level(logging.INFO):
        kept = sources.fetch(f"{secret}/data.zip?token=hidden")
        missing = str(refused(f"{secret}/missing?token=hidden"))
        wrong = str(refused(f"http://someone:hidden@{server.host}/data.zip?a=1&token=hidden"))
        server.drops = [500_000, 0, 0, 0]
        cut = str(refused(f"{secret}/data.zip?a=2&token=hidden"))
    told = [caplog.text, missing, wrong, cut, str(kept)]
    told += [path.read_text() for path in (tmp_path / "cache").rglob("*.json")]
    assert partial(tmp_path)
    assert server.host in missing
    for text in told:
        assert "p%40ss" not in text
        assert "hidden" not in text


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("https://h/f?SECRET", "https://h/f?***"),
        ("https://h/f?a=1&SECRET", "https://h/f?***"),
        ("https://h/f?a[b]=SECRET#x/y.csv", "https://h/f?***#x/y.csv"),
        ("https://h/f;id=SECRET/g;SECRET?a=b", "https://h/f;***/g;***?***"),
        ("https://u:SECRET@h:80/f", "https://***@h:80/f"),
        ("https://u:p@SECRET@h/f", "https://***@h/f"),
        ("https://u:p/SECRET@h/f", "https://***@h/f"),
        ("https://u:/SECRET@h/f", "https://u:/SECRET@h/f"),  # an empty port and a path
        ("https://h/f?sig=AB'SECRET", "https://h/f?***"),
        ("s3://SECRET:SECRET@b/x", "s3://***@b/x"),
        ("postgresql+psycopg://u:SECRET@h/db?password=SECRET", "postgresql+psycopg://***@h/db?***"),
    ],
)
def test_whatever_may_be_secret_in_an_address_is_told_to_nobody(address: str, told: str) -> None:
    for before, behind in (("", ""), ("fetch: {source: '", "', sha256: 1}"), ("see <", ">."), ('"', '","a"')):
        said = downloads.redacted(before + address + behind)
        assert said == before + told + behind
        assert downloads.redacted(said) == said


@pytest.mark.parametrize(
    "text",
    [
        "https://h:8080/npm/@scope/package@1.0/f.zip#a;b/c",
        "pip:vaderSentiment==3.3.2?sdist#vaderSentiment-3.3.2/additional_resources",
        f"hf:google-bert/bert-base-uncased@{'8' * 40}",
        "is it https://h/f? or file:what?.csv; who knows",
    ],
)
def test_what_is_no_secret_stays_legible(text: str) -> None:
    assert downloads.redacted(text) == text


def test_a_query_without_its_address_is_told_to_nobody_either() -> None:
    told = downloads.redacted("Max retries exceeded with url: '/f?a[b]=SECRET&c=SECRET', no route")
    assert told == "Max retries exceeded with url: '/f?a[b]=***&c=***', no route"


def test_a_file_is_named_by_the_server_if_its_address_does_not(server: Loopback) -> None:
    server.files["/download"] = server.files["/get/7"] = DATA
    server.headers["/download"] = {"Content-Disposition": 'attachment; filename="../../photos 1.tar.gz"'}
    assert sources.fetch(f"{server.url}/download?id=7").name == "photos_1.tar.gz"
    assert sources.fetch(f"{server.url}/get/7").name == "7"


def test_a_name_is_cut_by_the_bytes_that_a_disk_counts(server: Loopback) -> None:
    name = "%E6%BC%A2" * 120 + ".csv"
    server.headers["/data.zip"] = {"Content-Disposition": f"attachment; filename*=UTF-8''{name}"}
    kept = sources.fetch(f"{server.url}/data.zip")
    assert kept.name == "漢" * 38 + ".csv"
    assert kept.read_bytes() == DATA


def test_a_way_that_leads_from_https_to_http_is_not_taken(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate(tmp_path)))
    with serving(Loopback(files={"/data.zip": DATA}), tmp_path / "server.pem") as secure:
        there = {"Location": f"{server.url.upper()}/data.zip?token=hidden"}
        secure.statuses = [(302, {"Location": f"{secure.url}/data.zip"})]
        assert sources.fetch(f"{secure.url}/data.zip").read_bytes() == DATA
        secure.statuses = [(302, there)]
        error = refused(f"{secure.url}/other.zip")
    assert "https: to an address without encryption" in error.what
    assert "hidden" not in str(error)
    assert server.asked == []


def certificate(folder: Path) -> Path:
    """The certificate of a server on loopback, in ``server.pem`` with its key, which signs itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "server.pem").write_bytes(private + made)
    (folder / "known.pem").write_bytes(made)
    return folder / "known.pem"


def test_a_file_is_stored_as_it_was_sent_even_if_called_encoded(server: Loopback) -> None:
    import gzip

    server.files["/x.tar.gz"] = content = gzip.compress(b"tar")
    server.headers["/x.tar.gz"] = {"Content-Encoding": "gzip"}
    assert sources.fetch(f"{server.url}/x.tar.gz").read_bytes() == content
