"The command line as a user meets it: one line for a mistake, nothing written, Ctrl-C, reuse, damaged folders, a report without the outside."
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest

from stan_nb.cli import COMMANDS, compared, difference, in_words, main, measured, open_runs, report, verdict
from stan_nb.runs import Run, load_results

PROGRAM = [sys.executable, "-c", "import sys; from stan_nb.cli import main; sys.exit(main())"]
QUICK = ["toy", "--epochs", "1", "--train-size", "256", "--test-size", "64", "--device", "cpu"]


def start(*words, cwd, **env): return subprocess.Popen([*PROGRAM, *map(str, words)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env})


def files(folder): return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))


def fails(capsys, *words, code=2):
    "Run a command that must fail with one line; that line."
    assert main([str(word) for word in words]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("stan-nb: ") and "Traceback" not in err, (out, err)
    return err


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Six short runs on the toy task."
    folder = tmp_path_factory.mktemp("runs")/"demo"
    assert main(["demo", "--modality", *QUICK, "--seeds", "2", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path): return Path(shutil.copytree(trained/"stan-0", tmp_path/"run"))


def test_the_demo_leaves_its_numbers(trained):
    found = load_results(trained/"results.json")
    assert found["rows"] == measured(open_runs([trained])) and found["seeds"] == [0, 1] and set(found["settings"]) == {"head", "lora", "stan"}
    assert compared(found["rows"]) == compared(measured(open_runs([trained])))


def test_help_is_fast_and_everywhere(capsys):
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {name} " in out for name in COMMANDS)
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert f"usage: stan-nb {name}" in capsys.readouterr().out
    heavy = "torch transformers peft datasets accelerate matplotlib sklearn".split()
    check = f"import sys; from stan_nb.cli import main; main([]); main(['train', '--help']); print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("words, part", [
    (["trian"], "Did you mean 'train'"),
    (["train"], "required: modality"),
    (["train", "tyo"], "Did you mean 'toy"),
    (["train", "toy", "--scale", "huge"], "no section [toy.huge]"),
    (["train", "toy", "--lr", "nan"], "out of range"),
    (["train", "toy", "--lr", "much"], "is not a number"),
    (["train", "toy", "--lrr", "1"], "Did you mean '--lr'"),
    (["train", "toy", "--l", "1"], "does not know '--l'"),
    (["train", "toy", "--opt.nose", "1"], "opt.nose is not known"),
    (["train", "toy", "--opt.noise"], "needs a value"),
    (["train", "toy", "--k", "0"], "[1, inf)"),
    (["train", "toy", "--k", "99"], "k"),
    (["train", "toy", "--targets", "upp"], "up"),
    (["train", "toy", "--method", "lroa"], "lora"),
    (["train", "toy", "--task", "x"], "task = 'x' is not known: allowed is one of clusters"),
    (["train", "toy", "--backbone", "y"], "backbone = 'y' cannot be had: toy has no backbone to choose"),
    (["train", "toy", "--data", "z"], "data = 'z' cannot be had"),
    (["train", "toy", "--data", "z", "--task", "x"], "task = 'x' cannot be had: toy has only 'clusters'"),
    (["train", "diffusion", "--task", "sst2"], "task = 'sst2' is not known: allowed is one of digits"),
    (["train", "text", "--task", "gramar"], "Did you mean 'grammar'"),
    (["train", "toy", "--resume", "--overwrite"], "--resume and --overwrite"),
    (["train", "toy", "--device", "mps"], "not available here"),
    (["train", "toy", "word"], "does not know 'word'"),
    (["demo", "--modality", "toy", "--seeds", "0"], "seeds = 0"),
    (["demo", "--modality", "toy", "--seed", "1"], "Did you mean '--seeds'"),
    (["demo", "--modality", "toy", "--methods", "lora,sten"], "'sten' is not known"),
    (["eval", "none"], "none is no run folder"),
    (["predict", "none"], "required: texts"),
    (["predict", "none", "text"], "none is no run folder"),
    (["report", "none"], "none is no run folder"),
    (["report"], "required: runs"),
    (["assets", "fetch", "minilmm"], "Did you mean 'minilm'"),
    (["assets", "eat"], "invalid choice"),
    (["settings", "text", "--scale", "embeded"], "Did you mean 'text.embedded'"),
])
def test_bad_input_is_one_line_and_nothing_is_written(capsys, tmp_path, words, part):
    assert part in fails(capsys, *words)
    assert files(tmp_path) == []


