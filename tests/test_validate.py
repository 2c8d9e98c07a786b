"""The exact likelihood where the truth is known, the estimators against it, stage 07 from end to end.

pytest tests/test_validate.py
"""

import copy
import dataclasses
import gc
import importlib
import itertools
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from samples import FLOW_MODEL, INSTRUCTIONS
from scipy import stats
from torch.distributions import MultivariateNormal

import backbones
import common
from backbones import likelihood
from report import agreement
from runtime import HERE, disk
from runtime.config import load_config
from runtime.errors import UserError
from runtime.stage import execute

dpo, validate = importlib.import_module("03_dpo"), importlib.import_module("07_validate")


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    made = backbones.build("pi05", FLOW_MODEL, INSTRUCTIONS)
    unit = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
    made.norm_stats = {
        kind: {k: [v] * n for k, v in unit.items()} for kind, n in (("action", 7), ("state", 8))
    }
    with torch.no_grad():  # a field that bends: at its initialisation it is almost linear
        for name, p in made.expert.named_parameters():
            if "dense.weight" in name:
                p.normal_(std=0.3, generator=common.stream(0, name))
    return made.eval()


def some_pairs(n: int) -> dict:
    g = common.stream(0, "pairs")
    pairs = {
        c: torch.randint(0, 256, (n, 32, 32, 3), generator=g, dtype=torch.uint8)
        for c in ("agentview", "wrist")
    }
    pairs |= {c: torch.randn(n, 4, 7, generator=g) for c in ("chosen", "rejected")}
    pairs |= {"state": torch.randn(n, 8, generator=g), "mask": torch.arange(4).expand(n, 4) < 3}
    return pairs | {"instruction": [INSTRUCTIONS[i % 3] for i in range(n)]}


def in_float64(policy, prefix, chunk: torch.Tensor) -> tuple:  # copies of all three
    prefix = dataclasses.replace(prefix, keys=prefix.keys.double(), values=prefix.values.double())
    return copy.deepcopy(policy).double(), prefix, chunk.double()


def observations(pairs: dict) -> dict:
    return {key: pairs[key] for key in ("agentview", "wrist", "state", "instruction")}


def batch(n: int) -> tuple:
    """03's batch of n pairs: observations, chosen and rejected chunks, mask."""
    pairs = some_pairs(n)
    return dpo.batch_of(pairs | {"obs": observations(pairs)}, torch.arange(n))


def prefix_of(policy, n: int):
    with torch.no_grad():
        return policy.encode(observations(some_pairs(n)))


# -------------------------------------------------------------------------------------------- known densities
def gaussian_flow(mean: torch.Tensor, covariance: torch.Tensor) -> likelihood.Velocity:
    """E[eps - a | x_t] for a ~ N(mean, covariance) in closed form: a flow policy trained without error."""

    def velocity(x, t):
        at_t = (1 - t) ** 2 * covariance + t**2 * torch.eye(len(mean), dtype=mean.dtype)
        gain = (t * torch.eye(len(mean), dtype=mean.dtype) - (1 - t) * covariance) @ torch.linalg.inv(at_t)
        return ((x.flatten(1) - (1 - t) * mean) @ gain.T - mean).view_as(x)

    return velocity


def a_gaussian(dims: int, narrow: float):
    g = common.stream(0, "gaussian")
    basis = torch.linalg.qr(torch.randn(dims, dims, generator=g, dtype=torch.float64)).Q
    covariance = basis @ torch.diag(torch.linspace(narrow, 1, dims, dtype=torch.float64) ** 2) @ basis.T
    return torch.randn(dims, generator=g, dtype=torch.float64), (covariance + covariance.T) / 2


@pytest.mark.parametrize("solver", ["midpoint", "dopri5"])
def test_linear_gaussian_field_against_the_closed_form(solver):
    mean, covariance = a_gaussian(70, narrow=0.1)
    truth = MultivariateNormal(mean, covariance)
    torch.manual_seed(0)
    chunks = truth.sample((3,)).view(3, 10, 7)
    chunks = torch.cat([chunks, chunks + 0.2])  # some far from the data
    velocity, options = (
        gaussian_flow(mean, covariance),
        {} if solver == "midpoint" else {"rtol": 1e-7, "atol": 1e-7},
    )
    times = (
        likelihood.time_grid(80) if solver == "midpoint" else torch.tensor([0.0, 1.0], dtype=torch.float64)
    )
    found = likelihood.ode_log_prob(velocity, chunks, likelihood.exact_trace, times, solver, **options)
    assert (found - truth.log_prob(chunks.flatten(1))).abs().max() / 70 < 1e-4  # nats per dimension


