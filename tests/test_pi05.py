"""pi-0.5 against its original and against itself: parity, shapes, masks, prefix, files, adapters."""

import copy
import importlib
import json
import math
import re
from pathlib import Path

import numpy as np
import parity
import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import INSTRUCTIONS, close, observations, part, stats
from torch.nn.attention import SDPBackend, sdpa_kernel

import backbones
import common
from backbones import pi05
from backbones.layers import Prefix
from backbones.pi05 import Pi05, Pi05Config
from backbones.published import key_here
from runtime import disk
from runtime.errors import UserError

merged_copy = importlib.import_module("01_sft").merged

FIXTURES = Path(__file__).parent / "fixtures"
TINY = FIXTURES / "pi05_tiny_public.safetensors"
GEMMA = {"depth": 2, "mlp_dim": 48, "num_heads": 4, "num_kv_heads": 1, "head_dim": 8}
MODEL = {
    "vlm": GEMMA | {"width": 32},
    "expert": GEMMA | {"width": 24},
    "vision": {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 16,
    },
    "horizon": 5,
    "flow_dim": 7,
    "max_tokens": 32,
    "conv_stem": True,
    "state_token": True,
    "gate_bias": 1.0,
}


def make_policy(**changes) -> Pi05:
    torch.manual_seed(0)
    policy = backbones.build("pi05", MODEL | changes, INSTRUCTIONS)
    for norm in [
        m for m in policy.modules() if isinstance(m, pi05.AdaRMSNorm)
    ]:  # zero at first: would hide the conditioning
        torch.nn.init.normal_(norm.dense.weight, std=0.1)
    rng = np.random.default_rng(0)
    policy.norm_stats = {"action": stats(7, rng), "state": stats(8, rng)}
    return policy.eval()


@pytest.fixture(scope="module")
def shared_policy() -> Pi05:
    return make_policy()


def chunks(n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, 5, 7, generator=torch.Generator().manual_seed(2)) * 2 - 1, torch.ones(
        n, 5, dtype=torch.bool
    )


# ----------------------------------------------------------------------------------------------------- parity
@pytest.mark.parametrize("fixture", ["pi05_tiny_public", "pi05_image_public"])
def test_every_output_of_the_original(fixture):
    rows = list(parity.compare(FIXTURES / f"{fixture}.safetensors"))
    assert rows and all(ok for *_, ok in rows), [r for r in rows if not r[-1]]


def test_parity_exits_1_and_names_what_failed(tmp_path, capsys):
    tensors = load_file(TINY)
    tensors["out.velocity"][0, 0, 0] += 1e-3
    tensors["out.adarms_cond"][0, 0] = math.nan
    save_file(tensors, tmp_path / "x.safetensors")
    (tmp_path / "x.json").write_bytes(TINY.with_suffix(".json").read_bytes())
    assert parity.main([str(tmp_path / "x.safetensors")]) == 1
    failed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("FAIL")]
    assert failed == ["adarms_cond", "velocity"]
    assert parity.main([str(TINY)]) == 0


def swap(module, name: str, new):
    return lambda m: m.setattr(module, name, new)


def identity(x):
    return x


def wrong_order(self, x, modulation):  # (shift, scale) for (scale, shift)
    shift, scale, gate = modulation.chunk(3, dim=-1)
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=pi05.EPS) * (1 + scale) + shift, gate


def no_gate(self, x, modulation):
    scale, shift, gate = modulation.chunk(3, dim=-1)
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=pi05.EPS) * (1 + scale) + shift, torch.ones_like(
        gate
    )


