"Settings: what is no lesson, above all files with mistakes in them."
import json, math, subprocess, sys

import pytest
from hypothesis import given, strategies as st

from course import ROOT
from stan_nb import settings as room
from stan_nb.settings import Settings, Table, describe, in_range, sections, settings, settings_file, task_names


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "mine.ini"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path
    return write


def test_the_first_line_says_what_the_file_is():
    first = (ROOT / "settings.ini").read_text().splitlines()[0]
    assert first.startswith("# stan_nb settings") and "pyproject.toml" in first


def test_every_shipped_section_is_valid():
    assert {"toy.embedded", "text.embedded", "text.colab", "text.paper"} <= set(sections())
    for name in sections(): assert f"{settings(*name.split('.')).modality}.{settings(*name.split('.')).scale}" == name


def test_tasks_are_those_that_their_modules_know():
    from stan_nb import math_code_data, text_data
    assert set(task_names("text")) == set(text_data.KINDS) and set(task_names("math_code")) == {*math_code_data.EMBEDDED, *math_code_data.HUB}
    for name in sections():
        modality, scale = name.split(".")
        assert settings(modality, scale).task in ("", *task_names(modality)), name


def test_a_task_nobody_knows_is_refused_unless_there_is_data(write):
    path = write("[text.mine]\ntasks = one, two\n[text.other]\n[toy.mine]\n")
    assert task_names("text", path) == ["one", "two"] and task_names("toy", path) == []
    assert settings("toy", "mine", file=path, task="any").task == "any" and settings("text", "other", file=path, task="x", data="folder").task == "x"
    with pytest.raises(ValueError, match="task = 'tow' is not known: allowed is one of one, two, or give data. Did you mean 'two'"): settings("text", "other", file=path, task="tow")


def test_the_installed_file_comes_first(tmp_path, monkeypatch):
    package = tmp_path / "site" / "stan_nb"
    package.mkdir(parents=True)
    monkeypatch.setattr(room, "files", lambda name: package)
    with pytest.raises(FileNotFoundError, match="install stan_nb again"): settings_file()
    (package.parent / "settings.ini").write_text("[toy.clone]\n")
    assert settings_file().parent == package.parent
    (package / "settings.ini").write_text("[toy.wheel]\n")
    assert sections() == ["toy.wheel"]


@pytest.mark.parametrize("text, says", [
    ("[text.mine]\nlearning_rate = 1", r"\[text.mine\]: learning_rate is no setting"),
    ("[text.mine]\nLR = 1", "LR is no setting. Did you mean"),
    ("[text.mine]\nlr = fast", r"\[text.mine\]: lr = 'fast' is not a number"),
    ("[text.mine]\nlr = nan", "lr = nan is out of range"),
    ("[text.mine]\nlr = inf", "lr = inf is out of range"),
    ("[text.mine]\nrank = 1.5", "rank = '1.5' is not a whole number"),
    ("[text.mine]\nencoder_bias = maybe", "encoder_bias = 'maybe' is not true or false"),
    ("[text.mine]\nlr = 1\nlr = 2", "option 'lr' in section 'text.mine' already exists"),
    ("[text.mine]\n[text.mine]", "section 'text.mine' already exists"),
    ("lr = 1", "no section headers"),
    (b"[text.mine]\nlr = \xff", "codec can't decode"),
    ("[text.mine]\nopt.noise = 1e999", "opt.noise = inf is out of range"),
    ("[text.other]", r"no section \[text.mine\]. Did you mean 'text.other'"),
    ("", r"no section \[text.mine\]"),
])
def test_a_file_with_a_mistake(write, text, says):
    with pytest.raises(ValueError, match=says) as caught: settings("text", "mine", file=write(text))
    assert "\n" not in str(caught.value)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.ini does not exist"): sections(tmp_path / "nowhere.ini")


def test_options_of_a_section(write):
    path = write("[toy.mine]\nopt.noise = 0.1\nopt.sizes = (1, 2)\nopt.colour = red\nopt.extra = None\nbackbone = 100% ; ${x}\n")
    found = settings("toy", "mine", file=path)
    assert found.options == dict(noise=.1, sizes=[1, 2], colour="red", extra=None) and found.backbone == "100% ; ${x}"
    changed = settings("toy", "mine", file=path, **{"opt.noise": 1, "opt.sizes": "[3]", "opt.colour": "7", "opt.extra": "2"})
    assert changed.options == dict(noise=1., sizes=[3], colour="7", extra=2)
    with pytest.raises(ValueError, match="opt.nois is not known: allowed is opt.noise, opt.sizes"): found.replace(**{"opt.nois": 1})
    with pytest.raises(ValueError, match="allowed is opt.last_layers"): settings("text", **{"opt.nose": 1})
    with pytest.raises(ValueError, match="no option in this section"): settings("toy", **{"opt.noise": 1})
    with pytest.raises(TypeError, match="opt.noise"): found.replace(**{"opt.noise": "loud"})


def test_settings_cannot_be_changed_from_outside():
    options = dict(sizes=[1])
    found = Settings("toy", "embedded", options=options)
    options["sizes"].append(2)
    found.to_dict()["options"]["sizes"].append(3)
    assert found.options == dict(sizes=[1])
    with pytest.raises(AttributeError): found.lr = 1.


@pytest.mark.parametrize("values, error", [
    (dict(options=[1]), TypeError), (dict(options={1: 2}), TypeError), (dict(options=dict(a=object())), TypeError), (dict(options=dict(a=[math.nan])), ValueError),
    (dict(rank=0), ValueError), (dict(rank=2.), TypeError), (dict(seed=-1), ValueError), (dict(seed=2**32), ValueError), (dict(task=None), TypeError),
    (dict(encoder_bias=1), TypeError), (dict(scaling=0), ValueError), (dict(warmup=1.01), ValueError), (dict(precision="fp8"), ValueError),
])
def test_impossible_values(values, error):
    with pytest.raises(error, match=next(iter(values)) if "options" not in values else "opt"): Settings("toy", "embedded", **values)


@given(lr=st.floats(1e-9, 1e3), rank=st.integers(1, 10**6), seed=st.integers(0, 2**32 - 1), dropout=st.floats(0, 1, exclude_max=True), bias=st.booleans())
def test_there_and_back_as_json_and_as_text(lr, rank, seed, dropout, bias):
    found = settings("text", lr=lr, rank=rank, seed=seed, dropout=dropout, encoder_bias=bias)
    assert Settings.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert settings("text", lr=str(lr), rank=str(rank), seed=str(seed), dropout=str(dropout), encoder_bias=str(bias)) == found


@given(st.floats(), st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_intervals(value, low, width):
    inside = low <= value <= low + width
    assert in_range(value, f"[{low!r}, {low + width!r}]") == inside
    assert in_range(value, f"({low!r}, {low + width!r})") == (inside and value not in (low, low + width))


def test_the_table_describes_every_setting():
    names = [row["setting"] for row in describe()]
    assert {"lr", "rank", "options"} <= set(names) and len(names) == len(set(names))
    assert all(row["meaning"] for row in describe())
    assert str(Table()) == "no rows" and Table()._repr_markdown_().startswith("| no rows |")


def test_settings_import_nothing_heavy():
    code = "import sys, stan_nb.settings; print([m for m in ('torch', 'numpy', 'transformers', 'matplotlib', 'IPython') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
