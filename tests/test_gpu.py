"""A GPU computes what a CPU does, and 03 and 05 run on one. pytest tests/test_gpu.py

Skipped where PyTorch sees no GPU. Policies and pairs are those of checkpoints/try; no simulator is needed.
"""

import gc
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import backbones
import common
from backbones import likelihood
from runtime import disk, stage
from runtime.config import load_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")

ROOT = Path(__file__).resolve().parents[1]
dpo, profile = importlib.import_module("03_dpo"), importlib.import_module("05_profile")
BACKBONES = ("pi05", "openvla")


def make_policy(backbone: str, device: str, dtype: str = "float32"):
    return backbones.load_policy(ROOT / "checkpoints/try" / backbone / "sft").cast(dtype).to(device)


def batch(policy, n: int = 8):
    cfg = dpo.Config(pairs_from=str(ROOT / "checkpoints/try" / policy.backbone / "prefs"))
    draws = policy.draws(n, 4, common.stream(0, "draws"), "stratified")
    return dpo.batch_of(dpo.load_pairs(cfg, policy)[0], torch.arange(n)), draws


def compute(policy) -> dict[str, torch.Tensor]:
    """Everything that a stage asks of a policy, gradients included, on the CPU."""
    (obs, chosen, rejected, mask), draws = batch(policy)
    noise = (policy.backbone == "pi05") * policy.noise(len(mask), common.stream(0, "noise"))
    with torch.no_grad():
        prefix = policy.encode(obs)
        found = {"chunk": policy.sample_actions(prefix, noise), "prefix": prefix.values}
    log_p = torch.cat(dpo.log_probs(policy, obs, chosen, rejected, mask, draws, "velocity"))
    loss = policy.sft_loss(policy.encode(obs), chosen, draws)
    (loss + log_p.mean()).backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    found |= {"log_p": log_p.detach(), "loss": loss.detach(), "gradient": gradient}
    return {key: value.float().cpu() for key, value in found.items()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_gpu_computes_what_a_cpu_does(backbone, monkeypatch):
    monkeypatch.setattr(
        torch.backends.cudnn, "allow_tf32", False
    )  # by default convolutions have three digits
    cpu, gpu = (compute(make_policy(backbone, device)) for device in ("cpu", "cuda"))
    off = {key: relative(gpu[key], cpu[key]) for key in cpu}
    assert max(off.values()) < 2e-4, off
    assert off["log_p"] > 0  # other kernels: it did run elsewhere


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_margin_is_exactly_zero_where_policy_equals_reference(backbone, kind, dtype):
    policy = make_policy(backbone, "cuda", dtype).requires_grad_(False)
    common.attach_adapter(policy, kind, 8, 16, policy.adapter_targets, 0)
    (obs, *rest), draws = batch(policy)
    begun = policy.begin(obs, 2)
    with policy.reference():
        ref = dpo.log_probs(policy, begun, *rest, draws, "velocity")
    pi = dpo.log_probs(policy, begun, *rest, draws, "velocity")
    _, rewards = dpo.dpo_loss(*pi, *ref, 1.0)
    assert pi[0].is_cuda and (rewards["rewards/margins"] == 0).all()


def test_the_exact_likelihood_is_that_of_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found = []
    for device in ("cpu", "cuda"):
        policy = make_policy("pi05", device)
        (obs, chosen, rejected, _), _ = batch(policy, 2)
        probes = likelihood.make_probes(
            2, 1, (policy.horizon, policy.cfg.flow_dim), common.stream(0, "probes")
        )
        both = likelihood.pair_log_probs(policy, policy.encode(obs), chosen, rejected, probes, 4)
        found.append(torch.cat(both).detach().cpu())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-2)


def run(script: str, root: Path, backbone: str, *more: str) -> subprocess.CompletedProcess:
    arguments = ["configs/try.yaml", f"backbone={backbone}", "device=cuda", f"root={root}", *more]
    return subprocess.run([sys.executable, script, *arguments], cwd=ROOT, capture_output=True, text=True)


def logged(root: Path) -> list[dict]:
    return disk.read_jsonl(next(root.rglob("metrics.jsonl")))


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_dpo_on_a_gpu_trains_as_on_a_cpu_and_goes_on_after_a_kill(backbone, adapter, tmp_path, monkeypatch):
    rows = {}
    for device in ("cuda", "cpu"):
        arguments = f"adapter={adapter}", f"device={device}"
        assert run("03_dpo.py", tmp_path / device, backbone, *arguments).returncode == 0
        rows[device] = logged(tmp_path / device)
    assert rows["cuda"][0]["rewards/margins"] == rows["cpu"][0]["rewards/margins"] == 0
    for key in ("loss", "rewards/margins", "logps/chosen"):
        found, expected = (torch.tensor([row[key] for row in rows[device]]) for device in ("cuda", "cpu"))
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)

    argv = ["configs/try.yaml", f"backbone={backbone}", "device=cuda", f"adapter={adapter}"]
    cfg = load_config(dpo.Config, [*argv, f"root={tmp_path / 'killed'}", "dpo.checkpoint_every=4"])
    saved = disk.save_checkpoint

    def killed(path, state):
        saved(path, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(disk, "save_checkpoint", killed)
        stage.execute(dpo.main, cfg)
    gc.collect()  # the interrupted run holds the folder's lock
    stage.execute(dpo.main, cfg)
    again = logged(tmp_path / "killed")
    assert [row["step"] for row in again] == [row["step"] for row in rows["cuda"]]
    for key in ("loss", "rewards/margins"):  # backward passes on a GPU add up in no fixed order
        found, expected = (torch.tensor([row[key] for row in part]) for part in (again, rows["cuda"]))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_anatomy_sums_to_the_whole_compiled_and_not(tmp_path):
    result = run("05_profile.py", tmp_path, "pi05", "profile.repeats=10", "profile.sweeps=true")
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(next(tmp_path.rglob("latency.json")).read_text())
    assert found["clock"] == "CUDA events" and "compiled" in [p["label"] for p in found["points"]]
    assert all(abs(p["parts_over_whole"] - 1) < 0.15 for p in found["points"]), found["points"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_compiled_looks_give_the_same_chunk(backbone):
    """With CUDA graphs, whose results stand where the next look writes its own."""
    policy = make_policy(backbone, "cuda")
    obs, noise = profile.observations(1, 64), policy.noise(1, common.stream(0, "noise"))
    point = {"views": 2, "chunk": policy.horizon, "dtype": "float32", "backend": "compile"}
    plain = profile.look(policy, obs, noise, 10)
    policy = profile.prepare(policy, point)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(profile.look(policy, obs, noise, 10), plain, rtol=1e-2, atol=1e-2)
