"""What a worker stands for while it lives: its role, and whether it takes new work. An operator may change both.

Owns the two, and giving running sequences away. Refuses to know tickets, HTTP, and how a sequence is given away.

Invariants: a role is taken only if the engine can fill it: slots and the prompt context were made when it was loaded.
A worker that drains takes nothing new, finishes the prompts that it reads for others, and hands its running sequences
over, also those that were accepted before a drain was taken back and begun again; what it keeps it still gives away.
Only the end of the process cannot be taken back. Both belong to this life: started again, a worker is what its settings
say and takes work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, Protocol

import structlog

from edge_llm.engine.engine import EngineFacts
from edge_llm.errors import Draining, InvalidRequest
from edge_llm.worker.messages import Role

log: Final = structlog.get_logger()


class Sequences(Protocol):
    """What runs here. Implementation: DecodeRole."""

    @property
    def sequences_running(self) -> int: ...

    def hand_over(self, goes_on: Callable[[], bool]) -> Awaitable[None]: ...


class Standing:
    """Of one worker. `sequences`: None until it runs, and where nothing decodes."""

    def __init__(self, name: str, role: Role, facts: Callable[[], EngineFacts]) -> None:
        self._name, self._role, self._facts = name, role, facts
        self.sequences: Sequences | None = None
        self.is_draining = self.is_ending = False
        self._leaving: asyncio.Task[None] | None = None
        self._drains = 0

    @property
    def role(self) -> Role:
        """What this worker was started as or told to be, unless its model cannot do that. What it can do is another
        matter: slots and serves_prompts in its status say it."""
        if not self._facts().slots:
            return "prefill"
        return self._role if self._facts().serves_prompts else "decode"

    def take_role(self, role: Role) -> None:
        """Stand for `role` from now on; what runs goes on. Raises InvalidRequest that says what is missing."""
        facts = self._facts()
        if role != "prefill" and not facts.slots:
            raise InvalidRequest(
                f"worker {self._name} cannot decode: it was loaded without slots (role prefill and spare_slots 0, or "
                f"no memory for them); start it again with role {role}",
                param="role",
            )
        if role != "decode" and not facts.serves_prompts:
            why = facts.split_reason or "it was loaded without a prompt context (role decode and no spare_prompts)"
            raise InvalidRequest(
                f"worker {self._name} cannot read prompts for others: {why}; start it again with role {role}",
                param="role",
            )
        if role != self._role:
            log.info("role", was=self._role, role=role)
        self._role = role

    def drain(self) -> None:
        """Take nothing new, and hand over what runs. Returns at once."""
        if not self.is_draining:
            log.info("draining")
            self._drains += 1
        self.is_draining = True
        if self._leaving is None or self._leaving.done():
            self._leaving = asyncio.create_task(self._leave(), name="hand over")

    def resume(self) -> None:
        """Take work again; what was not handed over yet stays. Raises Draining when the process is about to end."""
        if self.is_ending:
            raise Draining(f"worker {self._name} is stopping: that cannot be taken back")
        if self.is_draining:
            log.info("draining taken back")
        self.is_draining = False

    async def end(self) -> None:
        """Drain for good; returns when nothing is left to hand over."""
        self.is_ending = True
        self.drain()
        assert self._leaving is not None
        await self._leaving

    async def close(self) -> None:
        """Leave no task behind."""
        if self._leaving is not None:
            self._leaving.cancel()
            await asyncio.gather(self._leaving, return_exceptions=True)

    async def _leave(self) -> None:
        # a sequence may come between a drain that was taken back and the next one
        while self.is_draining and self.sequences is not None and self.sequences.sequences_running:
            try:
                await self.sequences.hand_over(partial(self._goes_on, self._drains))
            except Exception as error:  # top of the task: the sequences run on here
                log.error("handing over failed", error=repr(error), exc_info=True)
                return

    def _goes_on(self, drain: int) -> bool:
        """A drain that was taken back is over, also when the next one began at once."""
        return self.is_draining and self._drains == drain
