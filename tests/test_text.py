"""The text task beyond its lesson: folders of all forms, bad rows, the hub that does not answer, and a model that comes back as it was."""
import json, os
from collections import Counter
from pathlib import Path
import pytest
import torch
from huggingface_hub import constants
from stan_nb import assets
from course import own_methods
from stan_nb.assets import shipped
from stan_nb.methods import lora_budget, method_from_settings
from stan_nb.runs import Run
from stan_nb.settings import settings
from stan_nb.task import Task, evaluate
from stan_nb.train import train_run
from stan_nb.text import TextTask, encoder_linears
from stan_nb.text_data import make_pairs, overlap, read_folder, spell, split_modules

SST = [dict(sentence=s, label=l) for s, l in (("a warm and clever film", 1), ("dull", 0), ("again, please", 1), ("two lost hours", 0))]
STS = [dict(sentence1="A dog runs.", sentence2="A dog is running.", label=4.8), dict(sentence1="A dog runs.", sentence2="Rain falls.", label=0.5)] * 3


def folder(path, **files):
    for name, rows in files.items(): (path/f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def task(): return TextTask(settings("text"))

@pytest.fixture(scope="module")
def model(task): return task.build_model()


@pytest.mark.parametrize("name, words", [("from_dict", "from dict"), ("toList", "to list"), ("nx.shortest_path", "nx shortest path"),
                                         ("__len__", "len"), ("GF2", "gf2"), ("", "")])
def test_spell(name, words): assert spell(name) == words

def test_overlap_bounds():
    assert overlap("anything", "__") == 1. and overlap("", "a_b") == 0. and overlap("Sort nodes.", "sortNodes") == 1.

def test_split_takes_whole_modules_and_is_stable():
    rows = [dict(module=f"m{i % 40}", package="p", function=f"f{i}", summary=f"s{i}") for i in range(800)]
    wanted = dict(test=100, valid=50, train=200)
    splits = split_modules(rows, wanted, most=10)
    assert splits == split_modules(rows, wanted, most=10)
    assert all(len(splits[name]) >= size for name, size in wanted.items())
    assert max(Counter(row["module"] for part in splits.values() for row in part).values()) == 10
    homes = [{row["module"] for row in part} for part in splits.values()]
    assert not homes[0] & homes[1] and not homes[1] & homes[2] and not homes[0] & homes[2]

def test_pairs_are_balanced_in_every_half():
    rows = [dict(package=f"p{i % 3}", function=f"f_{i}", summary=f"Sentence number {i}.") for i in range(31)] + [dict(package="alone", function="x", summary="y")]
    pairs = make_pairs(rows)
    assert len(pairs) == 62 and sum(pair["label"] for pair in pairs) == 31
    for part in ("text", "pair"):
        for value in {pair[part] for pair in pairs}: assert sorted(pair["label"] for pair in pairs if pair[part] == value) == [0, 1]

def test_the_corpus_task(task):
    data = task.load_data()
    assert len(data["test"]) >= 500 and 1800 <= len(data["train"]) <= 2000 and task.unit == "tokens" and task.metric == "accuracy"
    for split in data: assert sum(data[split]["label"]) * 2 == len(data[split])
    assert not set(data["train"]["text"]) & set(data["test"]["text"]) and not set(data["train"]["pair"]) & set(data["test"]["pair"])

def test_the_data_do_not_depend_on_seed_or_method_and_sizes_are_kept(task):
    task.load_data()
    other = TextTask(settings("text", seed=7, method="lora"))
    other.load_data()
    assert other.corpus_hash == task.corpus_hash
    small = TextTask(settings("text", train_size=64, test_size=32))
    data = small.load_data()
    assert (len(data["train"]), len(data["test"]), sum(data["train"]["label"]), sum(data["test"]["label"])) == (64, 32, 32, 16)
    assert small.corpus_hash != task.corpus_hash


def test_head_and_targets(task, model):
    assert task.head(model) == ["classifier"]
    assert task.targets(model) == encoder_linears(model, 3) and len(task.targets(model)) == 18
    assert TextTask(settings("text", targets="query,value")).targets(model) == "query,value"
    with pytest.raises(ValueError, match="opt.last_layers = 9"): TextTask(settings("text", **{"opt.last_layers": 9})).targets(model)
    with pytest.raises(ValueError, match="no numbered layers"): encoder_linears(torch.nn.Linear(2, 2))

def test_the_seed_decides_the_head_and_nothing_else(task, model):
    state = torch.get_rng_state()
    again, other = task.build_model(), TextTask(settings("text", seed=1)).build_model()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    differ = [name for name, value in other.state_dict().items() if not torch.equal(value, model.state_dict()[name])]
    assert differ == ["classifier.weight"]

def test_backbone_dropout_is_an_option(task, model):
    assert model.config.hidden_dropout_prob == 0 and model.config.attention_probs_dropout_prob == 0
    kept = TextTask(settings("text", **{"opt.backbone_dropout": .2})).build_model()
    assert kept.config.hidden_dropout_prob == .2

def test_padding_changes_nothing_that_matters(task, model):
    short, long = ("Draw it.", "plot"), ("Whether the number has no divisors but one and itself, or is itself one of them.", "is prime or not")
    alone, together = task.predict_text(model, [short]), task.predict_text(model, [short, long])
    torch.testing.assert_close(alone[0], together[0], atol=1e-5, rtol=1e-4)

def test_predict_text_keeps_the_mode_and_refuses_other_forms(task, model):
    model.train()
    assert task.predict_text(model, ["a | b"] * 70).shape == (70, 2) and model.training
    for bad in (["one half"], ["a |"], [("a",)], [("a", 3)]):
        with pytest.raises(ValueError, match="first | second"): task.predict_text(model, bad)
    with pytest.raises(ValueError, match="inputs is empty"): task.predict_text(model, [])

def test_an_adapter_comes_back_with_the_same_logits(task, tmp_path):
    chosen = settings("text", train_size=32, test_size=32, k=2)
    asked = ["Draw the function as a curve. | plot_line", "Sort the nodes. | invert"]
    model, method = task.build_model(), method_from_settings(chosen)
    targets, head = task.targets(model), task.head(model)
    model = method.build(model, targets, lora_budget(model, targets, 4, head), head)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad: parameter.add_(torch.randn_like(parameter) * .02)
    method.save(model, tmp_path)
    loaded = method_from_settings(chosen).load(task.build_model(), tmp_path, targets, head)
    assert torch.equal(task.predict_text(model, asked), task.predict_text(loaded, asked))


def test_folder_of_sentences(tmp_path):
    task = TextTask(settings("text", data=str(folder(tmp_path, train=SST * 3, dev=SST))))
    data, model = task.load_data(), task.build_model()
    assert {split: len(rows) for split, rows in data.items()} == dict(train=11, valid=1, test=4)
    assert task.name == tmp_path.name and task.labels == ("0", "1") and task.metric == "accuracy"
    assert task.predict_text(model, ["fine | really"]).shape == (1, 2)                       # a bar is text here
    batch = task.collate([row for row in data["test"]])
    assert set(task.metrics(task.predict(model, batch), task.references(data["test"]))) == {"accuracy", "f1", "matthews"}

def test_folder_of_scores(tmp_path):
    task = TextTask(settings("text", data=str(folder(tmp_path, train=STS, test=STS, valid=STS[:2]))))
    data, model = task.load_data(), task.build_model()
    assert task.labels == () and task.metric == "pearson" and len(data["valid"]) == 2 and model.classifier.out_features == 1
    batch = task.collate([row for row in data["train"]])
    assert batch["labels"].dtype == torch.float32 and task.loss(model, batch).ndim == 0
    assert task.metrics(torch.tensor([[1.], [2.], [3.]]), [1., 2., 4.])["spearman"] == pytest.approx(1)
    assert task.metrics(torch.zeros(3, 1), [1., 2., 4.]) == dict(pearson=0., spearman=0.)

def test_a_known_name_brings_its_labels(tmp_path):
    (tmp_path/"sst2").mkdir()
    task = TextTask(settings("text", data=str(folder(tmp_path/"sst2", train=SST, dev=SST))))
    assert task.name == "sst2" and task.labels == ("negative", "positive")
    (tmp_path/"mine").mkdir()
    named = TextTask(settings("text", data=str(folder(tmp_path/"mine", train=SST, dev=SST)), task="cola"))
    assert named.name == "cola" and named.metric == "matthews"

@pytest.mark.parametrize("line, message", [
    ('{"sentence": "x", "label": 1', "train.jsonl, line 3: no JSON"), ("[1]", "line 3: a list"), ('{"sentence": "x"}', "line 3: field 'label' is missing"),
    ('{"sentence": "x", "label": "1"}', "line 3: field 'label' = '1'"), ('{"sentence": "x", "label": true}', "line 3: field 'label' = True"),
    ('{"sentence": "x", "label": NaN}', "line 3: field 'label' = nan"), ('{"sentence": "", "label": 1}', "line 3: field 'sentence' = ''"),
    ('{"sentence": 5, "label": 1}', "line 3: field 'sentence' = 5"), ('{"sentence": "x", "label": -1}', "line 3: field 'label' = -1"),
    ('{"sentence1": "x", "sentence2": "y", "label": 1}', "line 3: field 'sentence' is missing"), (b"\xff\xfe", "line 3: the line is not UTF-8 (byte 0xff)"),
    ('{"sentence": "caf\xe9", "label": 1}'.encode("latin-1"), "train.jsonl, line 3: field 'sentence' is not UTF-8 (byte 0xe9)"), (b'{"sentence": "\xe9"', "line 3: the line is not UTF-8")])
def test_a_bad_row_is_named(tmp_path, line, message):
    good = b'{"sentence": "x", "label": 0}\n'
    (tmp_path/"train.jsonl").write_bytes(good * 2 + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    folder(tmp_path, dev=SST)
    with pytest.raises(ValueError) as error: read_folder(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)

def test_a_mark_of_byte_order_is_no_text(tmp_path):
    folder(tmp_path, train=SST, dev=SST)
    (tmp_path/"train.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path/"train.jsonl").read_bytes())
    assert read_folder(tmp_path)["test"][0]["text"] == SST[0]["sentence"]

def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to test on"): read_folder(folder(tmp_path, train=SST))
    folder(tmp_path, dev=SST + [dict(sentence="x", label=2)])
    with pytest.raises(ValueError, match="dev.jsonl, line 5: field 'label' = 2 is no class: allowed is 0 to 1"): read_folder(tmp_path)
    folder(tmp_path, dev=STS)
    with pytest.raises(ValueError): read_folder(tmp_path)
    (tmp_path/"train.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no rows"): read_folder(tmp_path)
    (tmp_path/"train.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="train.jsonl"): read_folder(tmp_path)
    folder(tmp_path, train=[dict(sentence="x", label=1)] * 3, dev=[dict(sentence="x", label=1)])
    with pytest.raises(ValueError, match="at least two classes"): read_folder(tmp_path)


def test_without_the_hub_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr(assets, "_hub_problem", lambda: "no answer")
    colab = settings("text", scale="colab", backbone="nobody/nothing", data="nobody/nowhere")
    for action in (TextTask(colab).load_data, TextTask(colab.replace(task="sst2")).build_model, lambda: TextTask(colab).tokenizer):
        with pytest.raises(ConnectionError, match="the hub cannot be used: no answer. Offline there are the embedded tasks") as error: action()
        assert "\n" not in str(error.value)
    assert not constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE")

def test_hub_rows_become_ours(monkeypatch):
    asked = []
    def load(*names):
        asked.append(names)
        return dict(train=[row | dict(idx=i) for i, row in enumerate(SST * 5)], validation=SST, test=[dict(sentence="x", label=-1)])
    monkeypatch.setattr(assets, "_hub_problem", lambda: "")
    monkeypatch.setattr("datasets.load_dataset", load)
    task = TextTask(settings("text", data="glue/sst2"))
    data = task.load_data()
    assert asked == [("nyu-mll/glue", "sst2")] and task.name == "sst2"
    assert {split: len(rows) for split, rows in data.items()} == dict(train=18, valid=2, test=4) and data["test"].column_names == ["text", "label"]
    assert sorted(read["text"] for split in ("train", "valid") for read in data[split]) == sorted(row["sentence"] for row in SST * 5)

@pytest.mark.parametrize("wrong, message", [(dict(task="docstring"), "Did you mean 'docstrings'"), (dict(backbone=""), "backbone is empty"), (dict(task="grammar", **{"opt.noise": 1.}), "noise = 1.0 is out of range")])
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=message): TextTask(settings("text", **wrong)).load_data()

def test_a_backbone_that_is_none(tmp_path, task):
    from transformers import BertConfig, BertModel
    BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)).save_pretrained(tmp_path)
    config = json.loads((tmp_path/"config.json").read_text()) | dict(num_hidden_layers=2)
    (tmp_path/"config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="it is no pretrained text encoder"): TextTask(settings("text", backbone=str(tmp_path))).build_model()
    (tmp_path/"config.json").unlink()
    with pytest.raises(ValueError, match="cannot be loaded") as error: TextTask(settings("text", backbone=str(tmp_path))).build_model()
    assert "hub cannot be used" not in str(error.value)

def test_a_local_backbone_never_asks_the_hub(monkeypatch):
    monkeypatch.setattr(assets, "_hub_problem", lambda: pytest.fail("the hub was asked"))
    TextTask(settings("text")).build_model()


SHARED = Path(os.environ.get("STAN_DATA", Path(__file__).parents[2]/"shared"/"data"))

@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of real data (STAN_DATA)")
@pytest.mark.parametrize("name, metric, paired", [("sst2", "accuracy", False), ("stsb", "pearson", True)])
def test_real_folders(name, metric, paired):
    task = TextTask(settings("text", data=str(SHARED/name), train_size=64, test_size=64))
    data = task.load_data()
    assert task.metric == metric and len(data["train"]) == 64 and ("pair" in data["train"].column_names) == paired


def test_the_shipped_adapter_scores_as_recorded():
    recorded = Run.open(shipped("runs/minilm-docstrings")).info
    found, model = Task.from_run(shipped("runs/minilm-docstrings"))
    data = found.load_data()
    assert found.corpus_hash == recorded["corpus_hash"]
    assert evaluate(found, model, data["test"], progress=False)["accuracy"] == pytest.approx(recorded["result"]["test"]["accuracy"], abs=.004)   # 3 of 802 pairs: other processors round otherwise


def test_a_folder_of_data_sets_goes_before_the_hub(tmp_path, monkeypatch):
    (tmp_path/"rte").mkdir()
    folder(tmp_path/"rte", train=[dict(sentence1="a", sentence2=str(i), label=i % 2) for i in range(40)], dev=[dict(sentence1="a", sentence2="b", label=1)])
    monkeypatch.setenv("STAN_DATA", str(tmp_path))
    monkeypatch.setattr(assets, "_hub_problem", lambda: "no answer")
    task = TextTask(settings("text", task="rte"))
    assert {split: len(rows) for split, rows in task.load_data().items()} == dict(train=36, valid=4, test=1) and task.source.startswith(f"folder {tmp_path/'rte'}")
    with pytest.raises(ConnectionError, match="glue/cola"): TextTask(settings("text", task="cola")).load_data()


def test_the_other_genres_of_mnli_are_scored_too(tiny, tmp_path):
    (tmp_path/"mnli").mkdir()
    rows = [dict(premise="a b", hypothesis=word, label=label) for label, word in enumerate("abc")]
    folder(tmp_path/"mnli", train=rows * 8, dev_matched=rows, dev_mismatched=rows * 2)
    found = train_run(settings("text", "paper", task="mnli", backbone=tiny["roberta"], data=str(tmp_path/"mnli"), max_steps=1, rank=2, k=1, precision="no"), tmp_path/"run", progress=False)
    assert set(found["test"]) == set(found["more"]["mismatched"]) == {"accuracy", "f1", "matthews"}


def test_long_rows_are_cut_and_that_is_said(tmp_path, caplog):
    rows = SST + [dict(sentence="word " * 100_000, label=1)]
    task = TextTask(settings("text", data=str(folder(tmp_path, train=rows * 2, dev=rows))))
    data = task.load_data()
    assert "3 rows are longer than max_length = 64 tokens and are cut there" in caplog.text
    assert task.collate([row for row in data["test"]])["input_ids"].shape == (5, 64)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "Random models of the classes of the paper, with their tokenizers, saved as the hub has them."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (BertConfig, BertForMaskedLM, DebertaV2Config, DebertaV2ForMaskedLM, PreTrainedTokenizerFast, RobertaConfig,
                              RobertaForMaskedLM)
    place, found = tmp_path_factory.mktemp("hub"), {}
    for name, model, kind, marks in (("bert", BertForMaskedLM, BertConfig, ("[CLS]", "[SEP]", "[PAD]", "[UNK]")), ("roberta", RobertaForMaskedLM, RobertaConfig, ("<s>", "</s>", "<pad>", "<unk>")),
                                     ("deberta", DebertaV2ForMaskedLM, DebertaV2Config, ("[CLS]", "[SEP]", "[PAD]", "[UNK]"))):
        cls, sep, pad, unk = marks
        words = {word: i for i, word in enumerate([pad, cls, sep, unk, *"abcdefghijklmnopqrstuvwxyz", "good", "bad", "the"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        between = f"{sep} {sep}" if name == "roberta" else sep
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{cls} $A {sep}", pair=f"{cls} $A {between} $B {sep}", special_tokens=[(cls, words[cls]), (sep, words[sep])])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token=cls, sep_token=sep, pad_token=pad, unk_token=unk).save_pretrained(place/name)
        config = kind(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, pad_token_id=0, type_vocab_size=1 if name != "bert" else 2)
        torch.manual_seed(0)
        model(config).save_pretrained(place/name)
        found[name] = str(place/name)
    return found


FORMS = dict(single=[dict(sentence=f"{word} {letter}", label=label) for label, word in enumerate(("bad", "good")) for letter in "abcdefgh"],
             pair=[dict(sentence1=a, sentence2=b, label=int(a == b)) for a in "abcd" for b in "abcd"],
             score=[dict(sentence1=a, sentence2=b, label=float(a == b) * 5) for a in "abcd" for b in "abcd"])


@pytest.mark.parametrize("method", own_methods())
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("name", ["bert", "roberta", "deberta"])
def test_every_encoder_and_form_trains_with_every_method(tiny, tmp_path, name, form, method):
    "The section of the paper, with nothing but paths and counts changed: trained, saved, loaded, the same answers."
    data = folder(tmp_path, train=FORMS[form], valid=FORMS[form][:4], test=FORMS[form][:6])
    wanted = settings("text", "paper", task="mine", backbone=tiny[name], data=str(data), method=method, rank=4, k=2, max_steps=2, batch_size=8, precision="no", device="cpu")
    found = train_run(wanted, tmp_path/"run", progress=False)
    task, model = Task.from_run(tmp_path/"run")
    assert evaluate(task, model, task.load_data()["test"], progress=False) == found["test"] and found["trainable"] > 0
    assert (task.metric, len(task.labels)) == (("pearson", 0) if form == "score" else ("accuracy", 2))
