"""
How fast SunFish trains and writes, each figure beside what the same machine could do at most, taken in the same run.

    python bench/speed.py --shapes=tiny,micro --threads=2 --out=out/speed
    python bench/speed.py --shapes=micro --parts=train --peer=../nanoGPT       # and nanoGPT's step at that shape

rate: FLOP/s of the matrix products of a forward pass, alone, taken anew after each measured step, for a shared machine
is not equally fast all the time; medians are compared. bytes/s of memory that is only read, once for a shape.
floor: FLOPs over that rate in the same dtype, as if there were nothing but products; for a few tokens a step it is the
time to read all weights once, if that is more. ratio: time over floor. MFU: FLOPs over time and the published peak of a
GPU. Training is measured with all of train.py's mixture, once without and once with the first guess of
self-conditioning, which half of the steps have. Weights and text are random; only `start` runs the real commands, on
the text that Python brings along.
"""
import gc
import importlib.util
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
from checkpoint import to_inference
from configurator import Fault, UserError, in_range, load, run
from data import Texts
from generate import Canvas, Sampling, generate, generators, plan
from machine import choose_machine, keep_memory, peak_gb
from model import SunFish, max_scores

PARTS = ("train", "origin", "profile", "sample", "start")
KINDS = {"attention": "attention|flash|fmha|sdpa",
         "matrix products": r"mm\b|gemm|nvjet|cutlass|linear|convolution|matmul",
         "softmax and cross-entropy": "softmax|nll_loss|logsumexp",
         "optimizer, clipping, average": "adam|lerp|norm|foreach",
         "copies": "copy|::cat|CatArray|::stack|clone", "noise": "normal_|rand"}
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12}     # dense bf16, published
TEXTS = ((2.0, 1), (1.0, 1), (2.0, 4))           # guidance, and texts at a time, at each block length


@dataclass(frozen=True)
class Config:
    shapes: str = "tiny,micro"       # comma list of files in config/
    parts: str = ",".join(PARTS)     # comma list of what to measure
    vocab_size: int = 50_257         # GPT-2's
    n_layer: int = 0                 # layers, if a shape is too deep for this machine; 0 is the shape's own
    batch_size: int = 0              # sequences in an optimizer step, all at a time; 0 is the shape's batch_size
    block_size: int = 0              # tokens in a window; 0 is the shape's own
    repeats: int = 5                 # measured steps, after three that are not; the median counts
    tokens: int = 256                # of a text that is sampled
    block_length: str = "1,8,0"      # comma list: tokens of such a text that are denoised together; 0 the whole
    device: str = "auto"             # auto, cpu, cuda
    dtype: str = "auto"              # auto, float32, bfloat16: of the matrix products
    compile: str = "auto"            # auto, true, false: whether compiled steps are measured beside eager ones
    threads: int = 0                 # 0 is one for each core
    peer: str = ""                   # folder of a nanoGPT clone
    out: str = ""                    # also write the numbers here, as speed.json

    def check(self):
        in_range(self, 1, 1e9, "repeats", "tokens")
        in_range(self, 2, 1e9, "vocab_size")
        in_range(self, 0, 1e9, "n_layer", "batch_size", "block_size", "threads")
        known = sorted(path.stem for path in (ROOT / "config").glob("*.py"))
        for name, choices in (("parts", PARTS), ("shapes", known)):
            for part in getattr(self, name).split(","):
                if part not in choices:
                    raise UserError(f"{name}={getattr(self, name)}: {part} is unknown; there are {', '.join(choices)}")
        if self.peer and not (Path(self.peer) / "model.py").exists():
            raise UserError(f"peer={self.peer} has no model.py; clone github.com/karpathy/nanoGPT and name its folder")


# ---- FLOPs: two for each multiply-add of a matrix product ----

def token_products(cfg, keys):
    """Multiply-adds of the layers for one token that sees `keys` tokens; without the prompt's own keys and values."""
    d, crossed = cfg.n_embd, cfg.n_layer // cfg.cross_every
    layers = cfg.n_layer * (12 * d * d + 2 * keys * d)
    return layers + crossed * (2 * d * d + 2 * (1 + cfg.prompt_size) * d) + 2 * cfg.token_dim * d


