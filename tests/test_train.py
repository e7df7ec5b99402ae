"""Training: data order, batches, accumulation, overfitting, exact resumption, and what a user's mistake gets."""
import contextlib
import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SIZE, call, losses, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import configurator
import diffusion
import model
import train
from model import SunFish, find_checkpoint, flops_per_token, load_model, read_checkpoint

def config(*args):
    return configurator.load(train.Config, [*SIZE, *args])


@pytest.fixture(scope="module")
def windows(shards):
    return train.Windows(shards, "train", config(), 300)


@pytest.mark.parametrize("n", [1, 2, 3, 100, 257])
def test_permute_visits_everything_once_in_another_order_each_epoch(n):
    orders = [[train.permute(i, n, key) for i in range(n)] for key in (1, 2)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 100 or orders[0] != orders[1]


def test_an_epoch_holds_every_window_once_and_nothing_twice(windows):
    cfg, n = config(), len(windows)
    seen = [tuple(train.make_sample(cfg, windows, *divmod(k, cfg.samples), "cpu")[0].tolist()) for k in range(n)]
    assert sorted(seen) == sorted(tuple(windows[i][0].tolist()) for i in range(n))


def test_windows_and_prompts_are_the_text_in_order(windows):
    shard = windows.shards[0]
    idx, before, begun, end = windows[3]
    assert idx.tolist() == shard[48:64].tolist() and before.tolist() == shard[40:48].tolist()
    assert len(windows[0].before) == 0 and (begun, end) == (0, 16)


def test_a_batch_does_not_depend_on_how_it_is_cut(windows):
    """Every other sequence gets a first guess, first those of which any token is denoised in several steps."""
    cfg = config("--span_warmup=0", "--p_whole=0.4", "--streams=2")
    whole = train.make_batch(cfg, windows, 5, range(8), "cpu")
    parts = [train.make_batch(cfg, windows, 5, range(i, i + 2), "cpu") for i in range(0, 8, 2)]
    levels = [train.make_sample(cfg, windows, 5, i, "cpu")[2] for i in range(8)]
    useful = [(t < 1000).any().item() for t in levels[1::2]]
    assert [p.guesses for p in parts] == useful and sum(useful) == 2 and whole.guesses == 2
    assert (whole.t[:2] < 1000).any(1).all() and (whole.t[2:4] == 1000).all()
    def rows(batches): return sorted((b.idx[i].tolist(), b.t[i].tolist(), b.eps[i].tolist(), b.prompt_mask[i].tolist())
                                     for b in batches for i in range(len(b.idx)))
    assert rows([whole]) == rows(parts)
    assert rows([whole]) != rows([train.make_batch(cfg, windows, 6, range(8), "cpu")])


def test_batches_made_ahead_are_those_of_their_steps(windows, monkeypatch):
    cfg, make_batch, begun = config("--max_steps=5"), train.make_batch, []
    monkeypatch.setattr(train, "make_batch", lambda *args: begun.append(args) or make_batch(*args))
    batches = train.batches_ahead(cfg, windows, 3, "cpu")
    made, deadline = [next(batches)], time.monotonic() + 10
    while len(begun) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(begun) == 2                              # the second, before anyone asked
    made += batches
    want = [make_batch(cfg, windows, step, samples, "cpu") for step in (3, 4) for samples in train.micro_batches(cfg, 0, 1)]
    assert len(made) == 4
    for a, b in zip(made, want, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:-1], b[:-1], strict=True)) and a.guesses == b.guesses


