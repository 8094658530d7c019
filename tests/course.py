"Where the repository and its built site are, and a small reader of the notebooks. Not in conftest: there are two, and only one can be imported by that name."
import json, re, shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "docs" / "_build" / "html"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# No sandbox, because tests may run as root; nothing that would call home.
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def notebooks():
    "The notebooks of the course, in reading order; `index` last, because it may use everything."
    found = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if not p.name.startswith("_"))
    return [p for p in found if p.stem != "index"] + [p for p in found if p.stem == "index"]


def cells(path, kind=None):
    nb = json.loads(Path(path).read_text(encoding="utf-8"))
    return [c for c in nb["cells"] if kind is None or c["cell_type"] == kind]


def source(cell): return "".join(cell["source"])


def number(path):
    "The room number of a notebook: its two leading digits; `index` stands above all."
    m = re.match(r"(\d\d)_", Path(path).name)
    return int(m.group(1)) if m else 100


def own_methods():
    "The methods of the registry's own room: other lessons register theirs, which need not fit the models of every test."
    from stan_nb.methods import METHODS
    return [name for name, kind in METHODS.items() if kind.__module__ == "stan_nb.methods"]
