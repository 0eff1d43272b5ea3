"""Scoring texts in a process of its own: `python -m edge_llm.engine.score`, one JSON line in, one out.

Owns what a figure of accuracy is computed from: log-likelihoods of continuations, the second half of windows of a long
text (llama-perplexity's method) and its divergence from another model's, and greedy answers. Refuses to know tasks,
data sets, prompts and what is right. The protocol is that of engine/asked.py.

A beginning that one request shares with the one before is not computed again: its KV stays, the rest is cut off. In
policy `exact` that changes no bit (prefill does not depend on its pieces); recurrent models, which cannot give back a
part of their state, compute everything.

Between two models only logits travel, through a file that is written anew for each window: the divergence of a model
from itself is exactly 0.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edge_llm.catalogue.gguf import read_card
from edge_llm.catalogue.memory import check_fits, repacked_tensors
from edge_llm.engine.asked import serve
from edge_llm.engine.load import LlamaSettings, model_memory
from edge_llm.engine.native import ContextSettings, NativeContext, NativeModel, build_facts, use_tiled_kernels
from edge_llm.engine.vocabulary import LlamaVocabulary
from edge_llm.errors import ContextTooLong, InvalidRequest
from edge_llm.machine import available_memory_bytes, cpu_kind

Result = dict[str, Any]
Rows = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
# Rows of logits that are turned into doubles at once: 20 MB for a vocabulary of 150,000.
_BLOCK: Final = 16
# Rows of logits that llama.cpp keeps of one call: 39 MB for such a vocabulary.
_OUTPUTS: Final = 64
_ADVICE: Final = "Lower --n-ctx or --slots, or use a smaller quantization of the model."


@dataclass(frozen=True, slots=True)
class Continuation:
    """Token ids of a text, of which those from `start` on are scored."""

    ids: tuple[int, ...]
    start: int


class Scorer:
    """A loaded model and what can be asked of it. Sequence 0 keeps its KV between requests."""

    def __init__(self, context: NativeContext, vocabulary: LlamaVocabulary, facts: Mapping[str, Any]) -> None:
        self._context, self._vocabulary, self._facts = context, vocabulary, facts
        self._held: list[int] = []  # the tokens whose KV sequence 0 has
        self._text: list[int] = []
        self.computed_tokens = 0

    def ready(self) -> Result:
        return {"event": "ready", **self._facts}

    def close(self) -> None:
        self._context.close()

    def answer(self, request: Mapping[str, Any]) -> Result:
        """Run one request."""
        arguments = dict(request)
        operations: dict[str, Callable[..., Result]] = {
            "score": self.score,
            "text": self.text,
            "window": self.window,
            "generate": self.generate,
        }
        name = arguments.pop("op", None)
        if name not in operations:
            raise InvalidRequest(f"unknown operation {name!r}: known are {', '.join(operations)}")
        before = self.computed_tokens
        result = operations[name](**arguments)
        return {"event": "result", **result, "computed_tokens": self.computed_tokens - before}

    # -- continuations

    def score(self, pairs: Sequence[Sequence[str]]) -> Result:
        """For each [context, continuation]: its log-likelihood (nats), tokens, and whether greedy decoding says it."""
        wanted = [split_pair(self._tokenize, context, text) for context, text in pairs]
        for one in wanted:
            self._check_room(len(one.ids))
        scores: list[Result] = []
        at = 0
        while at < len(wanted):
            stem = wanted[at].ids[: wanted[at].start]
            group = [one for one in wanted[at:] if one.ids[: one.start] == stem]
            count = len(group) if group == wanted[at : at + len(group)] else 1
            scores += self._score_group(stem, wanted[at : at + count])
            at += count
        return {"scores": scores}

    def _score_group(self, stem: tuple[int, ...], group: Sequence[Continuation]) -> list[Result]:
        """Continuations of one context, which is computed once; its last row scores the first token of each."""
        self._hold(stem[:-1])
        first = np.array(next(self._rows(stem[-1:]))[-1])
        scores = []
        for one in group:
            tail = one.ids[one.start :]
            if len(self._held) > len(stem) and not self._cut(len(stem)):
                self._hold(stem)
            rows = np.concatenate([first[None], *map(np.array, self._rows(tail[:-1]))])
            taken = log_likelihoods(rows, tail)
            is_greedy = bool(np.array_equal(rows.argmax(axis=1), np.asarray(tail)))
            scores.append({"logprob": float(taken.sum()), "tokens": len(tail), "is_greedy": is_greedy})
        return scores

    # -- windows of a long text

    def text(self, text: str) -> Result:
        """Take the text of the windows to come; how many tokens it has."""
        self._text = self._tokenize(text)
        return {"tokens": len(self._text), "ids_sha256": _digest(self._text)}

    def window(self, index: int, tokens: int, save: str = "", against: str = "") -> Result:
        """Negative log-likelihoods of the second half of window `index`, as llama-perplexity has them. `save` keeps the
        logits in a file; `against` compares with those that another model saved there."""
        ids = self._text[index * tokens : (index + 1) * tokens]
        if len(ids) < tokens:
            raise InvalidRequest(f"the text has no window {index} of {tokens} tokens: it has {len(self._text)} tokens")
        self._check_room(tokens)
        first, begin = tokens // 2, self._vocabulary.tokenize("", add_special=True, parse_special=False)[:1]
        given = [*begin, *ids[len(begin) :]]  # each window begins as a text does, if this model's texts begin specially
        targets = ids[first + 1 :]
        self._hold([])
        self._hold(given[:first])
        blocks = self._rows(given[first:-1])
        if save:
            with Path(save).open("wb") as file:
                losses = -log_likelihoods(_kept(blocks, file), targets)
        elif against:
            return self._divergence(blocks, targets, Path(against))
        else:
            losses = -log_likelihoods(blocks, targets)
        return {"nll": float(losses.sum()), "nll_squares": float((losses**2).sum()), "count": len(targets)}

    def _divergence(self, blocks: Iterator[Rows], targets: Sequence[int], path: Path) -> Result:
        """KL divergence of this model's distributions from the saved ones, and what goes with it."""
        size = len(targets) * self._facts["vocab_size"] * 4
        if not path.is_file() or path.stat().st_size != size:
            raise InvalidRequest("the other model's logits are of another vocabulary or another window")
        saved = np.memmap(path, np.float32, "r").reshape(len(targets), -1)
        parts, same, at = [], 0, 0
        for block in blocks:
            end = at + len(block)
            parts.append(compared(saved[at:end], block, targets[at:end]))
            same += int((saved[at:end].argmax(axis=1) == block.argmax(axis=1)).sum())
            at = end
        other, own, kl = np.concatenate(parts, axis=1)
        shifts = np.exp(-own) - np.exp(-other)  # of the probability of the text's own next token
        return {
            "nll": float(own.sum()),
            "nll_squares": float((own**2).sum()),
            "count": len(targets),
            "base_nll": float(other.sum()),
            "base_nll_squares": float((other**2).sum()),
            "nll_products": float((own * other).sum()),
            "same_top": same,
            "shift_squares": float((shifts**2).sum()),
            "kl": [float(f"{value:.6g}") for value in kl],
            "kl_sum": float(kl.sum()),
            "kl_squares": float((kl**2).sum()),
        }

    # -- answers

    def generate(
        self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = (), system: str = "", is_chat: bool = False
    ) -> Result:
        """Greedy answers, several at once. `is_chat`: each prompt is a user's message in the model's template."""
        slots = self._context.settings.n_seq
        if len(prompts) > slots:
            raise InvalidRequest(f"{len(prompts)} prompts at once, but {slots} sequences")
        self._hold([])
        answers = [_Answer(ids, stop, max_tokens) for ids in (self._prompt_ids(p, system, is_chat) for p in prompts)]
        for answer in answers:
            if not answer.prompt:
                raise InvalidRequest("an empty prompt has no answer")
            self._check_room(len(answer.prompt) + max_tokens)
        for seq, answer in enumerate(answers):
            self._prompt(answer.prompt[:-1], 0, seq)
        while active := [seq for seq, answer in enumerate(answers) if not answer.stopped]:
            rows = self._context.decode(
                [answers[seq].last for seq in active], [answers[seq].length - 1 for seq in active], active
            )
            self.computed_tokens += len(active)
            for seq, token in zip(active, rows.argmax(axis=1), strict=True):
                answers[seq].take(int(token), self._vocabulary)
        for seq in range(len(answers)):
            self._context.remove(seq)
        return {"answers": [answer.result() for answer in answers]}

    def _prompt_ids(self, prompt: str, system: str, is_chat: bool) -> list[int]:
        if not is_chat:
            return self._tokenize(f"{system}\n\n{prompt}" if system else prompt)
        messages = [{"role": "user", "content": prompt}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        text = self._vocabulary.render_chat(messages)
        return self._vocabulary.tokenize(text, add_special=False, parse_special=True)

    # -- the sequence

    def _tokenize(self, text: str) -> list[int]:
        """Data is text: what looks like a special token in it is none."""
        return self._vocabulary.tokenize(text, add_special=True, parse_special=False)

    def _check_room(self, tokens: int) -> None:
        if tokens > self._context.settings.n_ctx:
            raise ContextTooLong(f"{tokens} tokens do not fit into a context of {self._context.settings.n_ctx}")

    def _hold(self, ids: Sequence[int]) -> None:
        """KV of exactly `ids` in sequence 0, without what is there already."""
        same = _common(self._held, ids)
        if same < len(self._held) and not self._cut(same):
            same = 0
        self._prompt(ids[same:], same, 0)
        self._held = list(ids)

    def _cut(self, length: int) -> bool:
        """Keep the first `length` tokens; False: nothing is left."""
        if length and self._context.truncate(0, length):
            del self._held[length:]
            return True
        self._context.remove(0)
        self._held = []
        return False

    def _prompt(self, ids: Sequence[int], p0: int, seq: int) -> None:
        rows = self._context.settings.rows
        for at in range(0, len(ids), rows):
            self._context.prompt(ids[at : at + rows], p0 + at, seq)
        self.computed_tokens += len(ids)

    def _rows(self, ids: Sequence[int]) -> Iterator[Rows]:
        """Append `ids` to sequence 0; logits behind each of them, block by block, each valid until the next."""
        size = self._context.settings.outputs
        for at in range(0, len(ids), size):
            part = list(ids[at : at + size])
            p0 = len(self._held)
            self._held += part
            self.computed_tokens += len(part)
            yield self._context.decode(part, range(p0, p0 + len(part)), [0] * len(part))


class _Answer:
    """One greedy answer while it grows."""

    def __init__(self, prompt: Sequence[int], stop: Sequence[str], max_tokens: int) -> None:
        self.prompt, self._stop, self._max_tokens = list(prompt), stop, max_tokens
        self._ids: list[int] = []
        self._bytes = b""
        self.stopped = ""

    @property
    def last(self) -> int:
        return self._ids[-1] if self._ids else self.prompt[-1]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self._ids)

    def take(self, token: int, vocabulary: LlamaVocabulary) -> None:
        if token in vocabulary.stop_ids:
            self.stopped = "end"
            return
        self._ids.append(token)
        self._bytes += vocabulary.piece(token)
        if any(stop.encode() in self._bytes for stop in self._stop):
            self.stopped = "stop"
        elif len(self._ids) >= self._max_tokens:
            self.stopped = "length"

    def result(self) -> Result:
        text = self._bytes.decode(errors="replace")
        cuts = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        return {
            "text": text[: min(cuts)] if cuts else text,
            "tokens": len(self._ids),
            "prompt_tokens": len(self.prompt),
            "stopped": self.stopped,
            "ids_sha256": _digest(self._ids),
        }


