"""Conventions, surrogate, statistics, config and run folders, each checked another way. pytest tests/test_common.py"""

import dataclasses
import importlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import binomtest

import common
import disk
import runs
import stats


# ---------------------------------------------------------------------------------------------------------------- LIBERO
def test_init_state_groups_share_no_state_and_cover_all():
    states = [s for group in common.INIT_GROUPS for s in common.init_states(group)]
    assert sorted(states) == list(range(50))


@pytest.mark.parametrize("group, n", [("val", 6), ("test", 11), ("demos", 0), ("tset", 1)])
def test_init_states_never_reach_into_another_group(group, n):
    with pytest.raises(common.UserError):
        common.init_states(group, n)


@pytest.mark.parametrize("angle", [0.3, math.pi - 1e-3, math.pi + 1e-3, 5.0])
def test_axis_angle_is_continuous_through_pi(angle):
    axis = np.array([0.6, -0.8, 0.0])
    quat = np.concatenate([axis * math.sin(angle / 2), [math.cos(angle / 2)]])
    before = quat.copy()
    np.testing.assert_allclose(common.axis_angle(quat), axis * angle, atol=1e-9)
    assert np.array_equal(quat, before)


def test_axis_angle_of_no_rotation_is_zero():
    assert np.array_equal(common.axis_angle(np.array([0.0, 0.0, 0.0, 1.0])), np.zeros(3))


# ------------------------------------------------------------------------------------------------------------- surrogate
def oracle_velocity(target):
    """The velocity field of a point mass at `target` (B, H, D): every path leads straight there, so v = (x_t - a) / t."""
    return lambda index, x_t, t: (x_t - target[index]) / t[:, None, None]


def test_time_one_is_noise_and_the_error_of_the_true_field_is_zero():
    g = common.stream(0, "test")
    chunk, mask = torch.randn(3, 5, 7, generator=g), torch.ones(3, 5, dtype=torch.bool)
    draws = common.make_draws(3, 5, 7, 4, g)
    assert draws.t[:, 0].tolist() == [0.125, 0.375, 0.625, 0.875], "the paper's, sec. 3.2"
    assert common.surrogate_log_prob(oracle_velocity(chunk), chunk, draws, mask).abs().max() < 1e-9
    at_noise = []
    common.surrogate_log_prob(
        lambda i, x, t: at_noise.append(x) or x, chunk, dataclasses.replace(draws, t=torch.ones(4, 3)), mask
    )
    assert torch.equal(at_noise[0].view(4, 3, 5, 7), draws.eps)  # t = 1: all noise


def test_surrogate_equals_a_loop_written_from_the_definition():
    g = common.stream(1, "test")
    b, h, d, k = 2, 4, 9, 3
    chunk, weights = torch.randn(b, h, d, generator=g), torch.randn(d, d, generator=g)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    draws = common.make_draws(b, h, d, k, g, "beta")

    def velocity(index, x_t, t):
        return torch.tanh(x_t @ weights) * t[:, None, None] + index[:, None, None]

    for weight, w in {
        "velocity": lambda t: 1.0,
        "noise": lambda t: (1 - t) ** 2,
        "elbo": lambda t: (1 - t) / max(t, 0.05),
    }.items():
        ours = common.surrogate_log_prob(velocity, chunk, draws, mask, weight, real_dim=7)
        for row in range(b):
            total = 0.0
            for i in range(k):
                t = draws.t[i, row].item()
                x = t * draws.eps[i, row] + (1 - t) * chunk[row]
                v = torch.tanh(x @ weights) * t + row
                for step in range(h):
                    for dim in range(7):
                        u = draws.eps[i, row, step, dim] - chunk[row, step, dim]
                        total += w(t) * mask[row, step].item() * (v[step, dim] - u).item() ** 2 / k
            assert ours[row].item() == pytest.approx(-total, rel=1e-4)


