"""A source is fetched once, whole and verified, or an error says what to do; nothing leaves loopback."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headstart import sources
from tests import servers
from tests.servers import COMMIT, DATA, DIGEST, FETCH, Loopback, in_process, offer, partial, refused, serving

own_world, server, closed = servers.own_world, servers.server, servers.closed


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


def test_a_pinned_file_that_was_changed_in_the_cache_is_fetched_anew(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = DATA[:-1] + bytes([DATA[-1] ^ 1])
    kept = sources.fetch(f"{server.url}/data.zip", DIGEST)
    kept.write_bytes(changed)
    monkeypatch.setenv("HEADSTART_OFFLINE", "1")
    assert "as it should be" in refused(f"{server.url}/data.zip", DIGEST).what
    monkeypatch.delenv("HEADSTART_OFFLINE")
    assert sources.fetch(f"{server.url}/data.zip", DIGEST).read_bytes() == DATA
    assert server.downloads("/data.zip") == ["", ""]


def test_a_damaged_record_in_the_cache_is_not_trusted(server: Loopback, tmp_path: Path) -> None:
    sources.fetch(f"{server.url}/data.zip", DIGEST)
    (record,) = (tmp_path / "cache").rglob("sha256-*.json")
    record.write_text("{")
    assert sources.fetch(f"{server.url}/data.zip", DIGEST).read_bytes() == DATA


def test_two_processes_download_once(server: Loopback) -> None:
    server.hold = 1000
    both = [in_process(f"{server.url}/data.zip", DIGEST) for _ in range(2)]
    for _ in range(6000):
        if server.asked:
            break
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


def test_pieces_of_two_files_are_noticed_and_fetched_whole(server: Loopback) -> None:
    server.tagged, server.drops = False, [500_000, 0, 0, 0]
    wanted = os.urandom(1 << 20)
    digest = hashlib.sha256(wanted).hexdigest()
    refused(f"{server.url}/data.zip", digest)  # leaves the start of the old file
    server.files["/data.zip"] = wanted
    server.drops.clear()
    assert sources.fetch(f"{server.url}/data.zip", digest).read_bytes() == wanted


def test_a_cache_that_cannot_be_made_is_an_error(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "file"))
    assert "HEADSTART_CACHE" in refused(f"{server.url}/data.zip").do


# What a URI is


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


def fetched(*arguments: str, **environment: str) -> tuple[Path, str]:
    """Fetch in a process of its own, because the hub's client reads HF_ENDPOINT when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", FETCH, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    return Path(done.stdout.strip() or "none"), done.stderr


def test_a_folder_has_a_digest_whatever_bytes_its_names_are(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))
    odd.write_bytes(b"1")
    assert len(sources.digest_of(tmp_path)) == 64


def test_the_digest_of_a_folder_covers_what_its_links_lead_to(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    for name in ("b/1", "b.c/2", "a", ".hidden/3"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text(name)
    names = [".hidden/3", "a", "b.c/2", "b/1"]
    lines = "".join(f"{name}\0{hashlib.sha256(name.encode()).hexdigest()}\n" for name in names)
    assert sources.digest_of(mine) == hashlib.sha256(lines.encode()).hexdigest()
    other.mkdir()
    (other / "4").write_text("4")
    (mine / "cat").symlink_to(other)
    before = sources.digest_of(mine)
    (other / "4").write_text("5")
    assert sources.digest_of(mine) != before
    (mine / "b/back").symlink_to(mine)
    assert [file.relative_to(mine).as_posix() for file in sources.files_of(mine)] == [
        "a",
        ".hidden/3",
        "b/1",
        "b.c/2",
        "cat/4",
    ]


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


def test_of_a_folder_that_failed_half_way_only_what_is_missing_or_has_changed_comes_again(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "FILES_AT_ONCE", 4)
    store.pipe({f"/bucket/many/{i:02}.txt": b"%d" % i for i in range(20)})
    get_file, asked = type(store).get_file, []

    def get(self: Any, path: str, *rest: Any, **options: Any) -> None:
        if len(asked) == 14:
            raise RuntimeError("the store is down")
        asked.append(path.rpartition("/")[2])
        get_file(self, path, *rest, **options)

    monkeypatch.setattr(type(store), "get_file", get)
    assert refused("memory://bucket/many").transient
    store.pipe("/bucket/many/00.txt", b"another")
    store.rm("/bucket/many/01.txt")
    asked[:] = ["of the second try"]
    folder = sources.fetch("memory://bucket/many")
    assert asked[1:] == ["00.txt", *(f"{i:02}.txt" for i in range(12, 20))]
    expected = {f"{i:02}.txt": b"%d" % i for i in range(2, 20)} | {"00.txt": b"another"}
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == expected
    assert not [*folder.parent.parent.glob("download.part*")]


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
