"""configurator.py: what wins, what is refused and how, how a run ends, and what --help shows."""
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT, call

import configurator
from configurator import UserError, describe, in_range, load, one_of
from model import ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig):
    n_embd: int = 64                 # width, narrower here
    lr: float = 3e-4                 # learning rate
    resume: bool = False             # go on where it stopped
    prompt: str = "a # b"            # text to continue

    def check(self):
        if self.lr <= 0:
            raise UserError(f"lr={self.lr} is not positive; try 3e-4")


def refused(*argv):
    """The message with which `argv` is refused."""
    with pytest.raises(UserError) as stop:
        load(Config, argv)
    return str(stop.value)


def test_defaults_then_files_then_command_line(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text('"""a config"""\n# a comment\nn_layer = 2 * (3 + 1)   # eight\nlr = -(-1) / 10\nprompt = "one"\n')
    two.write_text("lr = 1e-2\nn_embd = 2 ** 7\nresume = True\n")
    cfg = load(Config, ["--prompt=x=y", str(one), str(two), "--n_head", "4"])
    assert (cfg.n_layer, cfg.lr, cfg.n_embd, cfg.resume, cfg.n_head, cfg.prompt) == (8, 0.01, 128, True, 4, "x=y")
    assert load(Config, [str(two), str(one)]).lr == 0.1
    assert load(Config, []) == Config()


def test_file_names_may_have_spaces_and_no_suffix(tmp_path):
    path = tmp_path / "größe und so"
    path.write_text("n_layer = 3")
    assert load(Config, [str(path)]).n_layer == 3


@pytest.mark.parametrize("argv, name, value", [
    (["--prompt="], "prompt", ""), (["--prompt", ""], "prompt", ""), (["--prompt", "-x"], "prompt", "-x"),
    (["--prompt", "--nothing"], "prompt", "--nothing"), (["--prompt=--lr"], "prompt", "--lr"),
    (["--prompt=a b=c\nd"], "prompt", "a b=c\nd"),
    (["--n_layer=1e5"], "n_layer", 100_000), (["--n_layer=100_000"], "n_layer", 100_000),
    (["--n_layer", "-3"], "n_layer", -3), (["--n_layer=9007199254740993"], "n_layer", 2 ** 53 + 1),
    (["--lr=1"], "lr", 1.0), (["--resume=TRUE"], "resume", True), (["--resume", "false"], "resume", False),
    (["--resume"], "resume", True), (["--resume", "--lr=1"], "resume", True), (["--resume", "--lr=1"], "lr", 1.0),
    (["--lr=1", "--lr=2"], "lr", 2.0)])
def test_accepted_values(argv, name, value):
    got = getattr(load(Config, argv), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("argv, says", [
    (["--n_layers=3"], "did you mean n_layer?"), (["-lr=3"], "did you mean lr?"), (["--="], "--help"),
    (["--n_layer=1.5"], "n_layer=1.5 must be a whole number"), (["--n_layer=100,000"], "n_layer=100,000 must be"),
    (["--n_layer=1__0"], "whole number"), (["--n_layer="], "whole number"), (["--n_layer=True"], "whole number"),
    (["--lr=nan"], "lr=nan must be a finite number"), (["--lr=inf"], "finite"), (["--lr=1e999"], "finite"),
    (["--n_layer=" + 5000 * "1"], "n_layer=1111"), (["--n-layer=1"], "did you mean n_layer?"),
    (["--lr=fast"], "lr=fast must be a finite number"), (["--resume=yes"], "resume=yes must be true or false"),
    (["--resume=1"], "true or false"), (["--resume", "yes"], "cannot read yes"),
    (["--resume="], "true or false"), (["--lr"], "--lr needs a value: --lr=..."), (["--prompt", "--lr"], "needs a"),
    (["--lr=-1"], "lr=-1.0 is not positive; try 3e-4"), (["missing.py"], "missing.py: No such file"),
    (["--prompt=caf\udce9"], "is not UTF-8")])
def test_refused_arguments(argv, says):
    assert says in refused(*argv)


@pytest.mark.parametrize("text, says", [
    ("import os", ":1: import os: a config file is never run"), ("lr = 1\nlr += 1", ":2: lr += 1"),
    ("n_layer = open('x')", "n_layer = open('x'): not a plain value"), ("n_layer = [1]", "not a plain value"),
    ("n_layer = n_head", "not a plain value"), ("lr = 9 ** 9 ** 9 ** 9", "math range error"), ("lr = 1 / 0", "zero"),
    ("lr = '1'", "must be a finite number"), ("prompt = 3", "must be text in quotes"), ("prompt = None", "text"),
    ("lr = True", "finite"), ("\n\nn_layerz = 1", ":3: n_layerz is not a setting; did you mean n_layer?"),
    ("lr = = 1", ":1: invalid syntax"), ("a\0b", "null bytes"), ("lr, n_head = 1, 2", "never run"),
    ("lr = 1 + 'a'", "lr = 1 + 'a'"), ("prompt = 'a' * 99999999999", "arithmetic is for numbers"),
    ("lr = " + 3000 * "-" + "1", ":1: "), ("lr = " + 1100 * "-" + "1", "lr is too deep"),
    ("lr = " + 200_000 * "(" + "1", ":1: "), ("n_layer = " + 5000 * "1", "4300 digits"),
    ("n_layer = " + 2000 * "1", "n_layer=1111")])
def test_refused_files(tmp_path, text, says):
    path = tmp_path / "bad.py"
    path.write_text(text)
    err = refused(str(path))
    assert says in err and str(path) in err


def test_missing_file_lists_the_ones_there_are(tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "micro.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert "there are config/micro.py" in refused("config/mikro.py")
    assert "config is no regular file" in refused("config")


def test_a_pipe_a_huge_file_and_a_text_in_the_place_of_a_config_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is no regular file" in refused(str(tmp_path / "pipe"))
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2 ** 21)
    assert "has 2,097,152 bytes" in refused(str(tmp_path / "huge"))
    assert "text is given as --prompt='Once upon a time'" in refused("Once upon a time")
    assert "cannot read a\0b" in refused("a\0b")


def test_half_a_character_in_a_config_file_is_refused(tmp_path):
    (tmp_path / "half.py").write_text(r"prompt = '\ud800'")
    assert "is not UTF-8" in refused(str(tmp_path / "half.py"))


@pytest.mark.parametrize("name, hint", [("iters", "did you mean max_steps?"), ("top_k", "--temperature"),
                                        ("max-new-tokens", "did you mean seq_len?"), ("zzz", "--help lists them all")])
def test_what_others_call_a_setting_is_known(name, hint):
    kinds = dict(max_steps=int, seq_len=int, temperature=float)
    assert hint in str(configurator.unknown(name, kinds, f"--{name}"))


@pytest.mark.parametrize("content, says", [
    ([1], "x.json holds [1] where names and values should be"),
    ({}, "x.json: n is missing"),
    ({"n": "3"}, "n is '3'"), ({"n": 0}, "n is 0"), ({"n": True}, "n is True"), ({"n": 3}, "rate is missing"),
    ({"n": 3, "rate": math.nan}, "rate is nan, and should be float from 0 to 1"),
    ({"n": 3, "rate": 1, "name": "a" * 999}, None), ({"n": 3, "rate": 1, "name": 999 * [0]}, "0, 0,..., and")])
def test_what_is_read_from_outside_has_the_fields_it_should(content, says):
    rules = dict(n=(int, 1, 9), rate=(float, 0, 1), name=str)
    if says is None:
        return configurator.check_fields("x.json", content, **rules)
    with pytest.raises(UserError) as caught:
        configurator.check_fields("x.json", content, **rules)
    assert says in str(caught.value) and len(str(caught.value)) < 200


def test_a_config_file_is_not_run(tmp_path):
    path = tmp_path / "evil.py"
    path.write_text(f"__import__('pathlib').Path({str(tmp_path / 'owned')!r}).touch()")
    refused(str(path))
    assert not (tmp_path / "owned").exists()


def test_the_settings_that_were_given_are_known(tmp_path):
    (tmp_path / "one.py").write_text("lr = 3e-4")
    assert load(Config, [str(tmp_path / "one.py"), "--n_head=8"]).given == {"lr", "n_head"}    # defaults too


def test_values_out_of_range_and_unknown_choices_are_named():
    in_range(Config(), 0, 64, "n_embd", "lr")
    one_of(Config(), "objective", "ce", "eps")
    with pytest.raises(UserError, match=r"^n_embd=64 is out of range; choose 1 to 63$"):
        in_range(Config(), 1, 63, "n_head", "n_embd")
    with pytest.raises(UserError, match="^objective=ce is unknown; use one of a, b$"):
        one_of(Config(), "objective", "a", "b")


SCRIPT = '''"""A script."""
import dataclasses
import sys
sys.path.insert(0, {root!r})
from configurator import Fault, UserError, run

@dataclasses.dataclass(frozen=True)
class Config:
    n: int = 0     # a number

def main(cfg):
    print("begun")
    {line}

if __name__ == "__main__":
    run(main, Config)
'''


@pytest.mark.parametrize("line, args, code, err", [
    ("return None", [], 0, ""), ("return 130", [], 130, ""), ("raise BrokenPipeError", [], 141, ""),
    ("raise UserError('no\\nroom')", [], 2, "error: no room\n"), ("raise Fault('full')", [], 1, "error: full\n"),
    ("raise KeyboardInterrupt", [], 130, "error: interrupted\n"),
    ("open('/nowhere/a')", [], 1, "error: /nowhere/a: No such file or directory; mend that, or choose another\n"),
    ("pass", ["--n=x"], 2, "error: --n=x must be a whole number, like 100_000 or 1e5\n")])
def test_a_run_ends_with_one_line_and_its_code(tmp_path, line, args, code, err):
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), line=line))
    done = subprocess.run([sys.executable, tmp_path / "script.py", *args], capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (code, err, "" if args else "begun\n")


@pytest.mark.parametrize("name", ["sample", "train"])
def test_an_interrupt_while_torch_is_imported_is_one_line(tmp_path, name):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    code = f"import sys; sys.path[:0] = {[str(tmp_path), str(ROOT)]}; import {name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr == "error: interrupted\n"


def test_a_bug_keeps_its_traceback(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), line="raise ValueError(cfg.n)"))
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_describe_shows_what_was_changed():
    assert describe(Config()) == "all settings at default"
    assert describe(Config(lr=0.1, prompt="two words")) == "lr=0.1 prompt='two words'"


def test_help_shows_every_setting_once(capsys):
    with pytest.raises(SystemExit) as stop:
        load(Config, ["--lr=oops", "--help"])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert stop.value.code == 0 and lines[0] == __doc__
    rows = [line.split(maxsplit=1) for line in lines if line.startswith("  --")]
    assert len(rows) == len(Config.__dataclass_fields__)
    shown = dict(rows[:-1])
    assert shown["--n_embd=64"] == "width, narrower here" and shown["--n_head=8"] == "attention heads"
    assert re.search(r"^  --prompt='a # b' +text to continue$", out, re.M)
    assert len({line.index(text) for line, text in zip(lines[-3:], ("learn", "go on", "text"), strict=True)}) == 1


@pytest.mark.parametrize("script, setting", [("train", "--batch_tokens=65536"), ("sample", "--temperature=0.8"),
                                             ("prepare_fineweb", "--shard_tokens=100000000")])
def test_help_of_a_script_opens_with_its_docstring(script, setting):
    out = call([f"{script}.py", "--help"]).stdout
    about = sys.modules[script].__doc__.strip().split("\n\n")[0]
    assert out.startswith(about + "\n") and setting in out
