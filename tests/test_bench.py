"""The yardsticks: the causal twin sees the past only, and the bound of a checkpoint is printed and written."""
import json
import sys

import pytest
import torch
from conftest import ROOT, call

import configurator

sys.path.insert(0, str(ROOT / "bench"))

import causal           # noqa: E402


def test_the_causal_twin_sees_the_past_only_and_starts_as_a_unigram_model():
    cfg = configurator.ModelConfig(n_layer=2, n_head=2, n_embd=32, token_dim=16, block_size=12, prompt_size=6)
    torch.manual_seed(0)
    log_p = torch.randn(50).log_softmax(0)
    twin = causal.Twin(cfg, 50, log_p)
    idx = torch.randint(50, (2, 12))
    assert torch.allclose(twin(idx), -log_p[idx], atol=1e-5)
    torch.nn.init.normal_(twin.net.write.weight)
    twin(idx).mean().backward()
    assert all(p.grad.norm() < 1e3 for p in twin.parameters() if p.grad is not None)
    other = idx.clone()
    other[:, 7] = (idx[:, 7] + 1) % 50
    change = (twin(idx) - twin(other)).abs()
    assert change[:, :7].max() == 0 and (change[:, 8:] > 0).any(1).all()


def test_the_bound_of_a_checkpoint_on_a_text(shards, tmp_path):
    call(["train.py", "--n_layer=1", "--n_head=2", "--n_embd=32", "--token_dim=16", "--block_size=16", "--prompt_size=8",
          "--batch_size=4", "--batch_tokens=64", "--eval_interval=0", "--eval_sequences=8", "--device=cpu", "--max_steps=1",
          f"--dataset={shards}", f"--out_dir={tmp_path / 'run'}"])
    (tmp_path / "text.txt").write_text("the small dog went home and then the boat went home. " * 40)
    out = call(["bound.py", f"--checkpoint={tmp_path / 'run'}", f"--text={tmp_path / 'text.txt'}", "--sequences=64",
                f"--out={tmp_path / 'row.json'}"]).stdout
    row = json.loads((tmp_path / "row.json").read_text())
    assert "unigram cross-entropy" in out and row["pairs"] == 64 and len(row["ce_by_noise"]) == 16
    assert row["bound"] == pytest.approx(row["reconstruction"] + row["diffusion"] + row["prior"])
    assert call(["bound.py", f"--checkpoint={tmp_path / 'none'}", "--text=x"], code=2).stderr.startswith("error: ")
