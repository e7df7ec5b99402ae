"""The yardsticks: the causal twin sees the past only, and the bound of a checkpoint is printed and written."""
import json
import sys

import pytest
import torch
from conftest import ROOT, call

import configurator

sys.path.insert(0, str(ROOT / "bench"))

import causal           # noqa: E402
import prepare          # noqa: E402


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


def test_prepare_is_measured_beside_tiktoken_alone(tmp_path, monkeypatch):
    try:
        tokenizer = prepare.pf.get_tokenizer({"name": "gpt2"})
    except SystemExit:
        pytest.skip("GPT-2's vocabulary is neither cached nor can it be downloaded")
    monkeypatch.setattr(prepare.pf, "get_tokenizer", prepare.pf.get_tokenizer)          # put back afterwards
    texts = [f"{i} small dogs went home over the old sea, and then the boat went too. " * 20 for i in range(60)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = call(["prepare.py", f"--source={tmp_path / 't.jsonl'}", "--documents=25", "--workers=1", "--repeats=2",
                f"--out={tmp_path / 'row.json'}"]).stdout
    row = json.loads((tmp_path / "row.json").read_text())
    expected = [len(tokenizer.encode_ordinary(text)) + 1 for text in texts[:50]]
    assert [part["tokens"] for part in row["rows"]] == [sum(expected[:25]), sum(expected[25:])]
    assert "median of 2" in out and 0.03 < row["peak_gb"] < 2 and row["ratio"] > 0 and row["rest_ns"] > 0
    assert call(["prepare.py", "--source=nowhere.txt"], code=2).stderr.startswith("error: source=nowhere.txt")
