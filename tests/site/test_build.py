"A second build after one notebook changed rewrites that page only."
import hashlib, json, shutil, subprocess, sys
from pathlib import Path

from course import ROOT


def build(folder):
    "What `make docs` runs, in a copy; the hash of every published file."
    tools = Path(sys.executable).parent
    for words in ([sys.executable, "docs/bridge.py"],
                  [tools / "sphinx-build", "-n", "-W", "-q", "-c", "docs", "-d", "docs/_build/doctrees", "docs/_src", "docs/_build/html"]):
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    html = folder / "docs" / "_build" / "html"
    return {p.relative_to(html).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in html.rglob("*") if p.is_file()}


def test_only_the_changed_page_is_rewritten(site, tmp_path):
    left = shutil.ignore_patterns("__pycache__", "_build", "node_modules", ".ipynb_checkpoints")
    for name in ("nbs", "stan_nb", "docs"): shutil.copytree(ROOT / name, tmp_path / name, ignore=left)
    for name in ("pyproject.toml", "settings.ini", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"): shutil.copy(ROOT / name, tmp_path / name)
    first = build(tmp_path)
    path = tmp_path / "nbs" / "12_hooks.ipynb"
    nb = json.loads(path.read_text())
    last = [cell for cell in nb["cells"] if cell["cell_type"] == "markdown"][-1]
    last["source"] = "".join(last["source"]) + "\n\nAfterthought."
    path.write_text(json.dumps(nb, indent=1))
    second = build(tmp_path)
    changed = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    assert changed == {"hooks.html", "hooks.html.md", "notebooks/12_hooks.ipynb", "searchindex.js"}
