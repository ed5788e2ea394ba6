"""`generate.py --serve`, asked by the official client: its texts are those of the command line,
nothing that is asked for is ignored, and no client can hold up the others.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import openai
import pydantic
import pytest

import generate
from common.generation import server
from common.generation.completion import Completion, Prompt, Run, TextStream
from common.generation.constraints import Constraints
from common.generation.engine import Engine, Job, Limits, Piece
from common.generation.protocol import SHAPES, choose_settings
from common.local_server import bind
from conftest import ROOT, exit_code_in_process
from language_models import PROMPTS, save_tiny_model, train_byte_bpe

ASK = [{"role": "user", "content": "Why is the sky blue?"}]
SHARED = ["--device", "cpu", "--precision", "fp32", "--max-new-tokens", "16"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with a random Llama, its tokenizer and a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", context=4096)


class Serving:
    """A server in a process of its own."""

    def __init__(self, model: Path, *flags: str, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, "generate.py", "--serve", "--port", "0", "--model", model, *SHARED, *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        )
        line = self.process.stdout.readline()
        found = re.fullmatch(r"serving (\S+) at (http://127\.0\.0\.1:(\d+)/v1) \(Ctrl-C ends\)\n", line)
        assert found, line + self.process.communicate()[1]
        self.name, self.address, self.port = found[1], found[2], int(found[3])

    def client(self, **more) -> openai.OpenAI:
        given = {"base_url": self.address, "api_key": "none", "max_retries": 0, **more}
        # the server speaks plain HTTP: no certificates need be read, which takes a tenth of a second
        return openai.OpenAI(**given, http_client=openai.DefaultHttpxClient(verify=False))

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; return the exit code and what the server wrote."""
        self.process.send_signal(number)
        _, written = self.process.communicate(timeout=60)
        return self.process.returncode, written


@pytest.fixture(scope="module")
def serving(tiny) -> Iterator[Serving]:
    serving = Serving(tiny)
    yield serving
    code, written = serving.end()
    assert code == 143 and "Traceback" not in written, written


@pytest.fixture
def told(tiny, tmp_path, capsys) -> Callable[..., dict]:
    """Return a function that gives the output line of the command line for a prompt."""

    def run(prompt: str, *flags) -> dict:
        out = tmp_path / "out.jsonl"
        out.unlink(missing_ok=True)
        flags = ["--model", tiny, "--prompt", prompt, "--output", out, *SHARED, *flags]
        assert exit_code_in_process(generate, flags) == 0, capsys.readouterr()
        return json.loads(out.read_text())

    return run


REASONS = {"end": "stop", "stop": "stop", "length": "length"}
DRAWN = {"temperature": 0.9, "top_p": 0.95, "seed": 5}
STOP = ["--stop", "e", "--stop", "zz"]
ASKED = {  # name: (parameters, the same as flags)
    "greedy": ({}, []),
    "drawn": (DRAWN, ["--temperature", 0.9, "--top-p", 0.95, "--seed", 5]),
    "temperature 0": ({"temperature": 0, "max_tokens": 5}, ["--max-new-tokens", 5]),
    "a stop string": (
        {"stop": ["e", "zz"], "max_tokens": 40},
        ["--stop", "e", "--stop", "zz", "--max-new-tokens", 40],
    ),
    "penalties and a bias": (
        {"presence_penalty": 0.5, "frequency_penalty": 1, "logit_bias": {"40": -100, "41": 5.5}},
        [
            "--presence-penalty",
            0.5,
            "--frequency-penalty",
            1,
            "--logit-bias",
            "40=-100",
            "--logit-bias",
            "41=5.5",
        ],
    ),
    "one of several texts": (
        {"extra_body": {"structured_outputs": {"choice": ["sky", "sea", "sky blue"]}}, **DRAWN},
        ["--choices", "sky,sea,sky blue", "--temperature", 0.9, "--top-p", 0.95, "--seed", 5],
    ),
    "a text of a form": (
        {"extra_body": {"structured_outputs": {"regex": "[0-9]{3}(a|b)"}}, "max_tokens": 4},
        ["--regex", "[0-9]{3}(a|b)", "--max-new-tokens", 4],
    ),
    "more than OpenAI's": (
        {"extra_body": {"top_k": 9, "repetition_penalty": 1.3}, "seed": 1},
        ["--top-k", 9, "--repetition-penalty", 1.3, "--seed", 1],
    ),
}


