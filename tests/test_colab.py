"A lesson in Colab: an environment with torch and the built wheel, the notebook alone in a folder, all cells from top to bottom."
import os, subprocess, sys
from pathlib import Path

import pytest

from course import ROOT, notebooks

RUN = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code": shell.run_cell("".join(cell["source"])).raise_error()
import stan_nb
print("from", stan_nb.__file__)
"""


def sh(*words, **more):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **more)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    "The Python of an environment that has torch and the wheel, and what the wheel asks for."
    folder = tmp_path_factory.mktemp("colab")
    sh(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    sh(sys.executable, "-m", "venv", folder / "env")
    own = folder / "env" / "bin" / "python"
    sh(own, "-m", "pip", "install", "-q", "torch==2.13.0")
    sh(own, "-m", "pip", "install", "-q", next(folder.glob("*.whl")))
    return own


@pytest.mark.parametrize("path", [p if p.name.startswith("12_") else pytest.param(p, marks=pytest.mark.slow) for p in notebooks()], ids=lambda p: p.stem)
def test_runs_from_the_wheel(python, path, tmp_path):
    (tmp_path / path.name).write_bytes(path.read_bytes())
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"MPLBACKEND": "agg", "TQDM_DISABLE": "1"}
    said = sh(python, "-c", RUN, path.name, cwd=tmp_path, env=clean)
    assert f"from {python.parents[1]}" in said
