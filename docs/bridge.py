"""From nbdev's notebooks to the pages that Sphinx and MyST-NB read.

    python docs/bridge.py      writes docs/_src/; a file whose content did not change is not touched

nbdev reads the notebooks and carries out the directives it knows how to (`hide`, `hide_line`, `filter_stream`); this file turns the rest into what
MyST-NB understands. Whatever it does not know (a directive, an output, a tag, a link to no lesson) is an error that names notebook and cell,
so that nothing reaches a reader half translated.
"""
import base64, json, re, struct, sys, tomllib
from pathlib import Path

from mdit_py_plugins.anchors.index import slugify
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, strip_ansi

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT)]
import api
from stan_nb.runs import esc, page
from stan_nb.viz import LIVE, module

ABOUT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY, SITE = ABOUT["urls"]["Repository"], ABOUT["urls"]["Documentation"]
COLAB = f"https://colab.research.google.com/github/{REPOSITORY.removeprefix('https://github.com/')}/blob/main/nbs"
DIRECTIVES = {"default_exp", "export", "exports", "exporti", "hide", "echo", "fig-alt", "cuda", "slow", "nostore", "measured", "hide_line", "filter_stream"}
TAGS = {"details", "summary", "sub", "sup", "kbd", "br", "code"}
PARTS = {"Ground": range(0, 10), "Method": range(10, 20), "Training": range(20, 24), "Modalities": range(24, 36), "Laws": range(36, 40),
         "Latents": range(40, 50), "Speed": range(50, 60), "Proof and use": range(60, 100)}
FACTS = ("Time", "Memory", "Hardware", "Level")


class Unknown(ValueError):
    "Something in a notebook that no rule here covers."


def lessons(): return sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))


def name_of(path): return re.sub(r"^\d\d_", "", Path(path).stem)


def read(path):
    "A notebook after nbdev's own processors: hidden cells are gone, directives are taken out of the source and kept in `directives_`."
    made = NBProcessor(path, procs=[strip_ansi, hide_line, filter_stream_, clean_magics, hide_], rm_directives=True)
    made.process()
    return made.nb.cells


def top(cells):
    "Title, promise, what it teaches, what it needs, and the facts, from the first two Markdown cells of a lesson."
    title, about = [cell.source for cell in cells if cell.cell_type == "markdown"][:2]
    found = re.match(r"# (?P<title>.+)\n\n> (?P<promise>.+)", title)
    if not found: raise Unknown("the first Markdown cell has to be `# Title` and `> promise`")
    said = dict(re.findall(r"\*\*(You will be able to|You need|Time|Memory|Hardware|Level)\*\*:? *((?:(?! · |\n\n|\*\*(?:You need|Time)\*\*).|\n(?!\n))+)", about))
    missing = {"You will be able to", "You need", *FACTS} - set(said)
    if missing: raise Unknown(f"the top of the lesson does not say {', '.join(sorted(missing))}")
    return found["title"], found["promise"], {key: " ".join(value.split()).rstrip(".") for key, value in said.items()}


def symbols(own=""):
    "What a name in backticks means: {short name: qualified name}; the lesson's own module goes first, a name of two other modules means nothing."
    found, twice = {}, set()
    for module_name in sorted(api.MODULES, key=lambda name: name != own):
        for short in api.names(module_name):
            if short in found and not found[short].startswith(f"stan_nb.{own}."): twice.add(short)
            found.setdefault(short, f"stan_nb.{module_name}.{short}")
    return {short: full for short, full in found.items() if short not in twice}


CODE = re.compile(r"(^ {0,3}```.*?^ {0,3}```[ \t]*$|(?:^(?: {4}|\t)[^\n]*\n?)+|\$\$.*?\$\$|(?<![\\$])\$(?:[^$\n]|\n(?!\n))+\$|`[^`\n]+`)", re.M | re.S)


