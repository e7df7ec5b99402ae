"""
Train SunFish: pre-tokenized shards in, checkpoints and a log out.

    python train.py config/tiny.py                          # minutes on a laptop, on the embedded fables
    python train.py config/micro.py --device=cpu            # 41.6M parameters and the output head's 25.8M
    torchrun --nproc_per_node=8 train.py config/full.py     # 1.4B parameters

The data order and all noise are functions of (seed, step, number of the sequence in its step). So a run that resumes
is, on a CPU bit for bit, the run that never stopped; any number of processes and any batch size see the same batches.
"""
import contextlib
import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from configurator import Fault, UserError, describe, in_range, one_of, parse_json, run  # catches Ctrl-C from here on
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute

import checkpoint as ckpt
import diffusion
import machine as mc
from data import (EMBEDDED, Dataset, Texts, cut_at_eot, find_dataset, first_document, get_tokenizer, lock, make_batch,
                  read_meta, step_batches)
from generate import Canvas, Sampling, bound, generate, generators
from model import FLEX, ModelConfig, SunFish, add_lora, fused_cross_entropy

HEARTBEAT = 30                           # seconds after which a step says how far it is
SCHEDULE_RATE = 3e-3                     # learning rate of the fitted schedule's three scalars


@dataclass(frozen=True)
class Config(ModelConfig):
    # data and output
    dataset: str = "fineweb,fables"    # folder, or name under data/; of several the first that is prepared
    init_from: str = ""                # begin with this network (file, folder, hf:user/name); "": a new one
    prompt_file: str = ""              # for prompt_table=gpt2: a safetensors file with wte.weight; "": from the hub
    out_dir: str = "out/sunfish"       # for checkpoints and log.jsonl
    resume: bool = False               # continue the run in out_dir with other settings; with the same it always does
    # the optimizer step
    batch_size: int = 0                # sequences on a device at a time, at most; 0: what fits a GPU, 8 elsewhere
    batch_tokens: int = 65_536         # tokens in a step; gradient accumulation follows from it
    max_steps: int = 10_000            # optimizer steps
    learning_rate: float = 1e-3        # peak; cosine to zero after the warm-up
    warmup_steps: int = 200            # steps of linear warm-up
    weight_decay: float = 0.01         # of the matrices; 0 is off
    grad_clip: float = 1.0             # largest norm of the gradient; 0 is off
    ema_decay: float = 0.999           # averaging of the weights that sample; 0 is off
    lora_rank: int = 0                 # train adapters of this rank beside the weights of init_from; 0 trains all
    lora_alpha: float = 16.0           # the output of the adapters is multiplied by lora_alpha / lora_rank
    # the training mixture
    align: float = 0.0                 # share of windows that begin with a document; the others tile the text
    p_single: float = 0.3              # share of sequences written token by token (the autoregressive limit)
    p_window: float = 0.2              # share denoised as a whole window; the rest in blocks of 2, 4, 8 ...
    max_block_length: int = 16         # ... up to this many tokens
    p_strided: float = 0.25            # share of the latter whose blocks are spread over the text
    p_given: float = 0.17              # share with tokens given: a prefix, single ones, all but some spans
    self_conditioning: float = 0.5     # share of steps in which the network reads a first guess of x_0; 0 is off
    conditioning_dropout: float = 0.1  # share of prompts withheld, for guidance; 1 trains without prompts
    # machine
    seed: int = 1                      # of weights, data order and noise
    device: str = "auto"               # auto, cpu, cuda, cuda:1, mps
    parallel: str = "auto"             # auto, ddp, fsdp: of torchrun's processes; auto: fsdp if the GPU is too small
    dtype: str = "auto"                # auto, float32, bfloat16: of the matrix products
    compile: str = "auto"              # auto, true, false: torch.compile
    activation_checkpointing: bool = False      # recompute layers in the backward pass: less memory, more time
    dry_run: bool = False              # print sizes, batch and bytes, then stop
    # log
    log_interval: int = 10             # steps between log lines
    eval_interval: int = 500           # steps between evaluations; 0: only after the last step
    eval_sequences: int = 256          # sequences for the bound
    save_interval: int = 500           # steps between checkpoints
    keep_last: int = 2                 # newest checkpoints that are kept
    keep_interval: int = 0             # steps between checkpoints kept for good; 0 is off
    wandb_log: bool = False            # also log to Weights & Biases

    def check(self):
        """Raise UserError for settings that cannot work."""
        super().check()
        in_range(self, 1, 1e8, "batch_tokens")
        in_range(self, 1, 1e18, "max_steps", "max_block_length", "log_interval", "save_interval", "keep_last")
        in_range(self, 2, 1e18, "eval_sequences")
        in_range(self, 0, 1e18, "batch_size", "warmup_steps", "weight_decay", "grad_clip", "eval_interval",
                 "keep_interval", "lora_rank")
        in_range(self, 0, 1, "p_single", "p_window", "p_strided", "p_given", "self_conditioning",
                 "conditioning_dropout", "ema_decay", "align")
        in_range(self, 1e-12, 1, "learning_rate")
        in_range(self, 1e-12, 1e3, "lora_alpha")
        one_of(self, "dtype", "auto", "float32", "bfloat16")
        one_of(self, "compile", "auto", "true", "false")
        one_of(self, "parallel", "auto", "ddp", "fsdp")
        if self.p_single + self.p_window > 1:
            raise UserError(f"p_single={self.p_single} and p_window={self.p_window} add up to more than 1; lower one")
        if self.p_single + self.p_window < 1 and self.max_block_length < 2:
            raise UserError(f"max_block_length={self.max_block_length} leaves no blocks of 2 or more tokens; use 2")
        if self.lora_rank and not self.init_from:
            raise UserError(f"lora_rank={self.lora_rank} adapts a trained network; name it with --init_from=CHECKPOINT")
        if not self.init_from:                              # whose network is not known yet
            self.check_sizes()

    def check_sizes(self):
        """Raise UserError for what does not fit the network."""
        if self.lora_rank > self.n_embd:
            raise UserError(f"lora_rank={self.lora_rank} is more than n_embd={self.n_embd}; 8 is usual")
        N = mc.world_size()
        if not self.fits(N):
            batch = (self.batch_size or 1) * self.block_size * N
            near = max(1, round(self.batch_tokens / batch)) * batch
            what = "batch_size * " * (self.batch_size > 0) + "block_size" + (f" * world_size={N}" if N > 1 else "")
            others = ", ".join(str(i) for i in range(1, 4097) if N > 1 and self.fits(i))
            raise UserError(f"batch_tokens={self.batch_tokens:,} is not a multiple of {batch:,} ({what}); try {near:,}"
                            + (f", or {others} processes" if others else ""))

    def fits(self, N):
        """Whether N processes can share the sequences of a step in batches of one size."""
        n, rest = divmod(self.batch_tokens, self.block_size * N)
        return rest == 0 and n % min(self.batch_size or 1, n) == 0

    @property
    def step_sequences(self):
        """Sequences in an optimizer step, of all processes."""
        return self.batch_tokens // self.block_size

    @property
    def micro_batch(self):
        """Sequences on a device at a time."""
        return largest_divisor(self.step_sequences // mc.world_size(), self.batch_size or 8)

    @property
    def block_length(self):
        """Tokens denoised together at an evaluation, and by sample.py unless told otherwise."""
        if self.p_single + self.p_window >= 1:              # no blocks are trained
            return 1 if self.p_single else 0
        return min(Sampling.block_length, 2 ** (self.max_block_length.bit_length() - 1))

    @property
    def revisions(self):
        """How often sample.py reads a block again unless told otherwise: never, if no single tokens are trained."""
        return Sampling.revisions if self.p_single else 0

    def micro_batches(self):
        """Numbers within the step of the sequences in each batch that this process accumulates."""
        B, N = self.micro_batch, mc.world_size()
        return [range(first, first + B) for first in range(mc.rank() * B, self.step_sequences, N * B)]


def largest_divisor(n, most):
    """The largest divisor of n that is at most `most`."""
    return max(i for i in range(1, 1 + min(n, most)) if n % i == 0)


# ---- the loss and the optimizer ----

class DiffusionLoss(nn.Module):
    """Batch -> (sum of its tokens' losses, sum of the schedule's): the one call that DDP and FSDP wrap."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch):
        net, cfg = self.net, self.net.cfg
        E, alpha_bar = net.embedding(), net.alpha_bar()                            # (V, C), (timesteps + 1,)
        x_0 = E[batch.idx]                                                         # (B, T, C)
        x_t = diffusion.add_noise(x_0, batch.t, alpha_bar, batch.eps)              # (B, T, C)
        log_snr = diffusion.log_snr(batch.t, alpha_bar)                            # (B, T)
        prompt = net.encode_prompt(batch.prompt, batch.prompt_mask, E)
        guess = self.first_guess(x_0, x_t, log_snr, batch, prompt, E)
        h = net.denoise(x_0, x_t, log_snr, batch.order, prompt, E, guess)          # (B, T, n_embd)
        if cfg.objective == "eps":
            loss = (net.predict_noise(h) - batch.eps).square().mean(-1)            # Ho et al. 2020, eq. 14
            return (loss * batch.loss_mask).sum(), loss.new_zeros(())
        loss, nll = net.nll(h, x_t, log_snr, batch.idx, batch.loss_mask, E)        # sum with gradients, (B, T) without
        fit = diffusion.schedule_loss(nll, log_snr, net.schedule, cfg.token_dim)   # of tokens whose noise level varies
        return loss, (fit * batch.loss_mask * (batch.t < cfg.timesteps)).sum()

    @torch.no_grad()
    def first_guess(self, x_0, x_t, log_snr, batch, prompt, E):
        """x_0_hat (B, T, C) of a first pass, zeros at the highest noise level; None if this step has none."""
        if not batch.guess or self.net.cfg.objective == "eps":
            return None
        h = self.net.denoise(x_0, x_t, log_snr, batch.order, prompt, E)
        guess = self.net.first_guess(h, x_t, log_snr, E)
        return torch.where(batch.t[..., None] < self.net.cfg.timesteps, guess, 0)


def make_optimizer(model, cfg):
    """AdamW with groups for set_learning_rate: matrices or adapters, vectors, the schedule's scalars."""
    groups = [[], [], []]
    for name, p in model.named_parameters():
        is_matrix = p.ndim == 2 and (name.endswith(".weight") or ".lora_" in name)
        group = 0 if is_matrix else 1
        if p.requires_grad:
            groups[2 if name == "schedule" else group].append(p)
    groups = [dict(params=params) for params in groups if params]       # adapters have only the first
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.99), fused=True)


