"""The yardsticks: what the twins see and say, FLOPs against counted products, and a small run of each bench."""
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import PAIRS, ROOT, SIZE, call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import checkpoint as ckpt
import configurator
import diffusion
import train
from data import Batch, Dataset, get_tokenizer
from generate import Canvas, Sampling, bound, generate, generators, plan
from model import ModelConfig, SunFish

sys.path.insert(0, str(ROOT / "bench"))

import ablate           # noqa: E402
import infill           # noqa: E402
import instruct         # noqa: E402
import prepare          # noqa: E402
import quality          # noqa: E402
import speed            # noqa: E402
import twins            # noqa: E402

CFG = ModelConfig(n_layer=2, n_head=2, n_embd=32, token_dim=16, block_size=12, prompt_size=6)


def config(*args):
    return configurator.load(train.Config, [*SIZE, *args])


def make_twin(kind, awake=False):
    """A twin over 50 ids and its unigram log p; untrained it says these, unless it is awake."""
    torch.manual_seed(0)
    log_p = torch.randn(50).log_softmax(0)
    twin = twins.Twin(CFG, 50, log_p, kind)
    if awake:
        torch.nn.init.normal_(twin.net.head.weight)
    return twin, log_p


# ---- the twins ----

def test_the_autoregressive_twin_sees_the_past_only_and_starts_as_a_unigram_model():
    twin, log_p = make_twin("autoregressive")
    idx = torch.randint(50, (2, 12))
    assert torch.allclose(twin.nll(idx), -log_p[idx], atol=1e-5)
    twin, _ = make_twin("autoregressive", awake=True)
    twin(idx, *twin.hide(idx * 0)).mean().backward()
    assert all(p.grad.norm() < 1e3 for p in twin.parameters() if p.grad is not None)
    other = idx.clone()
    other[:, 7] = (idx[:, 7] + 1) % 50
    change = (twin.nll(idx) - twin.nll(other)).abs()
    assert change[:, :7].max() == 0 and (change[:, 8:] > 0).any(1).all()
    scores = twin.predict(idx, torch.zeros_like(idx).bool())
    assert torch.equal(twin.nll(idx), F.cross_entropy(scores.transpose(1, 2), idx, reduction="none"))


def test_the_masked_twin_sees_what_is_not_hidden():
    twin, _ = make_twin("masked", awake=True)
    idx, blank = torch.randint(50, (2, 12)), torch.zeros(2, 12, dtype=torch.bool)
    blank[:, 3:6] = True
    for i in range(12):
        other = idx.clone()
        other[:, i] = (idx[:, i] + 1) % 50
        change = (twin.predict(idx, blank) - twin.predict(other, blank)).abs().max()
        assert (change > 1e-4) == (not blank[0, i]), i


@pytest.mark.parametrize("kind", ["masked", "blocks"])
@pytest.mark.parametrize("length, strided", [(1, False), (4, False), (4, True), (0, False)])
def test_the_masked_twins_know_earlier_blocks_and_some_of_their_own(kind, length, strided):
    twin, _ = make_twin(kind, awake=True)
    idx = torch.randint(50, (2, 12))
    other, order = idx.clone(), diffusion.block_order(torch.ones(12, dtype=torch.bool), length, strided)
    other[:, 6] = (idx[:, 6] + 1) % 50
    change = torch.zeros(12)
    for i in range(10):
        both = [twin.nll_in_blocks(x, length, strided, torch.Generator().manual_seed(i)) for x in (idx, other)]
        change += (both[0] - both[1]).abs().sum(0)
    assert (change[order < order[6]] == 0).all() and (change[order > order[6]] > 1e-4).all()
    inside = change[(order == order[6]) & (torch.arange(12) != 6)]
    assert len(inside) == {1: 0, 4: 3, 0: 11}[length] and (inside > 1e-4).all()


@pytest.mark.parametrize("kind", ["masked", "blocks"])
@pytest.mark.parametrize("length", [None, 1, 5, 0])
def test_the_bound_of_the_masked_twins_on_independent_tokens_is_their_entropy(kind, length):
    twin, log_p = make_twin(kind)
    rng = torch.Generator().manual_seed(5)
    idx = torch.multinomial(log_p.exp(), 600 * 12, replacement=True, generator=rng).view(600, 12)
    if length is None:
        nats, error = twins.evaluate(twin, idx, 500)
    else:
        found = quality.mean("nats", twin.nll_in_blocks(idx, length, rng=rng).mean(1))
        nats, error = found["nats"], found["nats_error"]
    assert error < 0.06 and abs(nats + log_p[idx].mean()) < 4 * error


