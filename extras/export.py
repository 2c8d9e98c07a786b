"""Export what 03 trained to the code that its checkpoint came from: lerobot, openpi or OpenVLA.

reads   checkpoint=, a published folder; .../dpo-<adapter>-<pairs>/ (03)
writes  <run>/<backbone>/seed<k>/export-dpo-<adapter>-<pairs>/: policy/, the checkpoint's folder with the
        adapter merged in; adapter/, the adapter for plain peft; done.json; and eval_info.json, 04's episodes
        as lerobot-eval writes them, once 04 has played this adapter
cost    disk: the checkpoint once more; memory: the adapted matrices twice (OpenVLA-7B: 9 GB)
try     python -m extras.export configs/pi05.yaml checkpoint=FOLDER

It prints the commands with which the original code evaluates the export, and the versions that this needs.
In policy/ only the adapted matrices differ from the checkpoint. They are merged in float32 and rounded once
to the file's dtype. All other bytes are copies: the other tensors, the shards' index, statistics, processors,
tokenizer, remote code. Hidden files are left out.
"""

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import common
from backbones import is_own, load_policy, published
from report import episodes
from runtime import disk, refuse, stage, warn

PREFIX = "base_model.model."  # peft's, of every key
MORE = ("bias", "lora_bias", "modules_to_save", "alpha_pattern", "rank_pattern")  # by our names
TENSORS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
EVALUATION = {  # format -> what has to be installed, and the commands
    "lerobot": """\
pip install "lerobot[pi,libero,peft]==0.6.1"  # at least 0.5, which writes this policy's prompt
lerobot-eval --policy.path={folder}/policy --env.type=libero --env.task={suites} {episodes}
lerobot-eval --policy.path={folder}/adapter --env.type=libero --env.task={suites} {episodes}""",
    "lerobot <= 0.4.4": """\
pip install "lerobot[libero,peft]==0.4.4"  # a later one writes another prompt than this policy knows
pip install "transformers @ git+https://github.com/huggingface/transformers.git@fix/lerobot_openpi"
lerobot-eval --policy.path={folder}/policy --env.type=libero --env.task={suites} {episodes}
lerobot-eval --policy.path={folder}/adapter --env.type=libero --env.task={suites} {episodes}""",
    "lerobot without statistics": """\
# lerobot finds no statistics in {folder}/policy and would score 0 %: evaluate it with 04_eval.py""",
    "openpi": """\
# in a checkout of openpi that has src/openpi/models_pytorch; nothing there loads the adapter alone. Name the
# config of the policy's training: horizon, prompt and statistics come from there
uv run scripts/serve_policy.py policy:checkpoint --policy.config=pi05_libero --policy.dir={folder}/policy
python examples/libero/main.py --args.task-suite-name {suite}""",
    "openvla": """\
# in a checkout of openvla with its own requirements (transformers 4.40.1, timm 0.9.10)
python experiments/robot/libero/run_libero_eval.py --model_family openvla --center_crop True \\
    --pretrained_checkpoint {folder}/policy --task_suite_name {suite}
# the adapter alone: peft.PeftModel.from_pretrained(MODEL_OF_THE_CHECKPOINT, "{folder}/adapter")""",
}


@dataclass
class Config(common.ActingConfig, common.AdapterConfig):
    section: ClassVar = "export"

    folder = property(lambda self: self.seed_dir / f"export-{self.made_adapter.name}")

    def inputs(self) -> list[Path]:
        files = self.sft_inputs() if self.checkpoint else []
        refuse(
            not files or is_own(Path(self.checkpoint)),
            f"checkpoint={self.checkpoint} is no published folder: a policy that 01 trained has the kit's own"
            " format, which no other code reads; evaluate it with 04_eval.py policy=dpo",
        )
        return [*files, *self.adapter_inputs()]


