"""The methods of stages 01 to 04 on small inputs, each against a second derivation.

pytest tests/test_stages.py
"""

import importlib
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from samples import FLOW_MODEL, INSTRUCTIONS, run_stage

import backbones
import common
from report import episodes, stats
from runtime import disk, stage
from runtime.config import HERE, load_config
from runtime.errors import UserError

STAGES = ("01_sft", "02_collect_prefs", "03_dpo", "04_eval")
sft, prefs, dpo, evaluation = (importlib.import_module(name) for name in STAGES)
MICRO = str(HERE / "configs" / "micro.yaml")
TRY = HERE / "checkpoints" / "try" / "pi05"


def tiny_policy(seed=0, **model):
    torch.manual_seed(seed)
    policy = backbones.build("pi05", FLOW_MODEL | model, INSTRUCTIONS)
    unit = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
    policy.norm_stats = {
        kind: {k: [v] * n for k, v in unit.items()} for kind, n in (("action", 7), ("state", 8))
    }
    return policy.eval()


def adapted(kind="lora", targets="", **model):
    policy = tiny_policy(**model)
    return policy, common.attach_adapter(policy, kind, 4, 8, targets or policy.adapter_targets, seed=1)


def trained(kind="lora", targets=""):
    """A policy whose adapter no longer is an identity."""
    policy, model = adapted(kind, targets)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                p.add_(0.05 * torch.randn(p.shape, generator=common.stream(0, name)))
    return policy, model


def random_pairs(n, seed=0):
    g = common.stream(seed, "pairs")
    obs = {c: torch.randint(0, 256, (n, 32, 32, 3), generator=g, dtype=torch.uint8) for c in common.CAMERAS}
    chunks = {c: torch.randn(n, 4, 7, generator=g) for c in ("chosen", "rejected")}
    obs |= {"state": torch.randn(n, 8, generator=g), "instruction": [INSTRUCTIONS[i % 3] for i in range(n)]}
    return chunks | {"obs": obs, "mask": torch.arange(4).expand(n, 4) < 3}


def draws_of(policy, n, k=4, seed=0):
    return policy.draws(n, k, common.stream(seed, "d"), "stratified")


# --------------------------------------------------------------------------------------------------------- 01
def test_chunks_are_the_actions_that_follow_and_then_stand_still():
    actions = np.arange(5 * 7, dtype=np.float32).reshape(5, 7)
    chunks = sft.future_chunks(actions, np.array([0, 3]), 4)
    assert np.array_equal(chunks[0], actions[:4])
    assert np.array_equal(chunks[1, :2], actions[3:])
    assert np.array_equal(chunks[1, 2:, :6], np.zeros((2, 6))) and (chunks[1, 2:, 6] == actions[-1, 6]).all()


def test_every_observation_is_seen_once_per_epoch():
    seen = torch.cat(
        [common.shuffled(42, "sft", step, 4, 10) for step in range(5)]
    )  # two epochs of 10, batches run across the border
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_early_looks_make_up_their_share_of_every_batch():
    data, cfg = {"step": torch.arange(60) % 15 * 4}, sft.Config(batch_size=10)  # four episodes of 15 looks
    for step in range(7):
        assert torch.equal(sft.rows_of_step(cfg, step, data), common.shuffled(42, "sft", step, 10, 60))
    batches = [sft.rows_of_step(sft.Config(batch_size=10, early=0.5), step, data) for step in range(12)]
    anywhere, early = (torch.cat(part) for part in zip(*(batch.split(5) for batch in batches), strict=True))
    assert sorted(anywhere.tolist()) == list(range(60))
    first_five = [row for row in range(60) if row % 15 < 5]
    for epoch in early.split(20):
        assert sorted(epoch.tolist()) == first_five
    assert not torch.equal(early[:20], early[20:40])
    all_early = sft.rows_of_step(sft.Config(batch_size=10, early=1), 3, data)
    assert len(all_early) == 10 and (data["step"][all_early] <= 16).all()