def test_density_of_a_two_dimensional_mixture_integrates_to_one():
    means, sd = (
        torch.tensor([[-1.0, 0.3], [0.8, -0.6], [0.5, 1.0]]).double(),
        torch.tensor([0.3, 0.2, 0.45]).double(),
    )

    def velocity(x, t):  # (N, 1, 2): the components' fields, weighted by how likely each is at x
        var = (1 - t) ** 2 * sd**2 + t**2  # (3,)
        away = x - (1 - t) * means  # (N, 3, 2)
        weight = torch.softmax(-0.5 * away.square().sum(-1) / var - torch.log(var), dim=-1)
        field = (t - (1 - t) * sd**2)[:, None] / var[:, None] * away - means
        return (weight[..., None] * field).sum(1, keepdim=True)

    axis = torch.linspace(-3, 3, 61, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)[:, None]  # (N, 1, 2)
    found = likelihood.ode_log_prob(velocity, grid, likelihood.exact_trace, likelihood.time_grid(30)).exp()
    assert found.sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=0.01)
    parts = [
        MultivariateNormal(m, s**2 * torch.eye(2).double()).log_prob(grid[:, 0]).exp()
        for m, s in zip(means, sd, strict=True)
    ]
    assert (found - sum(parts) / 3).abs().max() < 0.01


def test_the_elbo_surrogate_is_the_log_likelihood_in_nats_for_a_perfect_field():
    """With the true field the bound is tight, so differences between chunks are those of log p."""
    mean, covariance = a_gaussian(7, narrow=0.4)
    field = gaussian_flow(mean, covariance)
    torch.manual_seed(1)
    chunks = (
        MultivariateNormal(mean, covariance).sample((2,)).view(2, 1, 7)
        * torch.tensor([1.0, 1.6])[:, None, None]
    )
    truth = MultivariateNormal(mean, covariance).log_prob(chunks.flatten(1))
    draws = common.make_draws(4000, 1, 7, 64, common.stream(0, "elbo"), "logsnr")
    times = draws.t[:, 0].double()

    def velocity(index, x, t):  # rows come as (K, B): one time for each K
        return torch.cat([field(rows, at) for rows, at in zip(x.double().chunk(64), times, strict=True)])

    mask, scores = torch.ones(4000, 1), []
    for chunk in chunks:
        many = chunk.float().expand(4000, 1, 7)
        error = common.flow_matching_error(velocity, many, draws, mask)
        scores.append(common.surrogate_log_prob(error, draws.t, "logsnr").mean())
    assert (scores[0] - scores[1]).item() == pytest.approx((truth[0] - truth[1]).item(), rel=0.03)


