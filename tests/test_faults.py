"""Faults of training, provoked for real: kills, full disks, damaged files, signals, bad shards, NaN. Those of several
processes are in test_parallel.py, those of the other scripts beside their subjects.

Not provoked here: CUDA running out of memory and a GPU without bfloat16 (no GPU: the handler is tested, not the
fault), a read-only file system (tests may run as root, whom no mode bits stop: a folder that cannot be made stands for
it), and the death of a machine among several.
"""
import contextlib
import errno
import io
import itertools
import json
import multiprocessing
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SIZE, call, losses, run

import checkpoint
import configurator
import data
import train
from data import write_shard


@pytest.fixture
def command(shards, tmp_path):
    return ["train.py", *SIZE, f"--dataset={shards}", f"--out_dir={tmp_path / 'run'}"]


@pytest.fixture(scope="module")
def four_steps(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four") / "run"
    call(["train.py", *SIZE, f"--dataset={shards}", f"--out_dir={folder}", "--max_steps=4", "--save_interval=1"])
    return folder


@pytest.fixture
def trained(four_steps, tmp_path):
    """The folder of a run of four steps with checkpoints after each of the last two."""
    return shutil.copytree(four_steps, tmp_path / "run")


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("ckpt*"))


# ---- kills and signals ----

def child(args):
    """train.py in a fork of this process, which saves the seconds of importing torch; its output is dropped."""
    def main():
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            train.main(configurator.load(train.Config, args))
    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return process


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(command, tmp_path):
    """Saving after every step; every other kill waits for a save to be under way. In a folder with spaces and ü."""
    args, last = [*command[1:], "--max_steps=40", "--save_interval=1"], "ckpt_00000040.pt"
    whole, killed = tmp_path / "whole", tmp_path / "nach und nach zurück"
    child([*args, f"--out_dir={whole}"]).join()
    choose, kills, stumps = random.Random(0), 0, 0
    while kills < 20:
        process = child([*args, f"--out_dir={killed}", "--resume"])
        process.join(choose.uniform(0.1, 0.4))
        while kills % 2 and process.is_alive() and not list(killed.glob("*.tmp")):
            time.sleep(0.0005)                          # and not a busy loop, which would take the child's core
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            stumps += len(list(killed.glob("*.tmp")))
        else:                                           # finished too soon: go back to an older checkpoint and on
            assert process.exitcode == 0
            (killed / last).unlink()
    assert stumps >= 5, "hardly a kill met a save"
    child([*args, f"--out_dir={killed}", "--resume"]).join()
    assert losses(killed) == losses(whole) and len(losses(whole)) == 40
    a, b = (checkpoint.read(folder / last) for folder in (whole, killed))
    for part in ("model", "ema"):
        assert all(torch.equal(x, b[part][name]) for name, x in a[part].items())
    assert all(torch.equal(x[key], b["optimizer"]["state"][name][key])
               for name, x in a["optimizer"]["state"].items() for key in x)
    assert checkpoints(killed) == ["ckpt_00000039.pt", last]


def started(command, line):
    """train.py as a process of its own that has printed this line."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    while not process.stdout.readline().startswith(line):
        assert process.poll() is None, process.stderr.read()
    return process


@pytest.mark.slow
def test_an_interrupt_saves_and_says_so(command, tmp_path):
    process = started([*command, "--max_steps=1000000"], "step 3/")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    step = len(losses(tmp_path / "run"))
    assert process.returncode == 130 and f"saved step {step} in" in out and "the same command goes on" in out
    assert "Traceback" not in err and checkpoints(tmp_path / "run") == [f"ckpt_{step:08d}.pt"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_closed_terminal_saves(command, tmp_path):
    """As when a remote connection breaks: SIGHUP, and nowhere to print to."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)                    # under nohup it is ignored, and stays so
        os.execv(sys.executable, [sys.executable, *command, "--max_steps=1000000"])
    shown = b""
    while b"step 3/" not in shown:
        shown += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert checkpoints(tmp_path / "run") == [f"ckpt_{len(losses(tmp_path / 'run')):08d}.pt"]


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(command, tmp_path):
    process = started([*command, "--max_steps=2", "--batch_tokens=1280000"], "step:")       # a step takes a minute
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    while "again to leave at once" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode == -signal.SIGTERM and checkpoints(tmp_path / "run") == []


