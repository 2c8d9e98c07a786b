"""08 - Tables and plots of everything that has run under a config.

reads   of each backbone <run>/<backbone>/seed<k>/: results{,-val}.{json,md} (04), {sft,dpo-*}/metrics.jsonl (01, 03)
writes  <run>/report/: report.md, table.json (a flat row per evaluation), {success,learning_curve,dpo}-<backbone>.png
cost    seconds; may be run at any time, it shows what is there and says what is not
try     python 08_report.py configs/tiny.yaml

It computes nothing: every number stands in a file of an earlier stage.
Left out: the HTML page, the comparison with the paper's claims.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import common
import runs
from backbones import BACKBONES


@dataclass
class Config(common.RunConfig):
    pass


INK, GRID, COLOURS = "#222222", "#dddddd", {"sft": "#8c8c8c", "lora": "#1f77b4", "dora": "#d9822b"}


def axes(title: str, xlabel: str, ylabel: str, panels: int = 1):
    """A figure and its `panels` axes side by side (one alone is no list)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (max(6.4, 3.4 * panels), 3.8)
    figure, grid = plt.subplots(1, panels, figsize=size, dpi=150, layout="constrained", sharey=True, squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    grid[0][0].set_ylabel(ylabel)
    for ax in grid[0]:
        ax.set_xlabel(xlabel)
        ax.grid(color=GRID, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, grid[0] if panels > 1 else grid[0][0]


def rate_and_bars(rows: list[dict]) -> tuple[list[float], list[list[float]]]:
    """Success rates in percent, and the distances to both ends of their intervals."""
    rates = [100 * r["successes"] / max(1, r["n"]) for r in rows]
    bars = [[rate - 100 * r["ci95"][0] for rate, r in zip(rates, rows, strict=True)]]
    return rates, [*bars, [100 * r["ci95"][1] - rate for rate, r in zip(rates, rows, strict=True)]]


def plot_success(rows: list[dict], path: Path) -> None:
    figure, ax = axes(f"Success on held-out init states, {rows[0]['suite']}", "", "success, % (Wilson 95 %)")
    rows = sorted(rows, key=lambda r: (r["start"] == "final", r["start"], r["policy"] == "dpo", r["name"]))
    rates, bars = rate_and_bars(rows)
    colours = [COLOURS[r["adapter"] if r["policy"] == "dpo" else "sft"] for r in rows]
    ax.bar(range(len(rows)), rates, 0.62, color=colours, yerr=bars, capsize=3, ecolor=INK, error_kw={"linewidth": 1})
    for i, (rate, r) in enumerate(zip(rates, rows, strict=True)):
        ax.text(i, 3, f"{r['successes']}/{r['n']}", ha="center", color="white", fontsize=8 if rate > 10 else 0)
    ax.set_xticks(range(len(rows)), [r["name"].replace("-at", "\nat ").replace("-", "\n", 1) for r in rows], fontsize=8)
    ax.set_ylim(0, 100)
    ax.grid(axis="x", visible=False)
    figure.savefig(path)


def training_step(row: dict, last: int) -> int:
    return last if row["start"] == "final" else int(row["start"])


def plot_learning_curve(rows: list[dict], losses: list[dict], path: Path) -> None:
    """Success on validation init states, and the validation loss, against SFT steps."""
    figure, ax = axes("What more training buys", "SFT step", "success on validation init states, %")
    last = losses[-1]["step"]
    rows = sorted(rows, key=lambda r: training_step(r, last))
    rates, bars = rate_and_bars(rows)
    steps = [training_step(r, last) for r in rows]
    ax.errorbar(steps, rates, bars, fmt="o-", color=COLOURS["lora"], capsize=3, label="success (left), Wilson 95 %")
    ax.set_ylim(0, 100)
    right = ax.twinx()
    with_loss = [row for row in losses if "val_loss" in row]
    right.plot(
        [r["step"] for r in with_loss], [r["val_loss"] for r in with_loss], color=COLOURS["dora"], label="validation loss (right)"
    )
    right.set_yscale("log")
    right.spines["top"].set_visible(False)
    handles = [*ax.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    ax.legend(handles, [h.get_label() for h in handles], frameon=False, loc="center right", fontsize=8)
    figure.savefig(path)


def plot_dpo(folders: list[Path], path: Path) -> None:
    """Implicit rewards of chosen (solid) and rejected (dashed) chunks during DPO; a panel for each set of pairs."""
    variants = sorted({folder.name.split("-", 2)[2] for folder in folders})
    title = "DPO: implicit rewards, chosen (solid) and rejected (dashed)"
    figure, panels = axes(title, "DPO step", "beta x log-ratio to the reference", len(variants))
    for variant, ax in zip(variants, panels if len(variants) > 1 else [panels], strict=True):
        recipe, _, step = variant.partition("-at")
        ax.set_title(f"{recipe} pairs, from {f'step {step}' if step else 'the final policy'}", fontsize=9, color=INK)
        for folder in [f for f in folders if f.name.split("-", 2)[2] == variant]:
            rows, kind = runs.read_jsonl(folder / "metrics.jsonl"), folder.name.split("-")[1]
            steps = [row["step"] for row in rows]
            ax.plot(steps, [row["rewards/chosen"] for row in rows], color=COLOURS[kind], label=kind)
            ax.plot(steps, [row["rewards/rejected"] for row in rows], "--", color=COLOURS[kind])
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def section(cfg: Config, backbone: str, folder: Path) -> tuple[list[str], list[dict]]:
    """What the report says of one backbone, and its rows; plots go to `folder`, named after the backbone."""
    cfg = replace(cfg, backbone=backbone)
    said, rows = [f"# {cfg.name}, {backbone}, seed {cfg.seed}"], {}
    for group, stem, words in (("test", "results", "held-out (40-49)"), ("val", "results-val", "validation (35-39)")):
        path = cfg.seed_dir / f"{stem}.json"
        rows[group] = runs.read_json(path) if path.is_file() else []
        said.append(f"## Success on {words} init states\n\n{path.with_suffix('.md').read_text() if rows[group] else 'not run'}")
    said[1] += "\nExact McNemar on the same episodes; `over tasks` is a bootstrap that draws whole tasks."
    if rows["test"]:
        plot_success(rows["test"], folder / f"success-{backbone}.png")
        said[1] += f"\n\n![success](success-{backbone}.png)"
    losses = runs.read_jsonl(cfg.seed_dir / "sft" / "metrics.jsonl")
    curve = [row for row in rows["val"] if row["policy"] == "sft" and not row["blank_images"]]
    if len(curve) > 1 and losses:
        plot_learning_curve(curve, losses, folder / f"learning_curve-{backbone}.png")
        said.append(f"## Learning curve\n\n![learning curve](learning_curve-{backbone}.png)")
    trained = [p.parent for p in sorted(cfg.seed_dir.glob("dpo-*/done.json"))]
    if trained:
        plot_dpo(trained, folder / f"dpo-{backbone}.png")
        said.append(f"## DPO training\n\n![dpo](dpo-{backbone}.png)")
    return said, rows["test"] + rows["val"]


def main(cfg: Config) -> None:
    if cfg.dry_run:
        return
    folder = Path(cfg.root) / cfg.name / "report"
    folder.mkdir(parents=True, exist_ok=True)
    said, rows = [], []
    for backbone in [b for b in BACKBONES if replace(cfg, backbone=b).seed_dir.is_dir()]:
        words, found = section(cfg, backbone, folder)
        said, rows = said + words, rows + found
        results = replace(cfg, backbone=backbone).seed_dir / "results.md"
        print(f"{backbone}\n\n{results.read_text() if results.is_file() else 'no evaluation has run yet (04_eval.py)'}")
    runs.write_json(folder / "table.json", rows)
    commands = sorted({f"`{row['command']}` at {row['commit']}" for row in rows})
    said.append("# Commands\n\n" + "\n".join(f"- {line}" for line in commands))
    runs.write_atomic(folder / "report.md", "\n\n".join(said) + "\n")
    print(f"report: {folder / 'report.md'}")


if __name__ == "__main__":
    common.run(lambda: main(common.load_config(Config, "report", sys.argv[1:])))
