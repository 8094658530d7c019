"The picture in which a reader steers the model: its JavaScript computes what PyTorch computes, in Chromium; and what may be done to latents."
import base64, functools, http.server, json, shutil, threading

import pytest
import torch

from stan_nb.assets import shipped
from stan_nb.diffusion import DiffusionTask, sample
from stan_nb.forget import own_latents, without_direction
from stan_nb.hooks import scale
from stan_nb.steering import ask, latent_means, movers, steer, switched_on
from stan_nb.task import predict_rows
from stan_nb.viz import module



@pytest.fixture(scope="module")
def opened():
    torch.set_num_threads(1)
    return DiffusionTask.from_run(shipped("runs/digits-stan"))


@pytest.fixture(scope="module")
def picture(opened):
    stats = latent_means(*opened)
    return steer(*opened, stats, single=movers(*opened, stats, count=3, tried=12))


@pytest.fixture(scope="module")
def page(chromium, picture, tmp_path_factory):
    "An empty page in Chromium, served beside the module and its files as the site lays them out."
    folder = tmp_path_factory.mktemp("site")
    (folder / "steer.js").write_text(module("steer"))
    (folder / "index.html").write_text("<!doctype html><title>t</title><div id=el></div>")
    for path in picture.files.values():
        (folder / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shipped(path), folder / "data" / path)
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = chromium.new_page()
    page.trouble = []
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
    yield page
    assert page.trouble == []
    page.close()
    server.shutdown()


LOAD = """async ([state, todo]) => {
  const js = await import("/steer.js"), model = { get: (name) => state[name] }, buffers = {};
  for (const [name, path] of Object.entries(state.files)) buffers[name] = await (await fetch(`/data/${path}`)).arrayBuffer();
  const net = js.network(model, buffers);
  return todo.map(({ words, noise, factors, on, steps, guidance }) => {
    net.on = on; net.turned = js.turn(state.groups, factors);
    return Array.from(js.generate(net, words, noise, steps, guidance));
  });
}"""


def test_the_browser_draws_what_pytorch_draws(opened, picture, page):
    task, model = opened
    state = {name: getattr(picture, name) for name in ("files", "words", "heads", "k", "scaling", "groups")}
    cases = [("three", "bold", {}, True), ("seven", "inverted", {}, False), ("five", "striped", {"striped": 0., "bold": .5}, True), ("zero", "plain", {"checkered": 2.}, True)]
    cases += [("three", style, {name: factor}, True) for (name, style), factor in zip(picture.singles.items(), (0., 4., 2.5))]       # single latents
    cases.append(("two", "bold", {"bold": .5, next(iter(picture.singles)): 3.}, True))                                               # one of them, within its style
    todo, expected = [], []
    for number, (digit, style, factors, on) in enumerate(cases):
        noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(number))
        todo.append(dict(words=[digit, style], noise=noise.flatten().tolist(), factors=factors, on=on, steps=12, guidance=2.))
        call = lambda: sample(model, task.scheduler, noise, task.prompts([f"{digit}, {style}"]), task.prompts([""]), 12, 2.)
        if not on:
            with model.disable_adapter(): expected.append(call())
            continue
        from contextlib import ExitStack
        with ExitStack() as stack:
            for name, factor in factors.items(): stack.enter_context(scale(model, picture.groups[name], factor))
            expected.append(call())
    found = torch.tensor(page.evaluate(LOAD, [state, todo]))
    torch.testing.assert_close(found, torch.cat(expected).flatten(1), atol=1e-3, rtol=0)


def test_a_reader_loads_and_draws(picture, page):
    "The button fetches the files, two pictures appear, and a slider changes the second alone."
    state = {name: getattr(picture, name) for name in picture.trait_names() if not name.startswith("_") and name not in ("layout", "tabbable", "tooltip", "comm", "keys", "log")}
    page.evaluate("""async (state) => {
      const listeners = {}, model = { get: (n) => state[n], set: (n, v) => { state[n] = v; (listeners[`change:${n}`] ?? []).forEach((f) => f()); }, save_changes() {},
                                      on: (e, f) => (listeners[e] ??= []).push(f), off() {} };
      document.getElementById("el").replaceChildren();
      (await import("/steer.js")).default.render({ model, el: document.getElementById("el") });
    }""", json.loads(json.dumps(state)))
    look = lambda: page.evaluate("[...document.querySelectorAll('canvas')].map((c) => c.toDataURL())")
    done = lambda: page.wait_for_function("/steps/.test(document.querySelector('[role=status]').textContent)", timeout=60_000)
    page.get_by_role("button", name="Load the model").click()
    done()
    off, on = look()
    assert off != on and page.get_by_role("button", name="Draw again").is_visible()
    page.evaluate("document.querySelector('[role=status]').textContent = ''")
    page.locator("input[type=range]").first.fill("0")
    done()
    again = look()
    assert again[0] == off and again[1] != on
    sliders = page.locator("input[type=range]")
    assert sliders.count() == 6 + len(picture.singles) == 9
    sliders.first.fill("1")
    page.wait_for_function("(on) => document.querySelectorAll('canvas')[1].toDataURL() === on", arg=on, timeout=60_000)             # back as it was
    name, style = next(iter(picture.singles.items()))
    page.locator("select").nth(1).select_option(style)
    page.wait_for_function(f"document.querySelector('[role=status]').textContent.includes('{style}')", timeout=60_000)
    asked = look()
    page.get_by_label(name).fill("0")                                                                                               # one latent of 496
    page.wait_for_function("(was) => document.querySelectorAll('canvas')[1].toDataURL() !== was", arg=asked[1], timeout=60_000)
    assert look()[0] == asked[0]


def test_a_notebook_sends_the_files_when_asked(picture):
    assert picture.bytes == {}
    picture.asked = 1
    assert {name: base64.b64decode(text) for name, text in picture.bytes.items()} == {name: shipped(path).read_bytes() for name, path in picture.files.items()}
    assert sum(map(len, picture.bytes.values())) < 10e6
    picture.bytes = {}


def test_hooks_leave_the_model_as_it_was(opened):
    task, model = opened
    rows, stats = ask(["bold"], 1, 0).select(range(3)), latent_means(*opened)
    before = predict_rows(task, model, rows, progress=False)
    for change in (switched_on(model, stats, 0), without_direction(model, stats, 1)):
        with pytest.raises(ZeroDivisionError), change: 1 / 0
    for change in (switched_on(model, stats, 0), without_direction(model, stats, 1)):
        with change: assert not torch.equal(predict_rows(task, model, rows, progress=False), before)
    assert torch.equal(predict_rows(task, model, rows, progress=False), before)
    assert not own_latents(stats, 0, 1.)
