"""Losses beside DPO, and GRPO: closed forms, gradients where policy = reference, limits, and the stages.

pytest tests/test_neighbours.py
"""

import importlib
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import run_stage
from test_extras import INSTRUCTION, make_policy

import backbones
import common
from extras import grpo, losses
from runtime import HERE, UserError, disk
from runtime.config import load_config

dpo = importlib.import_module("03_dpo")
TRY = HERE / "checkpoints" / "try" / "pi05"


def terms(seed: int = 0, n: int = 6) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=g, dtype=torch.float64).requires_grad_() for _ in range(4)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ----------------------------------------------------------------------------------------- losses of a margin
def test_losses_of_the_margin_in_closed_form():
    pi_w, pi_l, ref_w, ref_l = terms()
    margins = [0.7 * x for x in ((pi_w - ref_w) - (pi_l - ref_l)).tolist()]
    expected = {
        "dpo": np.mean([-math.log(sigmoid(m)) for m in margins]),
        "ipo": np.mean([0.7**2 * (m / 0.7 - 1 / (2 * 0.7)) ** 2 for m in margins]),  # Eq. 17, times beta^2
        "hinge": np.mean([max(0.0, 1 - m) for m in margins]),
    }
    for name, value in expected.items():
        assert dpo.dpo_loss(pi_w, pi_l, ref_w, ref_l, 0.7, name)[0].item() == pytest.approx(value, rel=1e-12)


def test_all_losses_of_the_margin_push_apart_where_policy_is_reference():
    for name, slope in {"dpo": -1 / 2, "ipo": -1, "hinge": -1}.items():
        pi_w, pi_l, *_ = terms()
        dpo.dpo_loss(pi_w, pi_l, pi_w.detach(), pi_l.detach(), 0.7, name)[0].backward()
        assert torch.allclose(pi_w.grad, torch.full_like(pi_w, 0.7 * slope / 6)), name
        assert torch.equal(pi_l.grad, -pi_w.grad), name


def test_ipo_and_hinge_stop_where_dpo_does_not():
    far = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(4, dtype=torch.float64)
    dpo.dpo_loss(far, zero, zero, zero, 1.0, "ipo")[0].backward()
    assert far.grad.abs().max() == 0  # its target is a margin of 1 / 2
    assert dpo.dpo_loss(2 * far, zero, zero, zero, 1.0, "hinge")[0] == 0
    assert dpo.dpo_loss(far, zero, zero, zero, 1.0, "dpo")[0] > 0


# ------------------------------------------------------------------------------------------- the other losses
def test_proximal_is_dpo_with_a_brake_on_both_rewards():
    pi_w, pi_l, ref_w, ref_l = terms()
    value = losses.proximal(pi_w, pi_l, ref_w, ref_l, 0.7)
    plain = dpo.dpo_loss(pi_w, pi_l, ref_w, ref_l, 0.7)[0]
    squares = sum(((0.7 * (p - r)) ** 2).mean() for p, r in ((pi_w, ref_w), (pi_l, ref_l)))
    assert value.item() == pytest.approx((plain + 0.1 * squares).item(), rel=1e-12)
    # at the reference it has DPO's gradient; both rewards falling alike is free for DPO only
    grads = []
    for loss in (losses.proximal, lambda *x: dpo.dpo_loss(*x)[0]):
        pi_w, pi_l, *_ = terms()
        loss(pi_w, pi_l, pi_w.detach(), pi_l.detach(), 0.7).backward()
        grads.append(pi_w.grad)
    assert torch.allclose(*grads)
    fallen = losses.proximal(pi_w - 3, pi_l - 3, pi_w, pi_l, 1.0)
    assert fallen > losses.proximal(pi_w, pi_l, pi_w, pi_l, 1.0)


