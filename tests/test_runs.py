"What the lesson on runs promises, with real disks, real kills and strangers' text."
import errno, json, os, re, shutil, signal, subprocess, sys, time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from stan_nb import runs
from stan_nb.runs import Html, Run, atomic_folder, atomic_write, page, paired_difference, plain, save_results, summarise, table_html
from stan_nb.settings import settings
from stan_nb.viz import latent_grid, plot_curves, plot_density, plot_seeds, token_heatmap

TOY = settings("toy")


def no_space(*args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def state(folder): return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def fill(folder, text):
    for name in ("a.bin", "b.bin"): (folder/name).write_text(text)


# ---- a full disk ----

class Full:
    "A file whose writes find the disk full after a few bytes."
    def __init__(self, file): self.file = file
    def write(self, data):
        self.file.write(data[:3])
        no_space()
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()


@pytest.fixture(params=["write", "fsync", "replace", "exchange"])
def full_disk(request, monkeypatch):
    "Switches on a full disk that shows at the given call."
    def now():
        if request.param == "write":
            monkeypatch.setattr(runs, "open", lambda *args, **kwargs: Full(open(*args, **kwargs)), raising=False)
            monkeypatch.setattr(runs, "_sync", no_space)             # a folder's files are not written by us: they show it here
        elif request.param == "fsync": monkeypatch.setattr(os, "fsync", no_space)
        elif request.param == "replace":
            monkeypatch.setattr(os, "replace", no_space)
            monkeypatch.setattr(runs, "_swap", no_space)
        else:
            monkeypatch.setattr(os, "replace", no_space)
            monkeypatch.setattr(runs, "_exchange", lambda new, path: False)
            rename = Path.rename
            monkeypatch.setattr(Path, "rename", lambda self, to: no_space() if (self/"a.bin").exists() and ".tmp" in self.name and
                                (self/"a.bin").read_text() == "new" else rename(self, to))
    return now


def test_full_disk_leaves_the_former_file(tmp_path, full_disk):
    atomic_write(tmp_path/"f", "former")
    before = state(tmp_path)
    full_disk()
    with pytest.raises(OSError, match="intact") as error: atomic_write(tmp_path/"f", "new content")
    assert error.value.errno == errno.ENOSPC and state(tmp_path) == before


def test_full_disk_leaves_the_former_folder(tmp_path, full_disk):
    with atomic_folder(tmp_path/"d") as folder: fill(folder, "former")
    before = state(tmp_path)
    full_disk()
    with pytest.raises(OSError, match="intact"):
        with atomic_folder(tmp_path/"d") as folder: fill(folder, "new")
    assert state(tmp_path) == before


def test_full_disk_leaves_the_former_run(tmp_path, full_disk):
    run = Run.create(tmp_path/"run", TOY)
    before = state(tmp_path)
    full_disk()
    with pytest.raises(OSError): run.update(result=1)
    assert "result" not in run.info and state(tmp_path) == before
    with pytest.raises(OSError): Run.create(tmp_path/"run", TOY, overwrite=True)
    assert state(tmp_path) == before


@pytest.fixture
def tiny_disk(tmp_path):
    "A real file system of 256 KiB."
    disk = tmp_path/"disk"
    disk.mkdir()
    done = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True)
    if not done or done.returncode: pytest.skip(f"mounting a small tmpfs is not permitted here: {done.stderr.strip() if done else 'no mount command'}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_really_full(tiny_disk):
    run = Run.create(tiny_disk/"run", TOY)
    with atomic_folder(run.adapter) as folder: (folder/"weights").write_bytes(b"1"*120_000)
    before = state(tiny_disk)
    with pytest.raises(OSError, match="intact"):
        with atomic_folder(run.adapter) as folder: (folder/"weights").write_bytes(b"2"*200_000)
    with pytest.raises(OSError, match="intact"): run.update(note="x"*200_000)
    assert state(tiny_disk) == before
    assert Run.open(run.path).info == run.info
    with pytest.raises(OSError):
        for step in range(100_000): run.log(step=step, note="y"*2000)
    kept = len(run.history())                                        # the row that did not fit is gone, the others are there
    assert kept > 10 and [row["step"] for row in run.history()] == list(range(kept))
    shutil.rmtree(run.adapter)
    run.log(step=kept)
    assert [row["step"] for row in run.history()] == list(range(kept + 1))


def test_safetensors_and_torch_on_a_full_disk(tiny_disk):
    import torch
    from safetensors.torch import save_file
    for save in (lambda where, n: save_file(dict(w=torch.ones(n)), where/"w"), lambda where, n: torch.save(torch.ones(n), where/"w")):
        with atomic_folder(tiny_disk/"adapter") as folder: save(folder, 10_000)
        before = state(tiny_disk)
        with pytest.raises(Exception):
            with atomic_folder(tiny_disk/"adapter") as folder: save(folder, 100_000)
        assert state(tiny_disk) == before


# ---- kill -9 ----

CHILD = """
import sys
from stan_nb.runs import Run, atomic_folder
run = Run.open(sys.argv[1])
print("ready", flush=True)
for i in range(10**9):
    run.update(i=i, big="x"*200_000, last=i)
    run.log(step=i, text="y"*5_000)
    with atomic_folder(run.adapter) as folder:
        for name in ("a", "b"): (folder/name).write_text(f"{i} " + "z"*100_000)
"""


def kill_in_the_middle(where, after):
    "Start a process that writes without pause, kill it, and return the run as it was left."
    Run.create(where/"run", TOY)
    child = subprocess.Popen([sys.executable, "-c", CHILD, where/"run"], stdout=subprocess.PIPE)
    child.stdout.readline()
    time.sleep(after)
    child.send_signal(signal.SIGKILL)
    child.wait()
    return Run.open(where/"run")


def check_killed(run):
    assert run.info.get("i") == run.info.get("last") and run.settings == TOY
    steps = [row["step"] for row in run.history()]
    assert steps == list(range(len(steps)))
    if run.adapter.exists():
        parts = {(run.adapter/name).read_text() for name in ("a", "b")}
        assert len(parts) == 1 and len(parts.pop().split()[1]) == 100_000
    again = Run.create(run.path, TOY, resume=True)                   # clears what the killed process left
    assert not [p for p in run.path.rglob("*") if p.name.endswith(".tmp")]
    again.log(step=len(steps))
    assert len(again.history()) == len(steps) + 1


unix = pytest.mark.skipif(os.name == "nt", reason="Windows has no kill -9 and cannot swap folders in one step")


@unix
@pytest.mark.parametrize("after", [.05, .11, .23])
def test_kill_never_tears(tmp_path, after): check_killed(kill_in_the_middle(tmp_path, after))


@unix
@pytest.mark.slow
@pytest.mark.parametrize("n", range(20))
def test_kill_never_tears_twenty_times(tmp_path, n): check_killed(kill_in_the_middle(tmp_path, .03 + .0173*n))


def test_a_reader_never_sees_half_a_folder(tmp_path):
    "While one process replaces a folder again and again, the folder is there, whole, at every look."
    if sys.platform not in ("linux", "darwin"): pytest.skip("no call that swaps two folders here")
    run = Run.create(tmp_path/"run", TOY)
    with atomic_folder(run.adapter) as folder: fill(folder, "0")
    child = subprocess.Popen([sys.executable, "-c", CHILD, run.path], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        until, looks = time.monotonic() + .5, 0
        while time.monotonic() < until:
            assert run.adapter.is_dir()
            Run.open(run.path)
            looks += 1
        assert looks > 20
    finally:
        child.kill()
        child.wait()


def test_both_ways_of_swapping(tmp_path, monkeypatch):
    for way in ("exchange", "two renames"):
        if way == "two renames": monkeypatch.setattr(runs, "_exchange", lambda new, path: False)
        for text in ("one", "two"):
            with atomic_folder(tmp_path/"d") as folder: fill(folder, text)
            assert {p.name: p.read_text() for p in (tmp_path/"d").iterdir()} == {"a.bin": text, "b.bin": text}
        assert [p.name for p in tmp_path.iterdir()] == ["d"]


# ---- the folder that is there already ----

def test_existing_run_is_refused_and_untouched(tmp_path):
    run = Run.create(tmp_path/"run", TOY)
    run.log(step=1)
    before = state(tmp_path)
    with pytest.raises(FileExistsError) as error: Run.create(run.path, TOY)
    assert "--resume" in str(error.value) and "--overwrite" in str(error.value) and "\n" not in str(error.value)
    for wrong in (dict(resume=True, overwrite=True), dict(resume=True, settings=TOY.replace(lr=.5))):
        with pytest.raises(ValueError): Run.create(run.path, **{"settings": TOY, **wrong})
    assert state(tmp_path) == before


@pytest.mark.parametrize("content", [{"thesis.tex": "years"}, {"run.json": "{}"}, {"run.json": "[1]"}, {"run.json": "not json"}, {"run.json": '{"format": "another tool"}'},
                                     {"sub/run.json": '{"format": "stan_nb run 1"}'}])
@pytest.mark.parametrize("flags", [dict(overwrite=True), dict(resume=True), {}])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path, content, flags):
    for name, text in content.items(): atomic_write(tmp_path/"mine"/name, text)
    before = state(tmp_path)
    with pytest.raises((FileExistsError, FileNotFoundError, ValueError)): Run.create(tmp_path/"mine", TOY, **flags)
    assert state(tmp_path) == before


def test_own_files_in_a_run_are_never_deleted(tmp_path):
    run = Run.create(tmp_path/"run", TOY)
    (run.path/"notes").mkdir()
    before = state(tmp_path)
    with pytest.raises(FileExistsError, match="holds notes"): Run.create(run.path, TOY, overwrite=True)
    assert state(tmp_path) == before


def test_overwrite_leaves_nothing_of_the_former_run(tmp_path):
    run = Run.create(tmp_path/"run", TOY, note="of old")
    run.log(step=1)
    fill(run.checkpoints, "of old")
    (run.path/".run.json.0123abcd.tmp").write_text("left by a killed process")
    Run.create(run.path, TOY.replace(seed=1), overwrite=True)
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "figures", "run.json"]
    assert "of old" not in (run.path/"run.json").read_text() and Run.open(run.path).info["seed"] == 1


