"What a reader meets: every page whole and by itself, search, pictures that move by mouse and keyboard, two grounds, a narrow screen, and no barriers."
import json, re
from urllib.parse import urljoin, urlparse

import pytest

from course import BUILT, ROOT

AXE = ROOT / "docs" / "node_modules" / "axe-core" / "axe.min.js"
SLIDER = ".live input[type=range]"
LEAKS = re.compile(r"\\\(|:::|\{py:|\{eq\}|#\||\{target|\{\{<|@fig-|\{#fig|\{\{repository|\{\.promise")


def test_every_page_is_whole(visit, pages):
    "No error, nothing asked of others, maths set, images described, links that lead somewhere, no markup shown as text."
    wrong, page = [], visit("index.html")
    assert len(pages) > 25
    for name in [*pages, "genindex.html", "search.html"]:
        page.goto(urljoin(page.url, f"/{name}"), wait_until="networkidle")
        facts = page.evaluate("""() => ({
            text: [...document.querySelectorAll('article')].map(a => { const c = a.cloneNode(true); c.querySelectorAll('pre, code, script').forEach(n => n.remove()); return c.textContent }).join(' '),
            formulas: document.querySelectorAll('span.math, div.math').length, set: document.querySelectorAll('mjx-container').length, failed: document.querySelectorAll('mjx-merror').length,
            silent: [...document.images].filter(i => !i.alt.trim()).map(i => i.src), broken: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
            links: [...document.querySelectorAll('a[href]')].map(a => a.href), title: document.title })""")
        leaks = LEAKS.findall(facts["text"])
        if leaks: wrong.append(f"{name}: {leaks[:3]} shown as text")
        if facts["failed"] or facts["set"] < facts["formulas"]: wrong.append(f"{name}: {facts['set']} of {facts['formulas']} formulas are set, {facts['failed']} failed")
        if facts["silent"] or facts["broken"]: wrong.append(f"{name}: images without alt {facts['silent'][:2]}, or broken {facts['broken'][:2]}")
        for link in {urlparse(link)._replace(fragment="").path for link in facts["links"] if link.startswith(page.url.rsplit("/", 1)[0].split("/api")[0])}:
            if not (BUILT / (link.strip("/") or "index.html")).is_file(): wrong.append(f"{name}: a link to {link}")
        if page.trouble: wrong.append(f"{name}: {page.trouble}")
        page.trouble.clear()
    assert wrong == []


def test_lessons_lead_to_colab_and_to_their_notebook(visit):
    page = visit("layer.html")
    links = {a.inner_text(): a.get_attribute("href") for a in page.query_selector_all(".buttons a")}
    assert links["Open in Colab"].endswith("/blob/main/nbs/11_layer.ipynb") and links["Open in Colab"].startswith("https://colab.research.google.com/github/")
    assert links["View source"].endswith("/blob/main/nbs/11_layer.ipynb")
    stored = page.request.get(urljoin(page.url, links["Download notebook"]))
    assert stored.ok and stored.body() == (ROOT / "nbs" / "11_layer.ipynb").read_bytes()
    assert page.locator(".prev-next-footer a, .prev-next-area a").count() == 2 and page.locator("button.copybtn").count() > 10
    assert page.get_attribute("meta[name=description]", "content") == "Wrap any frozen linear layer, and adapt a model of your own in one call."


def test_search_finds_a_term(visit):
    page = visit("search.html?q=subspace")
    page.wait_for_selector("ul.search li p.context")
    assert not LEAKS.search(page.inner_text("ul.search"))
    assert any("TopK" in item.inner_text() for item in page.query_selector_all("ul.search li a")) and not page.trouble


def test_a_lost_reader_is_told(visit):
    page = visit("nowhere.html")
    assert "There is no such page" in page.inner_text("h1") and page.get_attribute("a", "href") == "/stan_nb/"


def test_the_home_pages_slider_moves_by_mouse_and_by_key(visit):
    page = visit("index.html")
    said, handle = page.locator(".live output"), page.locator(SLIDER)
    before, filled = said.inner_text(), page.locator(".live svg rect:not([fill=none])").count()
    handle.focus()
    page.keyboard.press("ArrowRight")
    assert said.inner_text() != before and page.locator(".live svg rect:not([fill=none])").count() == filled + 1
    box = handle.bounding_box()
    page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
    assert said.inner_text().startswith("k = 1 of 16: one of 16 sets")
    page.locator(".live select").select_option("value")
    assert page.locator(".live svg").first.get_attribute("aria-label").startswith("16 latents as bars; kept:")
    assert not page.trouble