def test_noise_levels_are_stratified_over_the_step_and_one_for_a_turn(windows):
    batch = train.make_batch(config("--span_size=0", "--p_given=0"), windows, 3, range(8), "cpu")
    assert (batch.t == batch.t[:, :1]).all() and not batch.group.any()
    assert sorted(((batch.t[:, 0] - 1) * 8 // 1000).tolist()) == list(range(8))
    cfg = config("--p_whole=0", "--p_given=0.5")
    batch = train.make_batch(cfg, windows, 3, range(8), "cpu")
    for group, t in zip(batch.group, batch.t, strict=True):
        assert t.min() >= 1 and all(len(t[group == turn].unique()) == 1 for turn in group.unique())
        assert all((t[group == turn] == 1000).all() for turn in group.unique() if (group == turn).sum() == 1)      # alone: blind
    every = torch.cat([train.noise_levels(cfg, step, i, torch.arange(16) // 2) for step in range(50) for i in range(8)])
    assert (torch.bincount((every - 1) // 100, minlength=10) / len(every) - 0.1).abs().max() < 0.01


def test_streams_are_trained_at_pure_noise_and_spans_at_all_levels():
    cfg, free = config(), torch.ones(64, dtype=torch.bool)
    assert diffusion.FAR > model.KERNEL // 2
    for n in (1, 2, 8, 16, 64):
        group = diffusion.streams(free, n)
        assert train.apart(group).all() and (train.noise_levels(cfg, 3, 1, group) == 1000).all()
    assert not train.apart(diffusion.spans(64, 2)).any() and train.apart(torch.tensor([0, 0, 1, 2, 2])).tolist() == [False, False, True, False, False]
    assert len(train.noise_levels(cfg, 3, 1, diffusion.spans(64, 2)).unique()) > 25
    assert len(train.noise_levels(config("--objective=eps"), 3, 1, group).unique()) > 3


def test_turns_have_the_shares_that_were_asked_for(windows):
    """All at once; spans of 1, 2 or 4 from left to right, or 2 streams; given tokens first, at any places, and then such turns."""
    cfg, kinds = config("--p_whole=0.3", "--p_given=0.5", "--p_spans=0.5", "--span_size=4", "--streams=2", "--max_steps=20"), []
    want = {tuple(diffusion.spans(16, size).tolist()): size for size in (1, 2, 4)}
    want[(*range(8), *range(8))] = "2 streams"
    for i in range(2000):
        group = train.choose_turns(cfg, 8, torch.ones(16, dtype=torch.bool), diffusion.generator("cpu", i))
        assert group.min() >= 0 and (group[group > 0].diff() < 0).sum() <= 1         # once, where a second stream begins
        kinds.append("whole" if not group.any() else want.get(tuple(group.tolist()), "given"))
    for kind, share in (("whole", 0.3), ("given", 0.5), (1, 0.05), ("2 streams", 0.05), (2, 0.05), (4, 0.05)):
        assert abs(kinds.count(kind) / 2000 - share) < 0.03, (kind, kinds.count(kind))
    early = [train.choose_turns(cfg, 7, torch.ones(16, dtype=torch.bool), diffusion.generator("cpu", i)) for i in range(100)]     # of 20 steps, 0.4 of which warm up
    assert all(torch.bincount(group[group > 0]).max() <= 2 for group in early)
    assert sum(group.tolist() in ([*range(16)], [*range(8), *range(8)]) for group in early) > 25
    assert not config("--p_given=0", "--span_size=0").in_turns and config("--p_given=0").in_turns


def test_prompts_are_the_tokens_before_and_sometimes_withheld(windows):
    cfg = config("--conditioning_dropout=0.5")
    batch = train.make_batch(cfg, windows, 0, range(8), "cpu")
    visible = torch.cat([train.make_batch(cfg, windows, s, range(8), "cpu").prompt_mask for s in range(30)]).sum(1)
    assert 0.4 < (visible == 0).float().mean() < 0.62 and visible.max() == cfg.prompt_size
    assert batch.prompt.shape == (8, 8)
    withheld = train.make_batch(config("--conditioning_dropout=1"), windows, 0, range(8), "cpu")
    assert not withheld.prompt_mask.any()


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made or viewed."""
    nbytes = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        made = f(*args, **(kwargs or {}))
        self.nbytes = max(self.nbytes, *(x.untyped_storage().nbytes() for x in tree_leaves(made) if isinstance(x, torch.Tensor)), 0)
        return made


class CountFlops(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        made = f(*args, **(kwargs or {}))
        if f.overloadpacket in flop_registry:
            self.total += flop_registry[f.overloadpacket](*args, **(kwargs or {}), out_val=made)
        return made


@pytest.mark.parametrize("args", [[], ["--span_size=0", "--p_given=0"], ["--cross_every=3", "--n_embd=128"],
                                  ["--objective=eps"], ["--prompt_table=gpt2"]])
def test_flops_are_those_of_the_matrix_products_of_a_step(args):
    cfg = config("--n_layer=3", "--n_embd=64", "--token_dim=32", "--block_size=32", *args)
    net, group = SunFish(cfg, 300), torch.arange(32).expand(2, -1) // 4
    ids, prompt = torch.zeros(2, 32, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64)
    batch = train.Batch(ids, group, ids + 1, torch.randn(2, 32, 32), prompt, prompt == 0, ids == 0, 0)
    with sdpa_kernel(SDPBackend.MATH), CountFlops() as count:           # attention as products that can be counted
        loss, fit = train.DenoisingLoss(net, cfg)(batch)
        (loss + fit).backward()
    unread = 2 * net.table.numel() * (cfg.objective != "eps")          # the gradient of what x_t says
    assert flops_per_token(net, cfg.in_turns) + unread == pytest.approx(count.total / 64, rel=0.015)


def test_accumulated_gradients_are_those_of_one_batch(windows):
    grads = []
    for size in (8, 2):
        cfg = config(f"--batch_size={size}")
        torch.manual_seed(0)
        model = SunFish(cfg, 300)
        loss, _ = train.train_step(train.DenoisingLoss(model, cfg), cfg, train.batches_ahead(cfg, windows, 0, "cpu"), "cpu", contextlib.nullcontext)
        grads.append((loss, [p.grad for p in model.parameters() if p.grad is not None]))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-6)
    for a, b in zip(grads[0][1], grads[1][1], strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def one_sequence(cfg, T=12):
    """Eight copies of one sequence without prompt, each at a stratified noise level of its own."""
    idx = torch.randint(50, (1, T), generator=diffusion.generator("cpu", "sequence")).expand(8, T)
    group = diffusion.spans(T, cfg.span_size)
    t, hidden = diffusion.stratified(8, cfg.timesteps, group), torch.zeros(8, cfg.prompt_size, dtype=torch.bool)
    return train.Batch(idx, group.expand(8, T), t, torch.randn(8, T, cfg.token_dim), hidden.long(), hidden, torch.ones_like(idx, dtype=torch.bool), 4)


def overfit(cfg, steps, fixed):
    torch.manual_seed(0)
    model = SunFish(cfg, 50)
    loss_fn, optimizer = train.DenoisingLoss(model, cfg), torch.optim.Adam(model.parameters(), lr=3e-3)
    batch = one_sequence(cfg)
    for _ in range(steps):
        batch = batch if fixed else one_sequence(cfg)
        loss, fit = loss_fn(batch)
        optimizer.zero_grad()
        (loss + fit).div(batch.idx.numel()).backward()
        optimizer.step()
    return model, batch, loss.item() / batch.idx.numel()


def test_a_sequence_learnt_by_heart_is_what_the_sampler_writes():
    cfg = config("--n_layer=2", "--block_size=12", "--batch_tokens=96", "--span_size=0", "--p_given=0")
    model, batch, loss = overfit(cfg, 250, fixed=False)
    assert loss < 0.05
    with torch.no_grad():
        table = model.embedding()
        for eta in (0.0, 1.0):
            tokens = diffusion.generate(lambda *_: model, diffusion.make_read(cfg, table, 50), table,
                                        diffusion.make_schedule(cfg, model.schedule), torch.zeros(2, 12, dtype=torch.int64),
                                        torch.zeros(12, dtype=torch.bool), diffusion.spans(12, 0), steps=20, eta=eta)
            assert torch.equal(tokens, batch.idx[:2])
    assert model.schedule[0] != -1.9, "the schedule is fitted while training"


def test_eps_objective_overfits_one_batch_and_decodes_it_which_a_blind_guess_does_not():
    """The origin's test asked only for a loss below 0.01, which its collapsed table met without learning anything."""
    cfg = config("--n_layer=2", "--block_size=12", "--batch_tokens=96", "--objective=eps", "--schedule=linear",
                 "--span_size=0", "--p_given=0")
    model, batch, loss = overfit(cfg, 400, fixed=True)
    assert loss < 0.01
    table, alpha_bar = model.embedding(), diffusion.make_schedule(cfg, model.schedule)
    with torch.no_grad():
        x_t = diffusion.add_noise(table[batch.idx], batch.t, alpha_bar, batch.eps)
        level = diffusion.log_snr(batch.t, alpha_bar)
        eps_hat = model(x_t, level, torch.zeros_like(x_t), batch.prompt, batch.prompt_mask)
        _, logits = diffusion.read_eps(table[:50])(eps_hat, x_t, level)
        blind = (diffusion.like((1 - alpha_bar[batch.t]).sqrt(), x_t) * x_t - batch.eps).square().mean()
    assert (logits.argmax(-1) == batch.idx).float().mean() > 0.97 and blind > 0.1


def test_learning_rate_warms_up_and_falls_to_zero():
    cfg = config("--warmup_steps=10", "--max_steps=110")
    optimizer = train.make_optimizer(SunFish(cfg, 50), cfg)
    rates = [train.set_learning_rate(optimizer, cfg, step) for step in range(110)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx(5e-4) and 0 < rates[-1] < 1e-6
    assert optimizer.param_groups[0]["weight_decay"] > 0 == optimizer.param_groups[1]["weight_decay"]


def test_bound_of_an_untrained_network_is_the_unigram_cross_entropy(windows):
    """At initialisation the network is the context-free posterior, so its bound is what a unigram model gives."""
    cfg = config()
    torch.manual_seed(0)
    log_p = windows.unigram()
    model = SunFish(cfg, 300, log_p)
    nll = -log_p[train.eval_windows(windows, 4000)].mean().item()
    for span, steps, streams in ((4, 0, 1), (0, 0, 1), (1, 1000, 1), (1, 0, 4), (None, 0, 1)):
        row = train.measure(model, train.eval_windows(windows, 4000), 500, span, steps, streams)
        assert abs(row["bound"] - nll) < 4 * row["bound_error"] + row["prior"] < 0.25, span
    assert row["diffusion"] == 0 < row["prior"] < 0.02              # one token in one step: sample.py's way
    assert len(row["ce_by_noise"]) == 8 and all(abs(a - b) < 1e-3 for _, a, b in row["ce_by_noise"])


def test_the_bound_in_streams_is_of_turns_that_read_earlier_ones(small):
    """With noise that says nothing, a turn's tokens are scored from the turns before: by hand, one turn after the other."""
    small.cfg = dataclasses.replace(small.cfg, schedule="cosine")
    idx, E = torch.randint(50, (64, 12), generator=torch.Generator().manual_seed(1)), small.embedding()
    row, group, nll = train.measure(small, idx, 64, 1, streams=3, bands=0), torch.arange(12) % 4, torch.zeros(64, 12)
    with torch.no_grad():
        for turn in range(4):
            places, turns = (group == turn).nonzero().flatten(), group.expand(64, -1)
            x = torch.randn(64, 3, 16)
            past = small.look_back(small.remember(idx, turns), turns, places)
            logits = small(x, torch.full((64, 3), -math.inf), torch.zeros_like(x), past=past, E=E)
            nll[:, places] = diffusion.ce_loss(logits, idx[:, places])
    assert row["bound"] == pytest.approx(nll.mean().item(), abs=0.02)


def test_a_compiled_step_is_an_eager_one_whatever_the_number_of_first_guesses(windows):
    cfg = config("--span_warmup=0", "--p_whole=0.5")
    net = SunFish(cfg, 300)
    for layer in (net.head, net.read):              # the guess is read with weights that begin at zero
        torch.nn.init.normal_(layer.weight, std=0.1)
    loss_fn, batch, found = train.DenoisingLoss(net, cfg), train.make_batch(cfg, windows, 5, range(8), "cpu"), []
    for _ in range(2):
        for n in (4, 1, 0, 4):
            net.zero_grad()
            loss, fit = loss_fn(batch._replace(guesses=n))
            (loss + fit).backward()
            found.append((loss.item(), torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])))
        train.compile_parts(loss_fn, backend="aot_eager")
    for (loss, grad), (eager, eager_grad) in zip(found[4:], found[:4], strict=True):
        assert loss == pytest.approx(eager, rel=1e-5) and torch.allclose(grad, eager_grad, atol=1e-4)
    assert abs(found[0][0] - found[2][0]) > 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_and_resumed_is_bitwise_the_run_that_never_stopped(shards, tmp_path, dtype):
    command = ["train.py", *SIZE, f"--dataset={shards}", "--max_steps=24", "--save_interval=6", f"--dtype={dtype}"]
    run([*command, f"--out_dir={tmp_path / 'whole'}"])
    halves = [*command, f"--out_dir={tmp_path / 'killed'}"]
    process = subprocess.Popen([sys.executable, *halves], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "killed").glob("ckpt_*.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    (tmp_path / "killed" / "ckpt_00000099.tmp").write_bytes(b"a stump")
    out = run([*halves, "--resume=True"])
    assert re.search(r"resuming at step \d+ of 24", out.stdout)
    whole, killed = (read_checkpoint(tmp_path / name / "ckpt_00000024.pt") for name in ("whole", "killed"))
    for part in ("model", "ema"):
        assert all(torch.equal(a, killed[part][name]) for name, a in whole[part].items())
    moments = [run["optimizer"]["state"].values() for run in (whole, killed)]
    assert all(torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]) for a, b in zip(*moments, strict=True))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert sorted(p.name for p in (tmp_path / "killed").glob("ckpt*")) == ["ckpt_00000018.pt", "ckpt_00000024.pt"]
    again = run([*halves, "--resume=True"])
    assert "resuming at step 24 of 24" in again.stdout


def test_sigterm_saves_and_says_so(shards, tmp_path):
    command = ["train.py", *SIZE, f"--dataset={shards}", "--max_steps=100000", f"--out_dir={tmp_path}"]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("step 3/"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert "--resume=True goes on" in process.stdout.read()
    assert process.wait() == 143 and len(list(tmp_path.glob("ckpt_*.pt"))) == 1


def test_evaluation_is_logged_and_printed(shards, tmp_path):
    out = call(["train.py", *SIZE, f"--dataset={shards}", "--max_steps=2", f"--out_dir={tmp_path}"]).stdout
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert {"bound", "bound_error", "reconstruction", "diffusion", "prior", "ce_by_noise", "text"} <= set(row)
    assert "bound" in out and "infill:" in out and "truth" in out
    assert math.isclose(row["bound"], row["reconstruction"] + row["diffusion"] + row["prior"], rel_tol=1e-6)


@pytest.mark.parametrize("args, words", [
    (["--batch_tokens=100"], "batch_tokens=100 is not a multiple of 64 (batch_size * block_size); try 128"),
    (["--n_embd=33"], "n_embd=33 is not a multiple of 2 * n_head=4; try 32"),
    (["--learning_rte=1"], "learning_rate"),
    (["--p_given=0.9", "--p_whole=0.9"], "add up to more than 1"),
    (["--span_size=17"], "span_size=17 is not between 0"), (["--p_whole=1", "--p_given=0"], "use --span_size=0"),
    (["--device=cuda"], "sees no CUDA device"),
    (["--schedule=quadratic"], "use one of gumbel, linear, cosine"),
    (["--dataset=nowhere"], "prepare_fineweb.py"),
    (["--block_size=1000000", "--batch_tokens=4000000"], "block_size")])
def test_mistakes_get_one_line_and_leave_nothing(args, words, shards, tmp_path):
    if "cuda" in args[0] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    out = call(["train.py", *SIZE, f"--dataset={shards}", f"--out_dir={tmp_path / 'out'}", *args], code=2)
    assert words in out.stderr and len(out.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_full_size_wants_web_text(tmp_path):
    command = ["train.py", ROOT / "config/full.py", f"--out_dir={tmp_path / 'out'}", "--dataset=no_such_fineweb"]
    assert "python prepare_fineweb.py" in call(command, code=2).stderr and not (tmp_path / "out").exists()


def test_a_run_is_neither_overwritten_nor_resumed_as_another(shards, tmp_path):
    command = ["train.py", *SIZE, f"--dataset={shards}", "--max_steps=1", f"--out_dir={tmp_path / 'run'}"]
    call(command)
    assert "already holds a run" in call(command, code=2).stderr
    out = call([*command, "--resume=True", "--n_layer=3"], code=2)
    assert "n_layer=3 is 2" in out.stderr
    out = call([*command, "--resume=True", "--seed=2"], code=2)
    assert "seed=2 is 1" in out.stderr
    out = call([*command, "--resume=True", "--learning_rate=0.5", "--max_steps=2", "--weight_decay=0.2"])
    content = read_checkpoint(tmp_path / "run" / "ckpt_00000002.pt")
    assert content["optimizer"]["param_groups"][0]["weight_decay"] == 0.2
    assert "resuming with learning_rate=0.5, was 0.001" in out.stdout


def test_dry_run_of_the_full_size_needs_no_data_and_no_memory():
    out = call(["train.py", ROOT / "config/full.py", "--dry_run=True"]).stdout
    assert abs(int(re.search(r"parameters: ([\d,]+)", out)[1].replace(",", "")) / 1.5e9 - 1) < 0.03
    assert "65,536 tokens = 8 sequences x 512 tokens x 16 accumulated" in out and re.search(r"average and optimizer 2[34]\.\d\d GB", out)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_trains_in_bf16_and_compiled(shards, tmp_path):
    out = call(["train.py", *SIZE, f"--dataset={shards}", "--max_steps=5", f"--out_dir={tmp_path}", "--device=cuda",
               "--dtype=bfloat16", "--compile=true"]).stdout
    assert "done: step 5" in out


def test_activation_checkpointing_changes_nothing_but_memory(shards, tmp_path):
    command = ["train.py", *SIZE, f"--dataset={shards}", "--max_steps=3"]
    call([*command, f"--out_dir={tmp_path / 'plain'}"])
    call([*command, f"--out_dir={tmp_path / 'recomputed'}", "--activation_checkpointing=True"])
    plain, recomputed = losses(tmp_path / "plain"), losses(tmp_path / "recomputed")
    assert plain == pytest.approx(recomputed, rel=1e-6)


@pytest.mark.parametrize("args, dtype", [([], torch.float32), ([], torch.bfloat16),
                                         (["--schedule=cosine"], torch.float32)])
def test_gradients_made_with_the_scores_are_those_of_autograd(windows, monkeypatch, args, dtype):
    def plain(f, width, shared, *inputs):
        losses = f(*shared, *inputs)
        return losses.sum(), losses.detach()
    cfg, found = config("--batch_size=8", *args), []
    batch = train.make_batch(cfg, windows, 5, range(8), "cpu")
    monkeypatch.setattr(model, "SCORES", 320 * 20)                      # eight chunks
    for loss_in_chunks in (train.loss_in_chunks, plain):
        monkeypatch.setattr(train, "loss_in_chunks", loss_in_chunks)
        torch.manual_seed(0)
        net = SunFish(cfg, 300)
        for weight in (net.head.weight, net.read.weight, net.time_out.weight, *(b.cross_gate for b in net.blocks if b.cross)):       # some begin at zero
            torch.nn.init.normal_(weight, std=0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, fit = train.DenoisingLoss(net, cfg)(batch)
        (3 * loss + fit).backward()
        found.append((loss.item(), fit.item(), [p.grad for p in net.parameters() if p.grad is not None]))
    (loss, fit, grads), (plain_loss, plain_fit, plain_grads) = found
    rough = 0.02 if dtype == torch.bfloat16 else 1e-5
    assert (loss, fit) == pytest.approx((plain_loss, plain_fit), rel=rough) and len(grads) == len(plain_grads) > 10
    assert all((a - b).norm() <= rough * b.norm() and b.norm() > 0 for a, b in zip(grads, plain_grads, strict=True))


def test_scores_in_chunks_give_the_loss_and_gradients_of_scores_as_a_whole(windows, monkeypatch):
    """And never stand in memory at once: the largest tensor of the chunked step is smaller than the scores."""
    cfg, found = config("--batch_size=8"), []
    for scores in (10 ** 9, 320 * 7):
        monkeypatch.setattr(model, "SCORES", scores)
        torch.manual_seed(0)
        net = SunFish(cfg, 300)
        with Largest() as seen:
            loss, _ = train.train_step(train.DenoisingLoss(net, cfg), cfg, train.batches_ahead(cfg, windows, 0, "cpu"), "cpu", contextlib.nullcontext)
        found.append((loss, seen.nbytes, [p.grad for p in net.parameters() if p.grad is not None]))
    (whole, largest, grads), (chunked, small, others) = found
    assert largest >= 8 * 16 * 320 * 4 > small
    assert chunked == pytest.approx(whole, rel=1e-6) and len(grads) == len(others) > 10
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, others, strict=True))


# ---- GPT-2's vectors for the prompt ----

@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """A made-up file with a wte.weight of 300 rows, and that tensor."""
    save_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file
    path, table = tmp_path_factory.mktemp("vectors") / "model.safetensors", 0.1 * torch.randn(300, 768, generator=torch.Generator().manual_seed(0))
    save_file({"wte.weight": table, "wpe.weight": torch.zeros(8, 768)}, path)
    return path, table


def test_a_frozen_table_for_the_prompt_is_read_once_and_never_changes(shards, vectors, tmp_path):
    path, table = vectors
    command = ["train.py", *SIZE, f"--dataset={shards}", "--prompt_table=gpt2", f"--prompt_file={path}", "--save_interval=3"]
    call([*command, f"--out_dir={tmp_path / 'whole'}", "--max_steps=6"])
    call([*command, f"--out_dir={tmp_path / 'run'}", "--max_steps=6"])
    (tmp_path / "run" / "ckpt_00000006.pt").unlink()
    call([*command, f"--out_dir={tmp_path / 'run'}", "--max_steps=6", "--resume=True", "--prompt_file=gone.safetensors"])
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    found = find_checkpoint(tmp_path / "run")[1]
    for name in ("model", "ema"):
        kept = found[name]["prompt_table"]
        assert kept.dtype == torch.float16 and torch.allclose(kept.float(), table / table.std(), atol=2e-3)
    net, seen = load_model(found), torch.ones(1, 4, dtype=torch.bool)
    net.blocks[1].cross_gate.fill_(1.0)
    torch.nn.init.normal_(net.head.weight)

    def answer(ids):
        return net(torch.zeros(1, 16, 16), torch.full((1, 16), -9.0), torch.zeros(1, 16, 16), torch.tensor([ids]), seen)
    before = answer([1, 2, 3, 4])
    net.prompt_table[9] += 1
    assert torch.equal(answer([1, 2, 3, 4]), before) and not torch.allclose(answer([1, 2, 3, 9]), before)
    net.prompt_table[3] += 1
    assert not torch.allclose(answer([1, 2, 3, 4]), before)
    call(["sample.py", f"--checkpoint={tmp_path / 'run'}", "--prompt=a dog a dog a dog", "--seq_len=4"])


def test_vectors_that_do_not_fit_are_refused_and_leave_nothing(shards, vectors, tmp_path, monkeypatch):
    from safetensors.torch import save_file
    save_file({"wte.weight": torch.zeros(299, 768)}, tmp_path / "short.safetensors")
    save_file({"other": torch.zeros(300, 768)}, tmp_path / "other.safetensors")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for file, words in ((tmp_path / "short.safetensors", "prepare the text with --tokenizer=gpt2"), (tmp_path / "other.safetensors", "no tensor wte.weight"),
                        (tmp_path / "gone.safetensors", "GPT-2's vectors: "), ("", "cannot fetch openai-community/gpt2")):
        err = call(["train.py", *SIZE, f"--dataset={shards}", "--prompt_table=gpt2", f"--prompt_file={file}", f"--out_dir={tmp_path / 'run'}"], 2).stderr
        assert words in err and err.count("\n") == 1 and not (tmp_path / "run").exists(), err
