"""What the README says about commands, settings, files and functions is so."""
import ast
import dataclasses
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def settings(script):
    import importlib
    return {field.name for field in dataclasses.fields(importlib.import_module(script).Config)}


def test_every_flag_of_every_command_exists():
    commands = re.findall(r"((?:train|sample|prepare_fineweb)\.py)([^\n`&]*)", README)
    assert len(commands) > 10
    for script, rest in commands:
        unknown = set(re.findall(r"--(\w+)", rest)) - settings(script[:-3]) - {"help"}
        assert not unknown, (script, unknown)
        for config in re.findall(r"config/\w+\.py", rest):
            assert (ROOT / config).exists(), config


@pytest.mark.parametrize("name", ["diffusion", "model", "train"])
def test_every_function_named_exists(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    named = set(re.findall(rf"`{name}\.(\w+)[`(]", README)) - {"py"}
    assert named <= defined, named - defined


def test_every_setting_in_the_config_files_is_one():
    from train import Config
    known = {field.name for field in dataclasses.fields(Config)}
    for path in (ROOT / "config").glob("*.py"):
        names = {node.targets[0].id for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)}
        assert names <= known, (path, names - known)


def test_the_core_is_as_short_as_the_readme_says():
    said = int(re.search(r"about ([\d,]+) lines", README)[1].replace(",", ""))
    files = "configurator diffusion model prepare_fineweb train sample".split()
    lines = sum(len((ROOT / f"{name}.py").read_text().splitlines()) for name in files)
    assert abs(lines / said - 1) < 0.05, lines


def test_every_test_named_exists():
    defined = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 30 and all(f"def {name}(" in defined for name in named), \
        [name for name in named if f"def {name}(" not in defined]