@pytest.mark.parametrize("parameters, flags", ASKED.values(), ids=ASKED)
def test_a_text_is_that_of_the_command_line(parameters, flags, serving, told):
    """As a completion, as a chat, and as their streams, with what they count."""
    client, model = serving.client(), serving.name
    line = told(PROMPTS[0], *flags, "--logprobs", 2)
    done = client.completions.create(model=model, prompt=PROMPTS[0], logprobs=2, **parameters)
    [choice] = done.choices
    assert (choice.text, choice.finish_reason) == (line["text"], REASONS[line["finish_reason"]])
    assert done.usage.completion_tokens == len(line["token_ids"])
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    shown = [entry for entry in line["logprobs"] if entry["id"] != 2 or line["finish_reason"] != "end"]
    assert choice.logprobs.token_logprobs == [entry["logprob"] for entry in shown]
    tops = [{top["token"]: top["logprob"] for top in entry["top"]} for entry in shown]
    assert choice.logprobs.top_logprobs == tops
    pieces = list(client.completions.create(model=model, prompt=PROMPTS[0], stream=True, **parameters))
    assert "".join(piece.choices[0].text for piece in pieces) == line["text"]
    assert pieces[-1].choices[0].finish_reason == choice.finish_reason

    line = told(ASK[0]["content"], *flags, "--chat", "--system", "Be short.", "--logprobs", 2)
    ask = {"model": model, "messages": [{"role": "system", "content": "Be short."}, *ASK], **parameters}
    done = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    [choice] = done.choices
    assert (choice.message.content, choice.message.role) == (line["text"], "assistant")
    assert choice.finish_reason == REASONS[line["finish_reason"]]
    ours = [entry.logprob for entry in choice.logprobs.content]
    shown = [entry for entry in line["logprobs"] if entry["id"] != 2 or line["finish_reason"] != "end"]
    assert ours == [entry["logprob"] for entry in shown]
    pieces = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    deltas = [piece.choices[0].delta for piece in pieces[:-1]]
    assert "".join(delta.content or "" for delta in deltas) == line["text"] and deltas[0].role == "assistant"
    assert pieces[-2].choices[0].finish_reason == choice.finish_reason
    assert pieces[-1].choices == [] and pieces[-1].usage == done.usage


class Sky(pydantic.BaseModel):
    """What an answer can be read into."""

    color: Literal["blue", "red"]
    hours: int = pydantic.Field(ge=0, le=24)
    clouds: list[bool] = pydantic.Field(min_length=1, max_length=3)
    name: str | None = pydantic.Field(max_length=5)


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_an_answer_is_json_of_a_schema(seed, serving):
    """Read by the client itself, and the same as a stream; without a schema it is an object."""
    client = serving.client()
    ask = {"model": serving.name, "messages": ASK, "max_tokens": 400}
    ask |= {} if seed is None else {"seed": seed, "temperature": 1.5}
    [choice] = client.chat.completions.parse(**ask, response_format=Sky).choices
    assert isinstance(choice.message.parsed, Sky) and choice.finish_reason == "stop"
    with client.chat.completions.stream(**ask, response_format=Sky) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == choice.message.content
    assert final.choices[0].message.parsed == choice.message.parsed

    close = train_byte_bpe().get_vocab()["}"]
    ask |= {"response_format": {"type": "json_object"}, "logit_bias": {str(close): 100}}
    [choice] = client.chat.completions.create(**ask).choices
    assert (json.loads(choice.message.content), choice.finish_reason) == ({}, "stop")
    cut = client.chat.completions.create(**{**ask, "max_tokens": 1}).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("{", "length")


def test_the_model_has_a_name_without_folders(serving):
    client = serving.client()
    [model] = client.models.list().data
    assert model.id == serving.name == "tiny-llama" == client.models.retrieve("tiny-llama").id
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.chat.completions.create(model="gpt-4", messages=ASK)


def test_clients_at_the_same_time_get_what_each_gets_alone(serving, told):
    """Texts of different lengths, settings and seeds, decoded together."""
    asked = [(prompt, flags) for prompt in PROMPTS for flags in ("greedy", "drawn", "a stop string")]
    expected = {(prompt, name): told(prompt, *ASKED[name][1])["text"] for prompt, name in asked[:9]}

    def ask(prompt: str, name: str) -> str:
        client = serving.client()
        done = client.completions.create(model=serving.name, prompt=prompt, **ASKED[name][0])
        return done.choices[0].text

    with ThreadPoolExecutor(len(asked)) as pool:
        texts = dict(zip(asked, pool.map(lambda both: ask(*both), asked)))
    assert {both: texts[both] for both in expected} == expected
    several = serving.client().completions.create(model=serving.name, prompt=PROMPTS)
    assert [choice.text for choice in several.choices] == [texts[prompt, "greedy"] for prompt in PROMPTS]


