"""What `pip install .` makes of the files: one package, which does as they do."""
import os
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution

import pytest
from conftest import ROOT

import sample

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the package is unpacked."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    folder, before = tmp_path_factory.mktemp("wheel"), sorted(os.listdir(ROOT))
    subprocess.run([sys.executable, "-c", BUILD, folder], cwd=ROOT, check=True, capture_output=True)
    assert sorted(os.listdir(ROOT)) == before                   # nothing is left behind
    wheel, = folder.glob("sunfish-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "place")
    return folder / "place"


def python(place, *args):
    done = subprocess.run([sys.executable, *map(str, args)], cwd=place.parent, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_nothing_but_the_package_is_installed_and_its_commands_are_there(installed):
    assert {path.name.split("-")[0] for path in installed.iterdir()} == {"sunfish"}
    assert not (installed / "sunfish" / "setup.py").exists()
    info, = installed.glob("*.dist-info")
    found = {point.name: point.value for point in Distribution.at(info).entry_points}
    assert found == {"sunfish-train": "sunfish.train:program", "sunfish-sample": "sunfish.sample:program",
                     "sunfish-prepare": "sunfish.prepare_fineweb:program"}
    for value in found.values():
        module, function = value.split(":")
        code = f"import sys; sys.argv[1:] = ['--help']; from {module} import {function}; {function}()"
        assert "settings (config files override these" in python(installed, "-c", code)


@pytest.mark.slow
def test_the_package_writes_what_the_files_write_and_takes_no_name(installed, base):
    code = "import sys, sunfish; writer = sunfish.load(sys.argv[1], 'cpu', 'float32')"
    code += "; print(writer.generate('the dog', seed=1, seq_len=8))"
    code += "; print(*sorted({'data', 'model', 'sample', 'train', 'serve', 'configurator'} & {*sys.modules}))"
    want = sample.load(base, "cpu", "float32").generate("the dog", seed=1, seq_len=8)
    assert python(installed, "-c", code, base) == want + "\n\n"
    said = python(installed, "-m", "sunfish.prepare_fineweb", "--source=fables", "--max_tokens=2000", "--out=made")
    assert said.startswith("made: fables: very short stories") and "training and" in said
