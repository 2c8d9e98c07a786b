"""Pictures of what happens inside, from the small policies in checkpoints/try: docs/tour.md, in two minutes.

    python extras/tour.py

reads   checkpoints/try/pi05/: the policy that DPO starts from, 20 pairs, a trained LoRA adapter
writes  docs/tour.md, docs/tour/: four PNGs and a GIF
"""

import importlib
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # also without -m

import torch

import backbones
import common
from report.plots import COLOURS, canvas, save
from runtime import HERE, disk, stage
from runtime.config import load_config

dpo, evaluation = importlib.import_module("03_dpo"), importlib.import_module("04_eval")

TRY, OUT = HERE / "checkpoints" / "try" / "pi05", HERE / "docs" / "tour"
PAIR = 3  # the pair that most pictures show
TIMES = [i / 20 for i in range(1, 20)]


def sees(pairs: dict) -> str:
    figure, axes = canvas(7, 2.1, 1, 4)
    for i, number in enumerate((PAIR, PAIR + 8)):
        for j, camera in enumerate(common.CAMERAS):
            axes[2 * i + j].imshow(pairs[camera][number])
            axes[2 * i + j].set(xticks=[], yticks=[], title=f"pair {number}, {camera}")
    save(figure, OUT / "sees.png")
    return (
        f'Two cameras of 64 pixels, the arm\'s state and a sentence: "{pairs["instruction"][PAIR]}". From this'
        " the policy proposes its next ten actions, a *chunk*. The pictures belong to two of the twenty pairs."
    )


@torch.no_grad()
def becomes(policy, pairs: dict) -> str:
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
    return (
        "Twelve chunks for one observation, drawn as the path of the hand (sums of the proposed moves, seen from"
        " above). At t = 1 they are noise. Ten Euler steps along the velocity v make them actions; where the"
        " policy is unsure, the paths still fan out at t = 0."
    )


@torch.no_grad()
def errors(policy, pairs: dict) -> str:
    n, draws = len(pairs["mask"]), 16
    prefix = policy.encode(pairs["obs"])
    means = {"chosen": [], "rejected": []}
    for t in TIMES:
        shared = policy.draws(n, draws, common.stream(0, "tour errors", str(t)), "stratified")
        shared.t = torch.full_like(shared.t, t)
        for name, values in means.items():
            values.append(-policy.log_prob(prefix, pairs[name], shared, pairs["mask"]).mean().item())
    figure, ax = canvas(5, 2.5)
    for (name, values), colour in zip(means.items(), ("lora", "dora"), strict=True):
        ax.plot(TIMES, values, color=COLOURS[colour], label=name)
    ax.set(xlabel="t (0 is the action, 1 is noise)", ylabel="squared velocity error")
    ax.legend()
    save(figure, OUT / "error.png")
    return (
        f"The surrogate for log p is minus this error, averaged over t. The mean over {n} pairs and {draws} noises"
        " each. Near t = 1 both chunks have drowned in noise. What tells them apart stands at small t."
    )


def margins(pairs: dict) -> str:
    figure, ax = canvas(5, 2.5)
    for kind, colour in zip(("dpo", "ipo", "hinge"), ("lora", "dora", "other"), strict=True):
        policy = backbones.load_policy(TRY / "sft").eval()
        common.attach_adapter(policy, "lora", 32, 64, policy.adapter_targets, 0)
        weights = [p for p in policy.parameters() if p.requires_grad]
        optimizer, seen = torch.optim.AdamW(weights, lr=1.5e-4), []
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
    return (
        f"The margin of pair {PAIR} while eight pairs are trained on: beta times how much likelier the chosen chunk"
        " has become than the rejected one, against the reference. Before the first step it is exactly 0, because"
        " the policy is the reference. All three losses raise it; they differ in when they stop."
    )


def episode() -> str:
    cfg = load_config(evaluation.Config, ["configs/try.yaml", "policy=dpo"])
    policy, frames = evaluation.load_policy(cfg), []
    with evaluation.contextlib.closing(evaluation.TaskEnv("libero_object", 0, 64, "fast")) as env:
        row = evaluation.play(env, policy, cfg, 40, frames)
    (OUT / "episode.gif").unlink(missing_ok=True)
    evaluation.save_gif(OUT / "episode.gif", frames)
    outcome = "solves" if row["success"] else "does not solve"
    return (
        f"The policy after DPO, on held-out init state 40 of task 0. It looks {len(frames)} times, eight actions"
        f" apart, and {outcome} the task in {row['steps']} steps."
    )


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    policy = backbones.load_policy(TRY / "sft").eval()
    pairs = dpo.load_pairs(dpo.Config(pairs_from=str(TRY / "prefs")), policy)[0]
    parts = [
        ("What the policy sees", sees(pairs), "sees.png"),
        ("Noise becomes action", becomes(policy, pairs), "chunk.png"),
        ("The surrogate's error by t", errors(policy, pairs), "error.png"),
        ("One pair, ten steps, three losses", margins(pairs), "margin.png"),
        ("An episode", episode(), "episode.gif"),
    ]
    text = "# A tour to look at\n\n`python extras/tour.py` draws this page from the small policies in checkpoints/try.\n"
    for title, words, picture in parts:
        text += f"\n## {title}\n\n{words}\n\n![{title}](tour/{picture})\n"
    disk.write_atomic(HERE / "docs" / "tour.md", text)


if __name__ == "__main__":
    stage.command_line(main)
