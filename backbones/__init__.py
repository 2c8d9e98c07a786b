"""The backbones: two kinds of policy behind one protocol (policy.py), and what the stages ask for.

OpenVLA (openvla.py) writes actions as tokens, pi-0.5 (pi05.py) generates them by flow matching. Importing
this package is cheap: a backbone's module, and transformers with it, is imported when one is built.
"""

from pathlib import Path

import torch
from torch.utils.data import default_collate as collate  # observations -> one batch

from backbones.load import build, horizon, load_policy, weights_of
from backbones.policy import Policy, build_tokenizer, is_own
from common import blank_images
from runtime import ranks, refuse

EXAMPLES = {"pi05": "lerobot/pi05_libero_finetuned", "openvla": "openvla/openvla-7b-finetuned-libero-object"}
TOO_MANY = "execute={} must be at most {}, the policy's chunk length"


def preview(cfg, section: str) -> None:
    """Check the folder that a config names to start from, and print what it is, without reading its weights.
    For a dry run also print what the stage will take of memory (memory.py).
    """
    if cfg.given:
        refuse(
            not Path(cfg.given).exists(),
            f"no checkpoint {cfg.given}; if another run makes it, run 01_sft.py with that run's config; else"
            " give a folder that holds .safetensors, or get one:"
            f" `hf download {EXAMPLES[cfg.backbone]} --local-dir FOLDER`",
        )
        weights, execute = weights_of(getattr(cfg, "start", "final")), getattr(cfg, "execute", 1)
        policy = load_policy(cfg.given, weights, cfg.model, cfg.suites, cfg.backbone, read=False)
        refuse(execute > policy.horizon, TOO_MANY.format(execute, policy.horizon))
        print(*policy.found, sep="\n  ", flush=True)
    if section and cfg.dry_run:
        from backbones import memory

        memory.report(cfg, section)


def load_sft(cfg) -> Policy:
    """The policy that a stage starts from, in evaluation mode: `checkpoint`, or what 01 made.

    Of 01's weights it takes the final ones, or the snapshot that `start` names.
    """
    folder = Path(cfg.checkpoint or cfg.start_dir / "sft")
    model = cfg.model if cfg.checkpoint else None
    policy = load_policy(folder, weights_of(cfg.start), model, cfg.suites, cfg.backbone)
    return policy.cast(cfg.dtype).to(ranks.place(cfg.device)).eval()


@torch.inference_mode()
def propose(policy: Policy, obs: dict, cfg, generators: list[torch.Generator]) -> torch.Tensor:
    """One normalised chunk (H, D) per generator for one observation, which is encoded once: (N, H, D)."""
    refuse(cfg.execute > policy.horizon, TOO_MANY.format(cfg.execute, policy.horizon))
    policy.check_words([obs["instruction"]])
    batch = collate([blank_images(obs) if cfg.blank_images else obs])
    prefix = policy.encode(batch).select(torch.zeros(len(generators), dtype=torch.long))
    noise = cfg.noise_scale * torch.cat([policy.noise(1, g) for g in generators])
    chunks = policy.sample_actions(prefix, noise, cfg.denoise_steps).cpu()
    refuse(
        not chunks.isfinite().all(),
        "the policy's actions are not finite: its weights or statistics are damaged",
    )
    return chunks


def heads_for_first(actions: torch.Tensor, hand, places) -> torch.Tensor:
    """Whether chunks (N, H, 7) in environment units head for the first of two places (N, 2, 3): bool (N,).

    A chunk does if the sum of its movements makes a smaller angle with the line from the hand (N, 3) to the
    first place than with the line to the second.
    hand, places: both tensors or both arrays.
    """
    directions = torch.nn.functional.normalize(torch.as_tensor(places - hand[:, None]), dim=-1)
    way = actions[..., :3].clamp(-1, 1).sum(1)  # (N, 3)
    return ((directions[:, 0] - directions[:, 1]) * way).sum(-1) > 0
