"""DPO: the tokens it trains on, its reference, its loss variants."""

import inspect
import math
import re

import pytest
import torch
import trl

from rlhf_recipes.algorithms.dpo import DPOConfig, DPOTrainer, dpo_fields, first_loss
from rlhf_recipes.algorithms.pairs import load_pairs
from rlhf_recipes.algorithms.trl_config import stage_config
from rlhf_recipes.checks.settings import DPO_LOSSES, F_DIVERGENCES, SMOOTHED
from rlhf_recipes.data.datasets import tokenize_prompts
from rlhf_recipes.data.tokenizer import load_tokenizer
from rlhf_recipes.evaluation.judging import complete
from rlhf_recipes.models.reference import Reference
from rlhf_recipes.recipe.errors import StoppedError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.rollouts.sampler import Sampled
from rlhf_recipes.tasks import load_dataset, load_task
from tests.test_ppo_trainer import Scripted, build_trainer
from tests.test_scripts import lines, run


@pytest.fixture(scope="module")
def pairs(tiny, tmp_path_factory):
    """The folder of a run of scripts/preferences.py."""
    folder = tmp_path_factory.mktemp("pairs")
    run("preferences", tiny, folder)
    return folder / "outputs/tiny/preferences/it"


def config_of(recipe, folder):
    settings = recipe.stages["dpo"], recipe.run.seed, recipe.model.dtype
    return stage_config(DPOConfig, "dpo", *settings, folder, **dpo_fields(recipe.objective.beta))


def loaded(pairs, tiny, tokenizer):
    return load_pairs(pairs / "pairs.jsonl", 300, tokenizer, [tokenizer.eos_token_id], load_recipe(tiny).data)


def trainer_on(pairs, tiny, roles, tmp_path, **overrides):
    recipe = load_recipe(tiny, {f"dpo.{key}": value for key, value in overrides.items()})
    args = config_of(recipe, tmp_path)
    return DPOTrainer(args, roles, loaded(pairs, tiny, roles.tokenizer))


def test_the_sampled_tokens_reach_the_loss_unchanged(pairs, tiny, roles, tmp_path):
    rows = lines(pairs / "pairs.jsonl")
    texts = [roles.tokenizer(r["prompt"] + r["chosen"])["input_ids"] for r in rows]
    assert any(ids != r["prompt_ids"] + r["chosen_ids"] for ids, r in zip(texts, rows, strict=True))  # text would not do
    expected = {
        (tuple(r["prompt_ids"] + r[f"{side}_ids"]), len(r[f"{side}_ids"])) for r in rows for side in ("chosen", "rejected")
    }
    trainer, seen = trainer_on(pairs, tiny, roles, tmp_path), set()
    for batch in trainer.get_train_dataloader():
        for ids, mask, completion in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
            seen.add((tuple(ids[mask.bool()].tolist()), int(completion.sum())))
    assert seen == expected


def test_ppo_dpo_and_evaluation_see_bit_equal_reference_logprobs(tiny, roles, tmp_path, monkeypatch, pairs):
    """The same tokens through each stage's own path; what the reference said is recorded where each asks it."""
    from rlhf_recipes.algorithms import dpo as dpo_module
    from rlhf_recipes.algorithms import experience
    from rlhf_recipes.evaluation import judging

    recipe = load_recipe(tiny)
    prompts = tokenize_prompts(load_dataset(load_task(recipe), "load_prompts", "eval"), roles.tokenizer, 24, limit=4)
    completions = [[5, 6, 7, 8, 9, 10], [7, 2, 0, 0, 0, 0], [5, 5, 5, 2, 0, 0], [9, 10, 11, 12, 13, 14]]
    width = max(map(len, prompts["input_ids"]))
    queries = [[0] * (width - len(ids)) + ids for ids in prompts["input_ids"]]
    sequences = torch.tensor([q + c for q, c in zip(queries, completions, strict=True)])

    said = {}

    def recording(module):
        original = module.response_forward

        def forward(policy, *args, **kwargs):
            output = original(policy, *args, **kwargs)
            if isinstance(policy, Reference):
                said[module.__name__] = output.logprobs
            return output

        monkeypatch.setattr(module, "response_forward", forward)

    for module in (experience, dpo_module, judging):
        recording(module)
    ended = torch.tensor([False, True, True, False])
    scripted = Scripted(Sampled(sequences, sequences != 0, torch.zeros(4, 6), ended))
    ppo = build_trainer(tiny, tmp_path)
    ppo.roles.sampler = roles.sampler = scripted
    ppo.rollout(torch.tensor(queries), torch.tensor(queries) != 0, prompts[:])
    complete(roles.policy, roles, prompts, recipe.run.seed, recipe.evaluate.batch_size)
    dpo = trainer_on(pairs, tiny, roles, tmp_path)
    sums = dpo.reference_logps(prompts["input_ids"][:], [[t for t in c if t] for c in completions])
    a, b, c = said.values()
    assert a.shape == (4, 6)
    assert torch.equal(a, b)
    assert torch.equal(b, c)
    torch.testing.assert_close(sums, (a * (torch.tensor(completions) != 0)).sum(1))


