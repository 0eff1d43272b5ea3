"""API keys: who may use the endpoint, as whom, and how much.

The keys file is YAML (JSON is YAML too), a list of entries; `edge-llm serve api-key --name NAME` prints one:

  - id: alice                    # named in logs and limits; the key itself never is
    sha256: 64 hex digits        # of the key
    tenant: family               # whose kept prompts it shares; without: its id
    requests_per_minute: 60      # this and all below: optional
    tokens_per_minute: 40000     # prompt + max_tokens
    max_streams: 4               # answers at once
    models: [smollm2-135m-instruct-q4_1]
    expires: 2030-01-31          # a date (its end, UTC) or a time with its zone
    operator: true               # sees the decisions on everybody's requests in GET /cluster, not only its tenant's,
                                 # and may take workers out and give them other roles (operating.py)

Owns the format, the comparison and reading the file again when it changes. Refuses to know HTTP and counting. A plain
SHA-256 is enough for what is stored: keys are 256 random bits, nobody guesses them.

Invariants: a credential is compared with every entry, in constant time, before anything is decided; a file that
everybody can read is refused; a file that turns bad while the gateway runs leaves the last good keys in force, loudly.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Any, Final, Protocol

import structlog
import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError

from edge_llm.config import ClosedLoader
from edge_llm.errors import ConfigError, ExpiredApiKey, InvalidApiKey

PREFIX: Final = "sk-edge-"
MAX_KEY_CHARS: Final = 512
_NAME: Final = r"^[A-Za-z0-9._-]{1,64}$"
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What a credential stands for. None = no limit, all models, no end. `expires_s`: seconds since the epoch."""

    id: str
    tenant: str
    sha256: bytes = b""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_streams: int | None = None
    models: frozenset[str] | None = None
    expires_s: float | None = None
    is_operator: bool = False

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


# For an endpoint without keys: everybody on this machine, whose user may see all.
ANYBODY: Final = ApiKey(id="anybody", tenant="", is_operator=True)


class Credentials(Protocol):
    """Who is who. Implementations: KeysFile, NoKeys."""

    is_open: bool
    """Whether everybody who reaches the port is let in."""

    def identify(self, credential: str, now_s: float) -> ApiKey:
        """The key that `credential` is, at `now_s` (seconds since the epoch). Raises Unauthorized."""


class NoKeys:
    """`--no-auth`, on loopback."""

    is_open = True

    def identify(self, credential: str, now_s: float) -> ApiKey:
        return ANYBODY