# ----------------------------------------------------------------------------------------- traces and the map
def test_hutchinson_with_a_full_basis_is_the_exact_trace_and_with_signs_is_unbiased(policy):
    velocity, x, t = (
        likelihood.velocity_of(policy, prefix_of(policy, 3)),
        torch.randn(3, 4, 7),
        torch.tensor(0.3),
    )
    v, exact = likelihood.exact_trace(velocity, x, t)
    basis = (torch.eye(28) * math.sqrt(28)).view(1, 28, 4, 7).expand(3, -1, -1, -1)
    torch.testing.assert_close(likelihood.hutchinson(basis)(velocity, x, t)[1], exact, atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        same_v, signs = zip(
            *(
                likelihood.hutchinson(likelihood.make_probes(3, 1, (4, 7), common.stream(0, "probe", i)))(
                    velocity, x, t
                )
                for i in range(200)
            ),
            strict=True,
        )
    torch.testing.assert_close(same_v[0], v)
    signs = torch.stack(signs)
    assert ((signs.mean(0) - exact).abs() < 4 * signs.std(0) / math.sqrt(200)).all() and signs.std() > 0
    numeric = [
        (velocity(x + 1e-2 * e, t) - velocity(x - 1e-2 * e, t)).mul(e).sum((1, 2)) / 2e-2
        for e in torch.eye(28).view(28, 4, 7)
    ]
    torch.testing.assert_close(torch.stack(numeric).sum(0), exact, atol=5e-3, rtol=1e-2)


def test_euler_density_against_the_determinant_of_the_whole_map(policy):
    _, prefix, noise = in_float64(policy, prefix_of(policy, 2), policy.noise(2, common.stream(0, "noise")))
    double = copy.deepcopy(policy).double()
    chunk, log_p = likelihood.euler_sample(likelihood.velocity_of(double, prefix), noise, steps=5)
    torch.testing.assert_close(
        chunk.float(), policy.sample_actions(prefix_of(policy, 2), noise.float(), steps=5), atol=1e-4, rtol=0
    )
    for row in range(2):
        velocity = likelihood.velocity_of(double, prefix.select(torch.tensor([row])))

        def whole_map(z, velocity=velocity):
            for i in range(5, 0, -1):
                z = z - velocity(z, torch.tensor(i / 5, dtype=torch.float64)) / 5
            return z

        j = torch.autograd.functional.jacobian(whole_map, noise[row : row + 1]).view(28, 28)
        brute = (
            -0.5 * (noise[row].square().sum() + 28 * math.log(2 * math.pi))
            - torch.linalg.slogdet(j).logabsdet
        )
        assert log_p[row].item() == pytest.approx(brute.item(), abs=1e-8)


def test_float64_and_float32_agree(policy):
    prefix, chunk = prefix_of(policy, 2), torch.randn(2, 4, 7)
    double, prefix64, chunk64 = in_float64(policy, prefix, chunk)
    grid = likelihood.time_grid(4)
    single = likelihood.ode_log_prob(
        likelihood.velocity_of(policy, prefix), chunk, likelihood.exact_trace, grid
    )
    precise = likelihood.ode_log_prob(
        likelihood.velocity_of(double, prefix64), chunk64, likelihood.exact_trace, grid
    )
    assert precise.dtype == torch.float64 and (single - precise).abs().max() < 1e-3


# ------------------------------------------------------------------------------------------------ DPO's log p
WITH_DORA = ("paper", "mirrored", "elbo", "independent")  # the exact likelihood is refused (tested below)


@pytest.mark.parametrize(
    ("kind", "surrogate"), [("lora", s) for s in common.SURROGATES] + [("dora", s) for s in WITH_DORA]
)
def test_margin_is_exactly_zero_at_the_reference_for_all_that_share_their_noise(policy, kind, surrogate):
    policy = copy.deepcopy(policy)
    common.attach_adapter(policy, kind, 4, 8, policy.adapter_targets, seed=1)
    cfg = dpo.Config(surrogate=surrogate, ode_steps=2)
    draws = dpo.draw(policy, cfg, 3, common.stream(0, "noise"))
    with policy.reference():
        ref_w, ref_l = dpo.score(policy, cfg, *batch(3), draws, (0, "reference"))
    pi_w, pi_l = dpo.score(policy, cfg, *batch(3), draws, (0, "policy"))
    _, rewards = dpo.dpo_loss(pi_w, pi_l, ref_w, ref_l, beta=100.0)
    assert pi_w.requires_grad and not ref_w.requires_grad
    assert torch.equal(rewards["rewards/margins"], torch.zeros(3)) != (surrogate == "independent")


def test_gradient_of_the_exact_log_prob_against_finite_differences(policy):
    double, prefix, chunk = in_float64(policy, prefix_of(policy, 2), torch.randn(2, 4, 7))
    probes = likelihood.make_probes(2, 1, (4, 7), common.stream(0, "probes")).double()

    def log_p() -> torch.Tensor:
        trace = likelihood.hutchinson(probes)
        return likelihood.ode_log_prob(
            likelihood.velocity_of(double, prefix), chunk, trace, likelihood.time_grid(3)
        ).sum()

    names = (
        "expert.layers.0.self_attn.q_proj.weight",
        "expert.layers.1.self_attn.v_proj.weight",
        "expert.layers.1.mlp.up_proj.weight",
    )
    for name in names:
        p = double.get_parameter(name)
        direction = torch.randn(p.shape, generator=common.stream(0, name), dtype=torch.float64)
        (grad,) = torch.autograd.grad(log_p(), p)
        with torch.no_grad():
            original = p.clone()
            ends = []
            for sign in (1, -1):
                p.copy_(original + sign * 1e-5 * direction)
                ends.append(log_p())
            p.copy_(original)
        assert (grad * direction).sum().item() == pytest.approx(
            ((ends[0] - ends[1]) / 2e-5).item(), rel=1e-5
        ), name


def test_independent_draws_move_with_every_term_and_shared_ones_do_not(policy):
    cfg, terms = dpo.Config(surrogate="independent"), ("policy", "reference", "policy")
    one, other, again = (dpo.score(policy, cfg, *batch(2), None, (0, term)) for term in terms)
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[0], again[0])  # killed and resumed equals undisturbed


