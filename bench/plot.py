"""
Curves of training runs, from their log.jsonl: the loss, the bound with its standard error, and the speed, over tokens.

    python bench/plot.py --runs=out/tiny                                     # curves.png
    python bench/plot.py --runs=out/stories,out/instruct --out=both.png      # several runs, one colour each

The loss of a fitted schedule stays at half of what noise costs; it is the bound that shows learning.
"""
import glob
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import Fault, UserError, in_range, run


@dataclass(frozen=True)
class Config:
    runs: str = "out/*"              # comma list of folders of runs, or patterns for them
    out: str = "curves.png"          # picture to write: png, svg, pdf
    smooth: int = 20                 # rows of the log that the line through loss and speed is a mean of; 1 is off

    def check(self):
        in_range(self, 1, 1e9, "smooth")


def find_runs(patterns):
    """The log.jsonl of every run that the comma list names, without repetition; UserError if there is none."""
    folders = [folder for pattern in patterns.split(",") for folder in sorted(glob.glob(pattern))]
    paths = [Path(folder, "log.jsonl") for folder in dict.fromkeys(folders)]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise UserError(f"no log.jsonl in runs={patterns}; name the out_dir of a run, for example out/tiny")
    return paths


def read_log(path):
    """Columns of a log: {"loss": ([tokens], [loss]), "bound": ([tokens], [bound], [error]), ...}."""
    rows, columns = [], {"loss": [], "tokens_per_second": [], "bound": []}
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"warning: {path}: a row was cut short and is left out", file=sys.stderr)
    for row in rows:
        for name in ("loss", "tokens_per_second"):
            if name in row:
                columns[name].append((row["tokens"], row[name]))
        if "bound" in row and "tokens" in row:
            columns["bound"].append((row["tokens"], row["bound"], row["bound_error"]))
    return {name: list(zip(*found, strict=True)) for name, found in columns.items()}


def running_mean(values, n):
    """The mean of the last n values at each, or of as many as there are: as long as values."""
    return [sum(values[max(0, i - n + 1):i + 1]) / min(n, i + 1) for i in range(len(values))]


def draw(logs, out, smooth):
    """Write a picture of {name: columns} in three panels."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = {"loss": "loss, nats a token", "bound": "bound, nats a token", "tokens_per_second": "tokens a second"}
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        for number, (folder, columns) in enumerate(logs.items()):
            colour, found = f"C{number}", columns[name]
            if found and name == "bound":
                axis.errorbar(found[0], found[1], found[2], marker="o", capsize=3, color=colour, label=folder)
            elif found:
                axis.plot(found[0], found[1], color=colour, alpha=0.25, linewidth=1)
                axis.plot(found[0], running_mean(found[1], smooth), color=colour, label=folder)
        axis.set(title=label, xlabel="tokens trained on")
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    try:
        figure.savefig(out, dpi=130)
    except (OSError, ValueError) as error:
        raise Fault(f"cannot write out={out} ({error}); choose a file ending in .png, .svg or .pdf") from None
    plt.close(figure)


def main(cfg):
    paths = find_runs(cfg.runs)
    logs = {str(path.parent): read_log(path) for path in paths}
    draw(logs, cfg.out, cfg.smooth)
    for name, columns in logs.items():
        bound = "no bound yet"
        if columns["bound"]:
            bound = f"bound {columns['bound'][1][-1]:.3f} +- {columns['bound'][2][-1]:.3f}"
        print(f"{name}: {columns['loss'][0][-1] if columns['loss'] else 0:,} tokens, {bound}")
    print(cfg.out)


if __name__ == "__main__":
    run(main, Config)
