"""nbs/index.ipynb -> README.md, without Quarto.

    python docs/readme.py           writes README.md and its pictures in docs/images/
    python docs/readme.py --check   exits with 1 where they are not what the notebook says
"""
import base64, json, re, sys, tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGES = "docs/images"


def directives(source):
    "The `#| name: value` lines of a cell as a dict, and the source without them."
    found = dict(re.findall(r"^#\|\s*([\w-]+):?[ \t]*(.*)$", source, re.M))
    return found, re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()


def output_markdown(output, stem, alt, pictures):
    "One stored output as Markdown: a picture beats Markdown beats text; what is only HTML does not show on GitHub."
    data = output.get("data", {})
    if "image/png" in data:
        path = f"{IMAGES}/{stem}.png"
        pictures[path] = base64.b64decode("".join(data["image/png"]))
        return f"![{alt}]({path})"
    if "text/markdown" in data: return "".join(data["text/markdown"]).strip()
    text = "".join(data.get("text/plain", "") or output.get("text", "")).rstrip()
    return "\n".join("    " + line for line in text.splitlines()) if output.get("name") != "stderr" else ""


def readme(notebook):
    "The README's text and its pictures, from the notebook's stored outputs."
    url = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    parts, pictures = ["<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook. -->"], {}
    for i, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        said, source = directives("".join(cell["source"]))
        if "hide" in said or "default_exp" in said: continue
        if cell["cell_type"] == "markdown": parts.append(source)
        else:
            if source and said.get("echo") != "false": parts.append(f"```python\n{source}\n```")
            parts += [output_markdown(o, f"index-{cell['id']}", said.get("fig-alt", ""), pictures) for o in cell["outputs"]]
    text = "\n\n".join(p for p in parts if p) + "\n"
    text = re.sub(r"\]\((\d\d_\w+\.ipynb)", r"](nbs/\1", text)
    return text.replace("{{repository}}", url), pictures


def main():
    text, pictures = readme(ROOT / "nbs" / "index.ipynb")
    wanted = {"README.md": text.encode()} | pictures
    present = {"README.md"} | {f"{IMAGES}/{p.name}" for p in (ROOT / IMAGES).glob("index-*.png")}
    stale = [n for n in sorted(wanted.keys() | present)
             if n not in wanted or not (ROOT / n).exists() or (ROOT / n).read_bytes() != wanted[n]]
    if "--check" in sys.argv: sys.exit(f"run `make readme`: {stale} differ from nbs/index.ipynb" if stale else 0)
    (ROOT / IMAGES).mkdir(parents=True, exist_ok=True)
    for name in stale:
        if name in wanted: (ROOT / name).write_bytes(wanted[name])
        else: (ROOT / name).unlink()
    print("written:", ", ".join(stale) or "nothing, all in sync")


if __name__ == "__main__": main()
