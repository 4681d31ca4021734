"""An S3 server on loopback for as long as a test needs it: SeaweedFS, which checks every signature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.processes import answers, running
from tests.servers import free_port

PATIENCE = 60
BUCKET = "headstart"
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
MINI = ["mini", f"-bucket={BUCKET}", "-master.telemetry=false", "-admin.ui=false", "-webdav=false"]
MINI += ["-s3.port.iceberg=0", "-s3.port.lance=0"]


@contextmanager
def s3(folder: Path, environment: dict[str, str], command: Sequence[str] = MINI) -> Iterator[dict[str, str]]:
    """The variables by which a client finds an empty bucket, and may write to it."""
    parts = ("master", "volume", "filer", "s3")
    ports = {f"{part}.port{kind}": free_port() for part in parts for kind in ("", ".grpc")}
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    here = {
        "dir": folder / "s3",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        # Its sockets stand in /tmp otherwise, and stay there.
        "filer.localSocket": folder / "filer.sock",
        "s3.localSocket": folder / "s3.sock",
        "admin.port": free_port(),
        **ports,
    }
    (folder / "s3").mkdir()
    # What is said last holds.
    told = ["weed", "-logtostderr", *command, *(f"-{name}={value}" for name, value in here.items())]
    with running(*told, environment=environment | KEYS, log=folder / "s3.log"):
        answers(f"{endpoint}/healthz", PATIENCE)
        yield KEYS | {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
