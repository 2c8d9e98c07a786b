"""The table and the pictures of 06_pretrain_head.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from retrieval import AT

INK, COLOURS = "#222222", {"paper": "#8c8c8c", "masked": "#1f77b4", "corrected": "#d9822b"}


def markdown(rows: list[dict], cfg) -> str:
    """The rows as one table for every protocol and suite."""
    lines = [f"Tower: {cfg.backbone}, {cfg.encoder}. In each cell recall@1 (95 % interval over episodes) / @5 / @10, in percent."]
    lines += [
        f"Right is a frame of the same task, of the same episode, of the same moment (same task, at most {cfg.near} steps apart)."
    ]
    lines += [
        "An interval without width: whichever episodes are drawn again, the value is the same; it still rests on few episodes."
    ]
    cells = {}
    for r in rows:
        if r["protocol"] != "progress":
            cells.setdefault((r["protocol"], r["suite"], r["n"]), {}).setdefault(r["features"], {})[r["right"], r["metric"]] = r
    for (protocol, suite, n), table in cells.items():
        kinds = list(dict.fromkeys(right for right, _ in table["chance"]))
        lines += ["", f"**{protocol}**, {suite}, {n} queries", ""]
        lines += ["| | " + " | ".join(f"same {right}" for right in kinds) + " |", "|---" * (1 + len(kinds)) + "|"]
        for name, found in table.items():
            said = []
            for right in kinds:
                first, *others = (found[right, f"recall@{k}"] for k in AT)
                interval = " ({:.1f} to {:.1f})".format(*(100 * x for x in first["ci95"])) if first["ci95"] else ""
                said.append(f"{100 * first['value']:.1f}{interval}" + "".join(f" / {100 * r['value']:.1f}" for r in others))
            lines.append(f"| {name} | " + " | ".join(said) + " |")
    progress = {(r["features"], r["metric"]): r for r in rows if r["protocol"] == "progress"}
    if progress:
        n = next(iter(progress.values()))["n"]
        lines += ["", f"**progress**: similarity to the goal frame along {n} held-out episodes", ""]
        lines += ["| | rises from frame to frame (chance 0.5) | rank correlation with time (chance 0) |", "|---|---|---|"]
        for name in dict.fromkeys(name for name, _ in progress):
            both = [progress[name, metric] for metric in ("rising", "rank correlation")]
            lines.append(
                f"| {name} | " + " | ".join("{:.2f} ({:.2f} to {:.2f})".format(r["value"], *r["ci95"]) for r in both) + " |"
            )
    return "\n".join(lines) + "\n"


def panels(rows: int, columns: int, title: str, size: tuple[float, float]):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, dpi=150, layout="constrained", squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure, axes


def plot_losses(logged: list[dict], cfg, path: Path) -> None:
    """Both terms against steps, of the heads that held-out episodes are kept from."""
    split = "episodes" if any(row["trained_on"] == "episodes" for row in logged) else "all"
    figure, axes = panels(1, 2, "InfoNCE: training (solid) and held-out episodes (dashed)", (9, 3.8))
    for ax, key in zip(axes[0], ("views", "temporal"), strict=True):
        for variant, colour in COLOURS.items():
            rows = [row for row in logged if row["trained_on"] == split and row["variant"] == variant]
            ax.plot([r["step"] for r in rows], [r[key] for r in rows], color=colour, label=variant)
            ax.plot([r["step"] for r in rows], [r.get(f"held_out_{key}", np.nan) for r in rows], "--", color=colour)
        ax.axhline(np.log(cfg.batch_size), color=INK, linewidth=0.8, label=f"chance, log {cfg.batch_size}")
        ax.set_title({"views": "agent view and wrist view", "temporal": f"agent view, {cfg.gap} steps on"}[key], fontsize=9)
        ax.set_xlabel("step")
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def plot_map(vectors: dict[str, torch.Tensor], frames, path: Path) -> None:
    """The first two principal components of the anchors, coloured by task."""
    names = ("encoder", "head, paper", "head, corrected")
    figure, axes = panels(1, len(names), "Agent view, first two principal components, a colour for each task", (10, 3.8))
    task = frames.task[frames.anchors]
    for ax, name in zip(axes[0], names, strict=True):
        x = vectors[name][frames.anchors].double().cpu()
        x = x - x.mean(0)
        variances, directions = torch.linalg.eigh(x.T @ x)  # ascending
        directions = directions[:, [-1, -2]]
        plane = x @ (directions * directions.sum(0).sign())  # the sign of a component is arbitrary: fixed here
        ax.scatter(*plane.T.numpy(), c=task % 20, cmap="tab10" if task.max() < 10 else "tab20", s=2, linewidths=0)
        ax.set_title(f"{name}: {variances[-2:].sum() / variances.sum():.0%} of the variance", fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
    figure.savefig(path)


def plot_neighbours(shown: np.ndarray, right: np.ndarray, images: dict, frames, names: tuple[str, str], path: Path) -> None:
    """Queries, each with the three nearest by two heads (frames, (n, 7)); a tick where the moment is right, else a cross."""
    figure, axes = panels(*shown.shape, f"Query | three nearest by {names[0]} | three nearest by {names[1]}", (9, 9))
    for i, row in enumerate(axes):
        for j, ax in enumerate(row):
            frame, ok = shown[i, j], right[i, j]
            mark, colour = ("", INK) if j == 0 else ("\N{CHECK MARK} ", "#2a7f3f") if ok else ("\N{BALLOT X} ", "#b3261e")
            ax.imshow(images[int(frame)])
            ax.set_title(f"{mark}task {frames.task[frame]}, step {frames.step[frame]}", fontsize=7, color=colour)
            ax.axis("off")
    figure.savefig(path)
