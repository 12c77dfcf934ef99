# ruff: noqa: RUF001 - DeepSeek's tokens have such letters
"""Every chat template that TRL ships, on a small tokenizer with the tokens that the template writes.

python tests/test_templates.py    writes docs/templates.md
"""

import re
from pathlib import Path

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_recipes.data.tokens import decode_completions, encode_pair, encode_prompt
from rlhf_recipes.recipe.errors import RecipeError

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(file.stem for file in FOLDER.glob("*.jinja") if not file.stem.endswith("_training"))
DOCS = Path(__file__).resolve().parent.parent / "docs" / "templates.md"
# by the beginning of the name, the longest that fits
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "deepseek": "<｜end▁of▁sentence｜>", "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>", "gemma4": "<turn|>", "glm4moe": "<|user|>", "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>", "lfm2": "<|im_end|>", "llama3": "<|eot_id|>", "llava_next": "</s>",
    "muse_glimmer": "<|eot|>", "nemotron": "<|im_end|>", "phi3": "<|end|>", "qwen": "<|im_end|>",
}  # fmt: skip
ASKED, AGAIN = {"role": "user", "content": "2+2?"}, {"role": "user", "content": "and 3+3?"}
SYSTEM = {"role": "system", "content": "Be brief."}
FOUR, BEGUN, REST, SIX = ({"role": "assistant", "content": text} for text in ("It is 4.", "It is", " 4.", "It is 6."))
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds numbers", "parameters": PARAMETERS}}
KINDS = {  # title: prompt, completion, what else the template gets
    "one answer": ([ASKED], [FOUR], {}),
    "after other turns": ([ASKED, FOUR, AGAIN], [SIX], {}),
    "of several messages": ([ASKED], [FOUR, AGAIN, SIX], {}),
    "begun in the prompt": ([ASKED, BEGUN], [REST], {}),
    "content as parts": ([{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}], [FOUR], {}),
    "system message": ([SYSTEM, ASKED], [FOUR], {}),
    "tools": ([ASKED], [FOUR], {"tools": [TOOL]}),
}


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """Bytes, and whatever looks like a special token in the template."""
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    end = ENDS[max((beginning for beginning in ENDS if name.startswith(beginning)), key=len)]
    written = sorted({*re.findall(r"<[|｜]?[A-Za-z_▁]+[|｜]?>", template)} - {"<s>", "<pad>", end})
    special = [token for token in written if re.search(r"[|｜]|_of_|image|utterance", token)]
    vocabulary = ["<pad>", "<s>", end, *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": end}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=special, chat_template=template, padding_side="left", **tokens
    )


def result(name: str, kind: str) -> str:
    """What a template does with that kind of conversation: the completion, or why there is none."""
    tokenizer, (prompt, answer, template) = tokenizer_of(name), KINDS[kind]
    try:
        asked, said = encode_pair(tokenizer, prompt, answer, template=template)
    except RecipeError as error:
        return "refused: " + re.sub(r".*these messages: (.*); change.*", r"\1", str(error))
    if kind == "tools" and "adds numbers" not in tokenizer.decode(asked):
        return "not shown by the template"
    return tokenizer.decode(said)


def row_of(name: str) -> str:
    """A row of the table: the completion of one answer, and what is special about the other kinds."""
    results = {kind: result(name, kind) for kind in KINDS}
    shown = results["one answer"].replace("\n", "\\n").replace("|", "\\|")
    others = [f"{kind}: {value}" for kind, value in results.items() if value.startswith(("refused", "not shown"))]
    return f"| {name} | `{shown}` | {'; '.join(others).replace('|', chr(92) + '|') or 'all'} |"


HEAD = """# Chat templates

The {count} chat templates that TRL {version} ships (`trl/chat_templates`, those for inference), each on a small tokenizer with
the tokens that it writes, through the function that makes the token ids of every stage (`rlhf_recipes.data.encode_pair`).
Tried: {kinds}.
A completion begins where the template first writes something else because an answer follows: some put an empty reasoning there,
which PPO's prompts, made for an answer to come, do not have or have begun. It stops at the first end of text;
GLM-4 writes none after an answer, and gets one. Written and checked by `tests/test_templates.py`.

| template | one answer to "2+2?", as it is learned | works, or what does not |
| --- | --- | --- |
"""


def page() -> str:
    head = HEAD.format(count=len(NAMES), version=trl.__version__, kinds=", ".join(KINDS))
    return head + "\n".join(map(row_of, NAMES)) + "\n"


def test_the_page_is_what_the_templates_do():
    assert DOCS.read_text(encoding="utf-8") == page()
    assert len(NAMES) == 34


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_completions_are_what_the_template_writes(name):
    tokenizer = tokenizer_of(name)
    for kind, (prompt, answer, template) in KINDS.items():
        if result(name, kind).startswith("refused"):
            assert (name, kind) == ("gemma", "system message")
            continue
        asked, said = encode_pair(tokenizer, prompt, answer, template=template)
        assert said[-1] == tokenizer.eos_token_id
        assert len(answer) > 1 or said.index(tokenizer.eos_token_id) == len(said) - 1
        sampled_after = encode_prompt(tokenizer, prompt, template)
        assert sampled_after[: len(asked)] == asked
        generation_prompt = tokenizer.decode(sampled_after[len(asked) :])
        assert "2+2" not in generation_prompt
        assert generation_prompt.strip() in ("", "<think>", "<think>\n\n</think>")  # earlier answers have no reasoning
        [text] = decode_completions(tokenizer, [asked], [said])
        assert text.rstrip().endswith(answer[-1]["content"].strip())
        whole = tokenizer.decode(asked + said, skip_special_tokens=True)
        contents = [message["content"] for message in [*prompt, *answer] if message is not BEGUN]
        places = [whole.index(content if isinstance(content, str) else content[0]["text"]) for content in contents]
        assert places == sorted(places)
        if kind == "begun in the prompt":
            assert "It is 4." in whole
            assert text == " 4."
        if kind == "of several messages":
            assert "and 3+3?" in text


if __name__ == "__main__":
    DOCS.write_text(page(), encoding="utf-8")
