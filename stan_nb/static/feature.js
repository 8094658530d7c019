// The page of one latent, as readers of dictionaries know it: how often and how strongly it fires, what it writes, what depends on it, and examples.
// State: pages (objects as `stan_nb.explorers.features` makes them), at (which of them). In the feature browser also `open`: a function (layer, latent) -> address of its page.

const SOFT = "opacity:.75;font-size:12.5px", HEAD = "font-weight:600;font-size:13px;margin:.7rem 0 .2rem";

function number(value) { return value === null || value === undefined ? "–" : Math.abs(value) >= 1000 || (value && Math.abs(value) < 0.001) ? value.toExponential(1) : String(Number(value.toPrecision(3))); }

// Values by place: positions of a picture in rows, or any other sequence without words.
function places(parent, example, most) {
  const { side, values, at } = example, wide = side || Math.min(values.length, 32), size = Math.max(4, Math.min(14, 84 / wide)), rows = Math.ceil(values.length / wide);
  const svg = draw(parent, "svg", { viewBox: `-1 -1 ${wide * size + 2} ${rows * size + 2}`, width: wide * size + 2, height: rows * size + 2, role: "img", "aria-label": `strength at ${values.length} places, strongest at place ${at}` });
  values.forEach((value, i) => draw(svg, "rect", { x: (i % wide) * size, y: Math.floor(i / wide) * size, width: size, height: size, fill: value > 0 ? POSITIVE : value < 0 ? NEGATIVE : "none",
    "fill-opacity": value ? 0.15 + 0.85 * Math.min(1, Math.abs(value) / most) : 0, stroke: i === at ? "currentColor" : INK, "stroke-opacity": i === at ? 1 : 0.25, "stroke-width": i === at ? 1.6 : 0.5 }));
}

function example(parent, found, most) {
  const line = draw(parent, "div", { style: "display:flex;gap:.7rem;align-items:flex-start;padding:.15rem 0;border-top:1px solid rgba(118,118,118,.22)" });
  draw(line, "span", { style: "flex:0 0 3.4rem;text-align:right;font-variant-numeric:tabular-nums;font-size:13px;line-height:1.9" }, number(found.value));
  const text = draw(line, "div", { style: "line-height:1.9;overflow-wrap:anywhere;white-space:pre-wrap;min-width:0" });
  if (found.words) {
    found.words.forEach((word, i) => draw(text, "span", { title: found.values[i] ? number(found.values[i]) : "", style: `border-radius:3px;padding:1px 0;${shade(found.values[i], most)}${i === found.at ? ";font-weight:700" : ""}` }, word.replace(/\n/g, "⏎")));
  } else {
    draw(text, "div", {}, found.label);
    if (found.values.length > 1) places(text, found, most);
  }
}

function histogram(parent, page) {
  const svg = draw(parent, "svg", { viewBox: "0 0 300 108", role: "img", style: "max-width:100%;height:auto;display:block", "aria-label": `values from ${number(page.low)} to ${number(page.high)}; counts on a logarithmic scale: ${page.histogram.join(", ")}` });
  const most = Math.log1p(Math.max(...page.histogram)), width = 300 / page.histogram.length, step = (page.high - page.low) / page.histogram.length;
  page.histogram.forEach((count, i) => {
    const height = (86 * Math.log1p(count)) / (most || 1), bar = draw(svg, "rect", { x: i * width + 0.7, y: 88 - height, width: width - 1.4, height, fill: page.low + step * (i + 0.5) >= 0 ? POSITIVE : NEGATIVE });
    draw(bar, "title", {}, `${count} from ${number(page.low + step * i)} to ${number(page.low + step * (i + 1))}`);
  });
  draw(svg, "line", { x1: 0, x2: 300, y1: 88, y2: 88, stroke: INK });
  for (const [x, value, anchor] of [[0, page.low, "start"], [300, page.high, "end"]]) draw(svg, "text", { x, y: 103, "text-anchor": anchor, "font-size": 12, fill: "currentColor" }, number(value));
  if (page.low < 0 && page.high > 0) {
    const x = (-300 * page.low) / (page.high - page.low);
    if (x > 40 && x < 260) draw(svg, "text", { x, y: 103, "text-anchor": "middle", "font-size": 12, fill: "currentColor" }, "0");
  }
}

