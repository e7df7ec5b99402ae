"""
Four stages for the day a GPU is there, each with one table at its end and JSON; rehearsed on a CPU.

    bash bench/gpu.sh check                                     # is it right?
    bash bench/gpu.sh speed --peer=../nanoGPT                   # how fast is it?
    bash bench/gpu.sh write 10 config/micro.py text.jsonl.xz    # train for ten minutes in all, measure, write
    bash bench/gpu.sh full                                      # config/full.py on one card, killed and resumed
    bash bench/gpu.sh check --rehearse --out=/tmp/gpu           # the same lines of code, tiny and on the CPU

A stage ends when its time is over, keeps what it had measured until then, and returns 1 if something is wrong.
"""
import base64
import contextlib
import copy
import json
import math
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint as ckpt
import fables
import quality
import speed
import train
from configurator import Fault, UserError, in_range, load, one_of, run
from data import META, PATTERN, get_tokenizer, read_parts, step_batches, write_file, write_shard
from generate import Canvas, Decoder, Sampling, bound, generate, generators
from machine import Machine, choose_machine, keep_memory
from model import SunFish

MINUTES = {"check": 4, "speed": 4, "write": 10, "full": 6}          # of a stage, unless told otherwise
TINY = dict(n_layer=2, cross_every=2, n_head=2, n_embd=32, token_dim=16, block_size=16, prompt_size=8,
            max_block_length=8, batch_size=4, batch_tokens=128)
SMALL = dict(n_layer=4, cross_every=2, n_head=8, n_embd=512, token_dim=136, block_size=256, prompt_size=64,
             max_block_length=16, batch_size=8, batch_tokens=16 * 256)
PART, PARTS_BACK = 14_000_000, 4            # bytes of a part of the network, and parts that go to `out`
PROMPT, BLANK = 24, 8                       # tokens given of a text, and tokens blanked in the middle of a window


@dataclass(frozen=True)
class Config:
    stage: str = ""                  # check, speed, write, full
    minutes: float = 0.0             # time for the stage; 0: check 4, speed 4, write 10, full 6
    config: str = ""                 # write: config file of train.py
    text: str = ""                   # write: .txt, .jsonl, .jsonl.xz; or a folder that is prepared already
    vocab_size: int = 4096           # check, write: ids of the tokenizer
    train: str = ""                  # write, full: more settings of train.py, "--learning_rate=1e-3 --compile=false"
    reserve: float = 1.5             # write: minutes at the end for measuring and writing
    trial: float = 20.0              # write: seconds of training, after the first step, that measure the speed
    peer: str = ""                   # speed: folder of a nanoGPT clone
    out: str = "out/gpu"             # folder for what comes back: at most eight files a stage, each under 15 MB
    work: str = "out/gpu_work"       # folder for shards and runs
    rehearse: bool = False           # tiny sizes, on the CPU
    seed: int = 1                    # of weights, data, noise
    device: str = "auto"             # auto, cpu, cuda
    dtype: str = "auto"              # auto, float32, bfloat16: of the matrix products
    compile: str = "auto"            # auto, true, false: torch.compile

    def check(self):
        one_of(self, "stage", *MINUTES)
        one_of(self, "dtype", "auto", "float32", "bfloat16")
        one_of(self, "compile", "auto", "true", "false")
        in_range(self, 0, 1e4, "minutes", "reserve", "trial")
        if self.stage == "write" and not self.rehearse and not (self.config and self.text):
            raise UserError(f"write needs more than config={self.config} and text={self.text}; write for example: "
                            "bash bench/gpu.sh write 10 config/micro.py text.jsonl.xz")
        if self.text and not Path(self.text).exists():
            raise UserError(f"text={self.text} is not there; name a .txt or .jsonl file")
        if self.peer and not Path(self.peer, "model.py").exists():
            raise UserError(f"peer={self.peer} has no model.py; name the folder of a nanoGPT clone")


# ---- a stage: its time, its files, the scripts that it runs ----