def split_pair(tokenize: Callable[[str], list[int]], context: str, continuation: str) -> Continuation:
    """Where a continuation begins, as the usual harness (lm-eval) has it: blanks at the end of the context belong to
    the continuation, and the whole is tokenized as one text. At least one token is scored, and one is not."""
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    whole = tokenize(context + continuation)
    if len(whole) < 2:
        raise InvalidRequest("a continuation needs a context")
    return Continuation(tuple(whole), max(1, min(len(tokenize(context)), len(whole) - 1)))


def log_likelihoods(rows: Rows | Iterator[Rows], targets: Sequence[int]) -> Doubles:
    """ln p(target) under each row of logits, in doubles."""
    parts = [rows] if isinstance(rows, np.ndarray) else rows
    found, at = [], 0
    for part in parts:
        for begin in range(0, len(part), _BLOCK):
            block = _log_softmax(part[begin : begin + _BLOCK])
            found.append(block[np.arange(len(block)), targets[at : at + len(block)]])
            at += len(block)
    return np.concatenate(found) if found else np.zeros(0)


def compared(base: Rows, own: Rows, targets: Sequence[int]) -> Doubles:
    """[-ln p_base(target), -ln p_own(target), KL(base || own)] of each row, in nats, over the whole vocabulary."""
    found = []
    for begin in range(0, len(base), _BLOCK):
        p, q = _log_softmax(base[begin : begin + _BLOCK]), _log_softmax(own[begin : begin + _BLOCK])
        at = np.arange(len(p)), targets[begin : begin + _BLOCK]
        found.append(np.stack([-p[at], -q[at], (np.exp(p) * (p - q)).sum(axis=1)]))
    return np.concatenate(found, axis=1)