# ------------------------------------------------------------------------------------------------- the policy
def adapted_keys(shapes: dict, backbone: str, model, layers: set[str]) -> dict[str, list[str]]:
    """Published keys of the matrices that an adapter changes -> the kit's names of what is in each.

    That is one name, or three where q, k and v are one matrix. layers: the adapted ones, by the kit's names.
    """
    names = {}
    for key in shapes:
        name = published.key_here(key, backbone, model) or ""
        parts = [name.format(part) for part in ("qkv" if "{}" in name else "q")]
        if layers & {part.removesuffix(".weight") for part in parts}:
            names[key] = parts
    return names


def merged(c, policy, names: dict[str, list[str]], adapter: Path) -> dict[str, Tensor]:
    """The changed tensors under their published keys, in the files' dtypes. policy: on the meta device."""
    read = {}
    for path in c.files:
        with safe_open(path, "pt") as file:
            read |= {key: file.get_tensor(key) for key in file.keys() if key in names}  # noqa: SIM118
    policy.load_state_dict(published.renamed(read, policy.backbone, policy.cfg), strict=False, assign=True)
    state = common.load_adapter(policy, adapter, trainable=True).merge_and_unload().state_dict()
    return {key: torch.cat([state[part] for part in names[key]]) for key in names}


def overwrite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Put tensors in the places of those of the same keys in a safetensors file. No other byte changes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        places = json.loads(file.read(size))
        for key in tensors.keys() & places.keys():
            begin, end = places[key]["data_offsets"]
            file.seek(8 + size + begin)
            content = tensors[key].contiguous().flatten().view(torch.uint8).numpy()
            assert len(content) == end - begin, key
            file.write(content)


# ------------------------------------------------------------------------------------------------ the adapter
def write_adapter(
    cfg: Config, c, adapter: dict[str, Tensor], names: dict[str, list[str]], folder: Path
) -> None:
    """The adapter under the published names, for plain peft on the original's model.

    Settings that peft has by default are left out, since older versions do not know all of them.
    """
    from peft import LoraConfig

    module = {parts[0].removesuffix(".weight"): key.removesuffix(".weight") for key, parts in names.items()}
    renamed = {}
    for key, tensor in adapter.items():
        layer, _, what = key.removeprefix(PREFIX).partition(".lora_")
        renamed[f"{PREFIX}{module[layer]}.lora_{what}"] = tensor
    plain, given = LoraConfig().to_dict(), disk.read_json(cfg.adapter_dir / SETTINGS)
    more = [key for key in MORE if given.get(key, plain.get(key)) != plain.get(key)]
    refuse(more, f"{cfg.adapter_dir} has {', '.join(more)}: only plain LoRA and DoRA can be exported")
    plain |= dict.fromkeys(("peft_type", "r", "lora_alpha"))  # these are always said
    own = {key: value for key, value in given.items() if key in plain and value != plain[key]} | {
        "auto_mapping": None,
        "target_modules": sorted(module.values()),
        "base_model_name_or_path": str(c.folder.resolve()),
    }
    folder.mkdir(exist_ok=True)
    disk.write_json(folder / SETTINGS, own)
    save_file(renamed, folder / TENSORS, {"format": "pt"})  # as peft writes it
    if c.format is published.FORMATS["lerobot"]:  # which reads these from the adapter's folder
        disk.write_json(folder / "config.json", c.config | {"use_peft": True})
        for path in c.folder.glob("policy_*processor*"):
            shutil.copyfile(path, folder / path.name)


def main(cfg: Config, run: stage.Run) -> dict:
    c = published.open_checkpoint(Path(cfg.checkpoint), cfg.model)
    if cfg.model:
        warn(f"the adapter was trained with model={cfg.model}, which the original code does not read")
    policy = load_policy(
        cfg.checkpoint, model=cfg.model, suites=cfg.suites, backbone=cfg.backbone, read=False
    )
    adapter = disk.load_tensors(cfg.adapter_dir / TENSORS)
    layers = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in adapter}
    names = adapted_keys(c.shapes, cfg.backbone, policy.cfg, layers)
    tensors = merged(c, policy, names, cfg.adapter_dir)
    with disk.writing(run.dir):
        shutil.copytree(
            c.folder,
            run.dir / "policy",
            ignore=shutil.ignore_patterns(".*", "optimizer.pt"),
            copy_function=shutil.copyfile,
            dirs_exist_ok=True,
        )
        for path in c.files:
            overwrite(run.dir / "policy" / path.name, tensors)
    if all(len(parts) == 1 for parts in names.values()):
        write_adapter(cfg, c, adapter, names, run.dir / "adapter")
    else:
        print("[export] no adapter/: q, k and v of an adapted layer are one matrix in the published model")
    return {"adapted": len(layers), "changed": sorted(names)}