def test_folders_of_variants_do_not_collide():
    variants = itertools.product(("lora", "dora"), ("branch", "episode"), common.SURROGATES, ("final", "750"))
    cfgs = [common.AdapterConfig(adapter=a, pairs=p, surrogate=s, start=t) for a, p, s, t in variants]
    names = {cfg.made_adapter.name for cfg in cfgs}
    assert len(names) == 2 * 2 * 5 * 2 and {"dpo-lora-branch-exact-at750", "dpo-lora-branch"} <= names
    assert len({validate.Config(pairs=cfg.pairs, start=cfg.start).folder for cfg in cfgs}) == 4
    cfg = dpo.Config(seed=43, start_seed=42)
    assert cfg.made_pairs.parent.name == "seed42" and cfg.folder.parent.name == "seed43"


def test_refusals():
    for bad in (
        "surrogate=exactly",
        "surrogate=exact adapter=dora",
        "backbone=openvla surrogate=exact",
        "surrogate=mirrored dpo.draws=3",
    ):
        with pytest.raises(UserError, match=r"surrogate"):
            load_config(dpo.Config, ["configs/micro.yaml", *bad.split()])


# --------------------------------------------------------------------------------------------------- stage 07
def test_common_random_numbers_lessen_the_noise_of_a_margin(policy):
    """The same pairs and estimator, under a policy and a slightly different one: only the sharing differs."""
    other, obs = copy.deepcopy(policy), observations(some_pairs(6))
    chunks = torch.stack([some_pairs(6)[key] for key in ("chosen", "rejected")], 1)
    with torch.no_grad():
        for name, p in other.expert.named_parameters():
            p += 0.02 * torch.randn(p.shape, generator=common.stream(0, name)) * p.std(correction=0)

        def scores(which):
            streams = [common.stream(0, "r", r) for r in range(16)]
            return torch.stack([validate.estimate(which, obs, chunks, "paper", 4, g)[0] for g in streams])

        new, ref = scores(other), scores(policy)
    shared, own = (agreement.quantity(new, ref, shared).var(0).mean() for shared in (True, False))
    assert shared < own / 10
    assert (agreement.quantity(ref, ref, True) == 0).all() and (
        agreement.quantity(ref, ref, False) != 0
    ).all()


def test_terms_that_do_not_share_come_from_four_different_repeats():
    powers = (10.0 ** torch.arange(4))[:, None, None].expand(4, 1, 2)  # repeat r is worth 10^r
    assert agreement.quantity(powers, powers, False)[0].item() == 1 - 1000 - (
        100 - 10
    )  # rolled by 0, 1, 2, 3


def test_metrics_of_an_estimator_that_is_right_but_for_scale_and_noise():
    g = common.stream(0, "metrics")
    truth = torch.randn(400, generator=g) * 10
    estimates = truth / 5 + 0.5 * torch.randn(8, 400, generator=g)
    found = agreement.compare(estimates, truth, np.arange(400))
    assert found["scale"][0] == pytest.approx(5, rel=0.05) and found["bias"][0] < 0.02
    value, low, high = found["noise"]
    expected = 0.25 / (truth.var().item() / 25)  # of these pairs
    assert low < expected < high and value == pytest.approx(expected, rel=0.1)
    x, y = estimates[0].double().numpy(), truth.double().numpy()
    for name, (value, low, high) in agreement.correlations(x, y, np.arange(400)).items():
        theirs = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[name](x, y).statistic
        assert low < value < high and value == pytest.approx(theirs, abs=1e-9)
    value, low, high = found["sign agreement"]
    assert low < value < high and value == pytest.approx(
        1 - math.atan(0.5 / 2) / math.pi, abs=0.03
    )  # of two correlated normals


