"""Setting and verdict: planted outcomes get the verdict that they must, committed numbers decide.

pytest tests/test_claims.py
"""

import copy
import importlib
import shutil
from dataclasses import asdict, fields

import numpy as np
import pytest
import yaml
from scipy import stats as scipys

from report import claims, page, power, stats, tables
from runtime import disk
from runtime.config import HERE, load_config
from runtime.errors import UserError

PAPER = yaml.safe_load((HERE / "configs" / "paper.yaml").read_bytes())
CLAIMS = {claim["id"]: claim for claim in PAPER["claims"]}
ALSO = {claim["id"]: claim for claim in PAPER["also"]}
SUITES = ["libero_spatial", "libero_object", "libero_goal", "libero_10"]


# ------------------------------------------------------------------------------------------ committed results
@pytest.mark.parametrize("claim", [*PAPER["claims"], *PAPER["also"]], ids=lambda claim: claim["id"])
def test_a_claim_is_complete_and_its_figures_are_in_the_files_it_names(claim):
    row = claims.judged(claim, PAPER)
    assert row["verdict"] in page.PILLS and not {"verdict", "setting", "why", "holds"} & claim.keys()
    if claim["id"] in CLAIMS:
        assert all(row[key] for key in ("section", "line", "quote", "claim", "paper", "logs"))
        assert row["setting"] in ("same", "analogue", "different", "by construction", "not run")
        assert (row["setting"] == "not run") == ("ours" not in claim) == (row["verdict"] == "not run")
        assert (row["setting"] == "different") == (row["verdict"] == "not judged") == bool(row["would"])
        assert 130 < claim["line"] < 480
    if "new" in claim.get("ours", {}):
        lists = [claim["ours"][key] for key in ("new", "base", "trainings") if key in claim["ours"]]
        assert len({np.size(each) for each in lists}) == 1, "a file without its partner would be left out"
        assert float(row["detectable"]) > 0 and bool(row["power"]) == bool(claim.get("effect"))


def test_settings_and_verdicts_of_the_committed_results():
    rows = {name: claims.judged(claim, PAPER) for name, claim in {**CLAIMS, **ALSO}.items()}
    settings = {name: row["setting"] for name, row in rows.items()}
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert settings["interface"] == verdicts["interface"] == "by construction"
    assert (settings["adapter-size"], settings["denoise-share"]) == ("same", "same")
    for name in (
        "dora-mean",
        "dora-object",
        "dora-long",
        "dora-goal",
        "dora-spatial",
        "dora-lora",
        "flow-dpo",
    ):
        assert (settings[name], rows[name]["would"], rows[name]["scale"]) == (
            "different",
            "inconclusive",
            "toy",
        )
    for name in ("flow-dpo-episode", "flow-dpo-stable", "chunk-cache"):
        assert (settings[name], rows[name]["would"]) == ("different", "inconclusive")
    for name in ("surrogate-tracks", "prefix-cache", "retrieval"):
        assert (settings[name], verdicts[name], rows[name]["scale"]) == ("analogue", "supported", "toy")
    assert verdicts["early"] == "supported" and "over 6 trainings" in rows["early"]["here"]
    assert verdicts["early-contrast"] == verdicts["contrast"] == verdicts["long"] == "inconclusive"