def prose(text, names, known):
    "Markdown of a notebook as MyST: links to lessons and to the API. Raises Unknown for a construct that only some other program renders."
    for block in re.split(r"\n[ \t]*\n", text):
        if re.match(r" {0,3}</?[a-z]", block) and re.search(r"[`$]|\*\*", block): raise Unknown(f"Markdown in a block of HTML (leave a line blank before it): {block.strip()[:60]!r}")
    parts = CODE.split(text.replace("{{repository}}", REPOSITORY))            # in code, too: it is there to be copied
    for i, part in enumerate(parts):
        if i % 2:                                                            # code or formula
            inner = part.strip("`")
            lesson = re.fullmatch(r"(?:(?:nbs/)?(\d\d_\w+)(?:\.ipynb)?)", inner)
            if not re.fullmatch(r"`[^`\n]+`", part) or parts[i - 1].endswith("["): continue
            if lesson and name_of(lesson[1]) in known: parts[i] = f"[{part}]({name_of(lesson[1])}.ipynb)"
            elif inner.removesuffix("()") in names: parts[i] = f"{{py:obj}}`{inner} <{names[inner.removesuffix('()')]}>`"
            continue
        for tag in re.findall(r"</?([a-zA-Z][\w-]*)[^>]*>", part):
            if tag not in TAGS: raise Unknown(f"the tag <{tag}> in {part.strip()[:60]!r}")
        for leak in re.findall(r":::|\{\{|\{[.#%][^}]*\}|@fig-|@eq-|\\\(|\\\[", part): raise Unknown(f"{leak!r} in {part.strip()[:60]!r}")
        def link(found):
            if name_of(found[2]) not in known: raise Unknown(f"a link to {found[2]}, which is no lesson")
            return f"{found[1]}({name_of(found[2])}.ipynb{found[3] or ''})"
        part = re.sub(r"(\]|`)\((\d\d_\w+)\.ipynb(#[\w-]+)?\)", link, part)
        parts[i] = part
    return "".join(parts)


def png_size(data): return struct.unpack(">II", base64.b64decode(data)[16:24])


def picture(data, place):
    "A picture that moves: its twin, and what the page's script needs to put the moving one in its place."
    live, png = data[LIVE], "".join(data["image/png"])
    width, state = png_size(png)[0] // 2, json.dumps(live["state"]).replace("<", "\\u003c")
    files = {f"_static/live/{place}.png": base64.b64decode(png), f"_static/live/{live['name']}.js": module(live["name"]).encode()}
    files |= {f"_static/live/data/{path}": (ROOT / "stan_nb" / "data" / path).read_bytes() for path in live["state"].get("files", {}).values()}   # fetched when asked for
    html = (f'<div class="live" data-module="_static/live/{live["name"]}.js"><img src="_static/live/{place}.png" width="{width}" alt="{esc(live["alt"])}">'
            f'<script type="application/json">{state}</script></div>')
    return html, files


def outputs(cell, place, names, known):
    "The stored outputs as MyST-NB should show them, files that go with them, and the width of an image."
    kept, files, width = [], {}, None
    for output in cell.outputs:
        data = output.get("data", {})
        if output.output_type == "stream":
            if output.name == "stdout": kept.append(output)
            continue
        if output.output_type == "error": raise Unknown("a stored error")
        if LIVE in data:
            html, files = picture(data, place)
            data = {"text/html": html}
        elif "text/markdown" in data: data = {"text/markdown": prose("".join(data["text/markdown"]), names, known)}
        else:
            kind = next((k for k in ("text/html", "image/svg+xml", "image/png", "text/plain") if k in data), None)
            if kind is None: raise Unknown(f"an output of {', '.join(data) or 'nothing'}")
            if kind == "image/png": width = png_size("".join(data[kind]))[0] // 2
            data = {kind: "".join(data[kind])}
        kept.append({**output, "data": data, "metadata": {}})
    return kept, files, width


