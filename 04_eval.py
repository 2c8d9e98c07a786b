"""04 - Success rates on LIBERO, with intervals and paired tests (the paper's main table).

reads   <run>/<backbone>/seed<k>/sft/ (01) and, for policy=dpo, .../dpo-<adapter>-<pairs>[...]/ (03)
writes  <run>/<backbone>/seed<k>/eval-<policy>[-val]/: episodes.jsonl (a line per episode), summary.json,
        videos/, done.json; and results[-val].{json,md} beside these folders: all evaluations so far in one
        table, paired with the SFT policy
cost    1 to 3 s per episode and core
try     python 04_eval.py configs/try.yaml name=mine policy=dpo adapters_from=    (without it, the kit's own)

An episode is identified by (suite, task, init state, seed). These alone determine the policy's noise at each
look. So two policies are compared on the same episodes, with the same noise, in any order and on any number
of processes.
The `right place` shows whether the policy looks. At an episode's first look it is asked for four more chunks.
One is right if it heads for the object's place in this layout, and not for its place in the other.
Differs from the paper: it uses init states 40-49, on which nothing was trained (the paper: 0-4, from which
its pairs came). README names the three choices that saw results on them. It has Wilson intervals and exact
McNemar tests. A crash of the simulator is counted apart, not as a failure.
Left out: rendering at every step (only when the policy looks), real robots.
"""

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

import backbones
import common
from report import episodes
from report.tables import listing, publish
from runtime import Count, disk, stage
from sim.env import CRASHES, TaskEnv, carry_out, tasks
from sim.expert import target_places


@dataclass
class Config(common.SceneConfig, common.ActingConfig, common.AdapterConfig):
    section: ClassVar = "eval"
    by_torchrun: ClassVar = True
    policy: Literal["sft", "dpo"] = "sft"  # "dpo": the one of `adapter`, `pairs`, `surrogate` and `start`
    group: Literal["test", "val"] = "test"  # init states 40-49, reported; or 35-39, for every choice
    n_init: Count = 10  # init states per task
    videos: int = 0  # episodes per task of which a GIF is kept
    noise_seed: int = 0  # of the policy's noise; 0 = the training seed. Others: more episodes per init state

    @property
    def policy_name(self) -> str:
        """What is evaluated, e.g. sft, sft-at1500, sft-blank, dpo-lora-branch."""
        name = self.made_adapter.name if self.policy == "dpo" else self.variant("sft")
        return (
            name
            + ("-blank" if self.blank_images else "")
            + (f"-noise{self.noise_seed}" if self.noise_seed else "")
        )

    suffix = property(lambda self: "" if self.group == "test" else "-val")
    folder = property(lambda self: self.seed_dir / f"eval-{self.policy_name}{self.suffix}")

    def left_out(self) -> tuple[str, ...]:
        of_dpo = ("adapter", "pairs", "surrogate", "held_out")
        return (*super().left_out(), *(of_dpo if self.policy == "sft" else ()))

    def inputs(self) -> list[Path]:
        common.init_states(self.group, self.n_init)
        tasks(self)
        return [*self.sft_inputs(), *(self.adapter_inputs() if self.policy == "dpo" else [])]


# --------------------------------------------------------------------------------------------------- episodes
def load_policy(cfg: Config):
    policy = backbones.load_sft(cfg)
    return (common.load_adapter(policy, cfg.adapter_dir) if cfg.policy == "dpo" else policy).freeze()


def first_look(env: TaskEnv, policy, cfg: Config, init: int) -> dict:
    """Share of four chunks at the first look that head for the target's place in this layout and not for that
    in the other. Over both layouts, a policy that is blind gets one half. Empty where no target moves.
    """
    places, names = target_places(env, init), ("first look", env.suite, env.task_id, init)
    if np.isnan(places).any():
        return {}
    obs, noises = env.observe(), [common.stream(cfg.noise_seed or cfg.seed, *names, i) for i in range(4)]
    actions = policy.unnormalise(backbones.propose(policy, obs, cfg, noises))[:, : cfg.execute]
    right = backbones.heads_for_first(actions, obs["state"][None, :3], places[None])
    return {"right_place": right.float().mean().item()}


def play(env: TaskEnv, policy, cfg: Config, init: int, frames: list | None) -> dict:
    """One episode from init state `init`. frames: collects what the policy sees."""
    began, looks = time.time(), 0
    episode = {
        "suite": env.suite,
        "task": env.task_id,
        "init_state": init,
        "seed": cfg.noise_seed or cfg.seed,
    }
    try:
        env.reset(init)
        episode |= first_look(env, policy, cfg, init)
        while not env.success and env.steps < env.max_steps:
            obs = env.observe()
            if frames is not None:
                frames.append(np.concatenate([obs["agentview"], obs["wrist"]], axis=1))
            noise = common.stream(episode["seed"], "eval", env.suite, env.task_id, init, looks)
            chunk = backbones.propose(policy, obs, cfg, [noise])[0]  # (H, D) normalised
            carry_out(env, np.asarray(policy.unnormalise(chunk))[: cfg.execute])
            looks += 1
    except CRASHES as error:  # the simulator diverged: neither success nor failure of the policy
        return episode | {"success": False, "steps": env.steps, "crash": type(error).__name__, "wall_s": 0.0}
    wall = round(time.time() - began, 2)
    return episode | {"success": bool(env.success), "steps": env.steps, "crash": "", "wall_s": wall}


