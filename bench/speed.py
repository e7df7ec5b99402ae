"""
How fast SunFish trains and writes, each figure beside what the same machine could do at most, taken in the same run.

    python bench/speed.py --shapes=tiny,micro --threads=2 --out=out/speed
    python bench/speed.py --shapes=micro --parts=train --peer=../nanoGPT       # and nanoGPT's step, from a clone, at that shape

rate: FLOP/s of the matrix products of a forward pass, alone, taken anew after each measured step, for a shared machine is not equally
fast all the time; medians are compared. bytes/s of memory that is only read, once for a shape.
floor: FLOPs over that rate in the same dtype, as if there were nothing but products; for a few tokens a step it is the time to
read all weights once, if that is more. ratio: time over floor. A training step's FLOPs are those of model.flops_per_token, without
first guesses; of_rate counts these as well: all FLOPs over time and rate, where `guessed` is the share of sequences with a first
guess. MFU is the FLOPs without them over time and the published peak of a GPU. The mix of spans and streams is that after the
warm-up. Weights and text are random; only `start` runs the real commands, on the text that
Python brings along.
"""
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configurator import fail, load        # noqa: E402

PARTS = ("train", "origin", "profile", "sample", "start")


@dataclass(frozen=True)
class Config:
    shapes: str = "tiny,micro"       # comma list of files in config/
    parts: str = ",".join(PARTS)     # comma list of what to measure
    vocab_size: int = 50_257         # GPT-2's
    n_layer: int = 0                 # blocks, if a shape is too deep for this machine; 0 is the shape's own
    batch_size: int = 0              # sequences at a time; 0 is the shape's own. An optimizer step is one such batch here
    block_size: int = 0              # tokens in a window; 0 is the shape's own
    repeats: int = 5                 # measured steps, after three that are not; the median counts
    tokens: int = 256                # of a text that is sampled
    steps: int = 50                  # denoising steps for it
    device: str = "auto"             # auto, cpu, cuda
    dtype: str = "auto"              # auto, float32, bfloat16: of the matrix products
    compile: str = "auto"            # auto, true, false
    threads: int = 0                 # 0 is one for each core
    peer: str = ""                   # folder of a nanoGPT clone
    out: str = ""                    # also write the numbers here, as speed.json

    def check(self):
        if self.vocab_size < 2 or min(self.repeats, self.tokens, self.steps) < 1 or min(self.n_layer, self.batch_size, self.block_size, self.threads) < 0:
            raise ValueError("vocab_size, repeats, tokens, steps, n_layer, batch_size, block_size and threads must be positive; 0 is "
                             "the default of the last four")
        if self.steps > 1000:
            raise ValueError(f"steps={self.steps} is more than the 1000 timesteps of a schedule")
        for part in self.parts.split(","):
            if part not in PARTS:
                raise ValueError(f"parts={self.parts}: {part} is unknown; there are {', '.join(PARTS)}")
        for shape in self.shapes.split(","):
            if not (ROOT / "config" / f"{shape}.py").exists():
                known = ", ".join(sorted(path.stem for path in (ROOT / "config").glob("*.py")))
                raise ValueError(f"shapes={self.shapes}: there is no config/{shape}.py; there are {known}")
        if self.peer and not (Path(self.peer) / "model.py").exists():
            raise ValueError(f"peer={self.peer} has no model.py; clone github.com/karpathy/nanoGPT and name its folder")


if __name__ == "__main__":
    CFG = load(Config)

import importlib.util                      # noqa: E402
import json
import re
import statistics
import subprocess
import tempfile
import time
from functools import partial

import torch
import torch.nn as nn

import sample
import train
from diffusion import FAR
from model import SunFish, chunks, flops_per_token, keep_memory, peak_flops, to_read, trunk_products

KINDS = {"matrix products": r"mm\b|linear|convolution|matmul", "attention": "attention", "softmax and cross-entropy": "softmax|nll_loss|logsumexp",
         "optimizer, clipping, average": "adam|lerp|norm|foreach", "copies": "copy_|::cat|::stack|clone|Memcpy", "noise": "normal_|rand"}


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(f, device, repeats, warmup=3, pick=statistics.median):
    """The median, or another pick, of the seconds that f() takes."""
    times = []
    for _ in range(warmup + repeats):
        start = clock(device)
        f()
        times.append(clock(device) - start)
    return pick(times[warmup:])


