"""KL between the policy and its reference: estimators and the controller of its coefficient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from chatloom.config import Kl


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log pi_ref a token: unbiased, and the one whose sum in the reward has the KL's gradient."""
    return logprobs - ref_logprobs


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(r - 1) - log r with r = pi_ref / pi (Schulman 2020): unbiased, never negative; for display only."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


@dataclass
class KlController:
    """The coefficient, steered towards a KL per sequence (Ziegler 2019); its state is `coef` alone."""

    params: Kl
    coef: float

    @classmethod
    def start(cls, params: Kl) -> KlController:
        return cls(params, params.init_coef)

    def update(self, kl_per_sequence: float, num_episodes: int) -> None:
        """coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * episodes / horizon; nothing without a target."""
        if self.params.target is None:
            return
        error = min(max(kl_per_sequence / self.params.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_episodes / self.params.horizon
