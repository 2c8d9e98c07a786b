"""05: clocks, parts, points and roofline, each against a second derivation. pytest tests/test_profile.py"""

import functools
import importlib

import pytest
import torch

import backbones
from report import latency
from runtime import disk, stage

profile = importlib.import_module("05_profile")

SIZE = {"width": 32, "depth": 3, "mlp_dim": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "pi05": {
        "vlm": SIZE,
        "expert": SIZE,
        "vision": VISION | {"image_size": 32, "patch_size": 16},
        "horizon": 10,
    }
    | {"flow_dim": 7, "state_token": True, "gate_bias": 1.0},
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
        "siglip": VISION,
        "towers": ["siglip"],
    }
    | {"image_size": 32, "patch_size": 16, "image_pipeline": "none", "state_token": True}
    | {"cameras": ["agentview", "wrist"]},
}
INSTRUCTION = "pick up the milk and place it in the basket"
UNIT = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}


def make_policy(name: str = "pi05", **changes):
    torch.manual_seed(0)
    policy = backbones.build(name, MODELS[name] | changes, [INSTRUCTION, profile.memory.INSTRUCTION])
    for key, p in policy.named_parameters():
        if "dense.weight" in key:  # zero at first: would hide the times
            torch.nn.init.normal_(p, std=0.2)
    policy.norm_stats = {
        kind: {k: [v] * n for k, v in UNIT.items()} for kind, n in (("action", 7), ("state", 8))
    }
    return policy.eval()


def timed(**changes) -> profile.Config:
    return profile.Config(**({"denoise_steps": 2, "image_size": 32} | changes))


# ----------------------------------------------------------------------------------------------------- clocks
class Ticks:
    """A clock that moves only when told to."""

    def __init__(self):
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_time_belongs_to_the_innermost_call():
    ticks = Ticks()
    clock = profile.Clock("cpu", ticks)

    def spend(seconds, then=lambda: None):
        ticks.time += seconds
        then()
        ticks.time += seconds

    inner = clock.during("inner")(lambda: spend(5))
    outer = clock.during("outer")(lambda: spend(1, inner))
    clock.mark()
    spend(0.25, outer)
    outer()
    assert clock.read() == {"rest": 500, "outer": 4000, "inner": 20000}
    with pytest.raises(ZeroDivisionError):
        clock.during("broken")(lambda: 1 / 0)()
    assert clock.open == ["rest"]


@pytest.mark.parametrize("name", MODELS)
def test_timers_leave_the_policy_as_it_was_and_see_every_part(name):
    policy = make_policy(name)
    obs, noise = profile.observations(1, 32), policy.noise(1, torch.Generator().manual_seed(0))
    before, wanted = dict(vars(policy)), profile.look(policy, obs, noise, 2)
    calls = Ticks()
    clock = profile.Clock("cpu", calls)
    clock.now = lambda: setattr(calls, "time", calls.time + 1) or calls.time  # a second for each mark
    with profile.timers(policy, clock):
        clock.mark()
        assert torch.equal(profile.look(policy, obs, noise, 2), wanted)
        spent = clock.read()
    assert set(spent) == {*profile.PARTS[name].values(), "rest"} and set(spent) <= set(latency.PARTS)
    assert sum(spent.values()) == 1000 * (calls.time - 1)  # nothing lost, nothing twice
    assert vars(policy).keys() == before.keys()


def test_a_slow_part_shows_where_it_is(monkeypatch):
    """Planted: a step of the expert takes 10, the image tower 60, everything else nothing."""
    policy, ticks = make_policy(), Ticks()
    for name, cost in (("flow", 10), ("image_features", 60)):
        function = getattr(policy, name)

        def slow(*arguments, function=function, cost=cost):
            ticks.time += cost / 1e3
            return function(*arguments)

        setattr(policy, name, slow)
    monkeypatch.setattr(profile, "prepare", lambda policy, point: policy)
    point = {"steps": 6, "batch": 1, "backend": "eager"}
    found = profile.measure(policy, timed(repeats=2), point, ticks)
    assert found["parts_ms"]["denoising"] == pytest.approx(60) and found["parts_ms"][
        "vision tower"
    ] == pytest.approx(60)
    assert found["p50_ms"] == pytest.approx(120) and found["parts_over_whole"] == pytest.approx(1)
    assert found["prefix_share"] == pytest.approx(0.5) and found["ceiling"] == pytest.approx(2)