class Day:
    """A stage under way: settings, machine, sizes of small networks, folders, the time that is left, what was found."""

    def __init__(self, cfg):
        self.cfg, self.sizes = cfg, TINY if cfg.rehearse else SMALL
        self.vocab_size = 300 if cfg.rehearse else cfg.vocab_size
        self.end = time.perf_counter() + 60 * (cfg.minutes or MINUTES[cfg.stage])
        self.machine = choose_machine(cfg)
        self.on_gpu = self.machine.device.type == "cuda"
        self.out, self.work = Path(cfg.out).resolve(), Path(cfg.work, "rehearsal" * cfg.rehearse).resolve()
        card = torch.cuda.get_device_name(self.machine.device) if self.on_gpu else "cpu"
        self.rows = []
        self.found = {"torch": torch.__version__, "card": card, "settings": asdict(cfg), "rows": self.rows}
        for folder in (self.out, self.work):
            folder.mkdir(parents=True, exist_ok=True)

    def left(self):
        """Seconds until the stage must have ended."""
        return self.end - time.perf_counter()

    def save(self):
        text = json.dumps(self.found, indent=1) + "\n"
        write_file(self.out / f"{self.cfg.stage}.json", text.encode())

    def add(self, **row):
        """Keep a row, on the disk too."""
        self.rows.append(row)
        self.save()

    def compare(self, what, measured, tolerance):
        """Keep and print the row of a measured difference; a nan is not within any tolerance."""
        good = measured <= tolerance
        print(f"{'ok    ' if good else 'FAILED'}  {what}  {measured:.3g} {'<=' if good else '>'} {tolerance:.3g}")
        self.add(what=what, ok=good, measured=measured, tolerance=tolerance)

    def failed(self, what, error):
        """Keep and print the row of what could not be measured."""
        why = f"{type(error).__name__}: {ckpt.reason(error)}"
        print(f"FAILED  {what}  {why}")
        self.add(what=what, ok=False, why=why, trace="".join(traceback.format_exception(error)))


def kill_group(process):
    """Kill a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def script(day, command, codes=(0,), watch=None, limit=math.inf, grace=10, echo=False):
    """Run a script of this repository; returns [(seconds since its start, line)] of its output. Fault, with its last
    words, unless it ends with one of the exit codes.

    watch(seconds, line) sees each line and may return a signal for it, once. SIGTERM comes after `limit` seconds, and
    SIGKILL `grace` seconds later.
    """
    begun, lines = time.perf_counter(), []
    limit = max(0, min(limit, day.left()))
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)
    timers = [threading.Timer(limit, process.terminate), threading.Timer(limit + grace, kill_group, [process])]
    try:
        for timer in timers:
            timer.start()
        for line in process.stdout:
            lines.append((time.perf_counter() - begun, line.rstrip()))
            if echo:
                print(line, end="")
            number = watch and watch(*lines[-1])
            if number:
                watch = timers[0].cancel()                  # None: a second SIGTERM would be one too many
                process.send_signal(number)
            if number == signal.SIGKILL:
                kill_group(process)
        code = process.wait()
    finally:                                                # the stage may be interrupted
        for timer in timers:
            timer.cancel()
        process.terminate()                                 # torchrun then ends its processes
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        kill_group(process)
        process.wait()
        process.stdout.close()
    if code not in codes:
        said = [line for _, line in lines if line.startswith("error:")] or [line for _, line in lines if line]
        raise Fault(f"{command[0]} ended with code {code}: {said[-1] if said else 'it said nothing'}")
    return lines


def kill_at(word):
    """A watch that kills at the first line that begins with a word."""
    def watch(_, line):
        if line.startswith(word):
            time.sleep(0.05)                                # the row of the log follows the line
            return signal.SIGKILL
    return watch


def flags(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def train_command(day, folder, *args, **settings):
    """The command line of train.py for a run in a folder; evaluation at the end only, of two texts."""
    cfg = day.cfg
    common = dict(seed=cfg.seed, device=cfg.device, dtype=cfg.dtype, compile=cfg.compile, eval_interval=0,
                  eval_sequences=2, keep_last=1, out_dir=folder)
    return ["train.py", *flags(**common | settings), *args]


def read_log(folder):
    """The rows of training in a run's log; a last line may be cut short."""
    file = Path(folder, "log.jsonl")
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in rows if "loss" in row]


def log_losses(folder):
    return {row["step"]: row["loss"] for row in read_log(folder)}


