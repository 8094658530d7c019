"""The claims beside their sources, the plan of a cell for every backbone and method, and a reproduction from end to end on tiny models in the hub's layout."""
import csv, json, math
from pathlib import Path
import pytest
import torch
from stan_nb import assets, results
from course import own_methods
from stan_nb.cli import main
from stan_nb.results import BACKBONES, GLUE_ROWS, KNOWN, TASKS, backbone_config, beside, cell_plan, claims, measured, odd, published, reproduce, run_plan, split_sizes
from stan_nb.runs import load_results
from stan_nb.settings import settings

CLAIMS = Path(results.__file__).parent/"data"/"claims"
PLAN = dict(precision="no", device="cpu", max_steps=2, batch_size=8)


@pytest.fixture(autouse=True)
def no_folder(monkeypatch): monkeypatch.delenv("STAN_DATA", raising=False)

@pytest.fixture
def offline(monkeypatch): monkeypatch.setattr(assets, "_hub_problem", lambda: "no answer")

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "DeBERTa and RoBERTa at random, 2 layers, with a tokenizer, as the hub has them."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import DebertaV2Config, DebertaV2ForMaskedLM, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM
    place, found = tmp_path_factory.mktemp("hub"), {}
    words = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh", "the"])}
    for name, model, kind in (("roberta", RobertaForMaskedLM, RobertaConfig), ("deberta", DebertaV2ForMaskedLM, DebertaV2Config)):
        tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]").save_pretrained(place/name)
        torch.manual_seed(0)
        model(kind(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, pad_token_id=0, type_vocab_size=1)).save_pretrained(place/name)
        found[name] = str(place/name)
    return found

