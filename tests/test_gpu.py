"""The script for the day a GPU is there: each stage is rehearsed, and a failure is reported while the rest goes on."""
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, run

import checkpoint as ckpt
import configurator
from generate import bound

sys.path.insert(0, str(ROOT / "bench"))

import gpu          # noqa: E402
import quality      # noqa: E402


def day_of(tmp_path, stage="check"):
    """A stage's Day in this process."""
    args = [f"--stage={stage}", "--rehearse", "--device=cpu", "--dtype=float32"]
    return gpu.Day(configurator.load(gpu.Config, [*args, f"--out={tmp_path / 'out'}", f"--work={tmp_path / 'work'}"]))


def stage(*args, code=0):
    """What `bash bench/gpu.sh` printed, as lines; it must end with this code and without a traceback."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", ROOT / "bench" / "gpu.sh", *map(str, args)], text=True, capture_output=True,
                          timeout=300, cwd=ROOT, env={**os.environ, "PATH": path})
    assert done.returncode == code and "Traceback" not in done.stderr, (done.returncode, done.stdout, done.stderr)
    return (done.stderr if code == 2 else done.stdout).splitlines()


def rehearse(name, tmp_path):
    """(lines printed, content of the JSON) of a stage, whose files may all come back."""
    out = tmp_path / "out"
    lines = stage(name, "--rehearse", f"--out={out}", f"--work={tmp_path / 'work'}")
    files = list(out.iterdir())
    assert len(files) <= 8 and all(file.stat().st_size < 15e6 for file in files)
    assert all(re.fullmatch(r"[\w.-]+", file.name, re.ASCII) for file in files)
    found = json.loads((out / f"{name}.json").read_text())
    assert found["torch"] == torch.__version__ and found["card"] == "cpu" and found["settings"]["stage"] == name
    assert not any(line.startswith("FAILED") for line in lines)
    return lines, found


@pytest.mark.slow
def test_each_check_is_made(tmp_path):
    lines, found = rehearse("check", tmp_path)
    n = len(gpu.CHECKS)
    assert len(found["rows"]) == n and lines[-1] == f"{n} of {n} checks are ok, cpu"
    lines = [line for line in lines if line.startswith("ok")]
    for row, line in zip(found["rows"], lines, strict=True):
        assert row["ok"] and row["measured"] <= row["tolerance"] and line.startswith(f"ok      {row['what']}  ")
    resumed = next(row for row in found["rows"] if "resumed" in row["what"])
    assert resumed["measured"] == resumed["tolerance"] == 0


@pytest.mark.slow
def test_speed_is_one_table(tmp_path):
    lines, found = rehearse("speed", tmp_path)
    names = [row["what"] for row in found["rows"]]
    assert [name.split()[0] for name in names[:3]] == ["product", "product", "copy"]
    assert sum("profile" in name for name in names) == 2 and sum("tokens, block_length" in name for name in names) == 6
    assert [line.split("  ")[0] for line in lines[-len(names):]] == names and lines[-len(names) - 1].startswith("what")
    profile = next(row for row in found["rows"] if "profile" in row["what"])
    assert profile["kernels"] > 100 and sum(profile["ms"].values()) > 0.1


@pytest.mark.slow
def test_a_text_is_learnt_in_time_and_the_network_comes_back(tmp_path):
    lines, found = rehearse("write", tmp_path)
    assert found["curve"][-1]["step"] == found["max_steps"] and found["curve"][-1]["lr"] < 1e-4
    bounds = {row["what"]: row["bound"] for row in found["rows"] if "bound" in row}
    assert len(bounds) == 5 and all(0 < value < math.log(300) for value in bounds.values())
    assert lines[-len(found["rows"]) - 1].split() == ["what", "windows", "bound", "+-", "seconds"]
    text = (tmp_path / "out" / "samples.txt").read_text()
    assert text.count("====") == 8 and text.count("(truth: [") == 16 and text.count("\n[") == 64
    network = tmp_path / "network.pt"
    network.write_bytes(b"".join(file.read_bytes() for file in sorted((tmp_path / "out").glob("network.pt.*"))))
    out = run(["sample.py", f"--checkpoint={network}", "--seq_len=8", "--steps=2", "--seed=1", "--num_samples=8"])
    assert "--- 8 ---" in out.stdout and not out.stderr.splitlines()[-1].startswith("0 tokens")    # one may be empty
    assert not (tmp_path / "work" / "rehearsal" / "trial").exists()


@pytest.mark.slow
def test_the_full_run_is_killed_resumed_and_deleted(tmp_path):
    lines, found = rehearse("full", tmp_path)
    values = {row["what"]: row.get("value") for row in found["rows"]}
    assert values["tokens/s, median"] > 0 and values["peak GB"] > 0 and values["GB of a checkpoint"] > 0
    assert found["rows"][-1]["measured"] == 0 and "losses of steps 4 and 5" in lines[-1]
    assert not (tmp_path / "work" / "rehearsal" / "full").exists()


def test_a_failing_check_is_reported_and_the_others_run(tmp_path, monkeypatch):
    def broken(day):
        """one that breaks"""
        raise ValueError("no such kernel\nand a second line")

    def far(day):
        """one that is too far"""
        return 0.2, 0.1

    def undefined(day):
        """one that is not a number"""
        return math.nan, 0.1

    def near(day):
        """one that is near"""
        return 0.05, 0.1
    monkeypatch.setattr(gpu, "CHECKS", [broken, far, undefined, near])
    done = call(["gpu.py", "--stage=check", "--rehearse", f"--out={tmp_path}", f"--work={tmp_path / 'work'}"], code=1)
    assert done.stdout.splitlines()[1:] == [
        "FAILED  one that breaks  ValueError: no such kernel", "FAILED  one that is too far  0.2 > 0.1",
        "FAILED  one that is not a number  nan > 0.1", "ok      one that is near  0.05 <= 0.1",
        "1 of 4 checks are ok, cpu"]
    rows = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert [row["ok"] for row in rows] == [False, False, False, True] and "test_gpu.py" in rows[0]["trace"]


def test_what_was_measured_before_a_fault_is_kept(tmp_path, monkeypatch):
    def half(day):
        day.add(what="first", seconds=1)
        raise RuntimeError("the card fell off the bus")
    monkeypatch.setitem(gpu.STAGES, "speed", half)
    done = call(["gpu.py", "--stage=speed", "--rehearse", f"--out={tmp_path}", f"--work={tmp_path / 'work'}"], code=1)
    assert "FAILED  the stage  RuntimeError: the card fell off the bus" in done.stdout
    assert json.loads((tmp_path / "speed.json").read_text())["rows"][0] == {"what": "first", "seconds": 1}


def test_a_stage_ends_when_its_time_is_over(tmp_path, monkeypatch):
    def endless(day):
        day.end = time.perf_counter() - 14.8                # the alarm comes 15 s after the end
        gpu.signal.setitimer(gpu.signal.ITIMER_REAL, day.left() + 15)
        while True:
            time.sleep(0.01)
    monkeypatch.setitem(gpu.STAGES, "full", endless)
    done = call(["gpu.py", "--stage=full", "--rehearse", f"--out={tmp_path}", f"--work={tmp_path / 'work'}"], code=1)
    assert "FAILED  the stage  TimeoutError: the time is over" in done.stdout


def test_a_loss_that_is_missing_or_no_number_is_within_no_tolerance():
    assert gpu.furthest({4: 2.0, 5: 1.0}, {4: 1.0, 5: 1.0}) == 1
    assert math.isnan(gpu.furthest({4: 1.0}, {4: 1.0, 5: 1.0}))
    assert math.isnan(gpu.furthest({4: 1.0, 5: math.nan}, {4: 1.0, 5: 1.0}))


def test_a_script_that_hangs_is_killed_with_its_children(tmp_path):
    code = ("import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
            "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print('up', flush=True); ")
    begun, day = time.perf_counter(), day_of(tmp_path)
    with pytest.raises(configurator.Fault, match="-c ended with code -9: up"):
        gpu.script(day, ["-c", code + "time.sleep(60)"], limit=0.5, grace=0.5)
    with pytest.raises(configurator.Fault, match="code 2: error: it has no text"):
        gpu.script(day, ["-c", "import sys; print('error: it has no text'); print('bye'); sys.exit(2)"])
    lines = gpu.script(day, ["-c", code + "time.sleep(60)"], (-9,), gpu.kill_at("up"))
    assert [line for _, line in lines] == ["up"] and time.perf_counter() - begun < 20


def test_a_large_network_comes_back_in_part(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PART", 20_000)
    day, (_, content) = day_of(tmp_path, "write"), ckpt.find(base)
    file = gpu.share_network(day, content)
    parts = [*sorted((tmp_path / "out").glob("*.[0-3]")), *sorted(file.parent.glob("network.pt.*"))]
    assert len(parts) == day.found["parts"] > gpu.PARTS_BACK and "more than may come back" in capsys.readouterr().out
    assert b"".join(part.read_bytes() for part in parts) == file.read_bytes()
    assert all(part.stat().st_size <= 20_000 for part in parts)
    rounded = ckpt.find(file)[1]
    assert file.stat().st_size < 0.2 * ckpt.find(base)[0].stat().st_size
    idx = torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(1))
    both = [bound(ckpt.load_model(each), quality.plain(idx), 4, 4)["bound"] for each in (content, rounded)]
    assert both[0] == pytest.approx(both[1], rel=0.01) and both[0] != both[1]


@pytest.mark.parametrize("args, words", [
    (["fly"], "stage=fly is unknown; use one of check, speed, write, full"), ([], "stage= is unknown"),
    (["write", "8", "config/micro.py"], "write needs more than config=config/micro.py and text="),
    (["write", "8", "config/micro.py", "nowhere.jsonl"], "text=nowhere.jsonl is not there"),
    (["write", "soon", "config/micro.py", "README.md"], "minutes=soon must be a finite number"),
    (["check", "--peer=nowhere"], "peer=nowhere has no model.py")])
def test_a_mistake_is_one_line(args, words):
    names = ("stage", "minutes", "config", "text")
    settings = [arg if arg.startswith("-") else f"--{name}={arg}" for name, arg in zip(names, args, strict=False)]
    said = call(["gpu.py", *settings], code=2).stderr
    assert words in said and said.count("\n") == 1


@pytest.mark.slow
def test_the_shell_hands_on_its_words_as_settings(tmp_path):
    assert "stage=fly is unknown" in stage("fly", code=2)[0]
    assert "text=no text is not there" in stage("write", "8", "config/micro.py", "no text", "--seed=2", code=2)[0]
    assert "no_config.py: No such file" in stage("write", "8", "no_config.py", ROOT / "fables.txt", f"--out={tmp_path}",
                                              f"--work={tmp_path}", "--device=cpu", code=2)[-1]
