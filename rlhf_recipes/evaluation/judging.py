"""Judging policies on held-out prompts: reward, gold, KL, the objective, and whether the text is still text."""

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.data.datasets import prompt_ids, tokenize_prompts
from rlhf_recipes.data.tokens import pad_left, prompt_text
from rlhf_recipes.evaluation.tables import markdown_samples, print_samples, print_summary
from rlhf_recipes.models.reference import Policy
from rlhf_recipes.objective import sequence_kl
from rlhf_recipes.process import progress_bar, stop_together
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.rewards.function import FunctionReward
from rlhf_recipes.roles import Roles
from rlhf_recipes.rollouts.forward import response_forward
from rlhf_recipes.rollouts.sampler import Sampler
from rlhf_recipes.rollouts.samples import Samples
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.tasks import for_rewards, load_dataset

Gold = Callable[..., list[float]]


@dataclass
class Completions:
    """K completions for each of P prompts, and what is known of them; every tensor is [P, K].

    ids: the completions' token ids, eos included where there is one.
    kl, kl_k3: estimates of KL(pi(.|x) || pi_ref(.|x)) in nats from each completion: k1 = log pi(y|x) - log pi_ref(y|x),
        and k3 summed over tokens (objective.token_kl).
    reward: what is maximised; NaN where no reward has an opinion.
    length: tokens, eos included.
    ended: with an eos.
    entropy: of the policy's next-token distributions, mean over the completion's tokens, in nats.
    terms: each reward's own score, before weights and shaping.
    """

    ids: list[list[list[int]]]
    texts: list[list[str]]
    reward: Tensor
    kl: Tensor
    kl_k3: Tensor
    length: Tensor
    gold: Tensor | None
    ended: Tensor
    entropy: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)

    def means(self, beta: float) -> dict[str, float]:
        """reward, gold, kl, objective = reward - beta * kl, length, entropy, means over all; distinct_2 over all texts;
        repetition, the mean share of a text's word 3-grams that it has had before; truncated, the share without an eos.

        Of several rewards also each one's mean, as reward_<name>.
        """
        texts = [text for row in self.texts for text in row]
        reward, kl = self.reward.nanmean().item(), self.kl.mean().item()
        return {
            "reward": reward,
            **({} if self.gold is None else {"gold": self.gold.nanmean().item()}),
            "kl": kl,
            "objective": reward - beta * kl,
            **({f"reward_{name}": own.nanmean().item() for name, own in self.terms.items()} if len(self.terms) > 1 else {}),
            "length": self.length.float().mean().item(),
            "distinct_2": distinct_n(texts, 2),
            "repetition": sum(1 - distinct_n([text], 3) for text in texts if len(text.split()) > 2) / len(texts),
            "truncated": 1 - self.ended.float().mean().item(),
            "entropy": self.entropy.mean().item(),
        }

    def standard_errors(self) -> dict[str, float]:
        """Of the mean reward and gold, over prompts: reward_se, gold_se."""
        by_prompt = {"reward_se": self.reward.nanmean(1)} | ({} if self.gold is None else {"gold_se": self.gold.nanmean(1)})
        known = {name: values[~values.isnan()] for name, values in by_prompt.items()}
        return {name: values.std().item() / len(values) ** 0.5 for name, values in known.items()}


