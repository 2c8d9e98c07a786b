"""What tests/bench/scale.py computes, derived again; and several processes for one stage.

pytest tests/test_scale.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from runtime import disk, ranks
from runtime.errors import UserError

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import scale
import work

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def points(costs: dict[int, float], mb: dict[int, float]) -> list[dict]:
    return [{"size": n, "cpu_s": cost, "peak_mb": mb[n]} for n, cost in costs.items()]


def test_a_planted_line_is_found_and_the_largest_size_is_not_looked_at():
    sizes = (10, 20, 40, 80)
    costs, mb = {n: 7 + 0.25 * n for n in sizes} | {80: 99.0}, {n: 500 + 2 * n for n in sizes}
    found = scale.fitted(points(costs, mb))
    assert (found["a"], found["b"]) == pytest.approx((7, 0.25)) and found["predicted"] == pytest.approx(27)
    assert found["measured"] == 99.0 and found["peak_mb"] == [520, 660]
    assert (found["memory_a"], found["memory_b"]) == pytest.approx((500, 2)) and found["grows"]
    assert not scale.fitted(points({n: 7 + n for n in sizes}, {10: 500, 20: 509, 40: 498, 80: 503}))["grows"]


@pytest.mark.parametrize("sizes", [[8], [8, 16], [8, 8, 16]])
def test_fewer_than_three_sizes_are_no_line(sizes):
    with pytest.raises(ValueError, match="three are needed"):
        scale.fit(sizes, [1.0] * len(sizes))


def test_many_pairs_by_hand():
    line = {"a": 10.0, "b": 0.036, "memory_a": 1000.0, "memory_b": 0.05, "grows": True}
    fits = dict.fromkeys(("02 play-outs", "02 pairs, assembled", "03 pairs, one epoch"), line)
    rows = {what: value for what, value, *_ in scale.many_pairs(fits, 5.0, 26_000, 21.0, 10**5)}
    assert rows["pairs.safetensors"] == pytest.approx(2.6)  # 10^5 x 26 kB
    assert rows["02: playing"] == pytest.approx(5.0)  # 5 x 10^5 play-outs x 0.036 s
    assert rows["02: assembling"] == pytest.approx(3610 / 3600)
    assert rows["02: assembling, memory"] == pytest.approx(6.0)
    most = rows["03: an epoch, batches of 8, most that 21 GB hold"]
    assert most == pytest.approx((21_000 - 1_000) / 0.05)
    flat = {"03 pairs, one epoch": line | {"grows": False}}  # nothing to extrapolate
    assert not any("memory" in what for what, *_ in scale.many_pairs(flat, 5.0, 26_000, 21.0))


def test_the_papers_grid_by_hand():
    hour = work.FLOPS * work.UTILISATION * 3600  # operations
    simulator = {"step_s": 0.01, "look_s": 0.1, "reset_s": 2.0}
    limits = 220 + 280 + 300 + 520  # of spatial, object, goal, long
    for gpus in (1, 8):
        hours = scale.paper_grid({"lora": 0.5 * hour, "dora": hour}, 0.036, 10, simulator, gpus)
        assert hours["DPO, GPU"] == pytest.approx(4 * 3 * 1.5 / gpus)
        assert hours["collection, GPU"] == pytest.approx(2000 * limits / 10 * 0.036 / 3600 / gpus)
        episodes = 50 * 3 * 3  # trials, seeds, policies
        assert hours["evaluation, GPU"] == pytest.approx(episodes * limits / 10 * 0.036 / 3600 / gpus)
        simulated = episodes * (limits * 0.01 + limits / 10 * 0.1 + 4 * 2.0)
        assert hours["evaluation, simulator"] == pytest.approx(simulated / 3600 / gpus / scale.CORES)


def test_the_report_has_every_series_and_says_how_each_number_is_known(monkeypatch):
    monkeypatch.setattr(scale, "counted", lambda name: ({"lora": 1e15, "dora": 1e15}, 0.03, 1))
    measured = {"wall_s": 1, "said": '{"step_s": 0.01, "look_s": 0.1, "reset_s": 1}'}
    asked = [(name, n) for name, (_, sizes, _) in scale.SERIES.items() for n in sizes]
    found = []
    for name, n in asked:
        found.append(
            measured | {"series": name, "asked": n, "size": n, "cpu_s": 5 + 2 * n, "peak_mb": 500 + n}
        )
    found.append(found[0] | {"asked": 3, "size": 3, "cpu_s": 1e9})  # measured when another size was asked for
    data, said = scale.report(found)
    assert list(data["fits"]) == [name for name, (_, sizes, _) in scale.SERIES.items() if len(sizes) == 4]
    for line in data["fits"].values():
        assert line["b"] == pytest.approx(2) and line["predicted"] == pytest.approx(line["measured"])
    assert all(known.startswith(("measured", "counted", "fitted")) for *_, known in data["million_pairs"])
    assert data["paper_grid"].keys() == {"openvla_7b", "pi05"} and "| openvla_7b | DPO, GPU |" in said


def test_a_measurement_counts_children_and_passes_on_their_failure():
    work = "import time; x = bytearray(b'x') * 300_000_000; t = time.process_time()\n"
    work += "while time.process_time() < t + 1: pass"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}])"
    found = scale.run([sys.executable, "-c", start])
    assert 1 <= found["cpu_s"] < 10 and found["peak_mb"] > 280
    with pytest.raises(SystemExit, match="exit code 3"):
        scale.run([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_lost_rank_is_one_line(monkeypatch):
    def barrier():
        raise RuntimeError("Connection closed by peer\n[127.0.1.1]:9")

    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(ranks.dist, "barrier", barrier)
    with pytest.raises(UserError, match="run the same command again") as caught:
        ranks.wait()
    assert "closed by peer" in str(caught.value) and "\n" not in str(caught.value)


def test_a_rank_that_gives_up_ends_the_one_that_waits_for_it(tmp_path):
    script = tmp_path / "gives_up.py"
    script.write_text("""