def test_the_estimators_of_the_stage_are_those_of_training(policy):
    obs, chosen, rejected, _ = batch(2)
    both, whole = torch.stack([chosen, rejected], 1), torch.ones(2, 4, dtype=torch.bool)
    with torch.no_grad():
        g = common.stream(dpo.Config().seed, "dpo independent", "term", 0)
        got = [
            validate.estimate(policy, obs, c[:, None], "independent", 4, g)[0][:, 0]
            for c in (chosen, rejected)
        ]
        cfg = dpo.Config(surrogate="independent")
        want = dpo.independent_log_probs(policy, cfg, obs, chosen, rejected, whole, ("term",))
        torch.testing.assert_close(tuple(got), want, atol=1e-4, rtol=1e-5)
        for name, (scheme, weight) in validate.ESTIMATORS.items():
            if name == "independent":  # 07 scores both chunks at once; a margin's terms are different repeats
                continue
            got, _ = validate.estimate(policy, obs, both, name, 4, common.stream(0, "d"))
            draws = policy.draws(2, 4, common.stream(0, "d"), scheme)
            want = dpo.log_probs(policy, obs, chosen, rejected, whole, draws, weight)
            torch.testing.assert_close(got, torch.stack(want, 1), atol=1e-4, rtol=1e-5)


@pytest.fixture(scope="module")
def run(policy, tmp_path_factory):
    """A run folder: an SFT policy and pairs that nobody had to train or collect, and DPO policies on them."""
    keys = {
        "pairs": "episode",
        "steps": 2,
        "batch_size": 2,
        "rank": 2,
        "alpha": 4,
        "warmup": 0,
        "ode_steps": 2,
    }
    root = str(tmp_path_factory.mktemp("runs"))
    cfg = dpo.Config(name="x", root=root, checkpoint_every=1, lr=1e-2, **keys)
    sft, prefs, pairs = cfg.seed_dir / "sft", cfg.made_pairs, some_pairs(5)
    policy.save(sft)
    prefs.mkdir()
    disk.write_rows(prefs / "pairs.jsonl", [{"instruction": i} for i in pairs.pop("instruction")])
    disk.save_tensors(prefs / "pairs.safetensors", pairs)
    for folder, inputs in ((sft, {}), (prefs, {"pi05/seed42/sft": "sft"})):
        done = {"stage": folder.name, "inputs": inputs, "fingerprint": folder.name}
        disk.write_json(folder / "done.json", done)
    for surrogate in ("paper", "independent", "exact"):
        execute(dpo.main, dataclasses.replace(cfg, surrogate=surrogate))
    return cfg