def test_beta_draws_have_the_moments_of_openpi():
    t = common.make_draws(50_000, 1, 1, 2, common.stream(0, "t"), "beta").t
    assert t.min() > 0.0009 and t.max() <= 1.0
    assert t.mean().item() == pytest.approx(0.6 * 0.999 + 0.001, abs=0.003)  # Beta(1.5, 1): mean 3/5, variance 12/175
    assert t.var().item() == pytest.approx(12 / 175, abs=0.003)


def test_streams_depend_on_every_name_and_on_nothing_else():
    a = torch.randn(4, generator=common.stream(7, "x", 1))
    torch.manual_seed(123)
    torch.randn(10)
    assert torch.equal(a, torch.randn(4, generator=common.stream(7, "x", 1)))
    others = [common.stream(8, "x", 1), common.stream(7, "y", 1), common.stream(7, "x", 2), common.stream(7, "x", "1")]
    assert all(not torch.equal(a, torch.randn(4, generator=g)) for g in others)


# ------------------------------------------------------------------------------------------------------------ statistics
def test_wilson_against_published_values():
    assert stats.wilson(38, 50) == pytest.approx((0.626, 0.857), abs=5e-4)
    assert stats.wilson(450, 500) == pytest.approx((0.871, 0.923), abs=5e-4)
    assert stats.wilson(0, 0) == (0.0, 1.0)
    for n in range(1, 300):
        intervals = [stats.wilson(wins, n) for wins in range(n + 1)]
        assert all(low <= wins / n <= high for wins, (low, high) in enumerate(intervals))
        assert intervals[0][0] == 0 and intervals[n][1] == 1 and intervals[0][1] < 1


def test_mcnemar_against_the_binomial_sum():
    a = [True] * 35 + [False] * 25 + [True] * 100
    b = [False] * 35 + [True] * 25 + [True] * 100
    test = stats.mcnemar(a, b, range(160))
    tail = sum(math.comb(60, i) for i in range(26)) / 2**60
    assert (test["only_a"], test["only_b"]) == (35, 25) and test["p"] == pytest.approx(2 * tail)
    assert stats.mcnemar([True, False], [True, False], [0, 1])["p"] == 1.0 and test["deff"] == 1.0


def test_pairs_of_one_place_change_sign_together():
    """Against all assignments of signs to six places, whose pairs are three seeds."""
    g = np.random.default_rng(0)
    a, b, places = g.random(18) < 0.7, g.random(18) < 0.4, np.arange(18) % 6
    d = np.array([(a[places == i].astype(int) - b[places == i]).sum() for i in range(6)])
    sums = [abs((np.array(signs) * d).sum()) for signs in itertools.product((-1, 1), repeat=6)]
    assert stats.mcnemar(a, b, places)["p"] == pytest.approx(np.mean([s >= abs(d.sum()) for s in sums]))
    once = stats.mcnemar(a[:6], b[:6], places[:6])
    thrice = stats.mcnemar(np.tile(a[:6], 3), np.tile(b[:6], 3), places)  # the same episodes under three seeds: nothing new
    assert thrice["p"] == once["p"] and thrice["deff"] == pytest.approx(3, rel=0.2)
    assert stats.mcnemar(np.tile(a[:6], 3), np.tile(b[:6], 3), np.arange(18))["p"] < once["p"]


