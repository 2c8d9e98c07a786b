"""dtype=bfloat16 and policies that are not on the CPU, for both backbones. pytest tests/test_precision.py

Where there is no GPU (test_gpu.py) the meta device, which also refuses to mix devices, stands in for one.
"""

import importlib

import pytest
import torch

import backbones
import common
import dora
from backbones.pi05 import Pi05, Pi05Config
from runtime.config import load_config
from runtime.errors import UserError

dpo, sft = importlib.import_module("03_dpo"), importlib.import_module("01_sft")

GEMMA = {"width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "pi05": {
        "vlm": GEMMA,
        "expert": GEMMA,
        "vision": VISION | {"image_size": 32, "patch_size": 16},
        "horizon": 4,
    }
    | {"flow_dim": 9, "state_token": True, "conv_stem": True, "gate_bias": 1.0},
    "openvla": {
        "bos": 2,
        "eos": 1,
        "space": 4,
        "vocab_padding": 0,
        "append_bins": True,
        "n_bins": 32,
        "horizon": 2,
    }
    | {
        "llm": {"width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 2},
        "dino": VISION,
        "siglip": VISION,
        "image_size": 32,
    }
    | {"patch_size": 16, "image_pipeline": "none", "state_token": True, "cameras": ["agentview", "wrist"]},
}
INSTRUCTIONS = ["pick up the milk and place it in the basket", "pick up the ketchup and place it"]
UNIT = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}


def make_policy(name: str, dtype: str = "float32", device: str = "cpu"):
    torch.manual_seed(0)
    policy = backbones.build(name, MODELS[name], INSTRUCTIONS)
    policy.norm_stats = {
        kind: {k: [v] * n for k, v in UNIT.items()} for kind, n in (("action", 7), ("state", 8))
    }
    return policy.cast(dtype).to(device).eval()


def batch(policy, b: int = 3):
    """CPU tensors, as the stages have them."""
    g, shape = common.stream(0, "batch"), (b, policy.horizon, 7)
    obs = {
        c: torch.randint(0, 256, (b, 32, 32, 3), generator=g, dtype=torch.uint8)
        for c in ("agentview", "wrist")
    }
    obs |= {
        "state": torch.rand(b, 8, generator=g) * 2 - 1,
        "instruction": [INSTRUCTIONS[i % 2] for i in range(b)],
    }
    chosen, rejected = (torch.rand(shape, generator=g) * 2 - 1 for _ in range(2))
    return obs, chosen, rejected, torch.ones(shape[:2], dtype=torch.bool), policy.draws(b, 2, g, "stratified")


