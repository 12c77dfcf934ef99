"""The reward that is a sequence classifier of its own, with its own tokenizer."""

from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.data.tokens import Prompt, answered, is_chat, render, template_of
from rlhf_recipes.models.backbone import pretrained, safetensors_only, tokens_without_row
from rlhf_recipes.recipe.errors import RecipeError, loading
from rlhf_recipes.recipe.sections import RewardTerm
from rlhf_recipes.rewards.function import NO_TEMPLATE
from rlhf_recipes.rewards.reward import Shared
from rlhf_recipes.rollouts.samples import Samples


class ModelReward(nn.Module):
    """Any sequence classifier with a tokenizer of its own, which reads the text of prompt and completion.

    Args:
        label: the column of its output.
        probability: the softmax (of one label: sigmoid) instead of the logit.
        max_length: tokens; a longer text loses its beginning.
        pair: prompt and completion as the tokenizer's two segments instead of one text.
        title: what messages call it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        label: int = 0,
        probability: bool = False,
        max_length: int | None = None,
        pair: bool = False,
        title: str = "the reward model",
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.title = model, tokenizer, title
        self.label, self.probability, self.max_length, self.pair = label, probability, max_length, pair

    @torch.no_grad()
    def score(self, samples: Samples) -> tuple[Tensor, None]:
        """
        Raises:
            RecipeError: its chat template does not take the messages, or there is none; or it cannot read the texts.
        """
        inputs = self._tokenize(samples.prompts, samples.texts, samples.columns).to(self.model.device)
        try:
            logits = self.model(**inputs).logits.float()
        except (IndexError, TypeError, ValueError) as error:  # of a model and a tokenizer that do not go together
            raise RecipeError(
                f"the reward's `model` {self.model.name_or_path} cannot read what its tokenizer gives it: "
                f"{type(error).__name__}: {error}; look at `reward.pair`, `reward.max_length` and its config"
            ) from error
        if self.probability:
            logits = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(-1)
        return logits[:, self.label].to(samples.sequences.device), None

    def _tokenize(self, prompts: list[Prompt], texts: list[str], columns: dict[str, list] | None = None):
        padded = {"padding": True, "truncation": self.max_length is not None, "max_length": self.max_length}
        rows = list(zip(prompts, texts, strict=True))
        if is_chat(prompts[0]):
            given = [{name: values[i] for name, values in (columns or {}).items()} for i in range(len(rows))]
            whole = [self._render(*row, template_of(others)) for row, others in zip(rows, given, strict=True)]
            return self.tokenizer(whole, add_special_tokens=False, return_tensors="pt", **padded)
        if self.pair:
            pairs = [self._pair(str(prompt), text) for prompt, text in rows]
            return self.tokenizer.pad({name: [pair[name] for pair in pairs] for name in pairs[0]}, return_tensors="pt")
        return self.tokenizer([f"{prompt}{text}" for prompt, text in rows], return_tensors="pt", **padded)

    def _render(self, prompt: Any, text: str, template: dict[str, Any]) -> str:
        chat = answered(prompt, [{"role": "assistant", "content": text}])
        return render(self.tokenizer, chat, template, self.title, NO_TEMPLATE, tokenize=False)

    def _pair(self, prompt: str, text: str):
        """The two segments, cut as one text is: the prompt loses its beginning, and where that is not enough all of it, and the
        completion its own."""
        if self.max_length is None:
            return self.tokenizer(prompt, text)
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        first, second = (len(self.tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (prompt, text))
        if second >= room < first + second:
            return self.tokenizer("", text, truncation="only_second", max_length=self.max_length)
        return self.tokenizer(prompt, text, truncation="only_first", max_length=self.max_length)


def load(term: RewardTerm, shared: Shared) -> ModelReward:
    """The sequence classifier of `term` and its tokenizer.

    Raises:
        RecipeError: it cannot be loaded, or it has several labels and `label` names none of them.
    """
    where, path, trusted = f"the reward's `model` {term.model}", shared.path(str(term.model)), term.trust_remote_code
    with loading(where, switch="reward.trust_remote_code"), safetensors_only():
        model = pretrained(AutoModelForSequenceClassification, path, dtype=shared.dtype, trust_remote_code=trusted)
    tokenizer = load_reward_tokenizer(term, path)
    if missing := tokens_without_row(tokenizer, model):
        raise RecipeError(
            f"{where}: its tokenizer has tokens for which its embedding has no row, such as {missing[0]!r}; resize the "
            f"embedding, or use the tokenizer it was trained with"
        )
    # a decoder's classifier reads the score at the last token that is not this one
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    labels = dict(model.config.id2label)
    by_name = {str(name): index for index, name in labels.items()}
    label = next(iter(labels)) if term.label is None and len(labels) == 1 else by_name.get(str(term.label), term.label)
    if not isinstance(label, int) or label not in labels:
        named = ", ".join(f"{index} ({name})" for index, name in labels.items())
        raise RecipeError(f"{where}: `label` {term.label!r} is none of its labels: {named}")
    longest = min(term.max_length or tokenizer.model_max_length, readable_tokens(model))
    own = tokenizer.num_special_tokens_to_add(pair=term.pair)
    if longest <= own:
        raise RecipeError(f"{where}: reads {longest} tokens, of which {own} are its tokenizer's own; raise `max_length`")
    model = model.requires_grad_(False).eval().to(PartialState().device)
    return ModelReward(model, tokenizer, label, term.probability, longest, term.pair, where)


def load_reward_tokenizer(term: RewardTerm, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a reward `model`, which lies at `path`.

    Raises:
        RecipeError: it cannot be loaded, or has no token to pad with.
    """
    where, sides = f"the reward's `model` {term.model}", {"truncation_side": "left", "padding_side": "right"}  # right suits any
    with loading(where, switch="reward.trust_remote_code"):
        tokenizer = AutoTokenizer.from_pretrained(path, **sides, trust_remote_code=term.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise RecipeError(f"{where}: its tokenizer has neither a pad nor an eos token; name one in its tokenizer_config.json")
    return tokenizer


def readable_tokens(model: PreTrainedModel) -> int:
    """How many tokens a model reads: the rows of its table of positions, less those that RoBERTa and its kin leave free up to
    the padding's and BART's and OPT's up to an offset; without a table what the config says, or any number."""
    rows = [
        module.num_embeddings - (module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in name.rpartition(".")[2] or name.endswith("wpe"))
    ]
    said = getattr(model.config, "max_position_embeddings", None)
    return min([*rows, *([said] if isinstance(said, int) and said > 0 and not rows else []), 2**30])
