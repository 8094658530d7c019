"Notebooks are the source: the modules are their exact export, they are stored clean, and they keep the course's measures."
import ast, re, shutil, subprocess, sys, tomllib
from pathlib import Path

import pytest

from course import ROOT, cells, notebooks, source

LESSONS = notebooks()
ids = [p.stem for p in LESSONS]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what nbdev reads and writes, so that the check never touches the reader's own tree."
    to = tmp_path_factory.mktemp("repo")
    for name in ("nbs", "stan_nb"): shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "runs"))
    for name in ("pyproject.toml", "settings.ini", "README.md"): shutil.copy(ROOT / name, to / name)
    return to


def nbdev(command, where):
    done = subprocess.run([Path(sys.executable).with_name(command)], cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_export_is_in_sync(copy):
    for p in (copy / "stan_nb").glob("*.py"):
        if p.name != "__init__.py": p.unlink()
    nbdev("nbdev-export", copy)
    ours, fresh = ({p.name: p.read_text() for p in (d / "stan_nb").glob("*.py")} for d in (ROOT, copy))
    stale = sorted(n for n in ours.keys() | fresh.keys() if ours.get(n) != fresh.get(n))
    assert stale == [], f"run `nbdev-export`: {stale} are not what the notebooks export"


def test_notebooks_are_clean(copy):
    nbdev("nbdev-clean", copy)
    dirty = [p.name for p in LESSONS if (copy / "nbs" / p.name).read_bytes() != p.read_bytes()]
    assert dirty == [], f"run `nbdev-clean`: {dirty}"


@pytest.mark.parametrize("path", LESSONS, ids=ids)
def test_measures(path):
    code = cells(path, "code")
    exported = [c for c in code if re.search(r"^#\|\s*exports?i?\b", source(c), re.M)]
    long = [c["id"] for c in exported if len([l for l in source(c).splitlines() if not l.startswith("#|")]) > 45]
    assert long == [], f"exported cells over 45 lines: {long}"
    errors = [c["id"] for c in code if any(o["output_type"] == "error" for o in c.get("outputs", []))]
    assert errors == [], f"stored errors: {errors}"
    assert path.stat().st_size < 1_500_000
    assert len(cells(path, "markdown")) * 2 >= len(code), "does it teach? fewer than one prose cell for two code cells"
    assert re.search(r"\btest_\w+\(|\bassert ", "\n".join(map(source, code))), "no cell tests anything"


@pytest.mark.parametrize("path", LESSONS, ids=ids)
def test_figures_have_alt_text(path):
    for c in cells(path, "code"):
        images = any("image/png" in o.get("data", {}) for o in c.get("outputs", []))
        assert not images or re.search(r"^#\|\s*fig-alt:\s*\S", source(c), re.M), f"cell {c['id']} stores a figure without `#| fig-alt:`"


@pytest.mark.parametrize("path", LESSONS, ids=ids)
def test_imports_have_cells_of_their_own(path):
    "nbdev executes cells that mix imports with other code while it processes them."
    for c in cells(path, "code"):
        text = "\n".join(re.sub(r"^(\s*)[%!].*", r"\1pass", l) for l in source(c).splitlines())
        body = [n for n in ast.parse(text).body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in body}
        assert len(kinds) < 2, f"cell {c['id']} mixes imports with other code"


def test_readme_is_in_sync():
    done = subprocess.run([sys.executable, ROOT / "docs" / "readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]


def opening(path):
    "What the top of a notebook says about the repository: the cell that sets Colab up, and the badge. Both follow pyproject.toml."
    slug = URLS["Repository"].removeprefix("https://github.com/")
    setup = f'try: import stan_nb\nexcept ImportError:\n    %pip install -q "stan_nb{EXTRAS.get(path.stem, "")} @ git+{URLS["Repository"]}"'
    page = f"https://colab.research.google.com/github/{slug}/blob/main/nbs/{path.name}"
    return setup, f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({page})"


EXTRAS = dict.fromkeys(("26_pictures", "33_diffusion", "43_steering"), "[diffusion]")      # lessons that need more than the package's own dependencies


@pytest.mark.parametrize("path", LESSONS, ids=ids)
def test_opens_in_colab(path):
    setup, badge = opening(path)
    first, title = map(source, cells(path)[:2])
    assert re.sub(r"^#\|.*\n", "", first) == setup and first.startswith(("#| default_exp", "#| hide"))
    assert re.match(rf"# .+\n\n> .+\n\n{re.escape(badge)}", title)


def test_the_repository_address_is_stated_once():
    "In pyproject.toml; README, the modules' headers and the top of each notebook follow it."
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    generated = ("README.md", "stan_nb/")
    def said(f):
        if f.endswith(".ipynb"): return "".join(source(c) for c in cells(ROOT / f)).replace(opening(ROOT / f)[0], "")
        return (ROOT / f).read_text(encoding="utf-8")
    found = [f for f in files if not f.startswith(generated) and f != "pyproject.toml" and f.endswith((".ipynb", ".py", ".md", ".yml", ".ini", "Makefile"))
             and any(url in said(f) for url in URLS.values())]
    assert found == []


def test_outputs_are_those_of_the_code():
    done = subprocess.run([sys.executable, ROOT / "docs" / "store.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
