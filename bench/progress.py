"""
What a run learns: the bound and samples at several block lengths, of each checkpoint that it kept (--keep_interval).

    python bench/progress.py --run=out/simple --text=held_out.jsonl --out=progress.png

The figures are kept beside the picture, in progress.json, and only new checkpoints are measured.
"""
import json
import math
import sys
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint as ckpt
from configurator import UserError, in_range, run
from data import write_file
from generate import bound
from quality import numbers, plain, read_windows, shuffled
from sample import Writer

NAMES = {0: "the whole window", 1: "token by token"}


@dataclass(frozen=True)
class Config:
    run: str = "out/simple"          # folder of the run
    text: str = ""                   # held-out text: .txt, or .jsonl with "text"
    block_length: str = "1,8,16,0"   # comma list
    sequences: int = 256             # windows for a bound
    prompt: str = ""                 # of the samples
    seq_len: int = 24                # tokens of a sample
    temperature: float = 0.8
    out: str = "progress.png"        # picture: .png, .svg, .pdf

    def check(self):
        in_range(self, 2, 1e6, "sequences")
        if not all(0 <= n <= 1e6 for n in numbers(self.block_length, int) or [math.nan]):
            raise UserError(f"block_length={self.block_length} is not a list of whole numbers; write for example "
                            f"{Config.block_length}")
        if not Path(self.text).is_file():
            raise UserError(f"text={self.text} is no file; name held-out text")


def measure(cfg, path):
    """The row of a checkpoint: its step and tokens, and of each block length the bound, its error and a sample."""
    content = ckpt.read_network(path)
    writer = Writer(path, content, ckpt.load_model(content))
    size = writer.model.cfg.block_size
    texts = plain(shuffled(read_windows(cfg.text, writer.tokenizer, size), 1)[:cfg.sequences])
    row = dict(step=content["step"], tokens=content["step"] * content["config"]["batch_tokens"], lengths={})
    for length in numbers(cfg.block_length, int):
        found = bound(writer.model, texts, 32, length)
        how = dict(seq_len=cfg.seq_len, temperature=cfg.temperature, seed=1)
        sample = writer.generate(cfg.prompt, block_length=length, **how)
        row["lengths"][str(length)] = found["bound"], found["bound_error"], " ".join(sample.split())
        print(f"step {row['step']:,}, {NAMES.get(length, f'blocks of {length}')}: {found['bound']:.3f} +- "
              f"{found['bound_error']:.3f} nats a token: {row['lengths'][str(length)][2]}", flush=True)
    return row


def draw(cfg, rows):
    """Write the picture: the bounds, and the samples of the longest block that is not the window."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 1.5 + 0.45 * max(6, len(rows))), layout="constrained")
    lengths = numbers(cfg.block_length, int)
    for length in lengths:
        found = [row["lengths"][str(length)][:2] for row in rows]
        left.errorbar([row["tokens"] / 1e6 for row in rows], *zip(*found, strict=True), marker="o", capsize=3,
                      label=NAMES.get(length, f"blocks of {length}"))
    left.set(title="bound, nats a token", xlabel="million tokens trained on")
    left.legend(frameon=False)
    left.grid(alpha=0.3)
    shown = max(lengths)
    samples = [textwrap.fill(row["lengths"][str(shown)][2], 70, subsequent_indent=7 * " ") for row in rows]
    lines = [f"{row['tokens'] / 1e6:4.1f}M  {sample}" for row, sample in zip(rows, samples, strict=True)]
    right.text(0, 1, "\n".join(lines), va="top", family="monospace", fontsize=8, transform=right.transAxes)
    right.set_title(f"samples, blocks of {shown}, read and revised")
    right.axis("off")
    figure.savefig(cfg.out, dpi=110)
    plt.close(figure)


def main(cfg):
    paths = sorted(Path(cfg.run).glob(ckpt.CKPT))
    kept = Path(cfg.out).with_suffix(".json")
    what = {name: Path(value).name if name in ("run", "text") else value for name, value in asdict(cfg).items()}
    del what["out"]
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    if found and found["settings"] != what:
        raise UserError(f"{kept} holds figures of other settings; choose another --out, or delete it")
    rows = {row["step"]: row for row in found.get("rows", [])}
    for path in paths:
        step = int(path.stem.split("_")[1])
        if step not in rows:
            rows[step] = measure(cfg, path)
            found = dict(settings=what, rows=[rows[step] for step in sorted(rows)])
            write_file(kept, (json.dumps(found, indent=1) + "\n").encode())
    if not rows:
        raise UserError(f"run={cfg.run} has no checkpoints; name the out_dir of a run")
    draw(cfg, [rows[step] for step in sorted(rows)])
    print(f"{cfg.out}: {len(rows)} checkpoints")


if __name__ == "__main__":
    run(main, Config)
