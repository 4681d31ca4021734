"""A source is fetched once, whole and verified, or an error says what to do; nothing leaves loopback."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headstart import sources
from headstart.errors import HeadstartError
from tests.servers import Loopback, serving

DATA = os.urandom(1 << 20)
DIGEST = hashlib.sha256(DATA).hexdigest()
COMMIT = "86b5e0934494bd15c9632b12f734a8a67f723594"
FETCH = "import sys; from headstart import sources; sources.BACKOFF = 0; print(sources.fetch(*sys.argv[1:]))"


@pytest.fixture(autouse=True)
def own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache, a home and a pip of the test's own; no pauses."""
    for name in list(os.environ):
        if name.startswith(("HEADSTART_", "PIP_", "HF_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home/hf"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "etc"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(sources, "BACKOFF", 0)


@pytest.fixture
def server() -> Iterator[Loopback]:
    with serving(Loopback({"/data.zip": DATA})) as loopback:
        yield loopback


@pytest.fixture
def closed() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def refused(uri: str, sha256: str | None = None) -> HeadstartError:
    """The error, which fits on one screen."""
    with pytest.raises(HeadstartError) as caught:
        sources.fetch(uri, sha256)
    assert len(str(caught.value).splitlines()) <= 20
    assert max(map(len, str(caught.value).splitlines())) < 400
    assert caught.value.do
    return caught.value


def partial(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.part"))


def in_process(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


# The cache


def test_a_file_is_fetched_once_and_keeps_its_name(server: Loopback, tmp_path: Path) -> None:
    first = sources.fetch(f"{server.url}/data.zip", DIGEST)
    assert first.read_bytes() == DATA
    assert first.name == "data.zip"
    assert tmp_path / "cache" in first.parents
    assert sources.fetch(f"{server.url}/data.zip", DIGEST) == first
    assert sources.fetch(f"{server.url}/data.zip") == first
    assert server.downloads("/data.zip") == [""]
    assert partial(tmp_path) == []


def test_without_a_sha256_the_line_to_add_is_logged_once(
    server: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="headstart.sources"):
        sources.fetch(f"{server.url}/data.zip")
        sources.fetch(f"{server.url}/data.zip")
    assert caplog.text.count(f"sha256: {DIGEST}") == 1


def test_another_sha256_is_an_error_with_both_and_leaves_nothing(server: Loopback, tmp_path: Path) -> None:
    error = refused(f"{server.url}/data.zip", "0" * 64)
    assert "0" * 64 in str(error)
    assert DIGEST in str(error)
    assert not error.transient
    assert [
        path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 999
    ] == []


def test_a_wrong_sha256_does_not_cost_the_file_that_another_recipe_has(server: Loopback) -> None:
    kept = sources.fetch(f"{server.url}/data.zip", DIGEST)
    refused(f"{server.url}/data.zip", "0" * 64)
    assert kept.read_bytes() == DATA


def test_a_file_that_changed_is_fetched_anew_beside_the_old_one(server: Loopback) -> None:
    old = sources.fetch(f"{server.url}/data.zip", DIGEST)
    server.files["/data.zip"] = b"new"
    new = sources.fetch(f"{server.url}/data.zip", hashlib.sha256(b"new").hexdigest())
    assert (old.read_bytes(), new.read_bytes()) == (DATA, b"new")
    assert sources.fetch(f"{server.url}/data.zip", DIGEST) == old


def test_a_cut_file_in_the_cache_is_fetched_anew(server: Loopback) -> None:
    kept = sources.fetch(f"{server.url}/data.zip", DIGEST)
    kept.write_bytes(DATA[:10])
    assert sources.fetch(f"{server.url}/data.zip", DIGEST).read_bytes() == DATA


def test_a_damaged_record_in_the_cache_is_not_trusted(server: Loopback, tmp_path: Path) -> None:
    sources.fetch(f"{server.url}/data.zip", DIGEST)
    (record,) = (tmp_path / "cache").rglob("sha256-*.json")
    record.write_text("{")
    assert sources.fetch(f"{server.url}/data.zip", DIGEST).read_bytes() == DATA


def test_two_processes_download_once(server: Loopback) -> None:
    server.hold = 1000
    both = [in_process(f"{server.url}/data.zip", DIGEST) for _ in range(2)]
    while not server.asked:
        time.sleep(0.01)
    server.release.set()
    paths = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert [Path(path).read_bytes() for path in paths] == [DATA]
    assert server.downloads("/data.zip") == [""]


def test_offline_what_is_cached_is_there_and_nobody_is_asked(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = sources.fetch(f"{server.url}/data.zip", DIGEST)
    server.asked.clear()
    monkeypatch.setenv("HEADSTART_OFFLINE", "1")
    assert sources.fetch(f"{server.url}/data.zip", DIGEST) == kept
    error = refused(f"{server.url}/other.zip")
    assert f"{server.url}/other.zip" in error.where
    assert "HEADSTART_OFFLINE" in error.do
    assert server.asked == []


@pytest.mark.parametrize(
    "uri", ["pip:x==1", f"hf:o/r@{COMMIT}", "torchvision:ResNet18_Weights.IMAGENET1K_V1", "memory://x/y"]
)
def test_offline_every_kind_is_an_error_that_names_it(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_OFFLINE", "1")
    error = refused(uri)
    assert uri in error.where
    assert not error.transient


def test_a_cache_that_may_not_be_written_still_serves(server: Loopback, tmp_path: Path) -> None:
    kept = sources.fetch(f"{server.url}/data.zip", DIGEST)
    (kept.parents[1] / "lock").unlink()  # what a copied or read-only cache need not have
    assert sources.fetch(f"{server.url}/data.zip", DIGEST) == kept
    assert not (kept.parents[1] / "lock").exists()


def test_importing_sources_imports_nothing_heavy() -> None:
    heavy = {"requests", "unearth", "huggingface_hub", "fsspec", "torchvision", "torch", "packaging"}
    check = f"import sys, headstart.sources; print(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


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


def test_pieces_of_two_files_are_noticed_and_fetched_whole(server: Loopback) -> None:
    server.tagged, server.drops = False, [500_000, 0, 0, 0]
    wanted = os.urandom(1 << 20)
    digest = hashlib.sha256(wanted).hexdigest()
    refused(f"{server.url}/data.zip", digest)  # leaves the start of the old file
    server.files["/data.zip"] = wanted
    server.drops.clear()
    assert sources.fetch(f"{server.url}/data.zip", digest).read_bytes() == wanted


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
    monkeypatch.setattr(sources, "time", SimpleNamespace(sleep=pauses.append, time=lambda: 1_000_000_000.0))
    server.statuses = [(503, {"Retry-After": "7"}), (429, {"Retry-After": "Sun, 09 Sep 2001 01:46:50 GMT"})]
    sources.fetch(f"{server.url}/data.zip")
    assert pauses == [7, 10]


def test_pauses_grow_and_differ(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(sources, "time", SimpleNamespace(sleep=pauses.append))
    monkeypatch.setattr(sources, "BACKOFF", 8)
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
    assert len(server.asked) == sources.ATTEMPTS


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

    monkeypatch.setattr(sources, "bar", lambda **_: Full())
    error = refused(f"{server.url}/data.zip")
    assert "No space left" in error.what
    assert partial(tmp_path) == []


def test_a_cache_that_cannot_be_made_is_an_error(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "file"))
    assert "HEADSTART_CACHE" in refused(f"{server.url}/data.zip").do


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
    told = [caplog.text, missing, wrong, str(kept)]
    told += [path.read_text() for path in (tmp_path / "cache").rglob("*.json")]
    assert server.host in missing
    for text in told:
        assert "p%40ss" not in text
        assert "hidden" not in text


def test_a_file_is_named_by_the_server_if_its_address_does_not(server: Loopback) -> None:
    server.files["/download"] = server.files["/get/7"] = DATA
    server.headers["/download"] = {"Content-Disposition": 'attachment; filename="../../photos 1.tar.gz"'}
    assert sources.fetch(f"{server.url}/download?id=7").name == "photos_1.tar.gz"
    assert sources.fetch(f"{server.url}/get/7").name == "7"


def test_a_file_is_stored_as_it_was_sent_even_if_called_encoded(server: Loopback) -> None:
    import gzip

    server.files["/x.tar.gz"] = content = gzip.compress(b"tar")
    server.headers["/x.tar.gz"] = {"Content-Encoding": "gzip"}
    assert sources.fetch(f"{server.url}/x.tar.gz").read_bytes() == content


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("inbox/texts.csv", "file:inbox/texts.csv"),
        ("/data/photos", "file:/data/photos"),
        ("files:inbox", "file:inbox"),
        ("htps://example.invalid/x.zip", "https://example.invalid/x.zip"),
        ("elpv-dataset==1.0", "pip:elpv-dataset==1.0"),
        ("pypi:elpv-dataset==1.0", "pip:elpv-dataset==1.0"),
        (f"google-bert/bert-base-uncased@{COMMIT}", f"hf:google-bert/bert-base-uncased@{COMMIT}"),
        ("ResNet18_Weights.IMAGENET1K_V1", "torchvision:ResNet18_Weights.IMAGENET1K_V1"),
        ("s3:bucket/photos", "s3://bucket/photos"),
        ("file://inbox/photos", "file:inbox/photos"),
    ],
)
def test_a_misspelt_source_names_the_nearest_right_one(wrong: str, right: str) -> None:
    assert f"did you mean {right}?" in refused(wrong).do


@pytest.mark.parametrize("uri", ["pip:elpv-dataset", "pip:elpv-dataset>=1.0", "pip:elpv-dataset==1.*"])
def test_a_package_without_one_exact_version_is_an_error(uri: str) -> None:
    error = refused(uri)
    assert "not pinned" in error.what
    assert "pip:NAME==VERSION" in error.do


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("pip:x==1?sdist#x-1/a.tar.gz", ("pip:x==1?sdist", "x-1/a.tar.gz")),
        ("file:a", ("file:a", None)),
        ("file:a#", ("file:a", None)),
    ],
)
def test_the_member_stands_after_the_hash_sign(source: str, parts: tuple[str, str | None]) -> None:
    assert sources.split_fragment(source) == parts


# file:


def test_a_file_of_ones_own_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inbox").mkdir()
    (tmp_path / "inbox/a b.csv").write_bytes(b"1")
    monkeypatch.chdir(tmp_path)
    assert sources.fetch("file:inbox/a b.csv") == Path("inbox/a b.csv")
    assert sources.fetch("file:inbox") == Path("inbox")
    assert sources.fetch(f"file:{tmp_path}/inbox") == tmp_path / "inbox"
    assert sources.fetch((tmp_path / "inbox/a b.csv").as_uri()) == tmp_path / "inbox/a b.csv"
    assert not (tmp_path / "cache").exists()


def test_a_missing_file_names_the_nearest_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts.csv").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert "did you mean file:texts.csv?" in refused("file:text.csv").do
    refused("file:nowhere/at/all")


def test_a_pinned_file_is_verified_and_never_removed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    assert sources.fetch(f"file:{tmp_path}/a", DIGEST) == tmp_path / "a"
    assert DIGEST in str(refused(f"file:{tmp_path}/a", "0" * 64))
    assert (tmp_path / "a").read_bytes() == DATA
    sources.fetch(f"file:{tmp_path}", sources.digest_of(tmp_path))


# pip:


def wheel(path: Path, content: bytes = b"data") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_data/data.bin", content)
    return path


def sdist(path: Path, marker: Path) -> Path:
    """A source distribution whose setup.py leaves a mark if anyone runs it."""
    setup = f"open({str(marker)!r}, 'w')\nfrom setuptools import setup\nsetup(name='tiny-data')\n".encode()
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"setup.py": setup, "tiny_data/data.bin": b"data"}.items():
            info = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    """A PEP 503 index of ``tiny-data``, which pip is told of by PIP_INDEX_URL."""
    made = tmp_path / "made"
    made.mkdir()
    files = [
        wheel(made / "tiny_data-1.0-py3-none-any.whl"),
        sdist(made / "tiny_data-1.0.tar.gz", tmp_path / "ran"),
        sdist(made / "tiny_data-2.0.post1.tar.gz", tmp_path / "ran"),
        wheel(made / "tiny_data-3.0-cp27-none-win32.whl"),
    ]
    page = "".join(
        f'<a href="../../files/{file.name}#sha256={hashlib.sha256(file.read_bytes()).hexdigest()}"'
        f' data-requires-python="&lt;3">{file.name}</a>'
        for file in files
    )
    served = {f"/files/{file.name}": file.read_bytes() for file in files} | {
        "/simple/tiny-data/": page.encode()
    }
    html = {"/simple/tiny-data/": {"Content-Type": "text/html"}}
    with serving(Loopback(served, html)) as loopback:
        monkeypatch.setenv("PIP_INDEX_URL", f"{loopback.url}/simple")
        yield loopback
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("pip:tiny-data==1.0", "tiny_data-1.0-py3-none-any.whl"),
        ("pip:Tiny.Data==1", "tiny_data-1.0-py3-none-any.whl"),
        ("pip:tiny-data==1.0?sdist", "tiny_data-1.0.tar.gz"),
        ("pip:tiny-data==2.0.post1", "tiny_data-2.0.post1.tar.gz"),
        ("pip:tiny-data==3.0", "tiny_data-3.0-cp27-none-win32.whl"),
    ],
    ids=[
        "wheel",
        "other spelling",
        "sdist on demand",
        "sdist for want of a wheel",
        "any platform, any Python",
    ],
)
def test_a_package_comes_from_pips_index_and_is_never_run(
    uri: str, name: str, index: Loopback, tmp_path: Path
) -> None:
    kept = sources.fetch(uri)
    assert kept.name == name
    assert kept.read_bytes() == (tmp_path / "made" / name).read_bytes()
    index.asked.clear()
    assert sources.fetch(uri) == kept
    assert index.asked == []