def test_k_equal_to_the_number_of_latents_is_lora(visit):
    page = visit("index.html")
    page.locator(SLIDER).focus()
    page.keyboard.press("End")
    circles = [(c.get_attribute("cx"), c.get_attribute("cy")) for c in page.query_selector_all(".live circle")]
    assert len(circles) == 2 and circles[0] == circles[1] and "k = 16 of 16: one of 1 sets · 100%" in page.inner_text(".live output")


def test_the_planes_turn(visit):
    page = visit("viz.html")
    picture = page.locator(".live", has_text="the same")
    place = lambda: [c.get_attribute("cx") for c in picture.locator("circle").all()][:10]
    before = place()
    picture.locator("input").focus()
    for _ in range(5): page.keyboard.press("ArrowRight")
    turned = place()
    assert turned != before
    svg = picture.locator("svg").first
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 50, steps=4)
    page.mouse.up()
    assert place() != turned and not page.trouble


def test_a_token_walks(visit):
    page = visit("viz.html")
    picture = page.locator(".live", has=page.locator("button"))
    picture.locator("input").focus()
    page.keyboard.press("Home")
    assert picture.locator("output").inner_text().startswith("A token arrives")
    picture.locator("button").click()
    page.wait_for_function("document.querySelector('.live button').closest('.live').querySelector('output').textContent.startsWith('Encoder')")
    assert picture.locator("button").inner_text() == "pause"
    picture.locator("button").click()
    assert picture.locator("button").inner_text() == "play" and not page.trouble


def test_an_answer_is_read_again_token_by_token(visit):
    page = visit("math_code.html")
    picture = page.locator(".live")
    said, marked = picture.locator("output"), picture.locator("span[style*=outline]")
    assert re.match(r"token (\d+) of \1 · #", said.inner_text()) and marked.count() == 1            # the last one, as it was when the answer was complete
    picture.locator("input").focus()
    page.keyboard.press("Home")
    first = said.inner_text()
    page.keyboard.press("ArrowRight")
    assert first.startswith("token 1 of") and said.inner_text().startswith("token 2 of") and said.inner_text()[12:] != first[12:]
    assert picture.locator("svg rect").count() == said.inner_text().count("#") == 4 and marked.count() == 1 and not page.trouble


def test_explorers_follow_the_hand(visit):
    "The page of another latent, another latent on the same text, what fires on a word, a dose."
    page = visit("explorers.html")
    leaf, text, dose = (page.locator(".live").nth(i) for i in range(3))
    leaf.locator("select").select_option("1")
    assert leaf.locator("[data-title]").inner_text().startswith("latent 1 of model.layers.1.mlp.down_proj")
    before = text.locator("output").inner_text()
    text.get_by_label("next latent").click()
    assert text.locator("output").inner_text() != before
    text.locator("[data-token='2']").click()
    name = text.locator("button", has_text="latent").last.inner_text().rsplit(" ", 1)[0]
    text.locator("button", has_text=name).last.click()
    assert text.locator("output").inner_text().startswith(f"{name} fires on")
    dose.locator("input").focus()
    page.keyboard.press("End")
    assert " × 8: " in dose.locator("output").inner_text() and not page.trouble


def test_without_javascript_there_is_a_picture(visit):
    page = visit("index.html", java_script_enabled=False)
    still = page.locator(".live img")
    assert still.is_visible() and "latents" in still.get_attribute("alt") and page.locator(SLIDER).count() == 0


def test_the_ground_is_remembered(visit):
    page = visit("index.html")
    ground = lambda: page.evaluate("document.documentElement.dataset.theme")
    page.locator("button.theme-switch-button:visible").first.click()
    page.locator("button.theme-change-button[data-mode=dark]:visible").first.click()
    assert ground() == "dark"
    page.goto(urljoin(page.url, "/layer.html"), wait_until="networkidle")
    assert ground() == "dark"


def test_nothing_hangs_over_on_a_phone(visit, pages):
    page, wide = visit("index.html", width=375), []
    for name in pages:
        page.goto(urljoin(page.url, f"/{name}"), wait_until="networkidle")
        if page.evaluate("document.documentElement.scrollWidth") > 375: wide.append(name)
    assert wide == []


