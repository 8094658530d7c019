"Shared by all tests: where the repository is, and a small reader of the notebooks."
import json, os, re, shutil
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")          # no test needs the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if shutil.which("nvidia-smi") is None: os.environ.setdefault("TRITON_INTERPRET", "1")   # Triton's kernels run without a GPU, slowly
ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    if config.getoption("-m") == "": config.option.markexpr = "not slow"


def pytest_collection_modifyitems(items):
    import torch
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords: item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none is here"))


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
