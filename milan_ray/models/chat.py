"""Chat models: a language model in a local folder, or any server with an OpenAI-compatible API."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message as Headers
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

import torch
from jinja2 import TemplateError

from milan_ray.config import canonical, config_hash
from milan_ray.errors import MilanError, explained, reason
from milan_ray.models.folders import LANGUAGE, LOCAL, check_complete, gguf_file, import_optional, import_transformers
from milan_ray.models.registry import BUILDING
from milan_ray.models.weights import folder_digest
from milan_ray.progress import say
from milan_ray.storage import Storage

Message = dict[str, str]
"""One turn: ``role`` (system, user, assistant) and ``content``."""

LONGEST = 32
"""Maximum number of tokens of an answer."""

KEYS = ("MILAN_LLM_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold a server's API key; the first one that is set counts."""

CACHE = "llm_cache"
"""Folder of the run directory that caches a server's answers."""


class Chat(Protocol):
    """A language model that answers conversations."""

    @property
    def name(self) -> str:
        """The model's name."""

    def identity(self) -> dict[str, object]:
        """Everything that determines its answers besides the conversations."""

    def to(self, device: torch.device) -> Any:
        """Moves the model to a device and returns it."""

    def answers(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """One answer per conversation.

        Raises:
            MilanError: No answer can be obtained.
        """


class LocalChat:
    """A causal language model of transformers in a folder, loaded on first use.

    Answers are sampled at a temperature. The seed is derived from the conversations, so that the same conversations get
    the same answers.
    """

    def __init__(self, folder: str, temperature: float = 0.3, precision: str | None = None) -> None:
        """Stores the settings.

        Args:
            folder: A folder with config.json, weights in safetensors, and the tokenizer's files, or with a GGUF file.
            temperature: Sampling temperature; 0 always takes the likeliest token.
            precision: ``float32``, ``bfloat16`` or ``float16``; None takes bfloat16 on GPUs and float32 on CPUs.

        Raises:
            MilanError: A package that reads GGUF files is not installed.
        """
        self.name = Path(folder).name
        self._gguf = gguf_file(folder)
        for package in ("gguf", "accelerate") if self._gguf else ():
            import_optional(package, "GGUF files are read", f"'milan-ray[{LANGUAGE}]'")
        self._folder, self._temperature, self._precision = folder, temperature, precision
        self._device = torch.device("cpu")

    def identity(self) -> dict[str, object]:
        """Everything that determines its answers besides the conversations."""
        return {
            "files": folder_digest(self._folder),
            "temperature": self._temperature,
            "precision": self._precision,
            "longest": LONGEST,
        }

    def to(self, device: torch.device) -> LocalChat:
        """Moves the model to a device and returns it."""
        self._device = device
        return self

    @torch.inference_mode()
    def answers(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """One answer per conversation, of at most :data:`LONGEST` tokens.

        Raises:
            MilanError: The model's files are absent, damaged or unfit.
        """
        if not conversations:
            return []
        model, tokenizer = self._loaded
        prompts = [self._prompt(tokenizer, conversation) for conversation in conversations]
        begin = tokenizer.chat_template is None  # a template writes its own special tokens
        given = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=begin).to(self._device)
        drawn: dict[str, Any] = {"do_sample": False}
        if self._temperature > 0:
            drawn = {"do_sample": True, "temperature": self._temperature, "top_k": 0, "top_p": 1.0}
        seed = int(config_hash({"prompts": prompts}), 16) % 2**63
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            tokens = model.generate(
                input_ids=given["input_ids"],
                attention_mask=given["attention_mask"],
                max_new_tokens=LONGEST,
                pad_token_id=tokenizer.pad_token_id,
                **drawn,
            )
        texts = tokenizer.batch_decode(tokens[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        # A model without a template continues the conversation for both sides.
        return [text.split("\nuser:")[0].strip() for text in texts]

    @staticmethod
    def _prompt(tokenizer: Any, conversation: Sequence[Message]) -> str:
        if tokenizer.chat_template is not None:
            # A template ignores arguments that it does not use; most do not use enable_thinking.
            rules = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
            try:
                return tokenizer.apply_chat_template(list(conversation), **rules)
            except TemplateError:  # some have no system role
                return tokenizer.apply_chat_template(_without_system(conversation), **rules)
        return "".join(f"{turn['role']}: {turn['content']}\n" for turn in conversation) + "assistant:"

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        transformers = import_transformers("local language models come")
        precision = self._precision or ("float32" if self._device.type == "cpu" else "bfloat16")
        needs = "it needs config.json, weights in safetensors and the tokenizer's files of a causal language model."
        if self._gguf:
            needs = "it needs the GGUF file of a causal language model that transformers can read."
        file: dict[str, Any] = LOCAL | ({"gguf_file": self._gguf} if self._gguf else {})
        with BUILDING, explained(f"the language model in {self._folder} cannot be loaded", needs):
            tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder, padding_side="left", **file)
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                self._folder, dtype=getattr(torch, precision), output_loading_info=True, use_safetensors=True, **file
            )
        check_complete(report["missing_keys"], self._folder, ": fetch them again")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return model.to(self._device).eval().requires_grad_(False), tokenizer


def _without_system(conversation: Sequence[Message]) -> list[Message]:
    """The conversation with the system message prepended to the first user message."""
    system, first, *rest = conversation
    return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]


