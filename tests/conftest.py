"""A tiny recipe of its own, made in seconds: 2 layers, byte-level tokens, a reward adapter, a task with known words."""

import os
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

# Nothing of who runs the tests plays a part: no login, no accelerate config, no launcher, no terminal.
_FOREIGN = (
    "ACCELERATE_", "FSDP_", "GOMP_", "HF_", "HUGGING", "MV2_", "OMPI_", "OMP_", "PMI_", "SLURM_", "TORCHELASTIC_",
    "TRANSFORMERS_", "WANDB_", "XDG_",
)  # fmt: skip
_NAMED = {
    "COLUMNS", "FORCE_COLOR", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MPLCONFIGDIR", "NETRC",
    "NO_COLOR", "PYTHONIOENCODING", "PYTHONUNBUFFERED", "RANK", "WORLD_SIZE",
}  # fmt: skip
for _name in [name for name in os.environ if name.startswith(_FOREIGN) or name in _NAMED]:
    del os.environ[_name]
_home = tempfile.TemporaryDirectory(prefix="home-", ignore_cleanup_errors=True)
os.environ |= {"HOME": _home.name, "HF_HUB_OFFLINE": "1"}  # a test never waits for a hub
if "PYTEST_XDIST_WORKER" in os.environ:  # beside others: torch reads it as it is imported
    os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests import scripts.*

TASK = """
import os
import random
from datasets import Dataset

GOOD, BAD = ["great", "fine", "superb"], ["awful", "poor", "dull"]

def _texts(split, words):
    rng = random.Random(split)
    return [" ".join(rng.choice(["the", "film", "plot", "was", *words]) for _ in range(8)) for _ in range(48)]

def load_prompts(split):
    texts = _texts(split, GOOD + BAD)
    return Dataset.from_dict({"prompt": [" ".join(t.split()[: 1 + i % 3]) for i, t in enumerate(texts)]})

def load_preferences(split):
    rows = zip(_texts(split, GOOD), _texts(split, BAD))
    return Dataset.from_list([{"prompt": "", "chosen": g, "rejected": b, "words": 8} for g, b in rows])

def load_demonstrations(split):
    return Dataset.from_dict({"text": _texts(split, GOOD + BAD)})

async def wordy(prompts, completions, **columns):
    return [len(c.split()) / 10 if c else None for c in completions]

def fails_in_the_last_process(prompts, completions, **columns):
    last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
    in_rollout = len(completions) == 8  # evaluations have batches of 4
    return [float("nan") if last and in_rollout and i == 0 else 1.0 for i in range(len(completions))]

def gold_reward(prompts, completions, **columns):
    return [float(sum(word in c for word in GOOD)) for c in completions]
"""

RECIPE = """
model:
  path: checkpoints/backbone
  architecture: {model_type: llama, vocab_size: 300, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
                 num_attention_heads: 2, tie_word_embeddings: true, max_position_embeddings: 64}
lora: {r: 4, alpha: 8}
reward: {adapter: checkpoints/reward, read_eos: false}
objective: {beta: 0.05}
data: {max_prompt_tokens: 24, max_completion_tokens: 6}
run: {tracker: none}
evaluate: {prompts: 8, batch_size: 4, samples: 2, completions: 2, reference_completions: 4}
sft: {from_scratch: true, max_steps: 2, per_device_train_batch_size: 4, gradient_checkpointing: false, loss_type: nll,
      logging_steps: 1, max_length: 32}
reward_training: {max_steps: 2, per_device_train_batch_size: 4, gradient_checkpointing: false, logging_steps: 1}
a2c: {per_device_train_batch_size: 8, total_episodes: 16, learning_rate: 1.0e-3}
dpo: {per_device_train_batch_size: 8, gradient_checkpointing: false, save_strategy: no, logging_steps: 1, learning_rate: 1.0e-3}
preferences: {pairs_per_prompt: 1, batch_size: 16}
ppo: {per_device_train_batch_size: 8, total_episodes: 16, num_ppo_epochs: 2, learning_rate: 1.0e-3}
"""


def write_tiny_recipe(folder: Path) -> Path:
    """recipe.yaml, task.py and checkpoints of the tiny recipe, without training anything."""
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhf_recipes.data.tokenizer import train_tokenizer
    from rlhf_recipes.models.adapters import lora_config
    from rlhf_recipes.models.backbone import load_backbone
    from rlhf_recipes.models.classifier import build_classifier
    from rlhf_recipes.recipe.loading import load_recipe

    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(textwrap.dedent(RECIPE))
    (folder / "task.py").write_text(TASK)
    recipe = load_recipe(folder)
    texts = ["the film was great", "the plot was dull", "a superb fine film", "awful poor plot"] * 4
    tokenizer = train_tokenizer(texts, vocab_size=300)
    special = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("pad", "bos", "eos")}
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**recipe.model.architecture, **special, "initializer_range": 0.2})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "checkpoints" / "backbone")
    tokenizer.save_pretrained(folder / "checkpoints" / "backbone")
    backbone = load_backbone(recipe.model, recipe.path(recipe.model.path))
    reward = get_peft_model(build_classifier(backbone), lora_config(recipe.lora, "SEQ_CLS"))
    for name, parameter in reward.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    reward.save_pretrained(folder / "checkpoints" / "reward")
    return folder


def write_foreign_reward(folder: Path) -> Path:
    """A BERT classifier of three labels with a tokenizer of its own."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from rlhf_recipes.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["a great film, a dull plot", "poor and awful was the rest"] * 8, 280)
    tokenizer.model_max_length = 40
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=280, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=40, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3,
        id2label={0: "bad", 1: "so-so", 2: "good"}, label2id={"bad": 0, "so-so": 1, "good": 2},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reward model with another architecture and tokenizer; read only."""
    return write_foreign_reward(tmp_path_factory.mktemp("rewards") / "foreign")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe's folder; read only."""
    return write_tiny_recipe(tmp_path_factory.mktemp("recipes") / "tiny")


@pytest.fixture
def roles(tiny: Path):
    """The tiny recipe's four roles, the policy moved a little away from the reference."""
    import torch

    from rlhf_recipes.data.tokenizer import load_tokenizer
    from rlhf_recipes.recipe.loading import load_recipe
    from rlhf_recipes.roles import build_roles

    recipe = load_recipe(tiny)
    built = build_roles(recipe, load_tokenizer(recipe))
    for name, parameter in built.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return built
