"The comparison is fair, goes on where it was stopped, never tunes on test, and its stored numbers can be checked."
import json, os, shlex, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest

import stan_nb.protocol as protocol
import stan_nb.train as train
from stan_nb.cli import main, parse
from stan_nb.protocol import (Comparison, code_version, compare, evidence, grid_stages, own_settings, paired_interval, row_settings, run_key, run_once,
                              variants, verify)
from stan_nb.runs import Run, load_results, save_results
from stan_nb.settings import settings
from stan_nb.task import ToyTask

SMALL = dict(methods="lora, stan k=2, head", modality="toy", grid="lr=1e-2,5e-2 scaling=1,4", seeds=(0, 1), tune_seeds=(100, 101),
             max_steps=8, train_size=256, device="cpu")
TIMES = ("tokens_per_s", "peak_mib", "seconds")


def without_times(found): return [{k: v for k, v in row.items() if k not in TIMES} for row in found["rows"]]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A finished comparison: its folder, and what it found."
    folder = tmp_path_factory.mktemp("compare")
    return folder, compare(**SMALL, cache=folder/"cache", out=folder/"toy.json")


# -- fairness ---------------------------------------------------------------------------------------

def test_every_method_tries_the_same_settings(done):
    found = done[1]
    tried = {label: {(r["lr"], r["scaling"]) for r in found["rows"] if r["variant"] == label and r["stage"] == "grid"} for label in found["tuned"]}
    assert tried["lora"] == tried["stan k=2"] and len(tried["lora"]) == 4 == found["tried"]["lora"] == found["tried"]["stan k=2"]
    assert found["tried"]["head"] == 2                              # a scaling does nothing to it: two of the four are the same run
    runs = {label: sum(r["variant"] == label and r["stage"] != "test" for r in found["rows"]) for label in tried}
    assert runs["lora"] == runs["stan k=2"] == 4 + 2


def test_the_best_of_the_search_is_what_is_tested(done):
    found = done[1]
    for label, best in found["tuned"].items():
        searched = [r for r in found["rows"] if r["variant"] == label and r["stage"] != "test"]
        finalists = {(r["lr"], r["scaling"]) for r in searched if r["stage"] == "seeds"}
        mean = {point: np.mean([r["accuracy"] for r in searched if (r["lr"], r["scaling"]) == point]) for point in finalists}
        assert max(mean.values()) == pytest.approx(best["score"]) == pytest.approx(mean[best["lr"], best["scaling"]])
        tested = [r for r in found.tested if r["variant"] == label]
        assert [r["seed"] for r in tested] == [0, 1] and all((r["lr"], r["scaling"]) == (best["lr"], best["scaling"]) for r in tested)


def test_budget_is_equal_and_stated(done, tmp_path):
    adapters = {r["variant"]: r["adapter"] for r in done[1]["rows"]}
    assert adapters == {"lora": 448, "stan k=2": 448, "head": 0}
    larger = compare("lora,stan", "toy", budget=8, seeds=(0,), grid="lr=1e-2", tune_seeds=(1,), cache=tmp_path, max_steps=2)
    assert {r["adapter"] for r in larger["rows"]} == {896} and "--rank 8" in larger["command"]


class Spy:
    "Notes every split that is evaluated, by its length: valid has 512 rows, test 1024."
    def __init__(self, monkeypatch):
        self.seen, itself = [], train.evaluate
        def evaluate(task, model, rows, *args, **more):
            self.seen.append(len(rows))
            return itself(task, model, rows, *args, **more)
        monkeypatch.setattr(train, "evaluate", evaluate)