def test_the_first_step_of_dpo_is_at_the_reference(run):
    """Policy and reference are one policy there: with shared noise the margin is 0 and the loss log 2."""
    for surrogate in ("paper", "exact", "independent"):
        first = disk.read_jsonl(dataclasses.replace(run, surrogate=surrogate).folder / "metrics.jsonl")[0]
        at_reference = first["rewards/margins"] == first["rewards/margin_std"] == 0
        assert first["step"] == 1 and at_reference == (surrogate != "independent")
        assert surrogate == "independent" or first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_dpo_on_the_exact_likelihood_resumes_where_it_was(run, tmp_path, monkeypatch):
    for surrogate in ("exact", "independent"):
        cfg = dataclasses.replace(run, surrogate=surrogate)
        whole = disk.load_tensors(cfg.folder / "adapter_model.safetensors")
        cfg.folder.rename(tmp_path / surrogate)
        steps = iter(range(3))

        def stop_after_one(*arguments, steps=steps, dpo_loss=dpo.dpo_loss):
            if next(steps) == 1:
                raise KeyboardInterrupt
            return dpo_loss(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(dpo, "dpo_loss", stop_after_one)
            execute(dpo.main, cfg)
        gc.collect()  # the folder's lock
        execute(dpo.main, cfg)
        again = disk.load_tensors(cfg.folder / "adapter_model.safetensors")
        assert again.keys() == whole.keys() and all(torch.equal(again[k], whole[k]) for k in whole)


def test_draws_that_are_no_power_of_two_would_have_no_row():
    with pytest.raises(UserError, match="max_draws=100 must be a power of 2"):
        validate.Config(max_draws=100).inputs()


def test_stage_07_from_end_to_end_killed_and_resumed(run, monkeypatch, capsys):
    sizes = {"max_draws": 4, "ode_steps": 2, "gradient_batches": 1, "gradient_probes": 2}
    cfg = validate.Config(name=run.name, root=run.root, pairs=run.pairs, workers=1, n_pairs=4, **sizes)
    folder, save, saved = cfg.folder, disk.save_tensors, []

    def killed(path, tensors):
        if len(saved) == 1:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(disk, "save_tensors", killed)
        validate.validate(cfg)
    gc.collect()
    validate.validate(cfg)
    assert len(saved) == 1 and not (folder / "parts").exists()
    first = disk.read_json(folder / "done.json")["outputs"]
    assert set(first) == {"measures.safetensors", "gradients.jsonl"}
    validate.validate(dataclasses.replace(cfg, overwrite=True))
    assert "already done" in capsys.readouterr().out
    shutil.rmtree(folder)
    validate.validate(dataclasses.replace(cfg, workers=2))
    assert disk.read_json(folder / "done.json")["outputs"] == first

    measures = disk.load_tensors(folder / "measures.safetensors")
    exact = measures["dpo-lora-episode|exact"]
    assert exact.shape == (4, 2) and measures["sft|mirrored/4"].shape == (4, 4, 2)
    rows = disk.read_json(folder.with_suffix(".json"))
    margin = [
        r
        for r in rows
        if r.get("quantity") == "margin" and r["metric"] == "pearson" and r["surrogate"] == "paper"
    ]
    row = next(r for r in margin if r["policy"] == "dpo-lora-episode" and r["draws"] == 4 and r["shared"])
    theirs = [measures[f"{policy}|paper/4"][0] for policy in ("dpo-lora-episode", "sft")]
    surrogate = (theirs[0] - theirs[1])[:, 0] - (theirs[0] - theirs[1])[:, 1]
    truth = (exact - measures["sft|exact"])[:, 0] - (exact - measures["sft|exact"])[:, 1]
    assert row["value"] == pytest.approx(np.corrcoef(surrogate, truth)[0, 1], abs=1e-5)
    (positive,) = (
        r
        for r in rows
        if (r["metric"], r.get("quantity"), r.get("policy")) == ("positive", "margin", "dpo-lora-episode")
    )
    assert positive["value"] == (truth > 0).float().mean() and positive["n"] == 4
    cosine = [r for r in rows if r["metric"] == "gradient cosine"]
    assert {r["state"] for r in cosine} == {"start", "end"} and all(
        -1.001 <= r["value"] <= 1.001 for r in cosine
    )
    of_state = [[r["value"] for r in cosine if r["state"] == state] for state in ("start", "end")]
    assert of_state[0] != of_state[1], "at the start the adapter is an identity"
    text = folder.with_suffix(".md").read_text()
    assert "| paper | 4 | yes |" in text and "| paper, one time | 4 | yes |" in text
    assert "| always positive |" in text and "| the better constant guess |" in text
    assert "not measured: the noise behind the chunks is not known" in text, "these are episode pairs"


def test_the_gradient_of_dpo_by_hand():
    """Scores that are linear in the weights: d loss = - mean of beta sigmoid(-margin) (chosen - rejected)."""

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))

        reference = staticmethod(torch.no_grad)

    policy, beta, x = Linear(), 0.7, torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    start = torch.tensor([-0.4, 0.6, 0.1])  # the reference's weights
    got = validate.dpo_gradient(policy, lambda term: x @ (policy.w if term == "policy" else start), beta)
    apart = x[:, 0] - x[:, 1]  # (5, 3)
    margin = beta * apart @ (policy.w.detach() - start)
    torch.testing.assert_close(got, -(beta * torch.sigmoid(-margin)[:, None] * apart).mean(0))


@pytest.mark.parametrize("n", [3, 8, 15, 20, 31, 88, 189])
def test_gradient_batches_are_spread_over_all_pairs(n):
    """Pairs come sorted by task. Batches of the first 16 pairs were all of one task once."""
    batches = validate.spread(n, 2)
    assert len(batches) == (1 if n < 16 else 2)
    assert len({i for batch in batches for i in batch}) == sum(map(len, batches)), "a pair stands in two"
    for batch in batches:
        assert len(batch) == min(8, n)
        gaps = np.diff([-1, *batch, n])
        assert gaps.max() <= 1 + n / 8 and batch == sorted(batch), batch


def test_torchrun_and_a_gpu_are_refused(run, monkeypatch):
    with pytest.raises(UserError, match="set device=cpu"):
        validate.Config(device="cuda", dry_run=True).inputs()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="not with torchrun"):
        validate.validate(validate.Config())


