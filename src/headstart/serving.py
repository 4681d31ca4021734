"""Serving: a registered model behind MLflow's own scoring server, and a page to try it on.

Goes in: a version of the registry. Comes out: one process that answers ``/ping``, ``/health``, ``/version``
and ``/invocations`` as ``mlflow models serve`` does, ``/model`` and ``/explain``, and a page at ``/``. Never
changes the registry, never reads a file that a request names, and never answers with a stack trace.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import ipaddress
import json
import logging
import signal
import socket
import warnings
from collections.abc import Awaitable, Callable, Collection, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from headstart import environment
from headstart.errors import HeadstartError
from headstart.models import Answers, Model, Version

if TYPE_CHECKING:
    import pandas as pd
    from fastapi import FastAPI

    from headstart.attributions import Explainer
    from headstart.features import Item
    from headstart.heads import Singles

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MOST_BYTES = 32 << 20  # of a request: some twenty photographs
MOST_SECONDS = 120  # for a request to come whole
MOST_ROWS = 10_000  # of a request: a minute's work; `headstart predict` takes any number
MOST_UNPACKED = 8 * MOST_BYTES  # of Parquet, which may hold much in little
MOST_PIXELS = 50_000_000  # of a picture: 200 MB once decoded, whatever the size of its file
WARM, OPAQUE = (255, 80, 0), 200  # colour of a map, and how much it covers where it is 1
THREADS = 32  # requests that are parsed, and wait for the network, at a time
NAMES = (*environment.THIS_MACHINE, "::1")  # what it is called, at an address that only it can reach
STOPS = (signal.SIGINT, signal.SIGTERM)
PAGE = Path(__file__).with_name("page.html")
POLICY = (  # what the page may load: itself
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data: blob:"
)
log = logging.getLogger(__name__)


class Question(BaseModel):
    """What ``/explain`` is asked."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str | None = None
    image: str | None = None  # base64 of a file's bytes
    label: str | None = None  # to explain; without it, the one that the model names


class Queue:
    """A model that is asked by many threads, and answers those who wait together in one pass.

    Whoever has the turn takes along all who have come while another had it (flat combining, Hendler et al.
    2010); nobody waits for company. An item that cannot be read is the trouble of those who sent it.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.turn, self.listing = Lock(), Lock()
        self.waiting: list[tuple[Sequence[Item], Future[Answers]]] = []

    def __call__(self, items: Sequence[Item]) -> Answers:
        """What the model says of the items; raises what it raises."""
        mine: Future[Answers] = Future()
        with self.listing:
            self.waiting.append((items, mine))
        with self.turn:
            if not mine.done():
                with self.listing:
                    taken, self.waiting = self.waiting, []
                self._answer(taken)
        return mine.result()

    def _answer(self, taken: list[tuple[Sequence[Item], Future[Answers]]]) -> None:
        try:
            said = self.model([item for items, _ in taken for item in items])
        except Exception as error:
            if len(taken) == 1:
                taken[0][1].set_exception(error)
                return
            for each in taken:
                self._answer([each])
            return
        start = 0
        for items, asked in taken:
            part = slice(start, start := start + len(items))
            asked.set_result(Answers(said.labels[part], said.probabilities[part]))


class Served:
    """What MLflow's scoring server needs of a model: its signature, and answers to data frames."""

    def __init__(self, version: Version) -> None:
        from mlflow.models import Model as Described

        self.metadata = Described.load(str(version.folder))
        self.model = version.model
        self.queue = Queue(version.model)

    def predict(self, data: Any, params: Any = None) -> pd.DataFrame:
        """Label and class probabilities of each row, as the registered model gives them.

        Raises:
            MlflowException: rows that the model cannot read, or too many; in words, answered with status
                400 or 413.
        """
        import pandas as pd
        from mlflow.exceptions import MlflowException

        try:
            items = _items(data, self.model)
            if much := _too_many(len(items)):
                refused = MlflowException(much)
                refused.get_http_status_code = lambda: 413  # MLflow's own codes have no name for it
                raise refused
            labels, probabilities = self.queue(items)
        except HeadstartError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        table = pd.DataFrame(probabilities, columns=[f"p:{name}" for name in self.model.classes])
        table.insert(0, "label", labels)
        return table


def _items(rows: Any, model: Model) -> list[Item]:
    """The column that the model reads, of whatever MLflow makes of the forms that it takes."""
    import pandas as pd

    kind = model.modality
    if isinstance(rows, dict):
        rows = {name: np.atleast_1d(values) for name, values in rows.items()}
    try:
        table = pd.DataFrame(rows)
    except ValueError as error:  # columns of different lengths, or half a character
        raise HeadstartError("the rows are no table", table=[str(error)]) from None
    if kind not in table:
        given = ", ".join(map(str, table)) or "none"
        raise HeadstartError(f"the rows need a column {kind}", where=f"the columns are: {given:.200}")
    items: list[Item] = table[kind].tolist()
    for place, item in enumerate(items):
        if not isinstance(item, str if kind == "text" else bytes):
            raise HeadstartError(f"this is no {kind}", where=f"row {place}: {item!r:.100}")
    return items


