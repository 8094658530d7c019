"Settings of all tests: no hub, Triton interpreted, the long counts only on request."
import os, shutil

import pytest
from course import CHROMIUM, QUIET

os.environ.setdefault("HF_HUB_OFFLINE", "1")          # no test needs the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if shutil.which("nvidia-smi") is None: os.environ.setdefault("TRITON_INTERPRET", "1")   # Triton's kernels run without a GPU, slowly


def pytest_configure(config):
    if config.getoption("-m") == "": config.option.markexpr = "not slow"


def pytest_collection_modifyitems(items):
    import torch
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords: item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none is here"))


@pytest.fixture(scope="module", autouse=True)
def threads():
    "A module that asks torch for another number of threads leaves the next one alone."
    import torch
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def chromium():
    if not CHROMIUM: pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()
