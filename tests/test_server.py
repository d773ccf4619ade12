"""The server over real sockets of this machine: no request lost, none answered by the wrong adapter, clear refusals."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch

import peftlab as pl
from peftlab import engine as engine_module
from peftlab import server as server_module
from peftlab.__main__ import main
from peftlab.serve import Token
from peftlab.server import running
from peftlab.store import WEIGHTS, Store

ROOT = Path(__file__).resolve().parent.parent
NAMES = [f"user{i}" for i in range(20)]
PROMPTS = ["How many", "def add(a, b):", "The train to", "x"]
LENGTH = 4
COMPLETIONS, JSON = "/v1/completions", {"content-type": "application/json"}


def tiny(seed=0):
    """A random Llama of one layer with the course's vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )).eval()  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data" / "base")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Twenty adapters on the output head, so strong that each says what no other one says."""
    store, model = Store(tmp_path_factory.mktemp("served") / "store"), tiny()
    pl.attach(model, pl.LoRA, "lm_head", name=NAMES[0], r=2)
    for name in NAMES:
        (adapter,) = pl.adapters(model)[NAMES[0]].values()
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=3)
        pl.save_adapter(model, store.folder.parent / name, NAMES[0])
        store.add(name, store.folder.parent / name)
    return store


@pytest.fixture(scope="module")
def alone(store, tokenizer):
    """(adapter or None, prompt) -> what it answers when nothing else is there."""
    answers, model = {}, tiny()
    for name in [None, *NAMES]:
        if name is not None:
            pl.load_adapter(model, store.path(name), name)
        for prompt in PROMPTS:
            answers[name, prompt] = pl.serve.generate(model, tokenizer, [prompt], [name], LENGTH)[0]
        if name is not None:
            pl.detach(model, name)
    assert len({answers[name, PROMPTS[0]] for name in [None, *NAMES]}) == 21, "each can be told from all others"
    return answers


