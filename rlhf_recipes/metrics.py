"""Every metric: its name, what it means, its unit, and what tables, plots and progress bars call it.

docs/metrics.md shows these lists. Rewards have a unit of their own, and shares and counts none.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric; without a `title` nothing shows it."""

    meaning: str  # in Markdown
    unit: str = ""
    title: str = ""
    several: bool = False  # takes several completions a prompt: only scripts/evaluate.py measures it

    @property
    def label(self) -> str:
        """The head of a column, or a plot's title."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


# Of a policy's completions of held-out prompts, in the order of tables: in summary.json and evaluation.json, and in
# metrics.jsonl as eval/NAME.
HELD_OUT = {
    "reward": Metric("mean reward", title="reward"),
    "kl": Metric("mean of log pi(y|x) - log pi_ref(y|x) over sampled completions (k1: unbiased)", "nats", "KL"),
    "objective": Metric("J = reward - beta * kl, at the recipe's beta", title="J"),
    "fraction_of_optimum": Metric(
        "(J(pi) - J(ref)) / (J* - J(ref)), of means over prompts", title="fraction of the optimum", several=True
    ),
    "win_rate": Metric(
        "P(a completion scores above one of the reference's), ties counted half", title="win rate", several=True
    ),
    "gold": Metric("mean of the task's `gold_reward`", title="gold"),
    "gold_win_rate": Metric("the win rate by `gold_reward`", title="win rate by gold", several=True),
    "length": Metric("mean length of a completion, eos included", "tokens", "length"),
    "distinct_2": Metric("distinct word bigrams over all word bigrams of all completions together", title="distinct-2"),
    "kl_k3": Metric("`kl` by the estimator k3 (`objective.sequence_kl`)", "nats", "KL by k3", several=True),
    "entropy": Metric("mean entropy of the policy's next-token distributions", "nats a token", "entropy"),
    "repetition": Metric("mean share of a completion's word 3-grams that it has had before", title="repetition"),
    "truncated": Metric("share of completions without an eos", title="truncated"),
}
BEST_BY = ("objective", "reward", "gold")  # `metric_for_best_model` keeps the policy in which one of these is highest
SMALL_EFFECTIVE_SIZE = 10  # samples a prompt; below it an importance-sampling estimate leans on a handful of them

ONLINE = {
    "objective/scores": Metric("mean reward of the rollout", title="reward"),
    "objective/scores_std": Metric("their standard deviation within the batch"),
    "rewards/<name>/mean": Metric("each reward by itself, before weights and shaping"),
    "rewards/<name>/std": Metric("its standard deviation within the batch"),
    "rewards/clipped": Metric("share of rows at `reward.clip`"),
    "rewards/skipped": Metric("share of rows without a score"),
    "rewards/length_penalty": Metric("mean taken off by `reward.length_penalty`"),
    "rewards/missing_eos_penalty": Metric("mean taken off by `reward.missing_eos_penalty`"),
    "objective/kl_coef": Metric("beta, which `kl_target` adapts", "reward a nat"),
    "completions/mean_length": Metric("of the rollout's completions, eos included", "tokens"),
    "completions/clipped_ratio": Metric("share without an eos"),
    "completions/length_score_correlation": Metric("Pearson's, within the batch"),
    "objective/kl": Metric("mean over sequences of the summed KL estimate (`ppo.kl_estimator`)", "nats a sequence", title="KL"),
    "objective/non_score_reward": Metric("-beta times `objective/kl`"),
    "objective/rlhf_reward": Metric("J on the rollout: the sum of `objective/scores` and that", title="J: reward - beta x KL"),
    "objective/entropy": Metric("mean -log pi(y) of the sampled sequences", "nats a sequence"),
    "policy/entropy_avg": Metric("mean entropy of pi(. | x, y<t)", "nats a token", title="entropy"),
    "policy/approxkl_avg": Metric("mean of half the squared log-ratio to the rollout's policy", "nats a token"),
    "policy/step_kl": Metric(
        "the same over the completions' tokens alone: what `target_kl` limits, measured as each step begins", "nats a token"
    ),
    "policy/epochs": Metric("epochs an update has run (with `target_kl` fewer)"),
    "policy/clipfrac_avg": Metric("share of tokens whose policy loss was clipped"),
    "policy/grad_norm": Metric("gradient norm before clipping (with `max_grad_norm`)"),
    "loss/policy_avg": Metric("clipped surrogate"),
    "loss/value_avg": Metric("clipped value loss"),
    "val/clipfrac_avg": Metric("share of tokens whose value loss was clipped"),
    "val/ratio": Metric("mean probability ratio"),
    "val/ratio_var": Metric("its variance over the update's steps"),
    "val/explained_variance": Metric("1 - Var(returns - V) / Var(returns)"),
    "val/num_eos_tokens": Metric("eos tokens in the rollout, over all processes", "tokens"),
    "val/sampling_gap": Metric(
        "mean of |log pi as the token was drawn, with a cache and merged adapters, - log pi in the training pass|",
        "nats a token",
    ),
    "lr": Metric("learning rate"),
    "episode": Metric("completions sampled since the run began"),
    "eps": Metric("episodes a second, a whole number as TRL rounds it (wandb and `timing.jsonl` only, as the next two)", "1/s"),
    "seconds": Metric("of the update: rollout and training, without evaluation and checkpoint", "s"),
    "tokens_per_second": Metric(
        "tokens of the rollout's completions that have a score, of all processes, over `seconds`", "1/s"
    ),
    "eval/reward_<name>": Metric("on held-out prompts, each of several rewards by itself"),
    "eval/reward_se": Metric("standard error of `eval/reward` over prompts"),
    "eval/gold_se": Metric("standard error of `eval/gold` over prompts"),
}
SUPERVISED = {
    "loss": Metric("what is minimised; the DPO loss in DPO", title="loss"),
    "eval_loss": Metric("the same on held-out rows; other metrics take the same prefix", title="held-out loss"),
    "train_loss": Metric("mean loss of the whole run, at its end"),
    "grad_norm": Metric("gradient norm before clipping"),
    "learning_rate": Metric("learning rate"),
    "num_tokens": Metric("tokens seen since the run began, over all processes", "tokens"),
    "entropy": Metric("mean entropy of the next-token distributions", "nats a token"),
    "mean_token_accuracy": Metric("share of tokens that have the highest probability"),
    "accuracy": Metric("of a reward model: share of pairs ranked right", title="accuracy"),
    "eval_accuracy": Metric("the same on held-out pairs", title="held-out accuracy"),
    "margin": Metric("of a reward model: mean reward of the chosen - of the rejected"),
    "min_reward": Metric("lowest reward in the batch"),
    "mean_reward": Metric("mean reward of the batch"),
    "max_reward": Metric("highest reward in the batch"),
    "rewards/chosen": Metric("DPO's implicit reward of the chosen: beta times its log-ratio to the reference"),
    "rewards/rejected": Metric("the same of the rejected"),
    "rewards/margins": Metric("their difference, chosen - rejected", title="margin"),
    "rewards/accuracies": Metric("share of pairs ranked right by it", title="accuracy"),
    "logps/chosen": Metric("log pi of the chosen", "nats a sequence"),
    "logps/rejected": Metric("log pi of the rejected", "nats a sequence"),
    "logits/chosen": Metric("mean over the chosen's tokens and the vocabulary"),
    "logits/rejected": Metric("the same of the rejected"),
    "aux_loss": Metric("load balancing of a mixture of experts"),
    "epoch": Metric("how often the training rows have been seen; of PPO and A2C, the prompts"),
    "step": Metric("optimizer steps, of PPO and A2C updates, since the run began"),
    "skipped_steps": Metric(
        "optimizer steps left out since the run began, since their gradient was not finite; absent while there are none"
    ),
}
TRAINING = ONLINE | SUPERVISED  # in metrics.jsonl and timing.jsonl


def label_of(name: str) -> str:
    """What a table calls a held-out metric; one of several rewards, reward_NAME, by its own name."""
    return HELD_OUT[name].label if name in HELD_OUT else name
