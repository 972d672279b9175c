"""What an error in each projection costs at the end: gradients, layer by layer, last first.

To second order a weight error e [N, K] of a projection costs, in nats of KL per token,
    1/2 sum_n G_n (e H e.T)_nn,
with H [K, K] the second moments of its inputs and G_n those of the gradient at its n-th output,
of the loss of tokens drawn from the model's own distribution: the Fisher information as K-FAC
factorises it (Martens and Grosse, ICML 2015), its output side cut to the diagonal. So errors of
all projections are in one unit and can be traded against bytes.

B sequences of T tokens, D the hidden size, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from deltaserve.compress.activations import Activations
from deltaserve.compress.hessian import Hessian, output_error
from deltaserve.compress.layers import LayerWalk, Weights, projections
from deltaserve.compress.weights import Table

# Some of the rows of a matrix: a range of them, or their numbers.
Rows = slice | torch.Tensor
ALL = slice(None)


@dataclass(eq=False)
class Cost:
    """hessian, unseen: of the inputs, from every other batch each, so that codes are fitted on
    one and judged on the other; slope_N: mean squared gradient at each output."""

    hessian: Hessian
    unseen: Hessian
    slope_N: torch.Tensor

    def by_row(self, error_NK: torch.Tensor, outputs: Rows = ALL) -> torch.Tensor:
        """Nats per token [N] for the errors of each output, or of some of them."""
        h_KK = self.unseen.mean_KK
        error_NK, slope_N = error_NK.to(h_KK.device), self.slope_N[outputs]
        return 0.5 * output_error(error_NK, h_KK) * slope_N

    def left_over(self, delta_NK: torch.Tensor) -> torch.Tensor:
        """Of the cost of losing ``delta_NK``, the share [r + 1] that stays whatever matrix of rank
        0, 1, ... r is kept of it."""
        weighted_NK = delta_NK.to(self.slope_N.device) * self.slope_N.sqrt()[:, None]
        pushed_NK = (weighted_NK / weighted_NK.abs().max().clamp(min=1e-30)) @ self.hessian.root()
        if len(pushed_NK) > pushed_NK.shape[1]:
            pushed_NK = pushed_NK.T
        # Smallest first: what is summed up to there is left when the others are kept.
        squares_R = torch.linalg.eigvalsh(pushed_NK @ pushed_NK.T).double().clamp(min=0)
        left_R = torch.nn.functional.pad(squares_R.cumsum(0), (1, 0))
        return (left_R / left_R[-1].clamp(min=1e-300)).flip(0)


class _Halves:
    """Inputs of even and of odd batches."""

    def __init__(self, columns: int, device: torch.device | str) -> None:
        self._halves = [Hessian(columns, device) for _ in range(2)]

    def add(self, number: int, x_TK: torch.Tensor) -> None:
        self._halves[number % 2].add(x_TK)

    def cost(self, slope_N: torch.Tensor) -> Cost:
        """slope_N: sum of the squared gradients over all batches."""
        tokens = sum(half.tokens for half in self._halves)
        # A single batch must serve for both.
        seen = [half for half in self._halves if half.tokens]
        return Cost(seen[0], seen[-1], slope_N / tokens)


def at_the_head(
    walk: LayerWalk,
    grads: Activations,
    norm: torch.Tensor,
    head_VD: Table,
    cap: float | None,
    seed: int,
) -> Cost:
    """Write the gradient behind the last layer; the cost of errors in the head."""
    halves = _Halves(head_VD.shape[1], walk.device)
    slope_V = torch.zeros(len(head_VD), device=walk.device)

    def batch(number: int) -> torch.Tensor:
        hidden_BTD = walk.hidden.read(len(walk), number).to(walk.device).requires_grad_()
        normed_ND = walk.normed(hidden_BTD, norm)[walk.real(number)]
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        with torch.no_grad():
            halves.add(number, normed_ND)
            lots_N = torch.rand(len(normed_ND), generator=generator, dtype=torch.float64)
            slope_ND = _drawn(normed_ND, head_VD, cap, lots_N.to(walk.device), slope_V)
        (found_BTD,) = torch.autograd.grad(normed_ND, hidden_BTD, slope_ND)
        return found_BTD

    grads.write(len(walk), (batch(number) for number in range(len(walk.batches))))
    return halves.cost(slope_V)


def _drawn(
    normed_ND: torch.Tensor,
    head_VD: Table,
    cap: float | None,
    lots_N: torch.Tensor,
    total_V: torch.Tensor,
) -> torch.Tensor:
    """Gradient [N, D] of -log p of drawn tokens; adds the squares at the logits to the total.

    lots_N: uniform in 0 to 1, at which the distribution function is inverted: a first pass over
    the vocabulary finds its value behind each block, a second one the token within the block.
    """
    parts = [logits_NB.logsumexp(1) for _, _, logits_NB, _ in _logits(normed_ND, head_VD, cap)]
    sums_NM = torch.stack(parts, 1)
    total_N1 = sums_NM.logsumexp(1, keepdim=True)
    behind_NM = (sums_NM - total_N1).double().exp().cumsum(1)
    left_N = lots_N * behind_NM[:, -1]
    block_N = (behind_NM <= left_N[:, None]).sum(1).clamp(max=len(parts) - 1)
    left_N = left_N - torch.nn.functional.pad(behind_NM, (1, 0)).gather(1, block_N[:, None])[:, 0]
    slope_ND = torch.zeros_like(normed_ND)
    for number, (some, rows_BD, p_NB, bend_NB) in enumerate(_logits(normed_ND, head_VD, cap)):
        p_NB.sub_(total_N1).exp_()
        squares_NB = p_NB * (1 - p_NB)  # their expectation is known
        total_V[some] += (squares_NB if bend_NB is None else squares_NB * bend_NB.square()).sum(0)
        here_T = (block_N == number).nonzero()[:, 0]
        place_T = (p_NB[here_T].double().cumsum(1) <= left_N[here_T, None]).sum(1)
        p_NB[here_T, place_T.clamp(max=len(rows_BD) - 1)] -= 1
        slope_ND.addmm_(p_NB if bend_NB is None else p_NB.mul_(bend_NB), rows_BD)
    return slope_ND


def _logits(
    normed_ND: torch.Tensor, head_VD: Table, cap: float | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Block by block of the vocabulary: which, its rows of the head, the logits, and, if they
    are capped, the derivative of that."""
    for some, rows_BD in head_VD.blocks(len(normed_ND)):
        rows_BD = rows_BD.to(normed_ND.device)
        logits_NB = normed_ND @ rows_BD.T
        if cap:
            bent_NB = (logits_NB / cap).tanh()
            yield some, rows_BD, bent_NB * cap, 1 - bent_NB.square()
        else:
            yield some, rows_BD, logits_NB, None