class KeysFile:
    """Keys out of one file."""

    is_open = False

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a file that cannot be used."""
        self._path = path
        self._stamp = self._look()
        self._keys = self._read()
        self._complaint = ""

    def identify(self, credential: str, now_s: float) -> ApiKey:
        self._read_again()
        # a board without a clock of its own begins in the past: it is later at least than when the file was written
        return identify(self._keys, credential, max(now_s, 1e-9 * self._stamp[0]))

    def _look(self) -> tuple[int, ...]:
        """What changes when the file does."""
        try:
            stat = self._path.stat()
        except OSError as error:
            raise ConfigError(f"cannot read the API keys {self._path}: {error.strerror}") from error
        return stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_mode

    def _read(self) -> tuple[ApiKey, ...]:
        try:
            if self._path.stat().st_mode & 0o007:
                raise ConfigError(f"{self._path} can be read by everybody: chmod 600 {self._path}")
            return parse_keys(self._path.read_text(), str(self._path))
        except OSError as error:
            raise ConfigError(f"cannot read the API keys {self._path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"the API keys {self._path} are not text in UTF-8") from error

    def _read_again(self) -> None:
        stamp = self._stamp
        try:
            stamp = self._look()
            if stamp == self._stamp:
                return  # said already, if it is a bad one
            self._keys, self._stamp, self._complaint = self._read(), stamp, ""
            log.info("API keys read again", file=str(self._path), keys=len(self._keys))
        except ConfigError as error:
            if not isinstance(error.__cause__, OSError):
                self._stamp = stamp  # until it is written again; what could not be opened is tried again
            if error.message != self._complaint:
                self._complaint = error.message
                log.error("the API keys read last stay in force", why=error.message)


def identify(keys: Sequence[ApiKey], credential: str, now_s: float) -> ApiKey:
    """Compares with all of `keys`, whichever matches. Raises InvalidApiKey, the same for none and for a wrong one,
    or ExpiredApiKey."""
    digest = hashlib.sha256(credential[: MAX_KEY_CHARS + 1].encode("utf-8", "surrogatepass")).digest()
    found = [key for key in keys if hmac.compare_digest(key.sha256, digest)]
    if not found or len(credential) > MAX_KEY_CHARS:
        raise InvalidApiKey("this endpoint needs an API key: send `Authorization: Bearer KEY` or `x-api-key: KEY`")
    (key,) = found
    if key.expires_s is not None and now_s >= key.expires_s:
        raise ExpiredApiKey(f"the API key {key.id} has expired")
    return key


def new_key(name: str, tenant: str, *, is_operator: bool = False) -> tuple[str, str]:
    """A new key, and the line for the file. Raises ConfigError for a name that a file could not have."""
    for what in (name, tenant):
        if not re.fullmatch(_NAME, what):
            raise ConfigError(f"{what!r} is not a name: 1 to 64 letters, digits, dots, dashes and underscores")
    key = PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(key.encode()).hexdigest()
    rights = ", operator: true" if is_operator else ""
    return key, f'- {{id: "{name}", sha256: "{digest}", tenant: "{tenant}"{rights}}}'


# -- the file

_Count = Annotated[int, Field(strict=True, ge=1, le=10**9)]


def _moment(value: object) -> datetime | date | None:
    """YAML knows dates, JSON writes them as text."""
    if isinstance(value, str):
        return date.fromisoformat(value) if len(value) == len("2030-01-31") else datetime.fromisoformat(value)
    if value is None or isinstance(value, date):
        return value
    raise ValueError("a date (2030-01-31) or a time with its zone (2030-01-31T12:00:00Z)")


class _Entry(BaseModel):
    """One entry as written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=_NAME)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tenant: Annotated[str, Field(pattern=_NAME)] | None = None
    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None
    max_streams: _Count | None = None
    models: Annotated[list[str], Field(min_length=1)] | None = None
    expires: Annotated[datetime | date | None, PlainValidator(_moment)] = None
    operator: Annotated[bool, Field(strict=True)] = False


_ENTRIES: Final = TypeAdapter(list[_Entry])


def parse_keys(text: str, where: str) -> tuple[ApiKey, ...]:
    """Keys out of YAML text. Raises ConfigError that names file, entry and key, and never shows a value of `sha256`."""
    try:
        content: Any = yaml.load(text, Loader=ClosedLoader)
        entries = _ENTRIES.validate_python(content)
    # the library lets what it cannot make of a date or of a very deep list through as it is
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise ConfigError(
            f"{where}: {place}: {problem['msg']}; the keys are {', '.join(_Entry.model_fields)}"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not YAML: {getattr(error, 'problem', type(error).__name__)}") from None
    keys = tuple(_key(entry, where) for entry in entries)
    for what in ("id", "sha256"):
        if len({getattr(key, what) for key in keys}) != len(keys):
            raise ConfigError(f"{where} has the same {what} twice")
    if not keys:
        raise ConfigError(f"{where} holds no key; `edge-llm serve api-key --name NAME` prints one")
    return keys


def _key(entry: _Entry, where: str) -> ApiKey:
    return ApiKey(
        id=entry.id,
        tenant=entry.tenant or entry.id,
        sha256=bytes.fromhex(entry.sha256),
        requests_per_minute=entry.requests_per_minute,
        tokens_per_minute=entry.tokens_per_minute,
        max_streams=entry.max_streams,
        models=None if entry.models is None else frozenset(entry.models),
        expires_s=_end_s(entry.expires, where),
        is_operator=entry.operator,
    )


def _end_s(expires: datetime | date | None, where: str) -> float | None:
    """Seconds since the epoch; a date ends with its day in UTC."""
    if expires is None:
        return None
    if not isinstance(expires, datetime):
        if expires == date.max:  # written for "never": it has no next day
            return None
        return datetime.combine(expires + timedelta(days=1), time(), UTC).timestamp()
    if expires.tzinfo is None:
        raise ConfigError(f"{where}: expires {expires} has no zone: write 2030-01-31T12:00:00Z, or the date alone")
    return expires.timestamp()