def test_the_loss_at_the_start_is_log_2_and_the_margin_the_papers(pairs, tiny, roles, tmp_path):
    """Eq. 7 of arXiv 2305.18290 written out, for a policy that has moved (the fixture's)."""
    trainer = trainer_on(pairs, tiny, roles, tmp_path, per_device_train_batch_size=4)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
    total = 0.0
    for i in range(4):
        ratios = []
        for row in (i, i + 4):
            ids = batch["input_ids"][row : row + 1, : int(batch["attention_mask"][row].sum())]
            on = batch["completion_mask"][row, 1 : ids.shape[1]].bool()
            log_pi, log_ref = (
                m(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0][on].sum().item()
                for m in (roles.policy, roles.reference)
            )
            ratios.append(log_pi - log_ref)
        total += math.log1p(math.exp(-0.05 * (ratios[0] - ratios[1]))) / 4
    assert loss.item() == pytest.approx(total, abs=1e-5)
    with torch.no_grad():
        for name, p in roles.policy.named_parameters():
            if "lora_B" in name:
                p.zero_()
        assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(math.log(2), abs=1e-5)


def uneven(pairs, tiny):
    """Prompts of several lengths, and rejected completions that are shorter than the chosen ones."""
    recipe = load_recipe(tiny)
    made = loaded(pairs, tiny, load_tokenizer(recipe))
    return made.map(lambda row: {"rejected_ids": row["rejected_ids"][:3]})


def make_fresh(roles):
    """The fixture's policy, which has moved, becomes the reference again."""
    with torch.no_grad():
        for name, p in roles.policy.named_parameters():
            if "lora_B" in name:
                p.zero_()


def first_loss_of(roles, tiny, tmp_path, dataset, fresh=False, **overrides):
    """The loss of the first eight pairs, and the trainer."""
    recipe = load_recipe(tiny, {f"dpo.{key}": value for key, value in overrides.items()})
    args = config_of(recipe, tmp_path)
    trainer = DPOTrainer(args, roles, dataset, fresh=fresh)
    batch = trainer.data_collator(trainer.train_dataset.select(range(8)).to_list())
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch).item(), trainer


SEEN_ALIKE = [
    {},
    {"max_length": 6},
    {"max_length": 5, "truncation_mode": "keep_end"},
    {"max_length": 2, "truncation_mode": "keep_end"},  # no prompt is left: nothing predicts the first token
    {"ld_alpha": 0.5},
    {"ld_alpha": 0.0, "max_length": 7},
    {"pad_to_multiple_of": 16},
    {"loss_weights": [0.5]},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.0]},
    {"precompute_ref_batch_size": 3},
    {"train_sampling_strategy": "group_by_length"},
]