def test_the_masked_twin_hides_every_number_of_tokens_equally_often():
    one_block = torch.zeros(6000, 12, dtype=torch.int64)
    blank, weight = make_twin("masked")[0].hide(one_block, torch.Generator().manual_seed(5))
    assert (torch.bincount(blank.sum(1), minlength=13)[1:] / 500 - 1).abs().max() < 0.01
    assert torch.allclose(weight[blank], (12 / blank.sum(1, keepdim=True)).expand(-1, 12)[blank])


def test_the_twin_of_blocks_hides_every_number_of_tokens_of_a_block_equally_often():
    """Of blocks of any size, given tokens too: they are a block, the first."""
    order = torch.tensor([-1, 0, 0, 0, 1, -1, 1, 1, 1, 2, 2, 3])
    blank, weight = make_twin("blocks")[0].hide(order.expand(6000, -1), torch.Generator().manual_seed(5))
    for block in order.unique():
        here = order == block
        n, k = int(here.sum()), blank[:, here].sum(1)
        assert (torch.bincount(k, minlength=n + 1)[1:] * n / 6000 - 1).abs().max() < 0.02 and k.min() == 1
        assert torch.allclose(weight[:, here], blank[:, here] * (n / k)[:, None])
        assert (blank[:, here].float().mean(0) - (n + 1) / 2 / n).abs().max() < 0.03


def test_the_twin_of_blocks_learns_from_all_blocks_at_once_what_one_after_the_other_says():
    """A block with the clean ones before it, in one pass of two streams, is what the same network says alone of it."""
    twin, _ = make_twin("blocks", awake=True)
    idx, order = torch.randint(50, (2, 12)), torch.arange(12).expand(2, -1) // 4
    blank, _ = twin.hide(order, torch.Generator().manual_seed(1))
    together = twin.predict(idx, blank, order)
    for block in range(3):
        later = torch.where(order > block, (idx + 1) % 50, idx)         # and hidden there: neither is seen
        alone = twin.predict(later, blank | (order > block), order)
        assert torch.allclose(alone[order == block], together[order == block], atol=1e-5)


def test_the_twins_draw_from_what_they_say():
    """Untrained they say the unigram distribution, of each token; the masked ones have all written at their last
    step."""
    for kind, steps, length in (("autoregressive", 0, 0), ("masked", 3, 0), ("blocks", 3, 4), ("blocks", 2, 0)):
        twin, log_p = make_twin(kind)
        with torch.no_grad():
            text = twin.sample(400, 12, steps, rng=torch.Generator().manual_seed(1), block_length=length)
            sharp = twin.sample(20, 12, steps, 0.01, torch.Generator().manual_seed(1), length)
        assert (torch.bincount(text.flatten(), minlength=50) / text.numel() - log_p.exp()).abs().max() < 0.02, kind
        assert (sharp == log_p.argmax()).all()