@pytest.fixture
def url(store, tokenizer):
    with running(tiny(), tokenizer, store, capacity=4, base="tiny") as url:
        yield url


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def ai(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def body(**changes):
    return {"model": NAMES[0], "prompt": PROMPTS[0], "max_tokens": LENGTH, "temperature": 0, **changes}


def until(condition, seconds=60):
    """Wait for what must come; a busy machine only makes it later."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


# --- answers ---


CLIENTS = """
import asyncio, json, sys
import httpx

async def one(url, part):
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        return [(await client.post("/v1/completions", json=body)).json() for body in part]

async def all_of(url, parts):
    return await asyncio.gather(*(one(url, part) for part in parts))

for line in sys.stdin:
    print(json.dumps(asyncio.run(all_of(sys.argv[1], json.loads(line)))), flush=True)
"""


def test_a_thousand_requests_of_eight_clients_over_twenty_adapters(store, tokenizer, alone):
    """The clients have a process of their own, so that the memory measured is the server's."""
    model, process, seen = tiny(), psutil.Process(), []
    work = [([*NAMES, None][i * 8 % 21], PROMPTS[i % 4]) for i in range(1000)]
    assert len(set(work)) == 84
    with running(model, tokenizer, store, capacity=8, base="tiny") as url:
        command = [sys.executable, "-c", CLIENTS, url]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as clients:
            for start, end in ((0, 200), (200, 1000)):
                parts = [work[start + i : end : 8] for i in range(8)]
                bodies = [[body(model=name or "tiny", prompt=prompt) for name, prompt in part] for part in parts]
                print(json.dumps(bodies), file=clients.stdin, flush=True)
                answers = json.loads(clients.stdout.readline())
                assert [len(part) for part in answers] == [len(part) for part in parts], "none is lost"
                for (name, prompt), said in zip(sum(parts, []), sum(answers, []), strict=True):
                    assert said["model"] == (name or "tiny") and said["choices"][0]["text"] == alone[name, prompt]
                gc.collect()
                seen.append((process.memory_info().rss, len(gc.get_objects()), threading.active_count()))
                assert len(pl.adapters(model)) <= 8
            clients.stdin.close()
        health = httpx.get(f"{url}/health").json()
    assert (health["finished"], health["waiting"], health["running"]) == (1000, 0, 0)
    assert health["cache"]["evictions"] > 12, "twenty in a cache of eight"
    (rss, objects, threads), (later, more, still) = seen
    print(f"{(later - rss) / 2**20:.1f} MiB and {more - objects} objects more after 800 requests more")
    assert later - rss < 24 * 2**20, "the logits of 800 requests, kept, would be 75 MiB"
    assert more - objects < 2000 and still == threads
    assert not [t for t in threading.enumerate() if t.name.startswith("peftlab")], "no thread is left over"


def test_many_at_once_are_decoded_together(store, tokenizer, alone, monkeypatch):
    batches, real, gate, taken = [], engine_module.decode, threading.Event(), threading.Event()

    def watched(model, tokenizer, requests, cancelled):
        taken.set()
        gate.wait(60)
        batches.append([request.adapter for request in requests])
        return real(model, tokenizer, requests, cancelled)

    monkeypatch.setattr(engine_module, "decode", watched)
    with running(tiny(), tokenizer, store, capacity=3, max_batch=5) as url, ThreadPoolExecutor(12) as pool:
        ask = lambda name: httpx.post(url + COMPLETIONS, json=body(model=name), timeout=60).json()  # noqa: E731
        waiting = lambda: httpx.get(f"{url}/health").json()["waiting"]  # noqa: E731
        answers = []
        for i, name in enumerate([*NAMES[:6], *NAMES[:4]]):  # one after another into the queue
            answers.append(pool.submit(ask, name))
            until(lambda i=i: taken.is_set() and waiting() == i)  # the first is being decoded, the others wait
        gate.set()
        said = [answer.result()["choices"][0]["text"] for answer in answers]
    assert said == [alone[name, PROMPTS[0]] for name in [*NAMES[:6], *NAMES[:4]]]
    user = [[int(name.removeprefix("user")) for name in batch] for batch in batches]
    # the first alone; then who waits longest, no more than three adapters and five rows
    assert user == [[0], [1, 2, 3, 1, 2], [4, 5, 0], [3]]


def test_several_prompts_and_answers_in_one_request(client, alone, tokenizer):
    said = client.post(COMPLETIONS, json=body(prompt=PROMPTS, n=2)).json()
    assert [c["text"] for c in said["choices"]] == [alone[NAMES[0], p] for p in PROMPTS for _ in range(2)]
    assert [c["index"] for c in said["choices"]] == list(range(8))
    ids = [tokenizer(p)["input_ids"] for p in PROMPTS]
    assert said["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert said["usage"]["completion_tokens"] <= 8 * LENGTH
    assert said["usage"]["total_tokens"] == said["usage"]["prompt_tokens"] + said["usage"]["completion_tokens"]
    by_ids = client.post(COMPLETIONS, json=body(prompt=ids)).json()
    assert [c["text"] for c in by_ids["choices"]] == [alone[NAMES[0], p] for p in PROMPTS]
    one = client.post(COMPLETIONS, json=body(prompt=ids[1], echo=True)).json()
    assert one["choices"][0]["text"] == PROMPTS[1] + alone[NAMES[0], PROMPTS[1]]


def test_seeds_and_the_settings_of_openai_by_default(client):
    draw = lambda **more: [c["text"] for c in client.post(COMPLETIONS, json={  # noqa: E731
        "model": "tiny", "prompt": "x", "n": 4, **more}).json()["choices"]]  # fmt: skip
    first = draw(seed=1)
    assert first == draw(seed=1) and len(set(first)) == 4, "each answer of a request has a seed of its own"
    assert draw(seed=2)[:3] == first[1:], "the seed and the number of the answer"
    assert first != draw(seed=5) and first == draw(seed=1, temperature=1, top_p=1, max_tokens=16)
    assert len(set(draw(seed=1, top_p=1e-9))) == 1


def test_logprobs_of_the_chosen_tokens(client, store, tokenizer):
    said = client.post(COMPLETIONS, json=body(logprobs=0)).json()["choices"][0]
    model = pl.load_adapter(tiny(), store.path(NAMES[0]), "x")
    ids = tokenizer(PROMPTS[0])["input_ids"]
    want = []
    for _ in said["logprobs"]["tokens"]:
        with torch.no_grad():
            p = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        want.append(p.max().item())
        ids.append(int(p.argmax()))
    assert said["logprobs"]["token_logprobs"] == pytest.approx(want, abs=1e-4)
    assert said["logprobs"]["tokens"] == [tokenizer.decode([i]) for i in ids[-len(want) :]]
    assert said["logprobs"]["text_offset"][0] == 0 and said["logprobs"]["top_logprobs"] is None


def test_stop_ends_before_the_text(client, alone):
    whole = alone[NAMES[0], PROMPTS[0]]
    said = client.post(COMPLETIONS, json=body(stop=[whole[3:5], "never"])).json()["choices"][0]
    assert said["text"] == whole[: whole.find(whole[3:5])] and said["finish_reason"] == "stop"
    assert client.post(COMPLETIONS, json=body()).json()["choices"][0]["finish_reason"] == "length"


def events(client, **changes):
    with client.stream("POST", COMPLETIONS, json=body(stream=True, **changes)) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_streamed_pieces_add_up(client, alone):
    got = events(client, prompt=PROMPTS, stream_options={"include_usage": True}, logprobs=0)
    assert got.pop()["usage"]["completion_tokens"] == 4 * LENGTH
    assert len({event["id"] for event in got}) == 1
    for row, prompt in enumerate(PROMPTS):
        mine = [event["choices"][0] for event in got if event["choices"][0]["index"] == row]
        assert "".join(piece["text"] for piece in mine) == alone[NAMES[0], prompt]
        assert [piece["finish_reason"] for piece in mine] == [None] * (len(mine) - 1) + ["length"]
        assert sum(len(piece["logprobs"]["tokens"]) for piece in mine) == LENGTH
    echoed = events(client, echo=True)
    assert echoed[0]["choices"][0]["text"] == PROMPTS[0]
    assert "".join(e["choices"][0]["text"] for e in echoed) == PROMPTS[0] + alone[NAMES[0], PROMPTS[0]]


# --- the official client ---


def test_the_official_client(ai, alone):
    models = ai.models.list()
    assert [model.id for model in models] == ["tiny", *sorted(NAMES)] and models.data[1].parent == "tiny"
    assert ai.models.retrieve(NAMES[3]).id == NAMES[3] and ai.models.retrieve("base").id == "tiny"
    said = ai.completions.create(**body(model=NAMES[3]))
    assert said.choices[0].text == alone[NAMES[3], PROMPTS[0]] and said.usage.completion_tokens == LENGTH
    pieces = list(ai.completions.create(**body(model="base"), stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == alone[None, PROMPTS[0]]
    with pytest.raises(openai.NotFoundError) as error:
        ai.completions.create(**body(model="user33"))
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.BadRequestError) as error:
        ai.completions.create(**body(suffix="x"))
    assert error.value.param == "suffix" and error.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        ai.chat.completions.create(model="base", messages=[{"role": "user", "content": "x"}])


# --- refusals ---


def refused(answer, status, words, param=None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and words in error["message"], error
    assert error["param"] == param
    return error


@pytest.mark.parametrize(
    "changes, words, param",
    [
        ({"max_tokn": 3}, "did you mean 'max_tokens'?", "max_tokn"),
        ({"suffix": "x"}, "suffix is not supported", "suffix"),
        ({"best_of": 3}, "best_of is not supported", "best_of"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported", "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported", "presence_penalty"),
        ({"frequency_penalty": 1}, "frequency_penalty is not supported", "frequency_penalty"),
        ({"logprobs": 3}, "logprobs is not supported", "logprobs"),
        ({"echo": True, "logprobs": 0}, "echo is not supported here: not together with logprobs", "echo"),
        ({"stream_options": {"include_usage": True}}, "only with stream", "stream_options"),
        ({"stream": True, "stream_options": {"x": True}}, "only include_usage", "stream_options"),
        ({"max_tokens": "5"}, "max_tokens: Input should be a valid integer", "max_tokens"),
        ({"max_tokens": 0}, "max_tokens: ", "max_tokens"),
        ({"max_tokens": True}, "max_tokens: ", "max_tokens"),
        ({"temperature": -1}, "temperature: ", "temperature"),
        ({"temperature": "hot"}, "temperature: ", "temperature"),
        ({"top_p": 0}, "top_p: ", "top_p"),
        ({"n": 0}, "n: ", "n"),
        ({"stop": ""}, "stop: ", "stop"),
        ({"stop": ["a"] * 5}, "stop: ", "stop"),
        ({"seed": 1.5}, "seed: ", "seed"),
        ({"prompt": []}, "prompt must be a string", "prompt"),
        ({"prompt": 5}, "prompt must be a string", "prompt"),
        ({"prompt": ["a", 5]}, "prompt must be a string", "prompt"),
        ({"prompt": [[1], []]}, "prompt must be a string", "prompt"),
        ({"prompt": ""}, "no tokens", "prompt"),
        ({"prompt": [4096]}, "token id 4096 is not in the vocabulary of 4096", "prompt"),
        ({"prompt": [-1]}, "token id -1 is not", "prompt"),
        ({"prompt": [5] * 500, "max_tokens": 13}, "the prompt has 500 tokens, and 13 more", "max_tokens"),
        ({"n": 128, "prompt": ["a", "b", "c"]}, "384 rows in one request; at most 256", None),
        ({"seed": 2**70}, "seed", None),
    ],
)
def test_what_cannot_be_is_refused_by_name(client, changes, words, param):
    refused(client.post(COMPLETIONS, json=body(**changes)), 400, words, param)


def test_what_just_fits_is_taken(client):
    said = client.post(COMPLETIONS, json=body(prompt=[5] * 500, max_tokens=12)).json()
    assert said["usage"]["total_tokens"] == 512
    taken = body(best_of=1, suffix="", logit_bias={}, presence_penalty=0, frequency_penalty=0.0, user="me", n=1)
    assert client.post(COMPLETIONS, json=taken).status_code == 200


def test_wrong_models_paths_and_bodies(client):
    error = refused(client.post(COMPLETIONS, json=body(model="usr3")), 404, "did you mean 'user3'?", "model")
    assert error["code"] == "model_not_found"
    refused(client.get("/v1/models/nobody"), 404, "there is no model 'nobody'", "model")
    refused(client.get("/v2"), 404, "GET /v2: Not Found. There are POST /v1/completions")
    refused(client.get(COMPLETIONS), 405, "Method Not Allowed")
    refused(client.post(COMPLETIONS, content=b"{"), 415, "Content-Type must be application/json")
    for content in (b"{", b"", b"[]", b"\xff", b"[" * 100_000, b"null"):
        refused(client.post(COMPLETIONS, content=content, headers=JSON), 400, "the body is no JSON object")
    refused(client.post(COMPLETIONS, json={"model": "tiny"}), 400, "prompt: Field required", "prompt")
    assert client.post(COMPLETIONS, json=body()).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(store, tokenizer, chunked):
    with running(tiny(), tokenizer, store, max_body=1000) as url:
        content = json.dumps(body(prompt="x" * 2000)).encode()
        content = iter([content[:500], content[500:]]) if chunked else content
        refused(httpx.post(url + COMPLETIONS, content=content, headers=JSON), 413, "larger than 1,000 bytes")
        assert httpx.post(url + COMPLETIONS, json=body()).status_code == 200


def test_more_than_this_server_gives(store, tokenizer):
    with running(tiny(), tokenizer, store, max_tokens=20) as url:
        refused(httpx.post(url + COMPLETIONS, json=body(max_tokens=21)), 400, "at most 20", "max_tokens")
        assert httpx.post(url + COMPLETIONS, json=body(max_tokens=20)).status_code == 200


def test_a_key_is_asked_for_if_there_is_one(store, tokenizer):
    with running(tiny(), tokenizer, store, api_key="sésame") as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic abc"}):
            refused(httpx.post(url + COMPLETIONS, json=body(), headers=headers), 401, "API key")
            refused(httpx.get(f"{url}/v1/models", headers=headers), 401, "API key")
        assert httpx.get(f"{url}/health").status_code == 200
        key = {"Authorization": "Bearer sésame".encode()}
        assert httpx.post(url + COMPLETIONS, json=body(), headers=key).status_code == 200


def test_a_broken_adapter_fails_alone(tmp_path, store, tokenizer, alone):
    own = Store(tmp_path / "store")
    for name in NAMES[:3]:
        own.add(name, store.path(name))
    (own.path(NAMES[1]) / WEIGHTS).write_bytes(b"broken")
    with running(tiny(), tokenizer, own, capacity=3) as url, ThreadPoolExecutor(9) as pool:
        ask = lambda name: httpx.post(url + COMPLETIONS, json=body(model=name), timeout=60)  # noqa: E731
        for name, answer in zip(NAMES[:3] * 3, pool.map(ask, NAMES[:3] * 3), strict=True):
            if name == NAMES[1]:
                error = refused(answer, 500, "adapter 'user1' cannot be loaded")
                assert error["type"] == "server_error" and str(tmp_path) not in error["message"]
            else:
                assert answer.json()["choices"][0]["text"] == alone[name, PROMPTS[0]]
        own.add(NAMES[1], store.path(NAMES[1]))  # mended while it runs
        assert ask(NAMES[1]).json()["choices"][0]["text"] == alone[NAMES[1], PROMPTS[0]]
        own.remove(NAMES[2])
        refused(ask(NAMES[2]), 404, "there is no model 'user2'", "model")


def test_a_model_that_fails_answers_500_and_goes_on(store, tokenizer, monkeypatch, capfd):
    real, fail = engine_module.decode, [True]

    def failing(*args):
        if fail.pop() if fail else False:
            raise RuntimeError("out of memory")
        return real(*args)

    monkeypatch.setattr(engine_module, "decode", failing)
    with running(tiny(), tokenizer, store) as url:
        error = refused(httpx.post(url + COMPLETIONS, json=body()), 500, "the model failed on this batch (Runtime")
        assert error["type"] == "server_error" and "out of memory" in capfd.readouterr().err
        assert httpx.post(url + COMPLETIONS, json=body()).status_code == 200


def test_an_adapter_that_cannot_be_mixed_is_refused(tokenizer):
    model = pl.attach(tiny(), pl.PromptTuning, name="soft")
    with running(model, tokenizer) as url:
        answer = httpx.post(url + COMPLETIONS, json=body(model="soft"))
        assert answer.status_code == 200 or refused(answer, 400, "cannot be in a mixed batch")


def test_attached_adapters_are_served_and_their_names_must_be_free(store, tokenizer, alone):
    model = pl.load_adapter(tiny(), store.path(NAMES[5]), "mine")
    with running(model, tokenizer, store, capacity=1) as url:
        for name, like in (("mine", 5), (NAMES[2], 2), ("base", None), ("mine", 5)):
            said = httpx.post(url + COMPLETIONS, json=body(model=name)).json()["choices"][0]["text"]
            assert said == alone[like if like is None else NAMES[like], PROMPTS[0]]
    model = pl.load_adapter(tiny(), store.path(NAMES[5]), NAMES[5])
    with pytest.raises(ValueError, match="both called 'user5'"), running(model, tokenizer, store):
        pass
    model = pl.load_adapter(tiny(), store.path(NAMES[5]), "base")
    with pytest.raises(ValueError, match="both called 'base'"), running(model, tokenizer):
        pass


# --- queue, cancellation, the end ---


@pytest.fixture
def endless(monkeypatch):
    """A decoder that never ends a row by itself: it goes on until the row is cancelled or the gate opens.

    After a failure nobody opens the gate, so it gives up in the end."""
    gate, late = threading.Event(), time.monotonic() + 90

    def decode(model, tokenizer, requests, cancelled):
        alive = set(range(len(requests)))
        while alive:
            for row in sorted(alive):
                if cancelled(row):
                    alive.remove(row)
                    yield Token(row, -1, "", 0.0, "cancelled")
                elif gate.wait(0.01) or time.monotonic() > late:
                    alive.remove(row)
                    yield Token(row, 5, "end", 0.0, "stop")
                else:
                    yield Token(row, 5, "on ", 0.0)

    monkeypatch.setattr(engine_module, "decode", decode)
    return gate


def test_a_full_queue_says_when_to_come_again(store, tokenizer, endless):
    with running(tiny(), tokenizer, store, max_batch=1, max_queue=2) as url, ThreadPoolExecutor(3) as pool:
        state = lambda: httpx.get(f"{url}/health").json()  # noqa: E731
        ask = lambda: httpx.post(url + COMPLETIONS, json=body(), timeout=60)  # noqa: E731
        first = pool.submit(ask)
        until(lambda: state()["running"] == 1)
        others = [pool.submit(ask) for _ in range(2)]
        until(lambda: state()["waiting"] == 2)
        answer = ask()
        error = refused(answer, 429, "2 rows are waiting, at most 2 may")
        assert error["code"] == "queue_full" and int(answer.headers["retry-after"]) > 0
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as ai:
            with pytest.raises(openai.RateLimitError):
                ai.completions.create(**body())
        endless.set()
        assert all(done.result().status_code == 200 for done in [first, *others]), "those that waited are answered"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(store, tokenizer, endless, stream):
    with running(tiny(), tokenizer, store, max_batch=2) as url:
        state = lambda: httpx.get(f"{url}/health").json()  # noqa: E731
        host, port = url.removeprefix("http://").split(":")
        content = json.dumps(body(stream=stream, n=3)).encode()  # two rows run, the third waits
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            until(lambda: (state()["running"], state()["waiting"]) == (2, 1))
            if stream:
                assert b"200 OK" in connection.recv(64)
        until(lambda: (state()["running"], state()["waiting"]) == (0, 0))
        assert not endless.is_set()


def test_at_the_end_what_runs_is_finished_and_new_ones_are_refused(store, tokenizer, endless):
    serving = running(tiny(), tokenizer, store, max_batch=1)
    url = serving.__enter__()
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(httpx.post, url + COMPLETIONS, json=body(), timeout=60) for _ in range(2)]
        health = lambda: httpx.get(f"{url}/health")  # noqa: E731
        until(lambda: (health().json()["running"], health().json()["waiting"]) == (1, 1))
        ending = pool.submit(serving.__exit__, None, None, None)
        until(lambda: health().status_code == 503)
        answer = httpx.post(url + COMPLETIONS, json=body())
        assert refused(answer, 503, "shutting down")["code"] == "shutting_down" and "retry-after" in answer.headers
        endless.set()
        assert [done.result().json()["choices"][0]["finish_reason"] for done in asked] == ["stop", "stop"]
        ending.result(60)
    assert not [t for t in threading.enumerate() if t.name.startswith("peftlab")]
    with pytest.raises(httpx.ConnectError):
        health()


def test_a_second_signal_cancels_what_runs(store, tokenizer, endless, monkeypatch):
    made = []

    class Kept(server_module._Server):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(server_module, "_Server", Kept)
    with running(tiny(), tokenizer, store, max_batch=1) as url:
        with httpx.stream("POST", url + COMPLETIONS, json=body(n=3, stream=True), timeout=60) as answer:
            lines = answer.iter_lines()  # kept: without it the connection would be closed
            assert "on " in next(lines)
            made[0].handle_exit(signal.SIGINT, None)
            until(lambda: httpx.get(f"{url}/health").status_code == 503)
            made[0].handle_exit(signal.SIGINT, None)
            error = json.loads([line for line in lines if line][-1].removeprefix("data: "))["error"]
        assert error["code"] == "shutting_down" and "stopped before this answer was finished" in error["message"]
        with pytest.raises(httpx.ConnectError):
            until(lambda: httpx.get(f"{url}/health").status_code != 503)


def test_an_error_in_the_block_ends_the_server_too(tokenizer):
    with pytest.raises(KeyError), running(tiny(), tokenizer) as url:
        raise KeyError(url)
    assert not [t for t in threading.enumerate() if t.name.startswith("peftlab")]


# --- the verb ---


def start(tmp_path, store, *options):
    """The server in a process of its own: (process, its address)."""
    tiny().save_pretrained(tmp_path / "tiny")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tiny" / file).write_bytes((ROOT / "data" / "base" / file).read_bytes())
    command = [sys.executable, "-m", "peftlab", "serve", "--base", tmp_path / "tiny", "--store", store.folder, "--port",
               "0", "--adapter", f"mine={store.path(NAMES[7])}", *options]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert "http://127.0.0.1:" in line, process.communicate()
    return process, "http://" + line.split("http://")[1].split("/")[0], line


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_sigterm_while_requests_run_finishes_them_and_exits_0(tmp_path, store, alone):
    process, url, line = start(tmp_path, store, "--max-batch", "2")
    try:
        assert line.startswith("tiny and 21 adapters at ")
        said = httpx.post(url + COMPLETIONS, json=body(model="mine"), timeout=60).json()
        assert said["choices"][0]["text"] == alone[NAMES[7], PROMPTS[0]]
        with httpx.stream("POST", url + COMPLETIONS, json=body(max_tokens=100, n=4, stream=True, logprobs=0),
                          timeout=60) as answer:  # fmt: skip
            lines = answer.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line.removeprefix("data: ") for line in (first, *lines) if line]
        assert rest.pop() == "[DONE]"
        ends = [c["finish_reason"] for c in (json.loads(line)["choices"][0] for line in rest) if c["finish_reason"]]
        assert len(ends) == 4 and set(ends) <= {"stop", "length"}, "two ran, and two had to wait"
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "5 rows answered" in out and "Traceback" not in err
    finally:
        process.kill()


def test_the_verb_refuses_wrong_input_with_one_line(tmp_path, store, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, words in (
            (["--adapter", "sql"], "--adapter 'sql' is not NAME=FOLDER"),
            (["--store", str(tmp_path / "no")], "no store is there (no index.json)"),
            (["--adapter", f"sql={tmp_path}"], "is no adapter folder"),
            (["--adapter", f"sql={store.path(NAMES[0])}"], "adapter"),
            (["--base", str(tmp_path / "nowhere")], "nowhere"),
            (["--port", port], f"cannot listen on 127.0.0.1:{port}"),
            (["--max-batch", "0"], "max_batch=0: at least one row"),
        ):
            assert main(["serve", *arguments]) == 2
            said = capsys.readouterr()
            assert words in said.err and said.err.startswith("peftlab serve: ") and said.err.count("\n") == 1
