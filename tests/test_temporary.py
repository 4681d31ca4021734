"""A command without a Prefect server has one of its own, which is gone when the command is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from headstart import environment, temporary
from headstart.errors import HeadstartError

STARTED = """
from headstart import temporary
server = temporary.Server()
server.wait()
print(server.process.pid, server.api, flush=True)
input()
"""


@pytest.fixture(autouse=True)
def nothing_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PREFECT_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("prefect.toml", "[api]"),
        (".env", "PREFECT_API_URL=http://prefect.example.com/api"),
        ("pyproject.toml", '[tool.prefect.api]\nurl = "http://prefect.example.com/api"'),
        ("prefect/profiles.toml", 'active = "cloud"'),
        ("elsewhere/profiles.toml", 'active = "cloud"'),
    ],
)
def test_whoever_configures_prefect_is_left_to_it(
    tmp_path: Path, file: str, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if file.startswith("elsewhere"):
        monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / file))
    assert not temporary.configured(tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    assert temporary.configured(tmp_path)


def test_a_server_that_is_named_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.ruff]")
    (tmp_path / ".env").write_text("AWS_PROFILE=ours")
    assert not temporary.configured(tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    assert temporary.configured(tmp_path)


def test_projects_keep_prefects_records_apart_unless_it_is_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])

    def home(project: str, **given: str) -> str | None:
        monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)} | given)
        environment.prepare(tmp_path / project)
        return os.environ.get("PREFECT_HOME")

    for project in ("here", "there"):
        assert home(project) == str(tmp_path / project / ".prefect")
    assert home("here", PREFECT_HOME="/chosen") == "/chosen"
    assert home("here", PREFECT_PROFILE="cloud") is None
    (tmp_path / "there").mkdir()
    (tmp_path / "there/.env").write_text("PREFECT_HOME=/chosen")
    assert home("there") is None
    for nobodys in ("/" + "x" * 5000, "~nobody-of-this-name"):  # cannot be entered, or is not known
        assert home("here", HOME=nobodys) == str(tmp_path / "here/.prefect")
    (tmp_path / ".prefect").mkdir()
    (tmp_path / ".prefect/profiles.toml").write_text('active = "cloud"')
    assert home("here") is None


@pytest.mark.parametrize(
    ("given", "spared"),
    [
        ({}, None),
        ({"http_proxy": "http://proxy.example.com"}, "127.0.0.1,localhost"),
        ({"http_proxy": "http://proxy.example.com", "no_proxy": "*", "NO_PROXY": "*"}, "*"),
        ({"HTTPS_PROXY": "http://proxy", "NO_PROXY": "localhost, .corp"}, "localhost,.corp,127.0.0.1"),
    ],
)
def test_a_proxy_is_not_asked_for_what_runs_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], spared: str | None
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)} | given)
    environment.prepare(tmp_path)
    assert os.environ.get("no_proxy") == os.environ.get("NO_PROXY") == spared


@pytest.mark.slow
@pytest.mark.parametrize("ending", [pytest.param("by itself", marks=pytest.mark.long), "killed"])
def test_the_server_answers_its_command_alone_and_ends_with_it(ending: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as command:
        assert command.stdin
        assert command.stdout
        number, api = command.stdout.readline().split()
        server = psutil.Process(int(number))
        with urllib.request.urlopen(f"{api}/health", timeout=5) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):  # for the command alone
            urllib.request.urlopen(f"{api}/admin/version", timeout=5)
        if ending == "killed":
            command.send_signal(signal.SIGKILL)
        else:
            command.stdin.write("\n")
            command.stdin.close()
        command.wait()
    deadline = time.monotonic() + 60
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why_in_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    home = str(tmp_path / "file" / "prefect")
    server = temporary.Server(os.environ | {"PREFECT_HOME": home})
    with pytest.raises(HeadstartError, match="unable to open database file") as error:
        server.wait()
    assert home in str(error.value)
    assert len(str(error.value).splitlines()) == 3
    server.stop()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_what_a_server_says_while_it_runs_is_passed_on_at_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; print('a warning', file=sys.stderr)")
    server = temporary.Server(os.environ | {"PYTHONPATH": str(tmp_path)})
    server.wait()
    assert capfd.readouterr().err == ""
    server.stop()
    assert capfd.readouterr().err == "a warning\n"
