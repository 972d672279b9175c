"""Rewrites of a plan that leave its stream as it is."""

from __future__ import annotations

from deltaserve.pipeline.plan import Plan


def rewrite(plan: Plan) -> tuple[Plan, list[str]]:
    return plan, []
