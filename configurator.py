"""
Settings for the scripts, and how a run ends.

python train.py config/micro.py --learning_rate=3e-4 --device cpu

A script declares one frozen dataclass of int, float, bool and str fields, one line a setting, and calls `run(main,
Config)`. Settings come from the dataclass, then from config files, then from the command line; the later one wins.
Config files hold `name = value` lines and are read, never run. A mistake ends the script with one line and exit code 2,
a fault with exit code 1.
"""
import ast
import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import operator
import os
import re
import shlex
import signal
import sys
import time
import typing
from pathlib import Path

KINDS = {int: "a whole number, like 100_000 or 1e5", float: "a finite number, like 0.1 or 3e-4", bool: "true or false",
         str: "text in quotes"}
HINTS = {"lr": "learning_rate", "max_new_tokens": "seq_len", "max_tokens": "seq_len", "length": "seq_len",
         "max_length": "seq_len", "n": "num_samples", "model": "checkpoint", "iters": "max_steps",
         "epochs": "max_steps", "context_length": "block_size", "output": "out_dir"}    # what others call it
CUTS = {"top_k", "top_p", "greedy", "do_sample"}                # ways to cut off unlikely tokens; there are none here
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Pow: math.pow}    # 9 ** 9 ** 9 overflows at once as floats


def say_interrupted(kind, error, trace):
    """One line instead of a traceback when Ctrl-C comes while libraries are being imported."""
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = say_interrupted


class UserError(Exception):
    """A mistake of the user: what, which value, what to do next. `run` prints it in one line; exit code 2."""


class Fault(Exception):
    """A fault at run time, such as a full disk. `run` prints it in one line; exit code 1."""