class Random:
    """Windows as train.Windows has them, of random tokens."""

    def __init__(self, cfg, vocab_size):
        self.cfg, self.vocab_size, self.ids = cfg, vocab_size, torch.randint(vocab_size, (100, cfg.prompt_size + cfg.block_size))

    def __len__(self):
        return len(self.ids)

    def unigram(self):
        """None, which is uniform."""

    def read(self, i):
        return train.Item(self.ids[i, self.cfg.prompt_size:], self.ids[i, :self.cfg.prompt_size], 0, self.cfg.block_size)


# ---- what is measured: each takes the settings, the shape, the machine and its rate, and returns rows ----

def rate(shape, vocab_size, device, dtype, repeats=2, warmup=1):
    """FLOP/s of the products of one forward pass over a batch: trunk, and scores in chunks as the model has them."""
    d, M, V, total, took = shape.n_embd, shape.batch_size * shape.block_size, -(-vocab_size // 64) * 64, 0, 0.0
    parts = [len(part) for part, in chunks(V, torch.empty(M))]
    products = [(M, d, d, 2 * shape.n_layer), (M, d, 2 * d, shape.n_layer), (M, d, 4 * d, shape.n_layer), (M, 4 * d, d, shape.n_layer),
                (parts[0], shape.token_dim, V, len(parts)), (parts[0], d + shape.token_dim, V, len(parts))]
    for m, k, n, times in products:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
        took += times * seconds(lambda a=a, b=b: a @ b.T, device, repeats, warmup, min)
        total += times * 2 * m * k * n
    return total / took


def bandwidth(device, repeats=5):
    """Bytes/s of memory that is read and summed up."""
    x = torch.ones(2 ** 26, device=device)
    return x.nbytes / seconds(x.sum, device, repeats)


def beside(f, products, device, repeats, warmup=3):
    """The seconds of f() and the rate that products() finds, in turn: two lists of as many as there are repeats."""
    return [x[warmup:] for x in zip(*((seconds(f, device, 1, 0), products()) for _ in range(warmup + repeats)), strict=True)]


def line(what, took, floor=None, **more):
    """One figure, printed as a row of the table and returned."""
    row = {"what": what, "seconds": took, **({"floor": floor, "ratio": took / floor} if floor else {}), **more}
    beside = f"{floor:10.4f}{took / floor:8.2f}" if floor else " " * 18
    print(f"{what:66}{took:10.4f}{beside}  " + "  ".join(f"{k} {v:,.0f}" if v >= 100 else f"{k} {v:.3g}" for k, v in more.items()), flush=True)
    return row


def make_step(shape, vocab_size, device, dtype, compiled):
    """A function that makes one optimizer step as train.py does."""
    windows, guessed = Random(shape, vocab_size), []
    net, ema, model, optimizer = train.build(shape, windows, None, {}, device, dtype, compiled)

    def counted(batches):
        for batch in batches:
            guessed.append(batch.guesses / len(batch.idx))
            yield batch
    batches = counted(train.batches_ahead(shape, windows, 0, device))
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    def step():
        train.train_step(model, shape, batches, device, autocast)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        train.update_ema(ema, net, shape.ema_decay, 0)
    return step, net, guessed


def training(cfg, name, shape, device, dtype, compiled):
    step, net, guessed = make_step(shape, cfg.vocab_size, device, dtype, compiled)
    times, rated = beside(step, partial(rate, shape, cfg.vocab_size, device, dtype), device, cfg.repeats)
    took, tokens, shares = statistics.median(times), shape.batch_tokens, guessed[-cfg.repeats:]
    flops, peak = tokens * flops_per_token(net, shape.in_turns), peak_flops(device)
    mfu = {"MFU": flops / took / peak} if peak else {}
    d, T, V = shape.n_embd, shape.block_size, len(net.table)
    guess = 2 * (trunk_products(shape, T) + 2 * T * d * shape.n_layer * shape.in_turns + (d + 2 * shape.token_dim) * V)      # of a token
    what = f"{name}: step of {shape.batch_size} x {shape.block_size}, {str(dtype)[6:]}{', compiled' * compiled}"
    of_rate = statistics.median((flops + tokens * share * guess) / time / r for share, time, r in zip(shares, times, rated, strict=True))
    return [line(what, took, flops / statistics.median(rated), tokens_per_second=tokens / took, TFLOPs=flops / 1e12,
                 guessed=statistics.mean(shares), of_rate=of_rate, **mfu)]


def peer(cfg, name, shape, device, dtype, compiled):
    """nanoGPT's step at the same shape: its own model.py, optimizer and count of FLOPs."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(cfg.peer) / "model.py")
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    net = nanogpt.GPT(nanogpt.GPTConfig(block_size=shape.block_size, vocab_size=-(-cfg.vocab_size // 64) * 64, n_layer=shape.n_layer,
                                        n_head=shape.n_head, n_embd=shape.n_embd, dropout=0.0, bias=False)).to(device)
    optimizer, model = net.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type), torch.compile(net) if compiled else net
    idx = torch.randint(cfg.vocab_size, (shape.batch_size, shape.block_size), device=device)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(idx, idx)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    times, rated = beside(step, partial(rate, shape, cfg.vocab_size, device, dtype), device, cfg.repeats)
    took, rated, d = statistics.median(times), statistics.median(rated), shape.n_embd
    flops = 6 * (net.get_num_params() + 2 * shape.n_layer * shape.block_size * d) * idx.numel()
    return [line(f"{name}: nanoGPT's step at that shape", took, flops / rated, tokens_per_second=idx.numel() / took, TFLOPs=flops / 1e12)]


def origin(cfg, device):
    """The trunk of the design that SunFish replaces, of public layers: attention over the window and to the prompt, no head, in
    float32 and eager as it was. A training step of 4 x 256, and a guided denoising step of 256 tokens."""
    layer = nn.TransformerDecoderLayer(512, 8, 2048, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    net, prompt = nn.TransformerDecoder(layer, 8).to(device), torch.randn(4, 64, 512, device=device)
    optimizer, x = torch.optim.AdamW(net.parameters()), torch.randn(4, 256, 512, device=device)

    def step():
        (net(x, prompt) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    took = seconds(step, device, cfg.repeats)
    rows = [line("origin's trunk without a head: step of 4 x 256, float32", took, tokens_per_second=1024 / took)]
    with torch.no_grad():
        took = seconds(lambda: [net(x[:1], prompt[:1]) for _ in range(2)], device, cfg.repeats)
    return [*rows, line("origin's guided denoising step of 256 tokens", took)]


def profile(cfg, name, shape, device, dtype, compiled):
    """Shares of a step's time by kind of operation."""
    step, *_ = make_step(shape, cfg.vocab_size, device, dtype, compiled)
    step()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if device.type == "cuda" else activity.CPU]) as profiler:
        step()
    took = dict.fromkeys([*KINDS, "fused by the compiler", "the rest"], 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "the rest")
        kind = "fused by the compiler" if re.search("cpp_fused|triton", event.key) else kind
        took[kind] += event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
    total = sum(took.values())
    print(f"{name}: where a step's time goes: " + ", ".join(f"{kind} {part / total:.0%}" for kind, part in took.items() if part / total > 0.005))
    return [{"what": f"{name}: profile", **{kind: part / total for kind, part in took.items()}}]


