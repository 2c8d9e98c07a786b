"""The backbones: two kinds of policy behind one protocol (policy.py), and what the stages ask for.

OpenVLA (openvla.py) writes actions as tokens, pi-0.5 (pi05.py) generates them by flow matching. Importing
this package is cheap: a backbone's module, and transformers with it, is imported when one is built.
"""

from pathlib import Path

import torch

from backbones.load import build, horizon, load_policy
from backbones.policy import Policy, build_tokenizer, collate
from common import blank_images
from runtime import ranks, refuse

__all__ = [
    "Policy",
    "build",
    "build_tokenizer",
    "collate",
    "dry_run",
    "heads_right",
    "horizon",
    "load_policy",
    "load_sft",
    "propose",
]


def dry_run(cfg, section: str) -> None:
    """Print what a stage will take of memory (memory.py)."""
    from backbones import memory

    memory.report(cfg, section)


def load_sft(cfg) -> Policy:
    """The policy that a stage starts from, in evaluation mode: `checkpoint`, or what 01 made.

    Of 01's weights it takes the final ones, or the snapshot that `start` names.
    """
    folder = Path(cfg.checkpoint or cfg.start_dir / "sft")
    weights = "model.safetensors" if cfg.start == "final" else f"model-{cfg.start}.safetensors"
    policy = load_policy(folder, weights, cfg.model if cfg.checkpoint else None, cfg.suites)
    refuse(
        policy.backbone != cfg.backbone,
        f"{folder} is a checkpoint of {policy.backbone}; set backbone={policy.backbone}",
    )
    return policy.cast(cfg.dtype).to(ranks.place(cfg.device)).eval()


@torch.inference_mode()
def propose(policy: Policy, obs: dict, cfg, generators: list[torch.Generator]) -> torch.Tensor:
    """One normalised chunk (H, 7) per generator for one observation, which is encoded once: (N, H, 7)."""
    refuse(
        cfg.execute > policy.horizon,
        f"execute={cfg.execute} must be at most {policy.horizon}, the policy's chunk length",
    )
    batch = collate([blank_images(obs) if cfg.blank_images else obs])
    prefix = policy.encode(batch).select(torch.zeros(len(generators), dtype=torch.long))
    noise = cfg.noise_scale * torch.cat([policy.noise(1, g) for g in generators])
    chunks = policy.sample_actions(prefix, noise, cfg.denoise_steps).cpu()
    refuse(
        not chunks.isfinite().all(),
        "the policy's actions are not finite: its weights or statistics are damaged",
    )
    return chunks


def heads_right(actions: torch.Tensor, hand, places) -> torch.Tensor:
    """Whether chunks (N, H, 7) in environment units head for the first of two places (N, 2, 3): a bool each.

    They do if their whole way makes a smaller angle with that from the hand (N, 3) to the first place.
    hand, places: both tensors or both arrays.
    """
    directions = torch.nn.functional.normalize(torch.as_tensor(places - hand[:, None]), dim=-1)
    way = actions[..., :3].clamp(-1, 1).sum(1)  # (N, 3)
    return ((directions[:, 0] - directions[:, 1]) * way).sum(-1) > 0
