"""Makes checkpoints/try/ from a run of configs/tiny.yaml with both backbones, so that every stage can be tried without training.

python checkpoints/make.py runs/tiny

For each backbone the policy that DPO starts from, in bfloat16, 20 of its pairs and both trained adapters as they are; for both
two demonstrations of task 0; and margins.json: log-ratios of the pairs by the run's own float32 weights, for tests/test_try.py.
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
import disk

HERE = Path(__file__).resolve().parent / "try"
STARTS = {"pi05": "750", "openvla": "final"}  # as configs/tiny.yaml has them
PAIRS = 20


def demonstrations(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        data = new.create_group("data")
        data.attrs.update(old["data"].attrs)
        for name in ("demo_0", "demo_1"):
            old.copy(f"data/{name}", data, name=name)
        data.attrs["num_demos"] = "2"
        data.attrs["total"] = str(sum(len(demo["actions"]) for demo in data.values()))


def some_pairs(source: Path, target: Path) -> None:
    """Evenly spread over the file, and so over tasks."""
    pairs, rows = disk.load_tensors(source / "pairs.safetensors"), disk.read_jsonl(source / "pairs.jsonl")
    index = torch.linspace(0, len(rows) - 1, PAIRS).round().long()
    target.mkdir(parents=True, exist_ok=True)
    disk.save_tensors(target / "pairs.safetensors", {key: value[index] for key, value in pairs.items()})
    disk.write_atomic(target / "pairs.jsonl", "".join(disk.plain_line(rows[i]) for i in index.tolist()))


@torch.no_grad()
def log_ratios(policy, pairs: dict, dpo) -> torch.Tensor:
    """log p(chosen) - log p(rejected) of all pairs (20,), with the draws of stream (0, "try")."""
    draws = policy.draws(PAIRS, 4, common.stream(0, "try"), "stratified")
    chosen, rejected = dpo.log_probs(policy, *dpo.batch_of(pairs, torch.arange(PAIRS)), draws, "velocity")
    return chosen - rejected


def main(run: Path) -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    demonstrations(run / "data/libero_object/task_00.hdf5", HERE / "data/libero_object/task_00.hdf5")
    dpo, margins = importlib.import_module("03_dpo"), {}
    for backbone, start in STARTS.items():
        folder, target = run / backbone / "seed42", HERE / backbone
        weights, at = ("model.safetensors", "") if start == "final" else (f"model-{start}.safetensors", f"-at{start}")
        some_pairs(folder / f"prefs-branch{at}", target / "prefs")
        pairs = dpo.load_pairs(dpo.Config(pairs_from=str(target / "prefs")))
        reference = log_ratios(backbones.load_policy(folder / "sft", weights), pairs, dpo)
        for adapter in ("lora", "dora"):
            made = folder / f"dpo-{adapter}-branch{at}"
            (target / adapter).mkdir()
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(made / file, target / adapter / file)
            policy = common.load_adapter(backbones.load_policy(folder / "sft", weights), made)
            margins[f"{backbone} {adapter}"] = [round(x, 3) for x in (log_ratios(policy, pairs, dpo) - reference).tolist()]
        backbones.load_policy(folder / "sft", weights).to(torch.bfloat16).save(target / "sft")
    disk.write_json(HERE / "margins.json", margins)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
