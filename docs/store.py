"""Run the lessons in order, offline, and store what they print: what GitHub and the site show.

    python docs/store.py [nbs/11_layer.ipynb ...]   runs and stores them; run again, the files are the same byte for byte
    python docs/store.py --check                    exits with 1 where code was changed after its outputs were stored

Not stored: warnings and progress bars (stderr), and cells marked `#| nostore` (they show text of others, which this repository does not copy).
Cells marked `#| measured` print times or memory, which differ from run to run: what they printed first stays until the notebook's code changes.
"""
import base64, hashlib, io, json, os, re, subprocess, sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def lessons():
    "The notebooks in reading order, the home page last."
    return sorted((ROOT / "nbs").glob("[0-9]*.ipynb")) + [ROOT / "nbs" / "index.ipynb"]


def read(path): return json.loads(path.read_text(encoding="utf-8"))


def code_hash(nb):
    "Of all code of a notebook: its outputs belong to this code and to no other."
    code = ["".join(cell["source"]) for cell in nb["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def stored_hash(nb): return nb["metadata"].get("stan_nb", {}).get("code")


def marked(cell, word): return bool(re.search(rf"^#\|\s*{word}\b", "".join(cell["source"]), re.M))


def smaller(png):
    "A PNG (base64 text) with at most 256 colours: figures have few, and notebooks are kept in git."
    picture, out = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA"), io.BytesIO()
    picture.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def tidy(cell):
    "The outputs of a cell as they are stored."
    if marked(cell, "nostore"): return []
    kept = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    for data in (output.get("data", {}) for output in kept):
        data.pop("application/vnd.jupyter.widget-view+json", None)      # means nothing without the kernel that made it
        if "image/png" in data: data["image/png"] = smaller("".join(data["image/png"]))
    return kept


def store(path):
    "Run one notebook and write its outputs into it."
    tools, former = Path(sys.executable).parent, read(path)
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONHASHSEED": "0"}
    subprocess.run([tools / "nbdev-test", path, "--save", "--do-print"], check=True, cwd=ROOT, env=os.environ | quiet)
    nb, same = read(path), stored_hash(former) == code_hash(former)
    before = {cell["id"]: cell.get("outputs") for cell in former["cells"]}
    for cell in nb["cells"]:
        if cell["cell_type"] != "code": continue
        cell["outputs"] = before[cell["id"]] if same and marked(cell, "measured") and before.get(cell["id"]) else tidy(cell)
    nb["metadata"]["stan_nb"] = {"code": code_hash(nb)}
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    subprocess.run([tools / "nbdev-clean", "--fname", path], check=True, cwd=ROOT)


def main():
    if "--check" in sys.argv:
        stale = [path.name for path in lessons() if stored_hash(nb := read(path)) != code_hash(nb)]
        sys.exit(f"run `make notebooks`: {', '.join(stale)} changed after the outputs were stored" if stale else 0)
    for path in [Path(word).resolve() for word in sys.argv[1:]] or lessons(): store(path)


if __name__ == "__main__": main()
