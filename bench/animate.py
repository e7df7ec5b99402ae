"""
A moving picture of a text that is denoised, as an SVG that a README or a slide can show.

    python bench/animate.py --prompt="Once upon a time there was a girl" --out=denoising.svg

Bold is given, dots are noise, and the fainter a word the less sure the network is of it.
"""
import sys
import textwrap
from dataclasses import dataclass
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import in_range, run
from data import write_file
from generate import Sampling
from sample import load

COLUMNS, LINE, CHAR = 84, 24, 8.43       # characters in a line; height of a line and width of a character in pixels
SECONDS, PAUSE = 0.3, 3.0                # a step stands so long, the last one longer
STYLE = """text { font: 14px ui-monospace, Menlo, Consolas, monospace; white-space: pre; fill: #1c2733 }
.given { font-weight: bold } .noise { fill: #b4bec8 } .where { fill: #5b6875 }
rect { fill: #fff; stroke: #d5dce3 }
@media (prefers-color-scheme: dark) { text { fill: #e8edf2 } .noise { fill: #55616d } .where { fill: #9fb0c0 }
rect { fill: #14191f; stroke: #37424d } }"""


@dataclass(frozen=True)
class Config(Sampling):
    checkpoint: str = ""                 # network that writes; "": pretrained/simple
    prompt: str = "A: What is your favorite movie?"                     # text to continue
    text: str = ""                       # in its place a text with [MASK] or [MASK:n], to be filled in
    seq_len: int = 40                    # tokens to write after the prompt; 0 is all that the window leaves
    seed: int = 2
    out: str = "denoising.svg"           # file of the picture

    def check(self):
        super().check()
        in_range(self, 1, 1e9, "seed")


def lines_of(words):
    """Words (token, sure) in lines of at most COLUMNS characters: lists of (characters, class, opacity)."""
    lines, width = [[]], 0
    for token, sure in words:
        kind = {None: "given", -1: "noise"}.get(sure, "word")
        opacity = 1.0 if kind != "word" else round(0.25 + 0.75 * sure, 2)
        for number, part in enumerate((" ..." if kind == "noise" else token).split("\n")):
            if (number and width) or width + len(part) > COLUMNS:           # no blank lines
                lines.append([])
                width = 0
            part = part if width else part.lstrip()
            lines[-1].append((part, kind, opacity))
            width += len(part)
    return lines


def frame(number, total, noise, words):
    """The text after a step, as SVG; a class of its own shows it in its time."""
    bar = "#" * round(20 * noise)
    rows = [f'<text class="where" x="16" y="{LINE}">step {number:3d} of {total}   noise {bar:.<20} {noise:.2f}</text>']
    for y, line in enumerate(lines_of(words), 2):
        spans = "".join(f'<tspan class="{kind}"' + f' opacity="{opacity}"' * (opacity < 1) + f">{escape(token)}</tspan>"
                        for token, kind, opacity in line)
        rows.append(f'<text x="16" y="{LINE * y + 6}">{spans}</text>')
    return f'<g class="f" id="f{number}">' + "".join(rows) + "</g>"


def picture(steps):
    """The steps that a Watch kept, one after the other and again, as SVG."""
    first = [(token, None if sure is None else -1) for token, sure in steps[0][1]]
    shown = [(1.0, first), *[(noise, words) for noise, words, _ in steps]]
    total, length = len(steps), SECONDS * len(shown) + PAUSE
    height = LINE * (max(len(lines_of(words)) for _, words in shown) + 2)
    rules = []
    for i in range(len(shown)):
        end = length if i == total else SECONDS * (i + 1)
        rules.append(f"@keyframes k{i} {{ 0%, {100 * SECONDS * i / length:.3f}% {{ opacity: 0 }} "
                     f"{100 * SECONDS * i / length + 0.001:.3f}%, {100 * end / length - 0.001:.3f}% {{ opacity: 1 }} "
                     f"{100 * end / length:.3f}%, 100% {{ opacity: 0 }} }} #f{i} {{ animation-name: k{i} }}")
    rules.append(f".f {{ animation-duration: {length:.2f}s; animation-iteration-count: infinite; "
                 "animation-timing-function: step-end; opacity: 0 }")
    frames = [frame(i, total, *step) for i, step in enumerate(shown)]
    width = round(32 + CHAR * COLUMNS)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-label="a text while it is denoised">', "<style>", STYLE, *rules, "</style>",
        f'<rect width="{width - 1}" height="{height - 1}" x=".5" y=".5" rx="8"/>', *frames, "</svg>", ""])


def main(cfg):
    writer, steps = load(cfg.checkpoint, "cpu", "float32"), []
    kind = dict(mode="infill", text=cfg.text) if cfg.text else dict(prompt=cfg.prompt, seq_len=cfg.seq_len)
    how = {name: getattr(cfg, name) for name in cfg.given if name in Sampling.__dataclass_fields__}
    text = writer.one(writer.config(**how, **kind, seed=cfg.seed), steps.append)
    write_file(Path(cfg.out), picture(steps).encode())
    print(textwrap.shorten(f"{cfg.out}: {len(steps)} steps, {Path(cfg.out).stat().st_size:,} bytes: {text}", 200))


if __name__ == "__main__":
    run(main, Config)