def test_simpo_in_closed_form_and_its_limit(monkeypatch):
    pi_w, pi_l, *_ = terms()
    numbers = torch.tensor([56, 56, 28, 14, 56, 7])
    expected = np.mean(
        [
            -math.log(sigmoid(0.7 * numbers.double().mean().item() * (w - y) / n - 0.5))
            for w, y, n in zip(pi_w.tolist(), pi_l.tolist(), numbers.tolist(), strict=True)
        ]
    )
    assert losses.simpo(pi_w, pi_l, numbers.double(), 0.7).item() == pytest.approx(expected, rel=1e-7)
    # chunks of one length and no target: DPO against a reference that finds all chunks alike
    alike = torch.zeros(6, dtype=torch.float64)
    monkeypatch.setattr(losses, "TARGET", 0.0)
    same = losses.simpo(pi_w, pi_l, torch.full((6,), 56.0, dtype=torch.float64), 0.7)
    assert same.item() == pytest.approx(dpo.dpo_loss(pi_w, pi_l, alike, alike, 0.7)[0].item(), rel=1e-12)


def test_kto_in_closed_form():
    ratio, other, *_ = terms()
    won = torch.tensor([True, True, True, True, False, False])
    z = max(0.0, other.mean().item())
    good = np.mean([1 - sigmoid(0.7 * (r - z)) for r in ratio.tolist()[:4]])
    bad = np.mean([1 - sigmoid(0.7 * (z - r)) for r in ratio.tolist()[4:]])
    value = losses.kto(ratio, other, won, 0.7)
    assert value.item() == pytest.approx((good + bad) / 2, rel=1e-7)
    value.backward()
    assert (ratio.grad[:4] < 0).all() and (ratio.grad[4:] > 0).all()
    assert other.grad is None or other.grad.abs().max() == 0
    assert losses.kto(ratio, other, torch.ones(6, dtype=torch.bool), 0.7).isfinite()


@pytest.fixture
def adapted():
    policy = make_policy()
    common.attach_adapter(policy, "lora", 4, 8, policy.adapter_targets, 0)
    return policy


def flow_batch(policy, n: int = 3) -> tuple:
    g = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (2, n, 32, 32, 3), dtype=torch.uint8, generator=g)
    obs = {"agentview": images[0], "wrist": images[1], "state": torch.zeros(n, 8)}
    obs["instruction"] = [INSTRUCTION] * n
    chunk, mask = torch.randn(n, 10, 7, generator=g), torch.arange(10).expand(n, 10) < 6
    return obs, chunk, policy.draws(n, 4, g, "stratified"), mask


