"""The policies that an evaluation is asked about, beside the roles."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoModelForCausalLM

from rlhf_recipes.models.adapters import load_policy_adapter
from rlhf_recipes.models.backbone import loading_fields, pretrained, safetensors_only
from rlhf_recipes.models.reference import Policy
from rlhf_recipes.recipe.errors import RecipeError, loading
from rlhf_recipes.recipe.sections import ModelSection
from rlhf_recipes.roles import Roles


@contextmanager
def judged_policy(folder: Path | None, roles: Roles, section: ModelSection) -> Iterator[Policy]:
    """The policy of `folder`, while this lasts: an adapter on the same backbone, or a full model of its own; without a
    folder the reference.

    Raises:
        RecipeError: what it holds does not fit the backbone and its tokenizer.
    """
    if folder is None:
        yield roles.reference
    elif (folder / "adapter_config.json").is_file():
        yield load_policy_adapter(roles.backbone, folder)
    else:
        with loading(str(folder)), safetensors_only():
            model = pretrained(AutoModelForCausalLM, folder, **loading_fields(section))
        theirs, ours = (each.get_input_embeddings().num_embeddings for each in (model, roles.backbone))
        if theirs != ours:
            raise RecipeError(f"{folder}: has a vocabulary of {theirs} tokens, and {section.path} one of {ours}")
        yield model.requires_grad_(False).eval().to(roles.policy.device)
