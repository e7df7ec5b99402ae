"""The yardsticks: the causal twin sees the past only, and the bound of a checkpoint is printed and written."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SIZE, call

import configurator

sys.path.insert(0, str(ROOT / "bench"))

import ablate           # noqa: E402
import diffusion        # noqa: E402
import infill           # noqa: E402
import instruct         # noqa: E402
import model            # noqa: E402
import prepare          # noqa: E402
import speed            # noqa: E402
import train            # noqa: E402
import twins            # noqa: E402


CFG = configurator.ModelConfig(n_layer=2, n_head=2, n_embd=32, token_dim=16, block_size=12, prompt_size=6)


def make_twin(kind):
    torch.manual_seed(0)
    log_p = torch.randn(50).log_softmax(0)
    return twins.Twin(CFG, 50, log_p, kind), log_p


def test_the_autoregressive_twin_sees_the_past_only_and_starts_as_a_unigram_model():
    twin, log_p = make_twin("autoregressive")
    idx = torch.randint(50, (2, 12))
    assert torch.allclose(twin.nll(idx), -log_p[idx], atol=1e-5)
    torch.nn.init.normal_(twin.net.head.weight)
    twin(idx, *twin.hide(idx.shape)).mean().backward()
    assert all(p.grad.norm() < 1e3 for p in twin.parameters() if p.grad is not None)
    other = idx.clone()
    other[:, 7] = (idx[:, 7] + 1) % 50
    change = (twin.nll(idx) - twin.nll(other)).abs()
    assert change[:, :7].max() == 0 and (change[:, 8:] > 0).any(1).all()
    assert torch.equal(twin.nll(idx), diffusion.ce_loss(twin.predict(idx, torch.zeros_like(idx).bool()), idx))


def test_the_masked_twin_sees_what_is_not_hidden():
    twin, _ = make_twin("masked")
    torch.nn.init.normal_(twin.net.head.weight)
    idx, blank = torch.randint(50, (2, 12)), torch.zeros(2, 12, dtype=torch.bool)
    blank[:, 3:6] = True
    for i in range(12):
        other = idx.clone()
        other[:, i] = (idx[:, i] + 1) % 50
        change = (twin.predict(idx, blank) - twin.predict(other, blank)).abs().max()
        assert (change > 1e-4) == (not blank[0, i]), i


def test_the_masked_twin_in_streams_knows_earlier_turns_only():
    twin, log_p = make_twin("masked")
    idx = torch.randint(50, (2, 12))
    assert torch.allclose(twin.nll_in_streams(idx, 3), -log_p[idx], atol=1e-5)
    assert twin.sample(5, 12, 0, in_streams=4).shape == (5, 12)
    torch.nn.init.normal_(twin.net.head.weight)
    other, turn = idx.clone(), diffusion.streams(torch.ones(12, dtype=torch.bool), 3)
    other[:, 6] = (idx[:, 6] + 1) % 50
    change = (twin.nll_in_streams(idx, 3) - twin.nll_in_streams(other, 3)).abs().amax(0)
    change[6] = 0
    assert torch.equal(change > 1e-4, turn > turn[6])


def test_the_bound_of_the_masked_twin_on_independent_tokens_is_their_entropy():
    twin, log_p = make_twin("masked")
    rng = torch.Generator().manual_seed(5)
    idx = torch.multinomial(log_p.exp(), 4000 * 12, replacement=True, generator=rng).view(4000, 12)
    bound, error = twins.evaluate(twin, idx, SimpleNamespace(batch_size=500))
    assert error < 0.03 and abs(bound + log_p[idx].mean()) < 4 * error
    blank, weight = twin.hide((6000, 12), rng)
    assert (torch.bincount(blank.sum(1), minlength=13)[1:] / 500 - 1).abs().max() < 0.01
    assert torch.allclose(weight[blank], (12 / blank.sum(1, keepdim=True)).expand(-1, 12)[blank])


def test_the_twins_draw_from_what_they_say():
    """Untrained they say the unigram distribution, of each token; the masked one has all written at its last step."""
    for kind, steps in (("autoregressive", 0), ("masked", 3), ("masked", 40)):
        twin, log_p = make_twin(kind)
        with torch.no_grad():
            text = twin.sample(3000, 12, steps, rng=torch.Generator().manual_seed(1))
            sharp = twin.sample(20, 12, steps, temperature=0.01, rng=torch.Generator().manual_seed(1))
        assert (torch.bincount(text.flatten(), minlength=50) / text.numel() - log_p.exp()).abs().max() < 0.01, kind
        assert (sharp == log_p.argmax()).all()


@pytest.mark.parametrize("kind", twins.KINDS)
def test_a_twin_is_trained_saved_and_loaded(kind, shards, tmp_path):
    args = ["twins.py", *SIZE, f"--kind={kind}", "--max_steps=60", "--learning_rate=1e-2", "--eval_interval=30", "--eval_sequences=64",
            f"--dataset={shards}", f"--out_dir={tmp_path / 'twin'}"]
    call(args)
    rows = [json.loads(line) for line in open(tmp_path / "twin" / "log.jsonl")]
    assert [row["step"] for row in rows] == [30, 60] and rows[1]["bound"] < rows[0]["bound"] - 0.02
    twin, content = twins.load_twin(tmp_path / "twin")
    windows = train.open_data(configurator.load(train.Config, [*SIZE, f"--dataset={shards}"]))[2]
    assert twins.evaluate(twin, train.eval_windows(windows, 64), SimpleNamespace(batch_size=4))[0] == pytest.approx(rows[1]["bound"], abs=1e-4)
    assert content["kind"] == kind and twin.features(windows[0][0][None]).shape == (1, 32)
    assert "already holds a twin" in call(args, code=2).stderr
    with pytest.raises(ValueError, match="holds no twin"):
        twins.load_twin(tmp_path / "nowhere")


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


def test_ablations_are_measured_on_the_same_windows_and_not_made_twice(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "SIZE", {**ablate.SIZE, "n_embd": 32, "token_dim": 16, "batch_tokens": 256, "batch_size": 4})
    args = ["ablate.py", f"--dataset={shards}", f"--out={tmp_path}", "--steps=2", "--sequences=4", "--spans=1,0", "--only=seed=2"]
    call(args)
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["name"] for row in table] == ["default", "seed=2"]
    found = model.find_checkpoint(tmp_path / "default_2")[1]
    assert found["config"]["seed"] == 1 and model.find_checkpoint(tmp_path / "seed=2_2")[1]["config"]["seed"] == 2
    idx = train.eval_windows(train.Windows(shards, "val", model.model_config(found), 300), 4)
    whole = train.measure(model.load_model(found), idx, 4, 0)
    assert table[0]["bounds"]["0"] == pytest.approx([whole["bound"], whole["bound_error"]])
    monkeypatch.setattr(ablate.subprocess, "run", None)
    call(args)
    for wrong, words in (("--spans=x", "spans=x is not a list"), ("--only=x", "names no variant"), ("--sequences=1", "at least 2")):
        assert words in call([*args, wrong], code=2).stderr


def test_speed_puts_each_figure_beside_its_floor(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text("""
import torch
class GPTConfig:
    def __init__(self, **settings): self.__dict__.update(settings)