def test_nft_at_the_reference_is_log_two_and_its_gradient_that_of_filtered_errors(adapted):
    obs, chunk, draws, mask = flow_batch(adapted)
    won = torch.tensor([True, True, False])
    error, mirrored = losses.flow_errors(adapted, obs, chunk, draws, mask)
    torch.testing.assert_close(error, mirrored)  # v = v_ref is its own mirror image
    torch.testing.assert_close(error, -adapted.log_prob(adapted.encode(obs), chunk, draws, mask))
    loss = losses.nft(error, mirrored, won, 0.3)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)
    weights = [p for p in adapted.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    # E - E' = 4 (v - v_ref)(v_ref - u), whose gradient at the reference is twice that of E
    error = -adapted.log_prob(adapted.encode(obs), chunk, draws, mask)
    plain = 0.3 / 2 * (error[won].mean() - error[~won].mean()) / 2
    for one, other in zip(grads, torch.autograd.grad(plain, weights, allow_unused=True), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)


def test_mirrored_errors_by_hand(adapted):
    obs, chunk, draws, mask = flow_batch(adapted)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        error, mirrored = losses.flow_errors(adapted, obs, chunk, draws, mask)
        i = 1
        one = common.select(obs, torch.tensor([i]))
        prefix = adapted.encode(one)
        with adapted.reference():
            before = adapted.encode(one)
        expected = []
        for t, eps in zip(draws.t[:, i], draws.eps[:, i], strict=True):
            x_t, u = t * eps + (1 - t) * chunk[i], eps - chunk[i]
            v = adapted.velocity(prefix, x_t[None], t[None])[0]
            with adapted.reference():
                v_ref = adapted.velocity(before, x_t[None], t[None])[0]
            expected.append([((w - u)[mask[i]] ** 2).sum() for w in (v, 2 * v_ref - v)])
    expected = torch.tensor(expected).mean(0)
    assert abs(expected[0] - expected[1]) > 1e-3
    torch.testing.assert_close(torch.stack([error[i], mirrored[i]]), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- GRPO
def test_advantages_of_groups():
    returns = torch.tensor(
        [[1.0, 0, 0, 0, 0, 0, 0, 1], [1.0] * 8, [0.0] * 8, [torch.nan] + [1.0, 0] * 3 + [0]]
    )
    found = grpo.advantages(returns)
    assert found[1:].isnan().all()  # nothing to learn from, or a crash
    row = returns[0].double().numpy()
    np.testing.assert_allclose(found[0], (row - row.mean()) / row.std(ddof=1), rtol=1e-5)
    assert found[0].sum().abs() < 1e-5
    almost = torch.tensor([[1.0] * 7 + [0.0]])  # 0.875 is kept
    assert grpo.advantages(almost).isfinite().all()


def test_clipped_loss():
    """By cases: what the clip leaves of the gradient."""
    for ratio, advantage, moves in (
        (1.0, 1.0, True),
        (1.0, -1.0, True),
        (1.3, 1.0, False),  # likelier already
        (1.27, 1.0, True),
        (0.79, -1.0, False),  # unlikelier already
        (0.5, 1.0, True),  # wrong direction: never clipped
        (1.5, -1.0, True),
    ):
        log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
        loss = grpo.clipped_loss(log_ratio, torch.tensor([advantage]))
        loss.backward()
        assert (log_ratio.grad.item() != 0) == moves, (ratio, advantage)
        if moves:
            assert loss.item() == pytest.approx(-ratio * advantage, rel=1e-5)


def test_rounds_go_through_the_init_states_of_pairs_only():
    cfg = grpo.Config(groups=7, tasks=[0, 3])
    rounds = [grpo.groups_of(cfg, Path("x"), number) for number in range(6)]
    places = [(group.task, group.init) for each in rounds for group in each]
    assert len(set(places[:30])) == 30 and {init for _, init in places} == set(common.INIT_GROUPS["prefs"])
    assert places[30:] == places[:12]
    with pytest.raises(UserError, match="there are 30 init states"):
        grpo.Config(groups=31, tasks=[0, 3], checkpoint=str(TRY / "sft")).inputs()
    with pytest.raises(UserError, match="without noise"):
        grpo.Config(groups=1, noise_scale=0, checkpoint=str(TRY / "sft")).inputs()


def fake_play(group) -> None:
    """Files as play_group writes them; chunk and outcome are functions of the adapter's bytes and place."""
    if group.file.is_file():
        return
    adapter = (group.folder / "adapter" / "adapter_model.safetensors").read_bytes()
    g = torch.Generator().manual_seed(sum(adapter) + group.init)
    n = 16
    images = torch.randint(0, 256, (2, n, 64, 64, 3), dtype=torch.uint8, generator=g)
    tensors = {"agentview": images[0], "wrist": images[1], "state": torch.zeros(n, 8)}
    tensors |= {"chunk": torch.rand(n, 10, 7, generator=g), "mask": torch.ones(n, 10, dtype=torch.bool)}
    tensors |= {"episode": torch.arange(n) // 2, "returns": (torch.arange(8) % 2).float()}
    disk.save_tensors(group.file, tensors)


def train(root: Path, monkeypatch, play=fake_play, *argv: str) -> Path:
    monkeypatch.setattr(grpo, "play_group", play)
    here = ("workers=1", f"root={root}", "name=x", "grpo.groups=2", "grpo.steps=3", "grpo.batch_size=8")
    run_stage("extras.grpo", "configs/try.yaml", *here, *argv)
    return root / "x/pi05/seed42/grpo/lora"


def test_grpo_killed_and_resumed_equals_never_killed(tmp_path, monkeypatch):
    whole = train(tmp_path / "a", monkeypatch)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[0]["kept"] == 1 and rows[0]["chunks"] == 32
    assert not list(whole.glob("round-*"))
    plays = []

    def killed(group):
        plays.append(group)
        if len(plays) == 4:
            raise KeyboardInterrupt
        fake_play(group)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", monkeypatch, killed)
    again = train(tmp_path / "b", monkeypatch)
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()
    moved = [v for k, v in disk.load_tensors(whole / "adapter_model.safetensors").items() if "lora_B" in k]
    assert max(v.abs().max() for v in moved) > 0


def test_a_group_of_crashes_alone_is_written_and_dropped(tmp_path, monkeypatch):
    class Crashing:
        max_steps = 280

        def __init__(self, *_):
            pass

        def reset(self, init):
            raise grpo.CRASHES[0]("diverged")

        def close(self):
            pass

    monkeypatch.setattr(grpo, "TaskEnv", Crashing)
    monkeypatch.setattr(common, "load_adapter", lambda policy, folder: policy)
    group = grpo.groups_of(grpo.Config(groups=1, checkpoint=str(TRY / "sft")), tmp_path, 0)[0]
    grpo.play_group(group)
    chunks, returns = grpo.chunks_of([group])
    assert chunks == {} and returns.isnan().all()


def test_grpo_scores_what_the_policy_saw_and_plays_no_longer_than_02(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_adapter", lambda policy, folder: policy)
    monkeypatch.setattr(grpo, "GROUP", 1)
    cfg = grpo.Config(groups=1, tasks=[0], max_steps=16, blank_images=True, checkpoint=str(TRY / "sft"))
    group = grpo.groups_of(cfg, tmp_path, 0)[0]
    grpo.play_group(group)
    played = disk.load_tensors(group.file)
    assert len(played["chunk"]) == 2, "two looks of eight steps"
    assert all(played[camera].max() == 0 for camera in common.CAMERAS) and played["state"].abs().max() > 0


def test_grpo_where_no_group_can_teach_anything(tmp_path, monkeypatch):
    def always(group):
        fake_play(group)
        disk.save_tensors(group.file, disk.load_tensors(group.file) | {"returns": torch.ones(8)})

    folder = train(tmp_path, monkeypatch, always, "grpo.steps=1")
    row = json.loads((folder / "metrics.jsonl").read_text())
    assert row["kept"] == 0 and row["chunks"] == 0 and row["success"] == 1


# ------------------------------------------------------------------------------------------------ the script
@pytest.fixture
def tried(tmp_path):
    """Pairs of checkpoints/try, with play-outs beside them."""
    folder = tmp_path / "prefs"
    shutil.copytree(TRY / "prefs", folder)
    pairs = disk.load_tensors(folder / "pairs.safetensors")
    rows = disk.read_jsonl(folder / "pairs.jsonl")
    tensors = {key: pairs[key] for key in ("agentview", "wrist", "state", "mask")} | {
        "chunk": pairs["chosen"]
    }
    disk.save_tensors(folder / "tried.safetensors", tensors)
    disk.write_rows(folder / "tried.jsonl", [row | {"success": i % 3 > 0} for i, row in enumerate(rows)])
    return folder


@pytest.mark.parametrize("loss", ["proximal", "simpo", "kto", "nft"])
def test_each_loss_trains_an_adapter_that_04_can_load(loss, tried, tmp_path):
    argv = ("configs/try.yaml", f"pairs_from={tried}", f"root={tmp_path}", "name=x", f"dpo.loss={loss}")
    run_stage("extras.losses", *argv, "dpo.steps=2", "dpo.batch_size=4", "dpo.sft_coef=0")  # the loss alone
    folder = tmp_path / f"x/pi05/seed42/losses-{loss}/lora"
    rows = disk.read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["log_ratio"] == 0
    first = {"proximal": math.log(2), "kto": 0.5, "nft": math.log(2)}.get(loss)  # policy = reference
    assert first is None or rows[0]["loss"] == pytest.approx(first, abs=1e-6)
    policy = backbones.load_policy(TRY / "sft")
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    after = common.load_adapter(policy, folder).state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_play_outs_of_attempts_whose_pairs_are_held_out_are_not_trained_on(tried):
    policy = backbones.load_policy(TRY / "sft")
    cfg = load_config(
        losses.Config, ["configs/try.yaml", f"pairs_from={tried}", "dpo.loss=kto", "held_out=2"]
    )
    kept, every = losses.load_tried(cfg, policy), losses.load_tried(replace(cfg, held_out=0), policy)
    attempt = common.read_pairs(tried, policy)["attempt"]  # here each play-out stands for a pair
    assert len(every["won"]) == len(attempt) and 0 < len(kept["won"]) < len(attempt)
    rows = (attempt % 2 == 1).nonzero()[:, 0]
    for key in ("chosen", "mask", "won"):
        assert torch.equal(kept[key], every[key][rows])
    assert torch.equal(kept["obs"]["state"], every["obs"]["state"][rows])
    assert kept["obs"]["instruction"] == [every["obs"]["instruction"][i] for i in rows]


def test_unpaired_losses_see_what_the_policy_saw_and_compare_with_other_observations(tried):
    policy = backbones.load_policy(TRY / "sft")
    cfg = load_config(losses.Config, ["configs/try.yaml", f"pairs_from={tried}", "dpo.loss=kto"])
    made, rows = losses.load_tried(cfg, policy), disk.read_jsonl(tried / "pairs.jsonl")
    source = [next(j for j, c in enumerate(made["chosen"]) if torch.equal(c, r)) for r in made["rejected"]]
    where = [(row["task"], row["unit"]) for row in rows]  # 02 writes the tries of one decision side by side
    assert all(where[i] != where[j] for i, j in enumerate(source))
    assert made["obs"]["agentview"].max() > 0
    black = losses.load_tried(replace(cfg, blank_images=True), policy)["obs"]
    assert all(black[camera].max() == 0 for camera in common.CAMERAS)


def test_bad_input_of_the_losses(tried, tmp_path):
    argv = ["configs/try.yaml", f"root={tmp_path}", "name=x"]
    with pytest.raises(UserError, match="unknown loss"):
        load_config(losses.Config, [*argv, "dpo.loss=orpo"])
    with pytest.raises(UserError, match="compares velocities"):
        load_config(losses.Config, [*argv, "dpo.loss=nft", "backbone=openvla"])
    with pytest.raises(UserError, match="without weights"):
        load_config(losses.Config, [*argv, "dpo.loss=nft", "surrogate=elbo"])
    with pytest.raises(UserError, match="leave surrogate="):
        load_config(grpo.Config, [*argv, "surrogate=elbo"]).inputs()
    with pytest.raises(UserError, match="shares draws"):
        load_config(losses.Config, [*argv, "surrogate=independent"])
    with pytest.raises(UserError, match=r"tried\.safetensors is not there"):
        run_stage("extras.losses", *argv, "dpo.loss=kto")
    lines = [row | {"success": True} for row in disk.read_jsonl(tried / "tried.jsonl")]
    disk.write_rows(tried / "tried.jsonl", lines)
    with pytest.raises(UserError, match="successes only"):
        run_stage("extras.losses", *argv, "dpo.loss=kto", f"pairs_from={tried}")


def test_an_identity_counts_the_stage_that_a_script_imports_by_name():
    from runtime.stage import code_of

    names = {path.name for path in code_of(HERE / "extras" / "grpo.py", grpo.Config())}
    assert {"02_collect_prefs.py", "common.py", "env.py"} <= names


# -------------------------------------------------------------------------------------------------- the tour
def test_the_tour_draws_what_its_page_shows(tmp_path, monkeypatch):
    tour = importlib.import_module("extras.tour")
    monkeypatch.setattr(tour, "OUT", tmp_path)
    policy = backbones.load_policy(TRY / "sft").eval()
    pairs = tour.dpo.load_pairs(tour.dpo.Config(pairs_from=str(TRY / "prefs")), policy)[0]
    tour.sees(pairs)
    tour.becomes(policy, pairs)
    tour.errors(policy, common.load_adapter(backbones.load_policy(TRY / "sft"), TRY / "lora"), pairs)
    tour.margins(pairs)
    drawn = {path.name for path in tmp_path.iterdir()} | {"episode.gif"}
    page = (HERE / "docs" / "tour.md").read_text(encoding="utf-8")
    assert (
        drawn == set(re.findall(r"\(tour/(.*?)\)", page)) == {p.name for p in (HERE / "docs/tour").iterdir()}
    )
    looks, steps = map(int, re.search(r"looks (\d+) times.* needs (\d+) steps", page).groups())
    assert (looks - 1) * 8 < steps <= looks * 8 and "{" not in page


def test_play_outs_that_do_not_go_with_their_lines_are_refused(tried, tmp_path):
    lines = disk.read_jsonl(tried / "tried.jsonl")
    disk.write_rows(tried / "tried.jsonl", lines[1:])
    argv = ["configs/try.yaml", f"root={tmp_path}", f"pairs_from={tried}", "dpo.loss=kto"]
    with pytest.raises(UserError, match="differ in length"):
        run_stage("extras.losses", *argv)
