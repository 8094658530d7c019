"The same picture, live in JupyterLab: anywidget carries its state to a kernel and back."
import json, os, re, subprocess, sys, time
from pathlib import Path

import pytest

CELLS = ["from stan_nb.viz import topk_slider", "p = topk_slider([3., -2., 1., .5], [[1., 0.], [0., 1.], [1., 1.], [-1., 0.]], k=2)\np", "print('k is', p.k)", "p.k = 4"]


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab with one notebook; its address."
    cells = [dict(cell_type="code", id=f"c{i}", metadata={}, source=s, outputs=[], execution_count=None) for i, s in enumerate(CELLS)]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    (tmp_path / "try.ipynb").write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))
    words = ["--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root", "--IdentityProvider.token=", "--ServerApp.password=", f"--ServerApp.root_dir={tmp_path}"]
    own = {name: str(tmp_path / "jupyter" / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([Path(sys.executable).with_name("jupyter"), "lab", *words], stdout=log, stderr=log, env=os.environ | own)
        try:
            for _ in range(240):
                found = re.search(r"http://127\.0\.0\.1:\d+", (tmp_path / "log").read_text())
                if found or server.poll() is not None: break
                time.sleep(.5)
            assert found, (tmp_path / "log").read_text()[-2000:]
            yield found[0]
        finally:
            server.terminate()
            server.wait(30)


def test_the_slider_moves_with_a_kernel(lab, chromium):
    pytest.importorskip("jupyterlab")
    from playwright.sync_api import TimeoutError
    page = chromium.new_page(viewport=dict(width=1280, height=900))
    page.goto(f"{lab}/lab/tree/try.ipynb", timeout=120_000)
    run, counted = lambda: page.keyboard.press("Shift+Enter"), page.locator(".jp-InputPrompt", has_text=re.compile(r"\[\d+\]"))
    for _ in range(12):                                                   # JupyterLab forgets what is run before the kernel listens (its issue 8490)
        page.locator(".jp-CodeCell .cm-content").first.click(timeout=120_000)
        run()
        try: counted.first.wait_for(timeout=10_000)
        except TimeoutError: continue
        break
    run()
    handle, said = page.locator(".jp-OutputArea input[type=range]"), page.locator(".jp-OutputArea output")
    handle.wait_for(timeout=120_000)
    assert said.inner_text().startswith("k = 2 of 4")
    handle.focus()
    page.keyboard.press("ArrowRight")                                     # moves the slider, not the cursor of the notebook
    assert said.inner_text().startswith("k = 3 of 4")
    page.locator(".jp-CodeCell .cm-content").nth(2).click()
    run()
    page.get_by_text("k is 3").wait_for(timeout=60_000)                   # the kernel knows
    run()
    page.locator(".jp-OutputArea output", has_text="k = 4 of 4").wait_for(timeout=60_000)     # and the picture follows the kernel
    page.close()
