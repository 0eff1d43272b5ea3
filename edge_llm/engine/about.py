"""What this build of llama.cpp is, and what a worker would publish with a model: `python -m edge_llm.engine.about`.

Owns two questions and a line of JSON for each. It is a process of its own because a build for another CPU dies with
SIGILL, and because who asks (`edge-llm doctor`) must not wait for llama.cpp unless it has to. Without arguments it
loads no model; with --settings (a worker's settings as JSON) it loads the model as that worker would, with short
contexts.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from edge_llm.engine.native import build_facts
from edge_llm.errors import EdgeLLMError


def main(argv: list[str] | None = None) -> int:
    """Entry point. The build is said before a model is touched: loading one may be what kills the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings")
    options = parser.parse_args(argv)
    _say({"build": build_facts()})
    if options.settings is not None:
        try:
            _say({"published": _published(json.loads(options.settings))})
        except EdgeLLMError as error:
            _say({"published": {"problem": error.message}})
    return 0


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _published(settings: dict[str, Any]) -> dict[str, str]:
    """Level and reason. Lengths and slots are no part of an exactness class: the least is loaded."""
    from edge_llm.catalogue.resolve import resolve
    from edge_llm.config import WorkerConfig, levels_dir
    from edge_llm.engine.load import LlamaSettings, load_backend
    from edge_llm.machine import available_memory_bytes

    config = WorkerConfig(**settings)
    model = resolve(config.model)
    backend = load_backend(
        LlamaSettings(
            model_path=model.path,
            model_name=model.name,
            model_sha256=model.sha256,
            n_ctx=512,
            slots=1,
            serves_prompts=False,
            chunk_tokens=config.chunk_tokens,
            k_type=config.k_type,
            v_type=config.v_type,
            policy=config.policy,
            flash_attention=config.flash_attention,
            level_cap=config.level_cap,
            levels_dir=levels_dir(),
            available_bytes=config.memory_limit_bytes or available_memory_bytes(),
        )
    )
    facts = backend.facts
    backend.close()
    return {"level": facts.level, "reason": facts.level_reason}


if __name__ == "__main__":
    sys.exit(main())
