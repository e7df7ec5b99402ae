"""
Installed, SunFish is one package, `sunfish`, so that the plain names of its files collide with nobody's: while it is
built, the modules' imports of each other are made imports from the package.
"""
import atexit
import re
import shutil
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

INIT = '"""A language model that writes by denoising: `from sunfish import load`."""\nfrom sunfish.sample import load\n'


class Build(build_py):
    def run(self):
        super().run()
        package = Path(self.build_lib, "sunfish")
        names = "|".join(path.stem for path in package.glob("*.py"))
        for path in package.glob("*.py"):
            source = path.read_text(encoding="utf-8")
            source = re.sub(rf"^( *)from ({names}) import ", r"\1from sunfish.\2 import ", source, flags=re.M)
            source = re.sub(rf"^( *)import ({names}) as ", r"\1import sunfish.\2 as ", source, flags=re.M)
            source = re.sub(rf"^( *)import ({names})$", r"\1import sunfish.\2 as \2", source, flags=re.M)
            path.write_text(source, encoding="utf-8")
        (package / "setup.py").unlink()
        (package / "__init__.py").write_text(INIT, encoding="utf-8")


place = tempfile.mkdtemp()              # nothing is left in the folder of the source, nor there
atexit.register(shutil.rmtree, place, ignore_errors=True)
setup(cmdclass={"build_py": Build}, options={"build": {"build_base": place}, "egg_info": {"egg_base": place}})