def test_seeds_that_agree_narrow_no_interval():
    """Against the one seed where all agree, and against scipy's interval of independent episodes where none has to."""
    g = np.random.default_rng(1)
    once, places = list(g.random(100) < 0.7), list(range(100))
    wins = sum(once)
    assert stats.design_effect(once, places) == 1.0 and stats.design_effect(once * 3, places * 3) == pytest.approx(3)
    assert stats.wilson(3 * wins, 300, 3.0) == pytest.approx(stats.wilson(wins, 100))
    assert stats.wilson(wins, 100) == pytest.approx(tuple(binomtest(wins, 100).proportion_ci(0.95, method="wilson")), abs=1e-6)
    assert stats.design_effect(list(g.random(3000) < 0.7), list(range(1000)) * 3) == pytest.approx(1, abs=0.1)
    assert stats.design_effect([1, 1], [0, 1]) == stats.design_effect([], []) == 1.0
    assert stats.design_effect([1] * 6, [0, 1, 2] * 2) == 2, "seeds that agree on everything are one"
    tasks = np.arange(300) % 10  # easy and hard ones, three independent seeds on thirty places each
    values = [list(g.random(300) < (1 + tasks) / 12) for _ in range(200)]
    assert np.mean([stats.design_effect(v, np.arange(300) % 100, list(tasks)) for v in values]) < 1.15
    assert np.mean([stats.design_effect(v, np.arange(300) % 100) for v in values]) > 1.3, "what tasks have in common"


def test_cluster_bootstrap_is_wider_than_wilson_when_tasks_differ():
    values, clusters = np.repeat([1.0, 0.0], 50), np.repeat(np.arange(10), 10)
    low, high = stats.cluster_bootstrap(values, clusters)
    wl, wh = stats.wilson(50, 100)
    assert low < wl - 0.1 and high > wh + 0.1  # ten tasks say less than a hundred episodes


# ---------------------------------------------------------------------------------------------------------------- config
@dataclasses.dataclass
class Config(common.RunConfig):
    steps: int = 3
    lr: float = 1e-3
    snapshots: list[int] = dataclasses.field(default_factory=list)


def load(tmp_path, text, *overrides):
    path = tmp_path / "exp.yaml"
    path.write_text(text)
    return common.load_config(Config, "sft", [str(path), *overrides])


def test_config_casts_by_type_and_command_line_wins(tmp_path):
    cfg = load(tmp_path, "seed: 7\nsft: {lr: 5e-5, steps: 1e2, snapshots: [1, 2]}\ndpo: {beta: 2}", "sft.steps=9", "dpo.beta=1")
    assert (cfg.name, cfg.seed, cfg.lr, cfg.steps, cfg.snapshots) == ("exp", 7, 5e-5, 9, [1, 2])


@pytest.mark.parametrize(
    "text, override, hint",
    [
        ("sft: {stesp: 3}", None, "did you mean 'steps'"),
        ("sed: 3", None, "did you mean 'seed'"),
        ("sft: {lr: fast}", None, "must be float"),
        ("sft: {lr: .nan}", None, "must be float"),
        ("sft: {steps: 1.5}", None, "must be int"),
        ("sft: {steps: true}", None, "must be int"),
        ("sft: [1]", None, "key: value"),
        ("- a", None, "key: value"),
        ("a: [", None, "not valid YAML"),
        ("", "steps", "not key=value"),
        ("", "sfft.steps=1", "no stage is called"),
        ("", "workers=two", "must be int"),
        ("", "tasks=[0,0]", "name each once"),
        ("suites: [libero_goal, libero_goal]", None, "name each once"),
    ],
)
def test_bad_config_is_one_line_that_names_the_key(tmp_path, text, override, hint):
    with pytest.raises(common.UserError, match=hint) as error:
        load(tmp_path, text, *([override] if override else []))
    assert "\n" not in str(error.value)


def test_a_backbones_section_holds_for_it_alone(tmp_path):
    text = "seed: 1\nsft: {steps: 5, lr: 1e-4}\npi05: {sft: {steps: 6}, execute: 3}\nopenvla: {sft: {steps: 7}, nonsense: 1}"
    cfg = load(tmp_path, text)
    assert (cfg.backbone, cfg.steps, cfg.lr, cfg.execute, cfg.seed) == ("pi05", 6, 1e-4, 3, 1)
    assert load(tmp_path, text, "sft.steps=8").steps == 8  # the command line wins
    with pytest.raises(common.UserError, match="nonsense"):
        load(tmp_path, text, "backbone=openvla")
    with pytest.raises(common.UserError, match="key: value"):
        load(tmp_path, "pi05: [1]")