def app_of(version: Version, names: Collection[str]) -> FastAPI:
    """MLflow's scoring server around the version, with a page and explanations added.

    Args:
        version: that ``models.load`` gave.
        names: what the server is called; requests to another name are refused. Empty: it goes by any.
    """
    from fastapi import HTTPException
    from mlflow.pyfunc import scoring_server
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, Response

    from headstart.attributions import Explainer

    model, served = version.model, Served(version)
    explainer = Explainer(model)

    def page(request: Request) -> Response:
        return FileResponse(PAGE, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})

    def described(request: Request) -> Response:
        return JSONResponse(
            {
                "name": version.name,
                "version": version.version,
                "reads": model.modality,
                "classes": model.classes,
                "most_bytes": MOST_BYTES,
            }
        )

    async def explain(request: Request) -> Response:
        # A browser sends anything else for any page, without asking whether it may.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "a question comes with Content-Type: application/json")
        body = await request.body()
        return JSONResponse(await asyncio.to_thread(_explained, body, served.queue, explainer))

    app: FastAPI = scoring_server.init(served)
    # FastAPI's own pages are made of scripts from elsewhere.
    foreign = ("/docs", "/docs/oauth2-redirect", "/redoc")
    app.router.routes[:] = [each for each in app.router.routes if getattr(each, "path", "") not in foreign]
    app.add_route("/", page)
    app.add_route("/model", described)
    app.add_route("/explain", explain, methods=["POST"])
    app.add_middleware(Guard, names=names)
    return app


def _explained(body: bytes, queue: Queue, explainer: Explainer) -> dict[str, Any]:
    """The answer to a question, ready for JSON."""
    model = queue.model
    item, label = _asked(body, model)
    said = queue([item])
    likeliest = model.classes[int(said.probabilities[0].argmax())]
    found = explainer([item], [label or said.labels[0] or likeliest])[0]
    return {
        "label": said.labels[0],
        "probabilities": dict(zip(model.classes, said.probabilities[0].tolist(), strict=True)),
        "explained": found.label,
        "words": found.words,
        "map": None if found.map is None else _overlay(found.map),
    }


def _asked(body: bytes, model: Model) -> tuple[Item, str | None]:
    """The text or the image of a question, and the label to explain."""
    try:
        question = Question.model_validate_json(body)
        given = {"text": question.text, "image": question.image}
        other = "image" if model.modality == "text" else "text"
        item = given[model.modality]
        if item is None or given[other] is not None:
            raise HeadstartError(f"this model reads {model.modality}s", do=f"send one {model.modality}")
        if model.modality == "text":
            return item, question.label
        return base64.b64decode(item, validate=True), question.label
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".strip(": ") for fault in error.errors()
        ]
        raise HeadstartError("the question cannot be read", table=lines) from None
    except ValueError as error:
        raise HeadstartError("the image is not base64", table=[str(error)]) from None


def _overlay(values: Singles) -> str:
    """A map as a PNG to lay over the image: one colour, the more opaque the more it matters; as base64."""
    from PIL import Image

    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3] = WARM
    pixels[..., 3] = np.round(values * OPAQUE)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format="PNG")
    return base64.b64encode(sink.getvalue()).decode("ascii")


