"""The methods of stages 01 to 04 on small inputs, each against a second derivation. pytest tests/test_stages.py"""

import importlib
import math

import numpy as np
import pytest
import torch

import backbones
import common

sft, prefs, dpo, evaluation = (importlib.import_module(name) for name in ("01_sft", "02_collect_prefs", "03_dpo", "04_eval"))

SIZE = {"width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
MODEL = {
    "vlm": SIZE,
    "expert": SIZE,
    "vision": VISION | {"image_size": 32, "patch_size": 16},
    "horizon": 4,
    "flow_dim": 7,
    "state_token": True,
    "gate_bias": 1.0,
}
INSTRUCTIONS = ["pick up the milk and place it in the basket", "pick up the ketchup and place it in the basket"]


def tiny_policy(seed=0):
    torch.manual_seed(seed)
    policy = backbones.build("pi05", MODEL, INSTRUCTIONS)
    unit = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
    policy.norm_stats = {kind: {k: [v] * n for k, v in unit.items()} for kind, n in (("action", 7), ("state", 8))}
    return policy.eval()


def random_pairs(n, seed=0):
    g = common.stream(seed, "pairs")
    images = {c: torch.randint(0, 256, (n, 32, 32, 3), generator=g, dtype=torch.uint8) for c in ("agentview", "wrist")}
    chunks = {c: torch.randn(n, 4, 7, generator=g) for c in ("chosen", "rejected")}
    instruction = [INSTRUCTIONS[i % 2] for i in range(n)]
    mask = torch.arange(4).expand(n, 4) < 3
    return images | chunks | {"state": torch.randn(n, 8, generator=g), "mask": mask, "instruction": instruction}


# -------------------------------------------------------------------------------------------------------------------- 01
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


def test_random_shift_moves_and_repeats_the_border():
    image = torch.arange(8 * 8 * 3, dtype=torch.uint8).view(1, 8, 8, 3).repeat(64, 1, 1, 1)
    moved = common.random_shift(image, 2, common.stream(0, "shift"))
    candidates = []
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            padded = torch.nn.functional.pad(image[:1].permute(0, 3, 1, 2).float(), (2, 2, 2, 2), mode="replicate")
            candidates.append(padded[:, :, 2 + dy : 10 + dy, 2 + dx : 10 + dx].permute(0, 2, 3, 1).to(torch.uint8)[0])
    which = [next(i for i, c in enumerate(candidates) if torch.equal(c, m)) for m in moved]
    assert len(set(which)) > 15  # of 25 shifts


@pytest.mark.parametrize("bad", ["batch_size=0", "draws=0", "log_every=0", "train=half", "execute=0", "pairs=brnch", "ema=-1"])
def test_values_that_make_no_sense_are_refused_before_anything_is_touched(bad):
    with pytest.raises(common.UserError) as error:
        common.load_config(sft.Config, "sft", ["configs/micro.yaml", bad])
    assert bad.split("=")[0] in str(error.value)


@pytest.mark.parametrize("bad", ["beta=high", "beta=-1", "weight=velocty", "steps=0"])
def test_dpo_refuses_them_too(bad):
    with pytest.raises(common.UserError, match=r"beta|weight|steps"):
        common.load_config(dpo.Config, "dpo", ["configs/micro.yaml", bad])


def test_statistics_do_not_blow_up_what_hardly_varies():
    x = np.random.default_rng(0).normal(size=(1000, 2)) * [1.0, 1e-6]
    stats = sft.statistics(x)
    assert stats["q99"][1] - stats["q01"][1] == pytest.approx(0.02, rel=1e-3)
    assert stats["q99"][0] == pytest.approx(np.quantile(x[:, 0], 0.99))


def test_learning_rate_warms_up_to_the_peak_and_ends_at_one_percent():
    cfg = sft.Config(steps=1000, warmup=100, lr=1e-3)
    rates = [common.learning_rate(step, cfg) for step in range(1001)]
    assert max(rates) == pytest.approx(1e-3) and rates.index(max(rates)) in (99, 100) and rates[1000] == pytest.approx(1e-5)


# -------------------------------------------------------------------------------------------------------------------- 02
def test_shares_are_even_and_add_up():
    for total in (1, 7, 60, 200):
        shares = [prefs.share(total, 10, i) for i in range(10)]
        assert sum(shares) == total and max(shares) - min(shares) <= 1


def test_the_mask_of_a_pair_covers_what_was_executed_of_both():
    obs = {c: np.zeros((8, 8, 3), np.uint8) for c in ("agentview", "wrist")} | {"state": np.zeros(8), "instruction": "x"}
    chunk = np.zeros((10, 7), np.float32)
    a, b = prefs.Decision(3, None, obs, chunk, chunk, 8), prefs.Decision(3, None, obs, chunk, chunk, 5)
    tensors, facts = prefs.make_pair(a, b)
    assert tensors["mask"].tolist() == [True] * 5 + [False] * 5 and facts["decision"] == 3


# -------------------------------------------------------------------------------------------------------------------- 03
def test_dpo_loss_against_the_formula_on_four_numbers():
    pi_w, pi_l, ref_w, ref_l = (torch.tensor([x]) for x in (-1.0, -3.0, -1.5, -2.0))
    loss, rewards = dpo.dpo_loss(pi_w, pi_l, ref_w, ref_l, beta=0.7)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.7 * ((-1.0 + 1.5) - (-3.0 + 2.0)))))
    assert rewards["rewards/chosen"].item() == pytest.approx(0.35) and rewards["rewards/rejected"].item() == pytest.approx(-0.7)
    swapped, _ = dpo.dpo_loss(pi_l, pi_w, ref_l, ref_w, beta=0.7)
    assert swapped.item() - loss.item() == pytest.approx(rewards["rewards/margins"].item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("weight", ["velocity", "noise", "elbo"])
def test_policy_equal_to_reference_gives_a_margin_of_exactly_zero(kind, weight):
    policy, pairs = tiny_policy(), random_pairs(5)
    common.attach_adapter(policy, kind, 4, 8, policy.adapter_targets, seed=1)
    obs, chosen, rejected, mask = dpo.batch_of(pairs, torch.arange(5))
    draws = policy.draws(5, 4, common.stream(0, "d"), "stratified")
    with policy.reference():
        ref_w, ref_l = dpo.log_probs(policy, obs, chosen, rejected, mask, draws, weight)
    pi_w, pi_l = dpo.log_probs(policy, obs, chosen, rejected, mask, draws, weight)
    assert pi_w.requires_grad and not ref_w.requires_grad
    loss, rewards = dpo.dpo_loss(pi_w, pi_l, ref_w, ref_l, beta=100.0)
    assert torch.equal(rewards["rewards/margins"], torch.zeros(5))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_chosen_and_rejected_share_their_draws():
    """Scoring the same chunk as chosen and as rejected gives the same number; with independent draws it would not."""
    policy, pairs = tiny_policy(), random_pairs(4)
    obs, chosen, _, mask = dpo.batch_of(pairs, torch.arange(4))
    with torch.no_grad():
        draws = policy.draws(4, 4, common.stream(0, "d"), "stratified")
        w, again = dpo.log_probs(policy, obs, chosen, chosen, mask, draws, "velocity")
        other = policy.log_prob(policy.encode(obs), chosen, policy.draws(4, 4, common.stream(1, "d"), "stratified"), mask)
    torch.testing.assert_close(w, again, rtol=1e-6, atol=1e-5)
    assert (w - other).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("targets", "made"),
    [
        (r".*(language_model|expert)\.layers\.\d+\.self_attn\.[qkvo]_proj", "Embedded"),
        (r"expert\.layers\.\d+\.self_attn\.[qkvo]_proj", "Prefix"),
        (r"vision_tower\..*[qkv]_proj", "NoneType"),
    ],
)
def test_what_no_adapter_touches_is_computed_once_and_changes_no_value(targets, made):
    policy, pairs = tiny_policy(), random_pairs(5)
    common.attach_adapter(policy, "lora", 4, 8, targets, seed=1)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    begun = dpo.begin_all(policy, pairs, 2)  # in batches whose prompts differ in length
    assert type(begun).__name__ == made
    if begun is None:
        return
    index = torch.tensor([3, 0, 4])
    obs, chosen, rejected, mask = dpo.batch_of(pairs, index)
    draws, grads = policy.draws(3, 2, common.stream(0, "d"), "stratified"), []
    for seen in (obs, begun.select(index)):
        policy.zero_grad()
        w, rejected_too = dpo.log_probs(policy, seen, chosen, rejected, mask, draws, "velocity")
        (w - rejected_too).sum().backward()
        grads.append([w.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
    assert len(grads[0]) == len(grads[1]) > 8
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with policy.reference():
        ref = [dpo.log_probs(policy, seen, chosen, rejected, mask, draws, "velocity")[0] for seen in (obs, begun.select(index))]
    torch.testing.assert_close(*ref, rtol=1e-5, atol=1e-5)
    assert (ref[0] - grads[0][0]).abs().min() > 1e-4  # the adapter does something


def test_actions_that_were_not_executed_do_not_count():
    policy, pairs = tiny_policy(), random_pairs(3)
    chosen, mask = pairs["chosen"], pairs["mask"]
    draws = policy.draws(3, 4, common.stream(0, "d"), "stratified")
    error = common.flow_matching_error(lambda i, x, t: torch.zeros_like(x), chosen, draws, mask)
    changed = torch.where(mask[..., None], chosen, chosen + 1)
    assert torch.equal(error, common.flow_matching_error(lambda i, x, t: torch.zeros_like(x), changed, draws, mask))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_training_changes_the_adapter_only_and_prefers_what_was_chosen(kind):
    """A planted signal: chosen chunks go right, rejected ones left; the policy's own samples must move to the right."""
    policy, pairs = tiny_policy(), random_pairs(8)
    direction = torch.zeros(8, 4, 7)
    direction[..., 0] = 1.0
    pairs |= {"chosen": direction, "rejected": -direction}
    obs, chosen, rejected, mask = dpo.batch_of(pairs, torch.arange(8))
    noise = policy.noise(8, common.stream(0, "noise"))
    before = policy.sample_actions(policy.encode(obs), noise)[..., 0].mean()
    frozen = {name: p.clone() for name, p in policy.state_dict().items()}
    common.attach_adapter(policy, kind, 4, 8, policy.adapter_targets, seed=1)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    for step in range(40):
        draws = policy.draws(8, 4, common.stream(0, step), "stratified")
        with policy.reference():
            ref = dpo.log_probs(policy, obs, chosen, rejected, mask, draws, "velocity")
        loss, rewards = dpo.dpo_loss(*dpo.log_probs(policy, obs, chosen, rejected, mask, draws, "velocity"), *ref, beta=0.2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = policy.sample_actions(policy.encode(obs), noise)[..., 0].mean()
    assert rewards["rewards/margins"].min() > 0.5 and after > before + 0.3, (rewards["rewards/margins"], before, after)
    now = {name.replace(".base_layer", ""): p for name, p in policy.state_dict().items() if "lora_" not in name}
    assert now.keys() == frozen.keys() and all(torch.equal(now[name], frozen[name]) for name in frozen)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_saved_adapter_merges_to_what_was_trained(kind, tmp_path):
    policy, pairs = tiny_policy(), random_pairs(4)
    adapted = common.attach_adapter(policy, kind, 4, 8, policy.adapter_targets, seed=1)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                p.add_(0.05 * torch.randn(p.shape, generator=common.stream(0, name)))
    obs = dpo.batch_of(pairs, torch.arange(4))[0]
    noise = policy.noise(4, common.stream(0, "noise"))
    trained = policy.sample_actions(policy.encode(obs), noise)
    adapted.save_pretrained(str(tmp_path))
    merged = common.load_adapter(tiny_policy(), tmp_path)
    torch.testing.assert_close(merged.sample_actions(merged.encode(obs), noise), trained, rtol=1e-4, atol=1e-5)
    copied = common.merged_copy(policy)
    torch.testing.assert_close(copied.sample_actions(copied.encode(obs), noise), trained, rtol=1e-4, atol=1e-5)
    assert copied.state_dict().keys() == tiny_policy().state_dict().keys()
    assert not torch.allclose(tiny_policy().sample_actions(merged.encode(obs), noise), trained, atol=1e-3)


@pytest.mark.parametrize("mine, given", [(1, 2), (2, 1)])
def test_an_adapter_of_another_depth_is_refused(mine, given, tmp_path):
    """peft warns of layers that an adapter lacks, and passes over those that it has too many."""

    def deep(depth: int):
        towers = {name: MODEL[name] | {"depth": depth} for name in ("vlm", "expert")}
        return backbones.build("pi05", MODEL | towers, INSTRUCTIONS)

    policy = deep(given)
    common.attach_adapter(policy, "lora", 4, 8, policy.adapter_targets, seed=1).save_pretrained(str(tmp_path))
    common.load_adapter(deep(given), tmp_path)
    with pytest.raises(common.UserError, match=r"holds an adapter of another policy: only one of the two has .*layers\.1"):
        common.load_adapter(deep(mine), tmp_path)


@pytest.mark.parametrize("surrogate", ["paper", "elbo", "exact"])
def test_betas_pairs_are_scored_a_batch_at_a_time(surrogate, monkeypatch):
    """As many as a training step scores, with the draws that each pair has among all: the same beta."""
    policy, pairs, seen = tiny_policy(), random_pairs(10), []
    common.attach_adapter(policy, "lora", 4, 8, policy.adapter_targets, seed=1)
    score = dpo.score
    monkeypatch.setattr(dpo, "score", lambda p, obs, chosen, *rest: (seen.append(len(chosen)), score(p, obs, chosen, *rest))[1])
    betas = [dpo.auto_beta(policy, pairs, dpo.Config(surrogate=surrogate, batch_size=size, ode_steps=2)) for size in (4, 10)]
    assert seen == [4, 4, 2, 10] and abs(betas[0] / betas[1] - 1) < 1e-4, (seen, betas)


def test_dropout_left_on_while_acting_changes_what_is_done(tmp_path):
    policy, pairs = tiny_policy(), random_pairs(4)
    adapted = common.attach_adapter(policy, "lora", 4, 8, policy.adapter_targets, seed=1)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.add_(0.05 * torch.randn(p.shape, generator=common.stream(0, name)))
    adapted.save_pretrained(str(tmp_path))
    obs, noise = dpo.batch_of(pairs, torch.arange(4))[0], policy.noise(4, common.stream(0, "noise"))

    def chunk(dropout: float, seed: int) -> torch.Tensor:
        acting = common.load_adapter(tiny_policy(), tmp_path, dropout)
        torch.manual_seed(seed)
        return acting.sample_actions(acting.encode(obs), noise)

    torch.testing.assert_close(chunk(1e-9, 0), chunk(0.0, 0), rtol=1e-4, atol=1e-5)  # nothing is dropped: as merged
    assert torch.equal(chunk(0.05, 1), chunk(0.05, 1)) and not torch.allclose(chunk(0.05, 1), chunk(0.05, 2), atol=1e-4)
    assert torch.equal(chunk(0.0, 1), chunk(0.0, 2))


def test_only_the_tried_chunks_have_another_noise_scale(monkeypatch):
    """Recipe `branch` for a greedy policy: the failed episode and all later decisions are greedy."""
    from types import SimpleNamespace

    scales, obs = [], {"agentview": 0, "wrist": 0, "state": 0, "instruction": "i"}
    env = SimpleNamespace(suite="s", task_id=0, success=False, reset=lambda init: None, restore=lambda state: None)

    def play(env, policy, cfg, source, k=0, chunk=None):
        scales.append(("play", cfg.noise_scale))
        env.success = chunk is not None
        values = np.zeros((10, 7)) if chunk is None else np.asarray(chunk)
        return [prefs.Decision(i, None, obs, values, values, 8) for i in range(k, 3)]

    def propose(policy, obs, cfg, generators):
        scales.append(("try", cfg.noise_scale))
        return torch.ones(len(generators), 10, 7)

    monkeypatch.setattr(prefs, "play", play)
    monkeypatch.setattr(common, "propose", propose)
    cfg = prefs.Config(noise_scale=0.0, branch_scale=0.5, branches=2, tries=2)
    pairs, playouts, _ = prefs.branch_pairs(env, None, cfg, 20, 0)
    assert playouts == 3 and len(pairs) == 2 and set(scales) == {("play", 0.0), ("try", 0.5)}


def test_whole_episodes_are_scored_under_the_first_observation(monkeypatch):
    """Recipe `whole`: as many pairs as both episodes have chunks, all with the first observation; `episode` is its first pair."""
    from types import SimpleNamespace

    env = SimpleNamespace(suite="s", task_id=0, success=False, reset=lambda init: None)

    def play(env, policy, cfg, source, sigma):
        env.success = sigma == 0.0
        value = 0.1 if env.success else 0.2
        obs = [{"agentview": k, "wrist": k, "state": k, "instruction": "i"} for k in range(5 if env.success else 3)]
        chunks = [np.full((10, 7), value + k) for k in range(len(obs))]
        return [prefs.Decision(k, None, o, c, c, 8) for k, (o, c) in enumerate(zip(obs, chunks, strict=True))]

    monkeypatch.setattr(prefs, "play", play)
    made = {}
    for recipe in ("whole", "episode"):
        cfg = prefs.Config(pairs=recipe, candidates=2, noise_low=0.0, noise_high=0.4)
        made[recipe], playouts, _ = prefs.RECIPES[recipe](env, None, cfg, 20, 0)
        assert playouts == 2
    assert len(made["whole"]) == 3 and len(made["episode"]) == 1
    for k, (tensors, facts) in enumerate(made["whole"]):
        assert tensors["agentview"] == 0 and tensors["chosen"][0, 0] == 0.1 + k and tensors["rejected"][0, 0] == 0.2 + k
        assert facts["decision"] == k
    assert np.array_equal(made["episode"][0][0]["chosen"], made["whole"][0][0]["chosen"])


# -------------------------------------------------------------------------------------------------------------------- 04
def episodes(successes, task=0, crash=""):
    return [
        {"suite": "s", "task": task, "init_state": 40 + i, "seed": 1, "success": bool(x), "crash": crash, "steps": 100}
        for i, x in enumerate(successes)
    ]


def test_a_crash_is_neither_success_nor_failure():
    rows = episodes([1, 1, 0]) + episodes([0], task=1, crash="Diverged")
    summary = evaluation.episodes.summarise(rows)
    assert (summary["n"], summary["successes"], summary["crashes"]) == (3, 2, 1)
    assert summary["ci95"] == evaluation.episodes.stats.wilson(2, 3) and summary["tasks"] == {"s/0": [2, 3]}


def test_pairing_uses_the_same_episodes_only():
    rows, base = episodes([1, 1, 0, 1]), episodes([0, 1, 1])
    result = evaluation.episodes.paired(rows, base)
    assert (result["paired_n"], result["gained"], result["lost"]) == (3, 1, 1) and result["diff_vs_sft"] == 0
    other_seed = [row | {"seed": 2} for row in base]
    assert evaluation.episodes.paired(rows, other_seed)["paired_n"] == 0
