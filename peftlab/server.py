"""One base model and many adapters over HTTP, in the manner of OpenAI: /v1/completions, /v1/models, /health.

The adapter is chosen by the request's "model"; rows of different adapters are decoded in one batch. What is not
supported is refused by name, in OpenAI's shape of an error. `running` serves inside of a program or a notebook,
`serve` (python -m peftlab serve) until a signal ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hmac
import json
import socket
import sys
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from torch import nn

from .attach import did_you_mean
from .engine import Engine, Full, Job, Stopping
from .serve import Request as Row
from .serve import Token
from .store import BASE, Store
from .texts import context_of, tokens_of

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise ImportError(f'the server needs {error.name}: pip install "peftlab[serve]"') from None

LOOPBACK = ("127.0.0.1", "::1", "localhost")
GRACE = 10  # seconds at the end for clients that do not read their answer
MAX_BODY = 4 * 2**20  # bytes of one request; 128k tokens written as numbers are 1 MB


# --- what is asked --------------------------------------------------------------------------------------------------

Stop = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[StrictInt], Field(min_length=1)]


class Asked(BaseModel):
    """The body of POST /v1/completions. https://platform.openai.com/docs/api-reference/completions/create"""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: dict[str, bool] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    user: str | None = None  # taken and not used, as far as answers go
    best_of: int | None = None
    suffix: str | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: StrictFloat | StrictInt | None = None
    frequency_penalty: StrictFloat | StrictInt | None = None


class Wrong(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status)
        self.status = status
        self.content = {"error": {
            "message": message, "type": kind or ("server_error" if status >= 500 else "invalid_request_error"),
            "param": param, "code": code,
        }}  # fmt: skip

    def response(self) -> JSONResponse:
        wait = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.content, self.status, wait)


GONE = Wrong(499, "the client closed the connection")  # nobody will read it


def wrong(error: Exception) -> Wrong:
    """What the engine refuses, as HTTP says it."""
    if isinstance(error, Wrong):
        return error
    for kind, status, code in ((Full, 429, "queue_full"), (Stopping, 503, "shutting_down"),
                               (LookupError, 404, "model_not_found"), (ValueError, 400, None)):  # fmt: skip
        if isinstance(error, kind):
            return Wrong(status, str(error.args[0]), code=code)
    return Wrong(500, str(error), code="internal_error")


async def asked(request: Request, max_body: int) -> Asked:
    """The body, read up to its limit and checked."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Wrong(415, "Content-Type must be application/json")  # which keeps web pages of other origins out, too
    body, size = bytearray(), 0
    try:
        async for block in request.stream():
            size += len(block)
            body += block if size <= max_body else b""
            if size > 4 * max_body:  # up to here it is read all the same: who is still sending hears no answer
                break
    except ClientDisconnect:
        raise GONE from None
    if size > max_body:
        raise Wrong(413, f"the body is larger than {max_body:,} bytes", code="body_too_large")
    try:
        found = Asked.model_validate_json(bytes(body))
    except ValidationError as error:
        raise _invalid(error) from None
    _supported(found)
    return found


def _invalid(error: ValidationError) -> Wrong:
    first = error.errors(include_url=False, include_input=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    if param == "prompt" and first["type"] != "missing":
        return Wrong(400, "prompt must be a string, a list of strings, a list of token ids or a list of such lists, "
                     "and not empty", param)  # fmt: skip
    if first["type"] == "extra_forbidden":
        there = ", ".join(Asked.model_fields)
        meant = did_you_mean(str(param), Asked.model_fields)
        return Wrong(400, f"there is no parameter {param!r} here{meant} There are {there}", param, "unknown_parameter")
    return Wrong(400, f"{param}: {first['msg']}" if param else f"the body is no JSON object: {first['msg']}", param)


def _supported(a: Asked) -> None:
    """Refuse by name what would otherwise be left out without a word."""
    odd = sorted(set(a.stream_options or ()) - {"include_usage"})
    refused = {
        "best_of": a.best_of not in (None, a.n or 1) and "only as many answers as n are made",
        "suffix": bool(a.suffix) and "the model continues texts and does not fill gaps",
        "logit_bias": bool(a.logit_bias) and "leave it out",
        "presence_penalty": bool(a.presence_penalty) and "leave it out, or give 0",
        "frequency_penalty": bool(a.frequency_penalty) and "leave it out, or give 0",
        "logprobs": bool(a.logprobs) and "give 0 for those of the chosen tokens; alternatives are not computed",
        "echo": bool(a.echo) and a.logprobs is not None and "not together with logprobs: the prompt's are not computed",
        "stream_options": (odd and f"only include_usage, not {odd[0]}")
        or (bool(a.stream_options) and not a.stream and "only with stream"),
    }
    for param, why in refused.items():
        if why:
            raise Wrong(400, f"{param} is not supported here: {why}", param, "unsupported_parameter")


# --- what is answered -----------------------------------------------------------------------------------------------


@dataclass
class Choice:
    """One row's answer as it grows."""

    text: str
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish: str | None = None

    def take(self, token: Token) -> None:
        if token.id >= 0:
            self.ids.append(token.id)
            self.logprobs.append(token.logprob)
            self.offsets.append(len(self.text))
        self.text += token.text
        self.finish = token.finish