def through_layer(
    walk: LayerWalk, grads: Activations, layer: int, weights: Weights
) -> dict[str, Cost]:
    """Write the gradient before a layer; the cost of errors in each of its projections."""
    shared = {name: group[0] for group in walk.groups(layer, weights) for name in group}
    inputs: dict[str, _Halves] = {}
    slopes: dict[str, torch.Tensor] = {}
    prefix = walk.prefix(layer)

    def batch(module: nn.Module, number: int) -> torch.Tensor:
        hidden_BTD = walk.hidden.read(layer, number).to(walk.device).requires_grad_()
        with _watching(module, prefix, walk.real(number), number, shared, inputs, slopes):
            out_BTD = walk.run(module, layer, number, hidden_BTD)
            behind_BTD = grads.read(layer + 1, number).to(walk.device)
            (found_BTD,) = torch.autograd.grad(out_BTD, hidden_BTD, behind_BTD)
        return found_BTD

    with walk.loaded(layer, weights) as module:
        grads.write(layer, (batch(module, number) for number in range(len(walk.batches))))
    return {name: inputs[shared[name]].cost(slope_N) for name, slope_N in slopes.items()}


@contextmanager
def _watching(
    module: nn.Module,
    prefix: str,
    real_BT: torch.Tensor,
    number: int,
    shared: dict[str, str],
    inputs: dict[str, _Halves],
    slopes: dict[str, torch.Tensor],
) -> Iterator[None]:
    """Sum up the inputs of every projection and the squared gradients at its outputs."""

    def watch(name: str, x_BTK: torch.Tensor, y_BTN: torch.Tensor) -> None:
        if shared[name] == name:
            x_TK = x_BTK.detach()[real_BT]
            if name not in inputs:
                inputs[name] = _Halves(x_TK.shape[-1], x_TK.device)
            inputs[name].add(number, x_TK)

        def squares(slope_BTN: torch.Tensor) -> None:
            found_N = slope_BTN[real_BT].square().sum(0)
            slopes[name] = slopes[name] + found_N if name in slopes else found_N

        y_BTN.register_hook(squares)

    with ExitStack() as hooks:
        for name, part in projections(module, prefix):
            hook = part.register_forward_hook(
                lambda _, given, output, name=name: watch(name, given[0], output)
            )
            hooks.enter_context(hook)
        yield


@dataclass(eq=False)
class LookupCost:
    """share_V: of each token in the text; slope_D: mean squared gradient at each component."""

    share_V: torch.Tensor
    slope_D: torch.Tensor

    def by_row(self, error_VD: torch.Tensor, tokens: Rows = ALL) -> torch.Tensor:
        """Nats per token [V] for the errors of each row of the embedding, or of some of them."""
        return 0.5 * (error_VD.square() @ self.slope_D) * self.share_V[tokens]


def at_the_embedding(walk: LayerWalk, grads: Activations, embedding_VD: Table) -> LookupCost:
    """The cost of errors in the rows of the embedding; a token that never occurs counts once."""
    counts_V = torch.ones(len(embedding_VD))
    slope_D = torch.zeros(embedding_VD.shape[1])
    tokens, scale = 0, 1.0
    for number, (_, ids_BT, _) in enumerate(walk.batches):
        real_BT = walk.real(number).cpu()
        counts_V += torch.bincount(ids_BT[real_BT], minlength=len(counts_V))
        slope_D += grads.read(0, number)[real_BT].square().sum(0)
        tokens += int(real_BT.sum())
        if number == 0:  # some families scale what they look up
            seen = walk.hidden.read(0, 0)[real_BT].norm()
            looked_up = embedding_VD.rows(ids_BT[real_BT]).norm()
            scale = float(seen / looked_up) if float(looked_up) else 1.0
    return LookupCost(counts_V / counts_V.sum(), slope_D * scale**2 / tokens)
