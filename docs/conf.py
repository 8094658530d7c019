"The site. `docs/bridge.py` writes what is read here; nothing is executed."
import tomllib
from importlib.resources import files
from pathlib import Path

DOCS = Path(__file__).resolve().parent
about = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
repository, address = about["urls"]["Repository"], about["urls"]["Documentation"]

project = html_title = about["name"]
author = about["authors"][0]["name"]
project_copyright = author
language = "en"
extensions = ["myst_nb", "sphinx_copybutton"]
root_doc = "index"
exclude_patterns = ["_extra", "_static"]
templates_path = ["templates"]

nb_execution_mode = "off"
nb_execution_cache_path = str(DOCS / "_build" / ".cache")
nb_ipywidgets_js = {}                        # our pictures need no widget manager
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline", "attrs_block", "deflist"]
myst_heading_anchors = 4

mathjax_path = "mathjax/tex-chtml.js"
mathjax4_config = {
    "loader": {"paths": {"fonts": "[mathjax]/fonts"}},
    "output": {"displayOverflow": "scroll", "fontPath": "[fonts]/%%FONT%%-font"},
    "options": {"enableSpeech": False, "enableBraille": False, "enableEnrichment": False, "menuOptions": {"settings": {"enrich": False, "speech": False, "braille": False}}},
}

html_theme = "sphinx_book_theme"
html_baseurl = address + "/"
html_favicon = "static/favicon.svg"
html_static_path = ["static", "_src/_static", "_vendor"]
html_extra_path = ["_src/_extra"]
html_css_files = ["course.css"]
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None
html_theme_options = {
    "repository_url": repository, "use_repository_button": True, "use_download_button": False, "use_fullscreen_button": False,
    "navbar_persistent": [], "show_toc_level": 2, "home_page_in_toc": True, "search_bar_text": "Search the course",
}
html_context = {"default_mode": "auto"}


def style(app):
    "MyST-NB copies its style sheet when all pages are written; they need its checksum before, or a second build would change them all."
    from myst_nb import static
    name = next(name for name, _ in app.registry.css_files if name.startswith("mystnb"))
    Path(app.outdir, "_static").mkdir(parents=True, exist_ok=True)
    Path(app.outdir, "_static", name).write_bytes((files(static) / "mystnb.css").read_bytes())


def sitemap(app, error):
    "Every page, whether it was rebuilt in this run or not."
    if error or app.builder.name != "html": return
    names = sorted(app.env.found_docs)
    rows = "".join(f"<url><loc>{address}/{'' if name == root_doc else f'{name}.html'}</loc></url>\n" for name in names)
    Path(app.outdir, "sitemap.xml").write_text(f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{rows}</urlset>\n')


def mend(app, pagename, templatename, context, doctree):
    "MyST-NB names the button of a folded cell otherwise than what is written on it."
    context["body"] = context.get("body", "").replace('<summary aria-label="Toggle hidden content">', "<summary>")


def scripts(app, pagename, templatename, context, doctree):
    "The script of the moving pictures, on pages that have one; the one of the search, on its own."
    if pagename == "search": app.add_js_file("search.js", priority=900, loading_method="defer")
    if doctree is not None and any('class="live"' in node.astext() for node in doctree.findall(lambda n: n.tagname == "raw")):
        app.add_js_file("live.js", type="module")


def setup(app):
    app.connect("builder-inited", style)
    app.connect("build-finished", sitemap)
    app.connect("html-page-context", mend)
    app.connect("html-page-context", scripts)