def set_learning_rate(optimizer, cfg, step):
    """Linear warm-up, then a cosine to zero; returns the rate. Sets the weight decay too, which may change."""
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    factor = (step + 1) / cfg.warmup_steps if step < cfg.warmup_steps else 0.5 * (1 + math.cos(math.pi * done))
    settings = (cfg.learning_rate, cfg.weight_decay), (cfg.learning_rate, 0.0), (SCHEDULE_RATE, 0.0)
    for group, (peak, weight_decay) in zip(optimizer.param_groups, settings, strict=False):
        group.update(lr=peak * factor, weight_decay=weight_decay)
    return cfg.learning_rate * factor


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay * ema + (1 - decay) * model, of trained weights; the memory is shorter in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    trained = [pair for pair in zip(ema.parameters(), model.parameters(), strict=True) if pair[1].requires_grad]
    torch._foreach_lerp_(*map(list, zip(*trained, strict=True)), 1 - decay)


# ---- evaluation ----

def evaluate(net, cfg, data, tokenizer):
    """Print the bound on held-out text and some samples; returns them as a row for the log. All processes measure, and
    the first one writes."""
    texts, row = data.spread(cfg.eval_sequences), {}
    if not data.is_examples:                                # a window is scored without the text before it
        texts = texts._replace(prompt_mask=torch.zeros_like(texts.prompt_mask))
    texts = Texts(*(x.to(net.wte.device) for x in texts))
    suffixes = {1: "_single", cfg.block_length: ""} if cfg.p_single else {cfg.block_length: ""}
    with whole(net):
        for length, suffix in suffixes.items():
            found = bound(net, texts, cfg.micro_batch, length)
            row |= {name + suffix: value for name, value in found.items()}
            how = {0: "the whole window", 1: "token by token"}.get(length, f"blocks of {length}")
            print(f"  held-out text, {how}: at most {found['bound']:.3f} +- {found['bound_error']:.3f} nats a token, "
                  f"perplexity {math.exp(min(found['bound'], 700)):,.4g}")        # exp overflows at 710
        row["text"] = make_samples(net, cfg, data, tokenizer) if mc.rank() == 0 else []
    for beginning, text in row["text"]:
        print(f"  {beginning}: {text}")
    return row


