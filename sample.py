"""
Write with a trained SunFish: freely, after a prompt, or into the blanks of a text.

    python sample.py --prompt "The list is sorted"
    python sample.py --num_samples=4 --seq_len=64
    python sample.py --mode=infill --text "The future of AI is [MASK] and [MASK:3]."         # a blank of any length, one of 3 tokens
    python sample.py --checkpoint=out/instruct --prompt "Name three colours."        # a network that was trained to answer

Samples go to stdout and all else to stderr. A prompt may be @FILE, one prompt a line, or - for stdin.
"""
import os
from dataclasses import dataclass

from configurator import fail, load


@dataclass(frozen=True)
class Config:
    checkpoint: str = ""             # file, folder of a run, adapters or an export, or hf:user/name; empty is the newest under out/
    mode: str = "generate"           # generate, or infill with --text
    prompt: str = ""                 # text to continue, or instruction to answer; @FILE one a line, - stdin, empty is none
    text: str = ""                   # infill: text with [MASK] (1 to 12 tokens, as fits best) or [MASK:n] (n tokens); or @FILE, -
    num_samples: int = 1             # samples of each prompt or text
    seq_len: int = 0                 # tokens to write; 0 is all that the block_size of the network leaves
    sampler: str = "ddim"            # ddim, or ddpm (eta=1)
    streams: int = 1                 # parts of the text that are written side by side, token by token: so many times fewer steps
    span_size: int = -1              # tokens written together, from left to right; 0 is all at once; -1 is 1, if it was trained so
    steps: int = 0                   # denoising steps for the whole text; 0 is 1 a turn, or 8 a span and 64 at least; ddpm: all
    eta: float = 1.0                 # ddim: fresh noise at each step, from 0 (deterministic) to 1 (as ddpm)
    temperature: float = 0.9         # of the scores; below 1 is safer and duller
    guidance_scale: float = 2.0      # weight of the prompt; 1 is the network's own, 0 ignores it
    batch_size: int = 8              # samples at a time; in float32 it does not change them
    seed: int = 1                    # same seed, same text
    device: str = "auto"             # auto, cpu, cuda
    dtype: str = "auto"              # auto, float32, bfloat16: of the matrix products
    quantize: str = "none"           # none, int8: of the weights, which saves memory and not time
    json: bool = False               # one JSON object a sample
    show: bool = False               # watch the first sample of each batch being denoised
    html: str = ""                   # file for a page on which the first sample can be watched again
    export: str = ""                 # folder to write the network to, for sharing, with a model card; nothing else is then written

    def check(self):
        for name in ("num_samples", "streams", "batch_size", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name, known in (("mode", "generate or infill"), ("sampler", "ddim or ddpm"), ("dtype", "auto or float32 or bfloat16"),
                            ("quantize", "none or int8")):
            if getattr(self, name) not in known.split(" or "):
                raise ValueError(f"{name}={getattr(self, name)} is unknown; use {known}")
        if self.sampler == "ddpm" and self.eta != 1:
            raise ValueError(f"eta={self.eta}, but sampler=ddpm is eta=1; use --sampler=ddim")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} is not between 0 (deterministic) and 1 (ddpm)")
        if self.steps < 0 or self.seq_len < 0:
            raise ValueError(f"steps={self.steps} and seq_len={self.seq_len} must not be negative; 0 is the default")
        if self.span_size < -1:
            raise ValueError(f"span_size={self.span_size} is not a number of tokens; 0 is all at once")
        if self.mode == "infill" and self.prompt:
            raise ValueError("mode=infill takes --text, not --prompt; put the prompt into the text")
        if self.export and (self.mode != "generate" or self.quantize != "none"):
            raise ValueError(f"mode={self.mode} and quantize={self.quantize}, but --export writes a whole network and a sample; leave them out")
        if self.html and not os.path.isdir(os.path.dirname(self.html) or "."):
            raise ValueError(f"html={self.html}: there is no folder {os.path.dirname(self.html)}; choose another file")
        if self.mode == "infill" and self.seq_len:
            raise ValueError(f"seq_len={self.seq_len} has no meaning with mode=infill; the text and its blanks give the length")
        if self.mode == "generate" and self.text:
            raise ValueError("--text is for --mode=infill; use --prompt, or add --mode=infill")


