"Vision and language: the shipped model, its data and batches, bad pictures, a folder of one's own at hub scale."
import json, sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from stan_nb.assets import shipped
from stan_nb.methods import lora_budget
from stan_nb.scenes import KINDS
from stan_nb.settings import settings
from stan_nb.task import evaluate, take
from stan_nb.train import train_run
from stan_nb.vision_language import VisionLanguageTask

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def task(): return VisionLanguageTask(settings("vision_language", train_size=64, test_size=40))


@pytest.fixture(scope="module")
def model(task): return task.build_model().eval()


def test_the_shipped_model_scores_as_recorded():
    sys.path.insert(0, str(ROOT/"benchmarks"))
    try: import pretrain_llava
    finally: sys.path.pop(0)
    from transformers import LlavaForConditionalGeneration
    place = shipped("models/tiny-llava")
    assert sum(p.stat().st_size for p in place.iterdir()) < 4 * 2**20
    record = json.loads((place/"record.json").read_text())
    found = pretrain_llava.scores(LlavaForConditionalGeneration.from_pretrained(place, dtype=torch.float32).eval())
    for kind, score in record["scores"].items(): assert abs(found[kind] - score) <= .015, kind


def test_labels_are_the_answers_and_nothing_else(task):
    rows = take(task.load_data()["train"], range(8))
    batch, words = task.collate(rows), task.processor.tokenizer
    for labels, row in zip(batch["labels"], rows):
        assert words.decode(labels[labels >= 0]).split() == [word for _, answer in row["turns"] for word in (answer, "<end>")]
    assert (batch["input_ids"] == 3).sum(1).tolist() == [16] * 8


def test_adapters_sit_in_the_language_model_alone(task, model):
    names = task.targets(model)
    assert len(names) == 28 and all(".language_model.layers." in name for name in names)
    assert lora_budget(model, names, 8) == 69632


def test_a_picture_alone_changes_the_answer(task, model):
    batch = task.collate(take(task.load_data()["train"], range(4)))
    other = dict(batch, pixel_values=batch["pixel_values"].flip(0))
    with torch.no_grad(): assert (task.loss(model, batch) - task.loss(model, other)).abs() > 1e-4


def test_bad_pictures_and_questions(task, model, tmp_path):
    good = tmp_path/"scene.png"
    Image.new("RGB", (32, 32), "red").save(good)
    assert len(task.predict_image(model, good, ["what colour is the circle"])) == 1
    (tmp_path/"cut.png").write_bytes(good.read_bytes()[:50])
    (tmp_path/"text.png").write_text("no picture")
    Image.new("RGB", (1, 1)).save(tmp_path/"dot.png")
    for name, says in (("cut.png", "damaged"), ("text.png", "no image"), ("dot.png", "1 x 1")):
        with pytest.raises(ValueError, match=says): task.predict_image(model, tmp_path/name, ["what colour is the circle"])
    Image.new("CMYK", (40, 40)).save(tmp_path/"ink.jpg")
    Image.new("RGB", (20000, 700)).save(tmp_path/"wide.png")
    Image.new("RGB", (32, 32)).save(tmp_path/"moving.gif", save_all=True, append_images=[Image.new("RGB", (32, 32), "blue")])
    for name in ("ink.jpg", "wide.png", "moving.gif"): task.predict_image(model, tmp_path/name, ["what colour is the circle"])
    with pytest.raises(ValueError, match="2 pictures"): task.predict_image(model, [good, good], ["what colour is the circle"])
    with pytest.raises(ValueError, match="image token"): task.predict_image(model, good, ["<image> what colour is the circle"])
    with pytest.raises(ValueError, match="empty"): task.predict_image(model, good, [" "])


def test_training_learns(tmp_path):
    found = train_run(settings("vision_language", train_size=64, test_size=8, max_steps=4, batch_size=16), tmp_path/"run", progress=False)
    assert found["adapter"] == 69632 and set(found["test"]) >= {"exact_match", "present", *(kind.replace(" ", "_") for kind in KINDS)}
    task, model = VisionLanguageTask.from_run(tmp_path/"run")
    assert evaluate(task, model, task.load_data()["test"], progress=False)["exact_match"] == pytest.approx(found["test"]["exact_match"], abs=1e-9)


@pytest.mark.parametrize("method", ["stan", "lora"])
def test_the_paper_section_with_nothing_but_paths_and_steps_changed(method, tmp_path, capsys):
    rows = []
    for number in range(40):
        colour = ("red", "blue")[number % 2]
        Image.new("RGB", (48, 32), colour).save(tmp_path/f"{number}.png")
        rows += [dict(image=f"{number}.png", question="what colour is there", answer=colour), dict(image=f"{number}.png", question="is there red", answers=["yes", "yes", "no"])]
    (tmp_path/"questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    place = str(shipped("models/tiny-llava"))
    wanted = settings("vision_language", "paper", backbone=place, data=str(tmp_path), max_steps=2, method=method)
    found = train_run(wanted, tmp_path/"run", progress=False)
    assert found["metric"] == "vqa_accuracy" and found["head"] > 0
    assert "GiB of memory" in capsys.readouterr().err


def test_four_bits_without_bitsandbytes(task):
    with pytest.raises(ValueError, match="bitsandbytes"): VisionLanguageTask(settings("vision_language", **{"opt.four_bit": True})).build_model()


