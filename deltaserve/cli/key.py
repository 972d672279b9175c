"""``deltaserve key``."""

from __future__ import annotations

import typer


def run() -> None:
    """Make a key for a tenant of the tenants file: shown once, and its digest for the file.

    Example: deltaserve key
    """
    from deltaserve.tenancy.keys import digest, new_key

    key = new_key()
    typer.echo(f"key:    {key}")
    typer.echo(f"sha256: {digest(key)}")
