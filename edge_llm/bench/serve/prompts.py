"""Bodies of requests: prompts of so many tokens that share no beginning, and the fields that force a length. Pure.

Owns the JSON that is sent. Refuses to know servers; what one takes (token ids, text) and how many tokens a word of it
is, target.py finds out.

A prompt depends on seed, label and number of its request only: whoever is compared gets the same, and no prompt begins
as an earlier one did. Token ids are exact; text has about as many tokens as asked, and the server's count is reported.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from edge_llm.bench.serve.workloads import Request
from edge_llm.bench.streams import prompt_ids

Endpoint = Literal["completions", "chat"]
PATHS: Final[Mapping[Endpoint, str]] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
# Common words, one token each in most vocabularies.
WORDS: Final = (
    "the of and to in is that for it was on are as with they be at one have this from or had by word but what some "
    "we can out other were all there when up use your how said an each she which do their time if will way about "
    "many then them write would like so these her long make thing see him two has look more day could go come did "
    "number sound no most people my over know water than call first who may down side been now find any new work "
    "part take get place made live where after back little only round man year came show every good me give our "
    "under name very through just form think"
).split()


@dataclass(frozen=True, slots=True)
class Style:
    """How prompts are made for one server. `vocab_size` > 0: token ids. Else words: a prompt of n of them has about
    `base_tokens + n * tokens_per_word` tokens there."""

    vocab_size: int = 0
    tokens_per_word: float = 1.0
    base_tokens: float = 0.0

    @property
    def takes_ids(self) -> bool:
        return self.vocab_size > 0


@dataclass(frozen=True, slots=True)
class Options:
    """The same in every body of a run. `extra` goes into it as it is."""

    endpoint: Endpoint = "completions"
    model: str = ""
    is_stream: bool = True
    ignores_eos: bool = True
    temperature: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return PATHS[self.endpoint]


def body(request: Request, style: Style, options: Options, seed: str) -> dict[str, Any]:
    """What is sent. `seed`: of the prompt, whatever makes it another one."""
    found: dict[str, Any] = {"max_tokens": request.answer_tokens, "temperature": options.temperature}
    if options.model:
        found["model"] = options.model
    if options.ignores_eos:
        found["ignore_eos"] = True
    if options.is_stream:
        found |= {"stream": True, "stream_options": {"include_usage": True}}
    if request.messages is not None:
        said: dict[str, Any] = {"messages": list(request.messages)}
    elif options.endpoint == "chat":
        said = {"messages": [{"role": "user", "content": _prompt(request, style, seed)}]}
    else:
        said = {"prompt": _prompt(request, style, seed)}
    return combined(found, said, options.extra)


def _prompt(request: Request, style: Style, seed: str) -> str | list[int]:
    if request.text is not None:
        return request.text
    if request.ids is not None:
        return list(request.ids)
    number = zlib.crc32(f"{seed}/{request.number}".encode())
    if style.takes_ids:
        return prompt_ids(request.prompt_tokens, style.vocab_size, number)
    return words(round((request.prompt_tokens - style.base_tokens) / style.tokens_per_word), number)


def words(count: int, seed: int) -> str:
    """So many words, one at least; the first ones are drawn too."""
    return " ".join(random.Random(seed).choices(WORDS, k=max(1, count)))


def combined(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of all; later ones beat earlier ones, objects are merged."""
    found: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            known = found.get(key)
            if isinstance(known, Mapping) and isinstance(value, Mapping):
                found[key] = combined(known, value)
            else:
                found[key] = value
    return found
