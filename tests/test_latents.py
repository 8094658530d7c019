"Latents: no tool leaves a trace, records survive what happens to files, and what is shown to a reader in a browser is shown and not run."
import gzip, json, time
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings as many, strategies as st

from stan_nb.assets import shipped
from stan_nb.browser import browser_page, claim, feature_browser, layer_groups, packed
from stan_nb.causes import attributions, dose_response, effects, mean_loss
from stan_nb.explorers import dose_explorer, feature_explorer, features, row_latents, token_explorer
from stan_nb.exports import export_neuronpedia, export_sae
from stan_nb.hooks import ablate, clamp, find_adapters, inject, record, scale
from stan_nb.latents import LatentStore, collect
from stan_nb.layer import StanAdapter, adapt
from stan_nb.runs import PeakMemory, plain
from stan_nb.task import Task
from stan_nb.viz import LIVE, module

EVIL = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
LAYER = "base_model.model.model.layers.1.mlp.down_proj.stan_sae.default"


@pytest.fixture(scope="module")
def opened():
    torch.set_num_threads(1)
    task, model = Task.from_run(shipped("runs/math_code-expressions"))
    return task, model, task.load_data()["valid"]


@pytest.fixture(scope="module")
def store(opened, tmp_path_factory):
    task, model, rows = opened
    return collect(task, model, rows, tmp_path_factory.mktemp("record") / "store", chunk=1000, progress=False)


@pytest.fixture(scope="module")
def answer(opened):
    "A function: the model's logits on a fixed batch."
    task, model, rows = opened
    batch = task.collate([rows[i] for i in range(8)])
    def ask():
        with torch.no_grad(): return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return ask


# no tool leaves a trace

TOOLS = [lambda m: record(m), lambda m: record(m, "down_proj"), lambda m: ablate(m, 3), lambda m: clamp(m, [0, 5], -2.), lambda m: scale(m, {"q_proj": [1], "o_proj": [2]}, 3.), lambda m: inject(m, 7, 1.5, "layers.0.mlp")]


class Stop(Exception): pass


@many(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, len(TOOLS) - 1), min_size=1, max_size=5), st.integers(0, 5), st.booleans())
def test_nested_contexts_and_exceptions_leave_the_outputs_bit_identical(opened, answer, chosen, stop_at, call):
    _, model, _ = opened
    before, hooks = answer(), {name: list(a.latent_hooks) for name, a in find_adapters(model).items()}
    try:
        with ExitStack() as stack:
            for i, tool in enumerate(chosen):
                if i == stop_at: raise Stop
                stack.enter_context(TOOLS[tool](model))
            if call: answer()
            if stop_at == len(chosen): raise Stop
    except Stop: pass
    assert torch.equal(answer(), before)
    assert {name: list(a.latent_hooks) for name, a in find_adapters(model).items()} == hooks


def test_a_context_may_end_before_the_one_inside_it(opened, answer):
    _, model, _ = opened
    before, outer, inner = answer(), ablate(model, 1), scale(model, 2, 5.)
    outer.__enter__(); inner.__enter__()
    changed = answer()
    outer.__exit__(None, None, None)
    with scale(model, 2, 5.): pass
    assert not torch.equal(answer(), before) and not torch.equal(changed, before)
    inner.__exit__(None, None, None)
    assert torch.equal(answer(), before)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tool", ["collect", "effects", "mean_loss", "attributions", "dose_response", "groups", "browser", "neuronpedia", "export"])
