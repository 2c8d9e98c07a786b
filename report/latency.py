"""The tables of 05_profile.py: where the time of an inference goes."""

from report.tables import listing

PARTS = (  # of an inference, in the order in which they run
    "preprocessing",
    "vision tower",
    "projection",
    "prefix",
    "denoising",
    "action tokens",
    "post-processing",
    "rest",
)
PAPER = {"prefix_share": 0.214, "denoise_share": 0.786}  # of 280 ms


def amdahl(share: float) -> float:
    """Speed-up if this share of the time cost nothing."""
    return 1 / (1 - share)


def parts_of(times: list[dict[str, float]]) -> list[str]:
    """The parts that occur in any of these times by part, in order."""
    return [part for part in PARTS if any(part in row for row in times)]


def latency_report(rows: list[dict], roofline: dict, gpu: str) -> str:
    """Markdown: measured times of every point, the paper's shares, and the roofline with `gpu` first."""
    parts = parts_of([row["parts_ms"] for row in rows])
    measured = {
        "": "{label}",
        "p50 ms": "{p50_ms:.2f}",
        "p95 ms": "{p95_ms:.2f}",
        **{part: lambda row, part=part: f"{row['parts_ms'].get(part, 0.0):.2f}" for part in parts},
        "parts / whole": "{parts_over_whole:.1%}",
        "prefix share": "{prefix_share:.1%}",
        "ceiling of a prefix cache": "{ceiling:.2f}x",
    }
    least = {
        "published size, least ms on": "{gpu}",
        **{part: f"{{ms[{part}]:.2f}}" for part in ("images", "prefix", "actions")},
        "prefix share": "{prefix_share:.1%}",
        "ceiling": "{ceiling:.2f}x",
    }
    bounds = [{"gpu": name, "ceiling": amdahl(b["prefix_share"])} | b for name, b in roofline["gpus"].items()]
    paper = (
        f"Paper: prefix {PAPER['prefix_share']:.1%}, denoising {PAPER['denoise_share']:.1%}, eager code on "
        f"one GPU: a ceiling of {amdahl(PAPER['prefix_share']):.2f}x."
    )
    return (
        "\n\n".join(
            [
                listing(rows, measured),
                paper,
                listing(sorted(bounds, key=lambda row: row["gpu"] != gpu), least),
            ]
        )
        + "\n"
    )


def metric_rows(cfg, point: dict, timing: dict) -> list[dict]:
    """Rows of table.json: p50, p95 and shares at the config's own point."""
    parts = point["parts_ms"]
    values = {
        "p50": (point["p50_ms"], "ms"),
        "p95": (point["p95_ms"], "ms"),
        "prefix_share": (point["prefix_share"], "share"),
    }
    if "denoising" in parts:
        values["denoise_share"] = parts["denoising"] / sum(parts.values()), "share"
    return [
        {
            "backbone": cfg.backbone,
            "train_seeds": [cfg.start_seed or cfg.seed],
            "n": point["n"],
            "command": timing["command"],
            "commit": timing["commit"],
            "metric": name,
            "value": value,
            "unit": unit,
        }
        for name, (value, unit) in values.items()
    ]
