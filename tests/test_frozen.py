"""What the network computed before the house was rebuilt (593d480), in frozen.pt: hidden states, scores, losses,
gradients, sampled tokens and bounds of small random networks, for every kind of order, prompt, guidance and blank."""
from pathlib import Path

import pytest
import torch

import train
from data import Batch, Texts
from generate import Canvas, Sampling, bound, generate, generators
from model import LATER, ModelConfig, SunFish

FILE = Path(__file__).with_name("frozen.pt")
SIZE = dict(n_layer=3, n_head=2, n_embd=16, token_dim=8, block_size=12, prompt_size=6, cross_every=2)
V, B, T, C, P = 50, 3, 12, 8, 6
ORDERS = {
    "window": torch.zeros(T),
    "one at a time": torch.arange(T),
    "blocks of 4": torch.arange(T) // 4,
    "blocks of 5": torch.arange(T) // 5,
    "strided": torch.arange(T) % 4,
    "given prefix": torch.tensor([-1] * 5 + [0, 0, 0, 1, 1, 1, 2]),
    "given anywhere": torch.tensor([0, 1, 1, 0, -1, 2, 2, 1, -1, -1, 3, 0]),
    "example": torch.tensor([-1, -1, -1, 0, 1, 2, 3, 4, LATER, LATER, LATER, LATER]),
    "withheld": torch.tensor([LATER, LATER, LATER, 0, 0, 1, 1, 2, LATER, LATER, LATER, LATER])}
SAMPLED = {         # block_length, strided, steps of a block, guidance, tokens given first, prompt, blanks, eta
    "window": (0, False, 20, 1.0, 0, 0, (), 1.0),
    "window, DDIM": (0, False, 10, 1.0, 0, 0, (), 0.0),
    "window, prompt": (0, False, 12, 2.5, 0, 4, (), 1.0),
    "blocks of 4": (4, False, 5, 1.0, 0, 0, (), 1.0),
    "blocks of 5, guided": (5, False, 6, 2.0, 3, 3, (), 0.5),
    "one at a time": (1, False, 1, 1.0, 0, 0, (), 1.0),
    "one at a time, guided": (1, False, 1, 2.0, 4, 6, (), 1.0),
    "strided": (3, True, 1, 1.0, 0, 0, (), 1.0),
    "strided, guided": (2, True, 1, 3.0, 2, 5, (), 1.0),
    "infill": (0, False, 16, 1.0, 0, 2, (3, 4, 5, 9), 1.0),
    "infill in blocks": (3, False, 5, 1.0, 0, 0, (0, 4, 5, 11), 1.0),
    "infill one at a time": (1, False, 1, 1.0, 0, 3, (2, 3, 8, 9), 1.0)}
NAMES = {"table": "wte", "read": "in_proj", "prompt_in": "prompt_proj", "null": "null_token", "blocks": "layers"}


def renamed(state):
    """The old names of the weights replaced by the new ones."""
    return {".".join(NAMES.get(part, part) for part in name.split(".")): x for name, x in state.items()}


def network(state, objective):
    net = SunFish(ModelConfig(**SIZE, objective=objective), V)
    net.load_state_dict(renamed(state))
    return net.eval()


def inputs(name):
    rng = torch.Generator().manual_seed(len(name))
    prompt_mask = torch.arange(P) >= torch.tensor([[0], [2], [6]])
    return dict(idx=torch.randint(V, (B, T), generator=rng), t=torch.randint(1, 1001, (B, T), generator=rng),
                eps=torch.randn(B, T, C, generator=rng), guess=torch.randn(B, T, C, generator=rng),
                prompt=torch.randint(V, (B, P), generator=rng), prompt_mask=prompt_mask)


def read(net, order, idx, t, eps, guess, prompt, prompt_mask):
    """Hidden states and scores of noisy tokens at levels of their own, beside the clean ones of earlier blocks."""
    E, level, x_t = net.embedding(), torch.linspace(-6, 3, B * T).view(B, T), 2 * eps
    h = net.denoise(E[idx], x_t, level, order, net.encode_prompt(prompt, prompt_mask, E), E, guess)
    return dict(h=h, logits=net.logits(h, x_t, level, E))


def lose(net, order, guessed, idx, t, eps, guess, prompt, prompt_mask):
    """The two sums of the training loss and the length of each gradient; t is one number for the tokens of a block."""
    steps = net.cfg.timesteps
    t = torch.where(order == order[:, :1], steps, 1 + (order * 377 + 500) % steps)
    batch = Batch(idx, order, t, eps, prompt, prompt_mask, (order >= 0) & (order < LATER), guessed, B * T)
    net.zero_grad()
    loss, fit = train.DiffusionLoss(net)(batch)
    (loss + fit).backward()
    grads = {name: p.grad.norm().item() for name, p in net.named_parameters() if p.grad is not None}
    return dict(loss=loss.item(), fit=fit.item(), grads=grads)


def write(net, block_length, strided, steps, guidance, given, prompt, blanks, eta):
    rng = torch.Generator().manual_seed(5)
    known = torch.tensor([i not in blanks for i in range(T)]) if blanks else torch.arange(T) < given
    canvas = Canvas(torch.randint(V, (T,), generator=rng), known, torch.randint(V, (prompt,), generator=rng))
    dial = dict(block_length=block_length, strided=strided, steps=steps)
    cfg = Sampling(revisions=0, **dial, guidance_scale=guidance, eta=eta, temperature=1.0)
    return generate(net, canvas, cfg, generators("cpu", 1, range(6)))


def bounds(net):
    idx = torch.randint(V, (32, T), generator=torch.Generator().manual_seed(9))
    none = torch.zeros(32, 0, dtype=torch.int64)
    texts = Texts(idx, none, none.bool(), torch.ones_like(idx, dtype=torch.bool))
    ways = {"0, 1": (0, False), "4, 1": (4, False), "1, 1": (1, False), "1, 3": (3, True)}
    return {name: bound(net, texts, 8, *way, steps=int(name[0] == "1"))["bound"] for name, way in ways.items()}


@pytest.fixture(scope="module")
def pair():
    """What is frozen, and the same computed now."""
    want, found = torch.load(FILE), {}
    net, eps_net = network(want["state"], "ce"), network(want["eps state"], "eps")
    for name, order in ORDERS.items():
        order, given = order.long().expand(B, T).clone(), inputs(name)
        order[1] = ORDERS["blocks of 4"]                # another order in one of the rows
        with torch.no_grad():
            found[f"read, {name}"] = read(net, order, **given)
        for guessed in (False, True):
            found[f"loss, {name}, {guessed}"] = lose(net, order, guessed, **given)
        found[f"eps loss, {name}"] = lose(eps_net, order, False, **given)
    found |= {f"sample, {name}": write(net, *how) for name, how in SAMPLED.items()}
    found |= {f"eps sample, {name}": write(eps_net, *SAMPLED[name]) for name in ("window", "blocks of 4", "infill")}
    return want, found | {"bounds": bounds(net)}


def difference(a, b):
    """The largest relative or absolute difference of two nested dicts of tensors and numbers."""
    if isinstance(a, dict):
        b = renamed(b) if "head.weight" in a else b
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        return max(difference(a[key], b[key]) for key in a)
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    return ((a - b).abs() / b.abs().clamp(min=1)).max().item()


@pytest.mark.parametrize("kind", ["read", "loss", "eps loss", "sample", "eps sample", "bounds"])
def test_outputs_are_those_of_the_code_before(pair, kind):
    want, found = ({name: x for name, x in part.items() if name.split(",")[0] == kind} for part in pair)
    assert want and difference(found, want) < 1e-5