class Planted:
    """Heads for one of two places, 20 cm to the left and to the right of the hand, by what it sees or not."""

    horizon, places = 10, torch.tensor([[0.1, 0.3, 0.0], [0.1, -0.3, 0.0]])

    def __init__(self, way):
        self.way = way  # of (image (N,), noise (N, 10, 7)) -> (N, 10), the chunk's y

    def check_words(self, instructions):
        pass

    def encode(self, obs):
        seen = torch.as_tensor(obs["agentview"]).flatten(1).float().mean(1)
        return SimpleNamespace(seen=seen, select=lambda index: SimpleNamespace(seen=seen[index]))

    def noise(self, n, generator):
        return torch.randn(n, 10, 7, generator=generator)

    def sample_actions(self, prefix, noise, steps=10):
        chunk = torch.full((len(noise), 10, 7), 0.1)
        chunk[..., 1] = self.way(prefix.seen, noise)
        return chunk

    def unnormalise(self, chunk):
        return chunk


PLANTED = {
    "the right place": (lambda seen, noise: (1 - 2 * seen)[:, None], 1),
    "the other place": (lambda seen, noise: (2 * seen - 1)[:, None], 0),
    "one place, without looking": (lambda seen, noise: torch.ones(len(seen), 1), 0.5),
    "any place": (lambda seen, noise: noise[..., 1], 0.5),
}


@pytest.mark.parametrize("name", PLANTED)
def test_right_place_tells_a_policy_that_looks(name, monkeypatch):
    """Half of the layouts are swapped, which shows in the image alone."""
    way, share = PLANTED[name]
    swapped = torch.arange(120) % 2
    images = swapped[:, None, None, None].expand(-1, 4, 4, 3).to(torch.uint8)
    data = {"agentview": images, "wrist": images, "state": torch.zeros(120, 8), "instruction": [""] * 120}
    data |= {"chunk": torch.zeros(120, 10, 7), "step": torch.zeros(120)}
    data["places"] = torch.where(swapped[:, None, None] == 1, Planted.places.flip(0), Planted.places)
    assert sft.right_place(Planted(way), data, sft.Config())["right_place"] == pytest.approx(share, abs=0.08)
    later = data | {"step": torch.ones(120)}
    unmoved = data | {"places": torch.full((120, 2, 3), torch.nan)}
    assert sft.right_place(Planted(way), later, sft.Config()) == {}
    assert sft.right_place(Planted(way), unmoved, sft.Config()) == {}

    def look(row):
        monkeypatch.setattr(evaluation, "target_places", lambda env, init: data["places"][row].numpy())
        obs = {key: data[key][row].numpy() for key in ("agentview", "wrist", "state")}
        world = SimpleNamespace(suite="s", task_id=0, observe=lambda: obs | {"instruction": ""})
        return {"crash": "", "suite": "s", "task": 0, "init_state": row, "success": True, "steps": 1} | (
            evaluation.first_look(world, Planted(way), evaluation.Config(), row)
        )

    summary = episodes.summarise([look(row) for row in range(120)])
    assert summary["right_place"] == pytest.approx(share, abs=0.08) and summary["looks"] == 120
    monkeypatch.setattr(evaluation, "target_places", lambda *_: np.full((2, 3), np.nan))
    assert evaluation.first_look(SimpleNamespace(suite="s", task_id=0), None, evaluation.Config(), 40) == {}


def test_random_shift_moves_and_repeats_the_border():
    image = torch.arange(8 * 8 * 3, dtype=torch.uint8).view(1, 8, 8, 3).repeat(64, 1, 1, 1)
    moved = common.random_shift(image, 2, common.stream(0, "shift"))
    candidates = []
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            padded = torch.nn.functional.pad(
                image[:1].permute(0, 3, 1, 2).float(), (2, 2, 2, 2), mode="replicate"
            )
            candidates.append(
                padded[:, :, 2 + dy : 10 + dy, 2 + dx : 10 + dx].permute(0, 2, 3, 1).to(torch.uint8)[0]
            )
    which = [next(i for i, c in enumerate(candidates) if torch.equal(c, m)) for m in moved]
    assert len(set(which)) > 15  # of 25 shifts