def run(main, Config):
    """Call main(settings) and end the program with its exit code; the only place that catches UserError and Fault, and
    what a file system says of a name or of itself."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(line_buffering=True, errors="replace")       # a log or a pipe gets each line at once
    try:
        code = main(load(Config))
    except UserError as error:
        code = say_error(error, 2)
    except Fault as error:
        code = say_error(error, 1)
    except KeyboardInterrupt:
        code = say_error("interrupted", 130)
    except BrokenPipeError:                             # the reader, such as head, has seen enough
        os._exit(141)
    except OSError as error:
        code = say_error(f"{error.filename or 'a file'}: {error.strerror or error}; mend that, or choose another", 1)
    sys.exit(code)


def say_error(error, code):
    """Print an error in one line; returns the code. Under torchrun the first process of a machine is the first to end,
    and then torchrun ends the others."""
    if int(os.environ.get("LOCAL_RANK", "0")):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    print("error:", printable(str(error), 1000), file=sys.stderr, flush=True)
    return code


def read_file(path, most=2**30):
    """The bytes of a regular file, at most so many (reading a pipe would never end); else UserError."""
    try:
        size = os.path.getsize(path)
        if not os.path.isfile(path):
            raise UserError(f"{path} is no regular file; name another")
        if size > most:
            raise UserError(f"{path} has {size:,} bytes, and at most {most:,} are read; name another")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:              # ValueError: a NUL in the name
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None


@contextlib.contextmanager
def replacing(path):
    """A file to be written in the place of `path`: a crash leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def parse_json(text):
    """The value of a text, or bytes, of JSON; ValueError, and nothing else, if it is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets within brackets without end") from None


def check_fields(where, content, **fields):
    """Raise UserError unless `content` is a dict with each of these fields, of a type or (type, lowest, highest)."""
    if type(content) is not dict:
        raise UserError(f"{where} holds {shorten(content)} where names and values should be")
    for name, rule in fields.items():
        kind, *limits = rule if type(rule) is tuple else (rule,)
        if name not in content:
            raise UserError(f"{where}: {name} is missing")
        value = content[name]
        fits = isinstance(value, (int, float) if kind is float else kind) and (type(value) is bool) == (kind is bool)
        if not fits or limits and not limits[0] <= value <= limits[1]:
            span = f" from {limits[0]:g} to {limits[1]:g}" if limits else ""
            raise UserError(f"{where}: {name} is {shorten(value)}, and should be {kind.__name__}{span}")


def shorten(value):
    """The repr of a value, cut for a message."""
    return printable(repr(value), 60)


def printable(text, most=300):
    """Text in one line of at most so many characters, without control characters."""
    text = "".join(char if char.isprintable() else " " for char in text)
    return text if len(text) <= most else f"{text[:most - 3]}..."


def in_range(cfg, low, high, *names):
    """Raise UserError unless low <= value <= high for each of these settings."""
    for name in names:
        if not low <= getattr(cfg, name) <= high:
            raise UserError(f"{name}={getattr(cfg, name)} is out of range; choose {low:g} to {high:g}")


def one_of(cfg, name, *choices):
    """Raise UserError unless the setting is one of the choices."""
    if getattr(cfg, name) not in choices:
        raise UserError(f"{name}={getattr(cfg, name)} is unknown; use one of {', '.join(choices)}")


def load(Config, argv=None):
    """An instance of the dataclass `Config` from its defaults, the config files and the command line.

    Calls its method `check`, if there is one. The names of the settings that were given are kept in a set, `given`.
    """
    argv = sys.argv[1:] if argv is None else argv
    kinds = typing.get_type_hints(Config)
    assert set(kinds.values()) <= set(KINDS), f"a setting is int, float, bool or str: {kinds}"
    if "-h" in argv or "--help" in argv:
        print(help_text(Config))
        raise SystemExit(0)
    files, from_argv = read_args(argv, kinds)
    settings = {}
    for path in files:
        settings.update(read_config(path, kinds))
    settings.update(from_argv)
    for name, value in settings.items():
        if re.search("[\ud800-\udfff]", str(value)):
            raise UserError(f"{name}={shorten(value)} is not UTF-8; write it in UTF-8")
    cfg = Config(**settings)
    object.__setattr__(cfg, "given", frozenset(settings))           # the dataclass is frozen, and this is no setting
    if hasattr(cfg, "check"):
        cfg.check()
    return cfg


def describe(cfg):
    """The settings that differ from their defaults, in one line."""
    changed = [(name, value) for name, value in dataclasses.asdict(cfg).items() if value != getattr(type(cfg), name)]
    return " ".join(f"{name}={shlex.quote(str(value))}" for name, value in changed) or "all settings at default"


def read_args(argv, kinds):
    """(config files, settings) of a command line with `--key=value`, `--key value` and bare `--flag`."""
    files, settings = [], {}
    args = list(argv)
    while args:
        arg = args.pop(0)
        if not arg.startswith("-"):
            files.append(arg)
            continue
        name, equals, text = arg[2:].partition("=")
        if not arg.startswith("--") or name not in kinds:
            raise unknown(arg.lstrip("-").split("=")[0], kinds, arg)
        if not equals:
            text = next_value(name, args, kinds)
        settings[name] = convert(name, text, kinds[name], "--")
    return files, settings


def next_value(name, args, kinds):
    """The value of `--name value`, taken from args; a bare flag is true."""
    is_value = args and not (args[0].startswith("--") and args[0][2:].split("=")[0] in kinds)
    if kinds[name] is bool and not (is_value and args[0].lower() in ("true", "false")):
        return "true"
    if not is_value:
        raise UserError(f"--{name} needs a value: --{name}=...")
    return args.pop(0)


def read_config(path, kinds):
    """The settings in a config file, as a dict."""
    try:
        source = read_file(path, 2**20)
    except UserError as error:
        known = " ".join(sorted(map(str, Path("config").glob("*.py"))))
        hint = f"there are {known}" if known else "see --help"
        if "prompt" in kinds and not path.endswith(".py"):
            hint = f"text is given as --prompt={shlex.quote(path)}, all of it in quotes"
        raise UserError(f"{error}; {hint}") from None
    try:
        lines = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:     # NUL bytes; signs without end
        line, what = getattr(error, "lineno", 1), getattr(error, "msg", error)
        raise UserError(f"{path}:{line}: {what}; a config file holds lines of name = value") from None
    lines = [line for line in lines if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
    return dict(read_line(line, f"{path}:{line.lineno}: ", kinds) for line in lines)            # without docstrings


def read_line(line, where, kinds):
    """(name, value) of one line of a config file; `where` opens the error's message."""
    if not (isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name)):
        text = ast.unparse(line).splitlines()[0]
        raise UserError(f"{where}{text}: a config file is never run; write lines of name = value")
    name = line.targets[0].id
    if name not in kinds:
        raise unknown(name, kinds, where + name)
    try:
        value = evaluate(line.value)
    except RecursionError:
        raise UserError(f"{where}{name} is too deep; write {KINDS[kinds[name]]}") from None
    except (ValueError, TypeError, ArithmeticError) as error:
        text = f"{name} = {ast.unparse(line.value)}"
        raise UserError(f"{where}{text[:100]}: {error}; write {KINDS[kinds[name]]}") from None
    if isinstance(value, str) != (kinds[name] is str):
        raise UserError(f"{where}{name} = {value!r} must be {KINDS[kinds[name]]}")
    return name, convert(name, str(value), kinds[name], where)


