"""Many processes: the losses of one, checkpoints that move between them, and leaving together. That their batches are
those of one process is in test_data.py."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SIZE, call, losses

import checkpoint

STARTED = []


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    while STARTED:
        process = STARTED.pop()
        process.terminate()                     # torchrun then ends its processes; killed, it would leave them behind
        process.wait(60)


def torchrun(args, code=0, script="train.py", wait=True, options=()):
    """train.py on two processes; torchrun adds a report of its own to a failure, and its own traceback."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options, script]
    process = subprocess.Popen([*map(str, [*command, *args])], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    STARTED.append(process)
    if not wait:
        return process
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (process.returncode, out, err)
    return out, err


@pytest.fixture(scope="module")
def command(shards):
    return ["train.py", *SIZE, f"--dataset={shards}", "--max_steps=10", "--save_interval=5"]


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """A run of ten steps on one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    call([*command, f"--out_dir={folder}"])
    return folder


def same(losses, others):
    """Equal to 1e-6, relative, as the sums of float32 gradients in another order allow."""
    return losses == pytest.approx(others, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("args", [["--parallel=ddp"],
                                  ["--parallel=fsdp", "--batch_size=1", "--activation_checkpointing",
                                   "--eval_interval=5"]])
def test_two_processes_compute_what_one_does_and_one_goes_on_from_there(command, alone, tmp_path, args):
    out, _ = torchrun([*command[1:], *args, f"--out_dir={tmp_path / 'run'}"])
    assert f"parallel {args[0][11:]}" in out and "2 processes x" in out
    assert same(losses(tmp_path / "run"), losses(alone)) and len(losses(alone)) == 10
    last = [json.loads(open(folder / "log.jsonl").readlines()[-1]) for folder in (alone, tmp_path / "run")]
    assert last[0]["bound"] == pytest.approx(last[1]["bound"], rel=1e-5)
    a, b = (checkpoint.read(folder / "ckpt_00000010.pt") for folder in (alone, tmp_path / "run"))
    assert list(a["ema"]) == list(b["ema"]) and list(a["optimizer"]["state"]) == list(b["optimizer"]["state"])
    assert all(torch.allclose(a["ema"][name], b["ema"][name], atol=1e-5) for name in a["ema"])
    (tmp_path / "run" / "ckpt_00000010.pt").unlink()
    out = call([*command, "--resume", f"--out_dir={tmp_path / 'run'}"]).stdout
    assert "resuming on 1 processes, was 2" in out and "resuming at step 5 of 10" in out
    assert same(losses(tmp_path / "run"), losses(alone))


COUNT = """
import sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
import train
name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
count, reduce_scatter = [], getattr(dist, name)

def counted(*args, **settings):
    count.append(1)
    open({file!r} + str(train.mc.rank()), "w").write(str(len(count)))
    return reduce_scatter(*args, **settings)
setattr(dist, name, counted)
train.run(train.main, train.Config)
"""


@pytest.mark.slow
def test_shards_add_up_their_gradients_once_a_step(command, tmp_path):
    """Of each layer, and of the rest, however many batches are accumulated."""
    (tmp_path / "count.py").write_text(COUNT.format(root=str(ROOT), file=str(tmp_path / "count")))
    args = [*command[1:], "--parallel=fsdp", "--batch_size=2", "--max_steps=3", f"--out_dir={tmp_path / 'run'}"]
    torchrun(args, script=tmp_path / "count.py")
    assert [int((tmp_path / f"count{rank}").read_text()) for rank in (0, 1)] == [3 * (2 + 1)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_adapters_of_two_processes_are_those_of_one(base, pairs, tmp_path, parallel):
    """Examples and adapters: frozen weights are shared out or copied, and never saved; one process goes on."""
    args = [*SIZE, "--block_size=32", "--prompt_size=16", "--batch_size=2", "--batch_tokens=256", f"--dataset={pairs}",
            f"--init_from={base}", "--lora_rank=2", "--max_steps=6", "--save_interval=3", "--learning_rate=1e-2"]
    call(["train.py", *args, f"--out_dir={tmp_path / 'one'}"])
    torchrun([*args, f"--parallel={parallel}", f"--out_dir={tmp_path / 'two'}"])
    assert same(losses(tmp_path / "two"), losses(tmp_path / "one")) and len(losses(tmp_path / "one")) == 6
    one, two = (checkpoint.read(tmp_path / name / "ckpt_00000006.pt") for name in ("one", "two"))
    assert list(one["ema"]) == list(two["ema"]) and all(".lora_" in name for name in two["ema"])
    assert one["base"] == two["base"]
    tolerance = {".cross.": 1e-3, ".q.": 1e-4}      # whose gradients are hardly more than rounding errors
    for name, x in one["ema"].items():
        atol = next((value for part, value in tolerance.items() if part in name), 1e-5)
        assert torch.allclose(x, two["ema"][name], atol=atol), name
    (tmp_path / "two" / "ckpt_00000006.pt").unlink()
    call(["train.py", *args, "--resume", f"--out_dir={tmp_path / 'two'}"])
    assert same(losses(tmp_path / "two"), losses(tmp_path / "one"))


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(command, alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    (tmp_path / "run" / "ckpt_00000010.pt").unlink()
    out, _ = torchrun([*command[1:], "--resume", "--parallel=fsdp", f"--out_dir={tmp_path / 'run'}"])
    assert "resuming at step 5 of 10" in out and "resuming on 2 processes, was 1" in out
    assert same(losses(tmp_path / "run"), losses(alone))


@pytest.mark.slow
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


FAULTY = """
import sys, torch
sys.path.insert(0, {root!r})
import configurator, train
step_batches = train.step_batches
def poisoned(cfg, data, step, micro_batches, device):
    for batch in step_batches(cfg, data, step, micro_batches, device):
        yield batch._replace(eps=batch.eps * float("nan")) if train.mc.rank() == 1 and step == 7 else batch
class FullDevice(train.DiffusionLoss):
    def forward(self, batch):
        self.calls = getattr(self, "calls", 0) + 1
        if train.mc.rank() == 1 and self.calls == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(batch)
{change}
configurator.run(train.main, train.Config)
"""


@pytest.mark.slow
@pytest.mark.parametrize("change, words", [("train.step_batches = poisoned", "step 8: loss nan"),
                                           ("train.DiffusionLoss = FullDevice", "out of memory with 4 sequences")])
def test_a_fault_of_one_process_ends_both_before_the_update(command, tmp_path, change, words):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(root=str(ROOT), change=change))
    _, err = torchrun([*command[1:], f"--out_dir={tmp_path / 'run'}"], code=1, script=script)
    said = [line for line in err.splitlines() if line.startswith("error:")]
    assert sum(words in line for line in said) == 1 and len(said) <= 2, err
    assert "[rank0]: Traceback" not in err and "[rank1]: Traceback" not in err, err
    assert len(losses(tmp_path / "run")) == 7
    assert [path.name for path in (tmp_path / "run").glob("ckpt*")] == ["ckpt_00000005.pt"]
    checkpoint.read(tmp_path / "run" / "ckpt_00000005.pt")


@pytest.mark.slow
def test_a_mistake_is_said_once(command, tmp_path):
    _, err = torchrun([*command[1:], "--dataset=nowhere", f"--out_dir={tmp_path / 'run'}"], code=1)
    assert [line[:16] for line in err.splitlines() if line.startswith("error:")] == ["error: no data f"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mistake_that_the_first_process_finds_ends_the_others(command, alone):
    """An out_dir that is taken, which only the first one looks at."""
    _, err = torchrun([*command[1:], f"--out_dir={alone}", "--weight_decay=0.5"], code=1)
    said = [line for line in err.splitlines() if line.startswith("error:")]
    assert "already holds a run" in said[0] and len(said) <= 2 and "[rank1]: Traceback" not in err, err


def test_a_batch_that_the_processes_cannot_share_names_their_numbers(command, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    err = call([*command, "--batch_tokens=256", f"--out_dir={tmp_path / 'run'}"], code=2).stderr
    assert "batch_tokens=256 is not a multiple of 192 (batch_size * block_size * world_size=3)" in err
    assert "try 192, or 1, 2, 4, 8, 16 processes" in err and not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fsdp_on_one_gpu_in_bf16(shards, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "train.py", *SIZE,
               f"--dataset={shards}", "--max_steps=6", "--save_interval=3", "--device=cuda", "--dtype=bfloat16",
               "--parallel=fsdp", f"--out_dir={tmp_path}"]
    for resume in ("false", "true"):
        one = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
        subprocess.run([*command, f"--resume={resume}"], cwd=ROOT, check=True, env=one)
        (tmp_path / "ckpt_00000006.pt").unlink()
    assert len(losses(tmp_path)) == 6


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_nothing_is_lost(command, alone, tmp_path, monkeypatch):
    """Without the variable, torch 2.13 never gets its second start on gloo together (pytorch/pytorch issue 135712)."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    process = torchrun([*command[1:], "--save_interval=2", "--resume", f"--out_dir={tmp_path / 'run'}"], wait=False,
                       options=["--max-restarts=1"])
    while not process.stdout.readline().startswith("step 3/"):
        assert process.poll() is None
    workers = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "resuming at step" in out, (out, err)
    assert same(losses(tmp_path / "run"), losses(alone))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_compiled_sharded_and_recomputed_is_eager_alone(command, tmp_path, monkeypatch):
    """What config/full.py does, on one process; of one layer, as the compiler takes half a minute for each."""
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    args = [*command[1:], "--n_layer=1", "--cross_every=1", "--self_conditioning=0", "--max_steps=2"]
    call(["train.py", *args, f"--out_dir={tmp_path / 'alone'}"])
    args += ["--compile=true", "--parallel=fsdp", "--activation_checkpointing", f"--out_dir={tmp_path / 'full'}"]
    torchrun(args, options=["--nproc_per_node=1"])
    assert losses(tmp_path / "full") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
