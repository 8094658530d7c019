"The site: MyST-NB renders the stored notebooks as they are; nothing is executed."
import json, re, tomllib
from pathlib import Path

about = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
project = html_title = about["name"]
author = copyright = about["authors"][0]["name"]
extensions = ["myst_nb", "sphinx_copybutton"]
exclude_patterns = ["_*", "**/.ipynb_checkpoints", "llms.txt"]
root_doc = "index"
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_render_markdown_format = "gfm"   # tables in outputs
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
html_theme = "sphinx_book_theme"
html_theme_options = {"repository_url": about["urls"]["Repository"], "path_to_docs": "nbs", "use_repository_button": True,
                      "use_download_button": True, "navbar_persistent": []}
suppress_warnings = ["mystnb.unknown_mime_type"]


def readable(app, name, text):
    "nbdev's `#|` lines are for machines: readers see the code below them; cells marked `hide` are left out."
    nb = json.loads(text[0])
    kept = []
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search(r"^#\|\s*(hide|default_exp)\b", source, re.M): continue
        if re.search(r"^#\|\s*echo:\s*false", source, re.M): cell["metadata"]["tags"] = ["remove-input"]
        cell["source"] = re.sub(r"^#\|.*\n?", "", source, flags=re.M).replace("{{repository}}", about["urls"]["Repository"])
        kept.append(cell)
    if name == "index":
        pages = sorted(p.stem for p in Path(app.srcdir).glob("[0-9]*.ipynb"))
        toc = "```{toctree}\n:hidden:\n" + "\n".join(pages) + "\n```"
        kept.append({"cell_type": "markdown", "id": "toctree", "metadata": {}, "source": toc})
    text[0] = json.dumps(nb | {"cells": kept})


def setup(app): app.connect("source-read", readable)