@torch.no_grad()
def test_the_twin_of_blocks_reads_a_block_and_writes_again_what_does_not_hold(monkeypatch):
    """What holds is what reading the network alone says, up to the first token that is rarer than usual, which
    is drawn anew; it stays."""
    twin, _ = make_twin("blocks", awake=True)
    read, unmask, seen = twin.read, twin.unmask, []

    def reading(idx, order, block, *how):
        before, place = idx.clone(), torch.arange(8)
        held = read(idx, order, block, *how)
        if block:                                           # the last block, read in one order of all
            in_order = place.where(place >= 4, -1).expand(len(idx), -1)
            log_p = twin.predict(before, idx > -1, in_order).log_softmax(-1)
            surprise = -log_p.gather(-1, before[..., None])[..., 0] + (log_p.exp() * log_p).sum(-1)
            want = (surprise[:, 4:] <= -math.log(0.1)).cummin(1).values
            first = torch.arange(4) == want.sum(1, keepdim=True)        # which is drawn anew
            assert torch.equal(held[:, 4:], want | first) and first.any() and not want.all()
            assert torch.equal(idx[:, 4:][~first], before[:, 4:][~first]) and not torch.equal(idx, before)
        seen.append((idx.clone(), held & (order == block)))
        return held

    def unmasking(idx, *rest):
        unmask(idx, *rest)
        if seen:
            before, held = seen[-1]
            assert torch.equal(idx[held], before[held]) and not torch.equal(idx, before)
            seen.clear()
    monkeypatch.setattr(twin, "read", reading)
    monkeypatch.setattr(twin, "unmask", unmasking)
    made = twin.sample(60, 8, 2, 3.0, torch.Generator().manual_seed(1), 4, revisions=2)
    assert made.shape == (60, 8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", twins.KINDS)
def test_a_twin_is_trained_saved_and_loaded(kind, shards, tmp_path):
    args = ["twins.py", *SIZE, f"--kind={kind}", "--max_steps=60", "--learning_rate=1e-2", "--eval_interval=30",
            "--eval_sequences=64", f"--dataset={shards}", f"--out_dir={tmp_path / 'twin'}"]
    call(args)
    rows = [json.loads(line) for line in open(tmp_path / "twin" / "log.jsonl")]
    assert [row["step"] for row in rows] == [30, 60] and rows[1]["bound"] < rows[0]["bound"] - 0.02
    twin, content = twins.load_twin(tmp_path / "twin")
    idx = Dataset(shards, "val", ckpt.model_config(content), 300).spread(64).idx
    assert twins.evaluate(twin, idx, 4, 8)[0] == pytest.approx(rows[1]["bound"], abs=1e-4)      # SIZE has blocks of 8
    assert content["kind"] == kind and twin.features(idx[:1]).shape == (1, 32)
    assert "already holds a twin" in call(args, code=2).stderr
    with pytest.raises(configurator.UserError, match="holds no twin"):
        twins.load_twin(tmp_path / "nowhere")


# ---- speed ----

class CountFlops(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        made = f(*args, **(kwargs or {}))
        if f.overloadpacket in flop_registry:
            self.total += flop_registry[f.overloadpacket](*args, **(kwargs or {}), out_val=made)
        return made


@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("args", [[], ["--p_single=0", "--p_window=1"], ["--cross_every=3", "--n_embd=128"],
                                  ["--objective=eps"], ["--prompt_table=gpt2"]])
def test_flops_are_those_of_the_matrix_products_of_a_step(args, guess):
    cfg = config("--n_layer=3", "--n_embd=64", "--token_dim=32", "--block_size=32", *args)
    order = None if cfg.p_window == 1 else torch.arange(32).expand(2, -1) // 4
    net, ids, prompt = SunFish(cfg, 300), torch.zeros(2, 32, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64)
    guess &= cfg.objective == "ce"                                      # eps has no first guess
    batch = Batch(ids, order, ids + 1, torch.randn(2, 32, 32), prompt, prompt == 0, ids == 0, guess, 64)
    with sdpa_kernel(SDPBackend.MATH), CountFlops() as count:           # attention as products that can be counted
        loss, fit = train.DiffusionLoss(net)(batch)
        (loss + fit).backward()
    assert speed.flops_per_token(net, order is not None, guess) == pytest.approx(count.total / 64, rel=0.015)


@pytest.mark.parametrize("length, guidance", [(1, 1.0), (1, 2.0), (4, 2.0), (4, 1.0), (0, 2.0)])
def test_the_floor_of_a_text_is_its_matrix_products(length, guidance):
    cfg = config("--n_layer=3", "--n_embd=64")
    canvas = Canvas(torch.zeros(16, dtype=torch.int64), torch.zeros(16).bool(), torch.zeros(8, dtype=torch.int64))
    settings = Sampling(block_length=length, guidance_scale=guidance, steps=3, revisions=0)
    branches = 1 + (guidance != 1)
    order, _, steps, _ = plan(settings, cfg, canvas.known)
    with sdpa_kernel(SDPBackend.MATH), CountFlops() as count:
        generate(SunFish(cfg, 50).eval(), canvas, settings, generators("cpu", 1, [0]))
    keys = 2 * branches * (2 * 64 * 64 * 9 + 8 * 16 * 64)               # of the prompt, once a text, and its vectors
    assert speed.text_flops(cfg, 50, order, steps, branches) == pytest.approx(count.total - keys, rel=0.06)


NANOGPT = """
import torch
class GPTConfig:
    def __init__(self, **settings): self.__dict__.update(settings)
class GPT(torch.nn.Linear):
    def __init__(self, cfg): super().__init__(1, cfg.vocab_size)
    def get_num_params(self): return 1000
    def configure_optimizers(self, *_): return torch.optim.AdamW(self.parameters())
    def forward(self, idx, targets): return None, self.weight.square().mean()
"""


@pytest.mark.slow
def test_speed_puts_each_figure_beside_its_floor(tmp_path):
    (tmp_path / "model.py").write_text(NANOGPT)
    out = call(["speed.py", "--shapes=tiny", "--parts=train,sample,profile", "--vocab_size=300", "--batch_size=2",
                "--repeats=1", "--tokens=16", "--compile=false", "--dtype=float32", f"--peer={tmp_path}",
                f"--out={tmp_path}"]).stdout
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    plain, guessed, nanogpt, *texts, shares = rows
    assert "step of 2 x 96" in plain["what"] and "first guess" in guessed["what"] and "nanoGPT" in nanogpt["what"]
    assert guessed["TFLOPs"] > 1.2 * plain["TFLOPs"] and len(texts) == 3 * len(speed.TEXTS)
    assert "block_length 8, 2 x 4 steps, guided" in texts[3]["what"] and "1 x 32 steps" in texts[6]["what"]
    for row in rows[:-1]:
        assert row["seconds"] > row["floor"] > 0 or row is nanogpt, row     # that one is a stub and does nothing
        assert row["ratio"] == pytest.approx(row["seconds"] / row["floor"])
    assert sum(share for share in shares.values() if isinstance(share, float)) == pytest.approx(1)
    assert shares["matrix products"] > 0.1 and "where a step's time goes" in out


@pytest.mark.parametrize("args, word", [(["--shapes=huge"], "full, micro"), (["--parts=walk"], "walk is unknown"),
                                        (["--peer=/nowhere"], "clone github.com/karpathy/nanoGPT"),
                                        (["--repeats=0"], "repeats=0 is out of range")])
def test_speed_refuses_wrong_settings(args, word):
    assert word in call(["speed.py", *args], code=2).stderr


@pytest.mark.slow
def test_prepare_is_measured_beside_tiktoken_alone(tmp_path, monkeypatch):
    try:
        tokenizer = get_tokenizer({"name": "gpt2"})
    except configurator.UserError:
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
    assert "source=nowhere.txt" in call(["prepare.py", "--source=nowhere.txt"], code=2).stderr


# ---- what a choice is worth ----

def test_the_settings_of_all_ablations_are_possible(tmp_path):
    for settings in ablate.VARIANTS.values():
        arguments = {**ablate.SIZE, **settings}
        configurator.load(train.Config, [f"--{name}={value}" for name, value in arguments.items()])
    for wrong, words in (("--block_length=x", "block_length=x is not a list"), ("--only=x", "names no variant"),
                         ("--sequences=1", "out of range")):
        assert words in call(["ablate.py", wrong], code=2).stderr


def run_here(command, **_):
    """As subprocess.run of a script, in this process."""
    call([command[1].name, *command[2:]])
    return SimpleNamespace(returncode=0)


@pytest.mark.slow
def test_ablations_are_measured_on_the_same_windows_and_not_made_twice(shards, tmp_path, monkeypatch):
    small = dict(n_embd=32, token_dim=16, batch_tokens=256, batch_size=4)
    monkeypatch.setattr(ablate, "SIZE", {**ablate.SIZE, **small})
    monkeypatch.setattr(ablate.subprocess, "run", run_here)
    args = ["ablate.py", f"--dataset={shards}", f"--out={tmp_path}", "--steps=2", "--sequences=4", "--only=seed=2",
            "--block_length=1,0", "--strided=8"]
    call(args)
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["name"] for row in table] == ["default", "seed=2"]
    assert list(table[0]["bounds"]) == ["1", "0", "8 strided", "1, prompted"]
    default, other = (ckpt.find(tmp_path / f"{name}_2")[1] for name in ("default", "seed=2"))
    assert default["config"]["seed"] == 1 and other["config"]["seed"] == 2
    idx = Dataset(shards, "val", ckpt.model_config(default), 300).spread(4).idx
    window = bound(ckpt.load_model(default), quality.plain(idx), 4, 0)
    assert table[0]["bounds"]["0"] == pytest.approx([window["bound"], window["bound_error"]])
    monkeypatch.setattr(ablate.subprocess, "run", None)
    call(args)


# ---- what is made of a network: answers, int8, blanks ----

@pytest.fixture(scope="module")
def judge(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "twin"
    call(["twins.py", *SIZE, "--block_size=64", "--max_steps=2", f"--dataset={shards}", f"--out_dir={folder}"])
    return folder


@pytest.fixture(scope="module")
def roomy(shards, tmp_path_factory):
    """A run with windows that blanks of twelve tokens leave something of."""
    folder = tmp_path_factory.mktemp("roomy") / "run"
    call(["train.py", *SIZE, "--block_size=32", f"--dataset={shards}", "--max_steps=20", f"--out_dir={folder}"])
    return folder


def test_a_blank_is_cut_out_of_the_middle_of_a_window():
    true, left, right = infill.cut(torch.arange(8 * 32).view(8, 32))
    assert left.shape == right.shape == (8, 10) and true.min() >= 1 and true.max() <= 12
    assert ((right[:, 0] - left[:, -1] - 1) == true).all()


def test_tokens_in_one_block_do_not_change_what_each_other_cost(small):
    """A fill of two tokens, the second after the first, and a fill at once."""
    tokens, other = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1)
    other = other.clone()
    other[:, 5] = (tokens[:, 5] + 1) % 50
    known = torch.full((12,), -1)
    for second, changes in ((1, True), (0, False)):
        order = known.clone()
        order[5], order[6] = 0, second
        costs = [infill.nll_in_order(small, text, order)[:, 6] for text in (tokens, other)]
        assert torch.equal(*costs) != changes


@pytest.mark.slow
def test_every_rule_for_the_length_of_a_blank_is_rated(roomy, judge, shards, tmp_path):
    out = call(["infill.py", f"--checkpoint={roomy}", f"--dataset={shards}", f"--judge={judge}", "--windows=12",
                f"--out={tmp_path / 'table.json'}"]).stdout
    rows = {row["rule"]: row for row in json.loads((tmp_path / "table.json").read_text())}
    truth = rows["the true length"]
    assert truth["exact"] == 1 and truth["off"] == 0 and rows["always 4"]["length"] == 4
    assert len(rows) == 9 and "behind (sample.py)" in out and all(1 <= row["length"] <= 12 for row in rows.values())
    assert "name a network" in call(["infill.py"], code=2).stderr
    nowhere = call(["infill.py", "--checkpoint=nowhere", f"--judge={judge}"], code=2)
    assert "no checkpoint at nowhere" in nowhere.stderr


@pytest.mark.slow
def test_int8_is_measured_beside_what_it_was_made_from(roomy, judge, shards):
    args = ["quantize.py", f"--checkpoint={roomy}", f"--dataset={shards}", f"--judge={judge}", "--sequences=8",
            "--texts=4"]
    rows = [json.loads(call([*args, f"--row={row}"]).stdout) for row in ("float32", "float32 int8", "bfloat16 int8")]
    plain, int8, both = rows
    assert both["mb"] < int8["mb"] < 0.6 * plain["mb"]
    for row in rows:
        assert row["seconds"] > 0 and row["perplexity"] > 1 and abs(row["bound"] / plain["bound"] - 1) < 0.01
        assert row is plain or row["bound"] != plain["bound"]


@pytest.mark.slow
def test_responses_are_paired_with_their_instruction_and_with_another(pairs, shards):
    cfg = config("--block_size=32", "--prompt_size=16")
    data = Dataset(pairs, "val", cfg, 300)
    tokenizer = get_tokenizer(json.loads((shards / "meta.json").read_text())["tokenizer"])
    instruction, response = (tokenizer.decode(part) for part in instruct.read_example(data, 0))
    assert response.removesuffix("<|endoftext|>").strip() == PAIRS[instruction.split("\n")[0].split(">")[1]]
    right, shuffled = instruct.pair_up(data, 9)
    numbers = [i * len(data) // 9 for i in range(9)]
    for made, read in zip(right, data.read(numbers)[0], strict=True):
        assert torch.equal(made, read)
    for i in range(9):
        mine, theirs = (texts.idx[i][texts.loss_mask[i]].tolist() for texts in (right, shuffled))
        assert mine == theirs and not torch.equal(right.idx[i], shuffled.idx[i])


@pytest.mark.slow
def test_responses_are_measured_with_their_instruction_and_with_another(base, pairs, tmp_path):
    call(["train.py", *SIZE, "--block_size=32", "--prompt_size=16", "--batch_tokens=256", f"--dataset={pairs}",
          f"--init_from={base}", "--max_steps=2", "--lora_rank=2", f"--out_dir={tmp_path / 'lora'}"])
    out = call(["instruct.py", f"--networks={base},{tmp_path / 'lora'}", f"--dataset={pairs}", "--answers=2",
                "--examples=9", f"--out={tmp_path / 'table.json'}"]).stdout
    found = json.loads((tmp_path / "table.json").read_text())
    assert [row["network"] for row in found["rows"]] == [str(base), str(tmp_path / "lora")]
    assert len(found["answers"]) == 2 and found["answers"][0][2] in PAIRS.values() and "(truth: " in out
    for row in found["rows"]:
        assert row["right"][0] > 0 < row["shuffled"][0] != row["right"][0] and row["step_ms"] > 0
    assert "nothing to measure" in call(["instruct.py"], code=2).stderr
    assert "no checkpoint at nowhere" in call(["instruct.py", "--networks=nowhere"], code=2).stderr
