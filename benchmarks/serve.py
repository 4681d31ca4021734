"""Serving against ``mlflow models serve``: latency and requests per second at 1, 8 and 32 clients.

Run it in a project with ``make bench-serve``, after ``make demo`` has registered both models. The two servers
hold the same version in one process each and run by turns, each alone; the clients live in a process of their
own, keep their connections, and send one text or one image at a time, the next as soon as it is answered.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from typing import Any

import numpy as np
import pandas as pd
from results import keep

from headstart import environment

CLIENTS, ROUNDS, SECONDS, WARM = (1, 8, 32), 3, 6.0, 2.0
ITEMS = 64
ROOT = environment.project_root()


def bodies(recipe: str) -> list[bytes]:
    """Requests of one row each, of the recipe's own data."""
    path = ROOT / "manifest" / recipe / "manifest.parquet"
    if not path.exists():
        raise SystemExit("there are no data yet: run `make demo` first")
    rows = pd.read_parquet(path).sample(ITEMS, random_state=0)
    if "text" in rows:
        items = [{"text": text} for text in rows["text"]]
    else:
        files = [ROOT / "data" / recipe / name for name in rows["path"]]
        items = [{"image": base64.b64encode(file.read_bytes()).decode()} for file in files]
    return [json.dumps({"dataframe_records": [item]}).encode() for item in items]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def start(command: list[str], port: int) -> subprocess.Popen[bytes]:
    """A server that answers."""
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, start_new_session=True, cwd=ROOT, **quiet)
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
            return server
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"{' '.join(command)} ended with {server.returncode}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End a server and its workers, and see them gone."""
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(30)
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(server.pid, 0)
            time.sleep(0.1)


def load(port: int, clients: int, sent: list[bytes], results: Any) -> None:
    """Ask for ``WARM`` and ``SECONDS`` seconds; put the latencies of the latter, in seconds."""
    begin = time.perf_counter() + WARM
    latencies: list[list[float]] = [[] for _ in range(clients)]

    def client(number: int) -> None:
        line = http.client.HTTPConnection("127.0.0.1", port)
        turn = number
        while (before := time.perf_counter()) < begin + SECONDS:
            line.request("POST", "/invocations", sent[turn % ITEMS], {"Content-Type": "application/json"})
            answer = line.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise SystemExit(text.decode())
            if before >= begin:
                latencies[number].append(time.perf_counter() - before)
            turn += 1
        line.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put([each for found in latencies for each in found])


def measure(name: str, commands: dict[str, list[str]]) -> list[dict[str, Any]]:
    """One line per server and number of clients."""
    sent = bodies(name)
    fresh = multiprocessing.get_context("spawn")
    found: dict[tuple[str, int], list[list[float]]] = {}
    for _ in range(ROUNDS):
        for way, command in commands.items():
            port = free_port()
            server = start([*command, "--port", str(port)], port)
            for clients in CLIENTS:
                results = fresh.Queue()
                child = fresh.Process(target=load, args=(port, clients, sent, results))
                child.start()
                found.setdefault((way, clients), []).append(results.get(timeout=120))
                child.join()
            stop(server)
    return [
        {
            "model": name,
            "server": way,
            "clients": clients,
            "p50 ms": 1000 * float(np.median([np.percentile(each, 50) for each in rounds])),
            "p95 ms": 1000 * float(np.median([np.percentile(each, 95) for each in rounds])),
            "requests/s": float(np.median([len(each) / SECONDS for each in rounds])),
        }
        for (way, clients), rounds in found.items()
    ]


def main() -> None:
    environment.prepare(ROOT)
    rows = []
    for name in ("sentiment", "solar-cells"):
        local = ["--env-manager", "local", "--workers", "1"]
        rows += measure(
            name,
            {
                "headstart": ["headstart", "serve", name],
                "mlflow": ["mlflow", "models", "serve", "-m", f"models:/{name}@champion", *local],
            },
        )
    table = pd.DataFrame(rows).sort_values(["model", "clients", "server"])
    print(f"one process each, {os.cpu_count()} cores, medians of {ROUNDS} rounds of {SECONDS:.0f} s\n")
    print(table.to_string(index=False, float_format="{:.4g}".format))
    figures = {
        f"{line['model']}_{line['server']}_{line['clients']}_{key}": round(line[column], 2)
        for line in table.to_dict("records")
        for key, column in (("p50_ms", "p50 ms"), ("p95_ms", "p95 ms"), ("requests_s", "requests/s"))
    }
    keep("serve", figures)


if __name__ == "__main__":
    main()