# ---- checkpoints ----

@pytest.mark.slow
def test_a_disk_that_fills_up_while_saving(command, trained):
    """With a limit on the size of files, which fails as a full disk does: torch.save raises RuntimeError."""
    size = (trained / "ckpt_00000004.pt").stat().st_size
    again = [*command, "--resume", "--max_steps=8", "--save_interval=2"]
    limit = (size // 2, size // 2)
    err = run(again, code=1, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)).stderr
    assert "could not write" in err and "ckpt_00000006.pt" in err and "free some space" in err
    needed = int(err.split("it needs ")[1].split(" bytes")[0].replace(",", ""))
    assert 0.5 < needed / size <= 1
    assert checkpoints(trained) == ["ckpt_00000003.pt", "ckpt_00000004.pt"]
    assert "resuming at step 4" in call(again).stdout and len(losses(trained)) == 8


@pytest.mark.slow
def test_a_disk_that_fills_up_during_the_log(command, trained):
    size = (trained / "log.jsonl").stat().st_size + 100
    again = [*command, "--resume", "--max_steps=8", "--save_interval=8", "--log_interval=1"]
    err = run(again, code=1, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))).stderr
    assert f"cannot write {trained / 'log.jsonl'} (File too large); free some space and resume" in err
    assert checkpoints(trained) == ["ckpt_00000003.pt", "ckpt_00000004.pt"]
    assert "resuming at step 4" in call(again).stdout and len(losses(trained)) == 8     # and no half a row is left


def test_what_torch_says_of_a_full_disk_is_said_in_words(tmp_path, monkeypatch):
    def save(content, file):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598")
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(configurator.Fault, match=r"ckpt_1.pt \(the disk is full\); it needs 12 bytes"):
        checkpoint.write(tmp_path / "ckpt_1.pt", {"x": torch.zeros(3)})
    assert not list(tmp_path.iterdir())