@pytest.mark.parametrize("name", MODELS)
def test_every_point_of_the_sweeps_runs_and_changes_what_it_says(name):
    policy, cfg = make_policy(name), timed(repeats=1, backbone=name)
    points = list(profile.points(cfg, policy))
    for label, point in [each for each in points if each[1]["backend"] == "eager"]:
        now = profile.prepare(policy, point)
        prefix = now.encode(profile.observations(point["batch"], 32))
        assert len(prefix) == point["batch"] and prefix.keys.dtype == getattr(torch, point["dtype"]), label
        text = now.inputs(profile.observations(1, 32))[2 if name == "pi05" else 1].shape[1]
        assert prefix.keys.shape[3] == 4 * point["views"] + 1 + text, label
        chunk = profile.look(
            now,
            profile.observations(point["batch"], 32),
            now.noise(point["batch"], torch.Generator()),
            point["steps"],
        )
        assert chunk.shape == (point["batch"], point["chunk"], 7)
    labels = [label for label, _ in points]
    assert labels[0] == "as it is" and {"views 1", "batch 4", "dtype bfloat16"} <= set(labels)
    assert ("steps 20" in labels) == (name == "pi05")


def test_amdahl():
    assert (
        latency.amdahl(0.0) == 1
        and latency.amdahl(0.75) == 4
        and latency.amdahl(0.214) == pytest.approx(1.272, abs=1e-3)
    )


@functools.cache
def roofline(name: str) -> dict:
    return profile.roofline(profile.Config(backbone=name))


@pytest.mark.parametrize(("name", "weights"), [("pi05", 3.3e9), ("openvla", 7.5e9)])
def test_roofline_against_counts_by_hand(name, weights):
    found = roofline(name)["work"]
    if name == "pi05":
        # an expert's layer: q, k, v, o and the MLP; 10 tokens, 10 steps; modulations of 10 times at once
        layer = 1024 * 2048 * 2 + 2 * 1024 * 256 + 3 * 1024 * 4096
        modulation = 37 * 1024 * 3072
        linear = 10 * (2 * 10 * (18 * layer + 2 * 32 * 1024)) + 2 * 10 * (modulation + 2 * 1024 * 1024)
        tokens = 2 * 256  # of images; on top comes attention to them, to some 20 of text and to 10 actions
        attention = 10 * 18 * 4 * 10 * 8 * 256 * (tokens + 30)
        assert linear < found["actions"]["flops"] < linear + 1.2 * attention
        read = 10 * 2 * 18 * layer + 4 * (modulation + 2 * 1024 * 1024 + 20 * 32 * 1024)
        kept = 10 * 18 * 2 * 256 * 2 * (tokens + 30)
        assert read < found["actions"]["bytes"] < read + 1.2 * kept
        language = (
            17 * (2048 * 2048 * 2 + 2 * 2048 * 256 + 3 * 2048 * 16384) + 2 * 2048 * 256
        )  # of the last layer, k and v
        assert found["prefix"]["bytes"] == 2 * language
    else:
        assert found["actions"]["bytes"] > 7 * 2 * 6.4e9  # a token reads the whole language model
    tower = {"pi05": 0.41e9, "openvla": 0.3e9 + 0.41e9}[name]  # weights of SigLIP, of DINOv2 and SigLIP
    assert 0.9 * 2 * tower < found["images"]["bytes"] < 1.5 * 2 * tower
    assert found["images"]["flops"] > 0.9 * 2 * 256 * tower  # each weight for each patch
    total = sum(found[part]["bytes"] for part in ("images", "prefix"))
    assert total < 2 * weights


def test_a_gpu_is_bound_by_the_slower_of_both():
    rows = roofline("pi05")
    flops, bandwidth = profile.GPUS["H20"]
    work = rows["work"]["prefix"]
    assert rows["gpus"]["H20"]["ms"]["prefix"] == pytest.approx(
        1e3 * max(work["flops"] / flops, work["bytes"] / bandwidth)
    )
    assert 0.2 < rows["gpus"]["H100"]["prefix_share"] < 1


# ------------------------------------------------------------------------------------------------------ stage
def test_the_stage_writes_tables(tmp_path, capsys, monkeypatch):
    bounds = roofline("pi05")
    monkeypatch.setattr(profile, "roofline", lambda cfg: bounds)
    cfg = timed(root=str(tmp_path), name="x", weights="random", model=MODELS["pi05"], repeats=1, sweeps=False)
    stage.execute(profile.main, cfg, after=profile.write_table)
    folder = cfg.seed_dir / "profile"
    found = disk.read_json(folder / "latency.json")
    point = found["points"][0]
    assert (
        point["steps"] == 2
        and set(point["parts_ms"]) <= set(latency.PARTS)
        and point["parts_ms"]["denoising"] > 0
    )
    assert "published size" in (folder / "table.md").read_text()
    said = {row["metric"]: row["value"] for row in disk.read_json(folder / "table.json")}
    assert said["p50"] == point["p50_ms"] and 0 < said["denoise_share"] < 1 - said["prefix_share"]
    assert (folder / "table.md").read_text() in capsys.readouterr().out
    (folder / "table.json").unlink()  # as after a kill at the last moment
    stage.execute(profile.main, cfg, after=profile.write_table)
    assert "already done" in capsys.readouterr().out
    assert {row["metric"]: row["value"] for row in disk.read_json(folder / "table.json")} == said
