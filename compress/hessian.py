"""Second moments of a layer's inputs: how much an error in each weight costs at the output.

For y = x @ w.T the squared output error of a weight error e [N, K] is tr(e H e.T) with
H [K, K] the mean of x x.T (Hassibi and Stork, NeurIPS 1992; Frantar et al., GPTQ, ICLR 2023).
"""

from __future__ import annotations

import torch

from deltaserve.artifact.codecs.lowrank import leading_svd

# Share of the mean diagonal that is added to it (GPTQ's percdamp), and its growth when the
# matrix is still not positive definite.
DAMPING = 0.01
GROWTH = 10.0
# u [N, r], s [r], v [r, K].
Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Hessian:
    """A running mean of x x.T over tokens, float32 on the device of the inputs."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.sum_KK = torch.zeros(columns, columns, device=device)
        self.tokens = 0
        self._factors: dict[bytes, torch.Tensor] = {}
        self._seen: tuple[torch.Tensor, Triplets] | None = None

    @classmethod
    def of(cls, mean_KK: torch.Tensor) -> Hessian:
        """One that is known."""
        hessian = cls(len(mean_KK), mean_KK.device)
        hessian.sum_KK, hessian.tokens = mean_KK, 1
        return hessian

    def add(self, x_TK: torch.Tensor) -> None:
        """Count further inputs."""
        x_TK = x_TK.float()
        self._factors.clear()
        self._seen = None
        self.sum_KK.addmm_(x_TK.T, x_TK)
        self.tokens += len(x_TK)

    @property
    def mean_KK(self) -> torch.Tensor:
        return self.sum_KK / max(1, self.tokens)

    def damped(self, share: float = DAMPING) -> torch.Tensor:
        """Positive diagonal: inputs that never fired count on their own, without neighbours."""
        h_KK = self.mean_KK
        diagonal_K = h_KK.diagonal()
        level = float(diagonal_K.mean())
        if level == 0:
            return torch.eye(len(h_KK), device=h_KK.device)
        diagonal_K[diagonal_K == 0] = level
        diagonal_K += share * level
        return h_KK

    def inverse_factor(self, order_K: torch.Tensor) -> torch.Tensor:
        """Upper Cholesky factor [K, K] of the inverse, columns taken in ``order_K``; kept.

        A matrix that is not positive definite for float32 is damped until it is.
        """
        key = order_K.cpu().numpy().tobytes()
        share = DAMPING
        while key not in self._factors:
            h_KK = self.damped(share)[order_K][:, order_K]
            lower_KK, failed = torch.linalg.cholesky_ex(h_KK)
            if not failed:
                upper_KK, failed = torch.linalg.cholesky_ex(
                    torch.cholesky_inverse(lower_KK), upper=True
                )
                if not failed and bool(torch.isfinite(upper_KK).all()):
                    self._factors[key] = upper_KK
            share *= GROWTH
        return self._factors[key]

    def root(self) -> torch.Tensor:
        """Lower Cholesky factor [K, K] of the damped matrix."""
        share = DAMPING
        while True:
            lower_KK, failed = torch.linalg.cholesky_ex(self.damped(share))
            if not failed and bool(torch.isfinite(lower_KK).all()):
                return lower_KK
            share *= GROWTH

    def leading(self, delta_NK: torch.Tensor, rank: int) -> Triplets:
        """Leading singular triplets of ``delta_NK @ root()``; those of the last delta are kept,
        so that a matrix that is tried at many ranks is decomposed once, at the largest first."""
        if self._seen is not None and torch.equal(self._seen[0], delta_NK):
            u_NR, s_R, v_RK = self._seen[1]
            if len(s_R) >= rank:
                return u_NR[:, :rank], s_R[:rank], v_RK[:rank]
        found = leading_svd(delta_NK @ self.root(), rank)
        self._seen = delta_NK, found
        return found


def output_error(error_NK: torch.Tensor, h_KK: torch.Tensor) -> torch.Tensor:
    """Mean squared error [N] of each output for a weight error."""
    return ((error_NK @ h_KK) * error_NK).sum(1).clamp(min=0)