def test_a_config_laid_over_another(tmp_path):
    (tmp_path / "below.yaml").write_text("seed: 1\nsft: {steps: 5, lr: 1e-4}\npi05: {sft: {lr: 2e-4}}")
    cfg = load(tmp_path, "base: below.yaml\nexecute: 2\nsft: {steps: 6}")
    assert (cfg.seed, cfg.steps, cfg.lr, cfg.execute, cfg.name) == (1, 6, 2e-4, 2, "exp")
    for base in ("exp.yaml", "[1]", "nowhere.yaml"):
        with pytest.raises(common.UserError, match=r"base|no config file"):
            load(tmp_path, f"base: {base}")


def test_missing_config_names_the_nearest():
    with pytest.raises(common.UserError, match="did you mean 'tiny'"):
        common.load_config(Config, "sft", ["configs/tinny.yaml"])


# ----------------------------------------------------------------------------------------------------------- run folders
def test_jsonl_survives_a_line_cut_short(tmp_path):
    path = tmp_path / "rows.jsonl"
    disk.append_jsonl(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"a": 2')
    assert disk.read_jsonl(path) == [{"a": 1}]
    disk.append_jsonl(path, {"a": 3})
    assert disk.read_jsonl(path) == [{"a": 1}, {"a": 3}]
    path.write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(common.UserError, match="damaged"):
        disk.read_jsonl(path)


def test_any_flipped_bit_in_rows_is_found_before_a_stage_is_done(tmp_path):
    """In a value, a key, the checksum itself; a line whose end is gone counts as cut short, and is made again."""
    stage = runs.open_stage("01_sft.py", Config(name="x", root=str(tmp_path)), tmp_path / "sft", "seed", [], [])
    path, rows = stage.dir / "metrics.jsonl", [{"step": 1, "loss": 0.25, "of": "a"}, {"step": 2, "loss": 1e-3, "of": "ä"}]
    for row in rows:
        disk.append_jsonl(path, row)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            try:
                assert disk.read_jsonl(path) == rows[:1] and at == len(whole) - 1
            except common.UserError as error:
                assert "is damaged" in str(error)
    path.write_bytes(whole[:-1])
    with pytest.raises(common.UserError, match="no end"):
        stage.finish()
    path.write_bytes(whole)
    stage.finish()
    assert disk.read_jsonl(path) == rows and path.read_text() == "".join(map(disk.plain_line, rows))


def test_a_sealed_file_is_whole_or_refused(tmp_path):
    path, content = tmp_path / "20-00.hdf5", bytes(range(5))
    disk.write_sealed(path, content)
    assert disk.read_sealed(path) == content
    whole = path.read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    for damaged in [*flipped, *(whole[:n] for n in range(len(whole))), whole + b"x"]:
        path.write_bytes(damaged)
        with pytest.raises(common.UserError, match=r"20-00\.hdf5 is damaged; remove it"):
            disk.read_sealed(path)


def test_a_flipped_bit_in_tensors_is_found_when_they_are_read_and_before_a_stage_is_done(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.ones(2, dtype=torch.bool), "c": torch.randn(4).bfloat16(), "d": torch.tensor(1)}
    stage = runs.open_stage("01_sft.py", Config(name="x", root=str(tmp_path)), tmp_path / "sft", "seed", [], [])
    path = stage.dir / "model-4.safetensors"
    disk.save_tensors(path, tensors)
    assert all(torch.equal(value, tensors[key]) for key, value in disk.load_tensors(path).items())
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")  # of the values
    for at in range(start, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(common.UserError, match=r"model-4\.safetensors (is damaged|cannot be read)"):
            disk.load_tensors(path)
    with pytest.raises(common.UserError, match="is damaged"):
        stage.finish()
    assert not (stage.dir / "done.json").exists()


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, capsys):
    for write, path in ((disk.append_jsonl, Path("/dev/full")), (disk.write_json, tmp_path / "no" / "such" / "folder.json")):
        with pytest.raises(common.UserError, match=f"{path} cannot be written") as error:
            write(path, {"a": 1})
        assert "\n" not in str(error.value)
    with pytest.raises(common.UserError, match=r"x\.safetensors cannot be written"):
        disk.save_tensors(tmp_path / "no" / "x.safetensors", {"x": torch.zeros(2)})
    with pytest.raises(SystemExit) as end:  # a library's own file
        common.run(lambda: Path("/dev/full").write_text("x"))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and "make room" in said and said.count("\n") == 1
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit):
        common.run(lambda: (tmp_path / "file" / "runs").mkdir())
    assert "Not a directory" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):  # any other is a mistake of the kit's, and shows where
        common.run(lambda: (tmp_path / "nowhere").read_text())