SFT_NONSENSE = ["batch_size=0", "draws=0", "log_every=0", "train=half", "ema=-1", "ema=1.5"]
DPO_NONSENSE = ["beta=high", "beta=-1", "loss=dpoo", "steps=0", "adapter=none", "contrast=-1"]


@pytest.mark.parametrize(
    "module, bad", [(sft, bad) for bad in SFT_NONSENSE] + [(dpo, bad) for bad in DPO_NONSENSE]
)
def test_values_that_make_no_sense_are_refused_before_anything_is_touched(module, bad):
    with pytest.raises(UserError) as error:
        load_config(module.Config, [MICRO, bad])
    assert bad.split("=")[0] in str(error.value)


def test_statistics_do_not_blow_up_what_hardly_varies():
    x = np.random.default_rng(0).normal(size=(1000, 2)) * [1.0, 1e-6]
    stats = sft.statistics(x)
    assert stats["q99"][1] - stats["q01"][1] == pytest.approx(0.02, rel=1e-3)
    assert stats["q99"][0] == pytest.approx(np.quantile(x[:, 0], 0.99))


def test_learning_rate_warms_up_to_the_peak_and_ends_at_one_percent():
    run = stage.Run(sft.Config(steps=1000, warmup=100, lr=1e-3), Path(), {})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rates = [run.set_learning_rate(optimizer, step) for step in range(1001)]
    assert max(rates) == pytest.approx(1e-3) and rates.index(max(rates)) in (99, 100)
    assert rates[1000] == pytest.approx(1e-5) == optimizer.param_groups[0]["lr"]


# --------------------------------------------------------------------------------------------------------- 02
def test_shares_are_even_and_add_up():
    for total in (1, 7, 60, 200):
        shares = [prefs.portion(total, 10, i) for i in range(10)]
        assert sum(shares) == total and max(shares) - min(shares) <= 1


def test_the_mask_of_a_pair_covers_what_was_executed_of_both():
    obs = {"agentview": 0, "wrist": 0, "state": 0, "instruction": "x"}
    chunk = np.zeros((10, 7), np.float32)
    a, b = prefs.Decision(3, None, obs, chunk, chunk, 8), prefs.Decision(3, None, obs, chunk, chunk, 5)
    tensors, facts = prefs.make_pair(a, b)
    assert tensors["mask"].tolist() == [True] * 5 + [False] * 5 and facts["decision"] == 3


def test_only_the_tried_chunks_have_another_noise_scale(monkeypatch):
    """Recipe `branch` for a greedy policy: the failed episode and all later decisions are greedy."""
    scales, obs = [], {"agentview": 0, "wrist": 0, "state": 0, "instruction": "i"}
    env = SimpleNamespace(suite="s", task_id=0, success=False)
    env.reset = env.restore = lambda state: None

    def play(env, policy, cfg, source, k=0, chunk=None):
        scales.append(("play", cfg.noise_scale))
        env.success = chunk is not None
        values = np.zeros((10, 7)) if chunk is None else np.asarray(chunk)
        return [prefs.Decision(i, None, obs, values, values, 8) for i in range(k, 3)]

    def propose(policy, obs, cfg, generators):
        scales.append(("try", cfg.noise_scale))
        return torch.ones(len(generators), 10, 7)

    monkeypatch.setattr(prefs, "play", play)
    monkeypatch.setattr(backbones, "propose", propose)
    cfg = prefs.Config(noise_scale=0.0, branch_scale=0.5, branches=2, tries=2)
    pairs, playouts, _ = prefs.branch_pairs(env, None, cfg, 20, 0)
    assert len(playouts) == 3 and len(pairs) == 2 and set(scales) == {("play", 0.0), ("try", 0.5)}