def clean_products(cfg, keys):
    """As token_products, of a clean token, of which the last layer makes keys and values only."""
    d = cfg.n_embd
    to_prompt = (2 * d * d + 2 * (1 + cfg.prompt_size) * d) * (cfg.n_layer % cfg.cross_every == 0)
    return token_products(cfg, keys) - 10 * d * d - 2 * keys * d - to_prompt


def noisy_products(cfg, keys):
    """As token_products, of a noisy token, which has a noise level of its own."""
    return token_products(cfg, keys) + 32 * cfg.n_embd + 3 * cfg.n_embd ** 2


def flops_per_token(model, with_clean=True, guess=False):
    """FLOPs of a training step for each token of text: forward, and twice that backward.

    Counted are the noisy token, with_clean also the clean one, the scores, and the posterior mean, forward only; with
    a first guess (self-conditioning) all of this once more, forward only.
    """
    cfg, table = model.cfg, 0 if model.cfg.objective == "eps" else model.wte.numel()
    d, crossed = cfg.n_embd, cfg.n_layer // cfg.cross_every
    T, P = cfg.block_size, cfg.prompt_size
    layers = noisy_products(cfg, (1 + with_clean) * T) + clean_products(cfg, T) * with_clean
    layers += crossed * 2 * d * d * (1 + P) / T                                         # keys and values of the prompt
    prompt = model.prompt_proj.weight.numel() * P / T
    trained = layers + model.head.weight.numel() + table
    first = 2 * trained + 2 * table + 4 * table                                         # the guess, the posterior mean
    return 6 * trained + (6 if model.prompt_table is None else 4) * prompt + 4 * table + first * guess