@pytest.mark.parametrize("overrides", SEEN_ALIKE, ids=str)
def test_policy_and_reference_see_the_same_tokens_and_weights(overrides, pairs, tiny, roles, tmp_path):
    dataset, known, trls = uneven(pairs, tiny), {}, {"precompute_ref_log_probs": False, "precompute_ref_batch_size": None}
    for way in ({}, trls):  # of a policy that has moved: TRL's own way to the reference, and the one that is precomputed
        loss, trainer = first_loss_of(roles, tiny, tmp_path, dataset, **overrides | way)
        known[len(way)] = [loss, *(trainer._metrics["train"][f"rewards/{side}"][-1] for side in ("chosen", "rejected"))]
    assert known[0] == pytest.approx(known[2], abs=1e-5)
    assert abs(known[0][1]) > 1e-3
    make_fresh(roles)
    loss, trainer = first_loss_of(roles, tiny, tmp_path, dataset, fresh=True, **overrides)
    assert loss == pytest.approx(overrides.get("loss_weights", [1.0])[0] * math.log(2), abs=1e-5)
    for side in ("chosen", "rejected"):
        assert trainer._metrics["train"][f"rewards/{side}"][-1] == pytest.approx(0, abs=1e-5)


def test_pairs_whose_prompt_fills_max_length(pairs, tiny, tmp_path, capsys):
    """As in TRL they are left out, and here also counted; where none is left it is one line."""
    words = [f"--preferences.path={pairs}", "--dpo.max_steps=1", "--run.name=cut"]
    run("dpo", tiny, tmp_path, *words, "--dpo.max_length=3")
    assert re.search(r"\d+ of \d+ pairs have prompts that fill dpo.max_length=3, left out", capsys.readouterr().out)
    with pytest.raises(SystemExit) as stop:
        run("dpo", tiny, tmp_path / "none", *words, "--dpo.max_length=1")
    assert stop.value.code == 2
    assert "`dpo.max_length` 1: no completion is left" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("loss_type", [name for name in DPO_LOSSES if name != "sft"])
def test_the_first_loss_of_every_kind(loss_type, pairs, tiny, roles, tmp_path):
    """The table against TRL; sft's is the policy's own cross-entropy."""
    make_fresh(roles)
    smoothing = 0.1 if loss_type in SMOOTHED else 0.0
    loss, _ = first_loss_of(
        roles, tiny, tmp_path, uneven(pairs, tiny), fresh=True, loss_type=[loss_type], label_smoothing=smoothing
    )
    assert loss == pytest.approx(first_loss(loss_type, 0.05, smoothing), rel=1e-4, abs=1e-4)


def test_a_policy_that_does_not_start_as_the_reference_is_stopped(pairs, tiny, roles, tmp_path, capsys, monkeypatch):
    """The fixture's has moved; in a script, the reference's log-probabilities are those of other weights."""
    with pytest.raises(
        StoppedError, match=r"the log-ratios of chosen and rejected are 0 and the loss 0\.693147, and the first"
    ):
        first_loss_of(roles, tiny, tmp_path, uneven(pairs, tiny), fresh=True)
    with pytest.raises(StoppedError, match="0, and the first batch has"):  # where the loss has no known start
        first_loss_of(roles, tiny, tmp_path, uneven(pairs, tiny), fresh=True, use_weighting=True)
    right = DPOTrainer.reference_logps
    monkeypatch.setattr(DPOTrainer, "reference_logps", lambda self, *args: right(self, *args) + 0.1)
    with pytest.raises(SystemExit) as stop:
        run("dpo", tiny, tmp_path, f"--preferences.path={pairs}", "--dpo.max_steps=2")
    assert stop.value.code == StoppedError.exit_code
    assert "has -0.1 and -0.1 nats and the loss 0.693147" in capsys.readouterr().err
    assert not (tmp_path / "outputs/tiny/dpo/it/metrics.jsonl").exists()  # before it trains


