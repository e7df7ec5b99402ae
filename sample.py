"""
Write with a trained SunFish: freely, after a prompt, or into the blanks of a text.

    python sample.py --prompt "Once upon a time"
    python sample.py --num_samples=4 --seq_len=64 --block_length=16
    python sample.py --mode=infill --text "A: I saw [MASK] with my [MASK:3]."   # any length; 3 tokens
    python sample.py --checkpoint=out/instruct --prompt "Name three colours."          # trained to answer
    python sample.py --serve                                                           # in a browser

Samples go to stdout and all else to stderr. A prompt may be @FILE, one prompt a line, or - for stdin.
"""
import contextlib
import itertools
import json
import math
import os
import re
import secrets
import shlex
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import NamedTuple, get_type_hints

from configurator import (Fault, UserError, check_fields, in_range, one_of, parse_json, printable, read_file, run,
                          shorten, unknown)
import checkpoint as ckpt           # torch is imported here, after what catches Ctrl-C meanwhile
from data import cut_at_eot, first_document, format_instruction, get_tokenizer, write_file
from diffusion import generator
from generate import LONGEST, Canvas, Plan, Sampling, generate, infill, infill_canvas, plan, prompt_canvas, to_canvas
from machine import choose_device, choose_dtype, keep_memory, torch_faults
from serve import Server

BLANK = re.compile(r" ?\[MASK(?::(\d{1,9}))?\]")      # a blank takes the space before it, as tokens do
LIKE_BLANK = re.compile(r"(?i)\[\s*mask[^\]]{0,20}\]")
MARK = "<|endoftext|>"            # before a document
SPELLED = 0.7                     # tokens a byte, from which on a text is said to be spelled rather than read
PAGE = Path(__file__).with_name("viewer.html")
OF_PROGRAM = {"checkpoint", "device", "dtype", "quantize", "batch_size", "json", "html", "export", "serve", "port"}
PRETRAINED = Path(__file__).with_name("pretrained") / "simple"              # writes where no other network is named
BOLD, FAINT, PLAIN = (f"\033[{n}m" for n in (1, 2, 0))      # orders to a terminal
CARD = """---
license: other
library_name: sunfish
pipeline_tag: text-generation
---
# {name}

A SunFish: a language model that writes by denoising in continuous embedding space. `--checkpoint=hf:USER/{name}`

{facts}

It knows what was in its training text, and no more; nothing was done to make it safe. Its weights may be used as that
text may. Unedited, the first sample with seed {seed}, its prompt and its text:

    {prompt}
    {text}
"""


@dataclass(frozen=True)
class Config(Sampling):
    checkpoint: str = ""             # file, folder of a run, adapters or export, hf:user/name; "": pretrained/simple
    mode: str = "generate"           # generate, or infill with --text
    prompt: str = ""                 # text to continue, or instruction to answer; @FILE one a line, - stdin
    text: str = ""                   # infill: text with [MASK] (1 to 12 tokens, as fits) or [MASK:n] (n); @FILE, -
    temperature: float = 0.8         # below 1 is safer and duller; 1 is what the network learnt
    num_samples: int = 1             # samples of each prompt or text
    seq_len: int = 0                 # tokens to write; 0 is all that the window of the network leaves
    batch_size: int = 8              # samples at a time; in float32 it does not change them
    seed: int = 0                    # same seed, same text; 0: a new one each time, which is said
    device: str = "auto"             # auto, cpu, cuda, mps
    dtype: str = "auto"              # auto, float32, bfloat16: of the matrix products
    quantize: str = "none"           # none, int8: of the weights, which saves memory and not time
    json: bool = False               # one JSON object a sample
    show: bool = False               # watch the first sample of each batch being denoised
    html: str = ""                   # file for a page on which the first sample can be watched again
    export: str = ""                 # write the network to this folder, for sharing, and nothing else
    serve: bool = False              # a page to play with, at http://127.0.0.1 and this port, until Ctrl-C
    port: int = 8000

    def check(self):
        super().check()
        in_range(self, 1, 1e9, "num_samples", "batch_size")
        in_range(self, 0, 1e9, "seq_len")
        one_of(self, "mode", "generate", "infill")
        one_of(self, "dtype", "auto", "float32", "bfloat16")
        one_of(self, "quantize", "none", "int8")
        if self.mode == "infill" and (self.prompt or self.seq_len):
            wrong = "--prompt" if self.prompt else "--seq_len"
            raise UserError(f"mode=infill takes --text and no {wrong}; put all of it, with [MASK], into the text")
        if self.mode == "generate" and self.text:
            raise UserError("--text is for --mode=infill; use --prompt, or add --mode=infill")
        if self.export and (self.mode != "generate" or self.quantize != "none"):
            wrong = "--quantize" if self.mode == "generate" else "--mode"
            raise UserError(f"--export writes a whole network; leave out {wrong}")
        for name in ("prompt", "text", "export", "html", "json", "seq_len"):
            if self.serve and getattr(self, name):
                raise UserError(f"--serve takes its texts from the page and shows them there; leave out --{name}")
        in_range(self, 0, 65_535, "port")
        if self.html:
            check_page(Path(self.html))