@pytest.mark.parametrize("width", [1280, 1440, 1920])
def test_code_has_room(visit, width):
    "A line of 115 characters is seen as a whole, in shown and in unfolded cells; prose keeps a readable measure."
    page = visit("layer.html", width=width)
    page.evaluate("document.querySelectorAll('details.hide').forEach(d => d.open = true)")
    room, prose = page.evaluate("""() => {
        const ruler = document.createElement('span'), blocks = [...document.querySelectorAll('div.highlight pre')]
        ruler.textContent = '0'.repeat(115)
        const room = blocks.map(b => { b.append(ruler); const wide = b.scrollWidth - b.clientWidth, own = ruler.getBoundingClientRect().width; ruler.remove(); return (b.clientWidth - 32) / own })
        return [Math.min(...room), Math.max(...[...document.querySelectorAll('article p')].map(p => p.clientWidth))] }""")
    assert room > 1 and prose <= 52 * 16
    assert (page.locator("#pst-secondary-sidebar").is_visible(), page.locator("button.secondary-toggle").first.is_visible()) == ((True, False) if width > 1519 else (False, True))
    if width == 1280:
        page.locator("button.secondary-toggle").first.click()
        assert page.locator("dialog nav.page-toc a", has_text="Does it learn?").is_visible()


def test_what_does_not_fit_scrolls_in_its_box(visit):
    "On a phone a figure stays wide enough to read, and a parameter's meaning stands below it."
    page = visit("layer.html", width=390)
    figure = page.locator("div.cell_output > a.image-reference").last
    assert figure.locator("img").bounding_box()["width"] >= 500 and figure.bounding_box()["width"] < 390
    assert figure.evaluate("e => { e.scrollLeft = 999; return e.scrollLeft }") > 100
    page.goto(urljoin(page.url, "/api/peft.html"), wait_until="networkidle")
    hidden = page.evaluate("[...document.querySelectorAll('dl.py td:last-child')].filter(c => c.textContent.trim() && c.getBoundingClientRect().right > innerWidth).map(c => c.textContent)")
    assert hidden == []


def test_lessons_have_their_numbers(visit):
    page = visit("layer.html")
    assert page.inner_text("h1").startswith("11 · A linear layer that adapts") and page.title().startswith("11 · ")
    shown = [a.inner_text() for a in page.query_selector_all("nav.bd-links a.reference.internal")]
    assert {"00 · Settings", "13 · STAN as a PEFT method"} <= set(shown)


def test_a_config_shows_its_own_fields_first(visit):
    page = visit("api/peft.html")
    entry = page.locator("dl.py.class", has=page.locator("#stan_nb\\.peft\\.StanConfig"))
    names = [cell.inner_text() for cell in entry.locator("td:first-child").all()]
    assert names[:3] == ["num_latents", "k", "alpha"] and "task_type" not in names
    also = entry.locator("p", has_text="And the fields of")
    assert also.count() == 1 and "task_type" in also.inner_text() and also.locator("a").first.get_attribute("href").startswith("https://huggingface.co/docs/peft")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index.html", "viz.html", "explorers.html", "layer.html", "api/layer.html", "search.html?q=latent", "404.html"])
def test_no_barriers(visit, name, theme):
    page = visit(name, theme=theme, bypass_csp=True)
    page.add_script_tag(content=AXE.read_text())
    found = page.evaluate("axe.run().then(r => r.violations.filter(v => ['serious', 'critical'].includes(v.impact)).map(v => [v.id, v.nodes.length, v.nodes.slice(0, 3).map(n => n.html.slice(0, 200) + ' ' + (n.any[0]?.message ?? ''))]))")
    assert found == [], json.dumps(found, indent=1)


def test_a_reader_turns_latents_on_the_page(visit):
    "The model is fetched when the button is pressed, the digits appear, and a slider of a style and one of a single latent each change what the adapter draws."
    page = visit("steering.html")
    live = page.locator(".live", has=page.locator("canvas"))
    button, drawn = live.get_by_role("button", name="Load the model"), lambda: live.locator("canvas").evaluate_all("(all) => all.map((c) => c.toDataURL())")
    button.scroll_into_view_if_needed()
    button.click()
    live.locator("[role=status]", has_text="steps").wait_for(timeout=60_000)
    sliders, before = live.locator("input[type=range]"), drawn()
    assert sliders.count() == 12 and before[0] != before[1]
    def changes(act):
        was = drawn()
        act()
        page.wait_for_function("(was) => [...document.querySelectorAll('.live canvas')][1].toDataURL() !== was", arg=was[1], timeout=60_000)
        assert drawn()[0] == was[0]
    single = live.locator("label", has_text="(moves ").first
    style = single.inner_text().split("(moves ")[1].split(")")[0]
    live.locator("select").nth(1).select_option(style)                   # the base hears the word, too: both pictures are new
    live.locator("[role=status]", has_text=style).wait_for(timeout=60_000)
    changes(lambda: single.locator("input").fill("0"))
    changes(lambda: live.get_by_label(f"latents of {style}").fill("0"))
    assert not page.trouble
