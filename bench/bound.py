"""
How much of a text a checkpoint explains: its likelihood bound in nats a token, beside a unigram model's.

    python bench/bound.py --checkpoint=out/stories --text=stories_val.jsonl --sequences=4096

The bound (two passes of self-conditioning, averaged weights, no prompt, stratified noise levels) is an upper bound on
the text's negative log-likelihood; the training loss is not. The curve shows where along the noise context helps.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import fail, load        # noqa: E402


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out"          # file, or folder of a run: its newest
    text: str = ""                   # .jsonl (key text) or .txt to measure on; must not have been trained on
    sequences: int = 4096            # windows measured, each at one noise level; the text repeats if it is shorter
    batch_size: int = 32             # windows at a time
    out: str = ""                    # also write the numbers here, as JSON


if __name__ == "__main__":
    CFG = load(Config)

import torch        # noqa: E402

import train
from model import find_checkpoint, keep_memory, load_model
from prepare_fineweb import get_tokenizer


def read_windows(path, encoding, block_size):
    """The text, each document behind an end-of-text, cut to windows (N, block_size), the rest dropped."""
    text = Path(path).read_text(encoding="utf-8")
    documents = [json.loads(line)["text"] for line in text.splitlines()] if path.endswith("l") else [text]
    ids = [i for document in documents for i in (encoding.eot_token, *encoding.encode_ordinary(document))]
    if len(ids) < block_size:
        fail(f"{path} has {len(ids)} tokens, less than a window of {block_size}; give it more text")
    return torch.tensor(ids[:len(ids) // block_size * block_size]).view(-1, block_size)


def main(cfg):
    keep_memory()
    found = find_checkpoint(cfg.checkpoint)
    if found is None or not Path(cfg.text).is_file():
        fail(f"checkpoint={cfg.checkpoint} or text={cfg.text!r} is not there; train one, and name a .jsonl or .txt file")
    path, checkpoint = found
    model = load_model(checkpoint)
    windows = read_windows(cfg.text, get_tokenizer(checkpoint["data"]["tokenizer"]), model.cfg.block_size)
    idx = windows[torch.arange(cfg.sequences) * len(windows) // cfg.sequences]
    row = {"unigram": -model.log_unigram[windows].mean().item(), "windows": len(windows), "pairs": cfg.sequences,
           **train.measure(model, idx, cfg.batch_size, bands=16, curve=256)}
    print(f"{path}, step {checkpoint['step']:,}, on {row['windows']:,} windows of {cfg.text}, {row['pairs']:,} pairs")
    print("bound {bound:.3f} +- {bound_error:.3f} nats a token = reconstruction {reconstruction:.4f} + diffusion "
          "{diffusion:.3f} + prior {prior:.4f}; unigram cross-entropy {unigram:.3f}".format(**row))
    print("cross-entropy by noise:   t   network   context-free posterior")
    for t, network, free in row["ce_by_noise"]:
        print(f"{t:27d} {network:9.3f} {free:9.3f}")
    if cfg.out:
        Path(cfg.out).write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(CFG)
