"""Where a delta can come from: a directory inside the roots, a repository of the hub, or an address
of a web server or an object store."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from deltaserve.errors import RequestError
from deltaserve.registry.objects import Objects
from deltaserve.registry.roots import Roots

HUB = "hf://"
HUB_URI = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
# What a delta consists of (docs/format.md); whatever else a repository holds stays there.
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md")

Download = Callable[..., str]
"""huggingface_hub.snapshot_download, or a test's own."""


class Sources:
    """Turns what an administrator names into a directory that can be read."""

    def __init__(
        self,
        roots: Roots,
        cache: Path,
        download: Download = snapshot_download,
        objects: Objects | None = None,
    ) -> None:
        """``cache``: where repositories are kept; made when the first is fetched."""
        self._roots = roots
        self._cache = cache
        self._download = download
        self._objects = objects

    def stop(self) -> None:
        """The server ends: downloads from object stores do, too."""
        if self._objects is not None:
            self._objects.stop()

    def is_unchecked(self, uri: str) -> bool:
        """Its bytes come from elsewhere, and nobody has compared them with their digest yet."""
        return uri.startswith(HUB)

    def fetch(self, uri: str) -> Path:
        """The directory of a delta. Takes as long as the download; call it from a thread.

        Raises RequestError: outside the roots, malformed, absent, or cannot be reached.
        """
        if "://" not in uri:
            return self._roots.resolve(uri)
        if not uri.startswith(HUB):
            if self._objects is not None:
                return self._objects.fetch(uri)
            scheme = uri.partition("://")[0][:32]
            raise RequestError(
                f"deltas cannot be fetched from {scheme}:// addresses here: have the server "
                "started with --delta-url, or download it into one of the delta_roots and give "
                "its path",
                param="path",
            )
        match = HUB_URI.fullmatch(uri)
        if match is None or ".." in uri:  # a revision becomes part of a path in the cache
            raise RequestError(f"{uri[:512]!r} is not hf://OWNER/NAME@REVISION", param="path")
        return self._fetch_hub(uri, match["repo"], match["revision"])

    def _fetch_hub(self, uri: str, repo: str, revision: str | None) -> Path:
        try:
            folder = self._download(
                repo, revision=revision, cache_dir=self._cache, allow_patterns=list(HUB_FILES)
            )
        except HFValidationError as error:
            raise RequestError(f"{uri[:512]!r}: {error}", param="path") from error
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise RequestError(f"{uri} cannot be fetched: {reason[0]}", param="path") from error
        return Roots([self._cache]).resolve(folder)
