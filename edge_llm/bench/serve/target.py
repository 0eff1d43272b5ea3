"""What a server is: which model, whether it takes token ids, how many tokens a word is there.

Owns asking it before anything is measured: its list of models, and a few short requests as they will be sent, so that
a wrong address, key, model or field is an error at once and not a hundred failed requests. What a server may do better
at once (HTTP 500, a broken connection) is asked again a few times. Refuses to know loads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import aiohttp
import msgspec

from edge_llm.bench.least_busy import LeastBusy
from edge_llm.bench.processes import MeasureFailed
from edge_llm.bench.record import ModelFacts
from edge_llm.bench.serve.answers import TIMEOUT, UNREACHABLE, Answer, Call
from edge_llm.bench.serve.driver import replay
from edge_llm.bench.serve.prompts import Options, Style, body
from edge_llm.bench.serve.workloads import Request

PromptKind = Literal["auto", "ids", "text"]
# A vocabulary of this size is part of nearly every one.
SAFE_VOCAB: Final = 20_000
_TOKENS_PER_WORD: Final = 1.3
_MODELS_S: Final = 15.0
_MODELS_BYTES: Final = 1 << 20
_PROBE_IDS: Final = 8
_PROBE_WORDS: Final = (32, 160)
_NO_IDS: Final = frozenset({"http_400", "http_404", "http_415", "http_422", "http_500", "http_501"})
# The pauses before a first request is sent again: one bad answer of eight shall not end a run.
_PAUSES_S: Final = (0.1, 0.3, 0.9)
_OVERLOADED: Final = "http_429"


class NoLook(MeasureFailed):
    """A first request failed for good. `is_ours`: what was asked for cannot work there (address, key, model, a field),
    so that nothing would come of asking for more; else the server is at fault, and that is a finding."""

    def __init__(self, message: str, kind: str = "", is_ours: bool = True) -> None:
        super().__init__(message)
        self.kind, self.is_ours = kind, is_ours

    @property
    def is_silent(self) -> bool:
        """Every further request would take all the time that one may take."""
        return self.kind == TIMEOUT


@dataclass(frozen=True, slots=True)
class Target:
    """Servers that get requests in turn (one as a rule), and how they are asked. `facts` go into the record."""

    name: str
    urls: tuple[str, ...]
    options: Options
    style: Style
    n_ctx: int | None
    model: ModelFacts
    facts: Mapping[str, Any]
    notes: tuple[str, ...] = ()


class _Meta(msgspec.Struct, frozen=True):
    """What our gateway (`vocab_size`) and llama-server (`n_vocab`) say of a model."""

    vocab_size: int | None = None
    n_vocab: int | None = None
    n_ctx: int | None = None
    sha256: str | None = None
    quantization: str | None = None
    architecture: str | None = None
    kv_bytes_per_token: int | None = None
    size: int | None = None
    ftype: str | None = None


class _Model(msgspec.Struct, frozen=True):
    """`max_model_len`: vLLM's word for a context."""

    id: str
    meta: _Meta | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct, frozen=True):
    data: list[_Model]


async def look(
    session: aiohttp.ClientSession,
    name: str,
    urls: Sequence[str],
    options: Options,
    prompts: PromptKind,
    vocab_size: int | None,
    timeout_s: float,
) -> tuple[Target, NoLook | None]:
    """As far as the server can be known, and what it failed at: it is then asked in the usual way."""
    trouble: NoLook | None = None
    models, notes = [_Model(options.model)], list[str]()
    try:
        listed = [await _models(session, url) for url in urls]
        models = [_chosen(one, options.model) for one in listed]
    except NoLook as error:
        trouble = error
    meta = models[0].meta or _Meta()
    asked = replace(options, model=options.model or models[0].id)
    vocab_size = vocab_size or meta.vocab_size or meta.n_vocab
    has_ids = prompts != "text" and options.endpoint == "completions"
    style = Style(vocab_size or SAFE_VOCAB) if has_ids else Style(tokens_per_word=_TOKENS_PER_WORD)
    try:
        for url in urls if trouble is None else ():
            style, notes = await _style(session, name, url, asked, prompts, vocab_size, timeout_s)
    except NoLook as error:
        trouble = error
    n_ctx = meta.n_ctx or models[0].max_model_len
    facts = {
        "urls": list(urls),
        "model": asked.model,
        "n_ctx": n_ctx,
        "vocab_size": vocab_size,
        "prompts": "token ids" if style.takes_ids else "text",
        "tokens_per_word": None if style.takes_ids else round(style.tokens_per_word, 4),
    }
    if trouble is not None:
        facts["first_look"], notes = trouble.message, [f"{name}: {trouble.message}"]
    model = _facts(models[0].id or "unnamed", meta)
    return Target(name, tuple(urls), asked, style, n_ctx, model, facts, tuple(notes)), trouble


def _facts(name: str, meta: _Meta) -> ModelFacts:
    """As far as the server tells; some name a model by its file."""
    file = name.rpartition("/")[2]
    return ModelFacts(
        name=file.removesuffix(".gguf"),
        file=file if file.endswith(".gguf") else "",
        sha256=meta.sha256 or "",
        size_bytes=meta.size or 0,
        quantization=meta.quantization or meta.ftype or "",
        architecture=meta.architecture or "",
        kv_bytes_per_token=meta.kv_bytes_per_token or 0,
    )


