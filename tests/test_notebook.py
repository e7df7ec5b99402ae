"""The notebook does what it says, from its first cell to its last."""
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

NOTEBOOK = json.loads((ROOT / "own_text.ipynb").read_text())


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    """With fewer texts and steps than it has."""
    for name in os.listdir(ROOT):
        if name.endswith((".py", ".txt", ".html")) or name in ("config", "pretrained"):
            (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    names, said = {}, io.StringIO()
    for cell in (cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"):
        source = "".join(cell["source"]).replace("3000", "200").replace("1200", "20").replace("=400", "=20")
        if source.startswith("!python "):
            command = [sys.executable, *shlex.split(source)[1:]]
            said.write(subprocess.run(command, check=True, text=True, capture_output=True).stdout)
            continue
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            exec(source, names)
    said = said.getvalue()
    assert re.search(r"Ada was a brave \w+ who lived near the mill\.", said)
    assert "step " in said and "noise #" in said                        # it was shown
    assert "data/mine/meta.json: 200 documents" in said and "done: step 20" in said
    assert not any(cell.get("outputs") for cell in NOTEBOOK["cells"])