def make_samples(net, cfg, data, tokenizer):
    """(beginning, text) of three held-out texts that the network completes; of windows the first from nothing."""
    T, samples = cfg.block_size, []
    texts, given = data.read([k * len(data) // 6 for k in (1, 3, 5)])
    for i, n in enumerate(given.tolist() if data.is_examples else (0, T // 4, T // 4)):
        idx, prompt = texts.idx[i], texts.prompt[i][texts.prompt_mask[i] & (n > 0)]
        canvas, rng = Canvas(idx, torch.arange(T) < n, prompt), generators(net.wte.device, cfg.seed, [i])
        settings = Sampling(block_length=cfg.block_length, revisions=cfg.revisions)
        made = generate(net, canvas, settings, rng)[0, n:]
        truth = idx[n:][texts.loss_mask[i, n:]]
        cut = cut_at_eot if n else first_document
        made, truth = (cut(ids.tolist(), tokenizer.eot_token) for ids in (made, truth))
        parts = (torch.cat((prompt, idx[:n])).tolist(), made, truth)
        begun, made, truth = (" ".join(tokenizer.decode(ids).split()) for ids in parts)
        begun = begun.removeprefix("<|endoftext|>")
        samples.append((begun or "from nothing", f"{made} (truth: {truth})"))
    return samples


# ---- setting up ----

def open_data(cfg, base=None):
    """(what a checkpoint keeps of the data, training Dataset, validation Dataset); UserError if there are none, or if
    they do not fit the network `base`."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and find_dataset(cfg.dataset) is None:
        print(f"no data yet: preparing the embedded corpus, {EMBEDDED}", file=sys.stderr)
        script = Path(__file__).with_name("prepare_fineweb.py")
        if subprocess.run([sys.executable, script, f"--source={EMBEDDED}"]).returncode:
            raise UserError("the embedded corpus could not be prepared; see above")
    mc.barrier()
    folder = find_dataset(cfg.dataset)
    meta = read_meta(folder)
    data = {name: meta[name] for name in ("label", "licence", "kind", "fingerprint", "tokenizer", "vocab_size")}
    data["align"] = cfg.align
    if mc.broadcast(data["fingerprint"]) != data["fingerprint"]:
        raise UserError(f"process {mc.rank()} has other data, {data['label']}; prepare the same on every machine")
    if base:
        theirs = base["data"]
        data["base"] = {"label": theirs["label"], "licence": theirs["licence"], "steps": base["step"]}
        if data["tokenizer"] != theirs["tokenizer"]:
            raise UserError(f"dataset={cfg.dataset} was prepared with another tokenizer than that of init_from="
                            f"{cfg.init_from}; prepare it again with --tokenizer=FOLDER of that one's text")
    splits = ("train", cfg.align), ("val", math.ceil(cfg.align))            # what is held out is scored aligned
    return data, *(Dataset(folder, split, cfg, data["vocab_size"], align) for split, align in splits)


def load_base(cfg):
    """(cfg with the network of init_from, that checkpoint's content or None); only the first process has it."""
    if not cfg.init_from:
        return cfg, None
    content = None
    if mc.rank() == 0:
        path, content = ckpt.find(cfg.init_from) or (None, None)
        if not content:
            raise UserError(f"no checkpoint at init_from={cfg.init_from}; name a file, or the folder of a run")
        if "base" in content:
            raise UserError(f"init_from={path} is an adapter; name the network that it was trained on")
    theirs = mc.broadcast(content and dataclasses.asdict(ckpt.model_config(content)))
    mine = {name: getattr(cfg, name) for name in theirs if name in cfg.given}
    for name, value in mine.items():
        if value != theirs[name] and name not in ("block_size", "prompt_size"):
            raise UserError(f"{name}={value} is {theirs[name]} in init_from={cfg.init_from}; leave it out")
    cfg = dataclasses.replace(cfg, **theirs | mine)
    cfg.check()
    cfg.check_sizes()
    return cfg, content


def new_network(cfg, vocab_size, log_unigram=None):
    net = SunFish(cfg, vocab_size, log_unigram)
    if cfg.lora_rank:
        add_lora(net, cfg.lora_rank, cfg.lora_alpha)
    return net


def build(cfg, data, content, base, machine):
    """(raw_model, ema, model, optimizer): those of a checkpoint's content, or new ones, with the weights of `base`.
    Only the first process has these."""
    with torch.device("meta"):
        raw_model, ema = (new_network(cfg, data.vocab_size) for _ in range(2))
    ema.requires_grad_(False)
    model = parallelize(cfg, raw_model, ema, machine)
    optimizer, state = make_optimizer(raw_model, cfg), dict(content or {})
    if mc.rank() == 0 and (cfg.lora_rank or not content):           # adapters are saved without their network
        torch.manual_seed(diffusion.hash64(cfg.seed, "weights"))        # noise of a plain seed would repeat the weights
        weights = new_network(cfg, data.vocab_size, None if base else data.log_unigram()).state_dict()
        if base:
            weights.update(base["ema"])
        elif cfg.prompt_table == "gpt2":
            weights["prompt_table"] = ckpt.gpt2_vectors(cfg.prompt_file, data.vocab_size)
        state.update({name: {**weights, **state.get(name, {})} for name in ("model", "ema")})
    ckpt.restore_state(state, raw_model, ema, optimizer if mc.broadcast(bool(content)) else None)
    return raw_model, ema, model, optimizer


def parallelize(cfg, net, ema, machine):
    """The loss of a network, compiled and, under torchrun, replicated or sharded; both networks are on the meta device
    and get memory, but no values."""
    loss, kind = DiffusionLoss(net), cfg.parallel if "RANK" in os.environ else "none"
    if kind == "auto":
        on_gpu = machine.device.type == "cuda"
        room = torch.cuda.get_device_properties(machine.device).total_memory / 2 if on_gpu else math.inf
        kind = "ddp" if 20 * sum(p.numel() for p in net.parameters()) < room else "fsdp"       # with Adam and average
    if kind != "none":
        print(f"{mc.world_size()} processes, parallel {kind}")
    for layer in net.layers if cfg.activation_checkpointing else ():
        layer.forward = partial(recompute, layer.forward, use_reentrant=False, preserve_rng_state=False)   # no dropout
    if machine.compiled:
        compile_parts(net)
        net.flex = machine.device.type == "cuda" and cfg.block_size % FLEX == 0 and net.head_dim >= 16
    if kind == "fsdp":
        shard_layers(loss, ema, machine)
    net.to_empty(device=machine.device)
    ema.to_empty(device=machine.device)
    if kind != "fsdp":
        share_frozen(ema, net)
    if kind == "ddp":                                       # buffers never change; torch 2.13 renamed the setting
        sync = "broadcast_buffers" if torch.__version__ < "2.13" else "forward_sync_buffers"
        return DistributedDataParallel(loss, gradient_as_bucket_view=True, **{sync: False})
    return loss


def shard_layers(loss, ema, machine):
    """Shard a network and its average over the processes, layer by layer; gradients are summed in float32."""
    shard = partial(fully_shard, mesh=init_device_mesh(machine.device.type, (mc.world_size(),)))
    policy = MixedPrecisionPolicy(machine.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in loss.net.layers:
        shard(layer, mp_policy=policy)
    for module in (*ema.layers, ema, loss):
        shard(module)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")     # not changed in place


def compile_parts(net, backend="inductor"):
    """Compile the layers and the scores, not the whole: what is compiled for one layer serves for all."""
    torch._dynamo.config.recompile_limit = 32           # with cross-attention or not, last or not, gradients or not
    torch._dynamo.config.optimize_ddp = False           # it would cut layers in two
    for layer in net.layers:
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)
    net.cross_entropy = torch.compile(fused_cross_entropy, backend=backend, dynamic=False)
    net.mean_vector = torch.compile(net.mean_vector, backend=backend, dynamic=False)


def share_frozen(ema, net):
    """Let the average have the network's own tensors where these are not trained."""
    frozen = [(name, p) for name, p in net.named_parameters() if not p.requires_grad]
    for name, x in (*frozen, *net.named_buffers()):
        module, _, last = name.rpartition(".")
        setattr(ema.get_submodule(module), last, x)


@contextlib.contextmanager
def whole(net):
    """The network, all of which each process has meanwhile if it is sharded."""
    sharded = [module for module in net.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield net
    for module in sharded:
        module.reshard()


def sync_gradients(model, is_last):
    """Have the processes add up their gradients in the last backward pass of a step only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
    model.require_backward_grad_sync = is_last              # of DDP


def backward(model, batch, machine):
    """Gradients of a batch's mean loss, which is of all processes' batches of a step; returns the sum without them."""
    with machine.autocast():
        loss, fit = model(batch)
    (loss + fit).mul(mc.world_size() / batch.step_tokens).backward()                # averaged over the processes
    return loss.detach()


def warm_up(net, model, batch, cfg, machine):
    """Compile all that a step may need. Where flex_attention does not compile, attention takes a mask."""
    guesses = {cfg.self_conditioning > 0 and cfg.objective == "ce", cfg.self_conditioning == 1}
    for guess in sorted(guesses):
        clock = time.perf_counter()
        print(f"compiling the step {'with' if guess else 'without'} a first guess ...", end=" ", flush=True)
        try:
            backward(model, batch._replace(guess=guess), machine)
        except Exception as error:                          # the compilers below it raise anything
            if not net.flex:
                raise
            net.flex = False
            print(f"warning: no flex_attention here ({ckpt.reason(error)}); attention takes a mask", file=sys.stderr)
            backward(model, batch._replace(guess=guess), machine)
        print(f"{time.perf_counter() - clock:.0f} s")
    model.zero_grad(set_to_none=True)


def fit_batch(cfg, net, model, optimizer, data, machine):
    """The most sequences at a time for which there is memory on a GPU: peaks of one and two sequences, without the
    compiler, tell what each needs. 8 elsewhere."""
    if machine.device.type != "cuda":
        return cfg.micro_batch
    device, peaks = machine.device, []
    flex, net.flex = net.flex, False
    with torch.compiler.set_stance("force_eager"):
        for n in (1, 2):
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            backward(model, make_batch(cfg, data, 0, range(n), device)._replace(guess=True), machine)
            peaks.append(torch.cuda.max_memory_allocated(device) - before)
            model.zero_grad(set_to_none=True)
    net.flex = flex
    torch.cuda.empty_cache()
    to_come = [] if optimizer.state else [p for p in net.parameters() if p.requires_grad]
    moments = 8 * sum(mc.local_tensor(p).numel() for p in to_come)
    room = 0.8 * torch.cuda.mem_get_info(device)[0] - moments - peaks[0]
    fits = 1 + room // max(1, peaks[1] - peaks[0])
    fits = mc.all_reduce(torch.tensor(max(1, int(fits))), dist.ReduceOp.MIN)
    return largest_divisor(cfg.step_sequences // mc.world_size(), int(fits))


def print_sizes(cfg, net):
    """Print the sizes of the network and of a step, and the bytes they need."""
    n = sum(p.numel() for p in net.parameters())
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    rest = n - net.wte.numel() - sum(p.numel() for p in net.head.parameters())
    processes = f"{mc.world_size()} processes x " if mc.world_size() > 1 else ""
    print(f"model: {n:,} parameters, {rest:,} without token vectors and output head, {trained:,} trained")
    print(f"memory: {(4 * n + 16 * trained) / 1e9:.2f} GB and the activations (peak_gb in the log); checkpoint: "
          f"{16 * (trained if cfg.lora_rank else n) / 1e9:.2f} GB")
    print(f"step: {cfg.batch_tokens:,} tokens = {cfg.micro_batch} sequences x {cfg.block_size} tokens x {processes}"
          f"{len(cfg.micro_batches())} accumulated; {cfg.max_steps * cfg.batch_tokens:,} tokens in all")


def print_data(cfg, data, train_data):
    """Print what a run learns from."""
    kind = "examples" if train_data.is_examples else "windows"
    times = cfg.max_steps * cfg.step_sequences / len(train_data)
    print(f"data: {data['label']}: {len(train_data):,} {kind} of {cfg.block_size} tokens, each read {times:,.1f} "
          f"times; tokenizer {data['tokenizer']['name']}, {data['vocab_size']:,} ids")
    if train_data.is_examples and not cfg.init_from and mc.rank() == 0:
        print("warning: without --init_from a new network learns from these examples alone", file=sys.stderr)


def dry_run(cfg):
    """Print what a run would be, with GPT-2's vocabulary if its data is not prepared yet."""
    cfg, base = load_base(cfg)
    vocab_size = base["data"]["vocab_size"] if base else 50_257
    with contextlib.suppress(UserError):
        folder = None if base else find_dataset(cfg.dataset)
        vocab_size = read_meta(folder)["vocab_size"] if folder else vocab_size
    with torch.device("meta"):
        print_sizes(cfg, new_network(cfg, vocab_size))


def open_out_dir(cfg, data):
    """(the locked log, the content of the checkpoint to resume or None); UserError for what would be overwritten."""
    if not cfg.out_dir:
        raise UserError("out_dir is empty; name a folder for checkpoints and log, such as out/run")
    folder = Path(cfg.out_dir)
    has_run = any(folder.glob(ckpt.CKPT))
    if not has_run and not cfg.init_from and cfg.prompt_table == "gpt2":
        ckpt.gpt2_vectors(cfg.prompt_file, data["vocab_size"])              # or UserError, before anything is made
    if cfg.wandb_log:
        import wandb
        try:
            wandb.login()
        except wandb.errors.Error as error:
            raise UserError(f"wandb_log=True, but {error}; run `wandb login` or set WANDB_MODE=offline") from None
    file = lock(folder / "log.jsonl")
    for stump in folder.glob("ckpt_*.tmp"):
        stump.unlink()
    if not has_run:
        return file, None
    path, content = ckpt.find(folder)
    if content["step"] > cfg.max_steps:
        raise UserError(f"max_steps={cfg.max_steps}, but the run in {folder} is at step {content['step']}; raise it")
    ckpt.check_resumable(cfg, data, content)
    for other in folder.glob(ckpt.CKPT):
        if other > path:                                    # it is damaged and must not count for keep_last
            other.rename(other.with_suffix(".damaged"))
    return file, content


# ---- the log ----

def duration(seconds):
    """Seconds in words; of more than two days, what to do about them."""
    days = seconds / 86_400
    return f"{days:,.0f} days (fewer with a lower --max_steps)" if days > 2 else f"{seconds / 60:.1f} min"


class Log:
    """The log in out_dir/log.jsonl, without rows after step `start`, on the terminal and in Weights & Biases."""

    def __init__(self, cfg, file, start, wandb_id, device):
        self.cfg, self.file = cfg, file
        self.device, self.wandb_id = device, wandb_id
        self.run, self.last = None, (start, time.perf_counter(), 0.0)
        self.has_bound = bool(file) and truncate_log(file, start)
        if file and cfg.wandb_log:
            import wandb
            self.run = wandb.init(project="sunfish", name=Path(cfg.out_dir).name, id=wandb_id,
                                  config=dataclasses.asdict(cfg), resume="allow")
            self.wandb_id = self.run.id

    def step(self, done, loss, grad_norm, lr, waited):
        """Print and write a row; `waited` is the seconds spent on waiting for data so far."""
        now = done, time.perf_counter(), waited
        steps, seconds, waited = (new - old for new, old in zip(now, self.last, strict=True))
        self.last = now
        row = dict(step=done, loss=loss, lr=lr, grad_norm=grad_norm,
                   tokens_per_second=self.cfg.batch_tokens * steps / seconds, step_ms=1000 * seconds / steps,
                   data_ms=1000 * waited / steps, peak_gb=mc.peak_gb(self.device))
        left = duration((self.cfg.max_steps - done) * seconds / steps)
        try:
            print(f"step {done}/{self.cfg.max_steps} loss {loss:.3f} lr {lr:.2e} grad {grad_norm:.2f} "
                  "{tokens_per_second:,.0f} tokens/s step {step_ms:.0f} ms data {data_ms:.0f} ms peak {peak_gb:.2f} GB "
                  "left {left}".format(**row, left=left))
        except OSError as error:                            # EIO: the terminal was closed, SIGHUP has come
            if isinstance(error, BrokenPipeError):
                raise
        self.write(**row)

    def restart(self, done, waited):
        """Leave a save or an evaluation out of the next row's speed."""
        self.last = done, time.perf_counter(), waited

    def write(self, **row):
        """Write a row to the file and to Weights & Biases; Fault if the disk is full."""
        if not self.file:
            return
        row["tokens"] = row["step"] * self.cfg.batch_tokens
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise Fault(f"cannot write {self.file.name} ({error.strerror}); free some space and resume") from None
        if not self.run:
            return
        try:
            import wandb
            if "text" in row:
                row["text"] = wandb.Table(["beginning", "text"], row["text"])
            self.run.log(row, step=row["step"])
        except Exception as error:                          # whatever it raises: training is worth more
            print(f"warning: Weights & Biases is given up ({type(error).__name__}: {error})", file=sys.stderr)
            self.run = None


def truncate_log(file, start):
    """Cut a log before its first row after step `start`, and before an unfinished line; returns whether it has a bound
    of that step."""
    end, lines = 0, file.buffer
    has_bound = False
    lines.seek(0)
    while line := lines.readline(2**20):                                    # a longer one is no row
        with contextlib.suppress(ValueError, TypeError, LookupError):       # a line that is no row stays
            row = parse_json(line)
            if row["step"] > start:
                break
            has_bound |= row["step"] == start and "bound" in row
        if line.endswith(b"\n"):
            end = lines.tell()
    file.truncate(end)
    return has_bound


# ---- the loop ----

class Prefetch:
    """An iterator whose next item is made by a thread meanwhile; `waited` is the seconds spent on waiting."""

    def __init__(self, items):
        self.items, self.waited = items, 0.0
        self.thread = ThreadPoolExecutor(1)
        self.ahead = self.thread.submit(next, items, None)

    def __next__(self):
        clock = time.perf_counter()
        item = self.ahead.result()
        self.waited += time.perf_counter() - clock
        self.ahead = self.thread.submit(next, self.items, None)
        return item


def all_batches(cfg, data, start, device):
    """The batches of this process, one optimizer step after the other."""
    for step in range(start, cfg.max_steps):
        yield from step_batches(cfg, data, step, cfg.micro_batches(), device)


def train_step(model, optimizer, batches, cfg, step, machine):
    """One optimizer step: (mean loss of a token in nats, norm of the gradient); Fault, before the update, if they are
    not finite or memory does not suffice."""
    n, losses = len(cfg.micro_batches()), []
    begun = clock = time.perf_counter()
    try:
        for i in range(n):
            batch = next(batches)
            sync_gradients(model, i == n - 1)
            losses.append(backward(model, batch, machine))
            if time.perf_counter() - clock > HEARTBEAT and i < n - 1:
                clock = time.perf_counter()
                left = (clock - begun) / (i + 1) * n * (cfg.max_steps - step)
                print(f"step {step + 1}: {i + 1} of {n} batches, left {duration(left)}")
    except torch.OutOfMemoryError:
        raise Fault(f"out of memory with {cfg.micro_batch} sequences of {cfg.block_size} tokens, peak "
                    f"{mc.peak_gb(machine.device):.1f} GB; halve batch_size (the step stays the same)") from None
    loss = mc.all_reduce(torch.stack(losses).sum()) / batch.step_tokens
    params = [p for group in optimizer.param_groups for p in group["params"]]
    clipped = [p for p in params if p.shape != (3,)]        # not the schedule's three scalars
    norm = nn.utils.clip_grad_norm_(clipped, cfg.grad_clip or math.inf)
    loss, grad_norm = torch.stack((loss, mc.full_tensor(norm))).tolist()            # the step's one wait for the device
    if not math.isfinite(loss + grad_norm):
        lr = optimizer.param_groups[0]["lr"]
        raise Fault(f"step {step + 1}: loss {loss}, gradient norm {grad_norm} at learning rate {lr:.2e}; nothing was "
                    "updated; resume from the last checkpoint with a lower learning_rate")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


def is_measured(cfg, done):
    """Whether a run is evaluated after so many steps."""
    return done == cfg.max_steps or bool(cfg.eval_interval) and done % cfg.eval_interval == 0


@mc.torch_faults()
def train(cfg, machine):
    """Train, save and evaluate; returns the exit code: 0, or 128 and the number of the signal that ended it."""
    cfg, base = load_base(cfg)
    data, train_data, val_data = open_data(cfg, base)
    tokenizer = get_tokenizer(data["tokenizer"])
    kept = dict(data=data, block_length=cfg.block_length, revisions=cfg.revisions)      # in each checkpoint
    if base and cfg.lora_rank:
        kept["base"] = ckpt.fingerprint(base["ema"])
    file = content = None
    if mc.rank() == 0:
        file, content = open_out_dir(cfg, data)
        ckpt.check_base(cfg, content, kept)
    start = mc.broadcast(content["step"] if content else 0)
    raw_model, ema, model, optimizer = build(cfg, train_data, content, base, machine)
    log = Log(cfg, file, start, content and content.get("wandb_id"), machine.device)
    del base, content
    if cfg.batch_size == 0:
        size = fit_batch(cfg, raw_model, model, optimizer, train_data, machine)
        cfg = dataclasses.replace(cfg, batch_size=size)
    print(f"settings: {describe(cfg)}")
    print_data(cfg, data, train_data)
    print_sizes(cfg, raw_model)
    print(f"{'resuming at' if start else 'from'} step {start:,} of {cfg.max_steps:,}")
    if machine.compiled and start < cfg.max_steps:
        batch = make_batch(cfg, train_data, 0, cfg.micro_batches()[0], machine.device)
        warm_up(raw_model, model, batch, cfg, machine)
    batches, signals = Prefetch(all_batches(cfg, train_data, start, machine.device)), mc.catch_signals()
    saved, stop = start, 0
    if start and is_measured(cfg, start) and not mc.broadcast(log.has_bound):
        log.write(step=start, **evaluate(ema, cfg, val_data, tokenizer))        # it was killed after the save
    for step in range(start, cfg.max_steps):
        lr = set_learning_rate(optimizer, cfg, step)
        loss, grad_norm = train_step(model, optimizer, batches, cfg, step, machine)
        update_ema(ema, raw_model, cfg.ema_decay, step)

        done, stop = step + 1, mc.any_process(signals)  # all stop after the same step, or none
        last = stop or done == cfg.max_steps
        if last or done % cfg.log_interval == 0 or done == start + 1:
            log.step(done, loss, grad_norm, lr, batches.waited)
        if last or done % cfg.save_interval == 0:
            state, saved = ckpt.gather_state(raw_model, ema, optimizer), done
            if mc.rank() == 0:
                ckpt.save(cfg, done, state, wandb_id=log.wandb_id, **kept)
        if is_measured(cfg, done) and not stop:
            log.write(step=done, **evaluate(ema, cfg, val_data, tokenizer))
        if done in (saved, start + 1) or is_measured(cfg, done):
            log.restart(done, batches.waited)
        if stop:
            break
    if log.run:
        log.run.finish()                                    # main may end this process at once
    if stop or saved < cfg.max_steps:
        print(f"saved step {saved:,} in {cfg.out_dir}; the same command goes on from there")
        return 128 + stop
    prompt = ' --prompt="..."' if train_data.is_examples else ""
    print(f"done: step {cfg.max_steps:,}; python sample.py --checkpoint={shlex.quote(cfg.out_dir)}{prompt}")
    return 0


def main(cfg):
    if mc.rank():
        sys.stdout = open(os.devnull, "w")                  # one voice; faults still go to stderr
    mc.keep_memory()
    machine = mc.choose_machine(cfg)
    if cfg.dry_run:
        return dry_run(cfg) if mc.rank() == 0 else 0
    mc.join_processes(machine.device)
    code = train(cfg, machine)
    if dist.is_initialized():
        mc.shutdown(code)
    return code


def program():
    run(main, Config)


if __name__ == "__main__":
    program()
