"""Many processes: the same batches, noise and losses as one, checkpoints that move between them, and leaving together."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SIZE, call, losses

import configurator
import train
from model import read_checkpoint


STARTED = []


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    while STARTED:
        process = STARTED.pop()
        process.terminate()                             # torchrun ends its processes; killed, it would leave them behind
        process.wait(60)


def torchrun(args, code=0, script="train.py", wait=True, options=()):
    """train.py on two processes; torchrun adds a report of its own to a failure, and its own traceback."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options, script, *args]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    STARTED.append(process)
    if not wait:
        return process
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (process.returncode, out, err)
    return out, err


@pytest.fixture(scope="module")
def command(shards):
    return ["train.py", *SIZE, f"--dataset={shards}", "--max_steps=20", "--save_interval=10"]


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """A run of twenty steps on one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    call([*command, f"--out_dir={folder}"])
    return folder


def same(losses, others):
    """Equal to 1e-6, relative, as the sums of float32 gradients in another order allow."""
    return losses == pytest.approx(others, rel=1e-6)


@pytest.mark.parametrize("world_size", [2, 4, 16])
def test_batches_and_noise_are_those_of_one_process(shards, world_size):
    cfg = configurator.load(train.Config, [*SIZE, "--batch_size=2", "--batch_tokens=256"])
    windows = train.Windows(shards, "train", cfg, 300)

    def samples(ranks):
        batches = [train.make_batch(cfg, windows, 3, samples, "cpu")
                   for rank in range(ranks) for samples in train.micro_batches(cfg, rank, ranks)]
        assert sum(len(batch.idx) for batch in batches) == cfg.samples == 16
        rows = [tuple(field[i].tolist() for field in batch[:-1]) for batch in batches for i in range(len(batch.idx))]
        return sorted(rows, key=repr)
    assert samples(1) == samples(world_size)


@pytest.mark.parametrize("args", [["--parallel=ddp"], ["--parallel=fsdp", "--batch_size=1", "--activation_checkpointing=True"]])
def test_two_processes_compute_what_one_does_and_one_goes_on_from_there(command, alone, tmp_path, args):
    """With batch_size=1 every other batch has no first guess to make, and yet all must call the sharded network."""
    out, _ = torchrun([*command[1:], *args, f"--out_dir={tmp_path / 'run'}"])
    assert f"parallel {args[0][11:]}" in out and "2 processes x" in out
    assert same(losses(tmp_path / "run"), losses(alone)) and len(losses(alone)) == 20
    last = [json.loads(open(folder / "log.jsonl").readlines()[-1]) for folder in (alone, tmp_path / "run")]
    assert last[0]["bound"] == pytest.approx(last[1]["bound"], rel=1e-5)
    a, b = (read_checkpoint(folder / "ckpt_00000020.pt") for folder in (alone, tmp_path / "run"))
    assert list(a["ema"]) == list(b["ema"]) and list(a["optimizer"]["state"]) == list(b["optimizer"]["state"])
    assert all(torch.allclose(a["ema"][name], b["ema"][name], atol=1e-5) for name in a["ema"])
    (tmp_path / "run" / "ckpt_00000020.pt").unlink()
    out = call([*command, "--resume=True", f"--out_dir={tmp_path / 'run'}"]).stdout
    assert "resuming on 1 processes, was 2" in out and "resuming at step 10 of 20" in out
    assert same(losses(tmp_path / "run"), losses(alone))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_adapters_of_two_processes_are_those_of_one(base, pairs, tmp_path, parallel):
    """Examples and adapters: frozen weights are shared out or copied, and never saved; one process goes on."""
    args = [*SIZE, "--block_size=32", "--prompt_size=16", "--batch_size=2", "--batch_tokens=256", f"--dataset={pairs}", f"--init_from={base}",
            "--lora_rank=2", "--max_steps=6", "--save_interval=3", "--learning_rate=1e-2"]
    call(["train.py", *args, f"--out_dir={tmp_path / 'one'}"])
    torchrun([*args, f"--parallel={parallel}", f"--out_dir={tmp_path / 'two'}"])
    assert same(losses(tmp_path / "two"), losses(tmp_path / "one")) and len(losses(tmp_path / "one")) == 6
    one, two = (read_checkpoint(tmp_path / name / "ckpt_00000006.pt") for name in ("one", "two"))
    assert list(one["ema"]) == list(two["ema"]) and all(".lora_" in name for name in two["ema"]) and one["base"] == two["base"]
    for name in one["ema"]:             # who sees no prompt has no use for queries to it: their gradients are rounding errors, or nearly
        assert torch.allclose(one["ema"][name], two["ema"][name], atol=1e-3 if ".cross." in name else 1e-5), name
    (tmp_path / "two" / "ckpt_00000006.pt").unlink()
    call(["train.py", *args, "--resume=True", f"--out_dir={tmp_path / 'two'}"])
    assert same(losses(tmp_path / "two"), losses(tmp_path / "one"))


def test_two_processes_go_on_where_one_stopped(command, alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    (tmp_path / "run" / "ckpt_00000020.pt").unlink()
    out, _ = torchrun([*command[1:], "--resume=True", "--parallel=fsdp", f"--out_dir={tmp_path / 'run'}"])
    assert "resuming at step 10 of 20" in out
    assert same(losses(tmp_path / "run"), losses(alone))


def test_sigterm_ends_both_after_the_same_step_with_one_save(command, tmp_path):
    process = torchrun([*command[1:], "--max_steps=100000", "--save_interval=100000", f"--out_dir={tmp_path / 'run'}"],
                       wait=False)
    while not process.stdout.readline().startswith("step 3/"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 28, "left to be killed after 30 s"
    step = len(losses(tmp_path / "run"))
    assert f"saved step {step}" in out and process.returncode == 1, (out, err)      # torchrun's own exit code
    assert [path.name for path in (tmp_path / "run").glob("ckpt*")] == [f"ckpt_{step:08d}.pt"]


def test_a_nan_in_one_process_stops_both_before_the_update(command, tmp_path):
    script = tmp_path / "poisoned.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import configurator, train
make_batch = train.make_batch
def poisoned(cfg, windows, step, samples, device):
    batch = make_batch(cfg, windows, step, samples, device)
    return batch._replace(eps=batch.eps * float("nan")) if train.rank() == 1 and step == 12 else batch
train.make_batch = poisoned
train.main(configurator.load(train.Config))
""")
    _, err = torchrun([*command[1:], f"--out_dir={tmp_path / 'run'}"], code=1, script=script)
    said = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "step 13: loss nan" in said[0] and "resume from step 10" in said[0], err
    assert len(losses(tmp_path / "run")) == 12
    assert [path.name for path in (tmp_path / "run").glob("ckpt*")] == ["ckpt_00000010.pt"]
    read_checkpoint(tmp_path / "run" / "ckpt_00000010.pt")