def condition(policy, t, dtype, order):
    fraction = torch.linspace(0, 1, policy.cfg.expert.width // 2, dtype=dtype)
    angle = t.to(dtype)[:, None] / (4e-3 * 1000**fraction) * 2 * math.pi
    e = torch.cat([(angle.sin(), angle.cos())[i] for i in order], dim=-1).float()
    return torch.nn.functional.silu(policy.time_mlp_out(torch.nn.functional.silu(policy.time_mlp_in(e))))


def float32_condition(self, t):
    return condition(self, t, torch.float32, (0, 1))


def cosine_first(self, t):
    return condition(self, t, torch.float64, (1, 0))


velocity, rotary = Pi05.velocity, pi05.rotary
MISTAKES = {
    "time flipped": swap(Pi05, "velocity", lambda self, p, x, t: velocity(self, p, x, 1 - t)),
    "sign of the velocity": swap(Pi05, "velocity", lambda self, p, x, t: -velocity(self, p, x, t)),
    "masked cameras and padding attended": swap(
        pi05, "key_bias", lambda valid, dtype: torch.zeros(len(valid), 1, 1, valid.shape[1])
    ),
    "positions off by one in the suffix": swap(
        pi05, "rotary", lambda positions, dim: rotary(positions + (positions.shape[1] == 10), dim)
    ),
    "scale and shift swapped": swap(pi05.AdaRMSNorm, "forward", wrong_order),
    "gate ignored": swap(pi05.AdaRMSNorm, "forward", no_gate),
    "no SiLU in the time MLP": swap(pi05.F, "silu", identity),
    "float32 sinusoid": swap(Pi05, "time_condition", float32_condition),
    "cosine before sine": swap(Pi05, "time_condition", cosine_first),
    "longest period": swap(pi05, "MAX_PERIOD", 4.1),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_parity_detects_a_planted(mistake, monkeypatch):
    MISTAKES[mistake](monkeypatch)
    verdicts = {name: ok for name, *_, ok in parity.compare(TINY)}
    assert not all(verdicts.values())


# --------------------------------------------------------------------------------------- published checkpoint
def test_published_shapes_and_keys():
    with torch.device("meta"):
        policy = Pi05(Pi05Config())
    ours = {key: list(tensor.shape) for key, tensor in policy.state_dict().items()}
    lines = [line.split("\t") for line in (FIXTURES / "keys-pi05.txt").read_text().splitlines()]
    theirs = {key_here(key, "pi05", None): json.loads(shape) for key, shape in lines}
    assert theirs.pop(None) == [257152, 1024]  # the expert's unused head
    assert ours == theirs
    assert {key_here("model." + key, "pi05", None) for key, _ in lines} == {*ours, None}  # lerobot's files
    adapted = [
        n
        for n, m in policy.named_modules()
        if isinstance(m, torch.nn.Linear) and re.fullmatch(Pi05.adapter_targets, n)
    ]
    assert len(adapted) == 144


def test_prompts_and_discretised_state():
    policy = make_policy(prompt="lerobot")
    state = np.array([0.2, -1.1, 0.0, 1.0, -1.0, 0.999, 0.98, -0.003], np.float32)
    want = "Task: Put the bowl on it, State: 153 -1 128 255 0 255 253 127;\nAction: "
    assert policy.prompt(" Put_the bowl\non it ", state) == want
    policy.cfg.prompt_state_dims = 32
    assert (
        policy.prompt("x", state)
        == "Task: x, State: 153 -1 128 255 0 255 253 127" + 24 * " 128" + ";\nAction: "
    )
    policy.cfg.prompt = "openpi"
    assert policy.prompt(" pick up_the bowl ", state) == "pick up the bowl\n"


def test_tokens_of_a_tokenizer_built_offline():
    policy = make_policy(max_tokens=6)
    ids, valid = policy.tokenize(["Open the drawer\n", "open xyzzy 10\n"])
    words = [[policy.tokenizer.id_to_token(i) for i in row] for row in ids.tolist()]
    assert words == [
        ["<bos>", "open", "the", "drawer", "\n", "<pad>"],
        ["<bos>", "open", "<unk>", "1", "0", "\n"],
    ]
    policy.check_words(["Open the drawer"])
    with pytest.raises(UserError, match="no words for 'open xyzzy'"):
        policy.check_words(["open the drawer", "open xyzzy"])
    assert valid.sum(1).tolist() == [5, 6] and ids[0, 0] == 2 and ids[0, -1] == 0
    assert policy.tokenize(["open the drawer open the drawer"])[0].shape == (1, 6)
    policy.cfg.vocab_size = 3
    with pytest.raises(UserError, match="vocab_size"):
        policy.tokenize(["x"])


def test_image_that_fits_is_not_touched(shared_policy):
    image = observations()["agentview"]
    close(shared_policy.pixels(image), image.permute(0, 3, 1, 2) / 255 * 2 - 1, 0)
    assert shared_policy.pixels(observations(size=50)["wrist"][:, :30]).shape == (3, 3, 32, 32)


# ---------------------------------------------------------------------------------------------- prefix, masks
def test_masked_camera_may_be_left_out():
    x, sizes = load_file(TINY), parity.kind_of(TINY, {})[1]
    policy = parity.pi05_policy(x, sizes)
    rows = (x["in.image_masks"] == torch.tensor([True, True, False])).all(1).nonzero()[:1, 0]
    parts = [x[k][rows] for k in ("in.images", "in.image_masks", "in.tokens", "in.token_mask")]
    with torch.no_grad():
        full, _ = policy.prefill(*policy.embed_prefix(*parts))
        less, _ = policy.prefill(*policy.embed_prefix(parts[0][:, :2], parts[1][:, :2], *parts[2:]))
        a, b = (policy.velocity(p, x["in.x_t"][rows], x["in.time"][rows]) for p in (full, less))
    close(a, b)


@torch.no_grad()
def test_rows_do_not_depend_on_their_batch_nor_on_padding(shared_policy):
    obs, noise = observations(), torch.randn(3, 5, 7)
    together = shared_policy.sample_actions(shared_policy.encode(obs), noise, 3)
    alone = [shared_policy.encode(part(obs, [i])) for i in range(3)]  # prompts of their own length
    for i in range(3):
        close(shared_policy.sample_actions(alone[i], noise[i : i + 1], 3)[0], together[i], 5e-6)
    assert len({p.valid.shape[1] for p in alone}) == 3
    close(shared_policy.sample_actions(Prefix.cat(alone), noise, 3), together, 5e-6)


@torch.no_grad()
def test_a_frozen_policy_acts_the_same_to_the_last_bit(shared_policy):
    """Prompts of three lengths, one to three rows, each shape traced once and then met with other values."""
    obs, frozen = observations(), copy.deepcopy(shared_policy).freeze()
    prefixes = [shared_policy.encode(part(obs, rows)) for rows in ([0], [1], [2], [0, 1], [2, 0], [0, 1, 2])]
    for prefix in [*prefixes, *reversed(prefixes)]:
        noise = torch.randn(len(prefix), 5, 7)
        want = shared_policy.sample_actions(prefix, noise, 3)
        assert torch.equal(frozen.sample_actions(prefix, noise, 3), want)
    assert len(frozen.traces) == len(prefixes) and not shared_policy.traces


@torch.no_grad()
def test_prefix_select_and_detach(shared_policy):
    prefix, index = shared_policy.encode(observations()), torch.tensor([2, 0, 0, 1])
    x, t = torch.randn(4, 5, 7), torch.rand(4)
    picked = prefix.select(index)
    assert len(picked) == 4
    for row, i in enumerate(index):
        alone = shared_policy.velocity(prefix.select(i[None]), x[row : row + 1], t[row : row + 1])
        close(shared_policy.velocity(picked, x, t)[row], alone[0])


def test_gradients_reach_every_part_through_the_prefix():
    policy = make_policy()
    chunk, _ = chunks()
    prefix = policy.encode(observations())
    draws = policy.draws(3, 2, torch.Generator().manual_seed(0), "beta")
    policy.sft_loss(prefix, chunk, draws).backward()
    last = "language_model.layers.1"  # read for its keys and values only
    unread = [f"{last}.{m}" for m in ("self_attn.q_proj", "self_attn.o_proj", "mlp", "post_attention")] + [
        "language_model.norm"
    ]
    for name, p in policy.named_parameters():
        if any(name.startswith(u) for u in unread):
            assert p.grad is None, name
        else:
            assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert prefix.keys.requires_grad


# ---------------------------------------------------------------------------------------------- flow matching
def test_loss_is_the_mean_squared_velocity_error_written_out(shared_policy):
    (chunk, mask), obs = chunks(), observations()
    mask = mask.clone()
    mask[1, 3:] = False
    draws = shared_policy.draws(3, 4, torch.Generator().manual_seed(3), "stratified")
    with torch.no_grad():
        prefix = shared_policy.encode(obs)
        errors, scores = [], torch.zeros(3)
        for k in range(4):
            for i in range(3):
                t, eps = draws.t[k, i], draws.eps[k, i]
                v = shared_policy.velocity(
                    prefix.select(torch.tensor([i])), (t * eps + (1 - t) * chunk[i])[None], t[None]
                )[0]
                e = (v - (eps - chunk[i])).square()
                errors.append(e.flatten())
                scores[i] -= e[mask[i]].sum() / 4
        close(shared_policy.sft_loss(prefix, chunk, draws), torch.cat(errors).mean(), 1e-5)
        close(shared_policy.log_prob(prefix, chunk, draws, mask), scores, 1e-4)


def test_padded_dimensions_carry_noise_but_no_loss():
    policy = make_policy(flow_dim=32)
    (chunk, mask), prefix = chunks(), policy.encode(observations())
    draws = policy.draws(3, 2, torch.Generator().manual_seed(0), "stratified")
    assert draws.eps.shape == (2, 3, 5, 32) and policy.noise(2, torch.Generator()).shape == (2, 5, 32)
    score = policy.log_prob(prefix, chunk, draws, mask)
    with torch.no_grad():
        policy.action_out_proj.bias[7:] += 5  # velocity of the padding: not scored
    close(policy.log_prob(prefix, chunk, draws, mask), score, 0)
    assert policy.unnormalise(policy.sample_actions(prefix, torch.randn(3, 5, 32))).shape == (3, 5, 7)


@torch.no_grad()
def test_sampling_is_euler_from_noise_at_1(shared_policy):
    prefix, noise = shared_policy.encode(observations()), torch.randn(3, 5, 7)
    x = noise
    for t in (1.0, 0.75, 0.5, 0.25):
        x = x - 0.25 * shared_policy.velocity(prefix, x, torch.full((3,), t))
    close(shared_policy.sample_actions(prefix, noise, steps=4), x)
    assert parity.openpi_times(10)[3] != 0.7 and len(parity.openpi_times(10)) == 10


def test_jacobian_products_both_ways(shared_policy):
    with torch.no_grad():
        prefix = shared_policy.encode(observations(1))
    x, d, t = torch.randn(1, 5, 7), torch.randn(1, 5, 7), torch.tensor([0.4])
    with sdpa_kernel(SDPBackend.MATH):
        f = lambda y: shared_policy.velocity(prefix, y, t)  # noqa: E731
        _, forward = torch.func.jvp(f, (x,), (d,))
        _, pull = torch.func.vjp(f, x)
        second = torch.autograd.functional.hessian(lambda y: f(y).sum(), x)
    close((forward * d).sum(), (pull(d)[0] * d).sum(), 1e-4)
    numeric = (f(x + 1e-2 * d) - f(x - 1e-2 * d)) / 2e-2
    torch.testing.assert_close(forward, numeric, atol=5e-3, rtol=5e-2)
    assert second.abs().sum() > 0


# ------------------------------------------------------------------------------------ normalisation and files
@pytest.mark.parametrize("norm_eps", ["openpi", "lerobot"])
@pytest.mark.parametrize("normalisation", ["quantile", "mean_std"])
def test_normalise_round_trip(normalisation, norm_eps):
    policy = make_policy(normalisation=normalisation, norm_eps=norm_eps)
    actions = torch.randn(4, 5, 7) * 3
    close(policy.unnormalise(policy.normalise(actions)), actions, 1e-5)
    as_numpy = policy.unnormalise(policy.normalise(actions.numpy()))
    assert isinstance(as_numpy, np.ndarray) and as_numpy.dtype == np.float32
    close(torch.from_numpy(as_numpy), actions, 1e-5)


def test_normalisation_formulas():
    policy = make_policy()
    policy.norm_stats["action"] |= {
        "q01": [-1.0] * 6 + [2.0],
        "q99": [3.0] * 6 + [2.0],
        "mean": [1.0] * 7,
        "std": [0.5] * 7,
    }
    x = np.array([-1, 3, 1, 5, 0, 0, 2], np.float32)
    # beyond the quantiles: no clipping
    np.testing.assert_allclose(policy.normalise(x), [-1, 1, 0, 2, -0.5, -0.5, -1], atol=1e-6)
    policy.cfg.normalisation = "mean_std"
    np.testing.assert_allclose(policy.normalise(x), (x - 1) / 0.5, atol=2e-5)
    policy.norm_stats = {}
    with pytest.raises(UserError, match="norm_stats"):
        policy.normalise(x)


@torch.no_grad()
def test_saved_policy_is_the_same_policy(tmp_path):
    policy = make_policy()
    policy.save(tmp_path)
    loaded, obs, noise = backbones.load_policy(tmp_path), observations(), torch.randn(3, 5, 7)
    assert loaded.cfg == policy.cfg and loaded.norm_stats == policy.norm_stats and not loaded.training
    same = [
        p.unnormalise(p.sample_actions(p.encode(obs), noise)) for p in (policy, loaded, copy.deepcopy(policy))
    ]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    assert {f.name for f in tmp_path.iterdir()} == {
        "model.safetensors",
        "config.json",
        "norm_stats.json",
        "tokenizer.json",
    }


def test_a_snapshot_of_a_given_checkpoint(tmp_path):
    """checkpoint=FOLDER start=750 takes model-750.safetensors of that folder, and nothing else is a start."""
    policy = make_policy()
    policy.save(tmp_path)
    last = policy.state_dict()["expert.norm.dense.bias"].clone()
    disk.save_tensors(tmp_path / "model-750.safetensors", {k: v + 1 for k, v in policy.state_dict().items()})
    for start, shift in (("final", 0), ("750", 1)):
        started = backbones.load_sft(common.StartConfig(checkpoint=str(tmp_path), start=start))
        assert torch.equal(started.state_dict()["expert.norm.dense.bias"], last + shift)
    depth = policy.cfg.expert.depth
    part = backbones.load_policy(tmp_path, model={"expert": {"depth": depth}})
    assert part.cfg == policy.cfg  # a part of a section leaves the rest of it as it is
    with pytest.raises(UserError, match=r"model-800.*model-750.*set start= to what is there"):
        backbones.load_sft(common.StartConfig(checkpoint=str(tmp_path), start="800"))


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_wrong_files_are_named_in_one_line(tmp_path, damage):
    policy = make_policy()
    policy.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "expert.layers.0.self_attn.q_proj.weight"
    if damage == "missing":
        del tensors[key]
    else:
        tensors["unknown.weight" if damage == "unknown" else key] = torch.zeros(3, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="unknown.weight" if damage == "unknown" else key) as error:
        backbones.load_policy(tmp_path)
    assert "\n" not in str(error.value)


def test_wrong_configs_are_named_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"model.horizn.*horizon"):
        backbones.build("pi05", {"horizn": 3})
    with pytest.raises(UserError, match=r"model.vlm.*depth"):
        backbones.build("pi05", {"vlm": {"width": 3}})
    with pytest.raises(UserError, match="make these equal"):
        backbones.build("pi05", MODEL | {"expert": GEMMA | {"width": 24, "depth": 3}})
    with pytest.raises(UserError, match="openpi"):
        backbones.build("pi05", MODEL | {"prompt": "openpie"})
    with pytest.raises(UserError, match="pi05"):
        backbones.build("pi0", {})
    with pytest.raises(UserError, match="01_sft"):
        backbones.load_policy(tmp_path / "nowhere")
    assert backbones.horizon("pi05", {}) == 10 and backbones.horizon("pi05", MODEL) == 5


# --------------------------------------------------------------------------------------------------- adapters
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapter_starts_as_an_identity_and_reference_switches_it_off(kind, tmp_path):
    policy, obs, (chunk, mask) = make_policy(), observations(), chunks()
    draws = policy.draws(3, 4, torch.Generator().manual_seed(0), "stratified")

    def score():
        return policy.log_prob(policy.encode(obs), chunk, draws, mask).detach()

    base = score()
    common.attach_adapter(policy, kind, 4, 8, policy.adapter_targets, 0)
    tuned = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    assert len(tuned) == 2 * 2 * 4 * (2 if kind == "lora" else 3)
    assert not any("vision" in name or "mlp" in name for name in tuned)
    assert torch.equal(score(), base)  # bit for bit
    with torch.no_grad():
        for p in tuned.values():
            p += 0.1 * torch.randn_like(p)
    assert not torch.allclose(score(), base)
    perturbed = score()
    with policy.reference():
        assert torch.equal(score(), base) and not torch.is_grad_enabled()
    assert torch.equal(score(), perturbed)  # now, and not after a second time only
    with pytest.raises(AssertionError, match="inside"), policy.reference(), policy.reference():
        pass
    assert torch.equal(score(), perturbed)
    with pytest.raises(ZeroDivisionError), policy.reference():
        raise ZeroDivisionError
    assert torch.equal(score(), perturbed) and torch.is_grad_enabled()
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == set(tuned)
    with pytest.raises(UserError, match="adapter"):
        policy.save(tmp_path)
    merged = merged_copy(policy)
    close(merged.log_prob(merged.encode(obs), chunk, draws, mask).detach(), perturbed, 1e-4)
    merged.save(tmp_path)
    assert set(backbones.load_policy(tmp_path).state_dict()) == set(make_policy().state_dict())


# --------------------------------------------------------------------------------------------------- training
def test_a_tiny_policy_learns_chunks_by_heart():
    policy, obs = make_policy(), observations(8)
    chunk = torch.rand(8, 1, 7, generator=torch.Generator().manual_seed(5)).expand(8, 5, 7) * 2 - 1
    optimizer, g = torch.optim.AdamW(policy.parameters(), 3e-3), torch.Generator().manual_seed(0)
    for _ in range(150):
        policy.sft_loss(policy.encode(obs), chunk, policy.draws(8, 4, g, "beta")).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        error = (policy.sample_actions(policy.encode(obs), policy.noise(8, g)) - chunk).square().mean().sqrt()
    assert error < 0.25, error  # the chunks' own spread is 0.58