async def _models(session: aiohttp.ClientSession, url: str) -> list[_Model]:
    """Empty for a server that has no such list, or hangs up on who asks for it: completions will show what it does."""
    for pause_s in _PAUSES_S:
        try:
            return await _listed(session, url)
        except NoLook as error:
            if error.kind != UNREACHABLE:
                raise
        await asyncio.sleep(pause_s)
    return await _listed(session, url)


async def _listed(session: aiohttp.ClientSession, url: str) -> list[_Model]:
    where = f"{url}/v1/models"
    try:
        async with asyncio.timeout(_MODELS_S), session.get(where, allow_redirects=False) as reply:
            data = await _read(reply)
            if reply.status in (401, 403):
                raise NoLook(f"{where} says HTTP {reply.status}: give a key that may, with --api-key-file")
            if reply.status != 200:
                return []
            return msgspec.json.decode(data, type=_Models).data
    except (msgspec.MsgspecError, aiohttp.ServerDisconnectedError):
        return []
    except (aiohttp.ClientError, OSError, ValueError) as error:  # a time-out is an OSError
        raise NoLook(
            f"nothing that speaks HTTP answers at {where} ({str(error) or type(error).__name__}): is the server up, "
            "is the address right?",
            TIMEOUT if isinstance(error, TimeoutError) else UNREACHABLE,
        ) from error


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    """All of it: one reading ends where a segment of TCP does. Raises ValueError for more than a list of models has."""
    data = bytearray()
    async for part in reply.content.iter_any():
        data += part
        if len(data) > _MODELS_BYTES:
            raise ValueError(f"more than {_MODELS_BYTES} bytes")
    return bytes(data)


def _chosen(models: Sequence[_Model], wanted: str) -> _Model:
    """The one that is asked for, else the first. One that is not in the list may be an alias: the server will say."""
    return next((model for model in models if model.id == wanted or not wanted), _Model(wanted))


async def _style(
    session: aiohttp.ClientSession,
    name: str,
    url: str,
    options: Options,
    prompts: PromptKind,
    vocab_size: int | None,
    timeout_s: float,
) -> tuple[Style, list[str]]:
    """Token ids where they are taken (and wanted), else words, counted."""
    if prompts != "text" and options.endpoint == "completions":
        style = Style(vocab_size or SAFE_VOCAB)
        answer = await _probe(session, url, style, options, _PROBE_IDS, timeout_s)
        if not answer.error:
            known = [] if vocab_size else [f"{name} does not say how large its vocabulary is: ids up to {SAFE_VOCAB}"]
            return style, known
        if prompts == "ids" or answer.kind not in _NO_IDS:
            raise _failed(url, answer, options)
    elif prompts == "ids":
        raise NoLook("a chat has no token ids: use --endpoint completions, or text")
    return await _counted_words(session, name, url, options, timeout_s)


async def _counted_words(
    session: aiohttp.ClientSession, name: str, url: str, options: Options, timeout_s: float
) -> tuple[Style, list[str]]:
    """How many tokens a word is, and how many come with every prompt, by the server's count of two of them."""
    few, many = _PROBE_WORDS
    answers = [await _probe(session, url, Style(), options, words, timeout_s) for words in (few, many)]
    for answer in answers:
        if answer.error:
            raise _failed(url, answer, options)
    counts = [answer.prompt_tokens for answer in answers]
    if counts[0] is None or counts[1] is None or counts[1] <= counts[0]:
        note = f"{name} does not count prompts: {_TOKENS_PER_WORD} tokens per word are assumed"
        return Style(tokens_per_word=_TOKENS_PER_WORD), [note]
    per_word = (counts[1] - counts[0]) / (many - few)
    return Style(tokens_per_word=per_word, base_tokens=counts[0] - few * per_word), []


async def _probe(
    session: aiohttp.ClientSession, url: str, style: Style, options: Options, tokens: int, timeout_s: float
) -> Answer:
    """The first answer without an error, or the last of a few."""
    for pause_s in _PAUSES_S:
        answer = await _probed(session, url, style, options, tokens, timeout_s)
        if not answer.error or _is_ours(answer.kind):
            return answer
        await asyncio.sleep(pause_s)
    return await _probed(session, url, style, options, tokens, timeout_s)


async def _probed(
    session: aiohttp.ClientSession, url: str, style: Style, options: Options, tokens: int, timeout_s: float
) -> Answer:
    request = Request(tokens, tokens, 2)
    call = Call(0.0, body(request, style, options, f"probe {tokens}"), 2, may_stop=True, prompt_tokens=tokens)
    (answer,) = await replay([call], session, LeastBusy([url]), None, path=options.path, timeout_s=timeout_s)
    return answer


def _is_ours(kind: str) -> bool:
    """Whether the same request would fail the same way again: nobody there, silence, or a no to what was asked."""
    return kind in (UNREACHABLE, TIMEOUT) or (kind.startswith("http_4") and kind != _OVERLOADED)


def _failed(url: str, answer: Answer, options: Options) -> NoLook:
    """What a first request met, and what may help."""
    hints = {
        UNREACHABLE: "is the server up, is the address right?",
        "http_401": "give a key with --api-key-file",
        "http_403": "this key may not",
        "http_404": "it has no such route or model: see --endpoint and --model",
        TIMEOUT: "give more time with --timeout",
    }
    hint = hints.get(answer.kind, "")
    if answer.kind in ("http_400", "http_422") and options.ignores_eos:
        hint = "a server that knows no ignore_eos needs --no-ignore-eos"
    why = f"a first request to {url}{options.path} failed: {answer.error}" + (f" ({hint})" if hint else "")
    return NoLook(why, answer.kind, _is_ours(answer.kind))