@pytest.mark.parametrize("expected", [0.0, 0.3])
def test_label_smoothing_of_the_sigmoid_loss(expected, pairs, tiny, roles, tmp_path):
    """cDPO: -(1 - e) log sigmoid(z) - e log sigmoid(-z). With expected labels a pair has its own p besides, and the label is
    wrong with p (1 - e) + (1 - p) e."""
    dataset = uneven(pairs, tiny).map(lambda row: {"label_smoothing": expected})
    plain = uneven(pairs, tiny)
    lose = torch.nn.functional.logsigmoid
    for e in (0.0, 0.2):
        loss, _ = first_loss_of(roles, tiny, tmp_path, dataset, label_smoothing=e)
        _, margins = first_loss_of(roles, tiny, tmp_path, plain, loss_type=["hinge"])
        batch = margins.data_collator(margins.train_dataset.select(range(8)).to_list())
        z = []
        for i in range(8):  # one pair at a time: the margin is a mean over the batch
            rows = {k: v[[i, i + 8]] if len(v) == 16 else v[[i]] for k, v in batch.items()}
            with torch.no_grad():
                margins.compute_loss(margins.model, rows)
            z.append(margins._metrics["train"]["rewards/margins"][-1])
        z, p = torch.tensor(z), expected * (1 - e) + (1 - expected) * e
        assert loss == pytest.approx((-(1 - p) * lose(z) - p * lose(-z)).mean().item(), abs=1e-5)
    both, _ = first_loss_of(roles, tiny, tmp_path, plain, loss_type=["sigmoid", "sft"], label_smoothing=0.2)
    alone = [
        first_loss_of(roles, tiny, tmp_path, plain, loss_type=[name], label_smoothing=e)[0]
        for name, e in (("sigmoid", 0.2), ("sft", 0.0))
    ]
    assert both == pytest.approx(sum(alone), abs=1e-5)


@pytest.mark.parametrize(
    ("losses", "smoothing", "message"),
    [
        ("[hinge]", 0.1, "`dpo.label_smoothing` has no effect on hinge: only aot, aot_unpaired, exo_pair, robust, sigmoid"),
        ("[sigmoid]", 0.5, "says nothing; below 0.5"),
        ("[sigmoid, robust]", 0.1, "is another thing to sigmoid"),
        ("[sigmoid]", -0.1, "expected a number between 0 and 1"),
    ],
)
def test_label_smoothing_that_no_loss_reads(losses, smoothing, message, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run("dpo", tiny, tmp_path, f"--dpo.loss_type={losses}", f"--dpo.label_smoothing={smoothing}", "--dry-run")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_losses_that_trl_smooths():
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    branches = re.split(r'(?:el)?if loss_type == "(\w+)"', source)
    reading = {name for name, branch in zip(branches[1::2], branches[2::2], strict=True) if "label_smoothing" in branch}
    assert reading | {"sigmoid"} == SMOOTHED


VARIANTS = [{"loss_type": [name]} for name in DPO_LOSSES]
VARIANTS += [{"f_divergence_type": name} for name in F_DIVERGENCES]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: str(next(iter(v.values()))))
def test_trls_loss_variants_pass_through_the_recipe(variant, pairs, tiny, roles, tmp_path):
    extra = {"label_smoothing": 1e-3} if variant.get("loss_type") == ["exo_pair"] else {}
    trainer = trainer_on(pairs, tiny, roles, tmp_path, **variant, **extra, max_steps=2)
    for key, value in variant.items():
        assert getattr(trainer.args, key) == value
    before = {name: p.detach().clone() for name, p in roles.policy.named_parameters() if "lora_B" in name}
    trainer.train()
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    after = dict(roles.policy.named_parameters())
    assert all(after[name].isfinite().all() for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)  # adapters move


def test_the_variants_are_all_that_trl_offers():
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(DPO_LOSSES)
    assert set(re.findall(r'f_divergence_type == "(\w+)"', source)) == set(F_DIVERGENCES)


def test_the_script_makes_its_pairs_first_and_says_so(tiny, tmp_path, capsys):
    summary = run("dpo", tiny, tmp_path, "--dpo.rounds=2", "--dpo.max_steps=2")
    folder = tmp_path / "outputs/tiny/dpo/it"
    assert "no pairs given: sampling them first" in capsys.readouterr().out
    assert lines(folder / "pairs.jsonl") != lines(folder / "pairs-2.jsonl")
    assert (folder / "adapter_model.safetensors").is_file()
    assert [row["step"] for row in lines(folder / "metrics.jsonl") if "rewards/margins" in row] == [1, 2, 3, 4]
    assert summary["policy"]["kl"] != 0


