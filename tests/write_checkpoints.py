"""Make checkpoints/ from a run of configs/tiny.yaml: every stage without training.

    python tests/write_checkpoints.py runs/tiny

Of each backbone in the run, in try/: the policy that DPO starts from, in bfloat16; 20 of its pairs; both
trained adapters, unchanged. For both: two demonstrations of task 0; and margins.json, the margins of the
pairs (before beta) under the run's own float32 weights, for tests/test_try.py. Of pi05 also
tiny_libero_object/, the final policy. What the run lacks stays as it is.
"""

import importlib
import shutil
import sys
from pathlib import Path

import h5py
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import backbones
import common
from runtime import HERE, disk, refuse, stage

TRY = HERE / "checkpoints" / "try"
STARTS = {  # backbone -> ending of the folders that start there, as in configs/tiny.yaml, and SFT weights
    "pi05": ("-at750", "model-750.safetensors"),
    "openvla": ("", "model.safetensors"),
}
PAIRS = 20


def demonstrations(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        data = new.create_group("data")
        for name in ("demo_0", "demo_1"):
            old.copy(f"data/{name}", data, name=name)
        data.attrs.update(
            dict(old["data"].attrs)
            | {"num_demos": "2", "total": str(sum(len(demo["actions"]) for demo in data.values()))}
        )


@torch.no_grad()
def differences(policy, pairs: dict, dpo) -> torch.Tensor:
    """log p(chosen) - log p(rejected) of all pairs (20,), with the draws of stream (0, "try")."""
    chosen, rejected = dpo.log_probs(
        policy,
        *dpo.batch_of(pairs, torch.arange(PAIRS)),
        policy.draws(PAIRS, 4, common.stream(0, "try"), "stratified"),
        "velocity",
    )
    return chosen - rejected


def main(run: Path) -> None:
    demos = "data/libero_object/task_00.hdf5"
    refuse(
        not (run / demos).is_file(),
        f"{run / demos} is not there; give the folder of a finished run, such as runs/tiny",
    )
    demonstrations(run / demos, TRY / demos)
    dpo, margins = importlib.import_module("03_dpo"), disk.read_json(TRY / "margins.json")
    for backbone in [name for name in STARTS if (run / name).is_dir()]:
        at, weights = STARTS[backbone]
        folder, target = run / backbone / "seed42", TRY / backbone
        shutil.rmtree(target, ignore_errors=True)
        # pairs that are evenly spread over the file, and so over tasks
        source = folder / f"prefs-branch{at}"
        pairs, rows = disk.load_tensors(source / "pairs.safetensors"), disk.read_jsonl(source / "pairs.jsonl")
        index = torch.linspace(0, len(rows) - 1, PAIRS).round().long()
        (target / "prefs").mkdir(parents=True)
        few, facts = common.select(pairs, index), disk.facts_of(source / "pairs.safetensors")
        disk.save_tensors(target / "prefs" / "pairs.safetensors", few, facts)
        disk.write_rows(target / "prefs" / "pairs.jsonl", common.select(rows, index))
        policy = backbones.load_policy(folder / "sft", weights)
        pairs, _ = dpo.load_pairs(dpo.Config(pairs_from=str(target / "prefs")), policy)
        reference = differences(policy, pairs, dpo)
        for adapter in ("lora", "dora"):
            made = folder / f"dpo-{adapter}-branch{at}"
            (target / adapter).mkdir()
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(made / file, target / adapter / file)
            adapted = common.load_adapter(backbones.load_policy(folder / "sft", weights), made)
            margins[f"{backbone} {adapter}"] = [
                round(x, 3) for x in (differences(adapted, pairs, dpo) - reference).tolist()
            ]
        backbones.load_policy(folder / "sft", weights).to(torch.bfloat16).save(target / "sft")
    disk.write_json(TRY / "margins.json", margins)
    if (run / "pi05").is_dir():
        final = backbones.load_policy(run / "pi05" / "seed42" / "sft").to(torch.bfloat16)
        final.save(TRY.with_name("tiny_libero_object"))


if __name__ == "__main__":
    stage.command_line(lambda: main(Path(*sys.argv[1:2])))