@pytest.mark.parametrize("words", [["train", "toy", "--method", "lroa"], ["train", "toy", "--task", "x"], ["train", "toy", "--resume", "--overwrite"],
                                   ["train", "toy", "--out", "taken"], ["train", "toy", "--out", "taken", "--overwrite"], ["eval", "none"], ["predict", "none", "a"],
                                   ["report", "none"], ["demo", "--methods", "lora,sten"], ["compare", "toy", "--methods", "sten"], ["compare", "toy", "--seeds", "a"],
                                   ["reproduce", "glue", "--seeds", "a"]], ids=" ".join)
def test_what_can_be_known_at_once_is_said_at_once(tmp_path, words):
    (tmp_path/"taken").mkdir()
    (tmp_path/"taken"/"thesis.txt").write_text("years of work")
    heavy = "torch transformers peft datasets accelerate matplotlib sklearn".split()
    check = f"import sys; from stan_nb.cli import main; code = main({words}); print(code, [m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "2 []" and done.stderr.startswith("stan-nb: "), done


def test_the_help_names_methods_tasks_and_defaults(capsys):
    from stan_nb.cli import TITLES
    def said(*words):
        assert main([*words, "--help"]) == 0
        return " ".join(capsys.readouterr().out.split())
    plain, text, eval_ = said("train"), said("train", "text"), said("eval")
    assert f"allowed: {', '.join(TITLES)}; default: stan" in plain and "text: docstrings, grammar," in plain and "default: 0.002" in plain
    assert "[text.embedded]" in text and "backbone: asset:minilm" not in text and "default: asset:minilm" in text and "default: 0.001" in text and "gsm8k" not in text
    assert "default: microsoft/deberta-v3-base" in said("train", "text", "--scale", "paper") and "default: asset:minilm" in said("demo")
    assert "seed" not in eval_ and "default: 0.0" not in eval_                       # the run's own values hold there


def test_resume_takes_the_settings_of_the_run(capsys, tmp_path):
    assert main(["train", *QUICK, "--lr", "3e-3", "--method", "lora", "--rank", "2", "--out", "it"]) == 0
    former, _ = Run.open("it").settings, capsys.readouterr()
    assert main(["train", "toy", "--out", "it", "--resume"]) == 0 and "kept in it" in capsys.readouterr().out
    assert main(["train", "toy", "--out", "it", "--resume", "--lr", "0.003", "--scale", "embedded"]) == 0 and Run.open("it").settings == former
    capsys.readouterr()
    for words, part in [(["toy", "--lr", "1"], "lr was 0.003, is now 1.0; leave them out"), (["text"], "modality was 'toy', is now 'text'"), (["toy", "--scale", "paper"], "scale was 'embedded', is now 'paper'"),
                        (["toy", "--method", "stan"], "method was 'lora', is now 'stan'")]:
        assert part in fails(capsys, "train", *words, "--out", "it", "--resume")
    assert main(["train", *QUICK, "--method", "lora", "--k", "3"]) == 0                      # and without a name: the folder that the command would make
    assert main(["train", "toy", "--method", "lora", "--resume"]) == 0 and Run.open("runs/toy-clusters-lora-s0").settings.k == 3


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("STAN_DEBUG", "1")
    with pytest.raises(FileNotFoundError): main(["eval", "none"])


def test_a_run_that_exists(capsys, run):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    err = fails(capsys, "train", *QUICK, "--out", run)
    assert "--resume" in err and "--overwrite" in err
    assert "other settings: lr was" in fails(capsys, "train", *QUICK, "--out", run, "--resume", "--lr", "1e-4")
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert main(["train", *QUICK, "--out", str(run), "--overwrite", "--lr", "1e-4"]) == 0
    assert Run.open(run).settings.lr == 1e-4


def test_overwrite_spares_a_folder_that_is_no_run(capsys, tmp_path):
    (tmp_path/"thesis").mkdir()
    (tmp_path/"thesis"/"chapter.txt").write_text("years of work")
    assert "choose another path" in fails(capsys, "train", *QUICK, "--out", tmp_path/"thesis", "--overwrite")
    assert files(tmp_path/"thesis") == ["chapter.txt"]


def weights(run): return next(p for p in (run/"adapter").rglob("*.safetensors"))


def truncated(run): weights(run).write_bytes(weights(run).read_bytes()[:-40])
def without_weights(run): weights(run).unlink()
def without_adapter(run): shutil.rmtree(run/"adapter")
def torn_json(run): (run/"run.json").write_text((run/"run.json").read_text()[:100])
def foreign_json(run): (run/"run.json").write_text('{"a": 1}')
def no_config(run): next((run/"adapter").rglob("adapter_config.json")).write_text("{")


def changed(change):
    def damage(run):
        from safetensors.torch import load_file, save_file
        tensors = load_file(weights(run))
        name = next(n for n in tensors if "encoder" in n)
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, weights(run))
    return damage


