"""Everything that can go wrong, and whose fault it is.

Owns the error tree. Each class carries blame (who must act), the HTTP status an edge answers with
and a machine-readable `code`. Knows no transport: edges translate once, by class, never by text.
Messages are for people: what failed, where, what to do. They never contain prompt text.
"""

from __future__ import annotations


class EdgeLLMError(Exception):
    """Root of the tree. `message` is shown to people, `code` to programs."""

    status = 500
    code = "internal_error"
    is_retryable = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ClientError(EdgeLLMError):
    """The caller asked for the impossible. Never retried."""

    status = 400
    code = "invalid_request"


class InvalidRequest(ClientError):
    """A field is missing, unknown or out of range; `param` names it."""


class UnknownModel(ClientError):
    """No worker serves this model."""

    status = 404
    code = "model_not_found"


class UnknownWorker(ClientError):
    """No worker of this name answers."""

    status = 404
    code = "worker_not_found"


class ContextTooLong(ClientError):
    """Prompt and requested tokens do not fit the context; the message has both numbers."""

    code = "context_length_exceeded"


class PayloadTooLarge(ClientError):
    """The body is larger than this edge accepts."""

    status = 413
    code = "payload_too_large"


class Unauthorized(ClientError):
    """Missing, forged, expired, replayed or misdirected credential."""

    status = 401
    code = "unauthorized"


class InvalidApiKey(Unauthorized):
    """No API key, or one that is not in the keys file."""

    code = "invalid_api_key"


class ExpiredApiKey(Unauthorized):
    """An API key whose time is over."""

    code = "expired_api_key"


class Forbidden(ClientError):
    """The API key, or where the request came from, does not allow this."""

    status = 403
    code = "forbidden"


class NotOperator(Forbidden):
    """This API key may ask and not change workers."""

    def __init__(self, key_id: str) -> None:
        super().__init__(
            f"the API key {key_id} may not change workers: its entry needs `operator: true` "
            "(`edge-llm serve api-key --operator` makes one)"
        )


class ModelNotAllowed(Forbidden):
    """The API key may not use this model."""

    code = "model_not_allowed"


class HeadTooLarge(ClientError):
    """Request line and headers are larger than this edge accepts."""

    status = 431
    code = "headers_too_large"


class NotJSON(ClientError):
    """A body of another kind than this edge reads."""

    status = 415
    code = "unsupported_media_type"


class BodyTooSlow(ClientError):
    """The client did not send its request in time."""

    status = 408
    code = "request_timeout"


class Overloaded(EdgeLLMError):
    """No room now; `retry_after_s` says when to come back."""

    status = 503
    code = "overloaded"
    is_retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WorthAWait(Overloaded):
    """There is room, but what is better is full and will be free soon."""


class ShuttingDown(Overloaded):
    """This gateway is stopping on purpose: another one, or this one in a while, takes new requests."""

    code = "draining"


class LimitReached(Overloaded):
    """The caller reached a limit of its own, however idle the cluster is; `code` says which."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, code: str = code) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.code = code


class ReaderTooSlow(EdgeLLMError):
    """The client takes its answer more slowly than this edge can keep it."""

    status = 408
    code = "reader_too_slow"


class DeadlinePassed(EdgeLLMError):
    """The caller's time is over: whatever is left of the work is dropped."""

    status = 504
    code = "deadline_exceeded"


class WorkerError(EdgeLLMError):
    """This worker failed; another may not. Sessions replan."""

    status = 503
    code = "worker_failed"
    is_retryable = True


class Draining(WorkerError):
    """This worker is stopping on purpose: it holds the KV of what ran until somebody has fetched it."""

    code = "draining"


class WorkerUnreachable(WorkerError):
    """No connection, or it broke."""

    code = "worker_unreachable"


class WorkerSilent(WorkerUnreachable):
    """It is there, or seems to be, and says nothing for too long, or gets nowhere."""


class PrefillFailed(WorkerError):
    """The prefill worker gave up; chunks already received stay valid."""

    code = "prefill_failed"


class EngineFailed(WorkerError):
    """llama.cpp refused a call (`llama_decode` < 0, no cells, load failure)."""

    code = "engine_failed"


class RestoreRefused(WorkerError):
    """llama.cpp did not take a snapshot, or what it holds afterwards is not what was sent."""

    code = "restore_refused"


class ProtocolError(EdgeLLMError):
    """Bytes between our own processes that do not follow the protocol."""

    code = "protocol_error"


class LocalProtocolError(ProtocolError):
    """We were about to send nonsense: a bug of ours."""


class RemoteProtocolError(ProtocolError):
    """The peer sent nonsense: drop the connection, recompute, never try the bytes."""

    status = 502


class IncompatibleKV(RemoteProtocolError):
    """Well-formed KV of another model, geometry or cache type."""

    code = "incompatible_kv"


class CatalogueError(EdgeLLMError):
    """models.yaml, download, checksum, GGUF header, quantization."""

    code = "catalogue_error"


class ChecksumMismatch(CatalogueError):
    """The bytes are not the bytes that models.yaml promises."""

    code = "checksum_mismatch"


class ConfigError(EdgeLLMError):
    """A setting is unknown or impossible; the message names file, key and allowed values."""

    code = "config_error"
