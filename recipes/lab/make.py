"""Makes the laboratory's backbone, tokenizer and reward adapter: random weights, nothing is trained.

    python recipes/lab/make.py [FOLDER]

The output embedding's bias rules out pad and bos, so completions are letters and eos only and can be enumerated.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from rlhf_recipes.models.classifier import build_classifier
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.runs.fingerprint import ADAPTER, made_by

LETTERS = "abcdefgh"


def main(folder: Path) -> None:
    words = ["<pad>", "<s>", "</s>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special).save_pretrained(folder / "backbone")

    torch.manual_seed(0)
    backbone = PhiForCausalLM(
        PhiConfig(
            vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, initializer_range=0.15, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    with torch.no_grad():
        backbone.lm_head.bias.zero_()
        backbone.lm_head.bias[:2] = -1e4
    backbone.save_pretrained(folder / "backbone")

    reward = get_peft_model(
        build_classifier(backbone), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS")
    )
    for name, parameter in reward.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif name.endswith("score.modules_to_save.default.weight"):
            torch.nn.init.normal_(parameter, std=0.15)
    reward.save_pretrained(folder / "reward")
    (folder / "reward" / "README.md").unlink(missing_ok=True)
    made = made_by(load_recipe(Path(__file__).parent), folder / "reward")
    (folder / "reward" / ADAPTER).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "checkpoints")