def code(cell, place, names, known):
    "A code cell as MyST-NB reads it, and the files of its pictures; None for a cell that readers do not see."
    said = cell.directives_
    strange = set(said) - DIRECTIVES
    if strange: raise Unknown(f"the directive {', '.join(sorted(strange))}")
    if "default_exp" in said or "exporti" in said and not cell.outputs and not cell.source.strip(): return None, {}
    shown, files, width = outputs(cell, place, names, known)
    image = {key: value for key, value in dict(alt=said.get("fig-alt", ""), width=f"{width}px" if width else "").items() if value}
    if width and "alt" not in image: raise Unknown("a figure without `#| fig-alt:`")
    tags = ["remove-input"] if said.get("echo") == "false" else ["hide-input"] if {"export", "exporti"} & set(said) else []
    about = {"tags": tags, "mystnb": {**({"image": image} if image else {}), **({"code_prompt_show": "Module code: show", "code_prompt_hide": "Module code: hide"} if "hide-input" in tags else {})}}
    return dict(cell_type="code", id=cell.id, execution_count=None, source=cell.source, outputs=shown, metadata={k: v for k, v in about.items() if v}), files


def markdown(source, id): return dict(cell_type="markdown", id=id, metadata={}, source=source)


def head(path, cells, names, known):
    "The top of a lesson's page: title, promise, buttons, and what it teaches and takes."
    title, promise, said = top(cells)
    buttons = (f'<p class="buttons"><a href="{COLAB}/{path.name}">Open in Colab</a><a href="notebooks/{path.name}" download>Download notebook</a>'
               f'<a href="{REPOSITORY}/blob/main/nbs/{path.name}">View source</a></p>')
    facts = " · ".join(f"**{key}**: {said[key]}" for key in FACTS)
    return (f"# {path.stem[:2]} · {title}\n\n{{.promise}}\n{prose(promise, names, known)}\n\n{buttons}\n\n:::{{admonition}} This lesson\n:class: lesson\n"
            f"You will be able to {prose(said['You will be able to'], names, known)}.\n\n**You need** {prose(said['You need'], names, known)}.\n\n{facts}\n:::")


def lesson(path, known):
    "A lesson as a notebook for MyST-NB, and the files it needs. Raises Unknown, naming notebook and cell."
    cells, own = read(path), name_of(path)
    names, made, files, seen = symbols(own), [], {}, 0
    for cell in cells:
        try:
            if cell.cell_type == "markdown":
                seen += 1
                if seen == 1 and path.stem != "index": made.append(markdown(head(path, cells, names, known), cell.id))
                elif seen == 2 and path.stem != "index": continue
                else:
                    text = re.sub(r"^\[!\[Open in Colab\].*\n\n?", "", cell.source, flags=re.M)
                    made.append(markdown(prose(text, names, known).replace("\n> ", "\n{.promise}\n", seen == 1), cell.id))
            else:
                new, more = code(cell, f"{own}-{cell.id}", names, known)
                files |= more
                if new: made.append(new)
        except Unknown as error: raise Unknown(f"{path.name}, cell {cell.id}: {error}") from None
    promise = re.search(r"^> (.+)", next(cell.source for cell in cells if cell.cell_type == "markdown"), re.M)[1]
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}, "language_info": {"name": "ipython3"},
             "myst": {"html_meta": {"description": re.sub("[`*$]", "", promise)}}}
    return dict(cells=made, metadata=about, nbformat=4, nbformat_minor=5), files


def toc(paths, modules):
    "The order of all pages, for the end of the home page."
    blocks = []
    for part, numbers in PARTS.items():
        own = [f"{name_of(p)}.ipynb" for p in paths if int(p.stem[:2]) in numbers]
        if own: blocks.append(f"```{{toctree}}\n:caption: {part}\n:hidden:\n\n" + "\n".join(own) + "\n```")
    blocks.append("```{toctree}\n:caption: Reference\n:hidden:\n\n" + "\n".join(f"api/{m}" for m in modules) + "\n```")
    blocks.append("```{toctree}\n:caption: Project\n:hidden:\n\nchangelog\ncontributing\n```")
    return "\n\n".join(blocks)