if __name__ == "__main__":
    CFG = load(Config)      # before torch is imported, so that --help and a wrong setting answer at once

import itertools                                                                           # noqa: E402
import json
import math
import re
import sys
import time
from pathlib import Path

import torch

import diffusion
from model import LATER, choose_device, find_checkpoint, has_bf16, keep_memory, load_model, merged, write_export
from prepare_fineweb import ask, get_tokenizer

BLANK = re.compile(r" ?\[MASK(?::(\d+))?\]")      # a blank takes the space before it, as tokens do
LONGEST = 12                                      # tokens that a [MASK] without a length is tried with, from 1 on
BEHIND = 24                                       # known tokens behind it at most that decide which is best


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def read_prompts(text):
    """The prompts that --prompt names: at least one, an empty one for none."""
    if text == "-":
        text = sys.stdin.read().strip()
        return [text]
    if text.startswith("@"):
        return [line for line in read_text(text).splitlines() if line.strip()] or fail(f"{text[1:]} holds no prompt; write one a line")
    return [text]


def read_text(text):
    """The text itself, or of @FILE, or - for stdin."""
    if text == "-":
        return sys.stdin.read().strip("\n")
    try:
        return Path(text[1:]).read_text(encoding="utf-8").strip("\n") if text.startswith("@") else text
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {text[1:]} ({error}); name a text file")


def read_blanks(text, encode):
    """Text with [MASK] and [MASK:n] in parts: lists of token ids, and the numbers n of blank tokens, 0 if that is open."""
    odd = [found[0] for found in re.finditer(r"(?i)\[\s*mask[^\]]{0,20}\]", text) if not BLANK.fullmatch(found[0])]
    if odd:
        fail(f"{odd[0]} is no blank; write [MASK], in capitals, or [MASK:3] for 3 tokens")
    if not BLANK.search(text):
        fail(f"--text={text!r} has no [MASK], in capitals, to fill; write for example \"The sky is [MASK:2] today.\"")
    parts, end = [], 0
    for blank in BLANK.finditer(text):
        n = int(blank[1]) if blank[1] else 0
        if blank[1] and not 1 <= n <= 10_000:
            fail(f"{blank[0].strip()} is a blank of {n} tokens; write [MASK:1] or some more, or [MASK] to let the network choose")
        parts, end = [*parts, encode(text[end:blank.start()]), n], blank.end()
    return [*parts, encode(text[end:])]