class Guard:
    """ASGI middleware: requests of a sane size in, to this server, and every failure out as JSON in words.

    MLflow's server answers failures of a request with stack traces, with the request itself, or
    with status 500, as of a body without a content type; it reads bodies of any size into memory.
    """

    def __init__(self, app: Any, names: Collection[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.names and _host(scope) not in self.names:
            # A page may have its own name lead here (DNS rebinding), and would then read every answer.
            known = ", ".join(sorted(self.names))
            await _tell(send, 421, f"this server goes by {known}, and not by what Host says")
            return
        if scope["path"] == "/invocations" and b"content-type" not in dict(scope["headers"]):
            scope["headers"].append((b"content-type", b"none"))  # MLflow says in words what it would take
        try:
            async with asyncio.timeout(MOST_SECONDS):
                body = await _body(receive)
        except TimeoutError:
            await _tell(send, 408, f"the request did not come within {MOST_SECONDS} seconds")
            return
        if body is None:
            await _tell(send, 413, f"a request may have {MOST_BYTES >> 20} MB")
            return
        if body.endswith(b"PAR1") and (much := await asyncio.to_thread(_unpacked, body)):
            await _tell(send, 413, much)
            return
        given = iter([{"type": "http.request", "body": body}])
        failed, said = 0, b""

        async def replayed() -> Message:
            return next(given, None) or await receive()

        async def worded(message: Message) -> None:
            nonlocal failed, said
            if message["type"] == "http.response.start" and message["status"] >= 400:
                failed = message["status"]
            elif not failed:
                await send(message)
            else:
                said += message.get("body", b"")
                if not message.get("more_body"):
                    await _tell(send, failed, _words(said))

        try:
            await self.app(scope, replayed, worded)
        except HeadstartError as error:
            await _tell(send, 400, str(error))
        except RecursionError:
            await _tell(send, 400, "the JSON is nested too deeply")
        except Exception as error:
            if "integer string conversion" in str(error):  # Python's own limit, which MLflow does not expect
                await _tell(send, 400, f"a number in the JSON: {str(error).partition(';')[0]}")
                return
            log.exception("%s %s", scope["method"], scope["path"])
            await _tell(send, 500, "the server failed; its log says where")


async def _body(receive: Receive) -> bytes | None:
    """The body of a request, or None of one that is too large.

    That one is read to its end all the same, since most clients listen only then, but it is not kept.
    """
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        more = message.get("more_body", False)  # not of a client that has gone
        size += len(message.get("body", b""))
        if size <= MOST_BYTES:
            parts.append(message.get("body", b""))
        else:
            parts.clear()
    return b"".join(parts) if size <= MOST_BYTES else None


def _host(scope: Message) -> str | None:
    """The name by which a request calls this server, without its port."""
    with contextlib.suppress(ValueError):
        return urlsplit(f"//{dict(scope['headers']).get(b'host', b'').decode('latin-1')}").hostname
    return None


def _too_many(rows: int) -> str:
    """That a request has too many rows; "" if it has not."""
    return f"a request may have {MOST_ROWS} rows; this one has {rows}" if rows > MOST_ROWS else ""


def _unpacked(body: bytes) -> str:
    """What is too much in a Parquet file; "" if nothing is.

    Its footer knows the rows, and the bytes before what is said several times has been written out.
    """
    from pyarrow import ArrowException, BufferReader
    from pyarrow.parquet import ParquetFile

    much = f"a request may have {MOST_UNPACKED >> 20} MB unpacked; this one has more"
    try:
        file = ParquetFile(BufferReader(body))
        if many := _too_many(file.metadata.num_rows):
            return many
        groups = range(file.metadata.num_row_groups)
        if sum(file.metadata.row_group(each).total_byte_size for each in groups) > MOST_UNPACKED:
            return much
        size = 0
        for batch in file.iter_batches(batch_size=8):
            size += batch.nbytes
            if size > MOST_UNPACKED:
                return much
    except (ArrowException, OSError):
        pass  # MLflow says in words what it thinks of it
    return ""


def _words(body: bytes) -> str:
    """What a failure says, without stack trace, and without the request that it echoes."""
    try:
        said = json.loads(body)
        text = str(said.get("message") or said.get("detail"))
    except (ValueError, AttributeError):
        text = body.decode(errors="replace")
    text = text.partition("\nInput:")[0].partition(" IMPORTANT: The MLflow")[0]
    return text.rpartition("\nError: ")[2][:2000]


async def _tell(send: Send, status: int, words: str) -> None:
    """Send a failure, in the form that MLflow's clients know."""
    body = json.dumps({"error_code": HTTPStatus(status).name, "message": words}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == HTTPStatus.REQUEST_TIMEOUT:  # what may still come is no next request
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def bound(host: str, port: int) -> socket.socket:
    """A socket that has an address and does not listen yet; port 0 takes a free one.

    Raises:
        HeadstartError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as error:
        raise HeadstartError(
            "cannot serve at this address",
            where=f"{host}:{port}",
            table=[getattr(error, "strerror", None) or str(error)],
            do="take another with --host and --port, or stop what listens there",
        ) from None
    return found


def serve(version: Version, at: socket.socket, name: str = "127.0.0.1") -> None:
    """Answer requests until the process is told to stop by SIGINT (Ctrl-C) or SIGTERM.

    Args:
        version: that ``models.load`` gave.
        at: that ``bound`` gave.
        name: what ``bound`` was given, by which the server may be called too.
    """
    import uvicorn

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
        await server.serve(sockets=[at])
        for sent in STOPS:  # what still goes on in a thread is waited for; whoever asks again will not wait
            signal.signal(sent, signal.SIG_DFL)

    def stop(*_: object) -> None:
        server.should_exit = True

    _limit_pictures()
    host, port = at.getsockname()[:2]
    names = {name.lower(), host, *NAMES} if ipaddress.ip_address(host).is_loopback else ()
    app = app_of(version, names)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    for sent in STOPS:  # uvicorn has its own handlers later, and sends itself once more what has stopped it
        signal.signal(sent, stop)
    at.listen(2048)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"serving {version.name} version {version.version} at {address} (Ctrl-C stops it)", flush=True)
    asyncio.run(run())


def _limit_pictures() -> None:
    """Have Pillow refuse, in this process, what has more than ``MOST_PIXELS``, before it decodes it."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Pillow refuses twice as many, and warns of those between
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
