"""What README.md and bench/RESULTS.md say about commands, settings, files, functions, tests and lengths is so."""
import ast
import dataclasses
import importlib
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "bench" / "RESULTS.md").read_text()


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120


def test_every_flag_of_every_command_exists():
    commands = re.findall(r"((?:train|sample|prepare_fineweb)\.py)([^\n`&]*)", README)
    assert len(commands) > 15
    for script, rest in commands:
        known = {field.name for field in dataclasses.fields(importlib.import_module(script[:-3]).Config)}
        unknown = set(re.findall(r"--(\w+)", rest)) - known - {"help"}
        assert not unknown, (script, unknown)
        for config in re.findall(r"config/\w+\.py", rest):
            assert (ROOT / config).exists(), config


@pytest.mark.parametrize("name", ["diffusion", "model", "train", "generate", "data", "checkpoint"])
def test_every_function_named_exists(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    named = set(re.findall(rf"`{name}\.(\w+)[`(]", README + RESULTS)) - {"py"}
    assert named <= defined, named - defined


def test_every_setting_in_the_config_files_is_one():
    from train import Config
    known = {field.name for field in dataclasses.fields(Config)}
    for path in (ROOT / "config").glob("*.py"):
        names = {node.targets[0].id for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)}
        assert names <= known, (path, names - known)


def test_every_file_is_as_long_as_the_readme_says():
    rows = re.findall(r"\| `(\w+\.py)` \| ([\d,]+) \|", README)
    assert len(rows) == 11
    for name, said in rows:
        lines = len((ROOT / name).read_text().splitlines())
        assert abs(lines - int(said.replace(",", ""))) <= 5, (name, lines, said)


def test_the_training_step_of_the_readme_is_that_of_train():
    step = re.search(r"```python\n(.*?)```", README, re.S)[1]
    source = [line.split("#")[0].strip() for line in (ROOT / "train.py").read_text().splitlines()]
    for line in step.splitlines():
        assert line.split("#")[0].strip() in source, line


def test_the_python_of_the_readme_writes(capsys):
    """As it stands there, but for a seed, with the network of the repository: a dialogue, and a blank filled."""
    lines, = (code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "from sample import load" in code)
    assert len(lines.splitlines()) <= 5
    exec(lines.replace("steps=16)", "steps=16, seed=1)").replace('funny.")', 'funny.", seed=1)'), {})
    said, _, filled = capsys.readouterr().out.strip().rpartition("A: What did you think of the ")
    assert re.fullmatch(r"[^\[\]]+\? B: I thought it was very funny\.", filled)
    assert said.startswith("B: ") and said.count("\nA: ") > 1


def test_every_test_named_exists():
    defined = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", README + RESULTS))
    missing = [name for name in named if f"def {name}(" not in defined and not (ROOT / "tests" / f"{name}.py").exists()]
    assert len(named) > 25 and not missing, missing