class Api:
    """The handlers: what they need is the engine and what the models are called."""

    def __init__(self, engine: Engine, base: str, max_tokens: int | None, max_body: int):
        self.engine, self.base, self.max_tokens, self.max_body = engine, base, max_tokens, max_body
        self.tokenizer = copy.deepcopy(engine.tokenizer)  # fast tokenizers are not for two threads at once
        self.context = context_of(engine.model)
        self.started = int(time.time())

    # models

    def adapter(self, name: str) -> str | None:
        """The adapter that a model's name stands for, None for the base."""
        if name in (self.base, BASE):
            return None
        there = self.engine.names()
        if name not in there:
            known = [self.base, *there]
            shown = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
            raise Wrong(404, f"there is no model {name!r}{did_you_mean(name, known)} Models: {shown}", "model",
                        "model_not_found")  # fmt: skip
        return name

    def model(self, name: str) -> dict[str, Any]:
        content = {"id": name, "object": "model", "created": self.started, "owned_by": "peftlab"}
        return content if name == self.base else content | {"parent": self.base}

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self.model(name) for name in [self.base, *self.engine.names()]]}

    async def one_model(self, name: str) -> dict[str, Any]:
        return self.model(self.adapter(name) or self.base)

    async def health(self) -> JSONResponse:
        engine, cache = self.engine, self.engine.cache
        content = {
            "status": "stopping" if engine.stopping else "ok", "waiting": engine.waiting,
            "running": len(engine.running), "finished": engine.finished,
            "cache": None if cache is None else {"attached": cache.names, **vars(cache.statistics)},
        }  # fmt: skip
        return JSONResponse(content, 503 if engine.stopping else 200)

    # completions

    async def completions(self, request: Request) -> Response:
        a = await asked(request, self.max_body)
        rows, prompts = self.rows(a)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Token | Exception]]()

        def tell(row: int, event: Token | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is there to be told
                loop.call_soon_threadsafe(queue.put_nowait, (row, event))

        job = Job(rows, tell)
        self.engine.submit(job)
        events = self.events(request, job, queue)
        choices = [Choice(prompt if a.echo else "") for prompt in prompts]
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
                "model": a.model}  # fmt: skip
        if a.stream:
            first = await anext(events)  # what is refused only when its turn comes is still an error with a status
            return StreamingResponse(self.stream(a, head, first, events, choices, rows), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-cache"})  # fmt: skip
        async with contextlib.aclosing(events):
            async for row, token in events:
                choices[row].take(token)
        listed = [self.choice(i, c, c.text, 0, a) for i, c in enumerate(choices)]
        return JSONResponse({**head, "choices": listed, "usage": usage(a, rows, choices)})

    def rows(self, a: Asked) -> tuple[list[Row], list[str]]:
        """(the rows to decode, each one's prompt as text): n for each prompt, side by side."""
        adapter, length = self.adapter(a.model), 16 if a.max_tokens is None else a.max_tokens
        if self.max_tokens is not None and length > self.max_tokens:
            raise Wrong(400, f"max_tokens={length}: this server gives at most {self.max_tokens}", "max_tokens")
        stop = (a.stop,) if isinstance(a.stop, str) else tuple(a.stop or ())
        given: list[Any] = a.prompt if isinstance(a.prompt, list) and not isinstance(a.prompt[0], int) else [a.prompt]
        rows, texts = [], []
        for prompt in given:
            ids = tokens_of(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
            self.check_prompt(ids, length)
            for i in range(a.n or 1):
                rows.append(Row(
                    list(ids), adapter, length, temperature=1.0 if a.temperature is None else a.temperature,
                    top_p=1.0 if a.top_p is None else a.top_p, seed=None if a.seed is None else a.seed + i, stop=stop,
                ))  # fmt: skip
                texts.append(prompt if isinstance(prompt, str) else self.tokenizer.decode(ids) if a.echo else "")
        return rows, texts

    def check_prompt(self, ids: Sequence[int], length: int) -> None:
        if not ids:
            raise Wrong(400, "the prompt has no tokens", "prompt")
        if odd := [i for i in ids if not 0 <= i < len(self.tokenizer)]:
            raise Wrong(400, f"token id {odd[0]} is not in the vocabulary of {len(self.tokenizer)}", "prompt")
        if len(ids) + length > self.context:
            raise Wrong(400, f"the prompt has {len(ids)} tokens, and {length} more are asked for; the model's context "
                        f"holds {self.context}", "max_tokens", "context_length_exceeded")  # fmt: skip

    async def events(
        self, request: Request, job: Job, queue: asyncio.Queue[tuple[int, Token | Exception]]
    ) -> AsyncGenerator[tuple[int, Token], None]:
        """Each row's tokens as they come, until all rows are finished; a client that goes away cancels them."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            queue.put_nowait((-1, GONE))

        watcher, unfinished = asyncio.create_task(watch()), len(job.requests)
        try:
            while unfinished:
                row, event = await queue.get()
                if isinstance(event, Exception):
                    raise wrong(event)
                unfinished -= event.finish is not None
                yield row, event
        finally:
            job.cancelled = True  # for what is left of it
            watcher.cancel()

    async def stream(
        self, a: Asked, head: dict, first: tuple[int, Token], events: Any, choices: list[Choice], rows: list[Row]
    ) -> AsyncIterator[str]:
        async with contextlib.aclosing(events):
            for row, choice in enumerate(choices):
                if choice.text:  # echo
                    yield _sse({**head, "choices": [self.choice(row, choice, choice.text, 0, a)]})
            try:
                async for row, token in _chained(first, events):
                    choice = choices[row]
                    start = len(choice.ids)
                    choice.take(token)
                    if token.text or token.finish or a.logprobs is not None:
                        yield _sse({**head, "choices": [self.choice(row, choice, token.text, start, a)]})
            except Wrong as error:
                yield _sse(error.content)
                return
        if (a.stream_options or {}).get("include_usage"):
            yield _sse({**head, "choices": [], "usage": usage(a, rows, choices)})
        yield "data: [DONE]\n\n"

    def choice(self, index: int, choice: Choice, text: str, start: int, a: Asked) -> dict[str, Any]:
        """One answer, or the piece of it from its token number `start` on."""
        logprobs = None if a.logprobs is None else {
            "tokens": [self.tokenizer.decode([i]) for i in choice.ids[start:]],
            "token_logprobs": choice.logprobs[start:], "top_logprobs": None, "text_offset": choice.offsets[start:],
        }  # fmt: skip
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}


def usage(a: Asked, rows: Sequence[Row], choices: Sequence[Choice]) -> dict[str, int]:
    """Tokens read, each prompt once, and tokens made."""
    read, made = sum(len(row.prompt) for row in rows[:: a.n or 1]), sum(len(choice.ids) for choice in choices)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def _sse(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _chained(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for item in rest:
        yield item


# --- the application and its server ---------------------------------------------------------------------------------


def app(
    engine: Engine, *, base: str | None = None, api_key: str | None = None, max_tokens: int | None = None,
    max_body: int = MAX_BODY,
) -> FastAPI:  # fmt: skip
    """The ASGI application around an engine that somebody starts and stops. base: what the bare model is called."""
    api = Api(engine, base or base_id(engine.model), max_tokens, max_body)
    made = FastAPI(title="peftlab", docs_url=None, redoc_url=None, openapi_url=None)  # those pages load from elsewhere

    async def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")  # as it was sent
        if api_key and not hmac.compare_digest(given, api_key.encode()):
            raise Wrong(401, "a valid API key is needed: Authorization: Bearer …", code="invalid_api_key")

    @made.exception_handler(Wrong)
    async def known(request: Request, error: Wrong) -> Response:
        return error.response()

    @made.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        return Wrong(error.status_code, f"{where}: {error.detail}. There are POST /v1/completions, GET /v1/models and "
                     "GET /health", code="not_found" if error.status_code == 404 else None).response()  # fmt: skip

    @made.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return Wrong(500, "an error inside of the server; its log says more", code="internal_error").response()

    for kind in (Full, Stopping, ValueError):
        made.add_exception_handler(kind, lambda request, error: wrong(error).response())
    for path, method, handler in (("/v1/completions", "POST", api.completions), ("/v1/models", "GET", api.models),
                                  ("/v1/models/{name:path}", "GET", api.one_model)):  # fmt: skip
        made.add_api_route(path, handler, methods=[method], response_model=None, dependencies=[Depends(authorised)])
    made.add_api_route("/health", api.health, methods=["GET"], response_model=None)
    return made


def base_id(model: nn.Module) -> str:
    """The base's Hub id; of one from a folder, the folder's name: where it lies is nobody's business."""
    name = getattr(getattr(model, "config", None), "name_or_path", None) or BASE
    return Path(name).name if Path(name).exists() else name


class _Server(uvicorn.Server):
    """A signal refuses new requests at once and ends the server when the running ones are answered, with status 0;
    a second one cancels them."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self.engine, self.up, self.signals = engine, threading.Event(), 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signals += 1  # no more here: the handler may have come in while a lock was held

    async def on_tick(self, counter: int) -> bool:
        if self.signals:
            self.engine.stop(now=self.signals > 1)
        return await super().on_tick(counter) or (bool(self.signals) and self.engine.idle)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port in use is an error before anything starts, and port 0 a free one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # by its name: asyncio sends at once (TCP_NODELAY) only where it reads TCP, else each answer waits 40 ms
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if sys.platform != "win32":  # there it would let two servers have one port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port} ({error.strerror}); choose another port or host") from None
    return listening


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _config(application: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(application, log_level="warning", lifespan="off", access_log=False, ws="none",
                          timeout_graceful_shutdown=GRACE)  # fmt: skip


@contextlib.contextmanager
def running(
    model: nn.Module, tokenizer: Any, store: Store | None = None, *, capacity: int = 16, max_batch: int = 16,
    max_queue: int = 256, max_tokens: int | None = None, base: str | None = None, api_key: str | None = None,
    max_body: int = MAX_BODY,
) -> Iterator[str]:  # fmt: skip
    """`with running(model, tokenizer, store) as url:` serves on a free port of this machine until the block ends.

    Then new requests are refused, running ones are finished, and both threads are gone. Inside of the block the model
    belongs to the server.
    """
    engine = Engine(model, tokenizer, store, capacity=capacity, max_batch=max_batch, max_queue=max_queue)
    application = app(engine, base=base, api_key=api_key, max_tokens=max_tokens, max_body=max_body)
    listening = _listen(LOOPBACK[0], 0)
    server = _Server(_config(application), engine)
    thread = threading.Thread(target=server.run, args=([listening],), name="peftlab server", daemon=True)
    engine.start()
    thread.start()
    try:
        while not server.up.wait(0.1):
            if not thread.is_alive():
                raise RuntimeError("the server did not start; its log says why")
        yield _url(listening)
    finally:
        engine.stop()
        engine.join()
        server.should_exit = True
        thread.join()
        listening.close()


def serve(
    model: nn.Module, tokenizer: Any, store: Store | None = None, *, host: str = LOOPBACK[0], port: int = 8000,
    capacity: int = 16, max_batch: int = 16, max_queue: int = 256, max_tokens: int | None = None,
    base: str | None = None, api_key: str | None = None, max_body: int = MAX_BODY,
) -> None:  # fmt: skip
    """Serve until SIGINT or SIGTERM; then finish what runs and return."""
    engine = Engine(model, tokenizer, store, capacity=capacity, max_batch=max_batch, max_queue=max_queue)
    application = app(engine, base=base, api_key=api_key, max_tokens=max_tokens, max_body=max_body)
    listening = _listen(host, port)
    if host not in LOOPBACK and not api_key:
        print(f"warning: {host} can be reached from other machines, and there is neither authentication (--api-key) "
              "nor encryption", file=sys.stderr)  # fmt: skip
    engine.start()
    print(f"{base or base_id(model)} and {len(engine.names())} adapters at {_url(listening)}/v1; Ctrl-C ends it",
          flush=True)  # fmt: skip
    try:
        _Server(_config(application), engine).run([listening])
    finally:
        engine.stop(now=True)
        engine.join()
        listening.close()
    print(f"{engine.finished} rows answered", flush=True)