def test_an_autoregressive_policy_is_exact_already(tmp_path, capsys):
    validate.validate(validate.Config(backbone="openvla", root=str(tmp_path)))
    assert "closed form" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_margins_are_those_of_held_out_pairs_with_those_of_trained_ones_beside_them():
    attempt = np.array([0, 0, 1, 2, 3, 4])  # held_out=2: attempts 0, 2 and 4
    margins = torch.tensor([1.0, -3, 5, -2, 7, 6])
    sft = {"exact": torch.zeros(6, 2)}
    measures = {"sft": sft, "dpo": {"exact": torch.stack([margins, torch.zeros(6)], 1)}}
    rows = list(agreement.base_rates(validate.Config(held_out=2), measures, attempt))
    found = {(r["policy"], r["quantity"], r["metric"]): r for r in rows}
    held, trained = ("dpo", "margin"), ("dpo", "margin of trained pairs")
    assert (
        found[*held, "mean"]["value"] == pytest.approx((1 - 3 - 2 + 6) / 4) and found[*held, "mean"]["n"] == 4
    )
    assert found[*held, "positive"]["value"] == 0.5 and found[*trained, "positive"]["value"] == 1
    assert found[*trained, "mean"]["value"] == 6 and found[*trained, "mean"]["n"] == 2
    assert found["dpo", "difference", "mean"]["n"] == 6
    of_attempts = [0.5 + (total - 0.5 * n) / (4 / 3) for total, n in ((-2, 2), (-2, 1), (6, 1))]
    interval = stats.ttest_1samp(of_attempts, 0).confidence_interval()
    assert found[*held, "mean"]["ci95"] == pytest.approx(list(interval))
    none = list(agreement.base_rates(validate.Config(), measures, attempt))
    assert {r["quantity"] for r in none} == {"difference", "margin"} and {r["n"] for r in none} == {6}


def test_only_policies_that_were_trained_with_as_many_pairs_held_out_are_measured(tmp_path):
    (given := tmp_path / "given").mkdir()
    (given / "pairs.jsonl").write_text("")
    cfg = validate.Config(root=str(tmp_path), name="x", held_out=2, pairs_from=str(given))
    pairs = {str(given / "pairs.jsonl"): "its hash"}
    for name, its, inputs in (
        ("dpo-a", {}, pairs),
        ("dpo-b", {"held_out": 2}, pairs),
        ("dpo-c", {"held_out": 5}, pairs),
        ("dpo-of-other-pairs", {"held_out": 2}, {"pi05/seed42/prefs-branch": "a"}),
        ("dpo-on-black-images", {"held_out": 2, "blank_images": True}, pairs),
    ):
        (cfg.seed_dir / name).mkdir(parents=True)
        config = {"pairs": cfg.pairs, "start": cfg.start} | its
        disk.write_json(cfg.seed_dir / name / "done.json", {"config": config, "inputs": inputs})
    assert [*cfg.dpo_folders()] == ["dpo-b"]
    assert [*dataclasses.replace(cfg, held_out=0).dpo_folders()] == ["dpo-a"]


def test_an_adapter_whose_pairs_nobody_knows_has_no_held_out_ones(tmp_path):
    given = shutil.copytree(HERE / "checkpoints/try/pi05", tmp_path / "given")
    cfg = validate.Config(
        root=str(tmp_path),
        checkpoint=str(given / "sft"),
        pairs_from=str(given / "prefs"),
        adapters_from=str(given),
    )
    assert cfg.inputs()
    with pytest.raises(UserError, match="trained on these pairs; set pairs_from="):
        dataclasses.replace(cfg, held_out=2).inputs()
    hashes = {path.name: disk.sha256(path) for path in (given / "prefs").iterdir()}
    config = {"pairs": "branch", "surrogate": "paper", "held_out": 2}
    outputs = {path.name: "" for path in (given / "lora").iterdir()}
    done = {"stage": "03_dpo", "fingerprint": "", "inputs": hashes, "config": config, "outputs": outputs}
    disk.write_json(given / "lora" / "done.json", done)
    assert dataclasses.replace(cfg, held_out=2).inputs()


