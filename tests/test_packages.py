"""A package comes from wherever pip is told to look, and is never run; nothing leaves loopback."""

from __future__ import annotations

import hashlib
import io
import logging
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from headstart import sources
from tests import servers
from tests.servers import Loopback, refused, serving

own_world, closed = servers.own_world, servers.closed


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


@pytest.mark.parametrize("uri", ["pip:elpv-dataset", "pip:elpv-dataset>=1.0", "pip:elpv-dataset==1.*"])
def test_a_package_without_one_exact_version_is_an_error(uri: str) -> None:
    error = refused(uri)
    assert "not pinned" in error.what
    assert "pip:NAME==VERSION" in error.do