def schema_format(schema: dict) -> dict:
    """Return what asks for JSON of a schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


REFUSED = {  # name: (address, body, status, parameter that the error names)
    "an unknown parameter": ("chat/completions", {"topp": 0.5}, 400, "topp"),
    "tools": ("chat/completions", {"tools": [{"type": "function"}]}, 400, "tools"),
    "a format that is not JSON": (
        "chat/completions",
        {"response_format": {"type": "xml"}},
        400,
        "response_format",
    ),
    "a schema without a name": (
        "chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        400,
        "response_format",
    ),
    "a schema of what is not computed": (
        "chat/completions",
        {"response_format": schema_format({"type": "object", "propertyNames": {"pattern": "^a"}})},
        400,
        "response_format",
    ),
    "a schema elsewhere": (
        "chat/completions",
        {"response_format": schema_format({"$ref": "http://127.0.0.1/schema.json"})},
        400,
        "response_format",
    ),
    "a schema that is too long": (
        "chat/completions",
        {"response_format": schema_format({"enum": ["a" * 20_000]})},
        400,
        "response_format",
    ),
    "a schema and an end": (
        "chat/completions",
        {"response_format": {"type": "json_object"}, "stop": "a"},
        400,
        "stop",
    ),
    "a schema and a form": (
        "chat/completions",
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        400,
        "structured_outputs",
    ),
    "a format of a raw text": (
        "completions",
        {"response_format": {"type": "json_object"}},
        400,
        "response_format",
    ),
    "several choices": ("completions", {"n": 2}, 400, "n"),
    "true is no 1": ("completions", {"n": True}, 400, "n"),
    "the prompt again": ("completions", {"echo": True}, 400, "echo"),
    "a temperature below 0": ("completions", {"temperature": -1}, 400, "temperature"),
    "a text as temperature": ("completions", {"temperature": "1"}, 400, "temperature"),
    "an empty stop string": ("completions", {"stop": ""}, 400, "stop"),
    "a special token as stop string": ("completions", {"stop": "<|im_end|>"}, 400, "stop"),
    "a bias of no token": ("completions", {"logit_bias": {"99999": 1}}, 400, "logit_bias"),
    "a bias of a word": ("completions", {"logit_bias": {"sky": 1}}, 400, "logit_bias"),
    "no prompt": ("completions", {"prompt": None}, 400, "prompt"),
    "an empty prompt": ("completions", {"prompt": " "}, 400, "prompt"),
    "tokens as prompt": ("completions", {"prompt": [1, 2]}, 400, "prompt"),
    "more than the context": ("completions", {"max_tokens": 5000}, 400, "max_tokens"),
    "a prompt longer than the context": ("completions", {"prompt": "$%" * 4000}, 400, "max_tokens"),
    "two limits": ("chat/completions", {"max_tokens": 3, "max_completion_tokens": 3}, 400, "max_tokens"),
    "an image": (
        "chat/completions",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}
            ]
        },
        400,
        "messages[0].content",
    ),
    "a tool's message": (
        "chat/completions",
        {"messages": [{"role": "tool", "content": "x"}]},
        400,
        "messages",
    ),
    "a message with a name": (
        "chat/completions",
        {"messages": [{"role": "user", "content": "x", "name": "y"}]},
        400,
        "messages[0].name",
    ),
    "a form of another name": ("completions", {"guided_regex": "a"}, 400, "guided_regex"),
    "two forms": (
        "completions",
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        400,
        "structured_outputs",
    ),
    "no choices": ("completions", {"structured_outputs": {"choice": []}}, 400, "structured_outputs"),
    "an expression that is none": (
        "completions",
        {"structured_outputs": {"regex": "("}},
        400,
        "structured_outputs",
    ),
    "a form and an end": ("completions", {"structured_outputs": {"regex": "a+"}, "stop": "a"}, 400, "stop"),
    "no such address": ("embeddings", {}, 404, None),
    "likeliest tokens without any": ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs"),
}


@pytest.mark.parametrize("address, body, status, parameter", REFUSED.values(), ids=REFUSED)
def test_what_is_not_done_is_refused_by_name(address, body, status, parameter, serving):
    content = {"messages": ASK} if "chat" in address else {"prompt": "a"}
    with pytest.raises(openai.APIStatusError) as error:
        serving.client().post(f"/{address}", body={"model": serving.name, **content, **body}, cast_to=object)
    assert (error.value.status_code, error.value.param) == (status, parameter), error.value
    assert error.value.type == "invalid_request_error"


def test_what_changes_nothing_is_taken(serving):
    """Clients send it unasked: neutral values, null, and messages as the server has written them."""
    neutral = {"n": 1, "store": False, "logit_bias": {}, "user": "me"}
    client = serving.client()
    first = client.chat.completions.create(model=serving.name, messages=ASK, **neutral, stop=None, tools=[])
    plain = client.chat.completions.create(model=serving.name, messages=ASK)
    assert first.choices[0].message.content == plain.choices[0].message.content
    said = first.choices[0].message.model_dump()
    parts = {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "so?"}]}
    joined = {"role": "user", "content": "And so?"}
    texts = [
        client.chat.completions.create(model=serving.name, messages=[*ASK, said, last])
        .choices[0]
        .message.content
        for last in (parts, joined)
    ]
    assert texts[0] == texts[1]


def post(serving: Serving, body: bytes, **headers: str) -> tuple[int, dict]:
    """Send bytes as a request; return the status and the answer's JSON."""
    lines = {
        "Host": f"127.0.0.1:{serving.port}",
        "Content-Type": "application/json",
        "Content-Length": len(body),
    }
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    with socket.create_connection(("127.0.0.1", serving.port), timeout=30) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nConnection: close\r\n{head}\r\n".encode())
        with contextlib.suppress(ConnectionError):  # it need not read all
            connection.sendall(body)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                answer += piece
    status, _, content = answer.partition(b"\r\n")
    return int(status.split()[1]), json.loads(content.partition(b"\r\n\r\n")[2])


