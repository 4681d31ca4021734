"""An S3 server on loopback for as long as a test needs it: SeaweedFS, which checks every signature."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.processes import answers, running
from tests.servers import free_port

PATIENCE = 60
BUCKET = "headstart"
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


@contextmanager
def s3(folder: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """The variables by which a client finds an empty bucket, and may write to it."""
    parts = ("master", "volume", "filer", "s3")
    ports = {f"{part}.port{kind}": free_port() for part in parts for kind in ("", ".grpc")}
    ports["admin.port"] = free_port()
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    options = {
        "dir": str(folder / "s3"),
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.telemetry": "false",
        "s3.port.iceberg": "0",
        "s3.port.lance": "0",
        "webdav": "false",
        "admin.ui": "false",
        # Its sockets stand in /tmp otherwise, and stay there.
        "filer.localSocket": str(folder / "filer.sock"),
        "s3.localSocket": str(folder / "s3.sock"),
        "bucket": BUCKET,
        **{name: str(port) for name, port in ports.items()},
    }
    (folder / "s3").mkdir()
    command = ["weed", "-logtostderr", "mini", *(f"-{name}={value}" for name, value in options.items())]
    with running(*command, environment=environment | KEYS, log=folder / "s3.log"):
        answers(f"{endpoint}/healthz", PATIENCE)
        yield KEYS | {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