def test_tools_leave_outputs_mode_and_gradients(opened, answer, tmp_path, tool, training):
    task, model, rows = opened
    few, logits = rows.select(range(12)), lambda m: answer()[:, -1]
    before, asked = answer(), {name: p.requires_grad for name, p in model.named_parameters()}
    model.train(training)
    try:
        if tool == "collect": collect(task, model, few, tmp_path / "s", progress=False)
        if tool == "effects": effects(model, lambda m: mean_loss(task, m, few), LAYER, [0, 1], progress=False)
        if tool == "mean_loss": mean_loss(task, model, few)
        if tool == "attributions": attributions(task, model, few)
        if tool == "dose_response": dose_response(model, logits, 2, LAYER)
        if tool == "groups": layer_groups(task, model, few)
        if tool == "browser": feature_browser(task, model, few, tmp_path / "b", progress=False)
        if tool == "neuronpedia": export_neuronpedia(task, model, few, tmp_path / "n", layers=["down_proj"], progress=False)
        if tool == "export": export_sae(model, tmp_path / "e", layers="o_proj")
        assert model.training == training
    finally: model.eval()
    assert torch.equal(answer(), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("tool", ["collect", "effects", "attributions", "groups", "browser"])
def test_a_task_that_fails_in_the_middle(opened, answer, tmp_path, tool):
    "An error in the model's own code comes through; outputs, hooks and disk are as before."
    task, model, rows = opened
    before, calls = answer(), []
    class Broken:
        collate, tokenizer, name = task.collate, task.tokenizer, "broken"
        def loss(self, model, batch):
            calls.append(1)
            found = task.loss(model, batch)
            if len(calls) > (tool in ("collect", "effects", "attributions")): raise Stop
            return found
    few = rows.select(range(100))
    with pytest.raises(Stop):
        if tool == "collect": collect(Broken(), model, few, tmp_path / "s", progress=False)
        if tool == "effects": effects(model, lambda m: mean_loss(Broken(), m, few), LAYER, [0], progress=False)
        if tool == "attributions": attributions(Broken(), model, few)
        if tool == "groups": layer_groups(Broken(), model, few)
        if tool == "browser": feature_browser(Broken(), model, few, tmp_path / "b", progress=False)
    assert torch.equal(answer(), before) and list(tmp_path.iterdir()) == [] and not any(a.latent_hooks for a in find_adapters(model).values())


# records on disk

@many(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 400), st.integers(1, 17))
def test_a_record_does_not_depend_on_how_it_was_cut(opened, tmp_path_factory, chunk, batch_size):
    task, model, rows = opened
    few = rows.select(range(20))
    cut = collect(task, model, few, tmp_path_factory.mktemp("cut") / "s", layers=[LAYER], batch_size=batch_size, chunk=chunk, progress=False)
    whole = collect(task, model, few, tmp_path_factory.mktemp("whole") / "s", layers=[LAYER], batch_size=batch_size, progress=False)
    assert np.array_equal(cut.where, whole.where) and (cut.matrix(LAYER) != whole.matrix(LAYER)).nnz == 0
    assert max(cut.sizes) < chunk + max(np.bincount(cut.where[:, 0] // batch_size))             # memory: a chunk, and at most one batch more
    assert LatentStore(cut.path).density(LAYER).tolist() == whole.density(LAYER).tolist()
    assert cut.tops(LAYER, 3, "-") == whole.tops(LAYER, 3, "-")


def test_pages_of_a_cut_record_are_those_of_the_whole(opened, store, tmp_path):
    task, model, rows = opened
    whole = collect(task, model, rows, tmp_path / "s", layers=[LAYER], progress=False)
    ours, theirs = (list(features(s, LAYER, task, model, rows, examples=3)) for s in (store, whole))
    for a, b in zip(ours, theirs): assert {**a, "ranges": 0} == {**b, "ranges": 0} and [r["share"] for r in a["ranges"]] == [r["share"] for r in b["ranges"]]
    assert len(store.sizes) > 3


def test_folders_that_are_no_records(store, tmp_path):
    import shutil
    for content, why in ((None, "holds no record"), ("", "holds no record"), ("{torn", "holds no record"), ('{"format": "stan_nb latents 0"}', "has format 'stan_nb latents 0'")):
        if content is not None: (tmp_path / "latents.json").write_text(content)
        with pytest.raises(ValueError, match=why): LatentStore(tmp_path)
    torn = tmp_path / "torn"
    shutil.copytree(store.path, torn)
    (torn / "00001.safetensors").write_bytes((torn / "00001.safetensors").read_bytes()[:-200])
    with pytest.raises(Exception, match="(?i)safetensor|metadata|incomplete|invalid"): LatentStore(torn)
    (torn / "00001.safetensors").unlink()
    with pytest.raises((FileNotFoundError, OSError)): LatentStore(torn)


def test_a_folder_that_is_there_is_not_touched(opened, tmp_path):
    task, model, rows = opened
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError): collect(task, model, rows, tmp_path / "mine", progress=False)
    for write in (lambda: feature_browser(task, model, rows, tmp_path / "mine", overwrite=True, progress=False), lambda: export_sae(model, tmp_path / "mine", layers="o_proj", overwrite=True),
                  lambda: export_neuronpedia(task, model, rows, tmp_path / "mine", overwrite=True, progress=False)):
        with pytest.raises(FileExistsError, match="was not written by"): write()
    assert [p.name for p in tmp_path.iterdir()] == ["mine"] and (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_layers_of_an_image_model_fall_into_groups(tmp_path):
    task, model = Task.from_run(shipped("runs/digits-stan"))
    rows = task.load_data()["valid"].select(range(24))
    groups, left = layer_groups(task, model, rows)
    assert sum(map(len, groups)) + len(left) == len(find_adapters(model)) and len(groups) > 1
    html = feature_browser(task, model, rows, tmp_path / "b", layers="transformer_blocks.1.attn.to_q", examples=3, progress=False).read_text()
    assert "are no words" in html
    again = feature_browser(task, model, rows, tmp_path / "c", layers="transformer_blocks.1.attn.to_q", examples=3, progress=False).read_text()
    assert html == again                                                            # the noise of the loss is seeded
    one = next(one for one in unpacked(html) if one["top"])
    assert one["unit"] == "places" and one["top"][0]["side"]**2 == len(one["top"][0]["values"]) and one["top"][0]["label"].startswith(f"row {one['top'][0]['row']}: ")


def unpacked(html):
    import base64, re
    return [one for packet in re.findall('id="chunk-[0-9]+">(.*?)</script>', html) for one in json.loads(gzip.decompress(base64.b64decode(packet)))]


# memory

def fresh(num_latents, k=16, seed=0):
    "The tiny Llama with wide, random adapters on its three writing MLP layers."
    task, _ = Task.from_run(shipped("runs/math_code-expressions"))
    model = task.build_model()
    torch.manual_seed(seed)
    adapt(model, ["down_proj"], num_latents=num_latents, k=k)
    for adapter in find_adapters(model).values(): torch.nn.init.normal_(adapter.decoder, std=.02)
    return task, model.eval()


@pytest.mark.parametrize("tokens", [60_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_memory_of_collecting_and_paging(tmp_path, tokens):
    "Below 1 GiB over the model's own, for a million tokens as for sixty thousand."
    task, model = fresh(4096)
    rows = task.load_data()["train"]
    layer = next(iter(find_adapters(model)))
    each = sum(int(task.collate([rows[i]])["attention_mask"].sum()) for i in range(64)) / 64
    rows = rows.select([i % len(rows) for i in range(int(tokens / each) + 64)])
    collect(task, model, rows.select(range(64)), tmp_path / "warm", layers=[layer], progress=False)
    with PeakMemory() as memory:
        store = collect(task, model, rows, tmp_path / "s", layers=[layer], progress=False)
        pages = sum(1 for _ in features(store, layer, task, model, rows, examples=5))
    assert len(store) >= .98 * tokens and pages == 4096 and memory.added < 1024, memory.added


# a reader's browser

@pytest.fixture(scope="module")
def evil(opened, tmp_path_factory):
    "Rows with a script in them, run through the model: record, split, pages."
    task, model, rows = opened
    rows = Dataset.from_list([dict(row, prompt=f"Task: {EVIL} of {i}\nCode:") for i, row in enumerate(rows.select(range(12)))])
    record = collect(task, model, rows, tmp_path_factory.mktemp("evil") / "s", layers=[LAYER], progress=False)
    return record, rows, list(features(record, LAYER, task, model, rows, examples=3, width=30))


SHOW = """async ([source, state]) => {
  const picture = (await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })))).default, heard = {};
  window.model = { get: (name) => state[name], set: (name, value) => { state[name] = value; for (const f of heard[`change:${name}`] || []) f(); }, save_changes() {}, on: (name, f) => { (heard[name] ||= []).push(f); } };
  document.body.replaceChildren();
  picture.render({ model: window.model, el: document.body.appendChild(document.createElement("div")) });
}"""


@pytest.fixture
def page(chromium, tmp_path):
    (tmp_path / "empty.html").write_text("<!doctype html><title>t</title><body>")
    page = chromium.new_page(viewport=dict(width=1280, height=900))
    page.trouble = []
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on("console", lambda m: page.trouble.append(m.text) if m.type == "error" else None)
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else page.trouble.append(f"asks {r.url}"))
    page.goto((tmp_path / "empty.html").as_uri())
    yield page
    assert page.trouble == []
    page.close()


def shown(page, name, picture):
    bundle = picture._repr_mimebundle_()                                   # what the site shows: the state, and a twin that must not choke on it
    assert (bundle[0] if isinstance(bundle, tuple) else bundle)["image/png"]
    page.evaluate(SHOW, [module(name), plain((bundle[0] if isinstance(bundle, tuple) else bundle)[LIVE]["state"])])
    return page.locator("body")


def harmless(page): assert page.evaluate("window.ran === undefined && document.querySelectorAll('body script, img').length === 0")


def test_explorers_show_a_script_and_do_not_run_it(opened, evil, page):
    task, model, rows = opened
    record, rows, pages = evil
    tokens, values = row_latents(record, LAYER, 0)
    spelled = task.tokenizer.convert_ids_to_tokens(record.where[tokens, 2].tolist())
    body = shown(page, "feature", feature_explorer(pages, at=2))
    assert "<script>" in body.inner_text().replace("\n", "").replace("\u2423", "") and "latent 2 of model.layers.1.mlp.down_proj" in body.inner_text()
    harmless(page)
    page.locator("select").select_option("5")
    assert page.locator("[data-title]").inner_text().startswith("latent 5 of") and page.evaluate("window.model.get('at')") == 5
    harmless(page)
    body = shown(page, "tokens", token_explorer(spelled, values, title=EVIL))
    assert EVIL.split("=")[0] in body.inner_text().replace("\u2423", "")
    harmless(page)
    before = body.locator("output").inner_text()
    page.get_by_label("next latent").click()
    assert body.locator("output").inner_text() != before
    page.locator("[data-token='3']").focus()
    page.keyboard.press("Enter")
    assert "fire:" in body.inner_text() and page.evaluate("document.activeElement.dataset.token") == "3"
    named = body.locator("button", has_text="latent").last
    name = named.inner_text().rsplit(" ", 1)[0]
    named.click()
    assert body.locator("output").inner_text().startswith(f"{name} fires on") and not page.trouble
    curves = {EVIL: [dict(dose=d, probability=.1 * d, kl=d * d, kl_elsewhere=.5 * d) for d in (0., 1., 2.)]}
    body = shown(page, "dose", dose_explorer(curves, EVIL, {EVIL: [EVIL] * 3}))
    page.locator("input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("window.model.get('at')") == 2 and f"{EVIL} × 2: {EVIL} 0.200" in body.locator("output").inner_text() and EVIL in body.locator("pre").inner_text()
    harmless(page)


def test_the_browser_shows_a_script_and_does_not_run_it(opened, evil, page, tmp_path):
    task, model, _ = opened
    _, rows, _ = evil
    path = feature_browser(task, model, rows, tmp_path / "b", layers=[LAYER], width=30, title=EVIL, sections=[(EVIL, EVIL)], progress=False)
    page.goto(path.as_uri())
    page.locator("[data-title]").wait_for()
    text = page.locator("body").inner_text().replace("\u2423", "")
    assert page.title().startswith("latent ") and EVIL in page.locator("h1").inner_text() and "<script>" in page.locator(".panel").inner_text().replace("\n", "").replace("\u2423", "")
    assert page.evaluate("window.ran === undefined && document.querySelectorAll('img').length === 0") and text


def test_no_other_script_may_run_in_the_browser(opened, store, page, tmp_path):
    "Even were our escaping to fail, the page's policy stops a script that is not its own."
    task, model, rows = opened
    html = browser_page("t", packed(features(store, LAYER, task, model, rows, examples=2)))
    (tmp_path / "x.html").write_text(html.replace("<header>", "<script>window.ran = 1</script><header>"))
    page.goto((tmp_path / "x.html").as_uri())
    page.locator("[data-title]").wait_for()
    assert page.evaluate("window.ran === undefined") and any("Content Security Policy" in said for said in page.trouble)
    page.trouble.clear()


@pytest.fixture(scope="module")
def thousands(tmp_path_factory):
    task, model = fresh(1700)
    return feature_browser(task, model, task.load_data()["train"].select(range(400)), tmp_path_factory.mktemp("many") / "out", progress=False)


def test_five_thousand_latents_load_fast(thousands, page):
    size, start = thousands.stat().st_size / 2**20, time.perf_counter()
    page.goto(thousands.as_uri())
    page.locator("[data-title]").wait_for()
    seconds = time.perf_counter() - start
    print(f"\n5,100 latents: {size:.1f} MiB, first page shown after {seconds:.2f} s")
    assert size < 24 and seconds < 10                              # on a busy machine; a quiet one takes a tenth
    count, rows = page.locator(".tools output"), page.locator(".latents tbody tr")
    assert count.inner_text() == "5,100 of 5,100 latents" and rows.count() == 200
    page.get_by_role("button", name="show more").click()
    assert rows.count() == 400
    page.get_by_label("layer", exact=True).select_option("1")
    assert count.inner_text() == "1,700 of 5,100 latents" and rows.first.inner_text().startswith("1.mlp")
    page.get_by_role("button", name="fires").click()               # sorts, most first; again: least first
    shares = lambda: [float(t.rstrip("%")) for t in page.locator(".latents tbody tr td:nth-child(4)").all_inner_texts()]
    assert shares() == sorted(shares(), reverse=True) and page.locator("th[aria-sort=descending]").inner_text().startswith("fires")
    page.get_by_role("button", name="fires").click()
    assert shares() == sorted(shares())
    word = rows.nth(5).locator("td.words").inner_text().split(" · ")[0]
    page.get_by_label("search latents").fill(f"{word.upper()} 17")
    hits = rows.all_inner_texts()
    assert hits and all(word.lower() in hit.lower() and "17" in hit for hit in hits)
    page.get_by_label("search latents").fill("nothing has this word")
    assert count.inner_text() == "0 of 5,100 latents"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_barriers_in_the_browser(thousands, chromium, theme):
    from course import ROOT
    axe = ROOT / "docs" / "node_modules" / "axe-core" / "axe.min.js"
    if not axe.is_file(): pytest.skip("needs axe-core: `make docs` brings it")
    context = chromium.new_context(color_scheme=theme, viewport=dict(width=1280, height=900))
    page = context.new_page()
    page.goto(thousands.as_uri())
    page.locator("[data-title]").wait_for()
    page.evaluate(axe.read_text())
    assert [(v["id"], v["nodes"][0]["html"]) for v in page.evaluate("axe.run()")["violations"]] == []
    context.close()


def test_a_latent_has_an_address(thousands, page):
    address = f"{thousands.as_uri()}#model.layers.2.mlp.down_proj/1234"
    page.goto(address)
    page.locator("[data-title]", has_text="latent 1234 of model.layers.2.mlp.down_proj").wait_for()
    near = page.locator(".panel a").first
    if near.count():
        wanted = near.inner_text().split(" ")[0]
        near.click()
        page.locator("[data-title]", has_text=f"latent {wanted} of").wait_for()
        page.go_back()
        page.locator("[data-title]", has_text="latent 1234 of").wait_for()
    page.locator(".latents tbody tr a").nth(3).focus()
    number = page.locator(".latents tbody tr a").nth(3).inner_text()
    page.keyboard.press("Enter")
    page.locator("[data-title]", has_text=f"latent {number} of").wait_for()
    page.set_viewport_size(dict(width=375, height=800))
    assert page.evaluate("document.documentElement.scrollWidth") == 375             # nothing hangs over on a phone
    page.goto(f"{thousands.as_uri()}#nowhere/1")
    page.get_by_text("There is no latent at").wait_for()


def test_without_javascript_there_is_a_table(thousands, chromium):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(thousands.as_uri())
    assert "needs JavaScript" in page.inner_text("body") and page.locator("table.rows tbody tr").count() == 60
    context.close()


# what other libraries read

def adapter_and_model(select, bias, k=3, d=24, m=40):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(d, d))
    adapt(model, ["0"], num_latents=m, k=k, select=select, encoder_bias=bias)
    (_, adapter), = find_adapters(model).items()
    for parameter in adapter.parameters(): torch.nn.init.normal_(parameter)
    model.double()                                                                  # so that agreement is agreement, not rounding
    return adapter, model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("select, architecture", [("relu", "topk"), ("abs", "abstopk")])
def test_saelens_computes_the_update(tmp_path, select, architecture, bias):
    sae_lens = pytest.importorskip("sae_lens", reason="needs the extra interp (SAELens)")
    adapter, model = adapter_and_model(select, bias)
    out = export_sae(model, tmp_path / "out", "saelens")
    sae, x = sae_lens.SAE.load_from_disk(next(p for p in out.iterdir() if p.is_dir())), torch.randn(64, 24, dtype=torch.float64)
    values, indices = adapter.encode(x)
    assert sae.cfg.architecture() == architecture
    torch.testing.assert_close(sae(x), adapter(x, torch.zeros(64, 24, dtype=torch.float64)))
    torch.testing.assert_close(sae.encode(x), torch.zeros(64, 40, dtype=torch.float64).scatter(1, indices, values))
    sae.save_model(tmp_path / "again")                                              # and back again, through their own saving
    torch.testing.assert_close(sae_lens.SAE.load_from_disk(tmp_path / "again")(x), sae(x))


@pytest.mark.parametrize("bias", [False, True])
def test_sparsify_computes_the_update(tmp_path, bias, monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")                              # its decoder's kernel needs a GPU, and adds up in single precision
    sparsify = pytest.importorskip("sparsify", reason="needs the extra interp (eai-sparsify)")
    adapter, model = adapter_and_model("relu", bias)
    out = export_sae(model, tmp_path / "out", "sparsify")
    sae, x = sparsify.Sae.load_from_disk(next(p for p in out.iterdir() if p.is_dir())), torch.randn(64, 24, dtype=torch.float64)
    torch.testing.assert_close(sae(x).sae_out, adapter(x, torch.zeros(64, 24, dtype=torch.float64)))
    sae.save_to_disk(tmp_path / "again")
    torch.testing.assert_close(sparsify.Sae.load_from_disk(tmp_path / "again")(x).sae_out, sae(x).sae_out)
    assert set(sparsify.Sae.load_many(str(out), local=True)) == {p.name for p in out.iterdir() if p.is_dir()}


def test_saedashboard_reads_neuronpedia_files(opened, tmp_path):
    dashboard = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard", reason="needs SAEDashboard, whose dependencies exclude ours")
    task, model, rows = opened
    out = export_neuronpedia(task, model, rows.select(range(50)), tmp_path / "out", layers=[LAYER], progress=False)
    content = json.loads(next(out.glob("*/batch-0.json")).read_text())
    batch = dashboard.NeuronpediaDashboardBatch(**content)
    again = json.loads(json.dumps(batch.to_dict()))
    assert again == content and len(batch.features) == 8 and len(batch.features[0].activations) > 10


def test_what_would_be_lost_is_refused(tmp_path):
    for to, select, why in (("saelens", "value", "selects by 'value'"), ("sparsify", "value", "selects by 'value'"), ("sparsify", "abs", "selects by 'abs'")):
        with pytest.raises(ValueError, match=why): export_sae(adapter_and_model(select, False)[1], tmp_path / "no", to)
    wide = torch.nn.Sequential(torch.nn.Linear(8, 12))
    adapt(wide, ["0"], num_latents=16, k=2, select="relu")
    with pytest.raises(ValueError, match="reads 8 numbers and writes 12"): export_sae(wide, tmp_path / "no", "saelens")
    assert not (tmp_path / "no").exists()