def test_source_hash_ignores_comments_and_docstrings_only(tmp_path):
    path = tmp_path / "a.py"
    versions = [
        'def f(x):\n    """Doc."""\n    return x + 1\n',
        '# a comment\ndef f(x):\n    """Other words."""\n\n    return (x + 1)  # why\n',
        "def f(x):\n    return x + 2\n",
    ]
    hashes = []
    for text in versions:
        path.write_text(text)
        hashes.append(runs.source_hash(path))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "PACKAGES", ("torch", "no-such-package"))
    with pytest.raises(common.UserError, match="no-such-package is not installed; run: pip install"):
        runs.open_stage("01_sft.py", Config(name="exp", root=str(tmp_path)), tmp_path / "exp" / "sft", "seed", [], [])
    assert not (tmp_path / "exp" / "sft").exists()


def test_stage_is_skipped_resumed_refused_and_redone(tmp_path, capsys):
    def cfg(**kwargs):
        return Config(name="exp", root=str(tmp_path), **kwargs)

    def open_stage(**kwargs):
        return runs.open_stage("01_sft.py", cfg(**kwargs), tmp_path / "exp" / "sft", "seed", [], ["backbones/pi05.py"])

    stage = open_stage()
    (stage.dir / "model.txt").write_text("half")
    with pytest.raises(common.UserError, match="another process"):
        open_stage()
    stage.lock.close()  # its owner has died
    stage = open_stage()
    assert (stage.dir / "model.txt").exists()  # goes on
    stage.finish(fact=1)
    assert open_stage() is None  # done
    assert open_stage(workers=7) is None  # workers never change a result
    with pytest.raises(common.UserError, match=r"config steps 3 -> 4.*overwrite=true"):
        open_stage(steps=4)
    assert (stage.dir / "model.txt").exists()
    assert open_stage(steps=4, overwrite=True) is not None
    assert not (stage.dir / "model.txt").exists() and not (stage.dir / "done.json").exists()


def test_an_edit_while_a_stage_runs_does_not_pass_for_one_version(tmp_path, monkeypatch):
    stage = runs.open_stage("01_sft.py", Config(root=str(tmp_path)), tmp_path / "s", "seed", [], ["backbones/pi05.py"])
    monkeypatch.setattr(runs, "source_hash", lambda path: "edited" if path.name == "pi05.py" else "")
    stage.identity["source"] = dict.fromkeys(stage.identity["source"], "")
    with pytest.raises(common.UserError, match=r"backbones/pi05\.py was edited"):
        stage.finish()
    assert not (tmp_path / "s" / "done.json").exists()


def test_files_that_no_stage_has_signed_are_not_removed(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "precious.hdf5").write_text("x")
    with pytest.raises(common.UserError, match="no stage has signed"):
        runs.open_stage("01_sft.py", Config(root=str(tmp_path)), tmp_path / "s", "seed", [], [])
    assert (tmp_path / "s" / "precious.hdf5").exists()