def test_test_is_not_looked_at_while_tuning(tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    compare(**SMALL | dict(seeds=()), cache=tmp_path)
    assert set(spy.seen) == {512}
    spy.seen.clear()
    compare(**SMALL, cache=tmp_path)                                # all of the search is there; six runs are left, and each looks once
    assert sorted(spy.seen) == [512] * 6 + [1024] * 6


def test_what_stands_in_test_cannot_change_the_choice(tmp_path, monkeypatch, done):
    class Scrambled(ToyTask):
        def load_data(self):
            data = super().load_data()
            data["test"] = data["test"].map(lambda row: dict(label=0))
            return data
    for module in (protocol, train): monkeypatch.setattr(module, "get_task", lambda modality: Scrambled)
    found = compare(**SMALL, cache=tmp_path)
    search = lambda which: [{k: v for k, v in r.items() if k not in TIMES} for r in which["rows"] if r["stage"] != "test"]
    assert search(found) == search(done[1]) and found["tuned"] == done[1]["tuned"]
    assert [r["accuracy"] for r in found.tested] != [r["accuracy"] for r in done[1].tested]


# -- repetition, cache, kill ------------------------------------------------------------------------

def test_deterministic(tmp_path, done): assert without_times(compare(**SMALL, cache=tmp_path)) == without_times(done[1])


def test_two_processes_find_the_same(tmp_path):
    few = SMALL | dict(methods="lora", grid="lr=1e-2,5e-2", seeds=(0,), tune_seeds=(100,))
    asked = few | dict(cache=str(tmp_path/"two"), processes=2, out=str(tmp_path/"r.json"))
    (tmp_path/"go.py").write_text(f"from stan_nb.protocol import compare\nif __name__ == '__main__': compare(**{asked!r})")
    subprocess.run([sys.executable, "-W", "ignore", tmp_path/"go.py"], check=True, timeout=240)
    found = load_results(tmp_path/"r.json")
    assert found["processes"] == 2 and len(list((tmp_path/"two").glob("*/run.json"))) == 3
    for one, two in zip(found["rows"], compare(**few, cache=tmp_path/"one")["rows"]):
        assert (one["variant"], one["seed"], one["lr"]) == (two["variant"], two["seed"], two["lr"]) and one["accuracy"] == pytest.approx(two["accuracy"], abs=.01)


def test_what_is_there_is_not_run_again(done, monkeypatch):
    monkeypatch.setattr(protocol, "train_run", lambda *_, **__: pytest.fail("trained again"))
    assert compare(**SMALL, cache=done[0]/"cache")["rows"] == done[1]["rows"]


def test_searching_leaves_no_adapters(done):
    kept = [(r.parent/"adapter").exists() for r in (done[0]/"cache").glob("*/run.json")]
    assert sum(kept) == len(done[1].tested) < len(kept)


def test_killed_and_gone_on_with(tmp_path, done):
    code = f"from stan_nb.protocol import compare; compare(**{SMALL!r}, cache={str(tmp_path/'cache')!r}, say=lambda line: print(line, flush=True))"
    child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)
    for _ in range(6): assert child.stdout.readline()
    time.sleep(.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait(60) == -signal.SIGKILL
    finished = {p.parent.name: p.stat().st_mtime_ns for p in (tmp_path/"cache").glob("*/run.json") if "result" in json.loads(p.read_text())}
    assert len(finished) >= 5
    found = compare(**SMALL, cache=tmp_path/"cache")
    assert without_times(found) == without_times(done[1])
    assert {name: (tmp_path/"cache"/name/"run.json").stat().st_mtime_ns for name in finished} == finished


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    itself, steps = train.train_step, []
    def step(*args):
        steps.append(1)
        if len(steps) == 20: os.kill(os.getpid(), signal.SIGINT)
        return itself(*args)
    words = ["compare", "toy", "--methods", "lora", "--grid", "lr=1e-2,2e-2", "--seeds", "0", "--max-steps", "12", "--train-size", "256"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", step)
        assert main(words) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"Go on with: stan-nb {shlex.join(words)}")
    assert main(words) == 0


def test_the_key_is_the_content(monkeypatch):
    one, corpus = settings("toy", method="lora", seed=3), "0123456789abcdef"
    key = run_key(one, False, corpus)
    for change in (dict(seed=4), dict(lr=.5), dict(scaling=3.), dict(rank=5), dict(method="stan"), dict(epochs=9)):
        assert run_key(one.replace(**change), False, corpus) != key
    assert run_key(one, True, corpus) != key != run_key(one, False, "fedcba9876543210")
    assert run_key(one.replace(k=3, xi=.1, select="relu"), False, corpus) == key       # options of other methods
    monkeypatch.setattr(protocol, "code_version", lambda *_: "other code")
    assert run_key(one, False, corpus) != key


def test_the_code_version_is_about_what_code_does(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    versions, texts = [], ["'a'\ndef f(x):\n    'doc'\n    return x + 1\n", "# comment\ndef f(x):\n    'other'\n\n    return (x + 1)  # why\n", "def f(x): return x + 2\n"]
    for number, text in enumerate(texts):
        (tmp_path/"some_module.py").write_text(text)
        os.utime(tmp_path/"some_module.py", (number, number))
        versions.append(code_version("some_module", "stan_nb.there_is_none"))
    assert versions[0] == versions[1] != versions[2]


# -- refusals ---------------------------------------------------------------------------------------

def test_other_data_are_refused(tmp_path, done):
    folder, found = done
    out = Path(shutil.copy(folder/"toy.json", tmp_path/"toy.json"))
    before = out.read_bytes()
    with pytest.raises(ValueError, match=f"holds results on corpus {found['corpus_hash']}, these data are .* cannot stand in one place"):
        compare(**SMALL | dict(train_size=300), cache=tmp_path/"cache", out=out)
    assert out.read_bytes() == before and not (tmp_path/"cache").exists()
    with pytest.raises(ValueError, match="this comparison is about feedbeef"): run_once(settings("toy", max_steps=2), False, tmp_path/"cache", "feedbeef")


@pytest.mark.parametrize("changes, message", [
    (dict(seeds=(0, 100)), r"share \[100\]: the seeds that are scored on test must be fresh"), (dict(seeds=(0, 0)), "names a seed twice"),
    (dict(tune_seeds=()), "tune_seeds is empty"), (dict(finalists=0), r"finalists = 0 is out of range"), (dict(methods=""), "methods is empty"),
    (dict(methods="lora, sten"), "'sten' is not known.*Did you mean 'stan'"), (dict(methods="lora,lora"), "names one of them twice"),
    (dict(methods="lora kk=3"), "kk is no setting"), (dict(grid="lr"), "'lr' is not of the form setting=value,value"), (dict(grid="lr=1e-2;"), "a stage without points"),
    (dict(grid=dict(lr=[])), "a stage without points"), (dict(grid="lr=0"), r"lr = 0.0 is out of range"), (dict(grid="rate=1"), "rate is no setting"),
    (dict(grid="seed=1,2"), "seed cannot be tuned"), (dict(grid="method=lora"), "method cannot be tuned"), (dict(against="adalora"), "against = 'adalora' is none of the methods: lora"),
    (dict(lrr=1), "lrr is no setting"), (dict(processes=0), "processes = 0 is out of range"), (dict(modality="toi"), r"no section \[toi.embedded\]")])
def test_bad_input_runs_nothing(changes, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message): compare(**SMALL | changes, cache=tmp_path/"cache")
    assert not (tmp_path/"cache").exists()


def test_a_setting_that_diverges_is_recorded_and_not_chosen(tmp_path):
    more = dict(methods="full", modality="toy", seeds=(0,), tune_seeds=(1,), max_steps=6, clip=0., warmup=0., train_size=256, cache=tmp_path)
    found = compare(**more, grid="lr=1e30,1e-3")
    assert ["diverged" in row for row in found["rows"]] == [True, False, False] and found["tuned"]["full"]["lr"] == 1e-3 and found["tried"]["full"] == 2
    with pytest.raises(FloatingPointError, match="full, seed 1: the loss is"): compare(**more, grid="lr=1e30,1e31")


# -- grids, methods, commands -----------------------------------------------------------------------

def test_grids_and_methods_in_words():
    assert grid_stages("lr=1,2 scaling=4 | lr=3; head_lr=5") == [[dict(lr="1", scaling="4"), dict(lr="2", scaling="4"), dict(lr="3")], [dict(head_lr="5")]]
    assert grid_stages(dict(lr=[1., 2.])) == [[dict(lr=1.), dict(lr=2.)]] == grid_stages([dict(lr=[1., 2.])])
    assert variants("lora, stan k=8") == {"lora": dict(method="lora"), "stan k=8": dict(method="stan", k="8")}
    assert variants(dict(wide=dict(method="stan", k=2), lora={})) == dict(wide=dict(method="stan", k=2), lora=dict(method="lora"))
    assert own_settings(settings("toy", method="head", scaling=9., k=3)) == own_settings(settings("toy", method="head"))


def test_the_command_asks_for_the_same_comparison(done):
    func, asked = parse(shlex.split(done[1]["command"])[1:])
    assert func.__name__ == "cmd_compare" and asked["out"] == str(done[0]/"toy.json")
    words = shlex.split(compare(**SMALL | dict(grid=[dict(lr=[.01, .05], scaling=[1., 4.])], tolerance=.1), cache=done[0]/"cache")["command"])
    asked = parse(words[1:])[1]
    assert grid_stages(asked["grid"]) == [[dict(lr=a, scaling=b) for a in ("0.01", "0.05") for b in ("1", "4")]]
    assert (asked["max_steps"], asked["seeds"], asked["tune_seeds"], asked["tolerance"]) == ("8", "0,1", "100,101", .1)


def test_the_file_gives_the_same_table(done):
    again = Comparison(load_results(done[0]/"toy.json"))
    assert again.table() == done[1].table() and again.verdict() == done[1].verdict()
    line = {row["variant"]: row for row in again.table()}["head"]
    assert line["tried"] == 2 and line["seeds"] == 2 and line["minus lora [95%]"].startswith("-0.")
    assert "lora is better" in " ".join(again.verdict()) or "no difference is shown" in " ".join(again.verdict())


def test_a_best_setting_at_the_edge_is_mentioned(tmp_path):
    found = compare("lora", "toy", grid="lr=1e-4,1e-3,1e-2", seeds=(), max_steps=8, train_size=256, cache=tmp_path)
    assert found["tuned"]["lora"]["lr"] == .01 and found.verdict() == ["lora is best at the edge of the grid (lr = 0.01): a larger grid may say something else."]


def test_only_tuning_has_no_test_column(done):
    found = compare(**SMALL | dict(seeds=()), cache=done[0]/"cache")
    assert found.tested == [] and not any("minus" in line for line in found.verdict()) and not any("test" in key for key in found.table()[0])


# -- statistics -------------------------------------------------------------------------------------

def test_intervals():
    found = paired_interval([.01, .03, .02, .05])
    assert found["mean"] == pytest.approx(.0275) and .01 <= found["low"] <= found["mean"] <= found["high"] <= .05
    assert found["t_low"] < found["low"] and found["t_high"] > found["high"]                 # four numbers: the bootstrap is the narrower one
    assert found == paired_interval([.01, .03, .02, .05])
    flipped = paired_interval([-.01, -.03, -.02, -.05])
    assert flipped["mean"] == -found["mean"] and flipped["t_low"] == pytest.approx(-found["t_high"])
    assert paired_interval([.5])["low"] is None and paired_interval([.02] * 3)["low"] == paired_interval([.02] * 3)["high"] == pytest.approx(.02)


# -- verify and evidence ----------------------------------------------------------------------------

def test_verify_runs_rows_again_and_notices_a_false_one(done, tmp_path):
    file, found = str(done[0]/"toy.json"), done[1]
    table = verify([file], share=.1, seed=1)
    assert len(table) == 2 + (len(found["rows"]) > 20) and all(row["ok"] and row["now"] == pytest.approx(row["stored"], abs=1e-6) for row in table)
    assert verify([file], share=.1, seed=1) == table and [r["row"] for r in verify([file], share=.1, seed=2)] != [r["row"] for r in table]
    false = json.loads(Path(file).read_text())
    for row in false["rows"]: row["accuracy"] = min(1., row["accuracy"] + .05)
    (tmp_path/"false.json").write_text(json.dumps(false))
    assert not any(row["ok"] for row in verify([str(tmp_path/"false.json")], share=.1, seed=1))
    assert main(["verify", str(tmp_path/"false.json"), "--share", ".1", "--seed", "1"]) == 1
    (tmp_path/"other.json").write_text(json.dumps(json.loads(Path(file).read_text()) | dict(rows=[row | dict(corpus_hash="feedbeef") for row in found["rows"]])))
    with pytest.raises(ValueError, match="about feedbeef"): verify([str(tmp_path/"other.json")], share=.05, seed=1)


def test_verify_passes_over_what_cannot_be_run(tmp_path, monkeypatch):
    save_results(tmp_path/"times.json", [dict(seed=0, score=.5)], "python benchmarks/x.py", [0], {})
    said = []
    with pytest.raises(ValueError, match="no stored row can be run again"): verify([str(tmp_path/"times.json")], say=said.append)
    assert "passed over, the file does not say what its rows were run with" in said[0]
    save_results(tmp_path/"gpu.json", [dict(seed=0, score=.5, method="lora")], "stan-nb compare toy", [0], settings("toy"))
    (tmp_path/"gpu.json").write_text(json.dumps(load_results(tmp_path/"gpu.json") | dict(device="cuda: NVIDIA H100")))
    monkeypatch.setattr(protocol.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no stored row"): verify([str(tmp_path/"gpu.json")], say=said.append)
    assert "it was made on cuda: NVIDIA H100, and no GPU is here" in said[-1]
    for share in (0., 1.5):
        with pytest.raises(ValueError, match=r"share = .* is out of range: allowed is \(0, 1\]"): verify(share=share)


SHIPPED = sorted((Path(protocol.__file__).parent/"data"/"results").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=[p.stem for p in SHIPPED])
def test_every_shipped_file_names_a_command_that_makes_it(path):
    results = load_results(path.stem)
    program, *words = shlex.split(results["command"])
    assert program in ("stan-nb", "python") and f"{path.stem}.json" in results["command"]
    if program == "stan-nb": parse(words)
    else: assert (Path(protocol.__file__).parent.parent/words[0]).is_file()
    if any(protocol._score_of(results, row) is not None for row in results["rows"]):      # tables of times have no scores, and need no data
        assert results["corpus_hash"]
        for row in results["rows"]: assert row_settings(results, row).seed == row["seed"]


def test_evidence_runs_the_commands(tmp_path, monkeypatch):
    folder = tmp_path/"data"/"results"
    monkeypatch.setattr(protocol, "files", lambda package: tmp_path)
    save_results(folder/"one.json", [dict(seed=0, score=.5)], "stan-nb compare toy --out stan_nb/data/results/one.json", [0], {})
    ran = []
    def run(words, check, cwd):
        ran.append([Path(words[0]).name, *words[1:], cwd])
        save_results(folder/"one.json", [dict(seed=0, score=.6)], load_results(folder/"one.json")["command"], [0], {})
    assert evidence(run=run) == ["stan-nb compare toy --out stan_nb/data/results/one.json"]
    assert ran == [["stan-nb", "compare", "toy", "--out", "stan_nb/data/results/one.json", tmp_path.parent]]
    with pytest.raises(ValueError, match="ended without writing"): evidence(run=lambda *_, **__: None)
    for command in ("rm -rf one.json", "stan-nb demo", "notebook"):
        save_results(folder/"one.json", [dict(seed=0, score=.5)], command, [0], {})
        with pytest.raises(ValueError, match="no command of ours that writes one.json"): evidence(run=run)