def test_a_mistake_is_said_once(command, tmp_path):
    _, err = torchrun([*command[1:], "--dataset=nowhere", f"--out_dir={tmp_path / 'run'}"], code=1)
    assert [line[:16] for line in err.splitlines() if line.startswith("error:")] == ["error: no data f"]
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_processes_cannot_share_names_their_numbers(command, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    err = call([*command, "--batch_tokens=256", f"--out_dir={tmp_path / 'run'}"], code=2).stderr
    assert "batch_tokens=256 is not a multiple of 192 (batch_size * block_size * world_size=3)" in err
    assert "try 192, or 1, 2, 4, 8, 16 processes" in err and not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fsdp_on_one_gpu_in_bf16(shards, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "train.py", *SIZE, f"--dataset={shards}",
               "--max_steps=6", "--save_interval=3", "--device=cuda", "--dtype=bfloat16", "--parallel=fsdp"]
    for resume in ("False", "True"):
        subprocess.run([*command, f"--out_dir={tmp_path}", f"--resume={resume}"], cwd=ROOT, check=True,
                       env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"})
        (tmp_path / "ckpt_00000006.pt").unlink()
    assert len(losses(tmp_path)) == 6


def test_a_killed_process_is_restarted_and_nothing_is_lost(command, alone, tmp_path, monkeypatch):
    """Without the variable, torch 2.13 never gets its second start on gloo together (pytorch/pytorch issue 135712)."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    process = torchrun([*command[1:], "--save_interval=2", "--resume=True", f"--out_dir={tmp_path / 'run'}"], wait=False,
                       options=["--max-restarts=1"])
    while not process.stdout.readline().startswith("step 5/"):
        assert process.poll() is None
    workers = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "resuming at step" in out, (out, err)
    assert same(losses(tmp_path / "run"), losses(alone))


def test_a_fault_of_one_process_ends_the_other_without_a_traceback(command, shards, tmp_path):
    """An id beyond the vocabulary that only process 1 meets."""
    bad = shutil.copytree(shards, tmp_path / "bad")
    [path] = bad.glob("train*.bin")
    cfg = configurator.load(train.Config, [*command[1:]])
    windows = train.Windows(bad, "train", cfg, 300)
    data = np.fromfile(path, "<u2")
    data[512 + 16 * train.permute(4 * cfg.samples + 5, len(windows), train.mix(cfg.seed, 0))] = 300
    data.tofile(path)
    out, err = torchrun([*command[1:], f"--dataset={bad}", f"--out_dir={tmp_path / 'run'}"], code=1)
    said = [line for line in err.splitlines() if line.startswith("error:")]
    assert "id 300 at token" in said[0] and len(said) <= 2 and "[rank0]: Traceback" not in err, err
    assert len(losses(tmp_path / "run")) == 4


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_compiled_sharded_and_recomputed_is_eager_alone(command, tmp_path):
    """What config/full.py does, on one process."""
    args = [*command[1:], "--n_layer=2", "--span_warmup=0", "--p_whole=0.3", "--max_steps=3"]
    call(["train.py", *args, f"--out_dir={tmp_path / 'alone'}"])
    torchrun([*args, "--compile=true", "--parallel=fsdp", "--activation_checkpointing=True", f"--out_dir={tmp_path / 'full'}"],
             options=["--nproc_per_node=1"])
    assert losses(tmp_path / "full") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