def test_one_pair_is_too_few_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "load_pairs", lambda cfg: {"chunks": torch.zeros(1, 2, 10, 7)})
    run = SimpleNamespace(dir=tmp_path)
    with pytest.raises(UserError, match="a single pair"):
        validate.main(validate.Config(adapters_from=str(tmp_path)), run)


def test_one_time_is_any_time(tmp_path, monkeypatch):
    """The table takes some figures from the first of the estimates at one time each."""
    pairs = HERE / "checkpoints" / "try" / "pi05" / "prefs"
    argv = ["configs/try.yaml", f"root={tmp_path}", f"pairs_from={pairs}", "validate.max_draws=8"]
    cfg = load_config(validate.Config, [*argv, "validate.ode_steps=1"])

    def measured(name: str) -> torch.Tensor:
        validate.measure((cfg, tmp_path / name, [0, 1], None))
        return disk.load_tensors(tmp_path / name)["by_time"]

    ours, randperm = measured("ours"), torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
    ascending = measured("ascending")
    order = randperm(8, generator=common.stream(cfg.seed, "one time", 8, 0))
    assert order.tolist() != [*range(8)] and torch.equal(ours, ascending[order])


def test_what_acts_is_compared_over_the_pairs_whose_noise_is_known():
    acts = torch.tensor([3.0, -1, 2, 5, float("nan"), 4, -6])  # difference of chosen and rejected
    sft = {"euler": torch.stack([acts, torch.zeros(7)], 1)}
    flow = torch.stack([torch.where(acts.isnan(), 9, acts.exp() - 2), torch.zeros(7)], 1)  # same order
    sft |= {"exact": flow, "paper/4": -flow.expand(4, 7, 2)}
    rows = list(agreement.against_what_acts(validate.Config(), sft, np.arange(7)))
    found = {(row["surrogate"], row["metric"]): row for row in rows}
    assert {row["n"] for row in rows} == {6}
    assert found["exact", "spearman"]["value"] == pytest.approx(1)
    assert found["paper", "spearman"]["value"] == pytest.approx(-1)
    assert found["exact", "sign agreement"]["value"] == 1 and found["paper", "sign agreement"]["value"] == 0
    assert found["always positive", "sign agreement"]["value"] == pytest.approx(4 / 6)
    known = acts[~acts.isnan()]
    assert found["exact", "spread"]["value"] == pytest.approx(
        (known - known.exp() + 2).std().item(), rel=1e-5
    )
    text = agreement.acting_table(rows)
    assert "| always positive | 0 |  | 0.667" in text
    none = sft | {"euler": torch.full((7, 2), math.nan)}
    assert list(agreement.against_what_acts(validate.Config(), none, np.arange(7))) == []


def test_noise_of_draws_that_are_not_shared_is_that_of_independent_ones():
    g, n, repeats = common.stream(0, "unshared"), 2000, 4
    truth, both = (
        torch.randn(n, 2, generator=g),
        3 * torch.randn(repeats, n, 1, generator=g),
    )  # a draw's error, of both chunks
    scores = truth + both + 0.3 * torch.randn(repeats, n, 2, generator=g)
    exactly = truth[:, 0] - truth[:, 1]
    own, shared = (agreement.quantity(scores, None, each) for each in (False, True))
    value, low, high = agreement.compare(own, exactly, np.arange(n), shared)["noise"]
    expected = 2 * (9 + 0.09) / exactly.var().item()
    assert low < expected < high and value == pytest.approx(expected, rel=0.1)
    assert agreement.compare(shared, exactly, np.arange(n))["noise"][0] == pytest.approx(
        0.01 * expected * 9 / 9.09, rel=0.1
    )
    bias = agreement.compare(own, exactly, np.arange(n), shared)["bias"][0]
    assert bias < 0.01, "the estimator is right but for its noise"


def test_noise_without_signal_is_100_and_with_signal_its_ratio():
    g = common.stream(0, "no signal")
    truth = torch.randn(400, generator=g)
    pure = torch.randn(4, 400, generator=g)
    pure = pure - pure.mean(0)  # the repeats' mean says nothing at all
    assert agreement.compare(pure, truth, np.arange(400))["noise"] == (pytest.approx(100), None, None)
    seen = 2 * truth + 0.5 * torch.randn(4, 400, generator=g)
    assert agreement.compare(seen, truth, np.arange(400))["noise"][0] == pytest.approx(
        0.25 / (4 * float(truth.var())), rel=0.1
    )
