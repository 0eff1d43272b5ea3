"""Log-likelihood accuracy by llama-cpp-python's high-level API alone: shares no code with `edge-llm bench accuracy`.

    python tests/bench/accuracy/independent_choice.py MODEL.gguf ARC.jsonl RECORD.cases.jsonl

asks for the items of the task arc_easy that stand in the lines beside a record, and says for how many the pick (of the
sums, and of the sums per character) is the same. Exit code 1 when one differs.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Llama


def log_likelihood(model: Llama, context: str, continuation: str) -> float:
    """Sum over the tokens of the continuation, behind the context; natural logarithm."""
    both = model.tokenize((context + continuation).encode(), add_bos=True)
    start = len(model.tokenize(context.encode(), add_bos=True))
    model.reset()
    model.eval(both)
    total = 0.0
    for position in range(start, len(both)):
        logits = np.asarray(model.scores[position - 1], np.float64)
        logits -= logits.max()
        total += float(logits[both[position]] - np.log(np.exp(logits).sum()))
    return total


def picks(model: Llama, row: dict[str, Any]) -> tuple[int, int]:
    texts = row["choices"]
    sums = [log_likelihood(model, f"Question: {row['question']}\nAnswer:", f" {text}") for text in texts]
    return int(np.argmax(sums)), int(np.argmax([value / len(text) for value, text in zip(sums, texts, strict=True)]))


def main(model_path: str, data: str, cases: str) -> int:
    rows = {row["id"]: row for row in map(json.loads, Path(data).read_text().splitlines())}
    lines = [json.loads(line) for line in Path(cases).read_text().splitlines()]
    wanted = hashlib.sha256(Path(model_path).read_bytes()).hexdigest()
    asked = [line for line in lines if line.get("task") == "arc_easy" and line.get("model_sha256") == wanted]
    model = Llama(model_path=model_path, n_ctx=512, n_batch=512, logits_all=True, verbose=False)
    different = 0
    for line in asked:
        mine = picks(model, rows[line["item"]])
        if mine != (line["chosen"], line["chosen_norm"]):
            different += 1
            print(f"{line['item']}: here {mine}, in the record {line['chosen'], line['chosen_norm']}")
    print(f"{len(asked)} items, {different} different")
    return 1 if different or not asked else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
