"The bridge from nbdev's notebooks to the site's pages: what it translates, and that it refuses what it does not know."
import base64, io, json, sys

import pytest
from PIL import Image

from course import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import api, bridge, store

TOP = ["# A lesson\n\n> Its promise.\n\n[![Open in Colab](x)](y)",
       "**You will be able to** walk,\nand run.\n\n**You need** `10_topk`.\n\n**Time**: 3 minutes · **Memory**: 0.1 GiB · **Hardware**: CPU · **Level**: beginner"]


def png(width=40, height=20):
    out = io.BytesIO()
    Image.new("RGBA", (width, height), (10, 200, 30, 255)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def cell(source, *outputs, kind="code", id="c1"):
    return dict(cell_type=kind, id=id, metadata={}, source=source) | (dict(execution_count=None, outputs=list(outputs)) if kind == "code" else {})


def shown(**data): return dict(output_type="display_data", metadata={}, data={key.replace("_", "/"): value for key, value in data.items()})


def book(path, *cells):
    top = [cell("#| default_exp alpha")] + [cell(text, kind="markdown", id=f"t{i}") for i, text in enumerate(TOP)]
    path.write_text(json.dumps(dict(cells=[*top, *cells], metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}, nbformat=4, nbformat_minor=5)))
    return path


@pytest.fixture
def made(tmp_path):
    def make(*cells): return bridge.lesson(book(tmp_path / "10_alpha.ipynb", *cells), {"alpha", "topk", "layer"})
    return make


def test_the_top_of_a_lesson(made):
    head = made()[0]["cells"][0]["source"]
    assert head.startswith("# 10 · A lesson\n\n{.promise}\nIts promise.") and 'href="notebooks/10_alpha.ipynb" download' in head
    assert "blob/main/nbs/10_alpha.ipynb" in head and "**Memory**: 0.1 GiB" in head and "[`10_topk`](topk.ipynb)" in head and "colab-badge" not in head


def test_every_lesson_has_all_facts():
    for path in bridge.lessons():
        title, promise, said = bridge.top(bridge.read(path))
        assert int(said["Time"].split()[0]) > 0 and float(said["Memory"].split()[0]) > 0 and said["Level"] in ("beginner", "intermediate", "advanced")


def test_directives(made):
    cells = made()[0]["cells"]
    assert len(cells) == 1                                            # default_exp shows nothing
    nb, _ = made(cell("#| hide\na"), cell("#| export\nb"), cell("#| exports\nc"), cell("#| echo: false\nprint(1)", dict(output_type="stream", name="stdout", text="1\n")),
                 cell("#| measured\nd", dict(output_type="stream", name="stderr", text="warning")))
    found = {c["source"]: c for c in nb["cells"][1:]}
    assert list(found) == ["b", "c", "print(1)", "d"]
    assert found["b"]["metadata"]["tags"] == ["hide-input"] and "tags" not in found["c"]["metadata"] and found["print(1)"]["metadata"]["tags"] == ["remove-input"]
    assert found["d"]["outputs"] == [] and found["print(1)"]["outputs"][0]["text"] == "1\n"


@pytest.mark.parametrize("strange, message", [
    (cell("#| colour: red\na"), "the directive colour"),
    (cell("a", shown(application_json={})), "an output of application/json"),
    (cell("a", dict(output_type="error", ename="E", evalue="", traceback=[])), "a stored error"),
    (cell("a", shown(image_png=png())), "without `#| fig-alt:`"),
    (cell("<img src=x>", kind="markdown"), "the tag <img>"),
    (cell("<details><summary>Answer</summary>`x`\n</details>", kind="markdown"), "Markdown in a block of HTML"),
    (cell("::: {.callout-note}", kind="markdown"), "':::'"),
    (cell("see @fig-one", kind="markdown"), "'@fig-'"),
    (cell("a {{< video x >}}", kind="markdown"), "'{{'"),
    (cell(r"\(x\)", kind="markdown"), "in"),
    (cell("# Title {#sec-x}", kind="markdown"), "'{#sec-x}'"),
    (cell("[more](99_nowhere.ipynb)", kind="markdown"), "99_nowhere, which is no lesson"),
])
def test_what_is_not_known_is_an_error_that_names_the_cell(made, strange, message):
    with pytest.raises(bridge.Unknown, match=r"10_alpha.ipynb, cell c1") as caught: made(strange)
    assert message in str(caught.value)


def test_a_lesson_without_its_facts_is_an_error(tmp_path):
    path = book(tmp_path / "10_alpha.ipynb")
    path.write_text(path.read_text().replace("**Level**: beginner", ""))
    with pytest.raises(bridge.Unknown, match="does not say Level"): bridge.lesson(path, set())


def test_prose_links_to_lessons_and_to_the_reference():
    names = {"adapt": "stan_nb.layer.adapt"}
    say = lambda text: bridge.prose(text, names, {"layer"})
    assert say("call `adapt` or `adapt()`, not `adapted`") == "call {py:obj}`adapt <stan_nb.layer.adapt>` or {py:obj}`adapt() <stan_nb.layer.adapt>`, not `adapted`"
    assert say("[the layer](11_layer.ipynb#keeping-it)") == "[the layer](layer.ipynb#keeping-it)"
    assert say("[`11_layer`](11_layer.ipynb) and `11_layer`") == "[`11_layer`](layer.ipynb) and [`11_layer`](layer.ipynb)"
    for kept in ("$a < b$ and $$\\begin{x} {#} \\end{x}$$", "```python\n<img> {{x}} `adapt`\n```", "    <img> `adapt`\n", "`<img>`"): assert say(kept) == kept