def text_flops(cfg, vocab_size, order, steps, branches):
    """FLOPs of writing a text in an order (T,) of blocks of equal length, each in `steps` steps: the layers for each
    branch (two with guidance), posterior mean, scores and guess once."""
    T, num_blocks = len(order), len(order.unique())
    n, V = T / num_blocks, -(-vocab_size // 64) * 64
    keys = (num_blocks + 1) / 2 * n                             # of the blocks so far and of this one, on the average
    layers = T * steps * noisy_products(cfg, keys) + (T - n) * clean_products(cfg, keys)
    return 2 * (branches * layers + T * steps * (4 * cfg.token_dim + cfg.n_embd) * V)


def weight_bytes(model):
    """Bytes that a call of the network for few tokens reads: each weight once, the token vectors three times more."""
    used = sum(p.numel() for name, p in model.named_parameters() if not re.search("wte|prompt_proj|cross.kv", name))
    return (used + 4 * model.wte.numel()) * model.head.weight.element_size()


def peak_flops(device):
    """Published FLOP/s of the CUDA device in bfloat16, or None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for key, flops in PEAKS.items() if key in name), None)


# ---- clocks ----

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


def rate(shape, vocab_size, device, dtype, repeats=2, warmup=1):
    """FLOP/s of the products of one forward pass over a batch: layers, and scores in chunks as the model has them."""
    d, L = shape.n_embd, shape.n_layer
    M, V = shape.batch_size * shape.block_size, -(-vocab_size // 64) * 64
    rows = min(M, max(1, max_scores(device) // V))
    products = [(M, d, d, 2 * L), (M, d, 2 * d, L), (M, d, 4 * d, L), (M, 4 * d, d, L),
                (rows, shape.token_dim, V, M / rows), (rows, d + shape.token_dim, V, M / rows)]
    total = took = 0.0
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
    """Medians of the seconds of f() and of the rate that products() finds, measured in turn."""
    pairs = [(seconds(f, device, 1, 0), products()) for _ in range(warmup + repeats)]
    return [statistics.median(column) for column in zip(*pairs[warmup:], strict=True)]


def line(what, took, floor=None, **more):
    """One figure, printed as a row of the table and returned."""
    row = {"what": what, "seconds": took, **more}
    if floor:
        row |= {"floor": floor, "ratio": took / floor}
    columns = f"{floor:10.4f}{took / floor:8.2f}" if floor else " " * 18
    rest = "  ".join(f"{name} {value:,.0f}" if value >= 100 else f"{name} {value:.3g}" for name, value in more.items())
    print(f"{what:72}{took:10.4f}{columns}  {rest}")
    return row


# ---- what is measured: each takes the settings, the shape and the machine, and yields rows ----

class Random:
    """Windows as data.Dataset has them, of random tokens."""
    is_examples = False

    def __init__(self, cfg, vocab_size):
        self.P, self.vocab_size = cfg.prompt_size, vocab_size
        self.ids = torch.randint(vocab_size, (100, cfg.prompt_size + cfg.block_size))

    def __len__(self):
        return len(self.ids)

    def log_unigram(self):
        """None, which is uniform."""

    def read(self, i):
        prompt, idx = self.ids[torch.as_tensor(i)].split((self.P, self.ids.size(1) - self.P), 1)
        texts = Texts(idx, prompt, torch.ones_like(prompt, dtype=torch.bool), torch.ones_like(idx, dtype=torch.bool))
        return texts, torch.zeros(len(idx), dtype=torch.int64)


def make_step(shape, vocab_size, machine):
    """A function that makes one optimizer step as train.py does, and the network."""
    data = Random(shape, vocab_size)
    net, ema, model, optimizer = train.build(shape, data, None, None, machine)
    batches = train.Prefetch(train.all_batches(shape, data, 0, machine.device))

    def step():
        train.train_step(model, optimizer, batches, shape, 0, machine)
        train.update_ema(ema, net, shape.ema_decay, 0)
    return step, net


def training(cfg, name, shape, machine):
    variants = [(compiled, guess) for compiled in (False, True)[:1 + machine.compiled] for guess in (False, True)]
    for compiled, guess in variants:
        chosen = replace(shape, self_conditioning=float(guess))
        yield training_row(cfg, name, chosen, machine._replace(compiled=compiled))


def training_row(cfg, name, shape, machine):
    device, peak = machine.device, peak_flops(machine.device)
    gc.collect()                                                # of the network before, which a compiled one holds
    step, net = make_step(shape, cfg.vocab_size, machine)
    guess, more = shape.self_conditioning > 0, {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    took, rated = beside(step, partial(rate, shape, cfg.vocab_size, device, machine.dtype), device, cfg.repeats)
    flops = shape.batch_tokens * flops_per_token(net, guess=guess)
    if peak:
        more["MFU"] = flops / took / peak
    if device.type == "cuda":
        more["peak_gb"] = peak_gb(device)
    what = f"{name}: step of {shape.batch_size} x {shape.block_size}, {str(machine.dtype)[6:]}"
    what += ", compiled" * machine.compiled + ", with first guess" * guess
    return line(what, took, flops / rated, tokens_per_second=shape.batch_tokens / took, TFLOPs=flops / 1e12, **more)


def peer(cfg, name, shape, machine):
    """nanoGPT's step at the same shape: its own model.py, optimizer and count of FLOPs."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(cfg.peer) / "model.py")
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    device, V = machine.device, -(-cfg.vocab_size // 64) * 64
    net = nanogpt.GPT(nanogpt.GPTConfig(block_size=shape.block_size, vocab_size=V, n_layer=shape.n_layer,
                                        n_head=shape.n_head, n_embd=shape.n_embd, dropout=0.0, bias=False)).to(device)
    optimizer = net.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
    model = torch.compile(net) if machine.compiled else net
    idx = torch.randint(cfg.vocab_size, (shape.batch_size, shape.block_size), device=device)

    def step():
        with machine.autocast():
            loss = model(idx, idx)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    took, rated = beside(step, partial(rate, shape, cfg.vocab_size, device, machine.dtype), device, cfg.repeats)
    flops = 6 * (net.get_num_params() + 2 * shape.n_layer * shape.block_size * shape.n_embd) * idx.numel()
    yield line(f"{name}: nanoGPT's step at that shape{', compiled' * machine.compiled}", took, flops / rated,
               tokens_per_second=idx.numel() / took, TFLOPs=flops / 1e12)


def origin(cfg, device):
    """The layers of the design that SunFish replaces, of public modules: attention over the window and to the prompt,
    no head, in float32 and eager as it was. A training step of 4 x 256, and a guided denoising step of 256 tokens."""
    layer = nn.TransformerDecoderLayer(512, 8, 2048, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    net, prompt = nn.TransformerDecoder(layer, 8).to(device), torch.randn(4, 64, 512, device=device)
    optimizer, x = torch.optim.AdamW(net.parameters()), torch.randn(4, 256, 512, device=device)

    def step():
        (net(x, prompt) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    took = seconds(step, device, cfg.repeats)
    rows = [line("origin's layers without a head: step of 4 x 256, float32", took, tokens_per_second=1024 / took)]
    with torch.no_grad():
        took = seconds(lambda: [net(x[:1], prompt[:1]) for _ in range(2)], device, cfg.repeats)
    return [*rows, line("origin's guided denoising step of 256 tokens", took)]


def profile(cfg, name, shape, machine):
    """Where the time of a step goes, without a first guess: eager and, if there is a compiler, compiled."""
    shape, choices = replace(shape, self_conditioning=0.0), (False, True)[:1 + machine.compiled]
    for compiled in choices:
        yield profile_row(cfg, name, shape, machine._replace(compiled=compiled))


def profile_row(cfg, name, shape, machine):
    """Shares and milliseconds of a step by kind of operation, and the kernels (on a CPU operators) that it runs."""
    step, _ = make_step(shape, cfg.vocab_size, machine)
    step()
    on_gpu, activity = machine.device.type == "cuda", torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profiler:
        step()
        clock(machine.device)
    took, kernels = dict.fromkeys([*KINDS, "fused by the compiler", "the rest"], 0.0), 0
    here = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == here]      # no calls of the driver
    for event in [event for event in events if not (on_gpu and event.is_user_annotation)]:  # nor names for several
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key, re.I)), "the rest")
        if re.search("cpp_fused|triton", event.key) and "flex_attention" not in event.key:
            kind = "fused by the compiler"
        took[kind] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kernels += event.count * (not event.key.startswith("Mem") if on_gpu else event.key.startswith("aten::"))
    shares = {kind: part / (sum(took.values()) or 1.0) for kind, part in took.items()}
    parts = [f"{kind} {took[kind] / 1000:.1f} ms, {share:.0%}" for kind, share in shares.items() if share > 0.005]
    what = f"{name}: profile{', compiled' * machine.compiled}"
    print(f"{what}, {kernels:,} {'kernels' if on_gpu else 'operators'}; where a step's time goes: {'; '.join(parts)}")
    return {"what": what, **shares, "ms": {kind: part / 1000 for kind, part in took.items()}, "kernels": kernels}


