"""What makes a step fast on a GPU, as far as a CPU can tell: flex_attention's masks, nothing that waits for the device,
nothing compiled twice, a recorded step that is replayed, a batch that fits. bench/gpu.sh runs the same on a card."""
import contextlib
import gc
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffusion
import generate as g
import machine as mc
import model as m
import train
from configurator import UserError
from data import Batch, make_batch
from diffusion import LATER
from generate import Canvas, Decoder, Sampling, generate, generators

sys.path.insert(0, str(ROOT / "bench"))

from speed import Random    # noqa: E402


def orders(T):
    """Orders of a window: each kind that training has."""
    torch.manual_seed(0)
    free = torch.ones(T, dtype=torch.bool)
    made = [diffusion.block_order(free, *how) for how in ((0,), (1,), (2,), (16,), (100,), (16, True))]
    made += [diffusion.block_order(torch.rand(T) < 0.7, 8), made[1].masked_fill(torch.arange(T) < 30, LATER)]
    return torch.stack([*made, torch.where(torch.arange(T) < 150, -1, made[3])])


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """On a CPU flex_attention is plain products with gradients, once it is let."""
    monkeypatch.setattr(flex, "_validate_device", lambda *inputs: None)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("part", [0, 1])
def test_flex_attention_is_dense_attention_in_float64_with_its_gradients(flex_on_cpu, part):
    order = orders(256)
    dense, tiles = m.training_masks(order)[part], m.flex_masks(order)[part]
    q, k, v = (torch.randn(len(order), 2, n, 16, dtype=torch.float64, requires_grad=True)
               for n in (256, dense.size(3), dense.size(3)))
    want = ((q @ k.mT) / 4 + m.additive(dense, q.dtype)).softmax(-1) @ v
    found, weight = m.attention(q, k, v, tiles), torch.randn_like(want)
    assert torch.allclose(found, want, atol=1e-12)
    for one, other in zip(torch.autograd.grad(found, (q, k, v), weight), torch.autograd.grad(want, (q, k, v), weight),
                          strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("part", [0, 1])
def test_tiles_that_are_skipped_hold_nothing_and_full_ones_hold_every_pair(part):
    order = orders(512)
    dense, tiles = m.training_masks(order)[part], m.flex_masks(order)[part]
    pairs = dense[:, 0].unflatten(1, (-1, m.FLEX)).unflatten(3, (-1, m.FLEX)).sum((2, 4))     # (B, n, m)

    def listed(count, numbers):
        held = torch.zeros_like(pairs, dtype=torch.bool)
        first = torch.arange(numbers.size(-1)) < count[:, 0, :, None]
        return held.scatter(-1, numbers[:, 0].long(), first)
    some = listed(tiles.kv_num_blocks, tiles.kv_indices)
    every = listed(tiles.full_kv_num_blocks, tiles.full_kv_indices)
    assert not (some & every).any() and ((pairs > 0) <= (some | every)).all() and (pairs[every] == m.FLEX ** 2).all()
    causal = some[1] | every[1]                                     # of a window that is written token by token
    assert causal.float().mean() < 0.65 and every[1].any() and every[0, :, -4:].all()


def config(**settings):
    return train.Config(**dict(n_layer=3, n_head=2, n_embd=32, token_dim=16, block_size=128, prompt_size=8,
                               cross_every=2, batch_size=4, batch_tokens=4 * 128) | settings)


def gradients(loss, batch):
    loss.zero_grad()
    train.backward(loss, batch, mc.Machine(torch.device("cpu"), torch.float32, True))
    return torch.cat([p.grad.flatten() for p in loss.parameters() if p.grad is not None])


@pytest.mark.parametrize("use_flex", [False, True])
def test_nothing_is_compiled_after_the_warm_up_and_the_step_is_the_eager_one(flex_on_cpu, capsys, use_flex):
    """With the compiler's first half, on which recompiling depends, and four batches of other orders and prompts."""
    torch._dynamo.reset()
    counters.clear()
    cfg, data, machine = config(), Random(config(), 300), mc.Machine(torch.device("cpu"), torch.float32, True)
    torch.manual_seed(0)
    loss = train.DiffusionLoss(m.SunFish(cfg, data.vocab_size))
    with torch.no_grad():
        for p in loss.parameters():
            p.add_(0.1 * torch.randn_like(p))
    batches = [make_batch(cfg, data, step, range(4), "cpu") for step in range(4)]
    assert {batch.guess for batch in batches} == {False, True}
    eager = [gradients(loss, batch) for batch in batches]
    train.compile_parts(loss.net, "aot_eager")
    loss.net.flex = use_flex
    train.warm_up(loss.net, loss, make_batch(cfg, data, 9, range(4), "cpu"), cfg, machine)
    assert capsys.readouterr().out.count("compiling the step with") == 2
    assert all(p.grad is None for p in loss.parameters())
    compiled = counters["stats"]["unique_graphs"]
    for batch, want in zip(batches, eager, strict=True):
        assert torch.allclose(gradients(loss, batch), want, rtol=1e-4, atol=1e-6 * want.abs().max())
    assert counters["stats"]["unique_graphs"] == compiled > 4 and not counters["graph_break"]


def test_where_flex_attention_fails_attention_takes_a_mask(capsys):
    """A CPU gives no gradients of it."""
    cfg, data, machine = config(), Random(config(), 300), mc.Machine(torch.device("cpu"), torch.float32, True)
    loss = train.DiffusionLoss(m.SunFish(cfg, data.vocab_size))
    loss.net.flex, batch = True, make_batch(cfg, data, 0, range(4), "cpu")
    train.warm_up(loss.net, loss, batch, cfg, machine)
    said = capsys.readouterr().err
    assert not loss.net.flex and said.count("warning: no flex_attention here (FlexAttention does") == 1
    loss.net.layers[0].forward = None
    with pytest.raises(TypeError):
        train.warm_up(loss.net, loss, batch, cfg, machine)


# ---- nothing waits for the device: on the meta device there are no values to ask for ----

@pytest.fixture
def without_values(monkeypatch):
    """A network on the meta device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)             # which it does not have
    cfg = m.ModelConfig(n_layer=2, n_head=2, n_embd=32, token_dim=16, block_size=12, prompt_size=6)
    with torch.device("meta"):
        return m.SunFish(cfg, 50)


def meta(*shape, dtype=torch.int64):
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_values_would_be_missed(without_values):
    for ask in (torch.Tensor.item, torch.Tensor.tolist, bool, int, torch.nonzero, torch.Tensor.cpu):
        with pytest.raises((NotImplementedError, RuntimeError)):
            ask(without_values.wte.sum())


@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("order", [None, meta(3, 12)])
def test_loss_and_gradients_ask_the_device_for_no_number(without_values, order, guess):
    eps, mask, prompt = meta(3, 12, 16, dtype=torch.float32), meta(3, 12, dtype=torch.bool), meta(3, 6)
    batch = Batch(meta(3, 12), order, meta(3, 12), eps, prompt, prompt > 0, mask, guess, 36)
    loss = train.DiffusionLoss(without_values)
    sum(loss(batch)).backward()
    assert without_values.wte.grad.device.type == "meta"


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "constrained_ddim"])
@pytest.mark.parametrize("block_length, guidance", [(4, 2.0), (0, 1.0), (1, 2.0)])
def test_a_block_is_written_without_asking_the_device_for_a_number(without_values, block_length, guidance, sampler):
    net, calls = without_values, []
    net.alpha_bar = lambda: diffusion.linear_schedule(1000)                     # asked for once a text
    canvas = Canvas(torch.zeros(12, dtype=torch.int64), torch.arange(12) < 3, torch.zeros(4, dtype=torch.int64))
    cfg = Sampling(revisions=0, block_length=block_length, guidance_scale=guidance, sampler=sampler)
    order = diffusion.block_order(~canvas.known, block_length)
    decoder = Decoder(net, canvas, cfg, order, [None, None], None)
    decoder.predict.f = lambda *inputs: calls.append(inputs) or decoder.predict_once(*inputs)
    for block in order[~canvas.known].unique():
        decoder.write_block(block, 3)
    assert len(calls) == 3 * len(order[~canvas.known].unique()) and decoder.tokens.device.type == "meta"


# ---- a step that is recorded once and replayed ----

class Recording(TorchDispatchMode):
    """A CUDA graph's stand-in: the operations that ran are run again on the same tensors, into the same results."""

    def __init__(self):
        super().__init__()
        self.done, self.replays = [], 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        made = f(*args, **(kwargs or {}))
        self.done.append((f, args, kwargs or {}, made))
        return made

    def replay(self):
        self.replays += 1
        for f, args, kwargs, made in self.done:
            for old, new in zip(tree_leaves(made), tree_leaves(f(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recordings(monkeypatch):
    """What was recorded, when a CPU is taken for a CUDA device."""
    made = []

    @contextlib.contextmanager
    def record(graph, capture_error_mode):
        made.append(graph)
        with graph:
            yield
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(g, "Replay", lambda f, device: mc.Replay(f, torch.device("cuda")))
    return made


@pytest.mark.parametrize("block_length, steps, guidance, graphs", [
    (0, 8, 2.0, 1), (4, 6, 1.0, 2), (4, 6, 2.0, 2), (1, 1, 2.0, 1), (2, 1, 1.0, 1)])
def test_a_replayed_step_writes_the_same(small, recordings, monkeypatch, block_length, steps, guidance, graphs):
    """Window, blocks, and single tokens: the first step of a block has the last one's clean tokens, the others none."""
    torch.manual_seed(1)
    canvas = Canvas(torch.randint(50, (2, 12)), torch.arange(12) < 2, torch.randint(50, (2, 3)))
    cfg = Sampling(revisions=0, block_length=block_length, steps=steps, guidance_scale=guidance)
    found = generate(small, canvas, cfg, generators("cpu", 1, [0, 1]))
    replays = sum(graph.replays for graph in recordings)
    monkeypatch.setattr(g, "Replay", mc.Replay)
    assert torch.equal(found, generate(small, canvas, cfg, generators("cpu", 1, [0, 1])))
    assert len(recordings) <= graphs and replays > 0


def test_what_was_recorded_is_gone_with_its_text(small, recordings):
    """A recorded step holds the memory of a whole pass, and no cycle of references may keep it."""
    canvas, held = Canvas(torch.zeros(12, dtype=torch.int64), torch.zeros(12) > 0, torch.tensor([1])), []
    gc.disable()
    try:
        for _ in range(3):
            generate(small, canvas, Sampling(block_length=0, steps=5), generators("cpu", 1, [0]))
            held.append(weakref.ref(recordings.pop()))
        assert [graph() for graph in held] == [None] * 3
    finally:
        gc.enable()


def test_what_is_replayed_reads_its_new_inputs(recordings):
    f = mc.Replay(lambda x, y: (x + 1, None if y is None else x * y), torch.device("cuda"))
    for i in range(5):
        x = torch.full((3,), float(i))
        assert torch.equal(f(x, x)[1], x * x) and torch.equal(f(x, None)[0], x + 1)
    assert [graph.replays for graph in recordings] == [3, 3]


# ---- what fits, and what compiles ----

def test_the_batch_is_what_the_memory_of_a_gpu_holds(monkeypatch):
    """A stand-in for a card, on which the first sequence takes 10 GB and each further one 2."""
    cfg, sizes = config(batch_size=0, batch_tokens=48 * 128), []
    data, net = Random(cfg, 50), m.SunFish(cfg, 50)
    loss, machine = train.DiffusionLoss(net), mc.Machine(SimpleNamespace(type="cuda"), torch.float32, True)
    optimizer = train.make_optimizer(loss, cfg)
    monkeypatch.setattr(train, "backward", lambda model, batch, machine: sizes.append(len(batch.idx)))
    monkeypatch.setattr(train, "make_batch", lambda *what: make_batch(*what[:-1], "cpu"))
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5e9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5e9 + (8 + 2 * sizes[-1]) * 1e9)
    for free, fits in ((80e9, 24), (100e9, 24), (150e9, 48), (21e9, 4), (1e9, 1)):      # divisors of 48
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        net.flex = True
        assert train.fit_batch(cfg, net, loss, optimizer, data, machine) == fits and net.flex and sizes[-2:] == [1, 2]


def test_a_batch_size_of_zero_is_eight_on_a_cpu_or_what_divides_the_step():
    cfg = config(batch_size=0, batch_tokens=64 * 128)
    cpu = mc.Machine(torch.device("cpu"), torch.float32, False)
    assert cfg.micro_batch == 8 == train.fit_batch(cfg, None, None, None, None, cpu)
    assert config(batch_size=0, batch_tokens=14 * 128).micro_batch == 7
    config(batch_size=0, batch_tokens=14 * 128).check()
    with pytest.raises(UserError, match=r"not a multiple of 128 \(block_size\); try 128"):
        config(batch_size=0, batch_tokens=100).check()


def settings(how):
    return SimpleNamespace(device="cpu", dtype="float32", compile=how)


@pytest.mark.parametrize("said", ["Python.h: No such file or directory\nlong story", "", "\n\nCannot find Triton"])
def test_where_nothing_compiles_training_goes_on_or_says_why(monkeypatch, capsys, said):
    def fails(f):
        raise RuntimeError(said)
    monkeypatch.setattr(torch, "compile", fails)
    reason = said.strip().splitlines()[0] if said else "RuntimeError"
    with pytest.raises(UserError, match=f"torch.compile fails here .{reason}.; mend that, or use --compile=false"):
        mc.choose_machine(settings("true"))
    assert not mc.choose_machine(settings("auto")).compiled         # of a CPU it is not even tried
    monkeypatch.setattr(mc, "choose_device", lambda name: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(mc, "choose_dtype", lambda name, device: torch.float32)
    monkeypatch.setattr(torch, "ones", lambda n, device: None)
    assert not mc.choose_machine(settings("auto")).compiled
    assert f"warning: torch.compile fails here ({reason})" in capsys.readouterr().err


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="Apple's GPU is there")
def test_apples_gpu_is_asked_for_where_there_is_none():
    with pytest.raises(UserError, match="device=mps, but torch .* sees no GPU of Apple's; use --device=cpu"):
        mc.choose_device("mps")


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no GPU of Apple's here")
def test_apples_gpu_trains_and_writes_as_the_cpu_does(small):
    canvas = Canvas(torch.zeros(12, dtype=torch.int64), torch.zeros(12) > 0, torch.tensor([1, 2]))
    cfg, data = config(), Random(config(), 300)
    for device in ("cpu", "mps"):
        net = small.to(device)
        assert generate(net, canvas, Sampling(block_length=4), generators(device, 1, [0])).shape == (1, 12)
    loss = train.DiffusionLoss(m.SunFish(cfg, data.vocab_size))
    batch = make_batch(cfg, data, 0, range(4), "cpu")
    want = sum(loss(batch)).item()
    on_gpu = Batch(*(x.to("mps") if torch.is_tensor(x) else x for x in batch))
    assert sum(loss.to("mps")(on_gpu)).item() == pytest.approx(want, rel=1e-4)
