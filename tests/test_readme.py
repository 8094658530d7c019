"README: what a reader copies from it works, and fits the page."
import json, re, subprocess, sys

import pytest
from course import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)


def part(heading): return re.search(rf"^## {heading}\n(.*?)(?=^## )", TEXT, re.M | re.S)[1]
def code(heading): return re.findall(r"^```python\n(.*?)^```$", part(heading), re.M | re.S)


def test_snippets_fit_the_page():
    assert len(SNIPPETS) >= 8
    assert [line for snippet in SNIPPETS for line in snippet.splitlines() if len(line) > 75] == []


def test_the_first_result_can_be_copied(tmp_path):
    "Its cells in a fresh process, one after the other, give what stands there."
    script = "\n".join([*code("A first result"), "print([round(p, 2) for p in belongs])"])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    printed, numbers = done.stdout.splitlines()[-2:]
    assert f"    {printed}\n" in TEXT and all(f"| {p} |" in TEXT for p in json.loads(numbers))


def test_the_snippets_run(tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification
    monkeypatch.chdir(tmp_path)
    def bert(): return BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
    get_peft_model(bert(), LoraConfig(target_modules=["query"])).save_pretrained("my-lora")
    base = bert()
    layer, saved, later = code("In code")
    space = dict(model=bert())
    exec(layer, space)
    assert space["model"].bert.encoder.layer[0].attention.self.query.adapter.k == 8
    space = dict(model=base)
    exec(saved, space)
    space = dict(base=space["model"].unload())
    exec(later, space)
    assert space["model"].peft_config["default"].k == 4 and (tmp_path / "my-stan" / "adapter_config.json").exists()


@pytest.mark.parametrize("name", ["set_k(model", "from_lora(", "load_adapter(base", "freezes everything", "stan-nb train", "stan-nb predict", "stan-nb report"])
def test_what_a_user_looks_for_is_there(name): assert name in part("In code") + part("At the command line")
