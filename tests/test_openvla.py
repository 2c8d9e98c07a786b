"""OpenVLA against its original and against itself: parity, tokens, prefix, files, adapters."""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import parity
import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import INSTRUCTIONS, close, observations, part, stats

import backbones
import common
from backbones import layers, openvla, openvla_images
from backbones.layers import Prefix
from backbones.openvla import OpenVLA, OpenVLAConfig
from backbones.published import key_here, renamed, suite_stats
from runtime.errors import UserError

merged_copy = importlib.import_module("01_sft").merged

FIXTURES = Path(__file__).parent / "fixtures"
TINY = FIXTURES / "openvla_tiny_public.safetensors"
TOWER = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
MODEL = {
    "vocab_padding": 0,
    "bos": 2,
    "eos": 1,
    "space": 4,
    "llm": {"width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 4},
    "dino": TOWER,
    "siglip": TOWER,
    "image_size": 32,
    "patch_size": 16,
    "n_bins": 16,
    "image_pipeline": "none",
    "horizon": 3,
    "cameras": ["agentview", "wrist"],
    "state_token": True,
    "conv_stem": True,
    "append_bins": True,
}


def make_policy(**changes) -> OpenVLA:
    torch.manual_seed(0)
    policy = backbones.build("openvla", MODEL | changes, INSTRUCTIONS)
    rng = np.random.default_rng(0)
    policy.norm_stats = {"action": stats(7, rng), "state": stats(8, rng)}
    return policy.eval()


@pytest.fixture(scope="module")
def shared_policy() -> OpenVLA:
    return make_policy()


def chunks(n: int = 3, horizon: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    chunk = torch.rand(n, horizon, 7, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return chunk, torch.ones(n, horizon, dtype=torch.bool)


def full_logits(policy, obs: dict, ids: torch.Tensor) -> torch.Tensor:
    """Logits (n + 1, rows) at "▁" and at each of ids (1, n), for one observation.

    One pass over the whole sequence, without a cache.
    """
    tokens, valid = policy.tokenize(obs["instruction"])
    tokens = torch.cat([tokens, torch.full((1, 1), policy.cfg.space), ids], dim=1)
    images = torch.stack([policy.pixels(obs[c]) for c in policy.cfg.cameras], dim=1)
    state = policy.normalise(obs["state"], "state")
    x, valid = policy.embed_prefix(images, tokens, torch.ones_like(tokens, dtype=torch.bool), state)
    return policy.language_model.lm_head(policy.prefill(x, valid, to_end=True)[1])[0, -ids.shape[1] - 1 :]


# ----------------------------------------------------------------------------------------------------- parity
@pytest.mark.parametrize("fixture", ["openvla_tiny_public", "openvla_image_public"])
def test_every_output_of_the_original(fixture):
    rows = list(parity.compare(FIXTURES / f"{fixture}.safetensors"))
    assert rows and all(ok for *_, ok in rows), [r for r in rows if not r[-1]]


def another_token_before_the_actions(monkeypatch):
    right = parity.openvla_policy

    def wrong(tensors, sizes):
        policy = right(tensors, sizes)
        policy.cfg.space = 13
        return policy

    monkeypatch.setattr(parity, "openvla_policy", wrong)


def swap(module, name: str, new):
    return lambda m: m.setattr(module, name, new)


rotary, attend, features = openvla.rotary, layers.attend, OpenVLA.patch_features
MISTAKES = {
    "tanh GELU in the towers": swap(openvla, "GELU", "gelu_pytorch_tanh"),
    "another token in place of 29871": another_token_before_the_actions,
    "SigLIP's features first": swap(
        OpenVLA, "patch_features", lambda self, pixels: features(self, pixels).roll(36, dims=-1)
    ),
    "position off by one behind the prefix": swap(
        openvla, "rotary", lambda positions, dim: rotary(positions + (positions.shape[0] > 1), dim)
    ),
    "patches see one another": swap(
        layers,
        "attend",
        lambda attn, x, rope, k, v, mask: attend(
            attn,
            x,
            rope,
            k,
            v,
            torch.ones(1, 1, x.shape[1], k.shape[2], dtype=torch.bool) if mask is None else mask,
        ),
    ),
    "epsilon of Llama-2": swap(openvla, "EPS", 1e-5),
    "edges of torch.linspace": swap(
        openvla.np, "linspace", lambda a, b, n: torch.linspace(a, b, n, dtype=torch.float64).numpy()
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_parity_detects_a_planted(mistake, monkeypatch):
    MISTAKES[mistake](monkeypatch)
    assert not all(ok for *_, ok in parity.compare(TINY))


def test_parity_detects_another_crop(monkeypatch):
    crop = openvla_images.center_crop
    monkeypatch.setattr(openvla_images, "center_crop", lambda image: crop(image, area=0.91))
    assert [
        name for name, *_, ok in parity.compare(FIXTURES / "openvla_image_public.safetensors") if not ok
    ] == ["center_crop224"]


# --------------------------------------------------------------------------------------- published checkpoint
@pytest.fixture(scope="module")
def published() -> OpenVLA:
    with torch.device("meta"):
        return OpenVLA(OpenVLAConfig())


def test_published_shapes_and_keys(published):
    ours = {key: list(tensor.shape) for key, tensor in published.state_dict().items()}
    lines = [line.split("\t") for line in (FIXTURES / "keys-openvla-7b.txt").read_text().splitlines()]
    tensors = {key: torch.empty(json.loads(shape), device="meta") for key, shape in lines}
    assert len(tensors) == 982 and ours == {
        k: list(t.shape) for k, t in renamed(tensors, "openvla", published.cfg).items()
    }
    unused = {key for key in tensors if key_here(key, "openvla", published.cfg) is None}
    last = ("vision_backbone.featurizer.blocks.23.", "vision_backbone.fused_featurizer.blocks.26.")
    rest = (*last, "vision_backbone.featurizer.norm.", "vision_backbone.fused_featurizer.norm.")
    assert unused == {
        k for k in tensors if k.startswith((*rest, "vision_backbone.fused_featurizer.attn_pool."))
    }
    assert published.horizon == 1 and published.cfg.action_end == 32000


@pytest.mark.parametrize(("kind", "count"), [("lora", 33_554_432), ("dora", 34_078_720)])
def test_published_adapter(published, kind, count):
    names = [
        n
        for n, m in published.named_modules()
        if isinstance(m, torch.nn.Linear) and re.fullmatch(OpenVLA.adapter_targets, n)
    ]
    sizes = dict(published.named_parameters())
    assert len(names) == 128 and not any("vision" in n or "projector" in n for n in names)
    rows = [sizes[f"{n}.weight"].shape for n in names]
    assert sum(32 * (o + i) + (o if kind == "dora" else 0) for o, i in rows) == count


def test_statistics_of_a_suite():
    files = {
        "libero_goal": {"action": {"q01": [0]}, "proprio": {}},
        "libero_object_no_noops": {"action": {"q01": [1], "mask": [False]}},
    }
    assert suite_stats(files, "libero_goal") == {
        "action": {"q01": [0], "mask": [True] * 7}
    }  # as the original without a mask
    assert suite_stats(files, "libero_object")["action"] == {"q01": [1], "mask": [False]}
    assert suite_stats(files, "libero_object_look") == suite_stats(files, "libero_object")
    with pytest.raises(UserError, match="libero_10"):
        suite_stats(files, "libero_10")


def test_prompt_and_its_last_token():
    policy = make_policy()
    ids, valid = policy.tokenize(["Open the Drawer", INSTRUCTIONS[0]])
    words = [policy.tokenizer.id_to_token(i) for i in ids[0].tolist()]
    assert words[:10] == ["<bos>", "in", ":", "what", "action", "should", "the", "robot", "take", "to"]
    assert words[10:] == ["open", "the", "drawer", "?", "\n", "out", ":"] + ["<eos>"] * 8 and valid.sum(
        1
    ).tolist() == [17, 25]
    policy.cfg.prompt += "\n"  # a tokenizer that gives "▁" itself: the same sequence
    assert torch.equal(policy.tokenize(["Open the Drawer", INSTRUCTIONS[0]])[0], ids)
    assert OpenVLAConfig().prompt.format(task="x") == "In: What action should the robot take to x?\nOut:"
    policy.cfg.vocab_size = 3
    with pytest.raises(UserError, match="vocab_size"):
        policy.tokenize(["x"])


def test_images(shared_policy):
    image = observations()["agentview"]
    x = shared_policy.pixels(image)
    assert x.shape == (3, 6, 32, 32)
    close(x[:, 3:], image.permute(0, 3, 1, 2) / 255 * 2 - 1)
    close(x[:, 2], (image[..., 2] / 255 - 0.406) / 0.225)
    assert shared_policy.pixels(observations(size=50)["wrist"][:, :30]).shape == (3, 6, 32, 32)
    policy = make_policy(image_pipeline="openvla", towers=["siglip"], image_size=64)
    grey = torch.full((1, 96, 96, 3), 128, dtype=torch.uint8)
    close(policy.pixels(grey), torch.full((1, 3, 64, 64), 128 / 255 * 2 - 1))
    scene = observations(size=96)["agentview"][:1]
    # the frame as it was stored, then resized
    seen = openvla_images.resize_lanczos3(openvla_images.jpeg(scene[0].numpy()), 64)
    seen = torch.from_numpy(openvla_images.center_crop(seen)).permute(2, 0, 1)[None] / 255 * 2 - 1
    close(policy.pixels(scene), seen)


# ---------------------------------------------------------------------------------------------- action tokens
def test_token_codec_at_the_published_size(published):
    assert published.encode_actions(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [31999, 31872, 31744]
    ids = torch.arange(31744, 32000)
    again = published.encode_actions(published.decode_actions(ids))
    assert torch.equal(again[1:], ids[1:]) and again[0] == 31745  # the two highest share a centre
    x = torch.linspace(-1, 1, 1001)
    assert (published.decode_actions(published.encode_actions(x)) - x).abs().max() <= 1 / 255 + 1e-7


def test_codec_of_appended_bins(shared_policy):
    cfg = shared_policy.cfg
    assert cfg.action_end == cfg.vocab_size + 16 == len(shared_policy.language_model.lm_head.weight)
    assert shared_policy.encode_actions(torch.tensor([-1.0, 1.0])).tolist() == [
        cfg.action_end - 1,
        cfg.vocab_size,
    ]


def check_log_prob(policy):
    """Against a pass over the whole sequence for every token, without a cache."""
    (chunk, mask), obs = chunks(), observations()
    mask[1, 1:] = False
    ids, want = policy.encode_actions(chunk).flatten(1), torch.zeros(3)
    with torch.no_grad():
        for i in range(3):
            for k in range(ids.shape[1]):
                logits = full_logits(policy, part(obs, [i]), ids[i : i + 1, :k])[-1]
                want[i] += mask[i, k // 7] * logits.log_softmax(-1)[ids[i, k]]
        close(policy.log_prob(policy.encode(obs), chunk, None, mask, "velocity"), want, 1e-4)


def check_gripper(policy):
    """LIBERO's open, -1, is 1 in the data and -1 again in the environment; close, +1, is 0 and +1."""
    raw = np.zeros((2, 7), np.float32)
    raw[:, 6] = common.GRIPPER_OPEN, common.GRIPPER_CLOSE
    chunk = policy.normalise(raw)
    assert chunk[:, 6].tolist() == [1, 0]
    tokens = policy.decode_actions(policy.encode_actions(torch.from_numpy(chunk)))
    for x in (chunk, tokens.numpy()):
        assert policy.unnormalise(x)[:, 6].tolist() == [-1, 1]


def test_log_prob_and_gripper(shared_policy):
    check_log_prob(shared_policy)
    check_gripper(shared_policy)


def mean_of_tokens(self, prefix, chunk, draws, mask, weight, right=OpenVLA.log_prob):
    return right(self, prefix, chunk, draws, mask, weight) / (7 * mask.sum(1))


def gripper_as_in_the_data(self, chunk):
    actions = self.between_quantiles(chunk)
    actions[..., 6] = np.sign(2 * actions[..., 6] - 1)
    return actions


@pytest.mark.parametrize(
    ("name", "wrong", "check"),
    [("log_prob", mean_of_tokens, check_log_prob), ("unnormalise", gripper_as_in_the_data, check_gripper)],
)
def test_checks_detect_a_planted(name, wrong, check, monkeypatch, shared_policy):
    monkeypatch.setattr(OpenVLA, name, wrong)
    with pytest.raises(AssertionError):
        check(shared_policy)


@torch.no_grad()
def test_greedy_decoding_is_an_argmax_over_full_passes(shared_policy):
    policy, obs = shared_policy, observations()
    start = policy.cfg.action_end - policy.cfg.n_bins
    noise = 0 * policy.noise(3, torch.Generator())
    assert noise.shape == (3, 3, 7, 16) and not noise.any()
    got = policy.generate(policy.encode(obs), noise)
    for i in range(3):
        ids = torch.zeros(1, 0, dtype=torch.long)
        for _ in range(21):
            best = start + full_logits(policy, part(obs, [i]), ids)[-1, start:].argmax()
            ids = torch.cat([ids, best.view(1, 1)], dim=1)
        assert torch.equal(ids[0], got[i])
    chunk = policy.sample_actions(policy.encode(obs), noise, 10)
    assert chunk.dtype == torch.float32 and torch.equal(
        policy.encode_actions(chunk), got.view(3, 3, 7).clamp(min=start + 1)
    )


@torch.no_grad()
def test_gumbel_noise_samples_the_softmax():
    policy, n = make_policy(horizon=1), 4000
    prefix = policy.encode(observations(1)).select(torch.zeros(n, dtype=torch.long))
    first = policy.generate(prefix, 0.7 * policy.noise(n, torch.Generator().manual_seed(0))[:, :, :1])[:, 0]
    one = prefix.select(torch.tensor([0]))
    space = torch.tensor([[policy.cfg.space]])
    logits = policy.follow(one.layers(), policy.surroundings(one.valid, 1), space)[0]
    start = policy.cfg.action_end - policy.cfg.n_bins
    want = (logits[0, -1, start:] / 0.7).softmax(-1)
    got = torch.bincount(first - start, minlength=16) / n
    close(got, want, 4 * (want.max() / n).sqrt().item())
    assert want.max() < 0.9


@torch.no_grad()
def test_sampled_chunks_are_scored_as_the_tokens_they_were(shared_policy):
    policy, prefix = shared_policy, shared_policy.encode(observations())
    noise = 3 * make_policy().noise(3, torch.Generator().manual_seed(4))
    noise[0, 0, :, 0] = 1e4  # the highest token, which decodes to its neighbour's centre
    noise[1:, :, :, 1] = -1e4  # never that neighbour
    noise[0, 1:, :, 1] = -1e4
    ids, mask = policy.generate(prefix, noise), torch.ones(3, 3, dtype=torch.bool)
    want = policy.token_log_probs(prefix, ids, 21).gather(-1, ids[..., None]).sum((1, 2))
    chunk = policy.sample_actions(prefix, noise)
    close(policy.log_prob(prefix, chunk, None, mask), want, 1e-5)
    executed = policy.normalise(policy.unnormalise(chunk))  # as pairs are stored
    close(policy.log_prob(prefix, executed, None, mask).isfinite(), torch.ones(3, dtype=torch.bool))
    arm = executed[..., :6], chunk[..., :6]
    assert torch.equal(*(policy.encode_actions(x) for x in arm))


def test_sft_loss_is_the_cross_entropy_written_out(shared_policy):
    (chunk, _), obs, policy = chunks(), observations(), shared_policy
    ids = policy.encode_actions(chunk).flatten(1)
    with torch.no_grad():
        # (3, 22, rows)
        logits = torch.stack([full_logits(policy, part(obs, [i]), ids[i : i + 1]) for i in range(3)])
        targets = torch.nn.functional.pad(ids, (0, 1), value=policy.cfg.eos)
        want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        close(policy.sft_loss(policy.encode(obs), chunk, None), want, 1e-5)


def test_smoothed_targets():
    rows = openvla.smoothing(16, 1.0, torch.device("cpu"))
    close(rows.sum(1), torch.ones(16))
    assert rows.argmax(1).tolist() == list(range(16)) and rows[3, 2] == rows[3, 4] > rows[3, 5] > 0
    assert torch.equal(openvla.smoothing(16, 0.0, torch.device("cpu")), torch.eye(16))
    sharp, smooth = make_policy(label_smoothing_bins=0.01), make_policy(label_smoothing_bins=1.0)
    (chunk, _), obs = chunks(), observations()
    with torch.no_grad():
        plain = make_policy().sft_loss(make_policy().encode(obs), chunk)
        close(sharp.sft_loss(sharp.encode(obs), chunk), plain)
        assert (smooth.sft_loss(smooth.encode(obs), chunk) - plain).abs() > 1e-3


# ----------------------------------------------------------------------------------------------------- prefix
@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [{}, {"towers": ["siglip"], "cameras": ["agentview"], "state_token": False, "conv_stem": False}],
)
def test_rows_do_not_depend_on_their_batch_nor_on_padding(changes):
    policy, obs, (chunk, mask) = make_policy(**changes), observations(), chunks()
    together = policy.log_prob(policy.encode(obs), chunk, None, mask)
    alone = [policy.encode(part(obs, [i])) for i in range(3)]  # prompts of their own length
    assert len({p.valid.shape[1] for p in alone}) == 3
    close(
        torch.cat([policy.log_prob(p, c[None], None, mask[:1]) for p, c in zip(alone, chunk, strict=True)]),
        together,
        2e-5,
    )
    close(policy.log_prob(Prefix.cat(alone), chunk, None, mask), together, 2e-5)
    index = torch.tensor([2, 0, 0])
    close(policy.log_prob(policy.encode(obs).select(index), chunk[index], None, mask), together[index], 2e-5)


def test_gradients_reach_every_part_through_the_prefix():
    policy, (chunk, mask) = make_policy(), chunks()
    prefix = policy.encode(observations())
    (
        -policy.log_prob(
            prefix.select(torch.tensor([0, 1, 2])), chunk, policy.draws(3, 4, torch.Generator(), "beta"), mask
        ).sum()
    ).backward()
    for name, p in policy.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert prefix.keys.requires_grad


def test_stages_propose_as_with_any_backbone():
    policy = make_policy()
    obs = {k: v[0] if k == "instruction" else v[0].numpy() for k, v in observations(1).items()}
    generators = [torch.Generator().manual_seed(s) for s in (0, 1, 0)]
    with torch.no_grad():
        cfg = SimpleNamespace(blank_images=False, denoise_steps=10, execute=3, noise_scale=1.0)
        chunk = backbones.propose(policy, obs, cfg, generators)
        cfg.noise_scale = 0.0  # greedy: the noise makes no difference
        greedy = backbones.propose(policy, obs, cfg, generators)
    assert (
        chunk.shape == (3, 3, 7) and torch.equal(chunk[0], chunk[2]) and not torch.equal(chunk[0], chunk[1])
    )
    assert torch.equal(greedy[0], greedy[1])
    actions = np.asarray(policy.unnormalise(chunk[0]))
    assert actions.shape == (3, 7) and set(np.abs(actions[:, 6])) == {1.0}
    assert backbones.horizon("openvla", MODEL) == 3 and backbones.horizon("openvla", {}) == 1


# ------------------------------------------------------------------------------------ normalisation and files
def test_normalise_round_trip_and_formulas():
    policy = make_policy()
    policy.norm_stats["action"] |= {"q01": [-1.0] * 7, "q99": [3.0] * 5 + [-1.0, 3.0]}
    x = np.array([-1, 3, 1, 0, 5, 0.5, -0.7], np.float32)
    chunk = policy.normalise(x)
    np.testing.assert_allclose(chunk, [-1, 1, 0, -0.5, 1, 0, 1], atol=1e-6)  # clipped; 0 where nothing varies
    np.testing.assert_allclose(policy.unnormalise(chunk), [-1, 3, 1, 0, 3, -1, -1], atol=1e-6)
    actions = torch.rand(4, 3, 7) * 4 - 1
    actions[..., 5], actions[..., 6] = -1, actions[..., 6].sub(1).sign()
    again = policy.unnormalise(policy.normalise(actions))
    assert again.dtype == torch.float32
    close(again, actions, 1e-6)
    noisy = policy.normalise(np.array([[0, 0, 0, 0, 0, 0, g] for g in (-1.0, -0.2, 0.3, 1.0)], np.float32))
    assert noisy[:, 6].tolist() == [1, 1, 0, 0]  # the environment takes the sign
    state = policy.normalise(torch.tensor(policy.norm_stats["state"]["q99"])[None] + 1, "state")
    assert (state > 1).all()  # states are not clipped
    policy.norm_stats = {}
    with pytest.raises(UserError, match="norm_stats"):
        policy.normalise(x)


@torch.no_grad()
def test_saved_policy_is_the_same_policy(tmp_path):
    policy = make_policy()
    policy.save(tmp_path)
    loaded, obs, noise = (
        backbones.load_policy(tmp_path),
        observations(),
        policy.noise(3, torch.Generator().manual_seed(0)),
    )
    assert loaded.cfg == policy.cfg and loaded.norm_stats == policy.norm_stats and not loaded.training
    same = [p.unnormalise(p.sample_actions(p.encode(obs), noise)) for p in (policy, loaded)]
    assert torch.equal(*same)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["projector.fc2.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"projector.fc2.bias is missing"):
        backbones.load_policy(tmp_path)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"horizn": 2}, "horizon"),
        ({"image_pipeline": "openvl"}, "openvla"),
        ({"towers": []}, "towers"),
        ({"cameras": ["wrist", "agentview"]}, "order"),
        ({"patch_size": 14}, "power of 2"),
        ({"space": 29871}, "space"),
        ({"dino": TOWER | {"intermediate_size": 50}}, "multiple"),
        ({"llm": {"width": 32}}, "depth"),
    ],
)
def test_wrong_configs_are_named_in_one_line(changes, word):
    with pytest.raises(UserError, match=word) as error:
        make_policy(**changes)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------- adapters
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapter_starts_as_an_identity_and_reference_switches_it_off(kind, tmp_path):
    policy, obs, (chunk, mask) = make_policy(), observations(), chunks()

    def score():
        return policy.log_prob(policy.encode(obs), chunk, None, mask).detach()

    base = score()
    common.attach_adapter(policy, kind, 4, 8, policy.adapter_targets, 0)
    tuned = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    assert len(tuned) == 2 * 4 * (2 if kind == "lora" else 3) and all("language_model" in n for n in tuned)
    assert torch.equal(score(), base)  # bit for bit
    with torch.no_grad():
        for p in tuned.values():
            p += 0.1 * torch.randn_like(p)
    perturbed = score()
    assert not torch.allclose(perturbed, base)
    with policy.reference():
        assert torch.equal(score(), base) and not torch.is_grad_enabled()
    assert torch.equal(score(), perturbed)
    merged = merged_copy(policy)
    close(merged.log_prob(merged.encode(obs), chunk, None, mask).detach(), perturbed, 2e-3)
    merged.save(tmp_path)
    assert set(backbones.load_policy(tmp_path).state_dict()) == set(make_policy().state_dict())


# --------------------------------------------------------------------------------------------------- training
def test_a_tiny_policy_learns_chunks_by_heart():
    policy, obs = make_policy(label_smoothing_bins=0.5), observations(6)
    chunk = policy.decode_actions(policy.encode_actions(chunks(6)[0])).float()
    optimizer = torch.optim.AdamW(policy.parameters(), 3e-3)
    for _ in range(80):
        policy.sft_loss(policy.encode(obs), chunk, None).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        error = (
            (policy.sample_actions(policy.encode(obs), 0 * policy.noise(6, torch.Generator())) - chunk)
            .square()
            .mean()
            .sqrt()
        )
    assert error < 0.2, error  # the chunks' own spread is 0.58
