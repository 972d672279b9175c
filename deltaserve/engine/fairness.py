"""Fair shares by counting: every tenant's service in weighted tokens, the least served first.

Virtual Token Counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024,
arXiv 2401.00588), with priority bands in front of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from deltaserve.config import SchedulingPolicy
from deltaserve.engine.policy import Fcfs, Flow, Policy, Priority
from deltaserve.engine.types import EngineRequest

KEPT_COUNTERS = 4096
"""So many tenants are remembered before those are looked for whose counter says nothing."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What a token costs: of the prompt, drawn, and of the prompt but found computed."""

    input: float = 1.0
    output: float = 2.0
    cached: float = 0.1


class VirtualTokenCounters:
    """Priority bands, then the tenant with the least service per weight, then age.

    ``served[tenant]`` grows by price / weight: at admission for the prompt, per step for the
    token drawn; recomputation after a preemption is the server's loss and costs nothing. A
    tenant that comes back from idleness is *lifted*, so that nobody saves up service:

    1. to the least served tenant that waits in its band; or, if none does,
    2. to the tenant that was the last to leave the band's queue.

    Bound. Let two tenants f, g of one band have requests waiting during [t1, t2), all of them
    with their deltas in memory, and let W be the cost of what each was served in it. Then
    |W_f / w_f - W_g / w_g| <= 2 U / min(w_f, w_g). For: a counter grows by admissions, of which
    only the least served tenant's request is the next, nobody passing it when it does not fit,
    and by what is drawn for those that run. So the counters of two tenants that wait are never
    further apart than what one is charged from one of its admissions to the next: U / w. The
    paper has U = max(p_in * L_in, p_out * M), since all of that lies in memory together: M
    tokens, here the blocks times their size (a block that is partly used only lowers it). That
    takes room to be reserved to the end; our requests take a block when they grow, and one
    that ends leaves its room to those that go on. What is always true is that S running
    requests draw no more than S * L_out: U = p_in * L_in + p_out * S * L_out, which is within
    the paper's figure where S * L_out <= M - L_in. L: the longest prompt and answer. Requests
    that go first because of their age (``max_wait_s``) are charged, but not bounded.
    """

    def __init__(self, prices: Prices = Prices()) -> None:
        self.prices = prices
        self.served: dict[str, float] = {}
        self._last_to_leave: dict[int, str] = {}
        self._tidy_at = KEPT_COUNTERS

    def flow(self, request: EngineRequest) -> Flow:
        return request.priority, request.tenant

    def rank(self, flow: Flow) -> float:
        return self.served.get(flow[1], 0.0)

    def arrive(self, flow: Flow, waiting: Collection[Flow]) -> None:
        band, tenant = flow
        floor = min((self.rank(other) for other in waiting if other[0] == band), default=None)
        if floor is None:
            floor = self.served.get(self._last_to_leave.get(band, tenant), 0.0)
        self.served[tenant] = max(self.served.get(tenant, 0.0), floor)
        if len(self.served) > self._tidy_at:
            self._forget_the_lifted(floor, waiting)

    def leave(self, flow: Flow) -> None:
        band, tenant = flow
        self._last_to_leave[band] = tenant

    def charge_input(self, request: EngineRequest, num_cached: int) -> None:
        computed = len(request.prompt_ids) - num_cached
        self._charge(request, computed * self.prices.input + num_cached * self.prices.cached)

    def charge_output(self, request: EngineRequest) -> None:
        self._charge(request, self.prices.output)

    def dump(self) -> dict[str, float]:
        return dict(self.served)

    def _charge(self, request: EngineRequest, cost: float) -> None:
        served = self.served.get(request.tenant, 0.0)
        self.served[request.tenant] = served + cost / request.weight

    def _forget_the_lifted(self, floor: float, waiting: Collection[Flow]) -> None:
        """Drop counters that a lift would overwrite. Doubling the limit keeps this cheap."""
        kept = {tenant for _, tenant in waiting} | set(self._last_to_leave.values())
        self.served = {
            tenant: served
            for tenant, served in self.served.items()
            if served >= floor or tenant in kept
        }
        self._tidy_at = max(KEPT_COUNTERS, 2 * len(self.served))


def make_policy(name: SchedulingPolicy) -> Policy:
    """The policy of the knob ``scheduling_policy``."""
    match name:
        case "fcfs":
            return Fcfs()
        case "priority":
            return Priority()
        case "vtc":
            return VirtualTokenCounters()