function words(parent, title, rows, colour, most) {
  const side = draw(parent, "div", { style: "flex:1 1 8rem;min-width:0" });
  draw(side, "div", { style: SOFT }, title);
  for (const [word, effect] of rows) {
    const line = draw(side, "div", { style: "display:flex;gap:.5rem;align-items:center;font-size:13px" });
    draw(line, "span", { style: "flex:0 0 3rem;text-align:right;font-variant-numeric:tabular-nums" }, number(effect));
    draw(line, "span", { style: `flex:0 0 ${Math.max(2, (36 * Math.abs(effect)) / most)}px;height:.6rem;background:${colour};border-radius:2px` });
    draw(line, "span", { style: "white-space:pre;overflow:hidden;text-overflow:ellipsis" }, word);
  }
}

function facts(root, page) {
  const list = draw(root, "div", { style: "display:flex;flex-wrap:wrap;gap:.1rem 1.4rem;font-variant-numeric:tabular-nums;font-size:13.5px" });
  const share = page.fired / page.tokens;
  const said = [["fires on", `${(100 * share).toPrecision(3)}% of ${page.tokens.toLocaleString("en")} ${page.unit}`], ["values", page.fired ? `${number(page.low)} to ${number(page.high)}` : "none"], ["length of what it writes", number(page.norm)]];
  if (page.effect !== null) said.push(["loss without it (estimate)", `${page.effect >= 0 ? "+" : ""}${number(page.effect)}`]);
  for (const [name, value] of said) draw(draw(list, "span", {}, `${name} `), "strong", { style: "font-weight:600" }, value);
}

function show(root, page, open) {
  draw(root, "div", { style: "font-weight:700;font-size:16px;overflow-wrap:anywhere", "data-title": "" }, `latent ${page.latent} of ${page.layer}`);
  facts(root, page);
  if (!page.fired) { draw(root, "p", {}, "It never fired on this data: a dead latent, here at least."); return; }
  const both = draw(root, "div", { style: "display:flex;flex-wrap:wrap;gap:0 2rem" });
  const left = draw(both, "div", { style: "flex:1 1 16rem;min-width:0;max-width:22rem" }), right = draw(both, "div", { style: "flex:3 1 20rem;min-width:0" });
  draw(left, "div", { style: HEAD }, "How strong, how often (log scale)");
  histogram(left, page);
  draw(left, "div", { style: HEAD }, "What it says directly");
  if (page.raises) {
    const logits = draw(left, "div", { style: "display:flex;flex-wrap:wrap;gap:.2rem 1rem" }), most = Math.max(...[...page.raises, ...page.lowers].map(([, effect]) => Math.abs(effect))) || 1;
    words(logits, "raises the logit of", page.raises, POSITIVE, most);
    words(logits, "lowers the logit of", page.lowers, NEGATIVE, most);
  } else draw(left, "div", { style: SOFT }, page.why);
  if (page.near.length) {
    draw(left, "div", { style: HEAD }, "Writes nearly the same (cosine)");
    const line = draw(left, "div", { style: "display:flex;flex-wrap:wrap;gap:.1rem .9rem;font-size:13px" });
    for (const [latent, cosine] of page.near) draw(line, open ? "a" : "span", open ? { href: open(page.layer, latent) } : {}, `${latent} (${cosine.toFixed(2)})`);
  }
  const most = Math.max(Math.abs(page.low), Math.abs(page.high)) || 1;
  for (const [title, found] of [["Strongest", page.top], ["Most negative", page.bottom]]) {
    if (!found.length) continue;
    draw(right, "div", { style: HEAD }, title);
    for (const one of found) example(right, one, most);
  }
  draw(right, "div", { style: HEAD }, "Through its range: examples at random from each part");
  for (const part of page.ranges) {
    draw(right, "div", { style: `${SOFT};margin-top:.3rem` }, `${number(part.low)} to ${number(part.high)}: ${(100 * part.share).toPrecision(2)}% of the times it fires`);
    for (const one of part.examples) example(right, one, most);
  }
}

function render({ model, el }) {
  const root = frame(el);
  if (model.get("pages").length > 1) {
    const picker = draw(draw(row(root), "label", {}, "latent "), "select", { style: "font:inherit" });
    model.get("pages").forEach((page, i) => draw(picker, "option", { value: i }, page.latent));
    picker.addEventListener("change", () => put(model, "at", Number(picker.value)));
    model.on("change:at", () => { picker.value = model.get("at"); });
    picker.value = model.get("at");
  }
  root.style.maxWidth = "64rem";
  const body = draw(root, "div", { "aria-live": "polite" });
  follow(model, ["pages", "at"], () => { body.replaceChildren(); show(body, model.get("pages")[model.get("at")], model.get("open")); });
}

export default { render };