class GPT(torch.nn.Linear):
    def __init__(self, cfg): super().__init__(1, cfg.vocab_size)
    def get_num_params(self): return 1000
    def configure_optimizers(self, *_): return torch.optim.AdamW(self.parameters())
    def forward(self, idx, targets): return None, self.weight.square().mean()
""")
    out = call(["speed.py", "--shapes=tiny", "--parts=train,sample,profile", "--vocab_size=300", "--batch_size=2", "--repeats=1",
                "--tokens=16", "--steps=2", "--compile=false", f"--peer={tmp_path}", f"--out={tmp_path}"]).stdout
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    step, nanogpt, guided, plain, *_ = rows
    assert "nanoGPT" in nanogpt["what"] and "step of 2 x 64" in step["what"] and "guided" in guided["what"] and "guided" not in plain["what"]
    for row in (step, nanogpt, guided, plain):
        assert row["seconds"] > row["floor"] > 0 and row["ratio"] == pytest.approx(row["seconds"] / row["floor"])
    assert sum(share for share in rows[-1].values() if isinstance(share, float)) == pytest.approx(1)
    assert rows[-1]["matrix products"] > 0.1 and "where a step's time goes" in out


@pytest.mark.parametrize("args, word", [(["--shapes=huge"], "full, micro"), (["--parts=walk"], "walk is unknown"),
                                        (["--peer=/nowhere"], "clone github.com/karpathy/nanoGPT"), (["--repeats=0"], "must be positive")])
def test_speed_refuses_wrong_settings(args, word):
    assert word in call(["speed.py", *args], code=2).stderr


def test_the_floor_of_a_sampling_call_is_its_matrix_products(small):
    from test_train import CountFlops, SDPBackend, sdpa_kernel
    prompt, x = torch.zeros(2, 6, dtype=torch.int64), torch.randn(1, 12, 16)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), CountFlops() as count:
        level, E = torch.zeros(1, 12), small.embedding()
        h, _ = small.hidden(small.posterior_mean(x, level, E), level, x, prompt, prompt == 0, None, E).chunk(2)
        diffusion.read_logits(E)(small.answer(small.features(h, x, level), *small.readout(E)), None, None)
    keys = 2 * 2 * (2 * 2 * 32 * 32 * 7 + 6 * 16 * 32)              # of the prompt, once a text; in two blocks of two branches
    assert count.total - keys == pytest.approx(speed.call_flops(small.cfg, 50, 12, 2), rel=0.02)


# ---- what is made of a network: answers, int8, blanks ----

@pytest.fixture(scope="module")
def judge(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    call(["twins.py", *SIZE, "--kind=autoregressive", "--block_size=64", "--max_steps=2", f"--dataset={shards}", f"--out_dir={folder / 'twin'}"])
    return folder / "twin"


@pytest.fixture(scope="module")
def roomy(shards, tmp_path_factory):
    """A run with windows that blanks of twelve tokens leave something of."""
    folder = tmp_path_factory.mktemp("roomy") / "run"
    call(["train.py", *SIZE, "--block_size=32", f"--dataset={shards}", "--max_steps=20", f"--out_dir={folder}"])
    return folder


def test_every_rule_for_the_length_of_a_blank_is_rated(roomy, judge, shards, tmp_path):
    windows = torch.arange(8 * 32).view(8, 32)
    true, left, right = infill.cut(windows, 12)
    assert left.shape == right.shape == (8, 10) and ((right[:, 0] - left[:, -1] - 1) == true).all() and true.min() >= 1 and true.max() <= 12
    out = call(["infill.py", f"--checkpoint={roomy}", f"--dataset={shards}", f"--judge={judge}", "--windows=12", f"--out={tmp_path / 'table.json'}"]).stdout
    rows = {row["rule"]: row for row in json.loads((tmp_path / "table.json").read_text())}
    assert rows["the true length"]["exact"] == 1 and rows["the true length"]["off"] == 0 and rows["always 4"]["length"] == 4
    assert len(rows) == 9 and "behind (sample.py)" in out and all(1 <= row["length"] <= 12 for row in rows.values())
    assert "name a network" in call(["infill.py"], code=2).stderr and "no checkpoint" in call(
        ["infill.py", "--checkpoint=nowhere", f"--judge={judge}"], code=2).stderr


def test_int8_is_measured_beside_what_it_was_made_from(roomy, judge, shards):
    rows = [json.loads(call(["quantize.py", f"--checkpoint={roomy}", f"--dataset={shards}", f"--judge={judge}", "--sequences=8", "--texts=4",
                             f"--row={row}"]).stdout) for row in ("float32", "float32 int8")]
    assert rows[1]["mb"] < 0.6 * rows[0]["mb"] and all(row["seconds"] > 0 and row["perplexity"] > 1 for row in rows)
    assert 0 < abs(rows[1]["bound"] / rows[0]["bound"] - 1) < 0.01


def test_responses_are_measured_with_their_instruction_and_with_another(base, pairs, tmp_path):
    args = ["train.py", *SIZE, "--block_size=32", "--prompt_size=16", "--batch_tokens=256", f"--dataset={pairs}", f"--init_from={base}", "--max_steps=2"]
    call([*args, "--lora_rank=2", f"--out_dir={tmp_path / 'lora'}"])
    out = call(["instruct.py", f"--networks={base},{tmp_path / 'lora'}", f"--dataset={pairs}", "--answers=2", "--examples=9",
                f"--out={tmp_path / 'table.json'}"]).stdout
    found = json.loads((tmp_path / "table.json").read_text())
    assert [row["network"] for row in found["rows"]] == [str(base), str(tmp_path / "lora")] and len(found["answers"]) == 2
    assert all(row["right"][0] > 0 < row["shuffled"][0] != row["right"][0] and row["step_ms"] > 0 for row in found["rows"]) and "(truth: " in out
    val = train.Examples(pairs, "val", configurator.load(train.Config, [*SIZE, "--block_size=32", "--prompt_size=16"]), 300)
    right, wrong = instruct.pair_up(val, 9), instruct.pair_up(val, 9, 1)
    for a, b in zip(right, wrong, strict=True):
        assert a.idx[a.begun:a.end].tolist() == b.idx[b.begun:b.end].tolist() and a.idx[:a.begun].tolist() != b.idx[:b.begun].tolist()
    assert "nothing to measure" in call(["instruct.py"], code=2).stderr and "no checkpoint at nowhere" in call(["instruct.py", "--networks=nowhere"], code=2).stderr
