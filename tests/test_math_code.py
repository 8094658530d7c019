"""Math and code beyond their lessons: the shipped model, scorers that trip naive ones, hostile programs, hub-scale settings on a tiny model, bad input."""
import importlib.util, json, os, random, shlex, shutil, socket, subprocess, sys, threading
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from stan_nb.assets import local_data, shipped
from stan_nb.cli import main, scored
from stan_nb.math_code import MathCodeTask, answer_loss, export_harness, pack, right_padded, stream
from stan_nb.math_code_data import as_row, calculate, cut, find_rows, flexible, judged, pass_at_k, same_number, same_value, strict
from stan_nb.methods import METHODS, lora_budget, method_from_settings
from stan_nb.protocol import Comparison
from stan_nb.runs import Run, load_results
from stan_nb.sandbox import run_code, sandbox_problem
from stan_nb.settings import settings
from stan_nb.task import Task, predict_rows, wilson
from stan_nb.train import train_run

ROOT = Path(__file__).parent.parent
caged = pytest.mark.skipif(bool(sandbox_problem()), reason=f"no sandbox: {sandbox_problem()}")
QUICK = dict(max_steps=2, train_size=40, test_size=6, batch_size=8)


def folder(path, **files):
    path.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items(): (path/f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

def gsm(n): return [dict(question=f"Tom has {i} pens and gets {i}. How many?", answer=f"{i} + {i} = <<{i}+{i}={2*i}>>{2*i}\n#### {2*i}") for i in range(n)]

@pytest.fixture(scope="module")
def task(): return MathCodeTask(settings("math_code"))

@pytest.fixture(scope="module")
def model(task): return task.build_model().eval()

@pytest.fixture
def tiny(tmp_path): return Path(shutil.copytree(shipped("models/tiny-llama"), tmp_path/"tiny"))


# the shipped model

def test_the_shipped_model_scores_as_recorded():
    place = shipped("models/tiny-llama")
    record = json.loads((place/"record.json").read_text())
    spec = importlib.util.spec_from_file_location("pretrain_lm", ROOT/"benchmarks"/"pretrain_lm.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(place)
    drill = script.encode(tokenizer, script.exercises(random.Random(-1), 60_000))
    assert script.loss_on(model, drill) == pytest.approx(record["exercises"], abs=2e-3)
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert sum(path.stat().st_size for path in place.iterdir()) < 4 << 20
    assert tokenizer.tokenize("123") == ["1", "2", "3"] and tokenizer.decode(tokenizer("a = 'ü'\n")["input_ids"]) == "a = 'ü'\n"


# scorers

@pytest.mark.parametrize("text, right, verdict", [
    ("#### 1,000", "1000", (1, 1)), ("#### $5", "5", (0, 1)), ("#### $5.00", "5", (0, 0)), ("#### 7.", "7", (1, 1)), ("12 then 30, so 42", "42", (0, 1)),
    ("#### -3", "-3", (1, 1)), ("so -3", "-3", (0, 1)), ("none", "3", (0, 0)), ("", "3", (0, 0)), ("#### 3\nQuestion: 4?\n#### 9", "3", (1, 0)), ("####3", "3", (0, 1)),
    ("#### 3.0", "3", (0, 0)), ("72 eggs #### 73", "72", (0, 0)), ("####  5", "5", (0, 1)), ("He pays $1,250.", "1250", (0, 1))])
def test_numbers_are_read_as_the_harness_does(text, right, verdict):
    assert tuple(int(same_number(read(text), right)) for read in (strict, flexible)) == verdict

def test_the_harness_itself_agrees():
    yaml, extraction = pytest.importorskip("yaml"), pytest.importorskip("lm_eval.filters.extraction")
    import lm_eval
    found = (Path(lm_eval.__file__).parent/"tasks"/"gsm8k"/"gsm8k.yaml").read_text()
    filters = {f["name"]: {k: v for k, v in f["filter"][0].items() if k != "function"} for f in yaml.safe_load(found)["filter_list"]}
    texts = ["#### 1,000", "It costs $5.00.", "a 3 b -4", "", "#### 7.", "x, y", "1. 2. 3.", "#### -1,2.", "..", "$,", "5 - 3"]
    for read, name in ((strict, "strict-match"), (flexible, "flexible-extract")):
        theirs = list(extraction.RegexFilter(**filters[name]).apply([texts], [{}]))[0]
        assert [read(text) for text in texts] == theirs

def test_pass_at_k():
    assert pass_at_k(1, 1, 1) == 1 and pass_at_k(10, 0, 5) == 0 and pass_at_k(10, 6, 5) == 1 and pass_at_k(10, 1, 1) == pytest.approx(.1)
    rng = random.Random(0)
    draws = [any(i < 3 for i in rng.sample(range(12), 4)) for _ in range(20000)]
    assert pass_at_k(12, 3, 4) == pytest.approx(sum(draws) / len(draws), abs=.015)
    with pytest.raises(ValueError, match="k = 2"): pass_at_k(1, 1, 2)

@pytest.mark.parametrize("text", ["__import__('os').system('true')", "(lambda: 1)()", "xs.append(1)", "[x for x in xs]", "9**9**9", "xs * 10**9", "'a' * 10", "max", "max(xs, key=abs)", "xs[", "1/0", "xs[99]", "open"])
def test_expressions_that_are_none(text):
    with pytest.raises(ValueError): calculate(text, dict(xs=[1, 2]))

@pytest.mark.parametrize("name", ["words", "expressions"])
def test_data_are_kept_apart(name):
    splits, judge, _ = find_rows(name)
    prompts = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(prompts) == len(set(prompts)) and all(judged(cut(row["answer"], judge), row["check"], judge) for rows in splits.values() for row in rows)
    assert not judged("", splits["test"][0]["check"], judge)


# programs

@caged
@pytest.mark.parametrize("code, status", [("x = 1", "passed"), ("while True: pass", "timed out"), ("x = bytearray(3 << 30)", "failed"), ("open('/tmp/stan_nb_outside', 'w')", "failed"),
                                          ("import os; os.remove('/etc/hostname')", "failed"), ("open('a', 'wb').write(b'0' * (64 << 20))", "failed"), ("import os; os._exit(0)", "failed"),
                                          ("print('x' * (32 << 20))", "failed"), ("import os; os.kill(-1, 9)", "failed"), ("raise SystemExit", "failed")])
def test_programs_in_the_cage(code, status):
    assert run_code(code, seconds=4).status == status
    assert not Path("/tmp/stan_nb_outside").exists()

@caged
def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        heard, port = [], server.getsockname()[1]
        server.settimeout(4)
        def listen():
            try: heard.append(server.accept())
            except OSError: pass
        listener = threading.Thread(target=listen)
        listener.start()
        assert run_code(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)", seconds=3).status == "failed"
        listener.join()
        assert heard == []

@caged
def test_a_fork_bomb_is_small_and_ends():
    found = run_code("import os, time\nfor i in range(200):\n    if not os.fork(): time.sleep(60)", seconds=3)
    assert found.status == "failed" and "Resource temporarily unavailable" in found.detail, found

@caged
def test_humaneval_and_mbpp_are_scored(tmp_path, tiny):
    problem = dict(task_id="t/0", prompt='def twice(x):\n    """Twice x."""\n', canonical_solution="    return 2 * x\n", test="def check(candidate):\n    assert candidate(3) == 6\n", entry_point="twice")
    he = settings("math_code", backbone=str(tiny), data=str(folder(tmp_path/"humaneval", test=[problem] * 3)), **{"opt.samples": 10, "opt.temperature": .8})
    with pytest.raises(PermissionError, match="--allow-code-execution"): MathCodeTask(he).check_scoring()
    task = MathCodeTask(he)
    task.allow_code_execution = True
    task.check_scoring()
    rows = task.load_data()["test"]
    right, wrong = "    return x + x\n", "    return x\n"
    assert task.metrics([[right] * 10, [wrong] * 10, [right] + [wrong] * 9], task.references(rows)) == pytest.approx({"pass@1": 1.1 / 3, "pass@10": 2 / 3})
    written = predict_rows(task, task.build_model(), rows, progress=False)
    assert [len(answers) for answers in written] == [10] * 3
    mbpp = as_row(dict(text="Add.", code="def add(a, b):\n    return a + b", test_list=["assert add(1, 2) == 3"]), "here")
    assert judged(mbpp["answer"], mbpp["check"], "program", run=True) and not judged("def add(a, b): return 0", mbpp["check"], "program", run=True)

def test_ten_answers_to_a_question_are_one_question():
    records = [dict(correct=right) for right in ([True] * 10 + [False] * 20)]
    interval = lambda questions: scored(SimpleNamespace(metric="pass@1"), "test", {"pass@1": 1 / 3, "pass@10": 1 / 3}, records, questions)[0]["95% interval"]
    assert interval(3) == "[{:.4f}, {:.4f}]".format(*wilson(1, 3)) and interval(30) == "[{:.4f}, {:.4f}]".format(*wilson(10, 30))

def test_programs_are_not_run_unasked(tmp_path, tiny):
    problem = dict(text="Add.", code="def add(a, b):\n    return a + b", test_list=["assert add(1, 2) == 3"])
    data = folder(tmp_path/"mbpp", train=[problem] * 20, test=[problem])
    with pytest.raises(PermissionError, match="not asked for"): train_run(settings("math_code", backbone=str(tiny), data=str(data), **QUICK), tmp_path/"run", progress=False)
    assert not (tmp_path/"run").exists()


# the stored comparisons

@pytest.mark.parametrize("name", ["words", "expressions"])
def test_the_stored_comparisons_are_fair(name):
    found = Comparison(load_results(f"math_code_{name}"))
    searched, tested = [{row["seed"] for row in found["rows"] if (row["stage"] == "test") == look} for look in (False, True)]
    assert not searched & tested and len(tested) >= 3
    points = {label: {tuple(row[key] for key in found["keys"]) for row in found["rows"] if row["variant"] == label and row["stage"] == "grid"} for label in found["tuned"]}
    assert len(set(map(frozenset, points.values()))) == 1 and {"lr", "scaling"} <= set(found["keys"])
    assert len({row["adapter"] for row in found["rows"]}) == 1 and len({row["corpus_hash"] for row in found["rows"]}) == 1
    assert {own["task"] for own in found["settings"].values()} == {name} and f"math_code_{name}.json" in found["command"]


# batches, generation

def test_packing_changes_no_gradient(task):
    rows = find_rows("words")[0]["train"][:12]
    pairs, grads = [task.token_pair(row) for row in rows], []
    for lines in ([[pair] for pair in pairs], pack(pairs, 128)):
        model = task.build_model().train()
        answer_loss(model, right_padded(lines, task.tokenizer.pad_token_id)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert len(pack(pairs, 128)) < 12 and torch.allclose(*grads, atol=1e-5)

def test_left_padding_changes_no_answer(task, model):
    asked = [row["prompt"] for row in find_rows("words")[0]["test"][:6]]
    assert task.predict_text(model, asked) == [task.predict_text(model, [text])[0] for text in asked]

def test_gpt2_trains_and_is_opened_again(tmp_path, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path/"gpt2")
    tokenizer.save_pretrained(tmp_path/"gpt2")
    wanted = settings("math_code", backbone=str(tmp_path/"gpt2"), rank=4, k=2, **QUICK)
    found = train_run(wanted, tmp_path/"run", progress=False)
    task, model = Task.from_run(tmp_path/"run")
    assert task.metrics(predict_rows(task, model, task.load_data()["test"], progress=False), task.load_data()["test"]["check"])["exact_match"] == found["test"]["exact_match"]


# hub scale on a tiny model: nothing but the paths changed

@pytest.mark.parametrize("scale", ["paper", "colab"])
def test_the_paper_section_runs(tmp_path, tiny, scale):
    data = folder(tmp_path/"gsm8k", train=gsm(40), test=gsm(5))
    changes = dict(precision="no") if scale == "colab" else {}                   # fp16 needs a GPU
    found = train_run(settings("math_code", scale=scale, backbone=str(tiny), data=str(data), max_steps=2, **changes), tmp_path/"run", progress=False)
    assert found["steps"] == 2 and set(found["test"]) == {"exact_match", "flexible", "library_loss"}
    assert main(["eval", str(tmp_path/"run")]) == 0

def test_the_real_gsm8k_end_to_end(tmp_path, capsys, monkeypatch):
    if not os.environ.get("STAN_DATA") or not local_data("gsm8k"): pytest.skip("no STAN_DATA with gsm8k")
    wanted = settings("math_code", task="gsm8k", max_steps=2, batch_size=4, train_size=200, test_size=6, max_length=256, **{"opt.shots": 1})
    found = train_run(wanted, tmp_path/"run", progress=False)
    assert 0 <= found["test"]["exact_match"] <= found["test"]["flexible"] + 1 and "gsm8k" in Run.open(tmp_path/"run").info["source"]
    assert main(["eval", str(tmp_path/"run")]) == 0
    assert "exact_match" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path/"run"/"outputs"/"test.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and set(lines[0]) == {"prompt", "answer", "extracted", "reference", "correct"} and all(line["reference"].replace(",", "").lstrip("-").isdigit() for line in lines)

def test_metamath_is_scored_on_gsm8k(tmp_path, monkeypatch):
    "A shelf with MetaMathQA's training rows alone: the questions to score are those of GSM8K."
    folder(tmp_path/"metamath", train=[dict(query=f"{i} and {i}?", response=f"It is {2 * i}.\nThe answer is: {2 * i}") for i in range(20)])
    folder(tmp_path/"gsm8k", train=gsm(20), test=gsm(3))
    monkeypatch.setenv("STAN_DATA", str(tmp_path))
    splits, judge, _ = find_rows("metamath")
    assert {name: len(rows) for name, rows in splits.items()} == dict(train=18, valid=2, test=3) and judge == "number"
    assert splits["train"][0]["answer"].endswith("#### 2") and splits["test"][0]["prompt"].startswith("Question: Tom has")
    (tmp_path/"metamath"/"train.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="nothing to score"): find_rows("metamath")

def test_train_and_eval_on_the_command_line(tmp_path, capsys):
    run = str(tmp_path/"run")
    assert main(["train", "math_code", "--scale", "embedded", "--out", run, "--max-steps", "2", "--train-size", "40", "--test-size", "5"]) == 0
    assert main(["eval", run]) == 0
    assert "[0.0000, 0.4345]" in capsys.readouterr().out                         # Wilson's interval of 0 of 5
    assert main(["predict", run, "Anna has 3 pens. Anna buys 4 more. How many pens are there now?"]) == 0
    lines = [json.loads(line) for line in (tmp_path/"run"/"outputs"/"test.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and {"prompt", "answer", "extracted", "correct"} <= set(lines[0])


# two adapters

def test_two_adapters_in_one_batch(tmp_path, task):
    models = {}
    for name, seed in (("math", 1), ("code", 2)):
        torch.manual_seed(seed)
        base = task.build_model()
        method = method_from_settings(task.settings)
        models[name] = method.build(base, task.targets(base), lora_budget(base, task.targets(base), 8))
        with torch.no_grad():
            for p in models[name].parameters():
                if p.requires_grad: p.add_(torch.randn_like(p) * .05)
        method.save(models[name].eval(), tmp_path/name)
    both = method_from_settings(task.settings).load(task.build_model(), tmp_path/"math", task.targets(base)).eval()
    both.load_adapter(tmp_path/"code", adapter_name="code")
    asked = [row["prompt"] for row in find_rows("words")[0]["test"][:4]]
    alone = {name: task.predict_text(model, asked) for name, model in models.items()}
    both.set_adapter("code")
    assert task.predict_text(both, asked) == alone["code"] != alone["math"]
    mixed = task.predict_text(both, asked, adapter_names=["default", "code", "__base__", "default"])
    with both.disable_adapter(): base_says = task.predict_text(both, asked)
    assert mixed == [alone["math"][0], alone["code"][1], base_says[2], alone["math"][3]]
    assert base_says == task.predict_text(task.build_model().eval(), asked)


# bad input

def test_long_rows_are_left_out_and_long_prompts_cut(tmp_path, tiny, caplog):
    data = folder(tmp_path/"long", train=gsm(20) + [dict(question="word " * 300, answer="1\n#### 1")], valid=gsm(3), test=[dict(question="word " * 300, answer="1\n#### 1")])
    task = MathCodeTask(settings("math_code", backbone=str(tiny), data=str(data)))
    assert len(task.load_data()["train"]) == 20 and "1 of 21 train rows are longer than max_length = 128" in caplog.text
    model = task.build_model()
    assert task.questions(task.load_data()["test"].to_list())["input_ids"].shape == (1, 256 - 32) and "lose their beginning" in caplog.text
    with pytest.raises(ValueError, match="is too long: allowed are 224"): task.predict_text(model, ["word " * 300])

def test_empty_answers(tmp_path, tiny):
    data = folder(tmp_path/"empty", train=[*gsm(3), dict(question="Why?", answer="")], test=gsm(2))
    with pytest.raises(ValueError, match="line 4: field 'answer' is empty"): MathCodeTask(settings("math_code", backbone=str(tiny), data=str(data))).load_data()

def test_tokenizers_without_pad_or_end(tiny):
    config = json.loads((tiny/"tokenizer_config.json").read_text())
    for left_out in ("pad_token", "eos_token"):
        config.pop(left_out)
        (tiny/"tokenizer_config.json").write_text(json.dumps(config))
        (tiny/"special_tokens_map.json").unlink(missing_ok=True)
        task = MathCodeTask(settings("math_code", backbone=str(tiny)))
        if left_out == "pad_token": assert task.tokenizer.pad_token == task.tokenizer.eos_token and task.predict_text(task.build_model(), ["a", "a longer one"])
        else:
            with pytest.raises(ValueError, match="no end token"): task.tokenizer

def test_an_adapter_of_another_vocabulary(tmp_path, tiny):
    train_run(settings("math_code", backbone=str(tiny), **QUICK), tmp_path/"run", progress=False)
    tokenizer = json.loads((tiny/"tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[500:502]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tiny/"tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="was trained with vocabulary"): Task.from_run(tmp_path/"run")

def test_no_causal_model(tmp_path, tiny):
    with pytest.raises((ValueError, ConnectionError), match="backbone"): MathCodeTask(settings("math_code", backbone=str(tmp_path))).tokenizer
    with pytest.raises(ValueError, match="needs opt.temperature"): MathCodeTask(settings("math_code", **{"opt.samples": 3}))


# elsewhere

def test_export_for_the_harness(tmp_path, tiny):
    train_run(settings("math_code", backbone=str(tiny), **QUICK), tmp_path/"run", progress=False)
    command = export_harness(tmp_path/"run", tmp_path/"out")
    made = json.loads((tmp_path/"out"/"stan_words.yaml").read_text())
    rows = [json.loads(line) for line in Path(made["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
    assert "import stan_nb.peft" in command and f"peft={tmp_path/'out'/'adapter'}" in command and len(rows) == 6 and made["filter_list"][0]["name"] == "strict-match"
    assert (tmp_path/"out"/"adapter"/"adapter_model.safetensors").read_bytes() == (tmp_path/"run"/"adapter"/"adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError): export_harness(tmp_path/"run", tmp_path/"out")

def test_the_harness_scores_what_we_score(tmp_path):
    "The exported folder and the printed command, given to lm-evaluation-harness itself."
    pytest.importorskip("lm_eval")
    task, model = Task.from_run(shipped("runs/math_code-words-lora"), test_size=60)
    ours = task.metrics(predict_rows(task, model, task.load_data()["test"], progress=False), task.load_data()["test"]["check"])
    words = shlex.split(export_harness(shipped("runs/math_code-words-lora"), tmp_path/"out"))
    done = subprocess.run([sys.executable, *words[1:], "--device", "cpu", "--batch_size", "30", "--limit", "60", "--output_path", str(tmp_path/"scores")], capture_output=True, text=True, env=os.environ | dict(HF_HUB_OFFLINE="1"))
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(next((tmp_path/"scores").rglob("results_*.json")).read_text())["results"]["stan_words"]
    assert ours["exact_match"] > .2 and {"exact_match": theirs["exact_match,strict-match"], "flexible": theirs["exact_match,flexible-extract"]} == pytest.approx(ours)

def test_trl_trains_stan(tmp_path, tiny):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from peft import PeftModel
    from stan_nb.peft import StanConfig
    rows = [dict(prompt=row["prompt"], completion=row["answer"]) for row in find_rows("words")[0]["train"][:16]]
    args = trl.SFTConfig(output_dir=str(tmp_path/"trl"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, max_length=128, report_to=[], use_cpu=True, save_strategy="no",
                         logging_steps=1, bf16=False, gradient_checkpointing=False)
    trainer = trl.SFTTrainer(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), args=args, train_dataset=Dataset.from_list(rows),
                             processing_class=AutoTokenizer.from_pretrained(tiny), peft_config=StanConfig(num_latents=8, k=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trainer.train()
    trained = [p for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all("stan_" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    trainer.save_model(str(tmp_path/"adapter"))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tmp_path/"adapter")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again.eval()(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