def evaluate(job: tuple[Config, Path, str, int, list[int]]) -> None:
    """Worker: play the missing episodes of one task, and append a row of played.jsonl for each."""
    cfg, folder, suite, task, missing = job
    policy, filmed = load_policy(cfg), common.INIT_GROUPS[cfg.group][: cfg.videos]
    with contextlib.closing(TaskEnv(suite, task, cfg.image_size, cfg.render)) as env:
        for init in missing:
            frames = [] if init in filmed else None
            row = play(env, policy, cfg, init, frames)
            if frames:
                outcome = "success" if row["success"] else "failure"
                save_gif(folder / "videos" / f"{suite}-{task:02d}-init{init}-{outcome}.gif", frames)
            disk.append_jsonl(folder / "played.jsonl", row)


def save_gif(path: Path, frames: list) -> None:
    import imageio.v3 as imageio

    path.parent.mkdir(exist_ok=True)
    images = np.stack(frames).repeat(2, axis=1).repeat(2, axis=2)
    disk.write_atomic(path, imageio.imwrite("<bytes>", images, extension=".gif", duration=200, loop=0))


# ----------------------------------------------------------------------------------------------------- tables
# What the rows of a paired comparison must share:
PROTOCOL = ("suites", "group", "start", "denoise_steps", *episodes.PROTOCOL)


def results_table(cfg: Config) -> list[dict]:
    """A row per finished evaluation of this seed and group of init states, paired with its SFT start.

    With several suites, each also gets its own row. Evaluations of weights made anew since are left out.
    """
    of_policy = {each[0]["policy"]: each for each in episodes.finished(cfg.seed_dir, "eval-*", cfg.group)}
    rows = []
    for name in sorted(of_policy, key=lambda name: ("dpo" in name, name)):
        facts, played, timing = of_policy[name]
        used = facts["config"]
        start = replace(  # its SFT start; of a blind SFT policy, the same one seeing
            cfg,
            policy="sft",
            start=used["start"],
            noise_seed=used["noise_seed"],
            blank_images=used["policy"] == "dpo" and used["blank_images"],
        ).policy_name
        row = {
            **{key: used.get(key, "none") for key in ("adapter", "pairs", "surrogate")},  # sft has none
            "backbone": cfg.backbone,
            "policy": used["policy"],
            "name": name,
            "start": used["start"],
            "blank_images": used["blank_images"],
            "group": cfg.group,
            "train_seeds": episodes.train_seeds(facts),
            "noise_seed": used["noise_seed"] or used["seed"],
            "command": timing["command"],
            "commit": timing["commit"],
        }
        base_facts, base, _ = of_policy.get(start, (facts, [], None))
        for suites in [used["suites"], *([s] for s in used["suites"] if len(used["suites"]) > 1)]:
            of_suites = [episode for episode in played if episode["suite"] in suites]
            rows.append(row | {"suite": " ".join(suites)} | episodes.summarise(of_suites))
            if base and name != start and episodes.comparable(facts, base_facts, PROTOCOL, facts["inputs"]):
                test = episodes.paired(of_suites, base)
                rows[-1] |= ({"paired_with": start} | test) if test["paired_n"] else {}
    return rows


RESULTS = {  # heading -> cell. over tasks: their t interval. p: exact McNemar on the same episodes
    # right place: of the chunks sampled at so many first looks, those that head for the target's place here
    "policy": "{name}",
    "suite": lambda row: row["suite"].replace(" ", ", "),
    "success": "{successes} / {n}",
    "95 % interval": "{ci95[0]:.1%} to {ci95[1]:.1%}",
    "over tasks": "{ci95_tasks[0]:.0%} to {ci95_tasks[1]:.0%}",
    "crashes": "{crashes}",
    "right place": lambda row: "{right_place:.1%} at {looks}".format(**row) if "looks" in row else "",
    "against its SFT start": lambda row: f"{100 * row['diff_vs_sft']:+.1f} points" if "gained" in row else "",
    "gained / lost": lambda row: (  # among the episodes of both
        f"{row['gained']} / {row['lost']}" + (f" of {row['paired_n']}" if row["paired_n"] < row["n"] else "")
        if "gained" in row
        else ""
    ),
    "p": lambda row: f"{row['p_vs_sft']:.2g}" if "gained" in row else "",
}


def main(cfg: Config, run: stage.Run) -> dict:
    return episodes.play_all(run, evaluate, tasks(cfg), f"eval {cfg.policy_name}", policy=cfg.policy_name)


def show_table(cfg: Config) -> None:
    """All evaluations so far of this seed and group: results.json, results.md."""
    rows = results_table(cfg)
    publish(cfg.seed_dir / f"results{cfg.suffix}", rows, listing(rows, RESULTS))


if __name__ == "__main__":
    stage.start(main, Config, preview=backbones.preview, after=show_table)
