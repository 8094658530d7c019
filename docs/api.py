"The reference: a page for every module, from its signatures and the comments beside the parameters (docments)."
import dataclasses, functools, importlib, inspect, json, re, tomllib, typing
from pathlib import Path

from fastcore.docments import docments

ROOT = Path(__file__).resolve().parent.parent
MODULES = [re.sub(r"^\d\d_", "", p.stem) for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")) if (ROOT / "stan_nb" / f"{re.sub('^[0-9]{2}_', '', p.stem)}.py").exists()]

PARENTS = {"PeftConfig": "https://huggingface.co/docs/peft/package_reference/config#peft.PeftConfig"} # where the fields of others are explained


def kind(annotation):
    "A type as text; empty if there is none."
    if annotation in (inspect.Parameter.empty, None): return ""
    if typing.get_origin(annotation): return str(annotation).replace("typing.", "")
    return getattr(annotation, "__name__", str(annotation))


def cell(text): return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def inherited(obj):
    "The fields that a dataclass has from classes that are not ours, and the nearest of these classes; (), None for anything else."
    if not (inspect.isclass(obj) and dataclasses.is_dataclass(obj)): return (), None
    others = [cls for cls in obj.__mro__[1:] if dataclasses.is_dataclass(cls) and not cls.__module__.startswith("stan_nb")]
    own = {name for cls in obj.__mro__ if cls.__module__.startswith("stan_nb") for name in vars(cls).get("__annotations__", {})}
    return tuple(f.name for f in dataclasses.fields(obj) if f.name not in own), others[0] if others else None


def also(obj):
    "One line about inherited fields, with a link to where they are explained."
    fields, parent = inherited(obj)
    name = parent and (f"[{parent.__name__}]({PARENTS[parent.__name__]})" if parent.__name__ in PARENTS else f"`{parent.__name__}`")
    return f"And the fields of {name}: {', '.join(f'`{field}`' for field in fields)}." if fields else ""


def parameters(obj):
    "A table of the parameters and the return value; empty where neither says anything. What a class has from others is left to `also`."
    found, others = docments(obj, full=True, returns=True), inherited(obj)[0]
    rows = []
    for name, p in signature(obj).parameters.items():
        if name in ("self", "cls") or name not in found or name in others: continue
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        said = found[name]["docment"] or stars and starred(obj, name)
        rows.append((f"`{stars}{name}`", kind(p.annotation), f"`{inline(default(p))}`" if default(p) else "", said))
    back = found.get("return") or {}
    if back.get("docment") or kind(back.get("anno")): rows.append(("**returns**", kind(back.get("anno")), "", back.get("docment")))
    if not any(row[-1] for row in rows): return ""
    lines = [f"| {' | '.join([name, cell(type_), default, cell(said or '')])} |" for name, type_, default, said in rows]
    return "\n".join(["| parameter | type | default | meaning |", "| --- | --- | --- | --- |", *lines])


def starred(obj, name):
    "The comment beside `*name` or `**name`, which docments does not read."
    found = re.search(rf"\*{name},?\s*# *(.+)", inspect.getsource(getattr(obj, "__init__", obj) if inspect.isclass(obj) else obj))
    return found[1] if found else ""


def short(value):
    "A value in at most 60 characters, the same in every process."
    if inspect.isfunction(value) or inspect.isclass(value): return value.__name__
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def default(p):
    "The default of a parameter as text, empty if there is none; of a field made anew for each object, what is made."
    if p.default is p.empty: return ""
    made = repr(p.default) == "<factory>"
    return short((typing.get_origin(p.annotation) or p.annotation)()) if made else short(p.default)


def inline(text): return " ".join(text.split()).replace("|", "\\|")     # between backticks, where nothing else is escaped


def signature(obj):
    try: return inspect.signature(obj)
    except (ValueError, TypeError): return inspect.Signature()


def call(name, obj, method=False):
    "`name(a, b=1, **more)`, without types: they stand in the table."
    shown = []
    others = inherited(obj)[0]
    for p in signature(obj).parameters.values():
        if p.name in ("self", "cls") and method or p.name in others: continue
        text = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        if default(p): text += f"={default(p)}"
        if p.kind == p.KEYWORD_ONLY and not any(s.startswith("*") for s in shown): shown.append("*")
        shown.append(text)
    return f"{name}({', '.join(shown + ['**others'] * bool(others))})"


def links(obj, repository, lesson, anchor):
    "To the line on GitHub, and to the place in the lesson."
    try: line = inspect.getsourcelines(inspect.unwrap(obj))[1]
    except (OSError, TypeError): line = 0
    file = Path(inspect.getsourcefile(inspect.unwrap(obj)) or "").name if line else ""
    found = [f"[source]({repository}/blob/main/stan_nb/{file}#L{line})"] if line else []
    if lesson: found.append(f"[lesson]({lesson}{f'#{anchor}' if anchor else ''})")
    return " · ".join(found)


def doc(obj):
    "The docstring as Markdown that cannot be taken for anything else."
    text = inspect.getdoc(obj) or ""
    return re.sub(r"(?<!`)(\*\*?\w+|[_*<\[\]|])(?![^`]*`(?:[^`]*`[^`]*`)*[^`]*$)", lambda m: m[0].replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;").replace("[", "\\[").replace("|", "\\|"), text)


def fenced(directive, argument, body, depth):
    fence = ":" * depth
    return f"{fence}{{{directive}}} {argument}\n\n{body.strip()}\n{fence}"


def methods(cls):
    "Public methods and properties that the class itself defines (fastcore's `patch` counts) and documents: (name, kind, function)."
    for name, value in vars(cls).items():
        inner = value.fget if isinstance(value, property) else getattr(value, "__func__", getattr(value, "f", value))     # `f`: fastcore's class methods
        if name.startswith("_") or not inspect.isfunction(inner) or not inspect.getdoc(inner): continue
        yield name, "property" if isinstance(value, property) else "method" if value is inner else "classmethod", inner


@functools.cache
def names(module):
    "What the reference of a module holds: its public names, and the public methods of its classes as `Class.method`."
    found = importlib.import_module(f"stan_nb.{module}")
    inside = [f"{name}.{own}" for name in found.__all__ if inspect.isclass(getattr(found, name)) for own, *_ in methods(getattr(found, name))]
    return [*found.__all__, *inside]


def entry(module, name, obj, repository, lesson, anchor):
    "One name of a module."
    if not (inspect.isclass(obj) or callable(obj)): return fenced("py:data", f"{name}\n:value: {json.dumps(short(obj), ensure_ascii=False)}", f"[lesson]({lesson}{f'#{anchor}' if anchor else ''})" if lesson else "", 3)
    body = "\n\n".join(filter(None, [doc(obj), parameters(obj), also(obj), links(obj, repository, lesson, anchor)]))
    if not inspect.isclass(obj): return fenced("py:function", call(name, obj), body, 3)
    inside = []
    for own, sort, inner in methods(obj):
        text = "\n\n".join(filter(None, [doc(inner), parameters(inner), links(inner, repository, None, None)]))
        if sort == "property": inside.append(fenced("py:property", own, text, 3))
        else: inside.append(fenced("py:method", call(own, inner, True) + "\n:classmethod:" * (sort == "classmethod"), text, 3))
    return fenced("py:class", call(name, obj, True), "\n\n".join([body, *inside]), 4)


def page(name, place):
    "The reference page of a module, as MyST Markdown. `place`: the lesson's page and {name: anchor}."
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    module, (lesson, anchors) = importlib.import_module(f"stan_nb.{name}"), place
    about = (module.__doc__ or "").strip().splitlines()[0]
    parts = [f"# `stan_nb.{name}`", about, f"Explained in [its lesson]({lesson})." if lesson else "", f"```{{py:module}} stan_nb.{name}\n```"]
    for symbol in module.__all__: parts.append(entry(module, symbol, getattr(module, symbol), repository, lesson, anchors.get(symbol, "")))
    return "\n\n".join(filter(None, parts)) + "\n"