def test_a_file_in_the_way(tmp_path):
    (tmp_path/"f").write_text("mine")
    for flags in ({}, dict(resume=True), dict(overwrite=True)):
        with pytest.raises(FileExistsError, match="is a file"): Run.create(tmp_path/"f", TOY, **flags)
    assert (tmp_path/"f").read_text() == "mine"


def test_links_stay_links(tmp_path):
    (tmp_path/"real").mkdir()
    Run.create(tmp_path/"real"/"run", TOY)
    try: (tmp_path/"link").symlink_to(tmp_path/"real"/"run", target_is_directory=True)
    except OSError: pytest.skip("no links here")
    Run.create(tmp_path/"link", TOY.replace(seed=3), overwrite=True)
    assert (tmp_path/"link").is_symlink() and Run.open(tmp_path/"real"/"run").info["seed"] == 3


def test_open_says_what_is_wrong(tmp_path):
    Run.create(tmp_path/"stan-0", TOY)
    (tmp_path/"empty").mkdir()
    atomic_write(tmp_path/"torn"/"run.json", '{"format": "stan_nb ru')
    for name, error, words in (("stan-O", FileNotFoundError, "Did you mean 'stan-0'"), ("empty", FileNotFoundError, "has no run.json"), ("torn", ValueError, "not valid JSON")):
        with pytest.raises(error, match=words): Run.open(tmp_path/name)