def test_pairs_with_expected_labels_refuse_other_losses(tiny, tmp_path, capsys):
    run("preferences", tiny, tmp_path, "--preferences.label=expected")
    with pytest.raises(SystemExit) as stop:
        run("dpo", tiny, tmp_path, f"--preferences.path={tmp_path}/outputs/tiny/preferences/it", "--dpo.loss_type=[ipo]")
    assert stop.value.code == 2
    assert "only `dpo.loss_type` [sigmoid] can use" in capsys.readouterr().err


def test_pairs_of_a_run_and_pairs_of_the_task(tiny, tmp_path, pairs):
    run("dpo", tiny, tmp_path, f"--preferences.path={pairs}", "--dpo.max_steps=2", "--run.name=given")
    assert not (tmp_path / "outputs/tiny/dpo/given/pairs.jsonl").exists()
    run("dpo", tiny, tmp_path, "--preferences.source=task", "--dpo.max_steps=2", "--run.name=task")
    assert (tmp_path / "outputs/tiny/dpo/task/summary.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective.beta=0"], "DPO cannot do without the leash"),
        (["--sampling.temperature=0.7"], "DPO's loss reads log pi at temperature 1"),
        (["--preferences.source=task", "--dpo.rounds=2"], "use one of the two"),
        (["--preferences.path=./nowhere"], "no such folder"),
        (["--dpo.rounds=0"], "`dpo.rounds`: expected at least 1"),
        (["--dpo.loss_type=[exo_pair]"], "needs a `dpo.label_smoothing` above 0"),
        (["--preferences.label=expected", "--dpo.loss_type=[ipo]"], "only `dpo.loss_type` [sigmoid] has"),
        (["--dpo.sync_ref_model=true"], "has no effect here"),
        (["--dpo.beta=0.3"], "belongs to `objective.beta`"),
        (["--dpo.loss_type=[sigmoyd]"], "'sigmoyd' is none of TRL's losses; did you mean `sigmoid`?"),
        (["--dpo.f_divergence_type=js_divergense"], "did you mean `js_divergence`?"),
    ],
)
def test_what_dpo_cannot_do_it_says(words, message, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run("dpo", tiny, tmp_path, *words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_expected_labels_are_the_mean_over_bradley_terrys_draws(pairs, tiny, roles, tmp_path):
    trainer = trainer_on(pairs, tiny, roles, tmp_path, per_device_train_batch_size=4)
    batch = next(iter(trainer.get_train_dataloader()))
    swapped = {key: torch.cat(value.chunk(2)[::-1]) for key, value in batch.items() if key in COMPLETIONS}
    p = torch.tensor([0.0, 0.1, 0.3, 0.45])

    def losses(chosen_first, smoothing):
        """One by one: the loss of each pair."""
        given = {**batch, **({} if chosen_first else swapped), "label_smoothing": smoothing}
        if not chosen_first:
            given |= {"ref_chosen_logps": batch["ref_rejected_logps"], "ref_rejected_logps": batch["ref_chosen_logps"]}
        one_by_one = []
        for i in range(4):
            rows = {k: v[[i, i + 4]] if k in COMPLETIONS else v[i : i + 1] for k, v in given.items()}
            one_by_one.append(trainer.compute_loss(trainer.model, rows).item())
        return torch.tensor(one_by_one)

    with torch.no_grad():
        plain, flipped = losses(True, torch.zeros(4)), losses(False, torch.zeros(4))
        trainer.smoothed = True
        torch.testing.assert_close(losses(True, p), (1 - p) * plain + p * flipped, atol=1e-5, rtol=1e-4)


COMPLETIONS = ("input_ids", "attention_mask", "completion_mask")  # chosen above rejected, [2 * pairs, tokens]
