"""The leash that holds the policy near a reference: whom it is held to, how tightly (beta), and where its KL is charged.

    kl: reward  -beta KL_t is part of the reward of token t, sampled by `kl_estimator` (Ziegler et al. 2019, TRL)
    kl: loss    beta times the sampled KL, weighted by pi / pi_old, is a term of the loss, with the gradient of the KL at each
                state; the reward of a token holds the KL of what follows it
    kl: full    the same with the KL summed over the vocabulary: less noise near the reference, more near the optimum

`reference: sync` follows the policy every few updates. Held-out KL and J are to the backbone, whoever the leash is tied to.
"""

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_recipes.algorithms.ppo_config import PPOConfig
from rlhf_recipes.models.reference import Reference, SyncedReference
from rlhf_recipes.objective import adapted_beta, token_kl, weighted_token_kl
from rlhf_recipes.roles import Roles
from rlhf_recipes.rollouts.forward import ResponseOutput

_FILE = "reference.safetensors"


class Leash:
    """See the head of this file.

    Attributes:
        beta: `objective.beta` at first; `kl_target` adapts it.
        reference: None with `reference: none`.
    """

    def __init__(self, args: PPOConfig, roles: Roles) -> None:
        self.args, self.beta = args, args.kl_coef
        self.reference: Reference | None = roles.reference
        if args.reference != "frozen":
            self.reference = SyncedReference(roles.policy) if args.reference == "sync" else None

    def kl(self, output: ResponseOutput, ref_logprobs: Tensor) -> Tensor:
        """KL_t of the rollout's own policy in nats, [batch, response]."""
        return token_kl(output.logprobs, ref_logprobs, self.args.kl_estimator) if output.kl is None else output.kl

    def loss(self, output: ResponseOutput, old_logprobs: Tensor, ref_logprobs: Tensor, scale: Tensor) -> Tensor | None:
        """beta KL_t in units of the whitened advantages, [batch, response]; None where it is in the reward alone.

        Args:
            scale: by how much whitening stretched the advantages, a scalar.
        """
        if self.args.kl == "reward":
            return None
        kl = output.kl  # over the vocabulary, with `kl: full`
        if kl is None:
            kl = weighted_token_kl(output.logprobs, old_logprobs, ref_logprobs, self.args.kl_estimator)
        return self.beta * scale * kl

    def after_update(self, kl: float, update: int) -> None:
        """Adapts beta to `kl_target`, and lets a synced reference follow the policy, where the recipe says so.

        Args:
            kl: that the update's rollout had, in nats a completion.
            update: how many there have been.
        """
        args = self.args
        if args.kl_target is not None:
            self.beta = adapted_beta(self.beta, kl, args.kl_target, args.batch_size, args.kl_horizon)
        if isinstance(self.reference, SyncedReference) and update % args.reference_sync_steps == 0:
            self.reference.sync()

    def save(self, folder: Path) -> None:
        """Writes a synced reference; a frozen one is the backbone."""
        if isinstance(self.reference, SyncedReference):
            save_file({str(i): then.cpu() for i, (_, then) in enumerate(self.reference.adapter)}, folder / _FILE)

    def load(self, folder: Path) -> None:
        if isinstance(self.reference, SyncedReference):
            saved = load_file(folder / _FILE)
            for i, (_, then) in enumerate(self.reference.adapter):
                then.copy_(saved[str(i)])