def replace(path, without="", **content):
    """Another file in the place of a checkpoint; not written over it, as its tensors are mapped from there."""
    content = {**checkpoint.read(path), **content}
    content.pop(without, None)
    torch.save(content, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "one bit":
        at = content.index(checkpoint.read(path)["model"]["wte"].numpy().tobytes()[:64])
        content[at + 5] ^= 1
    path.write_bytes(content[:len(content) // 2] if how == "half" else b"" if how == "nothing" else content)


@pytest.mark.parametrize("how", ["one bit", "half", "nothing"])
def test_a_damaged_checkpoint_is_passed_over_and_never_counts_again(command, trained, how):
    damage(trained / "ckpt_00000004.pt", how)
    again = [*command, "--resume", "--max_steps=6", "--save_interval=2"]
    out = call(again)
    assert "ckpt_00000004.pt" in out.stderr and "warning" in out.stderr and "resuming at step 3" in out.stdout
    assert len(losses(trained)) == 6
    assert checkpoints(trained) == ["ckpt_00000004.damaged", "ckpt_00000004.pt", "ckpt_00000006.pt"]
    for name in ("ckpt_00000004.pt", "ckpt_00000006.pt"):
        damage(trained / name, how)
    assert "no sound checkpoint" in call(again, code=1).stderr
    assert len(losses(trained)) == 6, "nothing was started from scratch"


def test_a_checkpoint_that_runs_code_is_refused(command, trained):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {trained / 'sentinel'}",)
    for path in trained.glob("ckpt*"):
        replace(path, wandb_id=Bomb())
    for args in (["--resume"], [f"--init_from={trained}", f"--out_dir={trained / 'new'}"]):
        assert "no sound checkpoint" in call([*command, *args, "--max_steps=5"], code=1).stderr
    assert not (trained / "sentinel").exists() and not (trained / "new").exists()


@pytest.mark.parametrize("name", ["model", "optimizer", "world_size"])
def test_a_checkpoint_without_the_state_of_a_run_is_refused(command, trained, name):
    replace(trained / "ckpt_00000004.pt", without=name)
    assert f"{name} is missing" in call([*command, "--resume", "--max_steps=5"], code=2).stderr


def test_a_checkpoint_without_a_name_at_wandb_is_resumed(command, trained):
    replace(trained / "ckpt_00000004.pt", without="wandb_id")
    assert "resuming at step 4" in call([*command, "--resume", "--max_steps=5"]).stdout


def test_a_checkpoint_of_an_older_format_is_refused_in_one_line(command, trained):
    for path in trained.glob("ckpt*"):
        replace(path, format=4)
    for args in (["--resume"], [f"--init_from={trained}", f"--out_dir={trained / 'new'}"]):
        err = call([*command, *args, "--max_steps=5"], code=2).stderr
        assert "format 4, and this code reads format 5" in err and "train again" in err and err.count("\n") == 1
    assert len(checkpoints(trained)) == 2 and not (trained / "new").exists()


def test_other_data_is_refused_naming_both(command, trained, shards, tmp_path):
    other = shutil.copytree(shards, tmp_path / "other")
    meta = json.loads((other / "meta.json").read_text())
    meta["label"] += " changed"
    meta["shards"][0]["blake2b"] = "0" * 32
    (other / "meta.json").write_text(json.dumps(meta))
    err = call([*command, "--resume", "--max_steps=5", f"--dataset={other}"], code=2).stderr
    assert "changed" in err and err.count("text.jsonl") == 2 and "resume with that --dataset" in err


def test_only_so_many_checkpoints_are_kept(command, tmp_path):
    call([*command, "--max_steps=9", "--save_interval=1", "--keep_last=3", "--keep_interval=4"])
    assert checkpoints(tmp_path / "run") == [f"ckpt_{step:08d}.pt" for step in (4, 7, 8, 9)]


def test_a_copy_beside_the_checkpoints_is_neither_resumed_nor_counted(command, trained):
    for name in ("ckpt_best.pt", "ckpt_00000001_copy.pt"):
        shutil.copy(trained / "ckpt_00000003.pt", trained / name)
    again = [*command, "--resume", "--max_steps=6", "--save_interval=1", "--keep_last=1", "--keep_interval=5"]
    assert "resuming at step 4" in call(again).stdout
    assert checkpoints(trained) == ["ckpt_00000001_copy.pt", "ckpt_00000005.pt", "ckpt_00000006.pt", "ckpt_best.pt"]


def test_a_run_that_is_further_than_it_should_go_is_not_called_done(command, trained):
    err = call([*command, "--resume", "--max_steps=2"], code=2).stderr
    assert "max_steps=2" in err and "step 4" in err and err.count("\n") == 1


# ---- tokens and numbers ----

def test_an_id_out_of_range_never_reaches_the_device(command, shards, tmp_path):
    """Compiled CPU code would abort the process, and CUDA lose its context."""
    bad = shutil.copytree(shards, tmp_path / "bad")
    [path] = bad.glob("train*.bin")
    cfg = configurator.load(train.Config, command[1:])
    drawn = data.window_numbers(cfg, len(data.Dataset(bad, "train", cfg, 300)), 2)[3]       # in the third step
    content = np.fromfile(path, "<u2")
    content[512 + 16 * drawn + 5] = 300
    content.tofile(path)
    err = call([*command, f"--dataset={bad}", "--max_steps=9"], code=2).stderr
    assert f"{path}: id 300 at token {16 * drawn + 5} is not below the vocabulary of 300" in err
    assert len(losses(tmp_path / "run")) == 2 and err.count("error:") == 1


def test_a_network_of_nan_stops_before_the_update(command, trained):
    weights = checkpoint.read(trained / "ckpt_00000004.pt")["model"]
    huge = {**weights, "head.weight": torch.full_like(weights["head.weight"], 3e38)}   # finite, its products are not
    replace(trained / "ckpt_00000004.pt", model=huge)
    err = call([*command, "--resume", "--max_steps=8"], code=1).stderr
    assert "step 5: loss nan, gradient norm nan at learning rate" in err and "resume from the last checkpoint" in err
    assert checkpoints(trained) == ["ckpt_00000003.pt", "ckpt_00000004.pt"] and len(losses(trained)) == 4


def test_an_infinite_gradient_stops_before_the_update(command, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.inf))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("updated"))
    err = call([*command, "--max_steps=2"], code=1).stderr
    assert "gradient norm inf" in err and "nothing was updated" in err and not checkpoints(tmp_path / "run")


def test_out_of_memory_says_what_to_change(command, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(train.DiffusionLoss, "forward", full)
    err = call([*command, "--max_steps=2"], code=1).stderr
    assert "out of memory with 4 sequences of 16 tokens, peak" in err and "halve batch_size" in err


# ---- the machine and the folder ----

def test_no_compiler_is_a_mistake_if_asked_for_and_a_remark_if_not(command, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in call([*command, "--compile=true"], code=2).stderr and not (tmp_path / "run").exists()
    assert "compile false" in call([*command, "--max_steps=1"]).stdout


@pytest.mark.slow
def test_wandb_without_an_account_leaves_nothing(command, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    err = run([*command, "--wandb_log"], code=2, env={**os.environ, "HOME": str(tmp_path)}).stderr
    assert "run `wandb login` or set WANDB_MODE=offline" in err and not (tmp_path / "run").exists()


def test_wandb_never_stops_a_run(command, tmp_path, monkeypatch):
    wandb, rows = pytest.importorskip("wandb"), []

    class Broken:
        id = "broken"

        def log(self, row, step):
            rows.append((step, set(row)))
            if step == 2:
                raise BrokenPipeError("the service died")
    monkeypatch.setattr(wandb, "login", lambda: True)
    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    out = call([*command, "--wandb_log", "--max_steps=3"])
    assert out.stderr.count("Weights & Biases is given up (BrokenPipeError") == 1 and len(losses(tmp_path / "run")) == 3
    assert [step for step, _ in rows] == [1, 2] and {"loss", "lr", "grad_norm"} <= rows[0][1]


def test_two_trainers_in_one_folder(command, trained):
    with train.lock(trained / "log.jsonl"):
        assert "another process is at work" in call([*command, "--resume", "--max_steps=9"], code=2).stderr
    assert len(losses(trained)) == 4


def test_a_file_system_without_locks_is_said(command, tmp_path, monkeypatch):
    import fcntl

    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", flock)
    assert "its file system has no locks" in call([*command, "--max_steps=1"], code=2).stderr
    assert not checkpoints(tmp_path / "run")


def test_an_out_dir_that_cannot_be_written(command, tmp_path):
    (tmp_path / "file").write_text("")
    out_dir = tmp_path / "file" / "run"
    err = call([*command, f"--out_dir={out_dir}"], code=2).stderr
    assert f"cannot write to {out_dir}" in err and "choose another" in err and err.count("\n") == 1


def test_a_row_that_was_cut_short_is_dropped_and_the_others_stay(command, trained):
    with open(trained / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    call([*command, "--resume", "--max_steps=6"])
    assert len(losses(trained)) == 6


def test_odd_rows_of_the_log_never_stop_a_run(command, trained):
    """Such as another program, or a fault of the disk, may leave there; later rows are kept."""
    rows = (trained / "log.jsonl").read_text().splitlines()
    odd = ["5", "null", 100_000 * "[", "{}", "[]", '{"step": "x"}', "\0\0", "no json", "\udcff"]
    text = "\n".join([rows[0], *odd, *rows[1:]]) + "\n"
    (trained / "log.jsonl").write_text(text, errors="surrogateescape")
    call([*command, "--resume", "--max_steps=6"])
    kept = (trained / "log.jsonl").read_text(errors="replace").splitlines()
    assert kept[:1] == rows[:1] and all(row in kept for row in rows if "bound" not in row) and '"step": 6' in kept[-1]


def test_a_slow_loader_shows_in_the_line_of_the_log(command, tmp_path, monkeypatch):
    def slow(*args):
        for batch in data.step_batches(*args):
            time.sleep(0.1)
            yield batch
    monkeypatch.setattr(train, "step_batches", slow)
    out = call([*command, "--max_steps=2"]).stdout
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert row["step_ms"] > row["data_ms"] > 100                        # two batches, made beside little work
    assert f"data {row['data_ms']:.0f} ms" in out


def test_a_slow_step_says_how_far_it_is_and_a_run_of_days_is_warned_about(command, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HEARTBEAT", 0)
    out = call([*command, "--max_steps=1"])
    assert re.search(r"\nstep 1: 1 of 2 batches, left 0\.\d min\n", out.stdout)
    assert "step 1: 2 of 2" not in out.stdout and not out.stderr

    seconds = itertools.count(step=60)                      # minutes, each look at the clock one: two a batch
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    machine, data = SimpleNamespace(device=torch.device("cpu")), iter([SimpleNamespace(step_tokens=1)] * 4)
    monkeypatch.setattr(train, "backward", lambda *_: torch.ones(()))
    cfg, net = train.Config(batch_size=1, batch_tokens=4 * 512, max_steps=10_000), torch.nn.Linear(1, 1)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train.train_step(net, torch.optim.SGD(net.parameters()), data, cfg, 5000, machine)
    left = "left 28 days (fewer with a lower --max_steps)"  # 2 min x 4 x 5,000 are 27.8 days
    assert said.getvalue() == "".join(f"step 5001: {i} of 4 batches, {left}\n" for i in (1, 2, 3))
    assert train.duration(2 * 86_400) == "2880.0 min"
    assert train.duration(45.2 * 86_400) == "45 days (fewer with a lower --max_steps)"


@pytest.mark.parametrize("how, words", [
    ("one byte less", "found 20240520, 1, 17,726 and 36,475"), ("nothing left", "found 0, 0, 0 and 0"),
    ("no shards", "no data for"), ("val gone", "val_000000.bin is missing"), ("no val", "no val shards"),
    ("short", "no train shard holds a window of block_size=16")])
def test_shards_that_cannot_be_trained_on_are_refused_at_the_start(command, shards, tmp_path, how, words):
    bad = shutil.copytree(shards, tmp_path / "bad")
    [train_shard], [val_shard] = bad.glob("train*.bin"), bad.glob("val*.bin")
    content = {"one byte less": train_shard.read_bytes()[:-1], "nothing left": b""}
    if how in content:
        train_shard.write_bytes(content[how])
    elif how == "short":
        write_shard(train_shard, np.arange(9))
    else:
        (train_shard if how == "no shards" else val_shard).unlink()
    if how == "no val":
        (bad / "meta.json").unlink()
    err = call([*command, f"--dataset={bad}"], code=2).stderr
    assert words in err and str(bad) in err and len(err.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_out_of_memory_anywhere_is_one_line(command, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    err = call([*command, "--max_steps=1"], code=1).stderr
    assert "Tried to allocate 2 GiB; use a smaller batch_size" in err and err.count("error:") == 1


def test_a_run_of_weights_and_biases_is_finished(command, monkeypatch):
    wandb, finished = pytest.importorskip("wandb"), []
    run = SimpleNamespace(id="one", log=lambda *_, **__: None, finish=lambda: finished.append(True))
    monkeypatch.setattr(wandb, "login", lambda: True)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    call([*command, "--wandb_log", "--max_steps=2"])
    assert finished == [True]