# --------------------------------------------------------------------------------------------- the evaluation
def eval_info(rows: list[dict], seconds: float) -> dict:
    """04's episodes as lerobot-eval (0.4 and later) reports its own. An episode that crashed is left out.

    LIBERO's reward is 1 at success, which ends an episode, and 0 before: its sum and its maximum agree.
    """
    rows = [row for row in rows if not row["crash"]]
    tasks = sorted({(row["suite"], row["task"]) for row in rows})

    def wins(*place) -> list[bool]:
        return [row["success"] for row in rows if (row["suite"], row["task"])[: len(place)] == place]

    def lists(wins: list[bool]) -> dict:
        rewards = list(map(float, wins))
        return {"sum_rewards": rewards, "max_rewards": rewards, "successes": wins, "video_paths": []}

    def means(wins: list[bool]) -> dict:
        share = sum(wins) / max(1, len(wins))
        return {
            "avg_sum_reward": share,
            "avg_max_reward": share,
            "pc_success": 100 * share,
            "n_episodes": len(wins),
            "video_paths": [],
        }

    return {
        "per_task": [{"task_group": s, "task_id": t, "metrics": lists(wins(s, t))} for s, t in tasks],
        "per_group": {suite: means(wins(suite)) for suite, _ in tasks},
        "overall": means(wins()) | {"eval_s": seconds, "eval_ep_s": seconds / max(1, len(rows))},
    }


def show(cfg: Config) -> None:
    """The commands that evaluate the export; and eval_info.json, if 04 has evaluated the policy."""
    c = published.open_checkpoint(Path(cfg.checkpoint), cfg.model)
    kind = next(kind for kind, its in published.FORMATS.items() if its is c.format)
    if kind == "lerobot" and not any("language_model.embed_tokens" in key for key in c.shapes):
        kind = "lerobot <= 0.4.4"  # the embedding has one name there, lm_head
    if "lerobot" in kind:
        mode, _, file = published.normaliser(c, "action")
        kind = kind if mode == "identity" or (file and file.is_file()) else "lerobot without statistics"
    names = {  # of lerobot's LIBERO -> of the policy
        f"observation.images.{'image2' if camera == 'wrist' else 'image'}": name
        for name, camera in (published.lerobot_cameras(c) if "lerobot" in kind else {}).items()
    }
    suites = [suite for suite in cfg.suites if suite in common.SUITES]  # layouts are LIBERO-PRO's
    for suite in suites[: 1 if "lerobot" in kind else None]:
        print(
            EVALUATION[kind].format(
                folder=shlex.quote(str(cfg.folder.resolve())),
                suites=",".join(suites),
                suite=suite,
                episodes=f"--eval.batch_size=1 --eval.n_episodes=10 --policy.n_action_steps={cfg.execute} "
                f"--policy.num_inference_steps={cfg.denoise_steps}"
                + f" --rename_map={shlex.quote(json.dumps(names))}"
                * any(ours != its for ours, its in names.items()),
            ),
            flush=True,
        )
    exported = disk.read_json(cfg.folder / "done.json")["inputs"]
    for facts, rows, timing in episodes.finished(cfg.seed_dir, f"eval-{cfg.made_adapter.name}", "test"):
        if exported.items() <= facts["inputs"].items():  # 04 has played this adapter on this checkpoint
            info = eval_info(rows, sum(s or 0 for s in timing["episodes_s"].values()))
            disk.write_json(cfg.folder / "eval_info.json", info)


if __name__ == "__main__":
    stage.start(main, Config, after=show)