def test_resume_without_a_run_starts_one(tmp_path):
    assert "resumed" not in Run.create(tmp_path/"run", TOY, resume=True).info
    assert len(Run.create(tmp_path/"run", TOY, resume=True).info["resumed"]) == 1


def test_tensors_and_arrays_are_recorded_as_numbers(tmp_path):
    import numpy as np, torch
    run = Run.create(tmp_path/"run", TOY, where=tmp_path, shape=torch.Size([2, 3]))
    assert run.log(step=torch.tensor(3), loss=np.float32(.5), bad=float("inf"), many=np.arange(2)) == dict(step=3, loss=.5, bad=None, many=[0, 1])
    assert run.info["shape"] == [2, 3] and Run.open(run.path).info == run.info
    assert "NaN" not in (run.path/"metrics.jsonl").read_text()
    with pytest.raises(TypeError): plain(dict(model=torch.nn.Linear(1, 1)))


# ---- paired statistics ----

def table(**methods): return [dict(method=m, seed=s, accuracy=v) for m, values in methods.items() for s, v in values.items()]


def test_paired_difference_is_that_of_the_formula():
    rows = table(a={0: .5, 1: .7, 2: .9}, b={2: .8, 0: .4, 1: .9}, c={5: 1.})
    found = paired_difference(rows, "a", "b")
    assert found["per_seed"] == pytest.approx({0: .1, 1: -.2, 2: .1}) and found["n"] == 3
    assert found["mean"] == pytest.approx(0) and found["sd"] == pytest.approx((.03)**.5)
    assert paired_difference(table(a={0: 1.}, b={0: .5}), "a", "b") == dict(mean=.5, sd=None, n=1, per_seed={0: .5})


@pytest.mark.parametrize("rows,words", [(table(a={0: 1., 1: 1.}, b={0: 1.}), r"seeds \[1\]"), (table(a={0: 1.}, b={1: 1.}), r"seeds \[0, 1\]"), (table(a={0: 1.}), "no rows"),
                                        (table(a={0: None}, b={0: 1.}), "not a number"), (table(a={0: float("nan")}, b={0: 1.}), "not a number"),
                                        (table(a={0: 1.}, b={0: 1.})*2, "occurs twice")])
def test_paired_difference_refuses(rows, words):
    with pytest.raises(ValueError, match=words): paired_difference(rows, "a", "b")


