"""Settings for the scripts: a frozen dataclass, then config files, then the command line; the later one wins.

    python train.py config/micro.py --lr=3e-4 --device cpu

A script declares one dataclass of int, float, bool and str fields, one line a setting, and calls `load(Config)`. Config
files hold `name = value` lines and are read, never run. A mistake ends the script with one line and exit code 2.
"""
import ast
import dataclasses
import difflib
import inspect
import math
import operator
import os
import re
import shlex
import signal
import sys
import time
import typing
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelConfig:
    # what a checkpoint needs to be used; here and not in model.py, so that --help does not wait for torch
    n_layer: int = 8                 # transformer blocks
    n_head: int = 8                  # attention heads
    n_embd: int = 512                # width of the trunk
    token_dim: int = 136             # width C of a token vector, the space that is diffused
    block_size: int = 512            # tokens in a window
    prompt_size: int = 64            # most tokens of prompt that cross-attention sees
    span_size: int = 8               # most tokens that are written together, from left to right; 0 is the whole window
    cross_every: int = 1             # cross-attention to the prompt in every n-th block
    objective: str = "ce"            # ce, cross-entropy of the token; eps, squared error of the noise
    prompt_table: str = "learned"    # vectors of the prompt's tokens: learned, those that are diffused; gpt2, GPT-2's own, frozen
    schedule: str = "gumbel"         # gumbel (fitted while training), linear, cosine
    timesteps: int = 1000            # noise levels in the schedule
    beta_start: float = 1e-4         # first and
    beta_end: float = 0.02           # last beta of schedule=linear at 1000 timesteps

    def check(self):
        """Raise ValueError, in one line that says what to do, for a network that cannot be built."""
        for name in "n_layer n_head n_embd token_dim block_size prompt_size cross_every beta_start".split():
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.n_embd % (2 * self.n_head):
            near = max(1, round(self.n_embd / (2 * self.n_head))) * 2 * self.n_head
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of 2 * n_head={2 * self.n_head}; try {near}")
        if self.cross_every > self.n_layer:
            raise ValueError(f"cross_every={self.cross_every} is more than n_layer={self.n_layer}: no block would see the prompt; "
                             f"try {self.n_layer}")
        if not 0 <= self.span_size <= self.block_size:
            raise ValueError(f"span_size={self.span_size} is not between 0 (the whole window) and block_size={self.block_size}")
        if self.timesteps < 2:
            raise ValueError(f"timesteps={self.timesteps} is less than 2; 1000 is usual")
        if not self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_end={self.beta_end} is not between beta_start={self.beta_start} and 1; try 0.02")
        for name, known in (("objective", ("ce", "eps")), ("prompt_table", ("learned", "gpt2")),
                            ("schedule", ("gumbel", "linear", "cosine"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)} is unknown; use one of {', '.join(known)}")


KINDS = {int: "a whole number, like 100_000 or 1e5", float: "a finite number, like 0.1 or 3e-4", bool: "true or false",
         str: "text in quotes"}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Pow: math.pow}    # 9 ** 9 ** 9 overflows at once as floats


def fail(message, code=2) -> typing.NoReturn:
    """End the program with one line on stderr: code 2 is the user's mistake, 1 a fault at run time.

    Most mistakes are those of all the processes that torchrun started on a machine: the first one speaks at once, and
    torchrun then ends the others before they repeat it.
    """
    if int(os.environ.get("LOCAL_RANK", "0")):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    print("error:", " ".join(str(message).splitlines()), file=sys.stderr, flush=True)
    raise SystemExit(code)


