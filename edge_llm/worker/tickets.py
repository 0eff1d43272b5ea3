"""Tickets: the right to ask one worker for one thing, signed by the gateway with the cluster key.

Pure: time and randomness are arguments. Owns the key file format, signing, verification, the replay memory, the
derivation of a transfer's own key, and the proof that an answer comes from a holder of the key. Refuses to know HTTP
and what an operation does.

Key file: one `kid:hex` line per key (at least 32 bytes each), the first signs, all verify. Only gateways sign: for a
rotation put the new key second and restart all, then first and restart gateways, then remove the old one. Clocks of the
boards may differ by MAX_SKEW_S.

Invariants: the MAC is compared in constant time before the claims are parsed; a ticket works once, for one
audience, one operation, one body (or one list of token ids), and starts within its lifetime: LIFETIME_S after it was
signed, or as much later as the gateway expects that it is used, MAX_LIFETIME_S at most.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from edge_llm.errors import ConfigError, Overloaded, Unauthorized

LIFETIME_S: Final = 60.0
# A prompt of 4,096 tokens behind three others on a board that reads 20 a second.
MAX_LIFETIME_S: Final = 900.0
MAX_SKEW_S: Final = 30.0
MIN_KEY_BYTES: Final = 32
MAX_NONCES: Final = 1 << 16
MAX_TICKET_CHARS: Final = 8192
SCHEME: Final = "EdgeLLM"
PROOF_HEADER: Final = "x-edge-llm-proof"

Operation = Literal["tokenize", "decode", "cancel", "events", "prefill", "keep", "status", "drain", "role"]


class Claims(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a ticket allows. `body_sha256` binds the body of a call from the gateway, `ids_sha256` the token ids of a
    prefill (whose bearer is the decode worker, `tenant` whose kept KV it may get); what is not used is empty.
    `peers`: worker -> address. `lifetime_s`: how long after it was signed it may be used."""

    audience: str
    operation: Operation
    request_id: str
    issued_s: float
    nonce: str
    body_sha256: str = ""
    ids_sha256: str = ""
    peers: dict[str, str] = {}
    tenant: str = ""
    lifetime_s: float = LIFETIME_S

    @property
    def ends_s(self) -> float:
        """When its life ends, on the clock of whoever signed it."""
        return self.issued_s + min(self.lifetime_s, MAX_LIFETIME_S)


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The cluster's keys by id; the first one signs."""

    keys: dict[str, bytes]

    @classmethod
    def parse(cls, text: str, where: str) -> KeyRing:
        """Keys out of a key file's text. Raises ConfigError, never showing key material."""
        keys: dict[str, bytes] = {}
        for number, line in enumerate(text.split(), 1):
            kid, _, digits = line.partition(":")
            try:
                key = binascii.unhexlify(digits)
            except (binascii.Error, ValueError) as error:
                raise ConfigError(f"{where}, key {number}: not `kid:hex`") from error
            if not kid.isalnum() or len(kid) > 32 or kid in keys or len(key) < MIN_KEY_BYTES:
                raise ConfigError(f"{where}, key {number}: needs a new alphanumeric id and {MIN_KEY_BYTES} bytes")
            keys[kid] = key
        if not keys:
            raise ConfigError(f"{where} holds no key; `edge-llm serve key` prints one")
        return cls(keys)

    def sign(self, claims: Claims) -> str:
        kid, key = next(iter(self.keys.items()))
        body = base64.urlsafe_b64encode(msgspec.json.encode(claims)).decode().rstrip("=")
        return f"{kid}.{body}.{_mac(key, 'ticket', f'{kid}.{body}').hex()}"

    def verify(self, ticket: str, audience: str, operation: Operation, now_s: float) -> Claims:
        """The claims of a ticket that is good for this worker and operation now. Raises Unauthorized."""
        _, body = self._authentic(ticket)
        try:
            data = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
            claims = msgspec.json.decode(data, type=Claims)
        except (binascii.Error, msgspec.DecodeError, ValueError) as error:
            raise Unauthorized("the ticket's claims cannot be read") from error
        if claims.audience != audience:
            raise Unauthorized(f"the ticket is for worker {claims.audience}, this is {audience}")
        if claims.operation != operation:
            raise Unauthorized(f"the ticket allows {claims.operation}, not {operation}")
        age_s = now_s - claims.issued_s
        if age_s < -MAX_SKEW_S or now_s > claims.ends_s + MAX_SKEW_S:
            raise Unauthorized(f"the ticket was signed {age_s:.0f} s ago: expired, or the clocks of the boards differ")
        return claims

    def transfer_key(self, ticket: str) -> bytes:
        """The key of the transfer that a prefill ticket allows: both ends hold the ticket and the cluster key."""
        kid, _ = self._authentic(ticket)
        return _mac(self.keys[kid], "transfer", ticket)

    def prove(self, ticket: str, body: bytes) -> str:
        """What shows to who signed the ticket that this answer to it comes from a holder of its key."""
        kid, _ = self._authentic(ticket)
        return _mac(self.keys[kid], "answer", f"{ticket}\0{body_digest(body)}").hex()

    def is_proven(self, proof: str, ticket: str, body: bytes) -> bool:
        """Whether an answer to this ticket, which was signed here, comes from a holder of its key."""
        return hmac.compare_digest(self.prove(ticket, body).encode(), proof.encode(errors="surrogateescape"))

    def _authentic(self, ticket: str) -> tuple[str, str]:
        kid, _, rest = ticket.partition(".")
        body, _, digits = rest.partition(".")
        key = self.keys.get(kid)
        if key is None or len(ticket) > MAX_TICKET_CHARS:
            raise Unauthorized("the ticket is signed with a key this worker does not have")
        if not hmac.compare_digest(_mac(key, "ticket", f"{kid}.{body}").hex().encode(), digits.encode()):
            raise Unauthorized("the ticket is not authentic")
        return kid, body


class ReplayGuard:
    """Remembers nonces until their tickets have expired; bounded."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}

    def use(self, claims: Claims, now_s: float) -> None:
        """Raises Unauthorized when this ticket was used before, Overloaded when too many were used to remember more."""
        if len(self._seen) >= MAX_NONCES:
            self._seen = {nonce: until for nonce, until in self._seen.items() if until > now_s}
        if claims.nonce in self._seen:
            raise Unauthorized("the ticket was used before")
        if len(self._seen) >= MAX_NONCES:
            raise Overloaded(f"more than {MAX_NONCES} calls within minutes", retry_after_s=LIFETIME_S)
        self._seen[claims.nonce] = claims.ends_s + 2 * MAX_SKEW_S


def body_digest(body: bytes) -> str:
    """sha256 hex of a request body."""
    return hashlib.sha256(body).hexdigest()


def authorization(ticket: str) -> dict[str, str]:
    """The header that carries a ticket."""
    return {"authorization": f"{SCHEME} {ticket}"}


def ticket_of(header: str | None) -> str:
    """The ticket in an authorization header. Raises Unauthorized."""
    scheme, _, ticket = (header or "").partition(" ")
    if scheme != SCHEME or not ticket:
        raise Unauthorized("this route needs a ticket of the cluster's gateway")
    return ticket


def _mac(key: bytes, purpose: str, text: str) -> bytes:
    return hmac.new(key, f"edge-llm {purpose}\0{text}".encode(), hashlib.sha256).digest()