def log(*words):
    print(*words, file=sys.stderr, flush=True)


# ---- input ----

def read_text(text):
    """The text itself, or of @FILE, or - for stdin."""
    try:
        if text == "-":
            text = sys.stdin.read().strip("\n")
        elif text.startswith("@"):
            text = read_file(text[1:], 2**26).decode("utf-8-sig").strip("\n")
        text.encode()                                   # what is not UTF-8, from Python too
    except UnicodeError as error:
        raise UserError(f"the text {shorten(text)} is not UTF-8 ({error}); save it as UTF-8") from None
    return text


def read_prompts(text):
    """The prompts that --prompt names: at least one, an empty one for none."""
    if not text.startswith("@"):
        return [read_text(text)]
    prompts = [line for line in read_text(text).split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{text[1:]} holds no prompt; write one a line")
    return prompts


def read_blanks(text, encode):
    """Text with [MASK] and [MASK:n] in pieces: lists of token ids, and the numbers n of blank tokens, 0 if open; and
    for each blank whether it stands behind a space."""
    for found in LIKE_BLANK.finditer(text):
        if not BLANK.fullmatch(found[0]):
            raise UserError(f"{found[0]} is no blank; write [MASK], in capitals, or [MASK:3] for 3 tokens")
    if not BLANK.search(text):
        raise UserError(f"--text={text!r} has no [MASK], in capitals; write for example \"The sky is [MASK:2] today.\"")
    pieces, spaced = [], []
    end = 0
    for blank in BLANK.finditer(text):
        n = int(blank[1] or 0)
        if blank[1] and not 1 <= n <= 10_000:
            raise UserError(f"{blank[0].strip()} is a blank of {n} tokens; write [MASK:1] or some more, or [MASK]")
        pieces += [encode(text[end:blank.start()]), n]
        spaced.append(blank[0].startswith(" "))
        end = blank.end()
    return [*pieces, encode(text[end:])], spaced


def encode_prompt(prompt, tokenizer, answers, begins):
    """Token ids of a prompt: of an instruction, of a document that begins, or of any text."""
    if LIKE_BLANK.search(prompt):
        raise UserError("a prompt is continued, not filled in; give text with [MASK] as --mode=infill --text=...")
    if not prompt.strip():
        return []
    prompt = format_instruction(prompt) if answers else prompt
    return [tokenizer.eot_token] * (answers or begins) + tokenizer.encode_ordinary(prompt)


# ---- output ----

def join(left, right):
    """Two texts, with a space where a word would run into another: between letters that have capitals."""
    seam = left[-1:], right[:1]
    return left + " " * all(char.lower() != char.upper() for char in seam) + right


def spell(tokenizer, pieces, spaced):
    """The text of pieces of token ids, of which every second fills a blank; one behind a space begins a word."""
    data = b""
    for i, piece in enumerate(pieces):
        runs = itertools.groupby(piece, tokenizer.eot_token.__eq__)        # a blank line tells documents apart
        new = b"".join(b"\n\n" if is_end else tokenizer.decode_bytes(list(run)) for is_end, run in runs)
        data += b" " * (i % 2 and spaced[i // 2] and new.decode(errors="replace")[:1].isalnum()) + new
    return data.decode(errors="replace")


def check_page(path):
    """UserError unless the page can be written into its folder, over nothing but a page of ours."""
    if not path.parent.is_dir():
        raise UserError(f"html={path}: there is no folder {path.parent}; choose another file")
    if path.exists() and (path.samefile(PAGE) or read_file(path, 2**26)[:100] != PAGE.read_bytes()[:100]):
        raise UserError(f"html={path} is there already, and no page of ours; choose another file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"html={path}: nothing can be written to {path.parent}; choose another file")


class Watch:
    """What `generate` shows each step to. It redraws the first sample in the terminal, if asked, and hands each step of
    it to `keep`: (noise level 0 to 1, words, positions). A word is a token and how sure the network is of it, None if
    it was given, -1 while it is noise."""

    def __init__(self, cfg, writer, task, keep=None):
        self.cfg, self.writer = cfg, writer
        self.keep = keep
        self.begin(task.canvas.known, task.plan.most_steps)

    def begin(self, known, total):
        """A window, given where known (T,), is now written in so many steps, at most."""
        self.sure = [None if is_known else -1 for is_known in known.tolist()]
        self.total, self.calls = total, 0

    def __call__(self, t, tokens, pos, logits):
        self.calls += 1
        is_drawn = self.cfg.show and (sys.stderr.isatty() or self.calls % math.ceil(self.total / 16) == 0)
        if not (is_drawn or self.keep):
            return
        sure = logits[0].float().softmax(-1).gather(-1, tokens[0, pos, None])[:, 0].tolist()
        for place, p in zip(pos.tolist(), sure, strict=True):
            self.sure[place] = round(p, 3)
        step = t / self.writer.model.cfg.timesteps, self.words(tokens[0].tolist()), pos.tolist()
        if self.keep:
            self.keep(step)
        if is_drawn:
            self.draw(*step[:2])

    def words(self, ids):
        """The words of a text up to its end."""
        begin = int(ids[0] == self.writer.eot)              # which opens a document
        end = len(cut_at_eot(ids[begin:], self.writer.eot)) + begin if self.cfg.mode == "generate" else len(ids)
        spelled = (self.writer.tokenizer.decode([i]).replace(MARK, "") for i in ids[:end])
        return list(zip(spelled, self.sure, strict=False))

    def draw(self, noise, words):
        """The text so far in the terminal: the surer the network, the stronger; noise is dots."""
        clear, text = "", "".join("\u00b7" if sure == -1 else word for word, sure in words)
        if sys.stderr.isatty():
            clear, text = "\033[2J\033[H", "".join(shade(*word) for word in words)
        bar = "#" * round(20 * noise) + "." * (20 - round(20 * noise))
        log(f"{clear}step {self.calls} of at most {self.total}, noise {bar} {noise:.2f}\n{text.strip()}")


def shade(word, sure):
    """A word as a terminal shows it: bold if it was given, faint while the network is unsure."""
    if sure is None:
        return BOLD + word + PLAIN
    return f"{FAINT}\u00b7{PLAIN}" if sure == -1 else FAINT * (sure < 0.7) + word + PLAIN


def print_sample(cfg, begin, number, text):
    """One sample to stdout: as JSON, or as text, behind how it begins."""
    if cfg.json:
        row = dict(prompt=cfg.prompt, text=text, seed=cfg.seed, number=number)
        return print(json.dumps(row, ensure_ascii=False), flush=True)
    title = f"--- {number + 1} ---\n" if cfg.num_samples > 1 else ""
    print(title + begin + text, flush=True)


def page(recordings):
    """The page on which a reader goes through recordings, dicts of title, about and steps (`Watch`), as bytes."""
    data = json.dumps(recordings).replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace("DATA", data).encode()


def export_network(cfg, path, content, text):
    """Write the network to a folder, with a model card that shows a sample."""
    folder, data = Path(cfg.export), content["data"]
    found = {name: content.get(name) for name in (*ckpt.MEASURED, *ckpt.USUAL)}
    log_file = path.parent / "log.jsonl" if path.is_file() else Path()
    for line in read_file(log_file).splitlines() if log_file.is_file() else []:
        with contextlib.suppress(ValueError, UserError):               # the last may be cut short
            row = parse_json(line)
            check_fields(log_file, row, step=(int, 0, content["step"]),
                         **{name: rule for name, rule in ckpt.MEASURED.items() if name in row})
            found |= {name: row[name] for name in found if name in row}
    if cfg.dtype == "bfloat16":                             # half of the bytes
        weights = {name: x.bfloat16() if x.ndim > 1 else x for name, x in content["ema"].items()}
        content = {**content, "ema": weights}
    ckpt.export(folder, content, **found)
    facts = {"training text": data["label"], "its licence": data["licence"], "tokenizer": data["tokenizer"]["name"],
             "steps": f"{content['step']:,}", "tokens seen": f"{found['tokens'] or 0:,}"}
    if found["bound"] and found["bound_error"]:
        facts["bound on held-out text"] = f"{found['bound']:.3f} +- {found['bound_error']:.3f} nats a token"
    if "base" in data:
        facts["begun with"] = "{label}; licence: {licence}; {steps:,} steps".format(**data["base"])
    facts = "\n".join(f"- {name}: {escape(printable(str(value)))}" for name, value in facts.items())
    card = dict(name=folder.resolve().name, facts=facts, seed=cfg.seed, prompt=printable(cfg.prompt, 10_000))
    try:
        text = printable(" ".join(text.split()), 10_000)
        (folder / "README.md").write_text(CARD.format(text=text, **card), encoding="utf-8")
    except OSError as error:
        raise Fault(f"cannot write export={folder} ({error.strerror}); choose another folder") from None
    log(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}; complete its README.md, use it with "
        f"--checkpoint={shlex.quote(cfg.export)}, share it with: hf upload USER/NAME {shlex.quote(cfg.export)}")


# ---- text in, text out ----

def load(checkpoint="", device="auto", dtype="auto", quantize="none"):
    """The Writer of a network, which is named as on the command line; UserError if there is none, or no such device."""
    path, content = ckpt.find_network(checkpoint or PRETRAINED)
    device = choose_device(device)
    return Writer(path, content, ckpt.load_model(content, device, choose_dtype(dtype, device), quantize == "int8"))


class Task(NamedTuple):
    """What is to be written."""
    canvas: Canvas                   # the text, or the window around its first blank
    plan: Plan
    pieces: list                     # of a text with blanks, as `read_blanks` makes them; else none
    spaced: list


class Writer:
    """A network and its tokenizer. Settings are those of the command line, by default those that it was trained for."""

    def __init__(self, path, content, model):
        self.path, self.content = path, content
        self.model, data = model, content["data"]
        self.tokenizer = get_tokenizer(data["tokenizer"])
        self.begins = data.get("align", 0) > 0              # its windows began with a document
        self.answers = data["kind"] == "instructions"
        self.eot = self.tokenizer.eot_token if self.begins or self.answers else None

    def generate(self, prompt="", **settings):
        """What follows a prompt, or answers an instruction."""
        return self.one(self.config(prompt=prompt, **settings))

    def infill(self, text, **settings):
        """A text whose blanks, [MASK] (1 to 12 tokens, as fits) and [MASK:n] (n), are filled in."""
        return self.one(self.config(mode="infill", text=text, **settings))

    def one(self, cfg, keep=None):
        """One sample, whose steps `keep` is shown as by a Watch; UserError if more are asked for."""
        if cfg.num_samples > 1:
            raise UserError(f"num_samples={cfg.num_samples}, but this writes one text; call it with other seeds")
        task = self.task(cfg)
        return self.write(cfg, task, [0], Watch(cfg, self, task, keep))[0]

    def config(self, **settings):
        """The Config of what is given, checked, with a seed."""
        kinds = get_type_hints(Config)
        for name in settings:
            if name not in kinds or name in OF_PROGRAM:
                raise unknown(name, {*kinds} - OF_PROGRAM, name)
            check_fields("settings", settings, **{name: kinds[name]})
        cfg = Config(**{**ckpt.usual(self.content), **settings})
        cfg.check()
        return cfg if cfg.seed else replace(cfg, seed=secrets.randbelow(10**6) + 1)

    def task(self, cfg):
        """The Task of a prompt or, with mode=infill, of a text with blanks."""
        pieces, spaced = [], [False]
        if cfg.mode == "infill":
            pieces, spaced = read_blanks(cfg.text, self.tokenizer.encode_ordinary)
            pieces[0] = [self.eot] * self.begins + pieces[0]
            idx, known = to_canvas(pieces)
            canvas = infill_canvas(idx[None], known, int((~known).nonzero()[0]), self.model.cfg)[1]
        else:
            ids = encode_prompt(cfg.prompt, self.tokenizer, self.answers, self.begins)
            canvas = prompt_canvas(ids, cfg.seq_len, self.model.cfg)
        return Task(canvas, plan(cfg, self.model.cfg, canvas.known), pieces, spaced)

    def makers(self, cfg, canvas, numbers):
        """For each of these samples a function that makes its Generator: what is given is in the seed."""
        given = canvas.prompt.flatten().tolist() + canvas.idx[..., canvas.known].flatten().tolist()
        return [partial(generator, self.model.wte.device, cfg.seed, number, *given) for number in numbers]

    def write(self, cfg, task, numbers, watch=None):
        """The samples of a Task with these numbers: texts whose blanks are filled, or what comes after the prompt."""
        canvas, _, pieces, spaced = task
        makers = self.makers(cfg, canvas, numbers)
        if pieces:
            made = infill(self.model, pieces, cfg, makers, watch)
            made = [[ids[0][ids[0][:1] == [self.eot]:], *ids[1:]] for ids in made]
        else:
            texts = generate(self.model, canvas, cfg, [make() for make in makers], watch, self.eot).tolist()
            given = int(canvas.known.sum())
            cut = cut_at_eot if given else first_document
            made = [[[], cut(ids[given:], self.eot)] for ids in texts]
        if watch:
            watch.written = sum(len(piece) for ids in made for piece in ids[1::2])
        texts = [spell(self.tokenizer, ids, spaced) for ids in made]
        if self.answers and not pieces:
            return [text.strip() for text in texts]
        return [join(cfg.prompt, text)[len(cfg.prompt):] for text in texts]


# ---- the program ----

def say_what(cfg, given, writer, task):
    """What is about to be done, by which network, and what is odd about it."""
    names = {0: "the whole window at once", 1: "one token at a time"}
    block = names.get(cfg.block_length, f"blocks of {cfg.block_length} tokens")
    if cfg.mode == "infill" and "guidance_scale" in given:
        log(f"warning: guidance_scale={cfg.guidance_scale} is not used with --mode=infill")
    if cfg.revisions > ckpt.usual(writer.content).get("revisions", cfg.revisions):
        log(f"warning: revisions={cfg.revisions}, but this network has not learnt to read token by token")
    spread = ", spread over the text" if cfg.strided and cfg.block_length > 1 else ""
    again = f", {task.plan.revisions} revisions at most" if task.plan.revisions else ""
    step, label = writer.content["step"], writer.content["data"]["label"]
    path, device = min(str(writer.path), os.path.relpath(writer.path), key=len), writer.model.wte.device
    times = f"{task.plan.num_blocks} x {task.plan.steps} step{'s' * (task.plan.steps > 1)}{again}"
    log(f"{path}: step {step:,}, trained on {label}; {block}{spread}, {cfg.sampler}, {times}, {device}, "
        f"{str(writer.model.dtype)[6:]}, seed {cfg.seed}")
    size = writer.model.cfg.block_size
    if cfg.block_length > size and "block_length" in given:
        log(f"warning: block_length={cfg.block_length}, but the window has {size} tokens, which are one block then; "
            "--block_length=0 is the window in more steps")
    said = BLANK.sub("", cfg.prompt or cfg.text)
    if len(writer.tokenizer.encode_ordinary(said)) > SPELLED * len(said.encode()) > 4:
        log("warning: the network was trained on text of other words or another language: it reads this letter by "
            "letter, and hardly understands it")
    if not said.strip():
        log("no prompt: the samples are unconditional")
        if "guidance_scale" in given:
            log(f"warning: without a prompt guidance_scale={cfg.guidance_scale} has nothing to guide")
    if 0 in task.pieces:
        log(f"each [MASK] is tried with 1 to {LONGEST} tokens")


def serve(cfg, given, writer):
    """Have what is typed into a page at 127.0.0.1 written, until Ctrl-C."""
    usual = {name: getattr(cfg, name) for name in given - OF_PROGRAM - {"mode", "num_samples"}}

    def write(asked, keep):
        text = asked.pop("text")
        kind = dict(mode="infill", text=text) if LIKE_BLANK.search(text) else dict(prompt=text)
        one = writer.config(**{**usual, **asked, **kind})
        writer.one(one, keep)
        return f"seed {one.seed}"
    server = Server(cfg.port, page([]), write)
    log(f"{writer.path}: open http://127.0.0.1:{server.server_port} in a browser; Ctrl-C ends this")
    server.run()


@torch_faults()
def main(cfg):
    keep_memory()
    writer, given = load(cfg.checkpoint, cfg.device, cfg.dtype, cfg.quantize), cfg.given
    how = writer.config(**{name: getattr(cfg, name) for name in given - OF_PROGRAM})
    cfg = replace(how, **{name: getattr(cfg, name) for name in OF_PROGRAM})
    if cfg.serve:
        return serve(cfg, given, writer)
    cfgs = [replace(cfg, prompt=prompt, text=read_text(cfg.text)) for prompt in read_prompts(cfg.prompt)]
    tasks = [writer.task(cfg) for cfg in cfgs]
    if cfg.export:
        folder = Path(cfg.export)
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"export={folder} is there already; choose a new folder")
        return export_network(cfg, writer.path, writer.content, writer.one(cfgs[0]))
    say_what(cfgs[0], given, writer, tasks[0])
    clock, calls = time.perf_counter(), []
    tokens, steps = 0, []
    writer.model.register_forward_hook(lambda *_: calls.append(1))
    for cfg, task in zip(cfgs, tasks, strict=True):
        for first in range(0, cfg.num_samples, cfg.batch_size):
            numbers = range(first, min(first + cfg.batch_size, cfg.num_samples))
            is_kept = cfg.html and first == 0 and task is tasks[0]
            watch = Watch(cfg, writer, task, steps.append if is_kept else None)
            for number, sample in zip(numbers, writer.write(cfg, task, numbers, watch), strict=True):
                print_sample(cfg, "" if writer.answers else cfg.prompt, number, sample)
            tokens += watch.written
    seconds = time.perf_counter() - clock
    if cfg.html:
        begin = shorten(cfgs[0].prompt or cfgs[0].text)
        about = f"{begin}; seed {cfg.seed}; {writer.path}, {writer.content['data']['label']}"
        write_file(Path(cfg.html), page([dict(title="", about=about, steps=steps)]))
        log(f"{cfg.html}: {len(steps)} steps to look at, in any browser")
    log(f"{tokens:,} token{'s' * (tokens != 1)} written in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s, "
        f"{len(calls):,} network calls")


def program():
    run(main, Config)


if __name__ == "__main__":
    program()