def test_short_names_mean_one_thing():
    names = bridge.symbols("layer")
    assert names["adapt"] == "stan_nb.layer.adapt" and names["Run.create"] == "stan_nb.runs.Run.create"
    assert bridge.symbols("measure")["spread"] == "stan_nb.measure.spread" and "spread" not in bridge.symbols("layer")     # cli has one, too
    assert all(not part.startswith("_") for name in names for part in name.split("."))


def test_a_figure_is_shown_at_half_its_pixels(made):
    nb, _ = made(cell("#| fig-alt: A green box.\nplot()", shown(image_png=png(), text_plain="<Figure>")))
    assert nb["cells"][1]["metadata"]["mystnb"]["image"] == dict(alt="A green box.", width="20px") and list(nb["cells"][1]["outputs"][0]["data"]) == ["image/png"]


def test_a_picture_that_moves(made):
    state = dict(z=[1.], rows=[[1., 0.]], k=1, select="</script>")
    nb, files = made(cell("#| fig-alt: x\nlive()", shown(image_png=png(), text_plain="a box", **{bridge.LIVE.replace("/", "_"): dict(name="topk", alt='a "box"', state=state)})))
    html = nb["cells"][1]["outputs"][0]["data"]["text/html"]
    assert sorted(files) == ["_static/live/alpha-c1.png", "_static/live/topk.js"] and b"export default" in files["_static/live/topk.js"]
    assert 'alt="a &quot;box&quot;"' in html and html.count("</script>") == 1 and 'width="20"' in html


def test_only_what_changed_is_written(tmp_path):
    assert bridge.write({"a": b"1", "b/c": b"2"}, tmp_path) == ["a", "b/c"]
    before = (tmp_path / "a").stat().st_mtime_ns
    assert bridge.write({"a": b"1", "d": b"3"}, tmp_path) == ["d", "b/c"] and (tmp_path / "a").stat().st_mtime_ns == before
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["a", "d"]


def test_the_twin_is_plain_markdown(tmp_path):
    path = book(tmp_path / "10_alpha.ipynb", cell("x = 1\nx", dict(output_type="execute_result", metadata={}, execution_count=None, data={"text/plain": "1"})),
                cell("[next](11_layer.ipynb)", kind="markdown"))
    text = bridge.twin(path)
    assert "```python\nx = 1\nx\n```\n\n    1\n" in text and "(layer.html.md)" in text and "colab" not in text


def test_reference_pages():
    page = api.page("layer", ("../layer.ipynb", {"adapt": "a-whole-model-in-one-call"}))
    assert ":::{py:function} adapt(model, targets, **options)" in page and "| `targets` | str \\| list[str] |  | layer names or their ends" in page
    assert "[lesson](../layer.ipynb#a-whole-model-in-one-call)" in page and "blob/main/stan_nb/layer.py#L" in page
    assert '| `**options` |  |  | num_latents=64, k=8, alpha=16., select="abs", dropout=0., encoder_bias=False: see `StanLinear` |' in page
    assert "{py:property} k" in page and "{py:method} encode(x)" in page and "**returns**" in page
    for name in api.MODULES: assert "0x" not in api.page(name, (None, {}))                       # no addresses: the same in every process


def test_reference_of_a_class_with_fields_of_others():
    page = api.page("peft", (None, {}))
    table = page[page.index("{py:class} StanConfig(num_latents=64, k=8,"):page.index("{py:method} to_dict")]
    assert "| `k_pattern` | dict[str, int] | `{}` |" in table and "factory" not in page and "**others)" in table
    assert "`task_type`" in table.split("And the fields of [PeftConfig](https://huggingface.co/docs/peft/")[1] and "| `task_type`" not in table


def test_stored_outputs(tmp_path):
    long = cell("#| nostore\na", dict(output_type="stream", name="stdout", text="x"))
    assert store.tidy(long) == []
    noisy = cell("a", dict(output_type="stream", name="stderr", text="x"), shown(**{"application_vnd.jupyter.widget-view+json": {}}, image_png=png()))
    (kept,) = store.tidy(noisy)
    assert list(kept["data"]) == ["image/png"] and kept["data"]["image/png"] == store.smaller(kept["data"]["image/png"])
    nb = dict(cells=[cell("a = 1"), cell("text", kind="markdown")], metadata={})
    former = store.code_hash(nb)
    nb["cells"][1]["source"] = "other text"
    assert store.code_hash(nb) == former
    nb["cells"][0]["source"] = "a = 2"
    assert store.code_hash(nb) != former


def test_the_address_is_filled_in_where_it_is_copied_from():
    "In code as in prose."
    for text in ("see {{repository}}", "```sh\ngit clone {{repository}} x\n```", "`{{repository}}`"): assert "{{" not in bridge.prose(text, {}, set())
