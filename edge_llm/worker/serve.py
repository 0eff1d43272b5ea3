"""A worker process: settings in, engine loaded, port bound, HTTP served, drained on SIGTERM.

Owns the order of start and stop. Shared with the gateway process: binding, key reading, announcing and logging, in
edge_llm/serving.py.
"""

from __future__ import annotations

import gc
import sys
from typing import Final

import structlog

from edge_llm.config import WorkerConfig, levels_dir
from edge_llm.engine.engine import Engine, EngineFacts, Vocabulary
from edge_llm.errors import ConfigError
from edge_llm.machine import available_memory_bytes, usable_cores
from edge_llm.serving import Server, bind, configure_logging, read_keys
from edge_llm.worker.app import create_app
from edge_llm.worker.worker import Worker

log = structlog.get_logger()

SWITCH_S: Final = 0.0005


def run_worker(config: WorkerConfig) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ConfigError, CatalogueError, EngineFailed before the port answers."""
    configure_logging(config.log_level)  # before anything is said: stdout is for being ready
    keys = read_keys(config.key_file, config.key_fd)
    socket = bind(config.host, config.port)
    port = socket.getsockname()[1]
    config = config.model_copy(update={"name": config.name or f"{config.role}-{port}", "port": port})
    engine, vocabulary = _simulated(config) if config.simulate else _loaded(config)
    if config.role == "prefill" and not engine.facts.serves_prompts:
        raise ConfigError(
            f"{engine.facts.model_name} cannot serve role prefill: {engine.facts.split_reason}; give its workers role "
            "mixed (`edge-llm up --prefill 0 --decode 0 --mixed 1`)"
        )
    warn_of_context(engine.facts)
    worker = Worker(config, engine, vocabulary, keys)
    # what is loaded stays: a full collection that walks it would hold up every running stream for tens of milliseconds
    gc.collect()
    gc.freeze()
    # the engine thread takes the interpreter lock several times a step: beside a long request that is being parsed it
    # would wait the default 5 ms each time, and running streams with it
    sys.setswitchinterval(SWITCH_S)
    server = Server(create_app(worker), socket, drain=worker.drain)
    worker.on_death = server.fail
    server.run(config.announce, {"worker": config.name, "role": worker.role, "level": engine.facts.level})


def warn_of_context(facts: EngineFacts) -> None:
    """A context that is longer than the model's own works, and what is said past the model's makes no sense."""
    if 0 < facts.n_ctx_train < facts.n_ctx:
        log.warning(
            "the context is longer than what the model was trained for",
            model=facts.model_name,
            n_ctx=facts.n_ctx,
            n_ctx_train=facts.n_ctx_train,
            message=f"what it says past {facts.n_ctx_train} tokens makes no sense: --n-ctx {facts.n_ctx_train}",
        )


def _loaded(config: WorkerConfig) -> tuple[Engine, Vocabulary]:
    """The engine, with what it keeps for the other role's work unless there is no memory for that."""
    from edge_llm.catalogue.resolve import resolve
    from edge_llm.engine.load import LlamaSettings, load

    model = resolve(config.model)

    def loaded(slots: int, serves_prompts: bool) -> tuple[Engine, Vocabulary]:
        return load(
            LlamaSettings(
                model_path=model.path,
                model_name=model.name,
                model_sha256=model.sha256,
                n_ctx=config.n_ctx,
                slots=slots,
                serves_prompts=serves_prompts,
                chunk_tokens=config.chunk_tokens,
                k_type=config.k_type,
                v_type=config.v_type,
                policy=config.policy,
                flash_attention=config.flash_attention,
                threads=config.threads or usable_cores(),
                threads_batch=config.threads_batch or usable_cores(),
                prefix_cache_bytes=config.prefix_cache_bytes,
                level_cap=config.level_cap,
                levels_dir=levels_dir(),
                available_bytes=config.memory_limit_bytes or available_memory_bytes(),
            )
        )

    own, whole = (_slots(config, 0), config.role != "decode"), (_slots(config), _serves_prompts(config))
    try:
        return loaded(*whole)
    except ConfigError as error:
        # the sum is checked before anything is loaded; a board that has room for one role is still a worker
        if own == whole:
            raise
        log.warning("no memory to help out in the other role", role=config.role, message=error.message.split("\n")[0])
        return loaded(*own)


def _slots(config: WorkerConfig, spare: int | None = None) -> int:
    if config.role != "prefill":
        return config.slots
    return config.spare_slots if spare is None else spare


def _serves_prompts(config: WorkerConfig) -> bool:
    return config.role != "decode" or config.spare_prompts


def _simulated(config: WorkerConfig) -> tuple[Engine, Vocabulary]:
    from edge_llm.engine.simulated import MODEL, SimulatedSettings, create_simulated

    rate = config.simulated_prompt_tokens_per_s
    settings = SimulatedSettings(
        n_ctx=config.n_ctx,
        slots=_slots(config),
        serves_prompts=_serves_prompts(config),
        chunk_tokens=config.chunk_tokens,
        model_name=config.model if "model" in config.model_fields_set else MODEL,
        prompt_token_s=1 / rate if rate else 0.0,
        decode_run_s=config.simulated_step_s,
        decode_row_s=config.simulated_row_s,
    )
    return create_simulated(settings)