@dataclass(frozen=True)
class Limits:
    """Limits on the use of a server.

    Attributes:
        per_minute: Maximum number of requests per minute.
        at_once: Maximum number of concurrent requests.
        tries: Attempts per request.
        timeout: Seconds to wait for an answer.
        pause: Seconds before the second attempt; doubled each time, unless the server states how long to wait.
        input_price: US dollars per million input tokens.
        output_price: US dollars per million output tokens.
        budget: US dollars that one job may cost; None for no limit, 0 to answer only from the cache.
    """

    per_minute: float = 300.0
    at_once: int = 8
    tries: int = 6
    timeout: float = 60.0
    pause: float = 1.0
    input_price: float = 0.0
    output_price: float = 0.0
    budget: float | None = None


@dataclass
class Usage:
    """A job's use of a server so far.

    Attributes:
        asked: Requests answered by the server.
        remembered: Requests answered from the cache.
        tokens_in: Input tokens.
        tokens_out: Output tokens.
        dollars: Their cost, US dollars.
    """

    asked: int = 0
    remembered: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    dollars: float = 0.0


class _Retry(Exception):
    """The server did not answer; the request may be repeated."""

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another server."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Headers, newurl: str
    ) -> None:
        return None


@dataclass
class Endpoint:
    """A server with an OpenAI-compatible API (``POST URL/chat/completions``): OpenAI's, vLLM's, llama.cpp's, ….

    Every answer is cached in the run directory and never requested again. The key is read from this process's
    environment. It is sent only to the server, and is neither written nor logged.

    Attributes:
        url: The address without ``/chat/completions``, e.g. ``https://api.openai.com/v1``.
        model: The model's name on the server.
        storage: The run directory.
        temperature: Sampling temperature.
        limits: Limits on the use of the server.
    """

    url: str
    model: str
    storage: Storage
    temperature: float = 0.3
    limits: Limits = field(default_factory=Limits)
    spent: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        self._key = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise MilanError(f"{self.url!r} is no address of a server: give http://… or https://… up to /v1.")
        if parts.username or parts.password or parts.query:
            raise MilanError(f"the address of a language model carries a key: put it into ${KEYS[0]} instead.")
        if self._key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise MilanError(
                f"{self.url} would be sent the key of ${KEYS[0]} or ${KEYS[1]} in the clear: give an https:// address, "
                "or unset it."
            )
        self.url = self.url.rstrip("/")
        self._lock = threading.Lock()
        self._next = 0.0
        self._opener = urllib.request.build_opener(_NoRedirect)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model

    def identity(self) -> dict[str, object]:
        """Everything that determines its answers besides the conversations, as far as a client can tell."""
        return {"url": self.url, "model": self.model, "temperature": self.temperature, "longest": LONGEST}

    def to(self, device: torch.device) -> Endpoint:
        """Returns itself: there is nothing to move."""
        return self

    def answers(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """One answer per conversation, from the cache or the server.

        Raises:
            MilanError: The server refuses, does not answer, or would cost more than allowed.
        """
        with ThreadPoolExecutor(self.limits.at_once) as threads:
            return list(threads.map(self._answer, conversations))

    def _answer(self, conversation: Sequence[Message]) -> str:
        body = {
            "model": self.model,
            "messages": list(conversation),
            "temperature": self.temperature,
            "max_tokens": LONGEST,
        }
        name = hashlib.sha256(canonical({"url": self.url, **body}).encode()).hexdigest()[:32]
        path = f"{CACHE}/{name[:2]}/{name}.json"
        with suppress(FileNotFoundError, ValueError, TypeError, KeyError):  # absent, or damaged
            cached = json.loads(self.storage.get(path))["answer"]
            if isinstance(cached, str):
                with self._lock:
                    self.spent.remembered += 1
                return cached
        answer, used = self._ask(body)
        self.storage.put(path, json.dumps({"answer": answer, "model": self.model, "usage": used}).encode())
        return answer

    def _ask(self, body: dict[str, Any]) -> tuple[str, dict[str, int]]:
        pause = self.limits.pause
        for left in range(self.limits.tries, 0, -1):
            self._wait_for_turn()
            try:
                return self._post(body)
            except _Retry as error:
                if left == 1:
                    raise MilanError(
                        f"{self.url} did not answer {self.limits.tries} times, the last time: {error}; run the command "
                        "again later: answers that came are kept."
                    ) from error
                # Jitter: requests that failed together must not be repeated together.
                time.sleep(error.after if error.after is not None else pause * (0.5 + random.random()))
                pause *= 2
        raise AssertionError("unreachable")

    def _wait_for_turn(self) -> None:
        """Waits until another request is allowed.

        Raises:
            MilanError: The budget is spent.
        """
        with self._lock:
            budget = self.limits.budget
            if budget is not None and self.spent.dollars >= budget:
                raise MilanError(
                    f"the language model has cost ${self.spent.dollars:.2f} of ${budget:.2f} allowed: raise "
                    "--llm-budget and run the command again; answers that came are kept."
                )
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + 60 / self.limits.per_minute
        time.sleep(turn - now)

    def _post(self, body: dict[str, Any]) -> tuple[str, dict[str, int]]:
        headers = {"Content-Type": "application/json", "User-Agent": "milan_ray"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self.limits.timeout) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            why = f"HTTP {error.code} {error.reason}"
            if error.code in (408, 409, 425, 429) or error.code >= 500:
                raise _Retry(why, _seconds(error.headers.get("Retry-After"))) from error
            hint = {401: f"set ${KEYS[0]} to its key", 403: f"see that the key in ${KEYS[0]} may use {self.model}"}
            raise MilanError(
                f"{self.url} refuses {self.model}: {why}; {hint.get(error.code, 'see --llm and --llm-model')}."
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Retry(reason(error)) from error
        return self._read(content)

    def _read(self, content: bytes) -> tuple[str, dict[str, int]]:
        try:
            answer = json.loads(content)
            text = answer["choices"][0]["message"]["content"] or ""
            used = {
                name: int((answer.get("usage") or {}).get(name) or 0) for name in ("prompt_tokens", "completion_tokens")
            }
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise MilanError(
                f"{self.url} does not speak OpenAI's protocol (no choices[0].message.content in its answer): see --llm."
            ) from error
        with self._lock:
            self.spent.asked += 1
            self.spent.tokens_in += used["prompt_tokens"]
            self.spent.tokens_out += used["completion_tokens"]
            self.spent.dollars += (
                used["prompt_tokens"] * self.limits.input_price + used["completion_tokens"] * self.limits.output_price
            ) / 1e6
        return str(text), used

    def say_usage(self) -> None:
        """Prints the use of the server."""
        spent = self.spent
        say(
            f"language model {self.model}: {spent.asked} answers, {spent.remembered} from the cache, "
            f"{spent.tokens_in} + {spent.tokens_out} tokens, ${spent.dollars:.2f}"
        )


def _seconds(text: str | None) -> float | None:
    """The number of seconds in a ``Retry-After`` header, at most 120; None for other values."""
    try:
        return None if text is None else min(max(float(text), 0.0), 120.0)
    except ValueError:
        return None