def test_numbers_of_the_statistician():
    """Recomputed from the committed files: the figures that the evidence was weighed by."""
    rows = {name: claims.judged(claim, PAPER) for name, claim in {**CLAIMS, **ALSO}.items()}
    assert [rows[f"dora-{name}"]["power"] for name in ("object", "goal", "spatial")] == ["100%", "40%", "9%"]
    assert rows["dora-object"]["detectable"] == "12.5"
    assert "+5.0 points (-2.7 to +12.6), 35 gained and 25 lost" in rows["dora-mean"]["logs"]
    assert "+14.0 points (-2.6 to +29.5)" in rows["dora-object"]["logs"]
    assert "-0.8 points (-2.4 to +0.7) over 3 trainings" in rows["flow-dpo"]["here"]
    assert "+1.1 points (-1.4 to +3.6) over 3 trainings" in rows["dora-lora"]["here"]
    assert "-8.7 points (-23.2 to +5.9) over 3 trainings" in rows["long"]["here"]
    assert "+13.8 points (+7.8 to +19.8)" in rows["early"]["here"]
    assert "+5.0 points (-3.0 to +12.8)" in rows["early-contrast"]["here"]
    validate = disk.read_json(HERE / "results" / "validate" / "table.json")
    (spearman,) = [
        row["value"]
        for row in validate
        if (row.get("metric"), row.get("quantity"), row.get("policy")) == ("spearman", "log p", "sft")
        and (row["surrogate"], row["draws"]) == ("paper", 64)
    ]
    text = (HERE / "results/validate/README.md").read_text()
    assert f"| ... more draws | 64 | {spearman:.2f} (0.67 to 0.79) |" in text and f"{spearman:.2f}" == "0.73"
    anchor = [
        disk.read_jsonl(HERE / f"results/tiny_4suite/{place}.jsonl")
        for place in ("anchor_alone/episodes/eval-dpo-lora-branch", "anchor_alone/episodes/eval-sft")
    ]
    of = claims.episodes.paired
    p = [of(*([r for r in side if r["suite"] == s] for side in anchor))["p_vs_sft"] for s in SUITES]
    corrected = stats.holm([*p, of(*anchor)["p_vs_sft"]])
    assert corrected[3] == pytest.approx(0.0548, abs=2e-4)
    assert "0.055" in (HERE / "results/tiny_4suite/anchor_alone/README.md").read_text()


def test_one_committed_number_decides(tmp_path, monkeypatch):
    """The share of the denoising loop, and one episode after another of the cache that breaks the policy."""
    shutil.copytree(HERE / "results" / "profile", tmp_path / "profile")
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    table = tmp_path / "profile" / "h100" / "table.json"
    assert claims.judged(CLAIMS["denoise-share"], PAPER)["verdict"] == "supported"
    rows = disk.read_json(table)
    next(row for row in rows if row["metric"] == "denoise_share")["value"] = 0.70
    disk.write_json(table, rows)
    assert claims.judged(CLAIMS["denoise-share"], PAPER)["verdict"] == "contradicted"
    assert claims.judged(CLAIMS["prefix-cache"], PAPER)["verdict"] == "supported"
    file = tmp_path / CLAIMS["prefix-cache"]["ours"]["new"]
    disk.write_rows(file, [row | {"success": True} for row in disk.read_jsonl(file)])
    assert claims.judged(CLAIMS["prefix-cache"], PAPER)["verdict"] == "inconclusive", (
        "50 episodes exclude little"
    )


# ------------------------------------------------------------------------------ the paper's settings are here
def test_every_number_of_the_papers_configs_is_the_papers():
    own = {"prefs.max_playouts", "noise_scale"}  # a budget; and what text and logs disagree about
    for name in ("openvla_7b", "pi05"):
        config = yaml.safe_load((HERE / "configs" / f"{name}.yaml").read_text())
        flat = {
            f"{key}.{k}" if isinstance(value, dict) else key: v
            for key, value in config.items()
            for k, v in (value.items() if isinstance(value, dict) else [(key, value)])
        }
        flat[f"execute.{config['backbone']}"] = flat.pop("execute")
        numbers = {
            key: float(value)
            for key, value in flat.items()
            if not isinstance(value, bool | list)
            and str(value).replace("e-", "").replace(".", "").isdecimal()
        }
        assert {"dpo.batch_size", "dpo.steps", "dpo.warmup", "dpo.sft_coef", "dpo.lr"} <= numbers.keys()
        for key in numbers.keys() - own:
            value, source = PAPER["settings"][key]
            assert numbers[key] == value and source, key