def test_summarise_by_several_keys():
    rows = [row | dict(rank=rank) for rank in (4, 8) for row in table(a={0: 1., 1: 3.})]
    assert [(r["method"], r["rank"], r["mean"], r["n"]) for r in summarise(rows, by=["method", "rank"])] == [("a", 4, 2., 2), ("a", 8, 2., 2)]
    with pytest.raises(ValueError, match="occurs twice"): summarise(rows)


def test_results_carry_their_origin(tmp_path):
    rows = table(a={0: .5})
    kept = save_results(tmp_path/"r.json", rows, "make evidence", [0], TOY, corpus_hash="1f")
    assert {"command", "date", "commit", "seeds", "device", "versions", "corpus_hash", "settings", "rows"} <= kept.keys()
    assert runs.load_results(tmp_path/"r.json") == json.loads((tmp_path/"r.json").read_text()) == kept
    atomic_write(tmp_path/"x.json", "{}")
    with pytest.raises(ValueError, match="lacks command"): runs.load_results(tmp_path/"x.json")


def test_every_shipped_result_is_readable():
    for path in (Path(runs.__file__).parent/"data"/"results").glob("*.json"):
        assert runs.load_results(path.stem)["rows"]


def test_memory_is_measured_by_the_block_that_used_it():
    code = ("from stan_nb.runs import PeakMemory\nwith PeakMemory() as a: b = b'x'*(96*2**20); del b\nwith PeakMemory() as c: pass\nprint(a.kind, a.added, c.added, sep='|')")
    kind, used, idle = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip().split("|")
    if kind != "process": pytest.skip(f"only the peak since the start is known here ({kind})")
    assert 80 < float(used) < 130 and float(idle) < 16


@pytest.mark.gpu
def test_memory_of_a_gpu_is_its_allocators():
    import torch
    with runs.PeakMemory("cuda") as block: torch.ones(2**20, 16, device="cuda")
    assert block.kind == "cuda allocator" and 60 < block.added < 80


# ---- the page ----

EVIL = """</title></style></table>"><script>alert(1)</script><img src=//evil.example/x onerror='x'><!-- ' " & `"""


class Seen(HTMLParser):
    "Which elements and attributes a browser would find."
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)
    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
    def handle_data(self, data): self.text += data


def full_page(text):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [dict(method="stan", seed=s, accuracy=.5 + s/10) for s in range(3)]
    axes = [plot_curves(dict(stan=[dict(step=s, loss=1/(s + 1)) for s in range(5)])), plot_seeds(rows), plot_density([.5, .25, 0.], title=text)]
    figures = [runs.figure_html(ax, alt=text, caption=text) for ax in axes]
    plt.close("all")
    words = [text, "##ing", "Ġx"]
    return page(text, [(text, [text, table_html([{text: text, "n": None}], caption=text), figures]),
                       ("heat", [token_heatmap(words, [1., -1., 0.], title=text), latent_grid(words, {text: [0, 1, -1]}, title=text)])], lead=text)


def test_everything_is_escaped():
    harmless, evil = Seen(full_page("harmless")), Seen(full_page(EVIL))
    assert evil.tags == harmless.tags and [name for name, _ in evil.attributes] == [name for name, _ in harmless.attributes]
    assert "script" not in evil.tags and evil.text.count("<script>alert(1)</script>") == harmless.text.count("harmless") > 5


def test_the_page_asks_no_server():
    text = full_page("harmless")
    assert not re.search(r"https?:|//\w|@import|<link|<script|<iframe", re.sub(r"data:image/[a-z+]+;base64,[\w+/=]+", "data", text))
    seen = Seen(text)
    assert all(value.startswith("data:") for name, value in seen.attributes if name in ("src", "href"))
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in seen.attributes
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("part", ['<img src="https://a.example/x">', "<img src=//a.example/x>", "<a href='http://a.example'>x</a>", "<p style=\"background:url('//a.example')\">",
                                  "<style>@import 'https://a.example/x.css'</style>", '<IMG SRC = "HTTPS://a.example">'])
def test_the_page_refuses_the_outside(part):
    with pytest.raises(ValueError, match="refers to the outside"): page("t", [("h", Html(part))])


def test_text_about_addresses_is_no_request():
    assert "see https://a.example" in page("t", [("h", "see https://a.example")])
    assert "url(//a)" in page("t", [("h", "write url(//a) in css")])


def test_long_text_in_a_table_wraps_and_numbers_do_not():
    rules = dict(re.findall(r"(?:^|[}\n])\s*([^{}\n]+?) \{([^}]*)\}", page("x", [])))
    assert "nowrap" not in rules[".rows th, .rows td"] and "nowrap" in rules[".rows th, .rows .n"]


def test_the_same_page_has_the_same_bytes(): assert full_page("x") == full_page("x")
