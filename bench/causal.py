"""
The causal twin: an autoregressive model from the same blocks, on the same windows, as a yardstick for the bound.

    python bench/causal.py config/stories.py --out_dir=out/causal

Same table, width, layers, optimizer and data order as train.py; attention and convolution see only the past, there is
no noise, no prompt and no self-conditioning, and the loss is the exact negative log-likelihood in nats a token.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train                                # noqa: E402
from configurator import load               # noqa: E402


@dataclass(frozen=True)
class Config(train.Config):
    out_dir: str = "out/causal"          # log.jsonl goes here


import json                                 # noqa: E402
import math
import time
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import KERNEL, Block, SunFish, keep_memory, norm


class Causal(nn.Module):
    """An Attention that sees the past only."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, context, x_pos, context_pos, mask=None):
        return self.attention(x, context, x_pos, context_pos, x_pos[:, None] >= context_pos)


class CausalBlock(Block):
    def __init__(self, cfg):
        super().__init__(cfg, cross=False)
        self.attn = Causal(self.attn)

    def mix(self, x):
        pad = F.pad(x, (0, 0, KERNEL - 1, 0))
        return sum(pad[:, i:i + x.size(1)] * self.local[i] for i in range(KERNEL))


class Twin(nn.Module):
    """idx (B, T) -> nats a token (B, T), the first token of a window from nothing."""

    def __init__(self, cfg, vocab_size, log_unigram):
        super().__init__()
        self.net = SunFish(cfg, vocab_size, log_unigram)
        blocks = nn.ModuleList(CausalBlock(cfg) for _ in self.net.blocks)
        for new, old in zip(blocks, self.net.blocks, strict=True):
            own = {k.replace("attn.", "attn.attention."): v for k, v in old.state_dict().items() if "cross" not in k}
            new.load_state_dict(own)
        self.net.blocks = blocks

    def forward(self, idx):
        net, table = self.net, self.net.embedding()
        before = table[idx[:, :-1]]
        x = net.read(torch.cat((before, torch.zeros_like(before)), -1)).float()
        x = torch.cat((net.null.expand(len(idx), 1, -1), x), 1)         # a learned vector stands before the window
        pos, noise = torch.arange(idx.size(1), device=idx.device), net.time_out.bias.to(x.dtype)
        for block in net.blocks:
            x = block(x, noise, pos, None, None, None)
        h = net.write(norm(x)).float() / math.sqrt(net.cfg.token_dim)
        with torch.autocast(idx.device.type, enabled=False):
            logits = h @ table.T + net.log_unigram + net.bias
        return F.cross_entropy(logits.flatten(0, 1), idx.flatten(), reduction="none").view_as(idx)


def main(cfg):
    keep_memory()
    device, dtype, compiled = train.choose_machine(cfg)
    data, windows, val_windows = train.open_data(cfg)
    torch.manual_seed(cfg.seed)
    twin = Twin(cfg, data["vocab_size"], windows.unigram()).to(device)
    optimizer = train.make_optimizer(twin.net, cfg)
    model = torch.compile(twin) if compiled else twin
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    val = train.eval_windows(val_windows, 1024).to(device)
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    log, clock = open(Path(cfg.out_dir) / "log.jsonl", "a", buffering=1), time.perf_counter()
    for step in range(cfg.max_steps):
        train.set_learning_rate(optimizer, cfg, step)
        batch = train.make_batch(cfg, windows, step, range(cfg.samples), device)
        with autocast():
            loss = model(batch.idx).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), cfg.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % cfg.eval_interval == 0 or step + 1 == cfg.max_steps:
            with torch.no_grad(), autocast():
                nll = torch.cat([twin(part) for part in val.split(cfg.samples)])
            row = dict(step=step + 1, tokens=(step + 1) * cfg.batch_tokens, loss=loss.item(), val_nll=nll.mean().item(),
                       val_error=(nll.mean(1).std() / len(nll) ** 0.5).item(), seconds=time.perf_counter() - clock)
            print("step {step} {tokens:,} tokens: loss {loss:.3f}, validation {val_nll:.3f} +- {val_error:.3f} nats a "
                  "token, {seconds:.0f} s".format(**row), flush=True)
            log.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(load(Config))