def of_config(name: str, *arguments: str) -> dict:
    """The config of 03 as configs.json has it."""
    dpo = importlib.import_module("03_dpo")
    cfg = load_config(dpo.Config, [str(HERE / "configs" / name), "--dry-run", *arguments])
    return {key: value for key, value in asdict(cfg).items() if key in {field.name for field in fields(cfg)}}


@pytest.mark.parametrize(
    ("change", "label", "words"),
    [
        ("", "same", ""),
        (
            "dpo.batch_size=8",
            "different",
            "pairs seen 4000 (paper: 500); visits to a pair 36.36 (paper: 4.545)",
        ),
        ("dpo.sft_coef=0.25", "different", "sft_coef 0.25 (paper: 0)"),
        ("dpo.contrast=0.4", "different", "contrast 0.4 (paper: 1)"),
        ("dpo.lr=1e-4", "same", ""),
        ("dpo.lr=1.1e-4", "different", "lr 0.00011 (paper: 5e-05)"),
        ("pairs=branch", "different", "pairs branch (paper: episode)"),
        ("dpo.beta=auto", "different", "beta auto (paper: 0.1)"),
        ("adapter=lora", "different", "adapter lora (paper: dora)"),
        ("suites=[libero_goal]", "different", "suites libero_goal (paper: libero_object)"),
    ],
)
def test_a_changed_key_of_a_committed_config_changes_the_setting(change, label, words):
    claim = CLAIMS["dora-object"]
    config = of_config("openvla_7b.yaml", "adapter=dora", *filter(None, [change]))
    stated = claims.paper_facts(claim, PAPER)
    for size, scale in ((7.5e9, ""), (1.05e6, "toy")):
        found = claims.setting(claim, stated, claims.dpo_facts(config, 110) | {"parameters": size})
        assert found == ("analogue" if scale and label == "same" else label, words, scale)


def test_visits_to_a_pair_count():
    claim, config = CLAIMS["dora-object"], of_config("openvla_7b.yaml", "adapter=dora")
    for pairs, label in ((60, "same"), (54, "different"), (220, "same"), (230, "different")):
        facts = claims.dpo_facts(config, pairs) | {"parameters": 7.5e9}
        assert claims.setting(claim, claims.paper_facts(claim, PAPER), facts)[0] == label, pairs


def test_the_card_says_toy_where_the_claim_is_one_of_a_toy():
    rows = {name: claims.judged(claim, PAPER) for name, claim in CLAIMS.items()}
    for entry in PAPER["card"]:
        if entry.get("row") in rows:
            assert ("toy" in entry["scope"]) == (rows[entry["row"]]["scale"] == "toy"), entry


def test_a_fact_that_is_not_recorded_is_an_error():
    with pytest.raises(UserError, match="do not record draws"):
        claims.setting(CLAIMS["surrogate-tracks"], {"draws": 4}, {"backbone": "pi05"})


# ------------------------------------------------------------------------------------------- planted outcomes
def plant(folder, gains: list[float], base: float = 0.5, n: int = 200, margin: float = 1.0) -> dict:
    """An experiment at the paper's settings but its size, a training for each gain; and its claim."""
    (folder / "x" / "training").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for seed, gain in enumerate(gains):
        own = []
        for i in range(n):
            place = {
                "suite": "libero_object",
                "task": i % 10,
                "init_state": i // 10,
                "seed": seed,
                "steps": 9,
            }
            own.append(place | {"crash": "", "success": bool(rng.random() < base)})
        fail = [i for i, row in enumerate(own) if row["success"] == (gain < 0)]
        changed = set(fail[: round(abs(gain) * n)])
        new = [row | {"success": row["success"] ^ (i in changed)} for i, row in enumerate(own)]
        for name, rows in (("sft", own), ("dpo-lora-episode", new)):
            path = folder / "x" / f"{name}.jsonl"
            disk.write_rows(path, [*(disk.read_jsonl(path) if path.is_file() else []), *rows])
        disk.write_rows(
            folder / "x" / "training" / f"dpo-lora-episode-seed{seed}.jsonl",
            [{"rewards/margins": margin}] * 4,
        )
        units = [{"pairs": [{}] * 10}] * 11
        disk.write_rows(folder / "x" / "training" / f"prefs-episode-units-seed{seed}.jsonl", units)
    config = of_config("pi05.yaml", "adapter=lora", "suites=[libero_object]") | {"parameters": 1.8e6}
    disk.write_json(folder / "x" / "configs.json", {"dpo-lora-episode": config})
    claim = {"id": "x", "kind": "gain", "effect": 0.10, "dpo": True}
    claim["paper_setting"] = {
        "backbone": "pi05",
        "adapter": "lora",
        "suites": ["libero_object"],
        "parameters": 3.4e9,
    }
    ours = {
        "folder": "x",
        "config": "dpo-lora-episode",
        "new": "x/dpo-lora-episode.jsonl",
        "base": "x/sft.jsonl",
    }
    return claim | {"ours": ours}


