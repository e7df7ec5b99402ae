"""
What int8 weights cost and save: bytes, peak memory, seconds, bound, and the judge's opinion of the texts.

    python bench/quantize.py --checkpoint=out/stories --dataset=stories --judge=out/causal

Each row is a process of its own, so that its peak is its own; it samples first, and is measured then. The judge is an
autoregressive twin (bench/twins.py). All rows have the same windows, noise and seeds.
"""
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint as ckpt
import quality
from configurator import Fault, in_range, one_of, run
from generate import Canvas, Sampling, bound, generate, generators
from machine import keep_memory, peak_gb

ROWS = ("float32", "float32 int8", "bfloat16", "bfloat16 int8")


@dataclass(frozen=True)
class Config:
    checkpoint: str = ""             # run or export
    dataset: str = ""                # shards whose validation windows the bound is measured on; "": no bound
    judge: str = ""                  # autoregressive twin; "": no perplexity of the texts
    sequences: int = 256             # windows for the bound
    texts: int = 256                 # unprompted texts for the judge
    seq_len: int = 0                 # tokens of the texts that are timed; 0 is a window
    temperature: float = 0.8         # of the texts
    row: str = ""                    # measure this row only, and print it as JSON
    out: str = ""                    # file for the table, as JSON

    def check(self):
        in_range(self, 2, 1e9, "sequences", "texts")
        one_of(self, "row", "", *ROWS)


def open_row(content, row):
    """The network of a checkpoint's content, in the way that a row names."""
    dtype, _, int8 = row.partition(" ")
    return ckpt.load_model(content, "cpu", getattr(torch, dtype), bool(int8))


def measure(cfg):
    """One row: megabytes, peak, seconds for a text, bound, and perplexity and entropy of texts."""
    keep_memory()
    torch.set_num_threads(1)
    _, content = ckpt.find_network(cfg.checkpoint)
    model, settings = open_row(content, cfg.row), Sampling(**ckpt.usual(content))
    T = cfg.seq_len or model.cfg.block_size
    nothing = torch.zeros(T, dtype=torch.int64)
    seconds = []
    for _ in range(3):
        clock = time.perf_counter()
        generate(model, Canvas(nothing, nothing.bool(), nothing[:0]), settings, generators("cpu", 1, [0]))
        seconds.append(time.perf_counter() - clock)
    size = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    row = dict(row=cfg.row, mb=size / 1e6, peak_gb=peak_gb(torch.device("cpu")), seconds=min(seconds))
    if cfg.dataset:
        texts = quality.plain(quality.open_data(cfg.dataset, content, model.cfg).spread(cfg.sequences).idx)
        with torch.autocast("cpu", model.dtype, enabled=model.dtype != torch.float32):
            found = bound(model, texts, 32, settings.block_length)
        row |= {name: found[name] for name in ("bound", "bound_error")}
    if cfg.judge:
        judge = quality.open_twin("judge", cfg.judge, content)
        texts = quality.draw(model, replace(settings, temperature=cfg.temperature), cfg.texts, seed=1)
        nats = quality.mean("nats", quality.ask(judge, "nll", 32, texts).mean(1))
        row |= dict(nats, perplexity=math.exp(nats["nats"]), entropy=quality.entropy(texts).mean().item())
    return row


def describe(row, first):
    """A row of the table as a line; first is that of float32."""
    text = "{row:18} {mb:8.1f} MB  peak {peak_gb:.2f} GB  {seconds:6.2f} s a text".format(**row)
    if "bound" in row:
        change = 100 * (row["bound"] / first["bound"] - 1)
        text += f"  bound {row['bound']:.4f} +- {row['bound_error']:.3f} ({change:+.2f} %)"
    if "perplexity" in row:
        text += f"  perplexity {row['perplexity']:.1f}  entropy {row['entropy']:.2f}"
    return text


def main(cfg):
    if cfg.row:
        print(json.dumps(measure(cfg)))
        return
    table = []
    for row in ROWS:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--row={row}"], text=True, capture_output=True)
        if done.returncode:
            raise Fault(f"{row}: {done.stderr.strip()}")
        table.append(json.loads(done.stdout.splitlines()[-1]))
        print(describe(table[-1], table[0]))
    if cfg.out:
        Path(cfg.out).write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    run(main, Config)