def lay_out(parts):
    """Token ids (T,) and where they are given (T,) bool; blanks hold id 0, open ones half of what they may hold."""
    given = [part if isinstance(part, list) else [0] * (part or LONGEST // 2) for part in parts]
    known = [[isinstance(part, list)] * len(ids) for part, ids in zip(parts, given, strict=True)]
    return torch.tensor(sum(given, [])), torch.tensor(sum(known, []))


def window_around(known, at, size):
    """(start, stop) of the at most `size` tokens in whose middle the blank that begins at `at` stands, in a text given where
    known (T,); of a blank too long for that the first half of `size`. No other blank is cut."""
    if len(known) <= size:
        return 0, len(known)
    end = at + int((known[at:].cumsum(0) == 0).sum())
    end = min(end, at + size // 2)
    start = max(0, min(at - (size - end + at) // 2, len(known) - size))
    stop = start + size
    while 0 < start < at and not (known[start] or known[start - 1]):
        start += 1
    while end < stop < len(known) and not (known[stop] or known[stop - 1]):
        stop -= 1
    return start, stop


def canvas_of(idx, known, at, cfg):
    """(start, stop) of the window around the blank at `at`, and the canvas of texts (B, T): before it stand known tokens only."""
    start, stop = window_around(known, at, cfg.block_size)
    first = max(0, start - cfg.prompt_size, *((~known[:start]).nonzero().flatten() + 1).tolist()[-1:])
    return start, stop, (idx[:, start:stop], known[start:stop], idx[:, first:start])


def fill(model, cfg, parts, numbers, watch=None):
    """Samples with these numbers of a text whose blanks have lengths: lists of token ids. What is longer than a window is filled
    from left to right, window by window."""
    idx, known = lay_out(parts)
    texts = idx.repeat(len(numbers), 1)
    if watch:
        watch.frames = []                               # those so far were of lengths that were tried
    while not known.all():
        start, stop, canvas = canvas_of(texts, known, int((~known).nonzero()[0]), model.cfg)
        if watch:
            watch.start = start
        texts[:, start:stop] = sample(model, cfg, canvas, numbers, watch).cpu()
        known[start:stop] = True
    return texts.tolist()


@torch.no_grad()
def nats(model, tokens, prompt):
    """-log p of tokens (B, T), each given those before it and a prompt (B, P), decided in one step from noise that says nothing."""
    E, group, seen = model.embedding(), torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens), torch.ones_like(prompt) > 0
    x_T = diffusion.randn(E[tokens], diffusion.generator(tokens.device, "nats"))
    level = diffusion.log_snr(torch.full_like(tokens, model.cfg.timesteps), diffusion.make_schedule(model.cfg, model.schedule))
    with torch.autocast(tokens.device.type, model.dtype, enabled=model.dtype != torch.float32):
        past = model.look_back(model.remember(tokens, group, prompt, seen, E), group)
        output = model(x_T, level, torch.zeros_like(x_T), prompt, seen, past, E)
    return diffusion.ce_loss(diffusion.make_read(model.cfg, E, model.vocab_size)(output, x_T, level)[1], tokens)


def try_length(model, cfg, parts, i, n, number, watch):
    """What it costs to fill part i, an open blank, with n tokens, and n: (nats a token, n). The cost is of what stands behind it, up
    to the next blank: a fill of the right length makes that likely. Nothing need be normalised, for these tokens are the same for
    every n (bench/LOG.md). Where nothing stands behind it, the cost is of a token of the fill."""
    idx, known = lay_out([*parts[:i], n, *parts[i + 1:]])
    at = len(lay_out(parts[:i])[0])
    start, stop, canvas = canvas_of(idx[None], known, at, model.cfg)
    made = sample(model, cfg, canvas, [number], watch)
    costs, at = nats(model, made, canvas[2].to(made.device))[0], at - start
    behind = costs[at + n:][known[start + at + n:stop].to(costs.device).cumprod(0) > 0][:min(BEHIND, max(1, (model.cfg.block_size - LONGEST) // 2))]
    return (behind if len(behind) else costs[at:at + n]).mean().item(), n


def infill(model, cfg, parts, numbers, watch=None):
    """As `fill`, of a text that may have open blanks: from left to right each takes the best length, in each sample."""
    if 0 not in parts:
        return fill(model, cfg, parts, numbers, watch)
    texts, frames = [], []
    for number in numbers:
        chosen = list(parts)
        for i in (i for i, part in enumerate(parts) if part == 0):
            longest = min(LONGEST, model.cfg.block_size // 2)
            chosen[i] = min(try_length(model, cfg, chosen, i, n, number, watch) for n in range(1, longest + 1))[1]
        texts += fill(model, cfg, chosen, [number], watch)
        if watch:
            frames, watch.frames = frames or watch.frames, []
    if watch:
        watch.frames = frames                           # of the first sample
    return texts


def make_canvas(cfg, model_cfg, prompt, encoding, answers=False):
    """What to write: token ids (T,), which are given (T,), and the ids (P,) before it that cross-attention sees. A network that
    answers sees the prompt as it saw instructions."""
    encode = encoding.encode_ordinary
    ids = [] if not prompt.strip() else [encoding.eot_token] + encode(ask(prompt)) if answers else encode(prompt)
    n = min(len(ids), model_cfg.block_size // 2, max(0, model_cfg.block_size - cfg.seq_len))
    ids, given = ids[:len(ids) - n], ids[len(ids) - n:]
    idx = torch.tensor(given + [0] * (cfg.seq_len or model_cfg.block_size - n))
    known = torch.arange(len(idx)) < n
    if len(idx) > model_cfg.block_size:
        fail(f"{len(idx)} tokens are more than the {model_cfg.block_size} that this network was trained at (block_size)")
    if len(ids) > model_cfg.prompt_size:
        fail(f"the prompt has {len(ids) + int(known.sum())} tokens, more than the {model_cfg.prompt_size + int(known.sum())} that "
             f"this network reads beside what it is to write (prompt_size, block_size); shorten it: {prompt[:40]!r}...")
    return idx, known, torch.tensor(ids, dtype=torch.int64)


def until(ids, end):
    """The list of token ids up to the first `end`."""
    return ids[:ids.index(end)] if end in ids else ids


class Watch:
    """What `diffusion.generate` shows each step to: counts the calls of the network, redraws the first sample in the terminal, if
    asked, and keeps for a page what each step decided of it: (t, places, ids, probabilities)."""

    def __init__(self, cfg, encoding, steps):
        self.cfg, self.encoding, self.steps, self.calls, self.start, self.frames = cfg, encoding, steps, 0, 0, []
        self.written = None             # (T,) where there is text so far; `sample` begins it with what is known

    def __call__(self, t, tokens, places, logits):
        self.calls += 1
        self.written[places] = True
        if self.cfg.show and (sys.stderr.isatty() or self.calls % self.steps == 0):
            parts = itertools.groupby(zip(self.written.tolist(), tokens[0].tolist(), strict=True), key=lambda pair: pair[0])
            text = "".join(self.encoding.decode([i for _, i in pairs]) if there else "\u00b7" * len([*pairs]) for there, pairs in parts)
            text = " ".join(text.split())
            clear = "\033[2J\033[H" if sys.stderr.isatty() else ""
            say(f"{clear}step {(self.calls - 1) % self.steps + 1}/{self.steps}, noise index {t}\n{text}")
        if self.cfg.html:
            ids = tokens[0, places]
            sure = logits[0].float().softmax(-1).gather(-1, ids[:, None])[:, 0]
            self.frames.append((t, (places + self.start).tolist(), ids.tolist(), sure.tolist()))


def plan(cfg, model_cfg, known):
    """How many tokens are written together, the turn of each (T,), where known (T,) none is, how many turns, and all their steps.

    Raises ValueError if there are fewer steps than turns, or more in a turn than the network knows timesteps, or streams of spans."""
    size = min(1, model_cfg.span_size) if cfg.span_size < 0 else cfg.span_size
    once = size == 1 and model_cfg.objective == "ce"            # trained to decide single tokens in one step
    if cfg.streams > 1 and not once:
        raise ValueError(f"streams={cfg.streams} are of single tokens, decided in one step, and here {f'{size} of them' if size else 'all'} are "
                         f"denoised together in several; use --span_size=1, if the network was trained so, or --streams=1")
    group = diffusion.streams(~known, cfg.streams) if once else diffusion.spans(len(known), size)
    turns = len(group[~known].unique())
    usual = max(model_cfg.timesteps, turns) if cfg.sampler == "ddpm" else turns if once else max(64, 8 * turns)
    steps = cfg.steps or min(usual, turns * model_cfg.timesteps)
    if steps < turns:
        raise ValueError(f"steps={steps} is less than one for each of {turns} turns; use more, or {'more --streams' if once else 'a larger --span_size'}")
    if steps > turns * model_cfg.timesteps:
        raise ValueError(f"steps={steps} is more than the {model_cfg.timesteps} timesteps of this checkpoint for each of {turns} turns")
    return size, group, turns, steps


class Reader:
    """The network for texts that are written turn by turn. What its blocks have read of them stays, so that a turn costs its own
    tokens and those of the turn before.

    With guidance the texts stand there twice, in one batch: with all that is given, and without the prompt (B, P) and the
    tokens of `begun` (T,). Both see the same noise, and their answers are weighed where the scores are read from.
    """

    def __init__(self, model, table, prompt, begun, scale):
        self.model, self.table, self.scale, self.past = model, table, scale, None
        self.branches, self.fresh, self.readout = 1 if scale == 1 else 2, None, model.readout(table)
        self.unseen = torch.stack((torch.zeros_like(begun), begun))[:self.branches].repeat_interleave(len(prompt), 0)
        seen = torch.ones_like(prompt, dtype=torch.bool)
        self.rest = dict(prompt=prompt.repeat(self.branches, 1), prompt_mask=torch.cat((seen, ~seen)[:self.branches]), E=table)

    def network_for(self, tokens, group, places):
        """The network of the noisy tokens at these places, as `diffusion.generate` asks for it."""
        seen = torch.where(self.unseen, LATER, group)
        if (group == group[0]).all():                   # all at once: there is nothing to look back to
            return self.network
        if self.past:                                   # the last turn's tokens are read in one pass with this turn's first
            written = self.past.places
            self.fresh, self.past = tokens[:, written], self.model.look_back(self.past.blocks, seen, places, written)
        else:
            self.past = self.model.look_back(self.model.remember(tokens.repeat(self.branches, 1), seen, **self.rest), seen, places)
        return self.network

    def network(self, x_t, log_snr, x_prev):
        mean = self.model.posterior_mean(x_t, log_snr, self.table)
        hidden = self.model.hidden(mean, log_snr, x_prev, past=self.past, fresh=self.fresh, **self.rest)
        self.past = self.past and self.past.read()
        if self.branches == 2:
            hidden = diffusion.guide(*hidden.chunk(2), self.scale)      # the head is linear, so this weighs its answers
        return self.model.answer(self.model.features(hidden, x_t, log_snr), *self.readout)


@torch.no_grad()
def sample(model, cfg, canvas, numbers, watch=None, end=None):
    """Samples with these numbers, whose noise depends on (seed, number) alone: token ids (B, T), what is given included. Of no use
    is what follows the token `end`, if there is one.

    Guidance is away from what the network would write without the prompt: not the text before the canvas, and not what is
    given at its beginning.
    """
    device, dtype, B = model.table.device, model.dtype, len(numbers)
    idx, known, prompt = (part.to(device) for part in canvas)
    table, alpha_bar = model.embedding(), diffusion.make_schedule(model.cfg, model.schedule)
    E = table.to(dtype)
    begun = known.cummin(0).values & ~known.all()                           # given, with nothing to write before it
    scale = cfg.guidance_scale if cfg.mode == "generate" and (prompt.numel() or begun.any()) else 1
    network_for = Reader(model, E, prompt.expand(B, -1), begun, scale).network_for
    _, group, _, steps = plan(cfg, model.cfg, canvas[1])
    if watch:
        watch.written = known.clone()
    read = diffusion.make_read(model.cfg, E, model.vocab_size, cfg.temperature)
    rng = [diffusion.generator(device, cfg.seed, number) for number in numbers]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return diffusion.generate(network_for, read, table, alpha_bar, idx.expand(B, -1), known, group.to(device), steps, cfg.eta, rng, watch, end)


def open_checkpoint(cfg):
    """(path, content) of the checkpoint that is asked for; adapters are merged into the network that they were trained on."""
    place = cfg.checkpoint or "out"
    try:
        path, content = find_checkpoint(place) or fail(f"no checkpoint at {place}; train one with `python train.py config/tiny.py`, or name it "
                                                       "with --checkpoint")
        if "base" not in content:
            return path, content
        init_from = content["config"]["init_from"]
        _, base = find_checkpoint(init_from) or fail(f"no checkpoint at init_from={init_from}, where the adapters in {path} began with the network "
                                                     f"{content['base']}; put it back there")
    except ValueError as error:
        fail(f"{error}; train again, or name another with --checkpoint", code=1)
    try:
        return path, merged(base, content)
    except ValueError as error:
        fail(f"{path}: {error}; put that one back there")


def main(cfg):
    keep_memory()
    path, checkpoint = open_checkpoint(cfg)
    answers = checkpoint["data"].get("kind") == "instructions" and cfg.mode == "generate"
    try:
        device = choose_device(cfg.device)
    except ValueError as error:
        fail(error)
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if has_bf16(device) else "float32"
    model, encoding = load_model(checkpoint, device, getattr(torch, dtype), cfg.quantize == "int8"), get_tokenizer(checkpoint["data"]["tokenizer"])
    if answers and (cfg.streams > 1 or cfg.span_size not in (-1, 1)):
        fail(f"streams={cfg.streams} and span_size={cfg.span_size}, but this network answers, token by token, until the answer ends; leave them out")
    prompts = read_prompts(cfg.prompt or ("Name three colours." if cfg.export and answers else ""))
    parts = read_blanks(read_text(cfg.text), encoding.encode_ordinary) if cfg.mode == "infill" else []
    if parts:
        idx, known = lay_out(parts)
        canvases = [canvas_of(idx[None], known, int((~known).nonzero()[0]), model.cfg)[2]]
    else:
        canvases = [make_canvas(cfg, model.cfg, prompt, encoding, answers) for prompt in prompts]
    try:
        plans = [plan(cfg, model.cfg, known) for _, known, _ in canvases]
    except ValueError as error:
        fail(error)
    end = encoding.eot_token if answers else None
    if cfg.export:
        return export(cfg, path, checkpoint, model, encoding, prompts[0], canvases[0], end)
    how = f"{plans[0][3]} steps" if 0 not in parts else f"blanks of 1 to {LONGEST} tokens tried"
    say_what(cfg, f"{path}: step {checkpoint['step']:,}, trained on {checkpoint['data']['label']}", prompts, plans[0][0], how, f"{device}, {dtype}")
    started, tokens, calls = time.perf_counter(), 0, 0
    for prompt, canvas, (*_, steps) in zip(prompts, canvases, plans, strict=True):
        for first in range(0, cfg.num_samples, cfg.batch_size):
            numbers = range(first, min(first + cfg.batch_size, cfg.num_samples))
            watch = Watch(cfg, encoding, steps)
            if parts:
                try:
                    made = infill(model, cfg, parts, numbers, watch)
                except ValueError as error:                                     # of a length or a window that the steps do not suit
                    fail(error)
                tokens += sum(map(len, made)) - len(made) * sum(len(part) for part in parts if isinstance(part, list))
            else:
                given = int(canvas[1].sum())                                    # the prompt is written as it came
                texts = sample(model, cfg, canvas, numbers, watch, end).tolist()
                made = [until(ids[given:], end) for ids in texts]
                tokens += sum(map(len, made))
            calls += watch.calls
            for number, ids in zip(numbers, made, strict=True):
                write(cfg, prompt, number, encoding.decode(ids), answers)
            if cfg.html and not first and canvas is canvases[0]:
                shown = made[0] if parts else texts[0][:given + len(made[0])]
                save_page(cfg.html, diffusion.make_schedule(model.cfg, model.schedule), encoding, shown, watch.frames)
    seconds = time.perf_counter() - started
    say(f"{tokens:,} tokens written in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s, {calls} network calls")


def export(cfg, path, content, model, encoding, prompt, canvas, end):
    """Write the network to a folder, with a model card, to be read by --checkpoint=FOLDER."""
    folder, data = Path(cfg.export), content["data"]
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        fail(f"export={folder} is there already; choose a new folder")
    text = until(sample(model, cfg, canvas, range(1), end=end)[0, canvas[1].sum():].tolist(), end)
    log = path.parent / "log.jsonl" if path.is_file() else Path()
    found = {"tokens": content.get("tokens"), "bound": content.get("bound"), "bound_error": content.get("bound_error")}
    for line in log.read_text().splitlines() if log.is_file() else []:
        row = json.loads(line) if line.endswith("}") else {"step": math.inf}        # the last may be cut short
        found.update({key: row[key] for key in found if key in row and row["step"] <= content["step"]})
    about = {"parameters": f"{sum(p.numel() for p in model.parameters()):,}", "training text": f"{data['label']}; licence: {data.get('licence', 'unknown')}",
             **({"begun with": f"{base['label']}; licence: {base['licence']}; {base['steps']:,} steps"} if (base := data.get("base")) else {}),
             "steps": f"{content['step']:,}", "tokens seen": f"{found['tokens']:,}" if found["tokens"] else "unknown",
             "bound on held-out text": f"{found['bound']:.3f} +- {found['bound_error']:.3f} nats a token, as sample.py writes" if found["bound"] else "not measured",
             "window": f"{model.cfg.block_size} tokens, and {model.cfg.prompt_size} before it", "vocabulary": f"{model.vocab_size:,} ids ({data['tokenizer']['name']})"}
    try:
        write_export(folder, content, **found)
        (folder / "README.md").write_text(CARD.format(
            name=folder.resolve().name, table="\n".join(f"| {key} | {value} |" for key, value in about.items()), prompt=prompt, seed=cfg.seed,
            text=encoding.decode(text).strip("\n"), use=f"--prompt {json.dumps(prompt)}" if prompt else "--num_samples=4",
            infill="" if end else f'\n    python sample.py --checkpoint=hf:USER/{folder.resolve().name} --mode=infill --text "The sky is [MASK] today."'),
            encoding="utf-8")
    except ImportError:
        fail("--export needs the safetensors package; pip install safetensors")
    except OSError as error:
        fail(f"cannot write export={folder} ({error}); choose another folder", code=1)
    say(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}; read it with --checkpoint={folder}, complete its README.md, "
        f"and share it with: hf upload USER/NAME {folder}")


CARD = """---
license: other
library_name: sunfish
pipeline_tag: text-generation
tags: [diffusion, continuous-diffusion, text-infilling]
---
# {name}

A SunFish: a language model that writes by denoising in continuous embedding space.

| | |
|---|---|
{table}

## Use

With the code of SunFish:

    python sample.py --checkpoint=hf:USER/{name} {use}{infill}

## A sample

The first that was drawn with seed {seed}, unedited, after the prompt {prompt!r}:

```text
{text}
```

## Limits

It knows what was in its training text, and no more; what it says may be wrong, and may be harmful where that text was. Nothing was
done to make it safe. It writes in windows of the size above. Its weights may be used as its training text may: name the licence here.
"""


def say_what(cfg, network, prompts, size, how, machine):
    """What is about to be done, by which network, and what is odd about it."""
    together = "all tokens at once" if size == 0 else f"{size} token{'s' * (size > 1)} at a time"
    together = f"{cfg.streams} streams side by side" if cfg.streams > 1 else together
    say(f"{network}; {cfg.sampler}, {how}, {together}, {machine}")
    if not all(prompt.strip() for prompt in prompts):
        if cfg.mode == "generate":
            say("no prompt: the samples are unconditional")
        if cfg.guidance_scale != Config.guidance_scale:
            say(f"warning: without a prompt guidance_scale={cfg.guidance_scale} has nothing to guide")


def save_page(path, alpha_bar, encoding, ids, frames):
    """Write a page on which a reader can go through the steps in which the tokens `ids` were written: one file, no other needed."""
    written = {place for _, places, _, _ in frames for place in places}
    tokens = [None if place in written else encoding.decode([i]) for place, i in enumerate(ids)]
    steps = [[t, round(float((1 - alpha_bar[t]) ** 0.5), 4),
              [[place, encoding.decode([i]), round(p, 3)] for place, i, p in zip(places, now, sure, strict=True) if place < len(ids)]]
             for t, places, now, sure in frames]
    steps = [step for step in steps if step[2]]         # not those after the end
    data = json.dumps(dict(tokens=tokens, steps=steps)).replace("<", "\\u003c")
    try:
        Path(path).write_text(PAGE.replace("DATA", data), encoding="utf-8")
    except OSError as error:
        fail(f"cannot write html={path} ({error.strerror}); choose another file", code=1)
    say(f"{path}: {len(steps)} steps to look at, in any browser")


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>SunFish: from noise to text</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 48rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733; background: #fff }
h1 { font-size: 1.25rem; margin: 0 } p { margin: .3rem 0 1rem; color: #5b6875 }
#text { white-space: pre-wrap; font: 1.15rem/2 Georgia, serif; min-height: 9rem; padding: 1rem; border: 1px solid #d5dce3; border-radius: 8px }
#text span { border-radius: 4px; padding: .15em 0 } .given { font-weight: bold } .blank { color: #c3ccd5; letter-spacing: .05em }
.now { outline: 2px solid #1c2733; outline-offset: 1px }
input { width: 100%; margin: 1rem 0 .3rem } #bar { display: flex; gap: 1rem; align-items: center; justify-content: space-between }
button { font: inherit; padding: .2rem 1rem } i { display: inline-block; width: 9rem; height: .7rem; border-radius: 4px; vertical-align: middle;
background: linear-gradient(90deg, rgb(247 168 98), rgb(205 232 246)) }
</style>
<h1>From noise to text</h1>
<p>Bold is given, dots are noise. Colour is how sure the network was of a token when it last decided it: unsure <i></i> sure.</p>
<div id="text" aria-live="off"></div>
<input id="at" type="range" min="0" value="0" aria-label="step">
<div id="bar"><span id="where"></span><button id="play">play</button><span>keys: &larr; &rarr; Home End, space plays</span></div>
<script>
const data = DATA, at = document.getElementById('at'), text = document.getElementById('text'), where = document.getElementById('where'),
      play = document.getElementById('play'), n = data.steps.length;
let timer = null;
at.max = n;
function show() {
  const k = +at.value, seen = data.tokens.map(token => token === null ? null : [token, null, false]);
  for (let i = 0; i < k; i++) for (const [place, token, sure] of data.steps[i][2]) seen[place] = [token, sure, i === k - 1];
  text.replaceChildren(...seen.map(found => {
    const span = document.createElement('span');
    if (!found) { span.className = 'blank'; span.textContent = ' \\u00b7\\u00b7\\u00b7'; return span }
    const [token, sure, now] = found;
    span.textContent = token;
    if (sure === null) span.className = 'given';
    else {
      span.style.background = `rgb(${247 - 42 * sure} ${168 + 64 * sure} ${98 + 148 * sure})`;
      span.title = `${Math.round(100 * sure)} % sure`;
      if (now) span.className = 'now';
    }
    return span;
  }));
  const [t, noise] = k ? data.steps[k - 1] : [null, 1];
  where.textContent = `step ${k} of ${n}, noise ${noise.toFixed(2)}` + (t ? ` (t = ${t})` : '');
}
function go(k) { at.value = Math.max(0, Math.min(n, k)); show() }
function stop() { clearInterval(timer); timer = null; play.textContent = 'play' }
function toggle() {
  if (timer) return stop();
  if (+at.value === n) go(0);
  play.textContent = 'pause';
  timer = setInterval(() => { go(+at.value + 1); if (+at.value === n) stop() }, Math.max(60, 6000 / n));
}
at.addEventListener('input', () => { stop(); show() });
play.addEventListener('click', toggle);
document.addEventListener('keydown', event => {
  const move = { ArrowRight: () => go(+at.value + 1), ArrowLeft: () => go(+at.value - 1), Home: () => go(0), End: () => go(n) }[event.key];
  if (move) { stop(); move(); event.preventDefault() }
  else if (event.key === ' ' && event.target !== play) { toggle(); event.preventDefault() }
});
show();
</script>
</html>
"""


def write(cfg, prompt, number, text, answer=False):
    """One sample to stdout: as JSON, or as text with its prompt in front, if it is not an answer."""
    if cfg.json:
        print(json.dumps(dict(prompt=prompt, text=text.strip() if answer else text, seed=cfg.seed, number=number), ensure_ascii=False), flush=True)
    else:
        print((f"--- {number + 1} ---\n" if cfg.num_samples > 1 else "") + (text.strip() if answer else prompt + text), flush=True)


if __name__ == "__main__":
    try:
        main(CFG)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
