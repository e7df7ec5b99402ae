"""
One page on which several denoisings can be watched: the window, blocks, the autoregressive limit, a blank.

    python bench/page.py --prompt="Once upon a time" --text="She had a [MASK] and was very happy."

Each is written with the same seed by the same network; the number of its calls stands beside it.
"""
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import UserError, in_range, run
from data import write_file
from generate import length_costs, lengths_tried
from sample import check_page, load, page


@dataclass(frozen=True)
class Config:
    checkpoint: str = ""             # network that writes; "": pretrained/simple
    prompt: str = "A: What is your favorite movie?"      # text to continue
    text: str = "A: What did you think of the [MASK]? B: I thought it was very funny."     # text with one blank
    seq_len: int = 32                # tokens to write after the prompt; 0 is all that the window leaves
    seed: int = 2
    temperature: float = 0.8         # below 1 is safer and duller
    out: str = "denoisings.html"     # file of the page

    def check(self):
        in_range(self, 1, 1e9, "seed")
        check_page(Path(self.out))
        if not self.prompt.strip():
            raise UserError("prompt is empty; give a text to continue")


def kinds(cfg):
    """(title, settings) of each recording."""
    after = dict(prompt=cfg.prompt, seq_len=cfg.seq_len)
    yield "the whole window, from noise, 32 steps", dict(after, block_length=0, steps=32, revisions=0)
    yield "the whole window, read again and revised", dict(after, block_length=0, steps=32)
    yield "blocks of 16, 16 steps each", dict(after, block_length=16, steps=16, revisions=0)
    yield "blocks of 16, 4 steps each, read again and revised", dict(after, block_length=16)
    yield "blocks of 16, twice as heedful of the prompt (guidance 2)", dict(after, block_length=16, guidance_scale=2.0)
    yield "one token at a time: the autoregressive limit", dict(after, block_length=1)
    yield "a blank", dict(mode="infill", text=cfg.text)


def command(cfg, settings):
    """The command line that writes the same."""
    settings = dict(checkpoint=cfg.checkpoint, **settings) if cfg.checkpoint else settings
    return shlex.join(["python", "sample.py", *(f"--{name}={value}" for name, value in settings.items())])


def costs_of_lengths(writer, cfg):
    """What each length of an open blank costs, in words."""
    task, lengths = writer.task(cfg), lengths_tried(writer.model.cfg)
    make, = writer.makers(cfg, task.canvas, [0])
    costs = length_costs(writer.model, task.pieces, task.pieces.index(0), lengths, cfg, make)
    return "nats a token behind it: " + ", ".join(f"{n}: {cost:.2f}" for n, cost in zip(lengths, costs, strict=True))


def record(writer, cfg, title, settings):
    """A recording of one text: what viewer.html shows."""
    settings = dict(settings, seed=cfg.seed, temperature=cfg.temperature)
    steps, calls, how = [], [], writer.config(**settings)
    hook = writer.model.register_forward_hook(lambda *_: calls.append(1))
    text = writer.one(how, steps.append)
    hook.remove()
    tried = f"; {costs_of_lengths(writer, how)}" if "[MASK]" in how.text else ""
    print(f"{title}, {len(calls)} network calls: {' '.join(text.split())}")
    about = f"{command(cfg, settings)}; {len(calls)} network calls{tried}; {writer.content['data']['label']}"
    return dict(title=f"{title}: {len(calls)} network calls", about=about, steps=steps)


def main(cfg):
    writer = load(cfg.checkpoint, "cpu", "float32")
    recordings = [record(writer, cfg, *kind) for kind in kinds(cfg)]
    write_file(Path(cfg.out), page(recordings))
    print(f"{cfg.out}: {len(recordings)} texts to watch, in any browser")


if __name__ == "__main__":
    run(main, Config)