def test_requests_that_are_none(serving):
    """A page of another site reaches no server of this machine, and no body is too long for it."""
    good = json.dumps({"model": serving.name, "prompt": "a"}).encode()
    assert post(serving, good)[0] == 200
    cases = [
        (good, {"Host": "evil.example"}, 403),
        (good, {"Host": "127.0.0.1.evil.example:80"}, 403),
        (good, {"Content_Type": "text/plain"}, 415),
        (b"{", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"temperature": NaN}', {}, 400),
        (b"\xff", {}, 400),
        (b"[]", {}, 400),
        (good.replace(b'"a"', rb'"\ud83d"'), {}, 400),
        (good.replace(b'"a"', rb'"a", "stop": ["\udc80"]'), {}, 400),
        (good + b" " * (5 << 20), {}, 413),
    ]
    for body, headers, status in cases:
        found, content = post(serving, body, **headers)
        assert (found, content["error"]["type"]) == (status, "invalid_request_error"), headers
    assert post(serving, good, Host=f"localhost:{serving.port}")[0] == 200


def test_a_key_is_asked_for_and_a_signal_lets_texts_end(tiny):
    """Those that are being generated end, and then the server, with the exit code of the signal."""
    serving = Serving(tiny, GENERATE_API_KEY="secret")
    with pytest.raises(openai.AuthenticationError, match="API key"):
        serving.client().models.list()
    client = serving.client(api_key="secret")
    stream = client.completions.create(
        model=serving.name, prompt="a", max_tokens=300, stream=True, temperature=1.5, seed=1
    )
    first = next(stream)
    serving.process.send_signal(signal.SIGTERM)
    pieces = [first, *stream]
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")
    _, written = serving.process.communicate(timeout=60)
    assert serving.process.returncode == 143 and "stopped by SIGTERM" in written, written
    assert "secret" not in written and "Traceback" not in written


# The thread that generates ------------------------------------------------------------------------

COMING = [  # (at which token of the others it comes, prompt, what is asked for)
    (0, "dog. Because the lazy light " * 3, "temperature 0"),
    (2, PROMPTS[3], "drawn"),
    (3, "The quick brown fox " * 20, "greedy"),
    (9, PROMPTS[1], "a stop string"),
    (14, PROMPTS[2], "penalties and a bias"),
    (14, "a", "drawn"),
]