def evaluate(node):
    """The value of a constant or of arithmetic on constants; ValueError for anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -evaluate(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = evaluate(node.left), evaluate(node.right)
        if not isinstance(left, (int, float)) or not isinstance(right, (int, float)):   # "a" * 10 ** 12
            raise ValueError("arithmetic is for numbers")
        return OPERATORS[type(node.op)](left, right)
    raise ValueError("not a plain value")


def convert(name, text, kind, where):
    """`text` as a value of type `kind`; `where` opens the error's message."""
    if kind is str:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is int and re.fullmatch(r"[-+]?\d+(_\d+)*", text) and len(text) < 100:
        return int(text)                            # not through a float: exact beyond 2 ** 53
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if kind is bool or not math.isfinite(number) or kind is int and not number.is_integer():
        raise UserError(f"{where}{name}={shorten(text)[1:-1]} must be {KINDS[kind]}")
    return kind(number)


def unknown(name, kinds, what):
    """The UserError for a name that is not a setting, with the nearest one."""
    plain = name.lower().replace("-", "_")
    known = HINTS.get(plain)
    close = [known] if known in kinds else difflib.get_close_matches(plain, kinds, 1)
    hint = f"did you mean {close[0]}?" if close else "--help lists them all"
    if plain in CUTS and "temperature" in kinds:
        hint = "a lower --temperature is what keeps a text safe here"
    return UserError(f"{what[:200]} is not a setting; {hint}")


def help_text(Config):
    """The first paragraph of the script's docstring, then every setting with its default and its comment."""
    comments = {}
    for base in Config.__mro__[-2::-1]:             # without object, which has no source
        line = r"""^\s+(\w+)\s*:\s*\w+\s*=(?:"[^"\n]*"|'[^'\n]*'|[^#"'\n])*#\s*(.*)$"""
        comments.update(re.findall(line, inspect.getsource(base), re.MULTILINE))
    rows = {}
    for field in dataclasses.fields(Config):
        default = shlex.quote(str(field.default)) if field.default != "" else ""
        rows[f"  --{field.name}={default}"] = comments.get(field.name, "")
    width = max(map(len, rows)) + 3
    about = inspect.cleandoc(sys.modules[Config.__module__].__doc__ or "").split("\n\n")[0]
    return "\n".join([about, "", "settings (config files override these, --name=value overrides both):",
                      *(f"{row:{width}}{comment}".rstrip() for row, comment in rows.items())])
