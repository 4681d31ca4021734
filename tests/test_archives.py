"""Whatever an archive holds, only plain files come out of it, and only inside the folder."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from headstart import archives
from headstart.errors import HeadstartError

FILES = {"top/data/a.csv": b"a", "top/data/deep/b.csv": b"bb", "top/read.me": b"ccc"}
SUFFIXES = [".zip", ".whl", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"]


def packed(path: Path, files: dict[str, bytes]) -> Path:
    """An archive of the kind that the path's suffix says."""
    if path.suffix in {".zip", ".whl"}:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    compression = {".gz": "gz", ".tgz": "gz", ".bz2": "bz2", ".xz": "xz"}.get(path.suffix, "")
    with tarfile.open(path, f"w:{compression}") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o777
            tar.addfile(info, io.BytesIO(content))
    return path


def tar_of(path: Path, *infos: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        for info in infos:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def held(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "around" / "folder").mkdir(parents=True)
    return tmp_path / "around" / "folder"


def refused(path: Path, member: str | None, folder: Path) -> str:
    """The error; nothing may have come to stand beside the folder."""
    with pytest.raises(HeadstartError) as caught:
        archives.place(path, member, folder)
    assert list(folder.parent.iterdir()) == [folder]
    assert len(str(caught.value).splitlines()) <= 24
    return str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_is_unpacked(suffix: str, tmp_path: Path, folder: Path) -> None:
    assert archives.place(packed(tmp_path / f"x{suffix}", FILES), None, folder) == folder
    assert held(folder) == FILES


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("member", ["top/data", "./top/data/", "/top/data"])
def test_of_a_folder_in_an_archive_the_content_lands_directly(
    suffix: str, member: str, tmp_path: Path, folder: Path
) -> None:
    assert archives.place(packed(tmp_path / f"x{suffix}", FILES), member, folder) == folder
    assert held(folder) == {"a.csv": b"a", "deep/b.csv": b"bb"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_file_of_an_archive_lands_under_its_own_name(suffix: str, tmp_path: Path, folder: Path) -> None:
    placed = archives.place(packed(tmp_path / f"x{suffix}", FILES), "top/data/deep/b.csv", folder)
    assert placed == folder / "b.csv"
    assert held(folder) == {"b.csv": b"bb"}


def test_a_plain_file_is_copied_under_its_own_name(tmp_path: Path, folder: Path) -> None:
    weights = packed(tmp_path / "weights.zip", FILES).rename(tmp_path / "weights.pth")  # a zip file in truth
    assert archives.place(weights, None, folder) == folder / "weights.pth"
    assert held(folder) == {"weights.pth": weights.read_bytes()}


def test_of_a_folder_the_content_is_copied_or_one_member_of_it(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "mine/deep").mkdir(parents=True)
    (tmp_path / "mine/a").write_bytes(b"1")
    (tmp_path / "mine/deep/b").write_bytes(b"2")
    packed(tmp_path / "mine/c.zip", {"in/c": b"3"})
    archives.place(tmp_path / "mine", "deep", folder)
    assert held(folder) == {"b": b"2"}
    archives.place(tmp_path / "mine", "c.zip/in", folder)
    assert held(folder) == {"b": b"2", "c": b"3"}
    (tmp_path / "all").mkdir()
    archives.place(tmp_path / "mine", None, tmp_path / "all")
    assert set(held(tmp_path / "all")) == {"a", "deep/b", "c.zip"}  # an archive nobody named stays one
    assert (tmp_path / "mine/c.zip").exists()


@pytest.mark.parametrize(("member", "expected"), [
    ("sdist-1/in.tar.gz", {"data/a": b"1", "data/b": b"2"}),
    ("sdist-1/in.tar.gz/data", {"a": b"1", "b": b"2"}),
    ("sdist-1/in.tar.gz/data/b", {"b": b"2"}),
])  # fmt: skip
def test_an_archive_inside_an_archive_is_unpacked_when_it_is_named(
    member: str, expected: dict[str, bytes], tmp_path: Path, folder: Path
) -> None:
    inner = packed(tmp_path / "in.tar.gz", {"data/a": b"1", "data/b": b"2"}).read_bytes()
    outer = packed(tmp_path / "out.zip", {"sdist-1/in.tar.gz": inner, "sdist-1/setup.py": b""})
    archives.place(outer, member, folder)
    assert held(folder) == expected
    assert not (folder / archives.NESTED).exists()


def test_archives_may_lie_in_each_other(tmp_path: Path, folder: Path) -> None:
    content = {"data/a": b"1"}
    for name in ("in.tar.gz", "middle.zip", "out.tar"):
        content = {f"deep/{name}": packed(tmp_path / name, content).read_bytes()}
    archives.place(tmp_path / "out.tar", "deep/middle.zip/deep/in.tar.gz/data", folder)
    assert held(folder) == {"a": b"1"}
    assert not (folder / archives.NESTED).exists()


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize(
    "name", ["../evil", "data/../../evil", "/tmp/evil", "C:\\evil", "c:/evil", "..\\..\\evil", "\\evil"]
)
def test_nothing_is_written_outside_of_the_folder(
    name: str, suffix: str, tmp_path: Path, folder: Path
) -> None:
    text = refused(packed(tmp_path / f"x{suffix}", {name: b"evil"}), None, folder)
    assert name.replace("\\", "/") in text
    assert held(folder) == {}


@pytest.mark.parametrize(
    "info",
    [
        special("data/link", tarfile.SYMTYPE, "/etc/passwd"),
        special("data/link", tarfile.SYMTYPE, "beside"),
        special("data/link", tarfile.LNKTYPE, "data/a"),
        special("data/link", tarfile.CHRTYPE),
        special("data/link", tarfile.BLKTYPE),
        special("data/link", tarfile.FIFOTYPE),
    ],
    ids=["symlink-out", "symlink-in", "hardlink", "character-device", "block-device", "pipe"],
)
def test_links_and_devices_in_a_tar_are_refused_by_name(
    info: tarfile.TarInfo, tmp_path: Path, folder: Path
) -> None:
    assert "data/link" in refused(tar_of(tmp_path / "x.tar", info), None, folder)
    assert list(folder.iterdir()) == []


def test_a_link_in_a_zip_is_refused_by_name(tmp_path: Path, folder: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("data/link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    assert "data/link" in refused(tmp_path / "x.zip", None, folder)


def test_what_nobody_wants_does_no_harm(tmp_path: Path, folder: Path) -> None:
    good = tarfile.TarInfo("data/a")
    good.size = 3
    path = tar_of(tmp_path / "x.tar", special("elsewhere", tarfile.SYMTYPE, "/etc"), good)
    archives.place(path, "data", folder)
    assert held(folder) == {"a": b"xxx"}


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz", ".tar.xz"])
def test_a_bomb_is_stopped_while_it_grows(
    suffix: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "RATIO_FROM", 1 << 20)
    path = packed(tmp_path / f"x{suffix}", {"zeros": bytes(8 << 20)})
    assert "200 times its size" in refused(path, None, folder)
    assert sum(map(len, held(folder).values())) <= max(1 << 20, 200 * path.stat().st_size)


def test_a_bomb_inside_an_archive_is_stopped_too(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "RATIO_FROM", 1 << 20)
    inner = packed(tmp_path / "in.zip", {"zeros": bytes(8 << 20)}).read_bytes()
    assert "200 times" in refused(packed(tmp_path / "out.tar", {"in.zip": inner}), "in.zip", folder)


def test_the_total_size_is_bounded(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 1 << 20)
    noise = os.urandom(400_000)
    path = packed(tmp_path / "x.zip", dict.fromkeys("abc", noise))
    assert "GiB" in refused(path, None, folder)


def test_the_number_of_files_is_bounded(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_FILES", 10)
    text = refused(packed(tmp_path / "x.tar", {f"{i}": b"" for i in range(20)}), None, folder)
    assert "more than 10 files and folders" in text
    folders = [special(f"{i}", tarfile.DIRTYPE) for i in range(20)]
    assert "more than 10 files and folders" in refused(tar_of(tmp_path / "y.tar", *folders), None, folder)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE])
@pytest.mark.parametrize("first", [True, False])
def test_a_name_without_end_is_never_read(kind: bytes, first: bool, tmp_path: Path, folder: Path) -> None:
    endless = special("name", kind)
    endless.size = archives.MAX_HEADER + 1
    path = tar_of(tmp_path / "x.tar", *([] if first else [special("a", tarfile.REGTYPE)]), endless)
    assert "a header of 262,145 bytes" in refused(path, None, folder)


def test_sizes_and_names_that_cannot_be_are_damage(tmp_path: Path, folder: Path) -> None:
    backwards = special("x", tarfile.REGTYPE)
    backwards.size = -(1 << 20)
    (tmp_path / "x.tar").write_bytes(backwards.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert "damaged" in refused(tmp_path / "x.tar", None, folder)
    path = packed(tmp_path / "x.zip", {"x": b"1"})
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 28], content[directory + 30] = 0, 1  # no name, and a byte of something else
    path.write_bytes(content)
    assert "damaged" in refused(path, None, folder)


def test_a_file_may_lie_in_many_folders_but_not_in_any_number(tmp_path: Path, folder: Path) -> None:
    name = "d/" * archives.MAX_FOLDERS + "x"
    for suffix in (".zip", ".tar"):
        text = refused(packed(tmp_path / f"x{suffix}", {f"d/{name}": b"1"}), None, folder)
        assert "a path of more than 100 folders" in text
    archives.place(packed(tmp_path / "y.tar", {name: b"1"}), None, folder)
    assert held(folder) == {name: b"1"}


def test_a_missing_member_names_the_nearest_ones(tmp_path: Path, folder: Path) -> None:
    path = packed(tmp_path / "x.zip", FILES)
    assert "top/data/deep/b.csv" in refused(path, "data/deep/b.csv", folder)
    assert "top/data\n" in refused(path, "top/dat", folder)
    assert "top" in refused(path, "zzz", folder)


def test_a_member_of_a_plain_file_is_an_error(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"")
    assert "there is no member 'data'" in refused(tmp_path / "a.csv", "data", folder)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_archive_is_an_error(suffix: str, tmp_path: Path, folder: Path) -> None:
    path = packed(tmp_path / f"x{suffix}", {"noise": os.urandom(300_000)})
    path.write_bytes(path.read_bytes()[:200_000])
    assert "damaged or incomplete" in refused(path, None, folder)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>" * 100], ids=["empty", "a web page"])
def test_what_is_no_archive_is_an_error(suffix: str, content: bytes, tmp_path: Path, folder: Path) -> None:
    (tmp_path / f"x{suffix}").write_bytes(content)
    assert "damaged or incomplete" in refused(tmp_path / f"x{suffix}", None, folder)


def test_flipped_bits_are_an_error(tmp_path: Path, folder: Path) -> None:
    path = packed(tmp_path / "x.zip", {"noise": os.urandom(1000)})
    content = bytearray(path.read_bytes())
    content[500] ^= 0xFF
    path.write_bytes(content)
    assert "damaged" in refused(path, None, folder)


def test_a_zip_in_a_compression_that_python_lacks_is_not_called_damaged(tmp_path: Path, folder: Path) -> None:
    path = packed(tmp_path / "x.zip", {"photo": b"1" * 1000})
    content = bytearray(path.read_bytes())
    deflate64 = b"\x09\x00"
    content[8:10] = deflate64  # in the file's own header, and in the central directory
    place = content.index(b"PK\x01\x02") + 10
    content[place : place + 2] = deflate64
    path.write_bytes(content)
    text = refused(path, None, folder)
    assert "packed in a way that Python cannot read" in text
    assert "pack it again" in text
    assert "damaged" not in text


def test_names_that_cannot_be_files_together_are_an_error(tmp_path: Path, folder: Path) -> None:
    assert "damaged" in refused(packed(tmp_path / "x.tar", {"a": b"1", "a/b": b"2"}), None, folder)
    long = packed(tmp_path / "y.zip", {"n" * 300: b"1"})
    with pytest.raises(HeadstartError, match="damaged"):
        archives.place(long, None, folder)


@pytest.mark.parametrize(
    "pair", [("Cat/1.jpg", "cat/2.jpg"), ("cat/A.jpg", "cat/a.jpg")], ids=["folders", "files"]
)
def test_what_is_one_name_on_this_disk_is_an_error_and_not_one_file_fewer(
    pair: tuple[str, str], tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for member in pair:
            archive.writestr(member, member)
    archives.place(tmp_path / "pets.zip", None, folder)
    assert sum(path.is_file() for path in folder.rglob("*")) == 2  # of a disk that tells them apart
    shutil.rmtree(folder)
    folder.mkdir()
    exists = Path.exists

    def folded(path: Path) -> bool:
        beside = path.parent.iterdir() if exists(path.parent) else ()
        return path.name.casefold() in {other.name.casefold() for other in beside}

    monkeypatch.setattr(Path, "exists", folded)
    with pytest.raises(HeadstartError, match="differ in capitals or accents alone"):
        archives.place(tmp_path / "pets.zip", None, folder)


@pytest.mark.parametrize("name", ["Äpfel/1.jpg", "日本/1.jpg"])
def test_names_in_a_zip_may_be_utf_8_without_the_flag_that_says_so(
    name: str, tmp_path: Path, folder: Path
) -> None:
    stand_in = "x" * len(name.encode())
    path = packed(tmp_path / "x.zip", {stand_in: b"a"})
    path.write_bytes(path.read_bytes().replace(stand_in.encode(), name.encode()))
    archives.place(path, name.partition("/")[0], folder)
    assert held(folder) == {"1.jpg": b"a"}


def test_names_in_a_zip_may_be_those_of_dos(tmp_path: Path, folder: Path) -> None:
    path = packed(tmp_path / "x.zip", {"xpfel/1.jpg": b"a"})
    path.write_bytes(path.read_bytes().replace(b"xpfel", "Äpfel".encode("cp437")))
    archives.place(path, None, folder)
    assert held(folder) == {"Äpfel/1.jpg": b"a"}


def test_an_encrypted_file_is_refused(tmp_path: Path, folder: Path) -> None:
    path = packed(tmp_path / "x.zip", {"secret": b"123"})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag in the central directory
    path.write_bytes(content)
    assert "encrypted" in refused(path, None, folder)


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_litter_of_macos_is_left_out(suffix: str, tmp_path: Path, folder: Path) -> None:
    litter = {"__MACOSX/a/._x.png": b"", "a/.DS_Store": b"", "a/__MACOSX/y": b""}
    archives.place(packed(tmp_path / f"x{suffix}", {"a/x.png": b"1"} | litter), None, folder)
    assert held(folder) == {"a/x.png": b"1"}


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_files_are_readable_by_all_and_never_executable(suffix: str, tmp_path: Path, folder: Path) -> None:
    before = os.umask(0o077)
    try:
        archives.place(packed(tmp_path / f"x{suffix}", FILES), None, folder)
    finally:
        os.umask(before)
    modes = {path.is_dir(): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    assert modes == {True: 0o755, False: 0o644}


def test_a_link_in_a_folder_of_ones_own_is_followed_and_a_broken_one_named(
    tmp_path: Path, folder: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "mine/link").symlink_to(tmp_path / "a")
    archives.place(tmp_path / "mine", None, folder)
    assert held(folder) == {"link": b"1"}
    assert not (folder / "link").is_symlink()
    (folder / "link").unlink()
    (tmp_path / "mine/lost").symlink_to(tmp_path / "nowhere")
    text = refused(tmp_path / "mine", None, folder)
    assert "the folder holds a broken link" in text
    assert "mine: lost" in text
    assert "mend or delete it" in text
    assert "trust" not in text


def test_what_editors_and_programs_hide_in_a_folder_of_ones_own_is_passed_over(
    tmp_path: Path, folder: Path
) -> None:
    mine = tmp_path / "mine"
    (mine / ".cache").mkdir(parents=True)
    (mine / "t.csv").write_bytes(b"1")
    (mine / ".hidden").write_bytes(b"2")
    (mine / ".#t.csv").symlink_to("someone@host.123:456")
    (mine / ".cache/lost").symlink_to("nowhere")
    os.mkfifo(mine / ".pipe")
    archives.place(mine, None, folder)
    assert held(folder) == {"t.csv": b"1", ".hidden": b"2"}


def test_a_link_that_leads_back_brings_nothing_twice(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "mine/deep").mkdir(parents=True)
    (tmp_path / "mine/deep/a").write_bytes(b"1")
    (tmp_path / "mine/deep/back").symlink_to(tmp_path / "mine")
    archives.place(tmp_path / "mine", None, folder)
    assert held(folder) == {"deep/a": b"1"}