def made_up_shards(day, vocab_size):
    """A folder of shards of random tokens, under a tokenizer whose words are numbers."""
    folder, rng = day.work / f"made_up_{vocab_size}", np.random.default_rng(day.cfg.seed)
    if (folder / "meta.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    words = [bytes([i]) for i in range(256)] + [b"%06d" % i for i in range(vocab_size - 257)]
    tokenizer = dict(name="corpus", pattern=PATTERN, tokens=[base64.b64encode(word).decode() for word in words])
    shards = [write_shard(folder / f"{split}_000000.bin", (vocab_size * rng.random(n) ** 3).astype("u2"))
              for split, n in (("train", 300_000), ("val", 20_000))]
    kinds = {name: rule[0] if isinstance(rule, tuple) else rule for name, rule in META.items()}
    meta = {name: kind() for name, kind in kinds.items()} | dict(label="made-up tokens", kind="text", finished=True)
    meta |= dict(tokenizer=tokenizer, vocab_size=vocab_size, shards=shards)
    write_file(folder / "meta.json", json.dumps(meta).encode())
    return folder


# ---- check: functions that take the Day and return (measured, tolerance), or raise; the docstring says what ----

@torch.no_grad()
def network(day, **sizes):
    """A small network whose output is not zero, as it is at first, and its settings."""
    cfg = train.Config(**{**day.sizes, **sizes}, self_conditioning=1.0, seed=day.cfg.seed)
    torch.manual_seed(day.cfg.seed)
    net = SunFish(cfg, day.vocab_size)
    for p in net.parameters():
        if not p.any() or p is net.in_proj.weight:          # half of which starts at zero
            p.add_(0.5 * p.size(-1) ** -0.5 * torch.randn_like(p))
    return net.to(day.machine.device), cfg


def batches(cfg, device, size, parts=1):
    """`size` random sequences as a list of Batches of equal size."""
    torch.manual_seed(cfg.seed)
    data, n = speed.Random(cfg, 300), size // parts
    return list(step_batches(cfg, data, 0, [range(i, i + n) for i in range(0, size, n)], device))


class Step(NamedTuple):
    loss: torch.Tensor               # sum of the losses of all tokens, float64 on the CPU, as the others
    grad: torch.Tensor               # (n,) gradients of all weights but the schedule's
    h: torch.Tensor                  # hidden states of the last batch


def take_step(net, some, machine):
    """The Step of Batches, as train.py accumulates them."""
    hidden, total = [], torch.zeros((), dtype=torch.float64)
    net.zero_grad()
    hook = net.register_forward_hook(lambda *call: hidden.append(call[2].detach()))
    for batch in some:
        total += train.backward(train.DiffusionLoss(net), batch, machine).item()
    hook.remove()
    grads = [p.grad.flatten() for name, p in net.named_parameters() if p.grad is not None and name != "schedule"]
    return Step(total, torch.cat(grads).double().cpu(), hidden[-1].double().cpu())


def apart(a, b):
    """The distance of two tensors, relative to the second."""
    return ((a - b).norm() / b.norm()).item()


def worst(*distances):
    """The largest; nan if one is nan, which max would pass over."""
    return float(np.max(distances))


def precise_step(net, some):
    """The Step of Batches in float64 on the CPU: what the code casts to float32 is cast to float64."""
    some = [batch._make(x.cpu() if torch.is_tensor(x) else x for x in batch) for batch in some]
    some = [batch._replace(eps=batch.eps.double()) for batch in some]
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        return take_step(copy.deepcopy(net).cpu().double(), some, Machine(torch.device("cpu"), torch.float32, False))


def bfloat16_and_float64(day):
    net, cfg = network(day)
    some = batches(cfg, day.machine.device, 2)
    return take_step(net, some, day.machine._replace(dtype=torch.bfloat16)), precise_step(net, some)


def check_loss(day):
    """loss in bfloat16, beside float64 on the CPU"""
    mine, exact = bfloat16_and_float64(day)
    return apart(mine.loss, exact.loss), 0.005


def check_states(day):
    """hidden states and gradient in bfloat16, beside float64 on the CPU"""
    mine, exact = bfloat16_and_float64(day)
    return worst(apart(mine.h, exact.h), apart(mine.grad, exact.grad)), 0.05


def check_compiled(day):
    """loss and gradient of the compiled step, beside the eager one"""
    net, cfg = network(day)
    some = batches(cfg, day.machine.device, 4)
    eager = take_step(net, some, day.machine)
    train.compile_parts(net, "inductor" if day.machine.compiled else "aot_eager")
    compiled = take_step(net, some, day.machine)
    return worst(apart(compiled.loss, eager.loss), apart(compiled.grad, eager.grad)), rounding(day)


def check_flex(day):
    """loss and gradient with compiled flex_attention, beside those with a mask"""
    net, cfg = network(day, block_size=128 if day.cfg.rehearse else 512)
    some = batches(cfg, day.machine.device, 4)
    masked = take_step(net, some, day.machine)
    train.compile_parts(net, "inductor" if day.machine.compiled else "aot_eager")
    net.flex = True
    with flex_anywhere(day):
        tiled = take_step(net, some, day.machine)
    return worst(apart(tiled.loss, masked.loss), apart(tiled.grad, masked.grad)), rounding(day)


def flex_anywhere(day):
    """Let a CPU have gradients of flex_attention, which are slow there."""
    if day.on_gpu:
        return contextlib.nullcontext()
    return mock.patch("torch.nn.attention.flex_attention._validate_device", lambda *inputs: None)


def check_recompiled(day):
    """graphs that are compiled after the warm-up, in four batches of other orders"""
    net, cfg = network(day, block_size=128 if day.cfg.rehearse else 512)
    loss, data = train.DiffusionLoss(net), speed.Random(cfg, 300)
    steps = [train.make_batch(cfg, data, step, range(4), day.machine.device) for step in range(5)]
    train.compile_parts(net, "inductor" if day.machine.compiled else "aot_eager")
    net.flex = True
    with flex_anywhere(day):
        train.warm_up(net, loss, steps[0], cfg, day.machine)
        before = counters["stats"]["unique_graphs"]
        for batch in steps[1:]:
            train.backward(loss, batch, day.machine)
    return counters["stats"]["unique_graphs"] - before, 0


def check_waits(day):
    """times that a step's loss and gradients, or the steps of a block, wait for the device"""
    net, cfg = network(day)
    batch, device = batches(cfg, day.machine.device, 4)[0], day.machine.device
    loss = train.DiffusionLoss(net)
    train.backward(loss, batch, day.machine)                # a first one may set things up
    with no_waits(day):
        train.backward(loss, batch, day.machine)
    n = cfg.block_size
    canvas = Canvas(torch.zeros(n, dtype=torch.int64), torch.zeros(n) > 0, torch.arange(4))
    with torch.no_grad():
        decoder = Decoder(ckpt.to_inference(net, device), canvas, Sampling(block_length=0, guidance_scale=2.0),
                          torch.zeros(n, dtype=torch.int64), generators(device, day.cfg.seed, [0]), None)
        pos = torch.arange(n, device=device)
        decoder.denoise_block(0, pos, 6, decoder.rng)       # the steps are recorded
        decoder.new = pos[:0]
        with no_waits(day):
            decoder.denoise_block(0, pos, 6, decoder.rng)
    return 0, 0


@contextlib.contextmanager
def no_waits(day):
    """Raise where the CPU waits for a CUDA device."""
    try:
        if day.on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        if day.on_gpu:
            torch.cuda.set_sync_debug_mode("default")


def check_replayed(day):
    """share of the tokens, in blocks of 8 and one by one, that change when no step is replayed as a CUDA graph"""
    net, cfg = network(day)
    device, T = day.machine.device, min(64, cfg.block_size)
    canvas = Canvas(torch.zeros(T, dtype=torch.int64), torch.arange(T) < 2, torch.arange(4))
    model, differ = ckpt.to_inference(net, device), []
    for settings in (Sampling(block_length=8, steps=8, guidance_scale=2.0, revisions=0), Sampling(block_length=1)):
        write = partial(generate, model, canvas, settings)
        replayed = write(generators(device, day.cfg.seed, range(3)))
        with mock.patch("generate.Replay", lambda f, device: f):
            plain = write(generators(device, day.cfg.seed, range(3)))
        differ.append((replayed != plain).float().mean().item())
    return worst(*differ), 0.02 if day.on_gpu else 0.0


def check_accumulation(day):
    """loss and gradient of a batch, beside those of two micro-batches"""
    net, cfg = network(day)
    whole, halves = (take_step(net, batches(cfg, day.machine.device, 4, parts), day.machine) for parts in (1, 2))
    return worst(apart(halves.loss, whole.loss), apart(halves.grad, whole.grad)), rounding(day)


def rounding(day):
    """How far the same sums may be apart, in the dtype of the products."""
    return 0.03 if day.machine.dtype == torch.bfloat16 else 1e-4


def check_data(day):
    """share of a step's data, but its noise, that differs on the device and on the CPU"""
    cfg = network(day)[1]
    here, there = (batches(cfg, device, 8, 2) for device in (day.machine.device, "cpu"))
    differ = [(x.cpu() != y).float().mean().item() for pair in zip(here, there, strict=True)
              for name, x, y in zip(pair[0]._fields, *pair, strict=True) if torch.is_tensor(x) and name != "eps"]
    return worst(*differ), 0.0


@torch.no_grad()
def check_int8(day):
    """scores of the network in int8, beside the same in floats"""
    net, cfg = network(day)
    batch = batches(cfg, day.machine.device, 4)[0]
    scores = []
    for int8 in (False, True):
        model = ckpt.to_inference(copy.deepcopy(net), day.machine.device, day.machine.dtype, int8)
        E, t = model.embedding(), torch.full_like(batch.t, cfg.timesteps)      # where only the context speaks
        level = train.diffusion.log_snr(t, model.alpha_bar())
        with day.machine.autocast():
            prompt = model.encode_prompt(batch.prompt, batch.prompt_mask, E)
            h = model.denoise(E[batch.idx], batch.eps, level, batch.order, prompt, E)
            scores.append(model.logits(h, batch.eps, level, E).double().cpu()[..., :net.vocab_size])
    return apart(scores[1], scores[0]), 0.05


def check_batching(day):
    """share of the tokens of three samples in float32 that change when each is written alone"""
    torch.set_float32_matmul_precision("highest")           # not TF32
    net, cfg = network(day)
    device = day.machine.device
    canvas = Canvas(torch.zeros(min(64, cfg.block_size), dtype=torch.int64), None, torch.arange(4))
    canvas = canvas._replace(known=torch.arange(len(canvas.idx)) < 2)
    write = partial(generate, ckpt.to_inference(net, device), canvas, Sampling(block_length=8, steps=8, revisions=0))
    together = write(generators(device, day.cfg.seed, range(3)))
    alone = torch.cat([write(generators(device, day.cfg.seed, [i])) for i in range(3)])
    return (together != alone).float().mean().item(), 0.02 if day.on_gpu else 0.0


def forty_steps(day, name, *args, launcher=(), watch=None):
    """The losses of forty steps of train.py, in a folder of this name; they are not computed twice."""
    folder = day.work / "check" / name
    if watch or len(log_losses(folder)) < 40:
        command = train_command(day, folder, *args, **day.sizes, dataset=made_up_shards(day, day.vocab_size),
                                max_steps=40, save_interval=10, warmup_steps=5, log_interval=1, compile="false")
        script(day, [*launcher, *command], (-9,) if watch else (0,), watch)
    return log_losses(folder)


def furthest(losses, others):
    """The largest relative distance of the losses of the same steps; nan if some are missing."""
    if set(losses) != set(others):
        return math.nan
    return worst(*(abs(losses[step] / others[step] - 1) for step in others))


def check_resumed(day):
    """losses of train.py killed at step 15 and resumed, beside those of the uninterrupted run"""
    whole = forty_steps(day, "plain")
    forty_steps(day, "killed", watch=kill_at("step 15/"))
    return furthest(forty_steps(day, "killed"), whole), 1e-3 if day.on_gpu else 0.0


def check_sharded(day):
    """losses of train.py under torchrun with FSDP, beside those of one process without"""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", "--nproc_per_node=1")
    found = forty_steps(day, "sharded", "--parallel=fsdp", launcher=launcher)
    return furthest(found, forty_steps(day, "plain")), rounding(day)


CHECKS = [check_loss, check_states, check_compiled, check_flex, check_recompiled, check_replayed, check_accumulation,
          check_data, check_int8, check_batching, check_waits, check_resumed, check_sharded]


def check(day):
    shutil.rmtree(day.work / "check", ignore_errors=True)
    for f in CHECKS:
        try:
            if day.left() <= 0:
                raise Fault("no time is left")
            day.compare(f.__doc__, *f(day))
        except Exception as error:                          # of whatever is checked; the others still run
            day.failed(f.__doc__, error)
    print(f"{sum(row['ok'] for row in day.rows)} of {len(day.rows)} checks are ok, {day.found['card']}")


# ---- speed: bench/speed.py, each part with what time is left ----

def card_rates(day):
    """FLOP/s of large products, and bytes/s that are read and written by a copy."""
    n, device = 256 if day.cfg.rehearse else 8192, day.machine.device
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(n, n, device=device, dtype=dtype)
        took = speed.seconds(lambda a=a: a @ a, device, 5, pick=min)
        day.add(what=f"product of {n} x {n}, {str(dtype)[6:]}", seconds=took, tflops_a_second=2 * n ** 3 / took / 1e12)
    x = torch.zeros(2 ** 20 if day.cfg.rehearse else 2 ** 28, device=device)
    took = speed.seconds(x.clone, device, 5, pick=min)
    day.add(what=f"copy of {x.nbytes / 1e6:,.0f} MB", seconds=took, gb_a_second=2 * x.nbytes / took / 1e9)


def speed_calls(cfg):
    """{name: settings of bench/speed.py}, the most wanted first."""
    micro, large = ["--shapes=micro", "--batch_size=64"], ["--shapes=full", "--batch_size=8", "--n_layer=6"]
    window = ["--shapes=full", "--tokens=512", "--block_length=0", "--repeats=2"]
    texts = ["--shapes=micro", "--tokens=128", "--repeats=2"]
    if cfg.rehearse:
        micro = large = ["--shapes=tiny", "--batch_size=2", "--block_size=16", "--vocab_size=300", "--repeats=1"]
        window, texts = [*micro, "--tokens=4", "--block_length=0"], [*micro, "--tokens=4", "--block_length=2"]
    peer = [f"--peer={Path(cfg.peer).resolve()}"] if cfg.peer else []
    return {"micro": [*micro, "--parts=train,profile", *peer], "full": [*large, "--parts=train,profile"],
            "a window of full": [*window, "--parts=sample"], "texts of micro": [*texts, "--parts=sample"]}


def speed_stage(day):
    card_rates(day)
    torch.cuda.empty_cache()                                # leave the memory to the scripts
    common = flags(**{name: getattr(day.cfg, name) for name in ("device", "dtype", "compile")})
    for name, args in speed_calls(day.cfg).items():
        out = day.work / f"speed_{name.split()[-1]}_{len(name)}"
        shutil.rmtree(out, ignore_errors=True)
        try:
            script(day, ["bench/speed.py", *args, *common, f"--out={out}"], echo=True)
        except Fault as error:                              # it leaves what it had measured
            day.failed(f"all of {name}", error)
        file = out / "speed.json"
        for row in json.loads(file.read_text())["rows"] if file.exists() else ():
            day.add(**row)
    quality.show(day.rows, "what: seconds:.4f floor:.4f ratio:.2f tokens_per_second:,.0f MFU:.3f peak_gb:.2f "
                           "ms_a_step:.2f kernels:,d tflops_a_second:,.1f gb_a_second:,.0f")


# ---- write: text to a trained network in so many minutes, and what it says ----

def prepare(day):
    """The folder of the text's shards, made unless it is there."""
    cfg, text = day.cfg, Path(day.cfg.text)
    few = ["--val_fraction=0.1"] if cfg.rehearse else []
    if not cfg.text:                                        # a rehearsal
        text, rng = day.work / "fables.jsonl", random.Random(cfg.seed)
        text.write_text("".join(json.dumps({"text": fables.draw(rng)[0]}) + "\n" for _ in range(300)))
    folder = day.work / f"{text.name.split('.')[0]}_{day.vocab_size}"
    for place in (text, folder):
        if place.is_dir() and (parts := read_parts(place)) and all(part["finished"] for part in parts.values()):
            return place.resolve()
    command = ["prepare_fineweb.py", *flags(source=text.resolve(), tokenizer="corpus", max_tokens=0,
                                            vocab_size=day.vocab_size, out=folder), *few]
    script(day, command, echo=True)
    return folder


def try_out(day, args, **settings):
    """(seconds to the first step, seconds of a step) of a run that is stopped and deleted; a step with a first guess
    takes longer, so the mean of the second half of the trial counts."""
    folder, first = day.work / "trial", []
    shutil.rmtree(folder, ignore_errors=True)

    def watch(seconds, line):
        if line.startswith("step ") and not first:
            first.append(seconds)
        return signal.SIGTERM if first and seconds > first[0] + day.cfg.trial else None
    more = dict(max_steps=10 ** 9, save_interval=10 ** 9, log_interval=1, warmup_steps=1000)
    script(day, train_command(day, folder, *args, **more, **settings), (128 + signal.SIGTERM,), watch, day.left() / 2)
    times = [row["step_ms"] / 1000 for row in read_log(folder)]
    shutil.rmtree(folder)
    if not first:
        raise Fault("the trial made no step in half of the time; give it more minutes")
    return first[0], statistics.mean(times[len(times) // 2:])


def train_in_time(day, args, **settings):
    """Train until the reserve begins, along a cosine that ends there; the folder of the run."""
    warmup = load(train.Config, [str(arg) for arg in args]).warmup_steps
    start, step = try_out(day, args, **settings)
    end = day.left() - 60 * day.cfg.reserve
    steps = max(10, int(0.97 * (end - start) / step))
    steps = min(steps, 100) if day.cfg.rehearse else steps
    print(f"trial: {start:.1f} s to the first step, then {1000 * step:.1f} ms a step; {steps:,} steps fit")
    folder = day.work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    more = dict(max_steps=steps, save_interval=steps, log_interval=max(1, steps // 1000),
                warmup_steps=min(warmup, steps // 10))
    # killed at the first line of its own evaluation, after the last save; ours follows
    script(day, train_command(day, folder, *args, **more, **settings), (0, -9, 128 + signal.SIGTERM),
           kill_at("  held-out text"), end, 30 * day.cfg.reserve)
    rows = read_log(folder)
    day.found |= {"start_s": start, "step_ms": 1000 * step, "max_steps": steps, "curve": rows}
    print(f"trained {rows[-1]['step']:,} of {steps:,} steps, {rows[-1]['tokens'] / 1e6:.1f}M tokens")
    return folder


def share_network(day, content):
    """Write the averaged weights, matrices in bfloat16, as the checkpoint network.pt in the work folder, and the parts
    of it that may come back; returns the file."""
    ema = {name: x.bfloat16() if x.ndim > 1 else x for name, x in content["ema"].items()}
    kept = {name: content[name] for name in ("data", "step", "block_length")}
    file = day.work / "network.pt"
    ckpt.write(file, dict(config=asdict(ckpt.model_config(content)), ema=ema, **kept))
    for old in (*day.out.glob("network.pt.*"), *day.work.glob("network.pt.*")):
        old.unlink()
    whole = file.read_bytes()
    parts = [whole[i:i + PART] for i in range(0, len(whole), PART)]
    for i, part in enumerate(parts):
        folder = day.out if i < PARTS_BACK else day.work
        (folder / f"{file.name}.{i}").write_bytes(part)
    print(f"network.pt: {len(whole) / 1e6:.1f} MB, in parts; put together by: cat network.pt.* > network.pt")
    if len(parts) > PARTS_BACK:
        print(f"parts {PARTS_BACK} to {len(parts) - 1} are in {day.work}: they are more than may come back at once")
    day.found["parts"] = len(parts)
    return file


def bounds(day, model, rounded, held_out):
    """Add the bound of each block length, over as many windows as a quarter of the time allows, and one of the rounded
    weights."""
    dial = [("token by token", model, 1), ("in blocks of 4", model, 4), ("in blocks of 16", model, 16),
            ("as a whole window", model, 0), ("in blocks of 16, weights in bfloat16", rounded, 16)]
    n = 16
    for number, (what, net, length) in enumerate([dial[1], *dial]):
        started, n = time.perf_counter(), min(n, len(held_out))
        idx = held_out.spread(n).idx.to(model.wte.device)
        found = bound(net, quality.plain(idx), 16, length)
        seconds = time.perf_counter() - started
        if number:
            day.add(what=f"bound {what}", seconds=seconds, block_length=length, windows=n, **found)
        elif not day.cfg.rehearse:                          # the first was to see how long one takes
            n = int(min(256, max(2, 16 * day.left() / 4 / len(dial) / seconds)))


def beginnings(shard, eot, n):
    """The mark and the first PROMPT tokens (n, PROMPT + 1) of long texts, if there are any, spread over a shard."""
    places = np.flatnonzero(shard[:-PROMPT] == eot)
    long = places[:-1][np.diff(places) > 2 * PROMPT]
    places = long if len(long) else places
    rows = [shard[i:i + PROMPT + 1] for i in places[np.arange(n) * len(places) // n]]
    return torch.from_numpy(np.stack(rows).astype("int64"))


def sample_jobs(day, model, held_out, eot):
    """Yields (title, a function that returns texts (N, T), where they were given (T,), whether there is a truth
    (N, T))."""
    seed, T = day.cfg.seed, model.cfg.block_size
    prompts = beginnings(held_out.shards[0], eot, 8)[:, :T // 2]
    place, idx = torch.arange(T), held_out.spread(8).idx
    blank = (place >= (T - BLANK) // 2) & (place < (T + BLANK) // 2)
    for length, steps in ((16, 64), (16, 16), (0, 64), (0, 16)):
        settings, how = Sampling(block_length=length, steps=steps, revisions=0), f"block_length {length}, {steps} steps"
        yield f"unprompted, {how}", partial(quality.draw, model, settings, 16, seed), place < 0, None
        if length:
            n = prompts.size(1)
            canvas = Canvas(F.pad(prompts, (0, T - n)), place < n, prompts[:, :0])
            yield f"prompted, {how}", partial(quality.write, model, settings, canvas, seed, 8), canvas.known, None
            fill = partial(quality.fill, model, settings, idx, ~blank, seed)
            yield f"{BLANK} tokens filled in, {how}", fill, ~blank, idx


def spell(tokenizer, ids, given, truth):
    """A text in one line, what the network wrote in brackets; of one with a truth what stands near, and the truth."""
    def text(ids):
        return tokenizer.decode(ids.tolist()).replace("<|endoftext|>", " / ").replace("\n", " ")
    start, stop = (~given).nonzero()[[0, -1], 0].tolist()
    made = f"[{text(ids[start:stop + 1])}]"
    if truth is None:
        return text(ids[:start]) + made
    return f"...{text(ids[:start])[-200:]}{made}{text(ids[stop + 1:])[:200]}... (truth: [{text(truth[~given])}])"


def write_samples(day, model, held_out, tokenizer):
    """samples.txt; what there is no time for is left out, and said to be."""
    with open(day.out / "samples.txt", "w", encoding="utf-8") as file:
        print(f"{day.found['card']}, {day.cfg.config}, {day.cfg.text}: step {day.found['curve'][-1]['step']:,}. What "
              "the network wrote stands in brackets; / is the end of a text.", file=file)
        for title, make, given, truth in sample_jobs(day, model, held_out, tokenizer.eot_token):
            started = time.perf_counter()
            if day.left() < 3:
                day.failed(title, Fault("no time was left"))
                continue
            made = make()
            rows = [spell(tokenizer, ids, given, truth if truth is None else truth[i]) for i, ids in enumerate(made)]
            print(f"\n==== {title}\n", *rows, sep="\n", file=file, flush=True)
            day.add(what=title, seconds=time.perf_counter() - started)


def write(day):
    cfg = day.cfg
    args = [Path(cfg.config or ROOT / "config" / "tiny.py").resolve(), *shlex.split(cfg.train)]
    args += flags(**TINY) if cfg.rehearse else []
    load(train.Config, [str(arg) for arg in args])                          # UserError before anything is made
    shards = prepare(day)
    _, content = ckpt.find(train_in_time(day, args, dataset=shards))
    _, rounded = ckpt.find(share_network(day, content))
    models = [ckpt.load_model(part, day.machine.device) for part in (content, rounded)]
    held_out = quality.open_data(str(shards), content, models[0].cfg)
    bounds(day, *models, held_out)
    write_samples(day, models[0], held_out, get_tokenizer(content["data"]["tokenizer"]))
    quality.show(day.rows, "what: windows:d bound:.4f bound_error:.4f seconds:.1f")


# ---- full: config/full.py on one card ----

def moment(lines, word):
    """The seconds of the first of a script's lines that begins with a word."""
    return next(seconds for seconds, line in lines if line.startswith(word))


def full(day):
    cfg, folder = day.cfg, day.work / "full"
    sizes = {**TINY, "batch_tokens": 1024} if cfg.rehearse else {"batch_tokens": 2 * 8 * 512}
    shards = made_up_shards(day, 300 if cfg.rehearse else 50_257)
    command = train_command(day, folder, "config/full.py", *shlex.split(cfg.train), **sizes, dataset=shards,
                            max_steps=6, save_interval=3, log_interval=1)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        first = script(day, command, (-9,), kill_at("step 5/"))
        rows, before = read_log(folder), log_losses(folder)
        saved = sum(file.stat().st_size for file in folder.glob(ckpt.CKPT))
        day.add(what="seconds to the first step", value=moment(first, "step 1/"))
        day.add(what="milliseconds of a step, median", value=statistics.median(row["step_ms"] for row in rows[1:]))
        day.add(what="tokens/s, median", value=statistics.median(row["tokens_per_second"] for row in rows[1:]))
        day.add(what="peak GB", value=max(row["peak_gb"] for row in rows))
        day.add(what="GB of a checkpoint", value=saved / 1e9)
        took = moment(first, "step 4/") - moment(first, "step 3/") - rows[3]["step_ms"] / 1000
        day.add(what="seconds of a save", value=took)
        day.add(what="seconds to set up a new run", value=moment(first, "from step") - moment(first, "device"))
        second = script(day, command, (-9,), kill_at("step 6/"))         # which is not saved again
        day.add(what="seconds to set up the resumed run, with its load",
                value=moment(second, "resuming at") - moment(second, "device"))
        again = log_losses(folder)
        repeated = [{step: losses[step] for step in (4, 5) if step in losses} for losses in (again, before)]
        day.compare("losses of steps 4 and 5, resumed and before", furthest(*repeated), 1e-3 if day.on_gpu else 0.0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    quality.show(day.rows, "what: value:,.2f measured:.2g tolerance:.2g")


STAGES = {"check": check, "speed": speed_stage, "write": write, "full": full}


def out_of_time(*_):
    raise TimeoutError("the time is over")


def main(cfg):
    keep_memory()
    if cfg.rehearse:
        cfg = replace(cfg, device="cpu", dtype="float32", reserve=0.1, trial=1.0)
        os.environ["OMP_NUM_THREADS"] = "1"                 # of the scripts
        torch.set_num_threads(1)
    day = Day(cfg)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))        # and end the scripts that run
    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, day.left() + 15)                           # those have ended by then
    try:
        STAGES[cfg.stage](day)
    except UserError:
        raise
    except Exception as error:                              # whatever it is, what was measured is kept
        day.failed("the stage", error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        day.save()
    return int(not all(row.get("ok", True) for row in day.rows))


if __name__ == "__main__":
    run(main, Config)
