"""scripts/merge.py: the merged model is the policy, complete and described; the upload is what it says."""

import json

import huggingface_hub
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_recipes import publish
from rlhf_recipes.evaluation.tables import fraction_bound
from rlhf_recipes.models.backbone import load_backbone
from rlhf_recipes.recipe.loading import load_recipe
from scripts import evaluate, merge, ppo


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The output folder of a PPO run that has moved, and of its evaluation."""
    output = tmp_path_factory.mktemp("merge")
    words = ["--recipe", str(tiny), "--run.output", str(output)]
    ppo.main([*words, "--run.name", "it", "--ppo.learning_rate=3e-2", "--ppo.total_episodes=48"])
    return output


def run(tiny, output, name, *words):
    return merge.main(["--recipe", str(tiny), "--run.output", str(output), "--run.name", name, *words])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_merged_model_is_the_policy(dtype, tiny, trained):
    summary = run(tiny, trained, dtype, f"--model.save_dtype={dtype}")
    folder = trained / "tiny" / "merge" / dtype / "model"
    recipe, adapter = load_recipe(tiny), trained / "tiny" / "ppo" / "it"
    tokenizer, merged = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ids = torch.tensor([tokenizer("the film was great")["input_ids"]])
    policy = PeftModel.from_pretrained(load_backbone(recipe.model, recipe.path(recipe.model.path)), adapter)
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits.log_softmax(-1) for model in (merged, policy))
        with policy.disable_adapter():
            reference = policy(input_ids=ids).logits.log_softmax(-1)
    difference = (ours - theirs).abs().max().item()
    assert difference < {"float32": 1e-5, "float16": 1e-2, "bfloat16": 0.1}[dtype]
    assert (reference - theirs).abs().max() > 0.3  # there was something to merge
    assert summary["difference"] < 10 * difference + 1e-6
    assert -1e-12 <= summary["kl"] < 1e-2
    names = {file.name for file in folder.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["do_sample"] is True
    assert (generation["top_k"], generation["max_new_tokens"]) == (0, 6)
    assert generation["eos_token_id"] == tokenizer.eos_token_id != generation["pad_token_id"]


def test_a_model_that_differs_is_not_handed_out(tiny, trained, monkeypatch, capsys):
    save = publish.Run.save_backbone

    def spoil(self, model, tokenizer):
        model.get_input_embeddings().weight.data.mul_(1.5)
        save(self, model, tokenizer)

    monkeypatch.setattr(publish.Run, "save_backbone", spoil)
    with pytest.raises(SystemExit) as stop:
        run(tiny, trained, "spoilt")
    assert stop.value.code == 2
    assert "log-probabilities are up to" in capsys.readouterr().err
    assert not (trained / "tiny/merge/spoilt/model").exists()


def test_the_card_has_the_numbers_and_the_recipe(tiny, trained):
    run(tiny, trained, "before")
    text = (trained / "tiny/merge/before/model/README.md").read_text()
    judged = json.loads((trained / "tiny/ppo/it/summary.json").read_text())
    assert f"| this policy | {judged['policy']['reward']:.3f} | {judged['policy']['gold']:.3f} |" in text
    evaluate.main(["--recipe", str(tiny), "--run.output", str(trained), "--run.name", "judged"])
    run(tiny, trained, "after")
    text = (trained / "tiny/merge/after/model/README.md").read_text()
    evaluation = json.loads((trained / "tiny/evaluate/judged/evaluation.json").read_text())
    reward = evaluation["policies"]["ppo"]["reward"]
    assert f"{reward['mean']:.3f} ({reward['low']:.3f} to {reward['high']:.3f})" in text
    _, front, body = text.split("---\n", 2)
    assert {"trl", "ppo", "rlhf-recipes"} <= set(yaml.safe_load(front)["tags"])
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe["ppo"]["total_episodes"] == 48
    assert str(tiny) not in text  # no path of the machine it was made on
    assert "Seed 0, commit " in body


def test_the_card_never_has_another_rewards_numbers(tiny, trained, capsys):
    """A policy of one reward, judged by a sum, then at another beta: the card keeps to its own."""
    words = ["--recipe", str(tiny), "--run.output", str(trained)]
    terms = "--reward.terms=[{adapter: checkpoints/reward, read_eos: false}, {function: wordy, weight: 9}]"
    whole = ["--reward.adapter=null", "--reward.read_eos=true", terms]
    adapter = f"--merge.adapter={trained}/tiny/ppo/other"
    ppo.main([*words, "--run.name", "other", "--ppo.learning_rate=3e-2", "--objective.beta=0.07"])
    judged = f"--evaluate.policies=[mine={trained}/tiny/ppo/other]"
    evaluate.main([*words, "--run.name", "sum", "--objective.beta=0.07", judged, *whole])
    evaluate.main([*words, "--run.name", "beta", judged])
    capsys.readouterr()
    run(tiny, trained, "neither", adapter)
    said, text = capsys.readouterr().out, (trained / "tiny/merge/neither/model/README.md").read_text()
    by_sum = json.loads((trained / "tiny/evaluate/sum/evaluation.json").read_text())["policies"]["mine"]
    own = json.loads((trained / "tiny/ppo/other/summary.json").read_text())["policy"]
    assert f"{by_sum['reward']['mean']:.3f}" not in text
    assert "intervals" not in text
    assert f"| this policy | {own['reward']:.3f} | {own['gold']:.3f} |" in text  # of its own end
    assert "to maximise E[r] - 0.07 KL from its backbone, with the reward r = adapter checkpoints/reward," in text
    assert f"not on the card: {trained}/tiny/evaluate/sum, as this policy was trained for the reward adapter" in said
    assert f"not on the card: {trained}/tiny/evaluate/beta, as this policy was trained for beta 0.07, and there 0.05" in said

    evaluate.main([*words, "--run.name", "own", "--objective.beta=0.07", judged])
    evaluate.main([*words, "--run.name", "sum-again", "--objective.beta=0.07", judged, *whole])
    capsys.readouterr()
    run(tiny, trained, "newer", adapter)
    assert "not on the card: " + f"{trained}/tiny/evaluate/sum-again" in capsys.readouterr().out
    text = (trained / "tiny/merge/newer/model/README.md").read_text()
    evaluation = json.loads((trained / "tiny/evaluate/own/evaluation.json").read_text())
    reward, fraction = (evaluation["policies"]["mine"][key] for key in ("reward", "fraction_of_optimum"))
    assert f"| this policy | {reward['mean']:.3f} ({reward['low']:.3f} to {reward['high']:.3f}) |" in text
    assert evaluation["optimum"]["bound"]
    assert fraction_bound(fraction["mean"]) in text
    assert f"J&#42; &gt;= {evaluation['optimum']['objective']:.3f}, a bound" in text

    evaluate.main([*words, "--run.name", "of-merged", f"--evaluate.policies=[merged={trained}/tiny/merge/newer/model]"])
    assert "merged (newer/model) was trained for another objective: beta 0.07, and here 0.05" in capsys.readouterr().out


def test_pushing_uploads_the_folder_and_a_failure_keeps_it(tiny, trained, monkeypatch, capsys):
    calls = []

    class Api:
        def create_repo(self, repository, **options):
            calls.append((repository, options))
            return f"https://hub/{repository}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(file.name for file in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert run(tiny, trained, "pushed", "--merge.push=me/mine")["pushed_to"] == "https://hub/me/mine"
    (created, options), (uploaded, files) = calls
    assert created == uploaded == "me/mine"
    assert options == {"private": True, "exist_ok": True}
    assert {"model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= set(files)

    monkeypatch.undo()  # the real client, and no network
    with pytest.raises(SystemExit) as stop:
        run(tiny, trained, "not-pushed", "--merge.push=me/mine")
    assert stop.value.code == 2
    assert "uploads it" in capsys.readouterr().err
    assert (trained / "tiny/merge/not-pushed/model/model.safetensors").is_file()
    calls.clear()
    assert run(tiny, trained, "dry", "--merge.push=me/mine", "--dry-run") is None
    assert (
        "would upload model, tokenizer, generation config and card to me/mine, private if it is new" in capsys.readouterr().out
    )
    assert calls == []
    assert not (trained / "tiny/merge/dry").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--merge.adapter=nowhere"], "`merge.adapter` nowhere: no such folder"),
        (["--merge.adapter=checkpoints/backbone"], "it has no adapter_config.json"),
        (["--merge.adapter=checkpoints/reward"], "an adapter of a reward model, not of a policy"),
        ([], "run scripts/ppo.py first"),
    ],
)
def test_what_cannot_be_merged_is_named(words, message, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tiny, tmp_path, "it", *words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