@pytest.mark.parametrize("damage", [truncated, without_weights, without_adapter, torn_json, foreign_json, no_config, changed(lambda t: t[:-1]), changed(lambda t: t*float("nan"))],
                         ids=["truncated", "no weights", "no adapter", "torn run.json", "foreign run.json", "broken config", "wrong shape", "nan"])
@pytest.mark.parametrize("command", ["eval", "report"])
def test_a_damaged_run_is_one_line(capsys, tmp_path, run, damage, command):
    damage(run)
    before = files(tmp_path)
    assert str(run) in fails(capsys, command, run)
    assert files(tmp_path) == before


def test_eval_gives_what_training_gave(capsys, trained):
    assert main(["eval", str(trained/"lora-1")]) == 0
    out = capsys.readouterr().out
    for name, value in Run.open(trained/"lora-1").info["result"]["test"].items(): assert re.search(rf"test +{name} +{round(value, 4)}\s", out)


def interrupt(process, when, number=signal.SIGINT):
    "Send a signal as soon as `when()` holds; exit code, stdout, stderr."
    end = time.monotonic() + 120
    while not when():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_how_to_go_on_and_resume_goes_on(tmp_path, capsys, number):
    words = ["train", "toy", "--max-steps", "400", "--out", "long", "--device", "cpu"]
    log = tmp_path/"long"/"metrics.jsonl"
    code, out, err = interrupt(start(*words, cwd=tmp_path), lambda: log.exists() and log.stat().st_size > 2000, number)
    last = err.splitlines()[-1]
    assert code == 130 and out == "" and "Traceback" not in err
    assert re.search(r"stan-nb: stopped at step \d+ of 400. Go on with: stan-nb train toy --max-steps 400 --out long --device cpu --resume$", last), last
    assert main([*words, "--resume"]) == 0
    assert "kept in long" in capsys.readouterr().out
    if number == signal.SIGTERM: return
    assert main([*words[:5], "whole", *words[6:]]) == 0
    one, two = (Run.open(tmp_path/name).info["result"] for name in ("long", "whole"))
    assert one["test"] == two["test"] and weights(tmp_path/"long").read_bytes() == weights(tmp_path/"whole").read_bytes()


def test_demo_is_interrupted_and_goes_on(tmp_path, capsys):
    words = ["demo", "--modality", "toy", "--max-steps", "200", "--methods", "lora,stan", "--seeds", "1", "--device", "cpu"]
    log = tmp_path/"runs/demo/stan-0/metrics.jsonl"
    code, _, err = interrupt(start(*words, cwd=tmp_path), lambda: log.exists() and log.stat().st_size > 2000)
    assert code == 130 and err.splitlines()[-1].endswith("Go on with: stan-nb " + " ".join(words))
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "lora-0: finished before, reused" in out and "stan-0: finished" not in out and "report.html" in out
    assert "runs/demo/lora-0 was run with other settings (lr was 0.01, now 0.002)" in fails(capsys, *words, "--lr", ".002")
    assert main([*words, "--lr", ".002", "--overwrite"]) == 0
    assert Run.open(tmp_path/"runs/demo/lora-0").settings.lr == .002


def test_a_closed_pipe_is_no_error(tmp_path):
    done = subprocess.run(f"{sys.executable} -c 'import sys; from stan_nb.cli import main; sys.exit(main())' settings text | head -1; echo ${{PIPESTATUS[0]}}",
                          shell=True, executable="/bin/bash", capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] in ("0", "141") and done.stderr == ""


def test_report_needs_nothing_from_outside_and_is_escaped(trained, tmp_path):
    Run.open(trained/"stan-0").update(command="stan-nb <script>alert(1)</script>")
    page = report([trained], tmp_path/"r.html", title="<b>mine</b> & yours").read_text()
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert "<script" not in text and "&lt;script&gt;" in text and "<b>mine" not in text
    assert not re.search(r"(?:src|href|url\()\s*=?\s*[\"']?(?:https?:)?//", text) and "default-src 'none'" in text
    images = re.findall(r"<img [^>]*>", text)
    assert len(images) >= 3 and all(re.search(r'alt="[^"]{20,}"', image) for image in images)
    assert "prefers-color-scheme: dark" in text
    for part in ("95% interval", "minus LoRA", "Settings tried", "never fired", "Corpus hash", "torch", "num_latents"): assert part in text


def test_report_refuses_other_data_and_unfinished_runs(capsys, trained, tmp_path):
    assert main(["train", *QUICK, "--train-size", "300", "--out", "other"]) == 0
    capsys.readouterr()
    assert "cannot be compared" in fails(capsys, "report", trained, "other", "--out", "r.html")
    half = Path(shutil.copytree(trained/"stan-0", "half"))
    info = json.loads((half/"run.json").read_text())
    del info["result"]
    (half/"run.json").write_text(json.dumps(info))
    assert "is not finished" in fails(capsys, "report", half, "--out", "r.html")
    assert not Path("r.html").exists()


