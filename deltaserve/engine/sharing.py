"""Rows and memory of tenants: who has more than his share, while another waits for any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from deltaserve.engine.policy import Policy
from deltaserve.engine.sequence import Sequence

PATIENCE_S = 0.25
"""What a request waits for rows to become free by themselves: a preemption costs work."""


def over_share(
    running: Iterable[Sequence],
    first: Sequence,
    policy: Policy,
    size: Callable[[Sequence], int],
    total: int,
) -> list[Sequence]:
    """What runs of the tenants who hold more than their share, if that of ``first`` holds less.

    A share is ``total`` divided by weight among the tenants who run and the one who waits. Nothing
    that goes before ``first`` by the policy, or by age where that has them equal (it would be
    admitted again at once), and nothing that aged. A policy without tenants has no shares.
    """
    band, tenant = policy.flow(first.request)
    place = band, policy.rank((band, tenant)), first.number
    held: Counter[str] = Counter()
    weights = {tenant: first.request.weight}
    candidates = []
    for seq in running:
        flow = its_band, its_tenant = policy.flow(seq.request)
        held[its_tenant] += size(seq)
        weights[its_tenant] = seq.request.weight
        behind = (its_band, policy.rank(flow), seq.number) > place
        if behind and seq.first_since is None:
            candidates.append((its_tenant, seq))
    unit = total / sum(weights.values())
    if held[tenant] + size(first) > unit * weights[tenant]:
        return []
    return [seq for name, seq in candidates if held[name] > unit * weights[name]]