def twin(path):
    "A page as plain Markdown, for readers that are programs."
    parts = []
    for cell in read(path):
        if cell.cell_type == "markdown": parts.append(cell.source.replace("{{repository}}", REPOSITORY))
        elif "default_exp" not in cell.directives_:
            if cell.directives_.get("echo") != "false": parts.append(f"```python\n{cell.source}\n```")
            for output in cell.outputs:
                data = output.get("data", {})
                text = "".join(data.get("text/markdown") or data.get("text/plain") or (output.get("text", "") if output.get("name") == "stdout" else ""))
                if text.strip(): parts.append(text if "text/markdown" in data else "\n".join(f"    {line}" for line in text.rstrip().splitlines()))
    text = re.sub(r"^\[!\[Open in Colab\].*\n\n?", "", "\n\n".join(parts), flags=re.M)
    return re.sub(r"\((\d\d_\w+)\.ipynb", lambda m: f"({name_of(m[1])}.html.md", text) + "\n"


def llms(paths):
    "An index of the course for language models (https://llmstxt.org)."
    rows = [(name_of(p), *top(read(p))[:2]) for p in paths]
    return f"# {ABOUT['name']}\n\n> {ABOUT['description']}\n\n## Lessons\n\n" + "\n".join(f"- [{t}]({SITE}/{n}.html.md): {promise}" for n, t, promise in rows) + "\n"


def pages():
    "Everything that Sphinx reads: {path below docs/_src: bytes}."
    paths = lessons()
    known, made = {name_of(p) for p in paths}, {}
    for path in [*paths, ROOT / "nbs" / "index.ipynb"]:
        nb, files = lesson(path, known)
        if path.stem == "index": nb["cells"].append(markdown(toc(paths, api.MODULES), "toc"))
        made |= files | {f"{name_of(path)}.ipynb": (json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()}
        made |= {f"_extra/{name_of(path)}.html.md": twin(path).encode(), f"_extra/notebooks/{path.name}": path.read_bytes()}
    for name in api.MODULES: made[f"api/{name}.md"] = api.page(name, where(paths, name)).encode()
    for name, title in dict(CHANGELOG="changelog", CONTRIBUTING="contributing").items(): made[f"{title}.md"] = (ROOT / f"{name}.md").read_bytes()
    base = re.sub(r"^https?://[^/]+", "", SITE)
    lost = page("There is no such page", [("Where to go", [f"The address {base}/… leads nowhere.", Home(base)])], "The course may have moved it.")
    return made | {"_extra/llms.txt": llms(paths).encode(), "_extra/404.html": lost.encode(), "_extra/.nojekyll": b""}


class Home(str):
    "The link of the not-found page."
    def __html__(self): return f'<p><a href="{self}/">All lessons</a> · <a href="{self}/search.html">Search</a></p>'


def where(paths, name):
    "Where a module is explained: (page, {symbol: anchor of the heading above it}); the page is None for a module that no lesson exports."
    for path in paths:
        if name_of(path) != name: continue
        anchors, anchor = {}, ""
        for cell in read(path):
            if cell.cell_type == "markdown":
                for title in re.findall(r"^#{1,4} (.+)$", cell.source, re.M): anchor = slugify(re.sub(r"[`*]", "", title))
            elif {"export", "exports", "exporti"} & set(cell.directives_):
                for symbol in re.findall(r"^(?:def|class) (\w+)|^([A-Z]\w*) *=", cell.source, re.M): anchors["".join(symbol)] = anchor
        return f"../{name}.ipynb", anchors
    return None, {}


def write(files, folder):
    "Write what changed, delete what is gone. Returns the names that were written or deleted."
    touched = []
    for name, content in files.items():
        path = folder / name
        if path.exists() and path.read_bytes() == content: continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        touched.append(name)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in files:
            path.unlink()
            touched.append(path.relative_to(folder).as_posix())
    return touched


if __name__ == "__main__": print("written:", ", ".join(write(pages(), DOCS / "_src")) or "nothing")