@pytest.mark.parametrize("flags", [[], ["--plain-step"]], ids=["in C", "in PyTorch"])
def test_texts_come_and_go_and_each_is_what_it_is_alone(flags, tiny, told):
    """At any token of others, longer and shorter ones; without the step in C, texts that come wait
    until all before them have ended.
    """
    args = generate.make_parser().parse_args(["--serve", "--model", str(tiny), *SHARED, *flags])
    run, sizes, jobs = generate.load(args)[0], [], []
    shape, has_ended, may_begin = SHAPES["/v1/completions"], threading.Semaphore(0), threading.Event()

    def make_job(prompt: str, name: str) -> Job:
        settings, stops = choose_settings({**ASKED[name][0]}, shape, run, Constraints(run.language_model))
        asked = Prompt(0, prompt, run.language_model.tokenizer(prompt)["input_ids"])
        row = Completion(asked, 0, TextStream(run.language_model.tokenizer, stops, asked.ids))
        return Job(0, row, settings, ASKED[name][0].get("seed", 0), None, tell)

    def tell(number: int, event: Piece | Exception) -> None:
        assert isinstance(event, Piece), event
        if event.is_last:
            has_ended.release()

    class Counting(Engine):
        """An engine to which texts come at given tokens."""

        def go_on(self, fresh):
            may_begin.wait(60)
            sizes.append((len(self.group.going_on) if self.group else 0, len(fresh.jobs) if fresh else 0))
            for when, prompt, name in COMING:
                if when == len(sizes) and when:
                    jobs.append(make_job(prompt, name))
                    self.submit(jobs[-1:])
            return super().go_on(fresh)

    engine = Counting(run, Limits(batch_size=3, waiting=9, seconds=60.0))
    jobs.append(make_job(*COMING[0][1:]))
    engine.submit(jobs[:])
    may_begin.set()
    for _ in COMING:
        assert has_ended.acquire(timeout=60)
    engine.close()
    engine.thread.join()
    for job, (_, prompt, name) in zip(jobs, COMING, strict=True):
        assert job.row.text == told(prompt, *ASKED[name][1], *flags)["text"], name
    joined = [size for size in sizes if size[0] and size[1]]
    assert max(map(sum, sizes)) == 3 and bool(joined) == (not flags), sizes


# With a loop that waits ---------------------------------------------------------------------------


class Gate:
    """What each step of an engine waits for; it counts the steps, and the texts of each."""

    def __init__(self):
        self.sizes, self.may_go, self.has_begun = [], threading.Event(), threading.Event()

    @property
    def steps(self) -> int:
        return len(self.sizes)


class GatedEngine(Engine):
    """An engine whose steps wait until they may go on."""

    def __init__(self, run: Run, limits: Limits, gate: Gate):
        self.gate = gate
        super().__init__(run, limits)

    def go_on(self, fresh):
        going_on = len(self.group.going_on) if self.group else 0
        self.gate.sizes.append(going_on + len(fresh.jobs if fresh else ()))
        self.gate.has_begun.set()
        self.gate.may_go.wait(60)
        return super().go_on(fresh)


@pytest.fixture(scope="module")
def loaded(tiny) -> Run:
    """A model in this process, as the server loads it."""
    args = generate.make_parser().parse_args(["--serve", "--model", str(tiny), *SHARED])
    return generate.load(args)[0]


def with_server(
    loaded: Run, gate: Gate, act: Callable, engine: type[GatedEngine] = GatedEngine, **limits
) -> None:
    """Run a coroutine function with a client of a server in this process, whose loop waits."""
    taken = Limits(**{"batch_size": 2, "waiting": 2, "seconds": 60.0, **limits})

    async def run() -> None:
        listener = bind(0)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        async with server.running(engine(loaded, taken, gate), listener) as name:
            client = openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0)
            try:
                await act(client, name)
            finally:
                gate.may_go.set()
                await client.close()

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_full_queue_refuses_and_what_waited_is_decoded_together(loaded):
    gate = Gate()

    async def act(client, name):
        ask = {"model": name, "prompt": PROMPTS[0], "max_tokens": 4}
        first = asyncio.create_task(client.completions.create(**ask))
        await until(gate.has_begun.is_set)
        others = [asyncio.create_task(client.completions.create(**ask)) for _ in range(2)]
        await asyncio.sleep(0.3)
        with pytest.raises(openai.RateLimitError, match="2 texts wait, and at most 2 may"):
            await client.completions.create(**ask)
        gate.may_go.set()
        answers = [await task for task in (first, *others)]
        assert len({answer.choices[0].text for answer in answers}) == 1

    with_server(loaded, gate, act)
    assert gate.sizes[:2] == [1, 2] and max(gate.sizes) == 2