def load(Config, argv=None):
    """An instance of the dataclass `Config` from its defaults, the config files and the command line, in this order.

    If `Config` has a method `check`, it is called, and a ValueError it raises becomes the one-line error. What was set is kept
    as a frozenset of names, `given`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    hints = typing.get_type_hints(Config)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(Config)}
    assert set(kinds.values()) <= set(KINDS), f"a setting is int, float, bool or str: {kinds}"
    if "-h" in argv or "--help" in argv:
        print(help_text(Config))
        raise SystemExit(0)
    files, given = split_args(argv, kinds)
    settings = {}
    for path in files:
        settings.update(read_config(path, kinds))
    settings.update({name: convert(name, text, kinds[name], "--") for name, text in given})
    cfg = Config(**settings)
    object.__setattr__(cfg, "given", frozenset(settings))           # a frozen dataclass, and no setting
    try:
        if hasattr(cfg, "check"):
            cfg.check()
    except ValueError as error:
        fail(error)
    return cfg


def describe(cfg):
    """The settings that differ from their defaults, in one line."""
    values = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default}
    return " ".join(f"{name}={shlex.quote(str(value))}" for name, value in values.items()) or "all settings at default"


def split_args(argv, kinds):
    """Config files and (name, text) pairs, each in the order given; knows `--key=value` and `--key value`."""
    files, given, args = [], [], list(argv)
    while args:
        arg = args.pop(0)
        if not arg.startswith("-"):
            files.append(arg)
            continue
        name, equals, text = arg[2:].partition("=")
        if not arg.startswith("--") or name not in kinds:
            unknown(arg.lstrip("-").split("=")[0], kinds, arg)
        if not equals:                              # the next word is the value, unless it is a setting itself
            if not args or args[0].startswith("--") and args[0][2:].split("=")[0] in kinds:
                fail(f"{arg} needs a value: {arg}={'True' if kinds[name] is bool else '...'}")
            text = args.pop(0)
        given.append((name, text))
    return files, given


def read_config(path, kinds):
    """The settings of one config file as a dict; the file is parsed, never run."""
    try:
        lines = ast.parse(Path(path).read_bytes()).body
    except OSError as error:
        known = " ".join(sorted(map(str, Path("config").glob("*.py"))))
        fail(f"cannot read config file {path}: {error.strerror}; " + (f"there are {known}" if known else "see --help"))
    except (SyntaxError, ValueError) as error:      # ValueError: NUL bytes
        line = getattr(error, "lineno", 1)
        fail(f"{path}:{line}: {getattr(error, 'msg', error)}; a config file holds lines of name = value")
    settings = {}
    for line in lines:
        where = f"{path}:{line.lineno}: "
        if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            continue                                # a docstring
        if not (isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name)):
            fail(f"{where}{ast.unparse(line).splitlines()[0]}: a config file is never run; write lines of name = value")
        name = line.targets[0].id
        if name not in kinds:
            unknown(name, kinds, where + name)
        try:
            value = evaluate(line.value)
        except (ValueError, TypeError, ArithmeticError) as error:
            fail(f"{where}{name} = {ast.unparse(line.value)}: {error}; write {KINDS[kinds[name]]}")
        if isinstance(value, str) != (kinds[name] is str):
            fail(f"{where}{name} = {value!r} must be {KINDS[kinds[name]]}")
        settings[name] = convert(name, str(value), kinds[name], where)
    return settings


def evaluate(node):
    """The value of a constant or of arithmetic on constants; ValueError for anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -evaluate(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
    raise ValueError("not a plain value")


def convert(name, text, kind, where):
    """`text` as a value of type `kind`; `where` opens the message: "--", or a file and its line."""
    if kind is str:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is int and re.fullmatch(r"[-+]?\d+(_\d+)*", text):
        return int(text)                            # not through a float: exact beyond 2 ** 53
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if kind is bool or not math.isfinite(number) or kind is int and not number.is_integer():
        fail(f"{where}{name}={text} must be {KINDS[kind]}")
    return kind(number)


def unknown(name, kinds, what):
    close = difflib.get_close_matches(name, kinds, 1, cutoff=0.4)
    fail(f"{what} is not a setting; " + (f"did you mean {close[0]}?" if close else "--help lists them all"))


def help_text(Config):
    """The first paragraph of the script's docstring, then every setting with its default and its comment."""
    comments = {}
    for base in Config.__mro__[-2::-1]:             # not object, which comes last and has no source
        line = r"""^\s+(\w+)\s*:\s*\w+\s*=(?:"[^"\n]*"|'[^'\n]*'|[^#"'\n])*#\s*(.*)$"""
        comments.update(re.findall(line, inspect.getsource(base), re.MULTILINE))
    fields = dataclasses.fields(Config)
    rows = [f"  --{f.name}={shlex.quote(f.default) if isinstance(f.default, str) else f.default}" for f in fields]
    width = max(map(len, rows)) + 3
    table = [f"{row:{width}}{comments.get(f.name, '')}".rstrip() for row, f in zip(rows, fields, strict=True)]
    about = inspect.cleandoc(sys.modules[Config.__module__].__doc__ or "").split("\n\n")[0]
    return "\n".join([about, "", "settings (config files override these, --name=value overrides both):", *table])