def test_report_of_one_run_without_latents(trained, tmp_path, capsys):
    assert "is a folder: name a file" in fails(capsys, "report", trained, "--out", tmp_path)
    assert main(["report", str(trained/"head-1"), "--out", "one.html"]) == 0
    page = Path("one.html").read_text()
    assert capsys.readouterr().out == "one.html\n" and "Which latents" not in page and "minus" not in page


def test_a_diverging_run_is_one_line(capsys, tmp_path):
    assert main(["train", *QUICK, "--lr", "1e30", "--clip", "0", "--out", "run"]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("stan-nb: the loss is") and "learning rate" in err and "Traceback" not in err


def test_variants_are_told_apart(trained, tmp_path):
    assert main(["train", *QUICK, "--method", "lora", "--lr", "3e-3", "--out", "lora-slow"]) == 0
    rows = measured(open_runs([trained, "lora-slow"]))
    assert sorted({row["variant"] for row in rows}) == ["LoRA lr=0.003", "LoRA lr=0.01", "STAN", "base"]
    assert "LoRA 2, STAN 1" in report([trained, "lora-slow"], "r.html").read_text()


def test_small_parts():
    assert in_words(dict(num_latents=4, k=2, trainable=1448, head=2, budget=1448, off_by=.0)) == "num_latents 4, k 2; 1,448 parameters, 0.0% off the budget"
    rows = [dict(variant=v, seed=s, score=.5) for v in ("a", "b") for s in ((0,) if v == "a" else (1,))]
    assert difference(rows, "a", "b")["text"] == "no common seed" and verdict(rows) == ["b and a share no seed."]


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    "A folder with pairs, and a BERT of two layers that nobody trained: text in a second, without any download."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp("little")
    words = "sort the nodes of a graph draw curve number is prime list item add remove <b> & ##s".split()
    special = dict(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    vocabulary = {word: i for i, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                                                             special_tokens=[(t, vocabulary[t]) for t in ("[CLS]", "[SEP]")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder/"bert")
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                         max_position_embeddings=40)).save_pretrained(folder/"bert")
    pairs = [dict(text=f"{a} the nodes of a graph", pair=f"{b} item", label=int(a == b)) for a in ("sort", "draw", "add", "remove", "<b>") for b in ("sort", "draw", "add", "remove", "<b>")]
    (folder/"data").mkdir()
    for name, rows in dict(train=pairs * 8, valid=pairs, test=pairs).items(): (folder/"data"/f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["text", "--backbone", str(folder/"bert"), "--data", str(folder/"data"), "--device", "cpu", "--lr", "5e-3", "--epochs", "1", "--opt.last_layers", "0", "--rank", "4", "--k", "2"]


ASKED = ["sort the nodes | sort item", "draw a curve|add", "<b> & graphs | remove item"]


@pytest.mark.parametrize("method", ["stan", "lora", "sora", "head"])
def test_a_fresh_process_predicts_the_same_logits(little, tmp_path, monkeypatch, method):
    from stan_nb import methods
    from stan_nb.text import TextTask
    end, kind = {}, type(methods.get_method(method))
    save = kind.save

    def look(self, model, folder):
        "What the model says at the end of its training, before it is saved."
        task = TextTask(Run.open(tmp_path/"run").settings)
        task.load_data()
        end["logits"] = task.predict_text(model, ASKED).tolist()
        return save(self, model, folder)

    monkeypatch.setattr(kind, "save", look)
    assert main(["train", *little, "--method", method, "--out", "run"]) == 0
    out, err = start("predict", "run", *ASKED, "--logits", cwd=tmp_path).communicate(timeout=120)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["logits"] for row in rows] == end["logits"]
    assert [row["input"] for row in rows] == ASKED and all(row["label"] in "01" and .5 <= row["probability"] <= 1 for row in rows)


def test_predict_says_what_it_needs(little, capsys, tmp_path):
    assert main(["train", *little, "--max-steps", "2", "--out", "run"]) == 0
    capsys.readouterr()
    assert "'first | second'" in fails(capsys, "predict", "run", "only one")
    assert main(["predict", "run", ASKED[0]]) == 0
    assert re.search(r"label +probability +input\n-.*\n\d +\d\.\d{3} +sort the nodes", capsys.readouterr().out)


def test_report_shows_words(little, tmp_path):
    assert main(["train", *little, "--out", "run"]) == 0
    page = report(["run"], "r.html").read_text()
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert "validation example 1" in text and "most on the words" in text and "[PAD]" not in text
    assert "nodes" in text and "<b>" not in text.replace("<body>", "") and "&lt;b&gt;" in text