@pytest.mark.parametrize("streams", [True, False])
def test_the_text_of_a_client_that_leaves_ends(streams, loaded):
    gate = Gate()

    async def act(client, name):
        ask = {"model": name, "prompt": PROMPTS[0], "stream": streams, "temperature": 1.5, "seed": 3}
        long = asyncio.create_task(client.completions.create(**ask, max_tokens=2000))
        await until(gate.has_begun.is_set)
        if streams:
            await (await long).close()
        else:
            long.cancel()
        await asyncio.sleep(0.3)  # for the server to see it
        gate.may_go.set()
        done = await client.completions.create(model=name, prompt="a", max_tokens=2)
        assert done.usage.completion_tokens <= 2

    with_server(loaded, gate, act)
    assert gate.steps <= 6


@pytest.mark.parametrize("streams", [True, False])
def test_a_request_has_its_time(streams, loaded):
    gate = Gate()

    async def act(client, name):
        with pytest.raises(openai.APIError, match=r"may take 0\.5 seconds"):
            done = await client.completions.create(model=name, prompt="a", stream=streams, max_tokens=2000)
            async for _ in done:
                pass
        gate.may_go.set()

    with_server(loaded, gate, act, seconds=0.5)
    assert gate.steps <= 3


def test_a_fault_ends_its_texts_and_not_the_server(loaded, capsys):
    gate = Gate()
    gate.may_go.set()
    fail = [True]

    class Failing(GatedEngine):
        def go_on(self, fresh):
            if fail.pop() if fail else False:
                raise ValueError("a bug")
            return super().go_on(fresh)

    async def act(client, name):
        with pytest.raises(openai.InternalServerError, match="a bug of the server"):
            await client.completions.create(model=name, prompt="a")
        assert (await client.completions.create(model=name, prompt="a")).choices[0].text

    with_server(loaded, gate, act, Failing)
    assert "ValueError: a bug" in capsys.readouterr().err


def test_a_text_whose_sampler_fails_ends_alone(loaded, capsys):
    """As over a form that takes too long: those beside it go on."""
    gate, failing = Gate(), [True]

    class Failing(GatedEngine):
        def read(self, jobs):
            group = super().read(jobs)
            if failing and failing.pop():
                group.samplers[0] = lambda logits, ids: 1 / 0
            return group

    async def act(client, name):
        ask = {"model": name, "prompt": PROMPTS[0], "max_tokens": 4}
        first = asyncio.create_task(client.completions.create(**ask))
        await until(gate.has_begun.is_set)
        second = asyncio.create_task(client.completions.create(**ask))
        gate.may_go.set()
        with pytest.raises(openai.InternalServerError, match="a bug of the server"):
            await first
        alone = await client.completions.create(**ask)
        assert (await second).choices[0].text == alone.choices[0].text

    with_server(loaded, gate, act, Failing)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_model_without_a_template_continues_texts_only(tmp_path):
    model = save_tiny_model(tmp_path / "model", chat_template=None)
    args = generate.make_parser().parse_args(["--serve", "--model", str(model), *SHARED])
    run, _ = generate.load(args)
    gate = Gate()
    gate.may_go.set()

    async def act(client, name):
        with pytest.raises(openai.BadRequestError, match="no chat template; use /v1/completions"):
            await client.chat.completions.create(model=name, messages=ASK)
        assert (await client.completions.create(model=name, prompt="a")).usage.prompt_tokens == 1

    with_server(run, gate, act)


class Person(pydantic.BaseModel):
    """What can be read from a sentence."""

    name: str
    age: int
    likes: list[str]


def test_the_bundled_model_answers_in_json_of_a_schema():
    """What its sentence says, whole and as a stream."""
    args = generate.make_parser().parse_args(["--serve", "--device", "cpu", "--precision", "fp32"])
    run, gate = generate.load(args)[0], Gate()
    gate.may_go.set()
    sentence = "Anna is 31 years old and likes tea, rain and books. Give her data as JSON."

    async def act(client, name):
        ask = {"model": name, "messages": [{"role": "user", "content": sentence}], "max_tokens": 80}
        [choice] = (await client.chat.completions.parse(**ask, response_format=Person)).choices
        assert choice.message.parsed == Person(name="Anna", age=31, likes=["tea", "rain", "books"])
        async with client.chat.completions.stream(**ask, response_format=Person) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == choice.message.content

    with_server(run, gate, act)