def distinct_n(texts: list[str], n: int) -> float:
    """Distinct word n-grams over all word n-grams of all `texts` together (Li et al. 2016, arXiv 1510.03055)."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


@torch.no_grad()
def complete(
    policy: Policy,
    roles: Roles,
    prompts: Dataset,
    seed: int,
    batch_size: int,
    gold: Gold | None = None,
    title: str | None = None,
    samples: int = 1,
    measure_kl: bool = True,
) -> Completions:
    """Samples `samples` completions for each prompt and judges them.

    The processes share the work. Each batch has a seed of its own, so the completions do not depend on how many processes
    there are, and training's random state is left as it was.

    Args:
        policy: the policy or the reference of `roles`, or a model of its own over the same tokenizer.
        prompts: with `prompt` and `input_ids`; other columns reach `gold`.
        batch_size: sequences at a time.
        title: of the progress bar; without one there is none.
        measure_kl: false leaves kl, kl_k3 and entropy at zero and saves two forward passes.
    """
    rows = [i for i in range(len(prompts)) for _ in range(samples)]
    batches = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    state = PartialState()
    mine = range(state.process_index, len(batches), state.num_processes)
    judged: list[tuple[int, dict[str, list]]] = []
    failure = None
    with torch.random.fork_rng():
        for at in progress_bar(mine, show=title is not None and state.is_main_process, desc=title, leave=False):
            torch.manual_seed(seed * 1_000_003 + at)
            try:
                judged.append((at, _judge_batch(policy, roles, prompts.select(batches[at]), gold, measure_kl)))
            except RecipeError as error:
                failure = error
                break
    stop_together(failure)
    if state.num_processes > 1:
        judged = sorted(gather_object(judged), key=lambda pair: pair[0])
    columns = {name: [value for _, batch in judged for value in batch[name]] for name in judged[0][1]}
    grouped = {name: [values[i : i + samples] for i in range(0, len(values), samples)] for name, values in columns.items()}
    tensors = {name: torch.tensor(grouped[name]) for name in ("reward", "kl", "kl_k3", "length", "ended", "entropy")}
    scores = torch.tensor(grouped["gold"]) if gold is not None else None
    terms = {name: torch.tensor(grouped[f"reward {name}"]) for name in roles.reward.terms}
    return Completions(grouped["ids"], grouped["texts"], gold=scores, terms=terms, **tensors)


def _judge_batch(
    policy: Policy,
    roles: Roles,
    prompts: Dataset,
    gold: Gold | None,
    measure_kl: bool,
) -> dict[str, list]:
    """One completion for each row of `prompts`: the columns of `Completions`, a value a row."""
    tokenizer, temperature, device = roles.tokenizer, roles.sampler.temperature, roles.policy.device
    queries, attention = (tensor.to(device) for tensor in pad_left(prompts["input_ids"][:], tokenizer.pad_token_id))
    context = queries.shape[1]
    sampled = roles.sampler(policy, queries, attention)
    rows = sampled.sequences, sampled.attention
    columns = {name: prompts[name][:] for name in for_rewards(prompts.column_names)}
    samples = Samples(sampled.sequences, context, tokenizer, prompts["prompt"][:], columns, sampled.attention, sampled.ended)
    mask = samples.mask
    kl = kl_k3 = entropy = torch.zeros(len(queries))
    if measure_kl:
        output = response_forward(policy, *rows, context, temperature)
        entropy = (output.entropy * mask).sum(1) / mask.sum(1).clamp(min=1)
        if policy is not roles.reference:
            log_ref = response_forward(roles.reference, *rows, context, temperature).logprobs
            kl, kl_k3 = (sequence_kl(output.logprobs, log_ref, mask, estimator) for estimator in ("k1", "k3"))
    scores = roles.reward(samples)
    batch = {
        "ids": [row[keep].tolist() for row, keep in zip(samples.responses, mask, strict=True)],
        "texts": samples.texts,
        "reward": scores.total.masked_fill(~scores.valid, torch.nan).tolist(),
        "kl": kl.tolist(),
        "kl_k3": kl_k3.tolist(),
        "length": mask.sum(1).tolist(),
        "ended": samples.ended.tolist(),
        "entropy": entropy.tolist(),
        **{f"reward {name}": own.tolist() for name, own in scores.terms.items()},
    }
    if gold is not None:
        own, _ = FunctionReward(gold).score(samples)
        batch["gold"] = own.tolist()
    return batch


def prepare_rewards(roles: Roles, task: types.ModuleType, run: Run) -> None:
    """Tells the rewards where failures go, and with `reward.normalize` measures each one's mean and standard deviation.

    That is over a completion by the reference of each of the first `reward.normalize_prompts` training prompts, with a seed of
    its own, so all stages of a recipe find the same numbers.
    """
    recipe = run.recipe
    roles.reward.folder = run.folder
    if not recipe.reward.normalize:
        return
    prompts = load_dataset(task, "load_prompts", "train")
    prompts = tokenize_prompts(prompts, roles.tokenizer, recipe.data.max_prompt_tokens, recipe.reward.normalize_prompts)
    seed, size = recipe.run.seed, recipe.evaluate.batch_size
    judged = complete(roles.reference, roles, prompts, seed, size, title="the reference's rewards", measure_kl=False)
    for name, term in roles.reward.terms.items():
        known = judged.terms[name][~judged.terms[name].isnan()]
        spread = known.std().item() if len(known) > 1 else 0.0
        if spread == 0:
            raise RecipeError(
                f"`reward.normalize`: `{name}` gives the reference's {len(known)} completions one and the same score; switch "
                f"it off"
            )
        term.mean, term.std = known.mean().item(), spread
        run.say(f"the reference's `{name}`: mean {term.mean:.3f}, standard deviation {term.std:.3f}")


def judge_policy(run: Run, roles: Roles, prompts: Dataset, gold: Gold | None) -> dict[str, Any]:
    """Ends a policy stage: held-out completions of reference and policy, a table, samples.jsonl and summary.json."""
    beta, section, seed = run.recipe.objective.beta, run.recipe.evaluate, run.recipe.run.seed
    roles.policy.eval()
    sides = {"reference": roles.reference, "policy": roles.policy}
    judged = {
        name: complete(model, roles, prompts, seed, section.batch_size, gold, f"{name} on held-out prompts")
        for name, model in sides.items()
    }
    metrics = {name: completions.means(beta) for name, completions in judged.items()}
    del metrics["reference"]["kl"]  # zero by definition
    rows = side_by_side(prompts, judged)
    run.write_samples(rows)
    run.log({f"eval/{name}": value for name, value in metrics["policy"].items()}, step=run.last_step + 1)
    shown = rows[: section.samples]
    summary = run.finish({"prompts": len(prompts), **metrics}, card=markdown_samples(shown))
    if run.main:
        print_samples(shown)
        print_summary(summary)
    return summary


def side_by_side(prompts: Dataset, judged: dict[str, Completions]) -> list[dict[str, Any]]:
    """A row a prompt: the first completion of each of `judged`, with its reward and gold score."""
    rows = []
    for i, prompt in enumerate(prompts["prompt"]):
        row: dict[str, Any] = {"prompt": prompt_text(prompt)}
        for name, side in judged.items():
            row |= {name: side.texts[i][0], f"{name}_reward": side.reward[i, 0].item()}
            if side.gold is not None:
                row[f"{name}_gold"] = side.gold[i, 0].item()
        rows.append(row)
    return rows


def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler,
    task: types.ModuleType,
    samples: int,
    seed: int,
) -> list[dict[str, str]]:
    """What a backbone writes: continuations of the first `samples` held-out prompts of a task, or of bos without any."""
    rows = Dataset.from_dict({"prompt": [""]})
    if hasattr(task, "load_prompts"):
        rows = load_dataset(task, "load_prompts", "eval")
        rows = rows.select(range(min(samples, len(rows))))
    nothing = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    ids = [row or nothing for row in prompt_ids(rows, tokenizer)]
    prompts = rows["prompt"][:] if "prompt" in rows.column_names else tokenizer.batch_decode(ids, skip_special_tokens=True)
    queries, attention = (tensor.to(model.device) for tensor in pad_left(ids, tokenizer.pad_token_id))
    torch.manual_seed(seed)
    sampled = sampler(model, queries, attention)
    texts = Samples(sampled.sequences, queries.shape[1], tokenizer, prompts, {}, sampled.attention, sampled.ended).texts
    return [{"prompt": prompt_text(prompt), "completion": text} for prompt, text in zip(prompts, texts, strict=True)]
