"The same picture, live in JupyterLab: anywidget carries its state to a kernel and back."
import json, os, re, subprocess, sys, time
from pathlib import Path

import pytest

VOTE = ["""import torch
from stan_nb.steering import ballot, tally
g = torch.Generator().manual_seed(0)
rows = [dict(prompt=f"{d}, bold", style="bold") for d in ("one", "two", "three")]
b = ballot({"first": torch.rand(3, 1, 16, 16, generator=g), "second": torch.rand(3, 1, 16, 16, generator=g)}, rows, "votes.jsonl")
b""", "print('heard', b.votes)", "print(tally('votes.jsonl', 'first')[-1])"]
CELLS = ["from stan_nb.viz import topk_slider", "p = topk_slider([3., -2., 1., .5], [[1., 0.], [0., 1.], [1., 1.], [-1., 0.]], k=2)\np", "print('k is', p.k)", "p.k = 4"]


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab with two notebooks; its address."
    for name, sources in {"try": CELLS, "vote": VOTE}.items():
        cells = [dict(cell_type="code", id=f"c{i}", metadata={}, source=s, outputs=[], execution_count=None) for i, s in enumerate(sources)]
        kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))
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


def open_and_run(chromium, address):
    "A notebook in a new page, its first cell run; and what runs the next cell. JupyterLab forgets what is run before the kernel listens (its issue 8490), so again."
    from playwright.sync_api import TimeoutError
    page = chromium.new_page(viewport=dict(width=1280, height=900))
    page.goto(address, timeout=120_000)
    for _ in range(12):
        page.locator(".jp-CodeCell .cm-content").first.click(timeout=120_000)
        page.keyboard.press("Shift+Enter")
        try: page.locator(".jp-InputPrompt", has_text=re.compile(r"\[\d+\]")).first.wait_for(timeout=10_000)
        except TimeoutError: continue
        return page, lambda: page.keyboard.press("Shift+Enter")
    raise AssertionError(f"{address}: the first cell was never run")


def test_the_slider_moves_with_a_kernel(lab, chromium):
    pytest.importorskip("jupyterlab")
    page, run = open_and_run(chromium, f"{lab}/lab/tree/try.ipynb")
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


def test_a_blind_vote_by_keys(lab, chromium, tmp_path):
    "A rater in JupyterLab: arrow keys, a vote taken back, a click; each vote is in the file at once, and the browser is not told whose pictures they are."
    pytest.importorskip("jupyterlab")
    (page, run), file = open_and_run(chromium, f"{lab}/lab/tree/vote.ipynb"), tmp_path / "votes.jsonl"
    said = page.locator(".jp-OutputArea [role=status]")
    said.wait_for(timeout=120_000)
    assert said.inner_text().startswith("0 of 3")
    def stored():
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    def vote(key, count):
        page.keyboard.press(key)
        page.locator(".jp-OutputArea [role=status]", has_text=f"{count} of 3").wait_for(timeout=30_000)
        for _ in range(100):
            if len(stored()) == count: return stored()
            time.sleep(.1)
        raise AssertionError(f"{count} votes expected, {len(stored())} in the file")
    page.get_by_role("button", name="take back").focus()                   # within the picture: keys are its own
    first = vote("ArrowLeft", 1)[0]
    assert first["winner"] == first["left"] and {first["left"], first["right"]} == {"first", "second"}
    assert vote("ArrowDown", 2)[1]["winner"] == "tie"
    vote("Backspace", 1)
    second = vote("ArrowRight", 2)[1]
    assert second["winner"] == second["right"] and second["question"] != first["question"]
    sources = page.locator(".jp-OutputArea img").evaluate_all("(images) => images.map((i) => i.outerHTML).join(' ')")
    assert "first" not in sources and "second" not in sources
    page.get_by_alt_text("right picture").click()
    page.locator(".jp-OutputArea [role=status]", has_text="3 of 3").wait_for(timeout=30_000)
    page.get_by_text("All pairs are judged").wait_for(timeout=30_000)
    page.keyboard.press("ArrowLeft")                                       # one too many is not counted
    page.locator(".jp-CodeCell .cm-content").nth(1).click()
    run()
    page.get_by_text("heard ['left', 'right', 'right']").wait_for(timeout=60_000)
    run()
    page.get_by_text("'votes': 3").wait_for(timeout=60_000)
    assert [row["winner"] == row["right"] for row in stored()] == [False, True, True]
    page.close()
