"""
What int8 weights cost and save: bytes, peak memory, seconds, bound, and the judge's opinion of the texts.

    python bench/quantize.py --checkpoint=out/stories --dataset=stories --judge=out/causal

Each row is a process of its own, so that its peak is its own; it samples first, and is measured then. The judge is an autoregressive
twin (bench/twins.py). All rows have the same windows, noise and seeds.
"""
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import fail, load        # noqa: E402

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
        if min(self.sequences, self.texts) < 2:
            raise ValueError(f"sequences={self.sequences} and texts={self.texts} must be 2 at least")
        if self.row and self.row not in ROWS:
            raise ValueError(f"row={self.row} is unknown; use one of {', '.join(ROWS)}")


if __name__ == "__main__":
    CFG = load(Config)

import math                                # noqa: E402
import time

import torch

import quality
import sample
import train
from model import keep_memory, load_model, peak_gb


def held(net):
    """Bytes of a network's tensors."""
    return sum(x.nbytes for x in (*net.parameters(), *net.buffers()))


def open_network(content, row):
    """The network of a checkpoint's content, in the way that a row names."""
    dtype, _, int8 = row.partition(" ")
    return load_model(content, "cpu", getattr(torch, dtype), bool(int8))


def measure(cfg):
    """One row: megabytes, peak, seconds for a text, bound, and perplexity and entropy of texts."""
    keep_memory()
    torch.set_num_threads(1)
    content = quality.open_network(cfg.checkpoint)
    model = open_network(content, cfg.row)
    T = cfg.seq_len or model.cfg.block_size
    canvas = torch.zeros(T, dtype=torch.int64), torch.zeros(T, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    seconds = []
    for _ in range(3):
        clock = time.perf_counter()
        sample.sample(model, sample.Config(), canvas, [0])
        seconds.append(time.perf_counter() - clock)
    row = dict(row=cfg.row, mb=held(model) / 1e6, peak_gb=peak_gb(torch.device("cpu")), seconds=min(seconds))
    if cfg.dataset:
        val = quality.open_val(cfg.dataset, content, model.cfg)
        with torch.autocast("cpu", model.dtype, enabled=model.dtype != torch.float32):
            found = train.measure(model, train.eval_windows(val, cfg.sequences), 32, bands=0)
        row |= {name: found[name] for name in ("bound", "bound_error")}
    if cfg.judge:
        judge = quality.open_twin("judge", cfg.judge, content, "cpu")
        texts = quality.draw(model, cfg.texts, 0, -1, cfg.temperature, 1.0, 1)
        nats = quality.in_batches(judge.nll, 32, "cpu", texts).mean(1)
        row |= dict(perplexity=math.exp(nats.mean().item()), nats_error=(nats.std() / len(nats) ** 0.5).item(), entropy=quality.entropy(texts).mean().item())
    return row


def main(cfg):
    if cfg.row:
        return print(json.dumps(measure(cfg)))
    table = []
    for row in ROWS:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--row={row}"], text=True, capture_output=True)
        if done.returncode:
            fail(f"{row}: {done.stderr.strip()}", done.returncode)
        found = json.loads(done.stdout.splitlines()[-1])
        table.append(found)
        change = f" ({100 * (found['bound'] / table[0]['bound'] - 1):+.2f} %)" if "bound" in found else ""
        print(f"{row:18} {found['mb']:8.1f} MB  peak {found['peak_gb']:.2f} GB  {found['seconds']:6.2f} s a text"
              + (f"  bound {found['bound']:.4f} +- {found['bound_error']:.3f}{change}" if change else "")
              + (f"  perplexity {found['perplexity']:.1f}  entropy {found['entropy']:.2f}" if "perplexity" in found else ""), flush=True)
    if cfg.out:
        Path(cfg.out).write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(CFG)