import sys
sys.path.insert(0, "")
from runtime import ranks, stage
from runtime.errors import UserError
def main():
    ranks.join("cpu")
    ranks.wait()
    if ranks.rank() == 1:
        raise UserError("no more of this")
    ranks.mean({"loss": 1.0})
stage.command_line(main)
""")
    torchrun = [*TORCHRUN, script]
    result = subprocess.run(torchrun, cwd=scale.KIT, capture_output=True, text=True, timeout=120)
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and "error: no more of this" in said and len(said) <= 2, result.stderr
    assert "exitcode  : 2" in result.stderr and "SIGABRT" not in result.stderr  # of the first one to end


def test_no_thread_of_gloo_outlives_a_rank(tmp_path):
    """One that did could abort it, where it let go of a tensor while Python was ending."""
    script = tmp_path / "then_threads.py"
    script.write_text("""
import glob, os, runpy, sys
sys.argv[:] = sys.argv[1:]
sys.path.insert(0, "")
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    names = [open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm")]
    os.write(2, ("threads: " + " ".join(names) + "\\n").encode())
""")
    pairs = scale.repeated_pairs(tmp_path / "pairs", 2)
    torchrun = [*TORCHRUN, script]
    stage = ["03_dpo.py", "configs/micro.yaml", scale.GIVEN, pairs, "dpo.steps=1", f"root={tmp_path}"]
    other = [*stage, "dpo.steps=2"]  # refused: exit code 2, of which torchrun makes 1
    for arguments, code in ((stage, 0), (other, 1)):
        result = subprocess.run([*torchrun, *arguments], cwd=scale.KIT, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        threads = [line for line in result.stderr.splitlines() if line.startswith("threads: ")]
        assert len(threads) == 2 and "gloo" not in "".join(threads), result.stderr


def test_a_killed_rank_ends_a_training_and_a_rerun_gives_what_one_process_gives(tmp_path):
    pairs, weights = scale.repeated_pairs(tmp_path / "pairs", 20), []
    stage = ["03_dpo.py", "configs/micro.yaml", scale.GIVEN, pairs, "dpo.steps=30"]

    def command(root: str) -> list[str]:
        run = TORCHRUN if root == "two" else [sys.executable]
        return [*run, *stage, f"root={tmp_path / root}"]

    def folder(root: str) -> Path:
        return tmp_path / root / "micro/pi05/seed42/dpo-lora-episode"

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": scale.KIT}
    job = subprocess.Popen(command("two"), **pipes)
    while not (folder("two") / "checkpoint.pt").is_file():
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    ours = [p for p in psutil.Process(job.pid).children() if "03_dpo.py" in p.cmdline()]
    assert len(ours) == 2
    os.kill(ours[1].pid, signal.SIGKILL)
    _, stderr = job.communicate(timeout=600)
    assert job.returncode != 0 and "SIGKILL" in stderr and not (folder("two") / "done.json").exists()
    assert sum(line.startswith("error: ") for line in stderr.splitlines()) <= 1, stderr
    for arguments in (command("two"), command("one")):
        result = subprocess.run(arguments, **pipes)
        assert result.returncode == 0 and "done in" in result.stdout, result.stderr
        assert ("goes on" in result.stdout) == (not weights)
        weights.append(disk.load_tensors(folder("one" if weights else "two") / "adapter_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[1].items():
        torch.testing.assert_close(weights[0][key], value, atol=1e-5, rtol=0)
