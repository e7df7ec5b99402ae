"""What the network computed before the house was rebuilt (593d480), in frozen.pt: hidden states, scores, losses, gradients, sampled
tokens and bounds of small random networks, for every kind of order, prompt, guidance and blank. Temperature 1 throughout."""
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import configurator
import sample
import train
from model import LATER, SunFish

FILE = Path(__file__).with_name("frozen.pt")
SIZE = dict(n_layer=3, n_head=2, n_embd=16, token_dim=8, block_size=12, prompt_size=6, cross_every=2, span_size=8)
V, B, T, C, P = 50, 3, 12, 8, 6
ORDERS = {
    "window": torch.zeros(T), "one at a time": torch.arange(T), "blocks of 4": torch.arange(T) // 4, "blocks of 5": torch.arange(T) // 5,
    "strided": torch.arange(T) % 4, "given prefix": torch.tensor([-1] * 5 + [0, 0, 0, 1, 1, 1, 2]),
    "given anywhere": torch.tensor([0, 1, 1, 0, -1, 2, 2, 1, -1, -1, 3, 0]),
    "example": torch.tensor([-1, -1, -1, 0, 1, 2, 3, 4, LATER, LATER, LATER, LATER]),
    "withheld": torch.tensor([LATER, LATER, LATER, 0, 0, 1, 1, 2, LATER, LATER, LATER, LATER])}
SAMPLED = {                            # span, streams, steps, guidance, tokens given at the beginning, prompt, blanks, eta
    "window": (0, 1, 20, 1.0, 0, 0, (), 1.0), "window, DDIM": (0, 1, 10, 1.0, 0, 0, (), 0.0), "window, prompt": (0, 1, 12, 2.5, 0, 4, (), 1.0),
    "blocks of 4": (4, 1, 15, 1.0, 0, 0, (), 1.0), "blocks of 5, guided": (5, 1, 18, 2.0, 3, 3, (), 0.5),
    "one at a time": (1, 1, 12, 1.0, 0, 0, (), 1.0), "one at a time, guided": (1, 1, 8, 2.0, 4, 6, (), 1.0),
    "strided": (1, 3, 4, 1.0, 0, 0, (), 1.0), "strided, guided": (1, 2, 5, 3.0, 2, 5, (), 1.0),
    "infill": (0, 1, 16, 1.0, 0, 2, (3, 4, 5, 9), 1.0), "infill in blocks": (3, 1, 15, 1.0, 0, 0, (0, 4, 5, 11), 1.0),
    "infill one at a time": (1, 1, 4, 1.0, 0, 3, (2, 3, 8, 9), 1.0)}


def network(objective="ce"):
    cfg = configurator.ModelConfig(**SIZE, objective=objective)
    torch.manual_seed(0)
    net = SunFish(cfg, V, torch.randn(V).log_softmax(0))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if not p.any() or name == "read.weight":
                p.add_(0.3 * torch.randn_like(p))
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
    past = net.look_back(net.remember(idx, order, prompt, prompt_mask, E), order)
    h = net.hidden(net.posterior_mean(x_t, level, E), level, guess, prompt, prompt_mask, past, E)
    return dict(h=h, logits=net.answer(net.features(h, x_t, level), *net.readout(E)))


def lose(net, order, guessed, idx, t, eps, guess, prompt, prompt_mask):
    """The two sums of the training loss and the length of each gradient; t is one number for the tokens of a block."""
    cfg = train.Config(**SIZE, objective=net.cfg.objective)
    t = torch.where(order == order[:, :1], cfg.timesteps, 1 + (order * 377 + 500) % cfg.timesteps)
    batch = train.Batch(idx, order, t, eps, prompt, prompt_mask, (order >= 0) & (order < LATER), B * guessed)
    net.zero_grad()
    loss, fit = train.DenoisingLoss(net, cfg)(batch)
    (loss + fit).backward()
    return dict(loss=loss.item(), fit=fit.item(), grads={name: p.grad.norm().item() for name, p in net.named_parameters() if p.grad is not None})


def write(net, span, streams, steps, guidance, given, prompt, blanks, eta):
    rng = torch.Generator().manual_seed(5)
    known = torch.tensor([i not in blanks for i in range(T)]) if blanks else torch.arange(T) < given
    canvas = torch.randint(V, (T,), generator=rng), known, torch.randint(V, (prompt,), generator=rng)
    cfg = replace(sample.Config(), span_size=span, streams=streams, steps=steps, guidance_scale=guidance, eta=eta, temperature=1.0,
                  mode="infill" if blanks else "generate", text="x" if blanks else "")
    return sample.sample(net, cfg, canvas, range(6))


def bounds(net):
    idx = torch.randint(V, (32, T), generator=torch.Generator().manual_seed(9))
    return {f"{span}, {streams}": train.measure(net, idx, 8, span, streams=streams, bands=0)["bound"] for span, streams in ((0, 1), (4, 1), (1, 1), (1, 3))}


def compute():
    """Everything that is frozen, by name."""
    net, eps_net = network(), network("eps")
    found = {"state": net.state_dict(), "eps state": eps_net.state_dict()}
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
    return found | {"bounds": bounds(net)}


@pytest.fixture(scope="module")
def pair():
    return torch.load(FILE), compute()


def differences(a, b):
    """The largest relative or absolute difference of two nested dicts of tensors and numbers."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        return max(differences(a[key], b[key]) for key in a)
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    return ((a - b).abs() / b.abs().clamp(min=1)).max().item()


@pytest.mark.parametrize("kind", ["read", "loss", "eps loss", "sample", "eps sample", "bounds"])
def test_outputs_are_those_of_the_code_before(pair, kind):
    want, got = ({name: x for name, x in part.items() if name.split(",")[0] == kind} for part in pair)
    assert want and differences(got, want) < 1e-5


if __name__ == "__main__":
    torch.save(compute(), FILE)