def call_flops(shape, vocab_size, tokens, branches, read=0, keys=0):
    """FLOPs of one call of the network for so many noisy tokens: the trunk for each branch, and for `read` clean ones as well, all
    of which see `keys` more; posterior mean, scores and guess once."""
    trunk = (tokens + read) * branches * (trunk_products(shape, tokens + read) + 2 * keys * shape.n_embd * shape.n_layer)
    return 2 * (trunk + tokens * (4 * shape.token_dim + shape.n_embd) * -(-vocab_size // 64) * 64)


def weight_bytes(model):
    """Bytes that a call of the network for few tokens reads: each weight once, the token vectors three times more."""
    used = sum(p.numel() for name, p in model.named_parameters() if not re.search("table|prompt_in|cross.kv", name))
    return (used + 4 * model.table.numel()) * model.head.weight.element_size()


def sampling(cfg, name, shape, device, dtype, bytes_rate):
    """Texts of cfg.tokens tokens after a prompt: all at once, as the origin writes, and in streams."""
    shape, rows, T = replace(shape, block_size=cfg.tokens, span_size=min(8, cfg.tokens)), [], cfg.tokens
    model = to_read(SunFish(shape, cfg.vocab_size), device, dtype)
    prompt = torch.randint(cfg.vocab_size, (shape.prompt_size,))
    canvas = torch.zeros(T, dtype=torch.int64), torch.zeros(T, dtype=torch.bool), prompt
    for span, streams, steps, guidance, n in ((0, 1, cfg.steps, 2.0, 1), (0, 1, cfg.steps, 1.0, 1), (0, 1, cfg.steps, 2.0, 4),
                                              (1, 1, T, 2.0, 1), (1, 1, T, 1.0, 1), (1, 8, max(FAR, -(-T // 8)), 2.0, 1), (1, 8, max(FAR, -(-T // 8)), 2.0, 4)):
        settings = sample.Config(span_size=span, streams=streams, steps=steps, guidance_scale=guidance)
        times, rated = beside(lambda settings=settings, n=n: sample.sample(model, settings, canvas, range(n)),
                             partial(rate, shape, cfg.vocab_size, device, dtype), device, max(1, cfg.repeats // 2), 1)
        now, branches = T if span == 0 else -(-T // steps), 1 + (guidance != 1)
        flops = n * call_flops(shape, cfg.vocab_size, now, branches, *((now, T // 2) if span else ()))
        took, rated = statistics.median(times), statistics.median(rated)
        floor = steps * max(flops / rated, weight_bytes(model) / bytes_rate)
        how = "all at once" if span == 0 else f"{streams} stream{'s' * (streams > 1)}"
        rows.append(line(f"{name}: {n} x {T} tokens, {steps} steps, {how}{', guided' * (branches > 1)}, {str(dtype)[6:]}", took, floor,
                         ms_a_step=1000 * took / steps, tokens_per_second=n * T / took))
    return rows


def starting(cfg):
    """From the command to its first output, of new processes on a CPU."""
    def run(*command):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, capture_output=True)
        if done.returncode:
            fail(f"{' '.join(command)}: {done.stderr.strip()}", code=1)
    with tempfile.TemporaryDirectory() as folder:
        commands = {"sample.py --help": ("sample.py", "--help"), "train.py --help": ("train.py", "--help"),
                    "train.py config/tiny.py, one step and a sample": (
                        "train.py", "config/tiny.py", "--device=cpu", "--max_steps=1", "--eval_sequences=2", f"--out_dir={folder}"),
                    "sample.py, 32 tokens of tiny": ("sample.py", f"--checkpoint={folder}", "--device=cpu", "--seq_len=32")}
        return [line(what, seconds(partial(run, *command), torch.device("cpu"), 1, 0)) for what, command in commands.items()]


def main(cfg):
    keep_memory()
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    parts, result, rows = cfg.parts.split(","), {"settings": asdict(cfg), "torch": torch.__version__}, []
    for name in cfg.shapes.split(","):
        shape = load(train.Config, [str(ROOT / "config" / f"{name}.py")])
        shape = replace(shape, device=cfg.device, dtype=cfg.dtype, compile=cfg.compile, n_layer=cfg.n_layer or shape.n_layer,
                        batch_size=cfg.batch_size or shape.batch_size, block_size=cfg.block_size or shape.block_size)
        shape = replace(shape, batch_tokens=shape.batch_size * shape.block_size, span_warmup=0.0)
        device, dtype, compiled = train.choose_machine(shape)
        cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None
        print(f"{name}: {shape.n_layer} layers of {shape.n_embd}, vocabulary {cfg.vocab_size:,}, {torch.get_num_threads()} threads, "
              f"torch {torch.__version__}" + (f", cuDNN {cudnn}" if cudnn else ""))
        rates = {str(kind)[6:]: rate(shape, cfg.vocab_size, device, kind, 5) for kind in (torch.float32, torch.bfloat16)}
        result[f"{name}_rates"] = dict(rates, bytes=bandwidth(device))
        print("products alone: " + ", ".join(f"{kind} {value / 1e9:,.0f} GFLOP/s" for kind, value in rates.items()) +
              f"; memory is read at {result[f'{name}_rates']['bytes'] / 1e9:,.0f} GB/s")
        print(f"{'':66}{'seconds':>10}{'floor':>10}{'ratio':>8}")
        rows += training(cfg, name, shape, device, dtype, compiled) if "train" in parts else []
        rows += peer(cfg, name, shape, device, dtype, compiled) if cfg.peer else []
        for kind in dict.fromkeys((torch.float32, dtype)) if "sample" in parts else ():
            rows += sampling(cfg, name, shape, device, kind, result[f"{name}_rates"]["bytes"])
        rows += profile(cfg, name, shape, device, dtype, compiled) if "profile" in parts else []
    rows += origin(cfg, device) if "origin" in parts else []
    rows += starting(cfg) if "start" in parts else []
    if cfg.out:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        (Path(cfg.out) / "speed.json").write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(CFG)