def sampling(cfg, name, shape, machine, bytes_rate):
    """Texts of cfg.tokens tokens after a prompt, at each block length, as TEXTS has them."""
    shape, T = replace(shape, block_size=cfg.tokens), cfg.tokens
    model = to_inference(SunFish(shape, cfg.vocab_size), machine.device, machine.dtype)
    canvas = Canvas(torch.zeros(T, dtype=torch.int64), torch.zeros(T, dtype=torch.bool),
                    torch.randint(cfg.vocab_size, (shape.prompt_size,)))
    for length, (guidance, n) in itertools.product(map(int, cfg.block_length.split(",")), TEXTS):
        settings, branches = Sampling(block_length=length, guidance_scale=guidance, revisions=0), 1 + (guidance != 1)
        order, num_blocks, steps, _ = plan(settings, shape, canvas.known)

        def write(settings=settings, n=n):
            generate(model, canvas, settings, generators(machine.device, 1, range(n)))
        products = partial(rate, shape, cfg.vocab_size, machine.device, machine.dtype)
        took, rated = beside(write, products, machine.device, max(1, cfg.repeats // 2), 1)
        calls, flops = num_blocks * steps, n * text_flops(shape, cfg.vocab_size, order, steps, branches)
        floor = max(flops / rated, calls * weight_bytes(model) / bytes_rate)
        how = f"{num_blocks} x {steps} steps" + ", guided" * (branches > 1)
        what = f"{name}: {n} x {T} tokens, block_length {length}, {how}, {str(machine.dtype)[6:]}"
        yield line(what, took, floor, ms_a_step=1000 * took / calls, tokens_per_second=n * T / took)


def starting(cfg):
    """From the command to its first output, of new processes on a CPU."""
    def command(*args):
        done = subprocess.run([sys.executable, *args], cwd=ROOT, text=True, capture_output=True)
        if done.returncode:
            raise Fault(f"{' '.join(args)}: {done.stderr.strip()}")
    tiny = ("train.py", "config/tiny.py", "--device=cpu", "--max_steps=1", "--eval_sequences=2")
    with tempfile.TemporaryDirectory() as folder:
        commands = {"sample.py --help": ("sample.py", "--help"), "train.py --help": ("train.py", "--help"),
                    "train.py config/tiny.py, one step and a sample": (*tiny, f"--out_dir={folder}"),
                    "sample.py, 32 tokens of tiny": ("sample.py", f"--checkpoint={folder}", "--seq_len=32", "--seed=1")}
        cpu = torch.device("cpu")
        return [line(what, seconds(partial(command, *args), cpu, 1, 0)) for what, args in commands.items()]


def read_shape(cfg, name):
    """The settings of config/NAME.py, less what is asked for, with one batch in an optimizer step."""
    shape = load(train.Config, [str(ROOT / "config" / f"{name}.py")])
    sizes = {key: getattr(cfg, key) or getattr(shape, key) for key in ("n_layer", "block_size")}
    sizes["batch_size"] = cfg.batch_size or shape.micro_batch
    tokens = sizes["batch_size"] * sizes["block_size"]
    return replace(shape, device=cfg.device, dtype=cfg.dtype, compile=cfg.compile, batch_tokens=tokens, **sizes)


def measure(cfg, name, parts):
    """Yields the rates of one shape, then its rows."""
    shape = read_shape(cfg, name)
    machine = choose_machine(shape)
    cudnn = f", cuDNN {torch.backends.cudnn.version()}" if machine.device.type == "cuda" else ""
    print(f"{name}: {shape.n_layer} layers of {shape.n_embd}, vocabulary {cfg.vocab_size:,}, {torch.get_num_threads()} "
          f"threads, torch {torch.__version__}{cudnn}")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    rates = {kind: rate(shape, cfg.vocab_size, machine.device, dtype, 5) for kind, dtype in dtypes.items()}
    found = ", ".join(f"{kind} {value / 1e9:,.0f} GFLOP/s" for kind, value in rates.items())
    rates["bytes"] = bandwidth(machine.device)
    print(f"products alone: {found}; memory is read at {rates['bytes'] / 1e9:,.0f} GB/s")
    print(f"{'':72}{'seconds':>10}{'floor':>10}{'ratio':>8}")
    yield rates
    if "train" in parts:
        yield from training(cfg, name, shape, machine)
    if cfg.peer:
        yield from peer(cfg, name, shape, machine)
    dtypes = (machine.dtype,) if machine.device.type == "cuda" else dict.fromkeys((torch.float32, machine.dtype))
    for dtype in dtypes if "sample" in parts else ():
        yield from sampling(cfg, name, shape, machine._replace(dtype=dtype), rates["bytes"])
    if "profile" in parts:
        yield from profile(cfg, name, shape, machine)


def save(cfg, result):
    """Write what was measured so far: a run that is stopped leaves that."""
    if cfg.out:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        (Path(cfg.out) / "speed.json").write_text(json.dumps(result, indent=1) + "\n")


def main(cfg):
    keep_memory()
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    parts = cfg.parts.split(",")
    result = {"settings": asdict(cfg), "torch": torch.__version__, "rows": []}
    for name in cfg.shapes.split(","):
        found = measure(cfg, name, parts)
        result[f"{name}_rates"] = next(found)
        save(cfg, result)
        for row in found:
            result["rows"].append(row)
            save(cfg, result)
    if "origin" in parts:
        result["rows"] += origin(cfg, choose_machine(cfg).device)
    result["rows"] += starting(cfg) if "start" in parts else []
    save(cfg, result)


if __name__ == "__main__":
    run(main, Config)
