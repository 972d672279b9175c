"""The exceptions that users see. Each message names what was wrong, where, and what to do.

The command line prints the message on one line and exits with code 2; the server
turns the request errors into OpenAI-shaped JSON with the matching status.
"""


class DeltaServeError(Exception):
    """Base of every error that is the user's to mend."""


class CheckpointError(DeltaServeError):
    """A model directory cannot be read: missing, truncated, pickle-only, not finite."""


class CompatibilityError(DeltaServeError):
    """Base and fine-tune do not belong together: architecture, shapes or configuration differ."""


class CodecError(DeltaServeError):
    """A codec was asked for something it cannot store, or holds data it cannot decode."""


class ArtifactError(DeltaServeError):
    """A delta artifact is missing, damaged, or of an unknown format."""


class BaseMismatchError(ArtifactError):
    """The delta was made for another base; the message shows both digests."""


class ConfigError(DeltaServeError):
    """An option or a configuration file is wrong."""


class UnsupportedModelError(DeltaServeError):
    """The engine does not know this architecture; the message lists those it does."""


class SelectionError(DeltaServeError):
    """A pool, graph, utility or budget is wrong, or a selection cannot go on."""


class PipelineError(DeltaServeError):
    """A plan, its data, or a saved state is wrong; the message names the operator or the row."""


class ServiceError(PipelineError):
    """The service of input pipelines is unreachable, or cannot do what it was asked."""


class OutputExistsError(DeltaServeError):
    """The output directory exists and is not empty."""


class RequestError(DeltaServeError):
    """A request is wrong (HTTP 400). ``param`` names the offending field where there is one."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModelError(RequestError):
    """A request names a model that is not served (HTTP 404)."""


class NotFoundError(RequestError):
    """A request names a tenant, a key or a version that does not exist (HTTP 404)."""


class ConflictError(RequestError):
    """What is asked for does not go with what there is (HTTP 409)."""


class AuthenticationError(RequestError):
    """No key, or one that opens nothing (HTTP 401)."""


class ForbiddenError(RequestError):
    """The key is known, but may not do this (HTTP 403)."""


class LimitError(RequestError):
    """A limit is used up (HTTP 429). limit: its name in the settings. retry_after_s: infinite if
    waiting does not help."""

    def __init__(
        self, message: str, *, limit: str, retry_after_s: float, param: str | None = None
    ) -> None:
        super().__init__(message, param=param)
        self.limit = limit
        self.retry_after_s = retry_after_s


class AccountingError(DeltaServeError):
    """Usage cannot be recorded, so nothing is answered (HTTP 503)."""


class QueueFullError(RequestError):
    """Too many requests wait already (HTTP 429). ``retry_after_s``: when there may be room."""

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int = 1) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class EngineDeadError(DeltaServeError):
    """The engine stopped; nothing can be generated until the server is restarted (HTTP 503)."""
