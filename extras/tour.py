"""Pictures of what happens inside, from the small policies in checkpoints/try: docs/tour.md, in two minutes.

    python -m extras.tour

reads   extras/tour_page.md, the text; checkpoints/try/pi05/: the policy that DPO starts from, 20 pairs, and a
        LoRA adapter that was trained on them and 95 others
writes  docs/tour.md, docs/tour/: four PNGs and a GIF
"""

import importlib
import sys
from pathlib import Path

import torch

import backbones
import common
from report.plots import COLOURS, canvas, save
from runtime import HERE, disk, load_config, refuse, stage

dpo, evaluation = importlib.import_module("03_dpo"), importlib.import_module("04_eval")

TRY, OUT = HERE / "checkpoints" / "try" / "pi05", HERE / "docs" / "tour"
PAIR = 3  # the pair that most pictures show
TIMES = [i / 20 for i in range(1, 20)]


def sees(pairs: dict) -> None:
    figure, axes = canvas(7, 2.1, 1, 4)
    for i, number in enumerate((PAIR, PAIR + 8)):
        for j, camera in enumerate(common.CAMERAS):
            axes[2 * i + j].imshow(pairs["obs"][camera][number])
            axes[2 * i + j].set(xticks=[], yticks=[], title=f"pair {number}, {camera}")
    save(figure, OUT / "sees.png")


@torch.no_grad()
def becomes(policy, pairs: dict) -> None:
    obs, steps = common.select(pairs["obs"], torch.tensor([PAIR])), 10
    prefix = policy.encode(obs).select(torch.zeros(12, dtype=torch.long))
    x = policy.noise(12, common.stream(0, "tour"))
    figure, axes = canvas(7, 2.3, 1, 4, sharex=True, sharey=True)
    for step in range(steps + 1):
        if step in (0, 5, 8, steps):
            way = policy.unnormalise(x).cumsum(1)
            ax = axes[(0, 5, 8, steps).index(step)]
            ax.plot(way[:, :, 0].T, way[:, :, 1].T, color=COLOURS["lora"], alpha=0.6, linewidth=1)
            ax.set(title=f"t = {1 - step / steps:.1f}", xlabel="x")
        if step < steps:
            x = x - policy.velocity(prefix, x, torch.tensor([1 - step / steps])) / steps
    axes[0].set_ylabel("y")
    save(figure, OUT / "chunk.png")


@torch.no_grad()
def errors(policy, after, pairs: dict) -> None:
    n, draws, chunks = len(pairs["mask"]), 32, ("chosen", "rejected")
    found = {"before DPO": policy, "after DPO": after}
    for name, each in found.items():
        prefix, rows = each.encode(pairs["obs"]), []
        for t in TIMES:
            shared = each.draws(n, draws, common.stream(0, "tour errors", str(t)), "stratified")
            shared.t = torch.full_like(shared.t, t)
            scores = [each.log_prob(prefix, pairs[chunk], shared, pairs["mask"]) for chunk in chunks]
            rows.append([-score.mean().item() for score in scores])
        found[name] = torch.tensor(rows).T  # (2, times)
    figure, axes = canvas(7, 2.4, 1, 2)
    for chunk, values, colour in zip(chunks, found["before DPO"], ("lora", "dora"), strict=True):
        axes[0].plot(TIMES, values, color=COLOURS[colour], label=chunk)
    for (name, values), colour in zip(found.items(), ("sft", "other"), strict=True):
        axes[1].plot(TIMES, values[1] - values[0], color=COLOURS[colour], label=name)
    axes[0].set(xlabel="t", title="squared velocity error, before DPO")
    axes[1].set(xlabel="t", title="rejected minus chosen")
    for ax in axes:
        ax.legend()
    save(figure, OUT / "error.png")


def margins(pairs: dict) -> None:
    figure, ax = canvas(5, 2.5)
    for kind, colour in zip(("dpo", "ipo", "hinge"), ("lora", "dora", "other"), strict=True):
        policy = backbones.load_policy(TRY / "sft").eval()
        common.attach_adapter(policy, "lora", 32, 64, policy.adapter_targets, 0)
        optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1.5e-4)
        seen = []
        batch = dpo.batch_of(pairs, torch.arange(PAIR, PAIR + 8))
        draws = policy.draws(8, 4, common.stream(0, "tour margins"), "stratified")
        with policy.reference():
            ref_w, ref_l = dpo.log_probs(policy, *batch, draws, "velocity")
        beta = 1 / (ref_w - ref_l).std().item()
        for _ in range(11):
            loss, rewards = dpo.dpo_loss(
                *dpo.log_probs(policy, *batch, draws, "velocity"), ref_w, ref_l, beta, kind
            )
            seen.append(rewards["rewards/margins"][0].item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ax.plot(range(11), seen, "o-", color=COLOURS[colour], markersize=3, label=kind)
    ax.set(xlabel="DPO step", ylabel="margin")
    ax.legend()
    save(figure, OUT / "margin.png")


def episode() -> dict:
    cfg = load_config(evaluation.Config, ["configs/try.yaml", "policy=dpo"])
    policy, env = evaluation.load_policy(cfg), evaluation.TaskEnv("libero_object", 0, 64, "fast")
    for init in common.init_states("test"):
        frames = []
        row = evaluation.play(env, policy, cfg, init, frames)
        if row["success"]:
            break
    else:
        refuse(
            True, "the policy solves no held-out init state here; check the simulator with extras.preflight"
        )
    env.close()
    evaluation.save_gif(OUT / "episode.gif", frames[::2])
    return {"init": init, "looks": len(frames), "steps": row["steps"]}


def main() -> None:
    refuse(sys.argv[1:], "usage: python -m extras.tour, which draws docs/tour.md anew")
    OUT.mkdir(parents=True, exist_ok=True)
    policy = backbones.load_policy(TRY / "sft").eval()
    after = common.load_adapter(backbones.load_policy(TRY / "sft"), TRY / "lora")
    pairs = dpo.load_pairs(dpo.Config(pairs_from=str(TRY / "prefs")), policy)[0]
    sees(pairs)
    becomes(policy, pairs)
    errors(policy, after, pairs)
    margins(pairs)
    page = disk.read_text(Path(__file__).with_name("tour_page.md"))
    page = page.format(pair=PAIR, sentence=pairs["obs"]["instruction"][PAIR], **episode())
    disk.write_atomic(HERE / "docs" / "tour.md", page)


if __name__ == "__main__":
    stage.command_line(main)
