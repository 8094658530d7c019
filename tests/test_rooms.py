"An arrow only ever points to a smaller number: no module and no demo cell imports from a room above its own."
import ast, re

import pytest

from course import cells, notebooks, number, source

LAZY = {("topk", "kernels")}     # the one exception: topk's op loads the kernels by name at first use


def rooms(paths):
    "module name -> room number, read from the `default_exp` directives."
    found = {}
    for p in paths:
        for c in cells(p, "code"):
            m = re.search(r"^#\|\s*default_exp\s+(\w+)", source(c), re.M)
            if m: found[m.group(1)] = number(p)
    return found


def imported(code):
    "The modules of ours that `code` imports, notebook magics ignored."
    code = "\n".join(re.sub(r"^(\s*)[%!].*$", r"\1pass", line) for line in code.splitlines())
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import): names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level: names |= {f"stan_nb.{node.module}"} if node.module else {f"stan_nb.{a.name}" for a in node.names}
            elif node.module == "stan_nb": names |= {f"stan_nb.{a.name}" for a in node.names}
            elif node.module: names.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant): names.add(node.args[0].value)
    return {n.split(".")[1] for n in names if isinstance(n, str) and n.startswith("stan_nb.")}


def wrong_arrows(paths):
    "Every import that points up, or from one modality (30-35) to another."
    where, wrong = rooms(paths), []
    for p in paths:
        own = next((m for m, n in where.items() if n == number(p)), p.stem)
        for c in cells(p, "code"):
            for target in imported(source(c)) & set(where):
                sideways = 30 <= number(p) < 36 and 30 <= where[target] < 36 and target != own
                if (where[target] > number(p) or sideways) and (own, target) not in LAZY:
                    wrong.append(f"{p.name} cell {c['id']} ({number(p)}) imports stan_nb.{target} ({where[target]})")
    return wrong


def test_arrows_point_down(): assert wrong_arrows(notebooks()) == []


def test_rooms_have_distinct_numbers():
    where = rooms(notebooks())
    assert len(where) == len(set(where.values())) and len(where) >= 12


@pytest.mark.parametrize("statement", ["from stan_nb.beta import b", "import stan_nb.beta as s", "from stan_nb import beta", "from .beta import b",
                                       "%time\ndef f():\n    from stan_nb.beta import b", "import importlib; importlib.import_module('stan_nb.beta')"])
@pytest.mark.parametrize("directive", ["#| exports\n", ""])
def test_the_test_sees_a_broken_arrow(tmp_path, statement, directive):
    import json
    def book(name, *codes):
        body = [dict(cell_type="code", id=f"c{i}", source=s) for i, s in enumerate(codes)]
        (tmp_path / name).write_text(json.dumps(dict(cells=body)))
        return tmp_path / name
    low, high = book("10_alpha.ipynb", "#| default_exp alpha", directive + statement), book("20_beta.ipynb", "#| default_exp beta")
    assert wrong_arrows([low, high]) == ["10_alpha.ipynb cell c1 (10) imports stan_nb.beta (20)"]
    assert wrong_arrows([book("10_alpha.ipynb", "#| default_exp alpha"), book("20_beta.ipynb", "#| default_exp beta", "from stan_nb.alpha import a")]) == []