def test_what_pi05_keeps_in_float32_counted_by_the_spec():
    with torch.device("meta"):
        policy = Pi05(Pi05Config()).cast("bfloat16")
    count = {
        dtype: sum(p.numel() for p in policy.parameters() if p.dtype == dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    patches = 1152 * (3 * 14 * 14 + 1) + 256 * 1152
    # plain ones of the language model, adaptive ones of the expert
    norms = (2 * 18 + 1) * (2048 + 3072 * (1024 + 1))
    projections = (32 + 1) * 1024 + (1024 + 1) * 32 + 2 * 1024 * (1024 + 1)  # in, out, time
    assert count[torch.float32] == patches + norms + projections
    assert sum(count.values()) == sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_acts_in_bfloat16_as_it_was_trained(name, kind, tmp_path):
    """To the bit. Merged into weights of bfloat16, small changes would be gone."""
    policy = make_policy(name, "bfloat16")
    adapted = common.attach_adapter(policy, kind, 4, 8, policy.adapter_targets, seed=1)
    for key, p in adapted.named_parameters():
        if "lora_B" in key:
            p.data = 0.05 * torch.randn(p.shape, generator=common.stream(0, key))
    common.save_adapter(adapted, tmp_path)
    obs, chosen, _, mask, draws = batch(policy)
    scores = [
        p.log_prob(p.encode(obs), chosen, draws, mask, "velocity").detach()
        for p in (policy, common.load_adapter(make_policy(name, "bfloat16"), tmp_path))
    ]
    assert torch.equal(*scores)
    own = common.load_adapter(make_policy(name, "bfloat16"), tmp_path).modules()
    assert (kind == "dora") == any(isinstance(layer, dora.DoraLinear) for layer in own), "peft's own is slow"


def test_openvla_is_all_in_one_precision():
    assert {p.dtype for p in make_policy("openvla", "bfloat16").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_float32_and_near_those_of_float32_weights(name):
    scores, losses, chunks = {}, {}, {}
    for dtype in ("float32", "bfloat16"):
        policy = make_policy(name, dtype)
        obs, chosen, rejected, mask, draws = batch(policy)
        noise = (name == "pi05") * policy.noise(3, common.stream(0, "noise"))
        with torch.no_grad():
            scores[dtype] = torch.cat(dpo.log_probs(policy, obs, chosen, rejected, mask, draws, "velocity"))
            losses[dtype] = policy.sft_loss(policy.encode(obs), chosen, draws)
            chunks[dtype] = policy.sample_actions(policy.encode(obs), noise, 2)
        assert {x.dtype for x in (scores[dtype], losses[dtype], chunks[dtype])} == {torch.float32}
        assert chunks[dtype].shape == (3, policy.horizon, MODELS[name].get("flow_dim", 7))
    torch.testing.assert_close(scores["bfloat16"], scores["float32"], rtol=0.03, atol=0.03)
    torch.testing.assert_close(losses["bfloat16"], losses["float32"], rtol=0.03, atol=0.03)
    assert not torch.equal(scores["bfloat16"], scores["float32"])  # the cast did something


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_in_bfloat16_starts_as_an_exact_identity_and_trains_in_float32(name, kind):
    policy = make_policy(name, "bfloat16")
    common.attach_adapter(policy, kind, 4, 8, policy.adapter_targets, seed=1)
    obs, chosen, rejected, mask, draws = batch(policy)
    with policy.reference():
        ref = dpo.log_probs(policy, obs, chosen, rejected, mask, draws, "velocity")
    pi = dpo.log_probs(policy, obs, chosen, rejected, mask, draws, "velocity")
    loss, rewards = dpo.dpo_loss(*pi, *ref, beta=10.0)
    assert torch.equal(rewards["rewards/margins"], torch.zeros(3)) and loss.dtype == torch.float32
    loss.backward()
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n and p.dtype == torch.float32 for n, p in trained.items())
    assert all(p.grad.isfinite().all() for p in trained.values() if p.grad is not None)
    assert sum((p.grad != 0).any().item() for p in trained.values() if p.grad is not None) > 4


@pytest.mark.parametrize("name", MODELS)
def test_a_policy_elsewhere_takes_arguments_from_the_cpu(name):
    policy = make_policy(name, "bfloat16", "meta")
    common.attach_adapter(policy, "dora", 4, 8, policy.adapter_targets, seed=1)
    obs, chosen, rejected, mask, draws = batch(policy)
    with policy.reference():
        ref_w, _ = dpo.log_probs(policy, obs, chosen, rejected, mask, draws, "elbo")
    pi_w, pi_l = dpo.log_probs(policy, obs, chosen, rejected, mask, draws, "elbo")
    loss = policy.sft_loss(policy.encode(obs), chosen, draws)
    assert {(x.device.type, x.dtype) for x in (ref_w, pi_w, pi_l, loss)} == {("meta", torch.float32)}
    assert pi_w.shape == (3,) and loss.shape == () and policy.encode(obs).keys.dtype == torch.bfloat16
    (dpo.dpo_loss(pi_w, pi_l, ref_w, ref_w, 1.0)[0] + loss).backward()


def test_refusals():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device=cpu"):
            load_config(dpo.Config, ["configs/micro.yaml", "device=cuda"])
    for bad in ("device=gpu", "dtype=bf16"):
        with pytest.raises(UserError, match=r"did you mean|known"):
            load_config(dpo.Config, ["configs/micro.yaml", bad])
    with pytest.raises(UserError, match="train=full"):
        load_config(sft.Config, ["configs/micro.yaml", "dtype=bfloat16"])
