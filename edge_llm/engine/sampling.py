"""One token out of logits: a pure function of (logits, token history, parameters, seed, position).

Owns the order of operations (llama.cpp's chain: bias, penalties, top-k, top-p, min-p, temperature, draw) and its
cost: work on the whole vocabulary is a few vectorized passes, everything else runs on the survivors. No state, no
random generator object: the draw is a hash of (seed, position), so a resumed answer continues as it would have.

Invariants: ties go to the lowest token id everywhere; sums that decide are float64 over candidates in one fixed
order (descending logit, then id; plain id order when nothing is truncated); the caller's logits are never
written to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

import numpy as np
import numpy.typing as npt

from edge_llm.errors import EngineFailed
from edge_llm.request import SamplingParams

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

# First guess of how many candidates hold a top-p mass; grown when it was too few.
_FIRST_CANDIDATES: Final = 256
_BLOCK: Final = 1024
# Logits per block maximum when the largest are looked for.
_GROUP: Final = 32


def sample(logits: Floats, history: Sequence[int], params: SamplingParams, position: int) -> int:
    """Draw the token for `position` (its absolute position in the sequence).

    `logits` float32 [vocab]; `history` all ids before it, prompt included. Raises EngineFailed for NaN logits.
    """
    logits = _biased(_penalized(logits, history, params), params)
    # what is 0 as float32 is 0: the whole vocabulary is divided by it
    if np.float32(params.temperature) == 0 or params.top_k == 1:
        return _argmax(logits)
    u = uniform(params.seed, position)
    if not params.top_k and params.top_p >= 1.0 and params.min_p == 0.0:
        return _pick_of_all(logits, params.temperature, u)
    ids, values = _candidates(logits, params)
    weights = _weights(values, params.temperature)
    return int(ids[_pick(weights, u)])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but (seed, position): 53 bits of blake2b."""
    digest = blake2b(position.to_bytes(8, "little"), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _argmax(logits: Floats) -> int:
    best = int(logits.argmax())
    # argmax puts NaN first, so one look at the winner finds any
    if not math.isfinite(logits[best]):
        raise EngineFailed("the model gave logits that are not numbers; its file or this build is damaged")
    return best


def _penalized(logits: Floats, history: Sequence[int], params: SamplingParams) -> Floats:
    """llama_sampler_penalties: repeat divides or multiplies, frequency and presence subtract; seen ids only."""
    is_off = params.repeat_penalty == 1.0 and not params.frequency_penalty and not params.presence_penalty
    if is_off or params.penalty_last_n == 0 or not history:
        return logits
    seen = Counter(history if params.penalty_last_n < 0 else history[-params.penalty_last_n :])
    ids = np.fromiter(seen, np.int64, len(seen))
    counts = np.fromiter(seen.values(), np.float32, len(seen))
    values = logits[ids]
    repeat = np.float32(params.repeat_penalty)
    values = np.where(values <= 0, values * repeat, values / repeat)
    values -= counts * np.float32(params.frequency_penalty) + np.float32(params.presence_penalty)
    changed = logits.copy()
    changed[ids] = values
    return changed


def _biased(logits: Floats, params: SamplingParams) -> Floats:
    if not params.logit_bias:
        return logits
    ids, biases = np.frombuffer(params.bias_ids, np.int64), np.frombuffer(params.biases, np.float32)
    known = (ids >= 0) & (ids < len(logits))
    changed = logits.copy()
    changed[ids[known]] += biases[known]
    return changed


def _candidates(logits: Floats, params: SamplingParams) -> tuple[Ids, Floats]:
    """Ids and logits that survive top-k, top-p and min-p, best first. Truncation looks at temperature 1."""
    best = logits[_argmax(logits)]
    if 0 < params.top_k < len(logits):
        ids, values = _largest(logits, params.top_k)
        total = float(_weights(values, 1.0).sum())
    else:
        ids, values, total = _nucleus(logits, float(best), params)
    keep = len(values)
    if params.top_p < 1.0:
        mass = np.cumsum(_weights(values, 1.0))
        keep = min(keep, int(np.searchsorted(mass, params.top_p * total)) + 1)
    if params.min_p > 0.0:
        floor = float(best) + float(np.log(params.min_p))
        keep = min(keep, max(1, int(np.count_nonzero(values.astype(np.float64) >= floor))))
    return ids[:keep], values[:keep]


def _nucleus(logits: Floats, best: float, params: SamplingParams) -> tuple[Ids, Floats, float]:
    """Enough of the best candidates for top-p and min-p, and the mass of the whole vocabulary (0 if not needed)."""
    if params.top_p >= 1.0:
        floor = best + float(np.log(params.min_p)) if params.min_p > 0.0 else -np.inf
        return *_sorted(logits, np.flatnonzero(logits >= np.float32(floor))), 0.0
    total = float(np.exp(logits - np.float32(best)).sum(dtype=np.float64))
    count = _FIRST_CANDIDATES
    while True:
        ids, values = _largest(logits, min(count, len(logits)))
        if len(values) == len(logits) or float(_weights(values, 1.0).sum()) >= params.top_p * total:
            return ids, values, total
        count *= 8


def _largest(logits: Floats, count: int) -> tuple[Ids, Floats]:
    """The `count` largest, best first; at the border the lowest ids win."""
    if count >= len(logits):
        return _sorted(logits, np.arange(len(logits)))
    ids = np.flatnonzero(logits >= _floor(logits, count))
    values = logits[ids]
    border = np.partition(values, len(values) - count)[len(values) - count]
    above = ids[values > border]
    ties = ids[values == border][: count - len(above)]
    return _sorted(logits, np.concatenate([above, ties]))


def _floor(logits: Floats, count: int) -> np.float32:
    """A value that at least `count` logits reach: the smallest of the `count` best block maxima.

    Each of those blocks holds one that does. One pass of maxima costs a fifth of selecting in the whole vocabulary.
    """
    whole = len(logits) // _GROUP * _GROUP
    maxima = logits[:whole].reshape(_GROUP, -1).max(axis=0)
    if count >= len(maxima):
        return np.float32(-np.inf)
    return np.float32(np.partition(maxima, len(maxima) - count)[len(maxima) - count])


def _sorted(logits: Floats, ids: Ids) -> tuple[Ids, Floats]:
    ids = np.sort(ids)
    values = logits[ids]
    order = np.argsort(-values, kind="stable")
    return ids[order], values[order]


def _weights(values: Floats, temperature: float) -> npt.NDArray[np.float64]:
    """exp((value - best) / temperature) in float64; values are sorted, best first."""
    scaled = (values.astype(np.float64) - float(values[0])) / temperature
    weights: npt.NDArray[np.float64] = np.exp(scaled)
    return weights


def _pick_of_all(logits: Floats, temperature: float, u: float) -> int:
    """Inverse of the cumulative distribution over the whole vocabulary in id order, block by block: one pass of
    float32 exponentials, float64 sums, and a running sum only inside the block that is hit."""
    best = logits[_argmax(logits)]
    weights = np.exp((logits - best) / np.float32(temperature))
    starts = np.arange(0, len(weights), _BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights.astype(np.float64), starts))
    mark = u * blocks[-1]
    block = min(int(np.searchsorted(blocks, mark, side="right")), len(starts) - 1)
    start = int(starts[block])
    inside = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64) + (blocks[block - 1] if block else 0.0)
    return start + min(int(np.searchsorted(inside, mark, side="right")), len(inside) - 1)


def _pick(weights: npt.NDArray[np.float64], u: float) -> int:
    """Inverse of the cumulative distribution."""
    mass = np.cumsum(weights)
    return min(int(np.searchsorted(mass, u * mass[-1], side="right")), len(weights) - 1)