def _log_softmax(rows: Rows) -> Doubles:
    doubles = rows.astype(np.float64)
    doubles -= doubles.max(axis=1, keepdims=True)
    doubles -= np.log(np.exp(doubles).sum(axis=1, keepdims=True))
    return doubles


def _kept(blocks: Iterator[Rows], file: Any) -> Iterator[Rows]:
    for block in blocks:
        file.write(np.ascontiguousarray(block).data)
        yield block


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    for at, (mine, its) in enumerate(zip(one, other, strict=False)):
        if mine != its:
            return at
    return min(len(one), len(other))


def _digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(ids, np.int32).tobytes()).hexdigest()


def load_scorer(settings: LlamaSettings) -> Scorer:
    """Raises ConfigError when it does not fit, CatalogueError for a bad file, EngineFailed when llama.cpp refuses."""
    card = read_card(settings.model_path)
    repacked = repacked_tensors(card, cpu_kind().split("/")[0]) if settings.policy == "exact" else []
    if settings.available_bytes is not None:
        check_fits(model_memory(card, settings, repacked), settings.available_bytes, settings.model_name, _ADVICE)
    use_tiled_kernels(settings.policy == "fast")
    model = NativeModel(settings.model_path, policy=settings.policy, repacked=repacked)
    outputs = min(settings.rows, _OUTPUTS)
    wanted: ContextSettings = settings.context(n_seq=settings.slots, is_unified=False, outputs=outputs)
    vocabulary = LlamaVocabulary(model)
    facts = {
        "architecture": card.architecture,
        "quantization": card.quantization,
        "vocab_size": model.n_vocab,
        "n_ctx": settings.n_ctx,
        "n_ctx_train": model.n_ctx_train,
        "slots": settings.slots,
        "policy": settings.policy,
        "is_flash_attention": settings.effective_flash_attention != "off",
        "has_chat_template": model.metadata("tokenizer.chat_template") is not None,
        "build": build_facts() | {"repacked_tensors": str(len(repacked))},
    }
    return Scorer(NativeContext(model, wanted), vocabulary, facts)


def _settings(arguments: Sequence[str]) -> LlamaSettings:
    parser = argparse.ArgumentParser(prog="python -m edge_llm.engine.score", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--n-ctx", type=int, default=2048)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--policy", choices=["exact", "fast"], default="exact")
    parser.add_argument("--k-type", choices=["f16", "f32", "bf16", "q8_0", "q4_0"], default="f16")
    given = parser.parse_args(arguments)
    return LlamaSettings(
        model_path=given.model,
        model_name=given.model.stem,
        model_sha256="",  # nothing here leaves the process
        n_ctx=given.n_ctx,
        slots=given.slots,
        serves_prompts=False,
        chunk_tokens=given.rows,
        k_type=given.k_type,
        threads=given.threads,
        threads_batch=given.threads,
        policy=given.policy,
        available_bytes=available_memory_bytes(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve requests from stdin until it ends."""
    settings = _settings(sys.argv[1:] if arguments is None else arguments)
    return serve(lambda: load_scorer(settings))


if __name__ == "__main__":
    sys.exit(main())