def test_a_version_that_is_not_there_names_those_that_are(index: Loopback) -> None:
    error = refused("pip:tiny-data==9.9")
    assert "versions there: 1.0, 2.0.post1, 3.0" in str(error)
    assert not error.transient
    assert "no sdist" in refused("pip:tiny-data==3.0?sdist").what
    assert not refused("pip:unheard-of==1.0").transient


def test_a_file_that_is_not_what_the_index_promises_is_refused(index: Loopback) -> None:
    index.files["/files/tiny_data-1.0-py3-none-any.whl"] = b"forged"
    assert hashlib.sha256(b"forged").hexdigest() in str(refused("pip:tiny-data==1.0"))


def test_an_index_with_a_login_is_never_told(
    index: Loopback, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index.login = "someone:hidden"
    monkeypatch.setenv("PIP_INDEX_URL", f"http://someone:hidden@{index.host}/simple")
    with caplog.at_level(logging.INFO):
        assert sources.fetch("pip:tiny-data==1.0").name == "tiny_data-1.0-py3-none-any.whl"
        text = str(refused("pip:tiny-data==9.9"))
    assert index.host in text
    assert "hidden" not in text + caplog.text


def test_an_index_out_of_reach_is_an_error_worth_another_try(
    closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{closed}/simple")
    error = refused("pip:tiny-data==1.0")
    assert error.transient
    assert "PIP_INDEX_URL" in error.do
    assert closed in str(error)


def test_one_index_out_of_reach_does_not_hide_what_another_has(
    closed: str, index: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{index.url}/simple file:///nowhere/simple")
    monkeypatch.setenv("PIP_INDEX_URL", f"{closed}/simple")
    assert sources.fetch("pip:tiny-data==1.0").name == "tiny_data-1.0-py3-none-any.whl"


def test_folders_of_wheels_in_pips_own_file_are_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    wheel(tmp_path / "one/other_data-1.0-py3-none-any.whl")
    wheel(tmp_path / "two/tiny_data-1.0-py3-none-any.whl")
    config = f"[global]\nno-index = true\nfind-links =\n  {tmp_path}/one\n  {tmp_path}/none\n  file://{tmp_path}/two\n"
    (tmp_path / "pip.conf").write_text(config)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    kept = sources.fetch("pip:tiny-data==1.0")
    assert kept.name == "tiny_data-1.0-py3-none-any.whl"
    (tmp_path / "two" / kept.name).unlink()
    assert sources.fetch("pip:tiny-data==1.0") == kept


def test_a_local_index_counts_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "simple/tiny-data").mkdir(parents=True)
    made = wheel(tmp_path / "tiny_data-1.0-py3-none-any.whl")
    (tmp_path / "simple/tiny-data/index.html").write_text(f'<a href="../../{made.name}">{made.name}</a>')
    monkeypatch.setenv("PIP_INDEX_URL", f"file://{tmp_path}/simple")
    assert sources.fetch("pip:tiny-data==1.0").read_bytes() == made.read_bytes()


def test_an_index_that_names_a_lost_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.html").write_text('<a href="tiny_data-1.0-py3-none-any.whl">lost</a>')
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", f"file://{tmp_path}/index.html")
    assert "tiny_data-1.0-py3-none-any.whl" in refused("pip:tiny-data==1.0").where


def test_of_several_wheels_the_pinned_one_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = wheel(tmp_path / "tiny_data-1.0-cp311-cp311-linux_x86_64.whl", b"linux")
    second = wheel(tmp_path / "tiny_data-1.0-cp311-cp311-win_amd64.whl", b"windows")
    page = "".join(
        f'<a href="{file.name}#sha256={hashlib.sha256(file.read_bytes()).hexdigest()}">.</a>'
        for file in (first, second)
    )
    (tmp_path / "index.html").write_text(page)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", f"file://{tmp_path}/index.html")
    for file in (second, first):
        assert sources.fetch("pip:tiny-data==1.0", sources.digest_of(file)).name == file.name


# hf:

MODEL = {
    "config.json": b"{}",
    "tokenizer.json": b'{"t": 1}',
    "vocab.txt": b"a\nb\n",
    "model.safetensors": os.urandom(200_000),
    "pytorch_model.bin": b"pickle",
    "README.md": b"# model",
    "tf_model.h5": b"tensorflow",
}
NEEDED = {"config.json", "tokenizer.json", "vocab.txt", "model.safetensors"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    """As much of the hub as its own client asks for, which HF_ENDPOINT names."""
    with serving(Loopback()) as loopback:
        monkeypatch.setenv("HF_ENDPOINT", loopback.url)
        yield loopback


def offer(hub: Loopback, model: dict[str, bytes]) -> None:
    tree = []
    for name, content in model.items():
        digest = hashlib.sha256(content).hexdigest()
        git = hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git}
        if name.endswith((".safetensors", ".bin", ".h5")):
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        tree.append(entry)
        path = f"/owner/model/resolve/{COMMIT}/{name}"
        hub.files[path] = content
        hub.headers[path] = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest if "lfs" in entry else git}"'}
    info = {"id": "owner/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in model]}
    pages = {f"tree/{COMMIT}": tree, f"revision/{COMMIT}": info, "revision/main": info}
    for name, page in pages.items():
        hub.files[f"/api/models/owner/model/{name}"] = json.dumps(page).encode()
        hub.headers[f"/api/models/owner/model/{name}"] = {"Content-Type": "application/json"}


def fetched(*arguments: str, **environment: str) -> tuple[Path, str]:
    """Fetch in a process of its own, because the hub's client reads HF_ENDPOINT when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", FETCH, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    return Path(done.stdout.strip() or "none"), done.stderr


def test_a_model_comes_from_the_hub_that_hf_endpoint_names_without_what_nobody_needs(
    hub: Loopback, tmp_path: Path
) -> None:
    offer(hub, MODEL)
    folder, trouble = fetched(f"hf:owner/model@{COMMIT}")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: MODEL[name] for name in NEEDED
    }, trouble
    assert sorted(path.name for path in folder.parents[1].iterdir() if path.suffix != ".json") == [
        sources.digest_of(folder)[:12],
        "lock",
    ]
    assert fetched(f"hf:owner/model@{COMMIT}", sources.digest_of(folder), HEADSTART_OFFLINE="1")[0] == folder
    assert not {path for _, path, _ in hub.asked} & {
        f"/owner/model/resolve/{COMMIT}/{name}" for name in set(MODEL) - NEEDED
    }


def test_without_safetensors_the_older_weights_are_taken(hub: Loopback) -> None:
    offer(hub, {name: content for name, content in MODEL.items() if name != "model.safetensors"})
    folder, trouble = fetched(f"hf:owner/model@{COMMIT}")
    assert (folder / "pytorch_model.bin").read_bytes() == b"pickle", trouble


def test_weights_that_the_hub_does_not_vouch_for_are_refused(hub: Loopback, tmp_path: Path) -> None:
    offer(hub, MODEL)
    hub.files[f"/owner/model/resolve/{COMMIT}/model.safetensors"] = os.urandom(200_000)
    _, trouble = fetched(f"hf:owner/model@{COMMIT}")
    assert "model.safetensors: expected sha256" in trouble
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("revision", ["", "@main"])
def test_a_model_without_a_commit_is_an_error_that_names_it(revision: str, hub: Loopback) -> None:
    offer(hub, MODEL)
    hub.files["/api/models/owner/model"] = hub.files["/api/models/owner/model/revision/main"]
    hub.headers["/api/models/owner/model"] = {"Content-Type": "application/json"}
    _, trouble = fetched(f"hf:owner/model{revision}")
    assert "not pinned" in trouble
    assert f"write hf:owner/model@{COMMIT}" in trouble


def test_offline_a_model_without_a_commit_asks_nobody(hub: Loopback) -> None:
    _, trouble = fetched("hf:owner/model@main", HEADSTART_OFFLINE="1")
    assert "hf:OWNER/REPO@COMMIT" in trouble
    assert hub.asked == []


def test_a_model_that_is_not_there_is_an_error(hub: Loopback) -> None:
    _, trouble = fetched(f"hf:owner/other@{COMMIT}")
    assert "there is nothing at this address" in trouble


def test_a_hub_out_of_reach_is_an_error_worth_another_try(closed: str) -> None:
    check = (
        "import sys; from headstart import sources; from headstart.errors import HeadstartError\n"
        "try: sources.fetch(sys.argv[1])\n"
        "except HeadstartError as error: print(error.transient, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", check, f"hf:owner/model@{COMMIT}"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_ENDPOINT": closed},
    )
    assert done.stdout.startswith("True could not download"), done.stderr
    assert "HF_ENDPOINT" in done.stdout


# torchvision:


def test_weights_with_the_wrong_digits_are_refused(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/models/resnet18-f37072fd.pth"] = DATA
    monkeypatch.setenv("HEADSTART_MIRRORS", f"https://download.pytorch.org/={server.url}/")
    error = refused("torchvision:ResNet18_Weights.IMAGENET1K_V1")
    assert "f37072fd" in str(error)
    assert DIGEST in str(error)


def test_weights_come_from_where_torchvision_says(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    name = f"tiny-{DIGEST[:8]}.pth"
    server.files[f"/models/{name}"] = DATA
    address = SimpleNamespace(url=f"https://download.invalid/models/{name}")
    monkeypatch.setattr(models, "get_weight", {"Tiny_Weights.V1": address}.__getitem__)
    monkeypatch.setenv("HEADSTART_MIRRORS", f"https://download.invalid/={server.url}/")
    kept = sources.fetch("torchvision:Tiny_Weights.V1")
    assert kept.name == name
    assert kept.read_bytes() == DATA


def test_weights_that_torchvision_does_not_have_name_the_nearest() -> None:
    assert (
        "torchvision:ResNet18_Weights.IMAGENET1K_V1"
        in refused("torchvision:ResNet18_Weights.IMAGENET1K_V9").do
    )


# fsspec


@pytest.fixture
def store() -> Iterator[Any]:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/bucket/photos/a.png": b"1", "/bucket/photos/deep/b.png": b"22", "/bucket/one.csv": DATA})
    yield memory
    memory.rm("/bucket", recursive=True)


def test_a_file_or_a_folder_comes_from_any_other_store(store: Any) -> None:
    assert sources.fetch("memory://bucket/one.csv", DIGEST).read_bytes() == DATA
    folder = sources.fetch("memory://bucket/photos")
    assert (folder / "a.png").read_bytes() + (folder / "deep/b.png").read_bytes() == b"122"
    store.rm("/bucket/photos/a.png")
    assert sources.fetch("memory://bucket/photos", sources.digest_of(folder)) == folder
    assert folder.name == "photos"


def test_what_no_store_has_is_an_error(store: Any) -> None:
    assert not refused("memory://bucket/nothing").transient


def test_a_folder_from_a_store_is_verified(store: Any) -> None:
    assert "0" * 64 in str(refused("memory://bucket/photos", "0" * 64))


def test_a_missing_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = importlib.import_module("fsspec.registry")  # the package has a mapping of that name
    missing = {"class": "no_such_driver.Store", "err": "Install no_such_driver to access faraway"}
    monkeypatch.setitem(registry.known_implementations, "faraway", missing)
    assert "Install no_such_driver" in refused("faraway://bucket/x").do


def test_trouble_in_a_store_is_an_error_worth_another_try(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("timed out at https://someone:hidden@example.invalid/?sig=hidden")

    monkeypatch.setattr(type(store), "get_file", fail)
    error = refused("memory://bucket/one.csv")
    assert error.transient
    assert "timed out" in str(error)
    assert "hidden" not in str(error)
