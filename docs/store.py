"""Run the lessons in order, offline, and store what they print: what GitHub and the site show.

    python docs/store.py [nbs/11_layer.ipynb ...]

Left out of what is stored: warnings and progress bars (stderr), timings, and cells marked `#| nostore`
(they show text of others, which this repository does not copy).
"""
import json, os, re, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tidy(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        if cell["cell_type"] != "code": continue
        private = re.search(r"^#\|\s*nostore", "".join(cell["source"]), re.M)
        cell["outputs"] = [] if private else [o for o in cell["outputs"] if o.get("name") != "stderr"]
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def main():
    tools = Path(sys.executable).parent
    lessons = [Path(a) for a in sys.argv[1:]] or sorted((ROOT / "nbs").glob("[0-9]*.ipynb")) + [ROOT / "nbs" / "index.ipynb"]
    for path in lessons:
        subprocess.run([tools / "nbdev-test", path, "--save", "--do-print"], check=True, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        tidy(path)
        subprocess.run([tools / "nbdev-clean", "--fname", path], check=True, cwd=ROOT)


if __name__ == "__main__": main()