def test_what_was_made_from_an_older_input_is_refused(tmp_path):
    def made(name, inputs, **kwargs):
        cfg = Config(name="exp", root=str(tmp_path), overwrite=True, **kwargs)
        stage = runs.open_stage("01_sft.py", cfg, tmp_path / "exp" / name, "seed", [tmp_path / "exp" / i for i in inputs], [])
        stage.finish()

    made("sft", [])
    made("dpo", ["sft"])
    made("eval", ["sft", "dpo"])
    made("sft", [], steps=9)
    with pytest.raises(common.UserError, match="dpo was made from another sft"):
        made("eval", ["sft", "dpo"])
    weights = tmp_path / "model.safetensors"  # of a checkpoint, outside the run
    weights.write_bytes(b"one")
    made("dpo", [weights])
    made("eval", [weights, "dpo"])
    weights.write_bytes(b"another")
    with pytest.raises(common.UserError, match=r"dpo was made from another .*model\.safetensors"):
        made("eval", [weights, "dpo"])


def test_a_stages_folder_is_known_as_a_checkpoint_by_what_it_made(tmp_path):
    """Not by how long it took: weights that were trained again, bit for bit, are the same checkpoint."""
    made = runs.open_stage("01_sft.py", Config(name="x", root=str(tmp_path)), tmp_path / "x" / "sft", "seed", [], [])
    save_file({"weight": torch.zeros(1)}, made.dir / "model.safetensors")
    made.finish()
    (made.dir / "timing.json").write_text("{}")
    assert [path.name for path in runs.checkpoint_files(str(made.dir))] == ["model.safetensors"]
    (made.dir / "model.safetensors").unlink()
    with pytest.raises(common.UserError, match=r"holds no \.safetensors"):
        runs.checkpoint_files(str(made.dir))


def test_an_output_that_is_gone_is_noticed_and_the_remedy_helps(tmp_path):
    def made(name, inputs, **kwargs):
        cfg, folder = Config(name="exp", root=str(tmp_path), **kwargs), tmp_path / "exp" / name
        if stage := runs.open_stage("01_sft.py", cfg, folder, "seed", inputs, []):
            for file in ("model.bin", "videos/a.gif"):
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_text("x")
            stage.finish()
        return folder

    folder = made("sft", [])
    (folder / "videos" / "a.gif").unlink()  # nobody reads it
    made("dpo", [folder])
    (folder / "model.bin").unlink()
    with pytest.raises(common.UserError, match=r"model\.bin is missing; run 01_sft\.py again, with overwrite=true"):
        made("eval", [folder])
    with pytest.raises(common.UserError, match=r"model\.bin is missing; add overwrite=true"):
        made("sft", [])
    made("sft", [], overwrite=True)
    made("eval", [folder])


def test_done_json_lists_the_hash_of_every_file(tmp_path):
    stage = runs.open_stage("01_sft.py", Config(root=str(tmp_path)), tmp_path / "s", "seed", [], ["backbones/pi05.py"])
    (stage.dir / "a.txt").write_text("x")
    stage.finish()
    done = json.loads((tmp_path / "s" / "done.json").read_text())
    assert done["outputs"] == {"a.txt": disk.sha256(tmp_path / "s" / "a.txt")}


def test_missing_input_names_the_stage_to_run(tmp_path):
    with pytest.raises(common.UserError, match=r"python 01_sft\.py"):
        runs.require(tmp_path / "sft", "sft")


@pytest.mark.parametrize(
    "path", sorted(set((runs.HERE / "configs").glob("*.yaml")) - {runs.HERE / "configs" / "paper.yaml"}), ids=lambda p: p.stem
)
def test_every_config_is_one_for_every_stage(path):
    for section, script in runs.STAGES.items():
        cfg = common.load_config(importlib.import_module(script).Config, section, [str(path), "device=cpu"])
        assert cfg.name == ("tiny_grid" if path.stem == "tiny_exact" else path.stem)  # it adds to its run