@pytest.fixture
def rte(tmp_path):
    (tmp_path/"rte").mkdir()
    rows = [dict(sentence1=a, sentence2=b, label=int(a == b)) for a in "abcd" for b in "abcd"]
    for split, part in dict(train=rows * 2, dev=rows).items(): (tmp_path/"rte"/f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return tmp_path


def test_every_cell_of_both_tables_is_there_once():
    for name, cells in dict(glue_backbones=20, glue_deberta_v3_base=28).items():
        with (CLAIMS/f"{name}.csv").open() as file: raw = list(csv.DictReader(file))
        rows = beside(name)
        assert len(rows) == cells == len({(row["backbone"], row["method"], row["task"]) for row in rows})
        for row in rows:
            line = next(r for r in raw if r["method"] == row["method"] and r.get("backbone", "DeBERTaV3-base") == row["backbone"])
            assert float(line[row["task"]]) == row["claimed"] and row["backbone"] in BACKBONES and row["task"] in TASKS

def test_published_values_are_fractions_with_a_source():
    rows = claims("published")
    assert {row["source"] for row in rows} == set(results.SOURCES) and all(0 < row["value"] < 1 for row in rows)
    assert len({(row["backbone"], row["method"], row["task"], row["metric"]) for row in rows}) == len(rows) == 34
    assert published("RoBERTa-base", "full", "CoLA") == .636 and published("DeBERTaV3-base", "LoRA", "QQP") == .9199 and published("nobody", "full", "CoLA") is None

def test_the_oddities_follow_from_the_files():
    lines = {}
    for row in odd(): lines[row["where"]] = lines.get(row["where"], "") + row["what"]
    assert len({tuple(row.values()) for row in odd()}) == len(odd())
    assert all("is above" in lines[f"RoBERTa, {task}"] for task in ("MNLI", "QQP")) and "equals" in lines["DeBERTaV3, SST-2"]
    assert "2.1 points below" in lines["LoRA, DeBERTaV3-base, MNLI"] and "4.4 points below" in lines["AdaLoRA, DeBERTaV3-base, MNLI"]
    tokens = {row["method"]: 3600 * row["gpu_hours_3_epochs"] * row["train_tokens_per_s"] for row in claims("efficiency_llava_1_5_13b")}
    assert f"{tokens['STAN']:,.0f} tokens" in lines["STAN, LLaVA-1.5-13B"] and f"{tokens['LoRA']:,.0f} tokens" in lines["LoRA, LLaVA-1.5-13B"]
    assert len(odd(at_least=.5)) < len(odd()) < len(odd(at_least=.005))

def test_what_is_measured_names_its_file():
    rows = measured()
    assert rows and all(load_results(row["file"])["date"] == row["date"] for row in rows)
    for row in rows:
        scores = [r.get("score", r.get(load_results(row["file"]).get("metric"))) for r in load_results(row["file"])["rows"]
                  if r.get("variant") == row["variant"] and r.get("stage", "test") == "test"]
        assert row["score"] == pytest.approx(sum(scores) / len(scores)) and row["seeds"] == len(scores)
    assert measured("nothing") == []

def test_a_result_at_paper_scale_fills_its_cell(tmp_path):
    stored = load_results("text_demo")
    held = {key: dict(value, scale="paper", task="rte", backbone="microsoft/deberta-v3-base") for key, value in stored["settings"].items()}
    (tmp_path/"x.json").write_text(json.dumps(stored | dict(settings=held)))
    filled = {(row["method"], row["task"]): row["ours"] for row in beside("glue_deberta_v3_base", tmp_path) if row["ours"] != "not run"}
    assert set(filled) == {("LoRA", "RTE"), ("STAN", "RTE")} and "3 seeds" in filled["LoRA", "RTE"]
    assert all(row["ours"] == "not run" for row in beside("glue_backbones", tmp_path))
    held = {key: dict(value, scale="embedded") for key, value in held.items()}
    (tmp_path/"x.json").write_text(json.dumps(stored | dict(settings=held)))
    assert all(row["ours"] == "not run" for row in beside("glue_deberta_v3_base", tmp_path))   # another scale is another experiment


@pytest.mark.parametrize("method", own_methods())
def test_a_plan_counts_what_is_built(tiny, rte, method):
    "The plan's parameters, made of shapes alone, are those of the run."
    from stan_nb.train import train_run
    wanted = settings("text", "paper", task="rte", backbone=tiny["deberta"], data=str(rte/"rte"), method=method, rank=4, k=2, **PLAN)
    guess, found = run_plan(wanted), train_run(wanted, rte/"run", progress=False)
    assert {key: guess[key] for key in ("trainable", "head", "steps")} == {key: found[key] for key in ("trainable", "head", "steps")} or method == "sora"
    if method == "sora": assert guess["head"] == found["head"] and guess["steps"] == found["steps"]
    assert guess["memory_gib"] == pytest.approx(guess["weights_gib"] + guess["optimizer_gib"] + guess["activations_gib"]) and guess["hours"] > 0

@pytest.mark.parametrize("backbone, millions", [("roberta-base", 125), ("roberta-large", 355), ("microsoft/deberta-v3-base", 184), ("microsoft/deberta-v3-large", 435)])
def test_the_known_backbones_have_their_published_sizes(backbone, millions, offline):
    plan = run_plan(settings("text", "paper", task="rte", backbone=backbone, method="head"))
    assert round(plan["total"] / 1e6) == millions and plan["adapter"] == 0
    more = run_plan(settings("text", "paper", task="rte", backbone=backbone, method="stan"))
    width, layers = backbone_config(backbone).hidden_size, backbone_config(backbone).num_hidden_layers
    assert more["adapter"] == 8 * layers * (4 * 2 * width + 2 * 5 * width) and more["tflop"] > plan["tflop"]

@pytest.mark.parametrize("task", list(GLUE_ROWS))
def test_every_task_has_its_recipe(task, offline):
    wanted = settings("text", "paper", task=task)
    sizes = split_sizes(wanted)
    assert sizes["train"] + sizes["valid"] == GLUE_ROWS[task][0] and sizes["valid"] <= 2000
    assert len({(settings("text", "paper", task=t).lr, settings("text", "paper", task=t).epochs) for t in GLUE_ROWS}) > 5
    assert run_plan(wanted.replace(method="head"))["steps"] == wanted.epochs * math.ceil(sizes["train"] / 32)

@pytest.mark.parametrize("wrong, message", [(dict(task="rtee"), "Did you mean 'rte'"), (dict(task="rte", backbone="roberta-bse"), "Did you mean 'roberta-base'"), (dict(task="rte", tflops=0), "tflops = 0"),
                                            (dict(task="rte", methods="lora, stam"), "stam"), (dict(task="rte", grid="lr"), "setting=value")])
def test_bad_input_is_refused_before_anything_starts(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message): reproduce(**wrong, cache=tmp_path/"cache", say=lambda line: None)
    assert not (tmp_path/"cache").exists()

def test_without_the_hub_the_plan_comes_first_and_then_what_to_bring(offline, capsys, tmp_path):
    assert main(["reproduce", "glue", "--scale", "paper", "--backbone", "microsoft/deberta-v3-base", "--task", "rte", "--cache", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "185750786" in out and "hours in all" in out
    for word in ("the hub cannot be used: no answer", "STAN_DATA", "rte/train.jsonl", "--backbone", "config.json"): assert word in err
    assert err.count("\n") == 1

@pytest.mark.parametrize("name", ["roberta", "deberta"])
def test_with_everything_in_folders_it_runs(tiny, rte, offline, capsys, monkeypatch, name):
    "The command of the issue with nothing but paths and counts changed."
    monkeypatch.setenv("STAN_DATA", str(rte))
    words = ["reproduce", "glue", "--scale", "paper", "--backbone", tiny[name], "--task", "rte", "--cache", str(rte/"cache"), "--grid", "lr=1e-3 scaling=2", "--seeds", "0,1", "--out", str(rte/"found.json"),
             *(word for key, value in (PLAN | dict(rank=4, k=2)).items() for word in (f"--{key.replace('_', '-')}", str(value)))]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.index("hours in all") < out.index("seed 100") < out.index("claimed")
    stored = load_results(rte/"found.json")
    assert [row["seed"] for row in stored["rows"] if row["stage"] == "test"] == [0, 0, 1, 1] and stored["settings"]["lora"]["scale"] == "paper" and "reproduce" not in stored["command"]
    assert [row["task"] for row in measured(folder=rte) if row["file"] == "found"] == ["rte", "rte"]
    assert main([*words, "--plan"]) == 0 and "seed 100" not in capsys.readouterr().out