@pytest.mark.parametrize(
    ("kind", "effect", "gains", "margin", "verdict"),
    [
        ("gain", 0.10, [0.10, 0.12, 0.09, 0.11], 1.0, "supported"),
        ("gain", 0.10, [0.0, 0.01, -0.01, 0.005], 1.0, "contradicted"),
        ("gain", 0.10, [0.0, 0.01, -0.01, 0.005], 0.1, "inconclusive"),  # the treatment was not delivered
        ("gain", 0.01, [0.0, 0.01, -0.01, 0.005], 1.0, "inconclusive"),  # no power for so small an effect
        ("gain", 0.10, [-0.2, 0.2, 0.0, 0.1], 1.0, "inconclusive"),
        ("gain", 0.10, [0.15], 1.0, "supported"),  # one training: by init state
        (
            "gain",
            0.10,
            [0.02],
            1.0,
            "inconclusive",
        ),  # 4 gained, none lost: the upper limit is below half of 0.10
        ("loss", 0.10, [-0.10, -0.12, -0.09], 1.0, "supported"),
        ("loss", 0.10, [0.10, 0.12, 0.09], 1.0, "contradicted"),
        ("equivalent", None, [0.0, 0.01, -0.01], 1.0, "supported"),
        ("equivalent", None, [0.10, 0.12, 0.09], 1.0, "contradicted"),
        ("equivalent", None, [0.0, 0.06, -0.06], 1.0, "inconclusive"),
    ],
)
def test_planted_outcomes(kind, effect, gains, margin, verdict, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    claim = plant(tmp_path, gains, margin=margin) | {"kind": kind, "effect": effect}
    row = claims.judged(claim, PAPER)
    assert (row["setting"], row["scale"], row["verdict"]) == ("analogue", "toy", verdict), row
    assert (" trainings, " in row["here"]) == (len(gains) >= 3)
    if len(gains) >= 3:
        low, high = scipys.ttest_1samp(np.round(np.array(gains) * 200) / 200, 0).confidence_interval(0.95)
        assert f"({100 * low:+.1f} to {100 * high:+.1f})" in row["here"]


def test_a_planted_outcome_in_another_setting_is_not_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    claim = plant(tmp_path, [0.10, 0.12, 0.09])
    stored = tmp_path / "x" / "configs.json"
    config = disk.read_json(stored)
    config["dpo-lora-episode"]["batch_size"] = 8
    disk.write_json(stored, config)
    row = claims.judged(claim, PAPER)
    assert (row["setting"], row["verdict"], row["would"]) == ("different", "not judged", "supported")
    assert row["differs"] == "pairs seen 4000 (paper: 500); visits to a pair 36.36 (paper: 4.545)"


def test_not_worse_counts_only_where_the_treatment_works(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    for name, gains, verdict in (
        ("works", [0.1, 0.12, 0.11], "supported"),
        ("not", [0, 0.01, -0.01], "inconclusive"),
    ):
        claim = plant(tmp_path / name, gains)
        ours = {key: f"{name}/{value}" for key, value in claim["ours"].items() if key in ("new", "base")}
        claim = {
            "id": "y",
            "kind": "non-inferior",
            "ours": ours | {"base": ours["new"], "start": ours["base"]},
        }
        assert claims.judged(claim, PAPER)["verdict"] == verdict


def test_bands_and_chance(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    claim = {"id": "z", "kind": "share", "effect": 0.8, "band": 0.05, "ours": {"file": "t.json", "where": {}}}
    for ci, verdict in (
        ([0.76, 0.84], "supported"),
        ([0.7, 0.84], "inconclusive"),
        ([0.6, 0.7], "contradicted"),
    ):
        disk.write_json(tmp_path / "t.json", [{"value": 0.8, "ci95": ci, "unit": "share"}])
        assert claims.judged(claim, PAPER)["verdict"] == verdict
    above = claim | {"kind": "gain", "chance": 0.65, "effect": None}
    assert claims.judged(above, PAPER)["verdict"] == "inconclusive"
    assert claims.judged(above | {"chance": 0.5}, PAPER)["verdict"] == "supported"


def test_a_look_up_that_finds_no_row_or_two_is_an_error():
    file = "tiny_libero_object/table.json"
    for where in ({"name": "nobody"}, {"policy": "dpo"}):
        with pytest.raises(UserError, match="a claim needs one"):
            claims.look_up({"file": file, "where": where})


def test_a_claim_whose_files_are_gone_is_no_claim_on_fewer(tmp_path, monkeypatch):
    claim = next(claim for claim in PAPER["also"] if len(np.atleast_1d(claim["ours"].get("new", []))) > 1)
    files = [file for side in ("new", "base") for file in np.atleast_1d(claim["ours"][side])]
    for file in files[1:]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(claims.RESULTS / file, tmp_path / file)
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    with pytest.raises(UserError, match=f"{files[0]}, which is not there"):
        claims.trainings_of(claim["ours"])
    with pytest.raises(UserError, match=r"training/dpo-lora\*.jsonl, which is not there"):
        claims.training_logs({"folder": "x"}, "dpo-lora")


# ------------------------------------------------------------------------------------ an experiment in blocks
HEADER = "block,arm,seed,suite,task,init_state,success,steps,crash,right_place"  # as extras/blocks.py writes


def blocks(folder, gains: dict[str, float], n_blocks: int = 12, spread: float = 0.0) -> dict:
    """12 trainings, 20 layouts x 10 init states x 2 noise seeds, arms with planted gains over A."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for block in range(n_blocks):
        places, lines = [(layout, i) for layout in range(20) for i in range(20)], [HEADER]
        first = rng.random(len(places)) < 0.5
        for arm, gain in gains.items():
            new, change = first.copy(), gain + spread * rng.normal()
            flip = rng.permutation(np.flatnonzero(first == (change < 0)))[: round(abs(change) * len(places))]
            new[flip] ^= True
            for (layout, i), won in zip(places, new, strict=True):
                suite = ["object", "swap"][layout // 10]
                lines.append(f"{block},{arm},{i % 2},{suite},{layout % 10},{40 + i // 2},{int(won)},99,,0.5")
        (folder / f"seed{block}.csv").write_text("\n".join(lines))
        moved = {"trained": {"chosen": 1.0, "rejected": -2.0}} if block > 3 else {}  # not yet in old records
        arms = {"B": {"delivered": {"nats": 2.0 + block}} | moved, "F": {"trained": {}}}
        arms |= {arm: {} for arm in gains if arm not in ("A", "B")} | {"kto": {"playouts": 960}}
        disk.write_json(folder / f"seed{block}.json", {"block": block, "arms": arms, "playouts": 900 + block})
    return copy.deepcopy(PAPER["blocks"]["look"]) | {"folder": folder.name}


def test_planted_blocks_with_holm_over_the_three_primaries(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    plan = blocks(tmp_path / "b", {"A": 0, "B": -0.06, "C": 0.05, "D": 0.05, "E": 0.12}, spread=0.03)
    rows = {(row["new"], row["base"]): row for row in claims.contrasts(plan)}
    played = {("B", "A"), ("D", "C"), ("D", "A"), ("E", "D"), ("C", "A"), ("E", "A"), ("E", "C")}
    assert rows.keys() == played, "F has not been played"
    p = [rows[tuple(pair)]["p"] for pair in plan["primary"]]
    assert [rows[tuple(pair)]["p_holm"] for pair in plan["primary"]] == stats.holm(p)
    assert rows["E", "D"]["p_holm"] is None and claims.outcome(rows["E", "D"]) == "exploratory"
    assert claims.outcome(rows["B", "A"]) == "harmful" and claims.outcome(rows["D", "A"]) == "supported"
    assert rows["B", "A"]["blocks"] == 12
    found, wins = rows["B", "A"]["found"], {}
    for block in range(12):
        for line in (tmp_path / f"b/seed{block}.csv").read_text().split("\n")[1:]:
            _, arm, *_, success, _, _, _ = line.split(",")
            wins.setdefault((block, arm), []).append(int(success))
    gains = [np.mean(wins[b, "B"]) - np.mean(wins[b, "A"]) for b in range(12)]
    error = np.std(gains[:3], ddof=1) / 12**0.5  # what twelve would have, at the spread of the first three
    assert rows["B", "A"]["foreseen"] == power.detectable(power.over_trainings(error, 11))
    theirs = scipys.ttest_1samp(gains, 0)
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert rows["B", "A"]["p"] == pytest.approx(theirs.pvalue)
    entry = {"blocks": "look", "arms": ["B", "A"], "question": "?"}
    assert claims.card_row(entry, {}, {"blocks": {"look": plan}})["outcome"] == f"harmful: {found.text}"
    for other in (
        plan | {"blocks": 13},
        plan | {"blocks": 11},
        plan | {"primary": [], "exploratory": [["B", "E"]]},
    ):
        assert claims.card_row(entry, {}, {"blocks": {"look": other}})["outcome"] == "not complete"
    (tmp_path / "figures").mkdir()
    table = claims.contrasts_table(plan, tmp_path / "figures" / "b.png")
    title = plan["title"]
    head = f"### {title}\n\n`python -m extras.blocks SEED`\n\n![{title}: points against A](figures/b.png)"
    assert table.startswith(f"{head}\n\n| comparison |")
    assert (tmp_path / "figures" / "b.png").stat().st_size > 2000
    assert "| B - A | 12 of 12 |" in table and "exploratory" in table and " | harmful |" in table
    b = sum(map(sum, (won for (_, arm), won in wins.items() if arm == "B")))
    assert f"| B | 12 | {b} of 4800 | 50.0% | 1 (of 8) | -2 (of 8) | 7.5 | 906 |" in table, (
        "means over blocks"
    )
    assert (
        f"| A | 12 | {sum(map(sum, (won for (_, arm), won in wins.items() if arm == 'A')))} of 4800 |"
        in table
    )
    only = claims.contrasts_table(plan | {"suite": "swap"}, tmp_path / "figures" / "b.png")
    assert "906" not in only and " of 2400 |" in only, "what is recorded is of both suites"


def test_equal_arms_have_no_effect_of_interest_and_noisy_ones_are_inconclusive(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    for name, spread, outcome in (("calm", 0.005, "no effect of interest"), ("wild", 0.15, "inconclusive")):
        plan = blocks(tmp_path / name, {"A": 0, "B": 0, "C": 0, "D": 0}, spread=spread)
        assert {claims.outcome(row) for row in claims.contrasts(plan) if row["primary"]} == {outcome}
        plan |= {"primary": [], "exploratory": [["D", "C"]]}
        near = "exploratory" + (", equivalent within 3 points" if name == "calm" else "")
        assert [claims.outcome(row) for row in claims.contrasts(plan)] == [near]


def test_a_block_without_arm_a_is_no_effect_of_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    plan = blocks(tmp_path / "b", {"A": 0, "C": 0.1, "D": 0.1}, n_blocks=3)
    for name, arm in (("seed2", "A"), ("seed0", "C"), ("seed1", "C")):
        path = tmp_path / "b" / f"{name}.csv"
        path.write_text("\n".join(line for line in path.read_text().split("\n") if f",{arm}," not in line))
    drawn = []
    monkeypatch.setattr(claims.plots, "blocks", drawn.append)
    monkeypatch.setattr(claims.plots, "save", lambda *_: None)
    claims.effects_plot(plan, tmp_path / "b.png")
    assert drawn == [{"D": pytest.approx([0.1, 0.1])}], "C was played in the block without A alone"


def test_no_test_is_made_before_all_blocks_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    plan = blocks(tmp_path / "b", {"A": 0, "B": 0.3, "C": 0, "D": 0.1}, n_blocks=3, spread=0.02)
    for row in claims.contrasts(plan):
        assert (row["found"], row["p"], row["p_holm"], claims.outcome(row)) == (
            None,
            None,
            None,
            "not complete",
        )
        assert 0 < row["detectable"] < 0.2
    assert "| B - A | 3 of 12 |  |  |  |" in claims.contrasts_table(plan, tmp_path / "b.png")
    (tmp_path / "b" / "seed2.json").unlink()  # as a kill between a record's two files leaves it
    early = claims.contrasts_table(plan, tmp_path / "none.png")
    assert "Fewer than 3 blocks: nothing is compared." in early and "comparison" not in early
    won = sum(row["success"] for rows in claims.read_blocks(plan)[0]["B"].values() for row in rows)
    assert f"| B | 2 | {won} of 800 |" in early, "what was played is counted all the same"
    assert not (tmp_path / "none.png").exists()


def test_a_primary_comparison_waits_for_the_others(tmp_path, monkeypatch):
    """D has not played its last block: the rest of the plan has no outcome either."""
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    plan = blocks(tmp_path / "b", {"A": 0, "B": 0, "C": 0, "D": 0, "F": 0}, spread=0.005)
    last = tmp_path / "b" / "seed11.csv"
    last.write_text("\n".join(line for line in last.read_text().split("\n") if ",D," not in line))
    outcomes = {(row["new"], row["base"]): claims.outcome(row) for row in claims.contrasts(plan)}
    assert outcomes["B", "A"] == outcomes["D", "A"] == "not complete"
    assert outcomes["F", "A"] == "exploratory, equivalent within 3 points"


def test_a_plan_without_primary_comparisons_gives_intervals_and_no_p(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    plan = blocks(tmp_path / "b", {"A": 0, "D": 0.1, "kto": 0.05}, n_blocks=3, spread=0.02)
    plan |= {"blocks": 3, "primary": [], "exploratory": [["kto", "A"], ["kto", "D"]]}
    rows = claims.contrasts(plan)
    assert [(row["p"], row["p_holm"], claims.outcome(row)) for row in rows] == [
        (None, None, "exploratory")
    ] * 2
    own = next(line for line in claims.arms_table(plan).splitlines() if line.startswith("| kto |"))
    assert own.endswith("| 960 |"), "its own play-outs, not those of the pairs"
    assert all(row["found"].interval[0] < row["found"].value < row["found"].interval[1] for row in rows)


# --------------------------------------------------------------------------------------------------- the logs
def logged(policy: str, suites: list[str]) -> tuple[int, int]:
    """Successes and episodes of a policy in the public logs, over suites and seeds."""
    cells = [cell for suite in suites for cell in PAPER["logs"]["counts"][policy][suite].values()]
    return sum(won for won, _ in cells), sum(n for _, n in cells)


def test_the_public_logs_add_up():
    """Against the totals that the paper and the repository give themselves."""
    logs = PAPER["logs"]
    assert logged("openvla_dpo_dora", SUITES) == (439, 600)
    assert logged("openvla_dpo_lora", SUITES) == (421, 600)
    assert logged("openvla_sft", SUITES) == (138, 200)
    for suite, rate in logs["paper"]["openvla_dpo_dora"].items():
        won, n = logged("openvla_dpo_dora", [suite])
        assert n == 150 and round(100 * won / n, 1) == rate
        gained, lost, paired = logs["paired"]["openvla_dpo_dora"][suite]
        own, base = (logs["counts"][p][suite]["42"] for p in ("openvla_dpo_dora", "openvla_sft"))
        assert own[1] == base[1] == paired and own[0] - base[0] == gained - lost


OF_CLAIM = {  # policy, what it is compared with, suites
    "openvla-sft": ("openvla_sft", None, SUITES),
    "pi05-sft": ("pi05_sft", None, SUITES),
    "seed-variance": ("openvla_dpo_dora", None, ["libero_object"]),
    "dora-mean": ("openvla_dpo_dora", "openvla_sft", SUITES),
    "dora-object": ("openvla_dpo_dora", "openvla_sft", ["libero_object"]),
    "dora-long": ("openvla_dpo_dora", "openvla_sft", ["libero_10"]),
    "dora-goal": ("openvla_dpo_dora", "openvla_sft", ["libero_goal"]),
    "dora-spatial": ("openvla_dpo_dora", "openvla_sft", ["libero_spatial"]),
    "dora-lora": ("openvla_dpo_dora", "openvla_dpo_lora", SUITES),
}


@pytest.mark.parametrize("name", OF_CLAIM)
def test_what_a_claim_says_of_the_logs_is_what_they_count(name):
    policy, against, suites = OF_CLAIM[name]
    won, n = logged(policy, suites)
    text = f"{won}/{n}"
    if against:
        base = logged(against, suites)
        text = f"{100 * (won / n - base[0] / base[1]):+.1f} points ({text} against {base[0]}/{base[1]})"
    if against == "openvla_sft":  # the only pairs of which the logs have single episodes
        counts = [PAPER["logs"]["paired"][policy][suite] for suite in suites]
        gained, lost, n = np.sum(counts, axis=0)
        interval = tables.points(
            (gained - lost) / n, stats.difference_interval({"gained": gained, "lost": lost, "paired_n": n})
        )
        text += f"; paired on {n} episodes: {interval}, {gained} gained and {lost} lost"
        d33 = power.detectable(lambda d: power.paired_power(d, n, (gained + lost) / n), 1 / 3)
        assert CLAIMS[name]["d33"] == f"{100 * d33:.1f} points"
    assert CLAIMS[name]["logs"].partition("; ")[0] == text.partition("; ")[0]
    assert CLAIMS[name]["logs"].startswith(text) and ("d33" in CLAIMS[name]) == (against == "openvla_sft")


def test_the_table_of_the_public_logs_is_what_they_count():
    """The one in results/claims.md: episodes that repeat another seed's count once in an interval."""
    page, logs = (HERE / "results" / "claims.md").read_text(), PAPER["logs"]
    for policy, suites in logs["counts"].items():
        for suite, cells in suites.items():
            won, n = logged(policy, [suite])
            repeated = logs["same"].get(policy, {}).get(suite, [])
            once = np.sum([cell for seed, cell in cells.items() if seed not in repeated], axis=0)
            seeds = ", ".join(f"{seed}: {w}/{k}" for seed, (w, k) in cells.items())
            paper, interval = logs["paper"][policy][suite], tables.percent(stats.wilson(*once))
            row = f"| {policy} | {suite} | {seeds} | {won} / {n} | {100 * won / n:.1f} % | {paper} % |"
            assert f"{row} {once[1]} | {interval} |" in page
    assert "| 114 / 150 | 76.0 % | 76 % | 50 |" in page