def test_a_crash_counts_as_all_that_its_attempt_could_play(tmp_path, monkeypatch):
    """What was played before it is not known, and no method may seem cheaper than it is."""

    def diverge(*_):
        raise prefs.CRASHES[0]("planted")

    policy = SimpleNamespace(adapter_targets="", freeze=lambda: policy)
    monkeypatch.setattr(backbones, "load_sft", lambda cfg: policy)
    monkeypatch.setattr(common, "origin", lambda *_: {})
    monkeypatch.setattr(prefs, "TaskEnv", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setitem(prefs.RECIPES, "branch", diverge)
    monkeypatch.setitem(prefs.RECIPES, "episode", diverge)
    for pairs, spent in (("branch", 7), ("episode", 5)):
        (tmp_path / pairs).mkdir()
        cfg = prefs.Config(pairs=pairs, branches=2, tries=3, candidates=5)
        prefs.collect(prefs.Job(cfg, tmp_path / pairs, "libero_object", 0, 1, 8))
        assert [row["playouts"] for row in prefs.attempts(tmp_path / pairs)] == [spent, spent]


def test_given_pairs_and_adapters_keep_their_labels(tmp_path, monkeypatch):
    """Else a folder, a table and a pairing would name another recipe than the one that was used."""
    monkeypatch.setattr(stage, "checkpoint_files", lambda folder: [folder])
    for name in ("pairs", "made/lora"):
        (tmp_path / name).mkdir(parents=True)
    disk.write_json(tmp_path / "pairs/done.json", {"config": {"pairs": "episode"}})
    given = dpo.Config(pairs_from=str(tmp_path / "pairs"), pairs="episode")
    assert given.pairs_inputs() == [str(tmp_path / "pairs")]
    with pytest.raises(UserError, match="was made with pairs=episode, not branch; set pairs=episode"):
        replace(given, pairs="branch").pairs_inputs()
    disk.write_json(tmp_path / "made/lora/done.json", {"config": {"surrogate": "elbo", "pairs": "branch"}})
    given = evaluation.Config(adapters_from=str(tmp_path / "made"), surrogate="elbo")
    assert given.adapter_inputs() == [str(tmp_path / "made/lora")]
    with pytest.raises(UserError, match="surrogate=elbo, not paper"):
        replace(given, surrogate="paper").adapter_inputs()
    disk.write_json(tmp_path / "made/lora/done.json", {"config": {"held_out": 0}})
    validate = importlib.import_module("07_validate")
    given = {"adapters_from": str(tmp_path / "made"), "pairs_from": "x", "checkpoint": "y"}
    assert validate.Config(**given).inputs()
    with pytest.raises(UserError, match="held_out=0, not 2"):
        validate.Config(**given, held_out=2).inputs()


def test_a_policy_acts_only_where_it_knows_the_words():
    """Else all tasks that it was not trained on may be one sentence to it."""
    policy = backbones.load_policy(HERE / "checkpoints" / "try" / "pi05" / "sft")
    obs = {c: np.zeros((64, 64, 3), np.uint8) for c in common.CAMERAS} | {"state": np.zeros(8, np.float32)}
    cfg = evaluation.Config()
    for words in ("pick up the milk and place it in the basket", "turn on the stove"):
        generators = [common.stream(0, "x")]
        if "milk" in words:
            backbones.propose(policy, obs | {"instruction": words}, cfg, generators)
            continue
        with pytest.raises(UserError, match="no words for 'turn on the stove'"):
            backbones.propose(policy, obs | {"instruction": words}, cfg, generators)


def test_whole_episodes_are_scored_under_the_first_observation(monkeypatch):
    """Recipe `whole`: as many pairs as both episodes have chunks. `episode` is the first of them."""
    env = SimpleNamespace(suite="s", task_id=0, success=False, reset=lambda init: None)

    def play(env, policy, cfg, source, sigma):
        env.success = sigma == 0.0
        value, n = (0.1, 5) if env.success else (0.2, 3)
        obs = [{"agentview": k, "wrist": k, "state": k, "instruction": "i"} for k in range(n)]
        chunks = [np.full((10, 7), value + k) for k in range(n)]
        return [prefs.Decision(k, None, obs[k], chunks[k], chunks[k], 8) for k in range(n)]

    monkeypatch.setattr(prefs, "play", play)
    made = {}
    for recipe in ("whole", "episode"):
        cfg = prefs.Config(pairs=recipe, candidates=2, noise_low=0.0, noise_high=0.4)
        made[recipe], playouts, _ = prefs.RECIPES[recipe](env, None, cfg, 20, 0)
        assert len(playouts) == 2
    assert len(made["whole"]) == 3 and len(made["episode"]) == 1
    for k, (tensors, facts) in enumerate(made["whole"]):
        assert tensors["agentview"] == 0 and facts["decision"] == k
        assert tensors["chosen"][0, 0] == 0.1 + k and tensors["rejected"][0, 0] == 0.2 + k
    assert np.array_equal(made["episode"][0][0]["chosen"], made["whole"][0][0]["chosen"])


# --------------------------------------------------------------------------------------------------------- 03
def test_dpo_loss_against_the_formula_on_four_numbers():
    pi_w, pi_l, ref_w, ref_l = (torch.tensor([x]) for x in (-1.0, -3.0, -1.5, -2.0))
    loss, rewards = dpo.dpo_loss(pi_w, pi_l, ref_w, ref_l, beta=0.7)
    margin = 0.7 * ((-1.0 + 1.5) - (-3.0 + 2.0))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-margin)))
    assert rewards["rewards/chosen"].item() == pytest.approx(0.35)
    assert rewards["rewards/rejected"].item() == pytest.approx(-0.7)
    swapped, _ = dpo.dpo_loss(pi_l, pi_w, ref_l, ref_w, beta=0.7)
    assert swapped.item() - loss.item() == pytest.approx(margin, rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("weight", ["velocity", "noise", "elbo"])
def test_policy_equal_to_reference_gives_a_margin_of_exactly_zero(kind, weight):
    policy, _ = adapted(kind)
    batch = dpo.batch_of(random_pairs(5), torch.arange(5))
    draws = draws_of(policy, 5)
    with policy.reference():
        ref_w, ref_l = dpo.log_probs(policy, *batch, draws, weight)
    pi_w, pi_l = dpo.log_probs(policy, *batch, draws, weight)
    assert pi_w.requires_grad and not ref_w.requires_grad
    loss, rewards = dpo.dpo_loss(pi_w, pi_l, ref_w, ref_l, beta=100.0)
    assert torch.equal(rewards["rewards/margins"], torch.zeros(5))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_chosen_and_rejected_share_their_draws():
    """The same chunk as chosen and as rejected has the same score; with other draws it would not."""
    policy = tiny_policy()
    obs, chosen, _, mask = dpo.batch_of(random_pairs(4), torch.arange(4))
    with torch.no_grad():
        w, again = dpo.log_probs(policy, obs, chosen, chosen, mask, draws_of(policy, 4), "velocity")
        other = policy.log_prob(policy.encode(obs), chosen, draws_of(policy, 4, seed=1), mask)
    torch.testing.assert_close(w, again, rtol=1e-6, atol=1e-5)
    assert (w - other).abs().min() > 1e-3


def totals(monkeypatch, root, contrast: float, expected) -> list:
    """Of each step of a training: the gradients of what it minimises, and those of `expected`.

    expected: (DPO's loss, log p(chosen), beta) -> what it should minimise.
    """
    seen, found = {}, []
    attach, loss_of = common.attach_adapter, dpo.dpo_loss

    def attaching(policy, *arguments):
        seen["adapted"] = attach(policy, *arguments)
        return seen["adapted"]

    def losing(pi_w, *rest):
        loss, rewards = loss_of(pi_w, *rest)
        seen["terms"] = loss, pi_w, rest[3]  # beta
        return loss, rewards

    def check(run, total, step, *_):
        if not getattr(total, "requires_grad", False):  # the log's numbers and the gradient are checked too
            return
        parameters = [p for p in seen["adapted"].parameters() if p.requires_grad]
        gradients = partial(torch.autograd.grad, inputs=parameters, retain_graph=True, allow_unused=True)
        want = expected(*seen["terms"])
        found.append((total, want, gradients(total), gradients(want)))

    monkeypatch.setattr(common, "attach_adapter", attaching)
    monkeypatch.setattr(dpo, "dpo_loss", losing)
    monkeypatch.setattr(stage.Run, "check", check)
    given = [f"checkpoint={HERE / 'checkpoints/tiny_libero_object'}", f"pairs_from={TRY / 'prefs'}"]
    settings = ["dpo.steps=3", "dpo.lr=1e-2", "dpo.sft_coef=2", f"dpo.contrast={contrast}", f"root={root}"]
    run_stage("03_dpo", MICRO, *given, *settings)
    return found


def test_a_contrast_of_zero_leaves_the_anchor_alone(monkeypatch, tmp_path):
    steps = totals(monkeypatch, tmp_path, 0, lambda loss, pi_w, beta: -2 * beta * pi_w.mean())
    assert len(steps) == 3
    for _, _, got, want in steps:
        assert sum(g is not None for g in got) > 20
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_contrast_of_one_is_dpo_with_an_anchor_bit_for_bit(monkeypatch, tmp_path):
    steps = totals(monkeypatch, tmp_path, 1, lambda loss, pi_w, beta: loss - 2 * beta * pi_w.mean())
    assert len(steps) == 3
    for total, want, got, wanted in steps:
        assert torch.equal(total, want)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


EVERYWHERE = r".*(language_model|expert)\.layers\.\d+\.self_attn\.[qkvo]_proj"
EXPERT = r"expert\.layers\.\d+\.self_attn\.[qkvo]_proj"
TOWER = r"vision_tower\..*[qkv]_proj"


@pytest.mark.parametrize("targets, made", [(EVERYWHERE, "Embedded"), (EXPERT, "Prefix")])
def test_what_no_adapter_touches_is_computed_once_and_changes_no_value(targets, made):
    (policy, _), pairs = trained("lora", targets), random_pairs(5)
    begun = policy.begin(pairs["obs"], 2)  # batches whose prompts differ in length
    assert type(begun).__name__ == made
    index = torch.tensor([3, 0, 4])
    obs, chosen, rejected, mask = dpo.batch_of(pairs, index)
    draws, found, reference = draws_of(policy, 3, 2), [], []
    for seen in (obs, common.select(begun, index)):
        policy.zero_grad()
        w, rejected_too = dpo.log_probs(policy, seen, chosen, rejected, mask, draws, "velocity")
        (w - rejected_too).sum().backward()
        found.append([w.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
        with policy.reference():
            reference.append(dpo.log_probs(policy, seen, chosen, rejected, mask, draws, "velocity")[0])
    assert len(found[0]) == len(found[1]) > 8
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*reference, rtol=1e-5, atol=1e-5)
    assert (reference[0] - found[0][0]).abs().min() > 1e-4  # the adapter does something


def test_observations_that_training_changes_are_encoded_at_every_step():
    obs = random_pairs(5)["obs"]
    assert adapted("lora", TOWER)[0].begin(obs, 2) is obs


def test_actions_that_were_not_executed_do_not_count():
    policy, pairs = tiny_policy(), random_pairs(3)
    chosen, mask = pairs["chosen"], pairs["mask"]
    still = partial(common.flow_matching_error, lambda i, x, t: torch.zeros_like(x))
    changed = torch.where(mask[..., None], chosen, chosen + 1)
    draws = draws_of(policy, 3)
    assert torch.equal(still(chosen, draws, mask), still(changed, draws, mask))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_training_changes_the_adapter_only_and_prefers_what_was_chosen(kind):
    """Chosen chunks go right, rejected ones left; the policy's own samples must move to the right."""
    policy, pairs = tiny_policy(), random_pairs(8)
    direction = torch.zeros(8, 4, 7)
    direction[..., 0] = 1.0
    pairs |= {"chosen": direction, "rejected": -direction}
    batch = dpo.batch_of(pairs, torch.arange(8))
    noise = policy.noise(8, common.stream(0, "noise"))
    before = policy.sample_actions(policy.encode(batch[0]), noise)[..., 0].mean()
    frozen = {name: p.clone() for name, p in policy.state_dict().items()}
    common.attach_adapter(policy, kind, 4, 8, policy.adapter_targets, seed=1)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    for step in range(40):
        draws = policy.draws(8, 4, common.stream(0, step), "stratified")
        with policy.reference():
            ref = dpo.log_probs(policy, *batch, draws, "velocity")
        loss, rewards = dpo.dpo_loss(*dpo.log_probs(policy, *batch, draws, "velocity"), *ref, beta=0.2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = policy.sample_actions(policy.encode(batch[0]), noise)[..., 0].mean()
    assert rewards["rewards/margins"].min() > 0.5 and after > before + 0.3
    now = {
        name.replace(".base_layer", ""): p for name, p in policy.state_dict().items() if "lora_" not in name
    }
    assert now.keys() == frozen.keys() and all(torch.equal(now[name], frozen[name]) for name in frozen)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_saved_adapter_merges_to_what_was_trained(kind, tmp_path):
    policy, model = trained(kind)
    obs, noise = random_pairs(4)["obs"], policy.noise(4, common.stream(0, "noise"))

    def acted(policy):
        return policy.sample_actions(policy.encode(obs), noise)

    want = acted(policy)
    common.save_adapter(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    loaded, copied = common.load_adapter(tiny_policy(), tmp_path), sft.merged(policy)
    torch.testing.assert_close(acted(loaded), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(acted(copied), want, rtol=1e-4, atol=1e-5)
    assert copied.state_dict().keys() == loaded.state_dict().keys() == tiny_policy().state_dict().keys()
    assert not torch.allclose(acted(tiny_policy()), want, atol=1e-3)


@pytest.mark.parametrize("mine, given", [(1, 2), (2, 1)])
def test_an_adapter_of_another_depth_is_refused(mine, given, tmp_path):
    """peft warns of layers that an adapter lacks, and passes over those that it has too many."""

    def deep(depth: int) -> dict:
        return {name: FLOW_MODEL[name] | {"depth": depth} for name in ("vlm", "expert")}

    adapted(**deep(given))[1].save_pretrained(str(tmp_path))
    common.load_adapter(tiny_policy(**deep(given)), tmp_path)
    with pytest.raises(UserError, match=r"adapter of another policy: only one has .*layers\.1"):
        common.load_adapter(tiny_policy(**deep(mine)), tmp_path)


@pytest.mark.parametrize("surrogate", ["paper", "elbo", "exact"])
def test_betas_pairs_are_scored_a_batch_at_a_time(surrogate, monkeypatch):
    """As many as a training step scores, with the draws that each pair has among all: the same beta."""
    (policy, _), pairs, seen, betas, score = adapted(), random_pairs(10), [], [], dpo.score

    def counted(policy, cfg, obs, chosen, *rest):
        seen.append(len(chosen))
        return score(policy, cfg, obs, chosen, *rest)

    monkeypatch.setattr(dpo, "score", counted)
    for size in (4, 10):
        cfg = dpo.Config(surrogate=surrogate, batch_size=size, ode_steps=2)
        betas.append(dpo.choose_beta(policy, pairs, cfg))
    assert seen == [4, 4, 2, 10] and abs(betas[0] / betas[1] - 1) < 1e-4, betas


def test_beta_makes_the_references_log_ratios_of_order_one():
    policy, pairs = adapted()[0], random_pairs(10)
    cfg = dpo.Config(batch_size=10)
    beta = dpo.choose_beta(policy, pairs, cfg)
    draws = policy.draws(10, 4, common.stream(cfg.seed, "beta"), "stratified")
    with torch.no_grad():
        w, rejected_too = dpo.log_probs(policy, *dpo.batch_of(pairs, torch.arange(10)), draws, "velocity")
    assert beta * (w - rejected_too).std(correction=0).item() == pytest.approx(1, rel=1e-4)


def test_a_beta_needs_no_pairs_that_differ_where_there_is_no_contrast():
    """Filtered cloning has the same chunk twice: nothing to derive a beta from, and nothing that needs it."""
    policy, pairs = adapted()[0], random_pairs(10)
    pairs |= {"rejected": pairs["chosen"]}
    cfg = dpo.Config(batch_size=10, contrast=0.0, beta=0.5)
    assert dpo.choose_beta(policy, pairs, cfg) == 0.5
    for changes in ({"contrast": 1.0}, {"beta": "auto"}):
        cfg = replace(dpo.Config(batch_size=10, contrast=0.0, beta=0.5), **changes)
        with pytest.raises(UserError, match="standard deviation of 0"):
            dpo.choose_beta(policy, pairs, cfg)


# --------------------------------------------------------------------------------------------------------- 04
def rows_of(successes, task=0, crash=""):
    row = {"suite": "s", "task": task, "seed": 1, "crash": crash, "steps": 100}
    return [row | {"init_state": 40 + i, "success": bool(x)} for i, x in enumerate(successes)]


def test_a_crash_is_neither_success_nor_failure():
    summary = episodes.summarise(rows_of([1, 1, 0]) + rows_of([0], task=1, crash="Diverged"))
    assert (summary["n"], summary["successes"], summary["crashes"]) == (3, 2, 1)
    assert summary["ci95"] == stats.wilson(2, 3) and summary["tasks"] == {"s/0": [2, 3]}


def test_pairing_uses_the_same_episodes_only():
    rows, base = rows_of([1, 1, 0, 1]), rows_of([0, 1, 1])
    result = episodes.paired(rows, base)
    assert (result["paired_n"], result["gained"], result["lost"]) == (3, 1, 1) and result["diff_vs_sft"] == 0
    other_seed = [row | {"seed": 2} for row in base]
    assert episodes.paired(rows, other_seed)["paired_n"] == 0


# --------------------------------------------------------------------------------------------- pairs held out
def test_every_second_attempt_is_held_out_of_training():
    cfg = dpo.Config(pairs_from=str(TRY / "prefs"), held_out=2)
    policy = backbones.load_policy(HERE / "checkpoints/tiny_libero_object")
    rows = disk.read_jsonl(TRY / "prefs" / "pairs.jsonl")
    attempts = list(dict.fromkeys((row["task"], row["unit"]) for row in rows))
    is_held = [(row["task"], row["unit"]) in attempts[::2] for row in rows]
    pairs, held = dpo.load_pairs(cfg, policy)
    everything, none = dpo.load_pairs(replace(cfg, held_out=0), policy)
    assert len(none["mask"]) == 0 and 0 < len(held["mask"]) < len(rows)
    for part, wanted in ((pairs, False), (held, True)):
        index = [i for i, h in enumerate(is_held) if h == wanted]
        assert torch.equal(part["chosen"], everything["chosen"][index])
        assert torch.equal(part["obs"]["agentview"], everything["obs"]["agentview"][index])
    with pytest.raises(UserError, match="leaves no pair"):
        dpo.load_pairs(replace(cfg, held_out=1), policy)


def test_what_is_delivered_is_zero_before_training_and_grows_on_the_pairs_trained_on():
    policy = backbones.load_policy(HERE / "checkpoints/tiny_libero_object")
    pairs, _ = dpo.load_pairs(dpo.Config(pairs_from=str(TRY / "prefs")), policy)
    common.attach_adapter(policy, "lora", 4, 8, policy.adapter_targets, 0)
    assert dpo.delivered(policy, pairs, 8) == {"nats": 0.0, "std": 0.0, "pairs": len(pairs["mask"])}
    optimizer = torch.optim.AdamW((p for p in policy.parameters() if p.requires_grad), lr=3e-3)
    batch, draws = dpo.batch_of(pairs, torch.arange(8)), draws_of(policy, 8)
    for _ in range(8):
        pi_w, pi_l = dpo.log_probs(policy, *batch, draws, "velocity")
        (pi_l - pi_w).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    few = common.select(pairs, torch.arange(8))
    found = dpo.delivered(policy, few, 8)
    assert found["nats"] > 0.5 and dpo.delivered(policy, few, 3) == pytest.approx(found, rel=1e-3)
