// The feature browser: a table of all latents to search and to sort, and the page of one of them. It stands behind feature.js, whose `render` draws that page.
// Data in the page: #list (layers, columns, rows: [layer, latent, share, highest |value|, effect, norm, words]), #chunk-0 ... (gzip, base64): pages of `size` latents each.

const list = JSON.parse(document.getElementById("list").textContent), chunks = new Map(), SHOWN = 200;
const ORDER = [0, 1, 6, 2, 3, 4, 5];                          // how the columns stand: what a reader looks for comes first
const found = { query: "", layer: "", column: list.start, down: true, shown: SHOWN };
const rows = list.rows.map((row, i) => ({ i, row, text: `${list.layers[row[0]]} ${row[1]} ${row[6]}`.toLowerCase() }));
const parts = list.layers.map((layer) => layer.split(".")), shared = list.layers.length < 2 ? 0 : parts[0].findIndex((part, i) => parts.some((other) => other[i] !== part || i >= other.length - 1));
const brief = parts.map((part) => part.slice(Math.max(0, shared)).join("."));             // without the beginning that all layers share
const address = (layer, latent) => `#${encodeURIComponent(layer)}/${latent}`;
const byAddress = new Map(rows.map(({ i, row }) => [address(list.layers[row[0]], row[1]), i]));

async function pageOf(i) {
  const n = Math.floor(i / list.size);
  if (!chunks.has(n)) {
    const bytes = Uint8Array.from(atob(document.getElementById(`chunk-${n}`).textContent), (c) => c.charCodeAt(0));
    chunks.set(n, new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json());
  }
  return (await chunks.get(n))[i % list.size];
}

function matching() {
  const words = found.query.toLowerCase().split(/\s+/).filter(Boolean), c = found.column;
  const hits = rows.filter(({ row, text }) => (found.layer === "" || row[0] === Number(found.layer)) && words.every((word) => text.includes(word)));
  const size = list.columns[c].by === "size" ? Math.abs : (value) => value;
  const key = ({ row }) => (row[c] === null ? null : size(row[c]));
  return hits.sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === null || y === null) return (x === null) - (y === null) || a.i - b.i;
    const order = typeof x === "string" ? x.localeCompare(y) : x - y;
    return (found.down ? -order : order) || a.i - b.i;
  });
}

const app = document.getElementById("app"), tools = draw(app, "div", { class: "tools" });
const search = draw(tools, "input", { type: "search", placeholder: "search words, layers, numbers", "aria-label": "search latents" });
const layers = draw(tools, "select", { "aria-label": "layer" });
draw(layers, "option", { value: "" }, `all ${list.layers.length} layers`);
list.layers.forEach((layer, i) => draw(layers, "option", { value: i }, layer));
const count = draw(tools, "output", { "aria-live": "polite" }), both = draw(app, "div", { class: "both" });
const side = draw(both, "div", { class: "side", tabindex: 0, "aria-label": "latents", role: "region" }), table = draw(side, "table", { class: "latents" }), head = draw(draw(table, "thead"), "tr"), body = draw(table, "tbody");
const more = draw(side, "button", { type: "button" }, "show more"), panel = draw(both, "div", { class: "panel" });
const heads = ORDER.map((c) => {
  const column = list.columns[c], th = draw(head, "th", { scope: "col" }), button = draw(th, "button", { type: "button", title: column.about }, column.name);
  button.addEventListener("click", () => { if (found.column === c) found.down = !found.down; else [found.column, found.down] = [c, column.by !== "word"]; fill(); });
  return th;
});

function fill() {
  const hits = matching();
  count.textContent = `${hits.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} latents`;
  heads.forEach((th, place) => { if (ORDER[place] === found.column) th.setAttribute("aria-sort", found.down ? "descending" : "ascending"); else th.removeAttribute("aria-sort"); });
  body.replaceChildren();
  for (const { i, row } of hits.slice(0, found.shown)) {
    const tr = draw(body, "tr", { "data-i": i });
    for (const c of ORDER) {
      const value = row[c], td = draw(tr, "td", { class: c === 6 ? "words" : list.columns[c].by === "word" ? "" : "n", title: c === 6 ? value : c === 0 ? list.layers[value] : "" });
      if (c === 1) draw(td, "a", { href: address(list.layers[row[0]], row[1]) }, value);
      else td.textContent = c === 0 ? brief[value] : c === 2 ? `${(100 * value).toPrecision(2)}%` : typeof value === "string" ? value : number(value);
    }
    tr.addEventListener("click", () => { location.hash = address(list.layers[row[0]], row[1]); });
  }
  more.hidden = hits.length <= found.shown;
  mark();
}

function mark() { for (const tr of body.children) tr.classList.toggle("on", tr.dataset.i === panel.dataset.i); }

async function go() {
  const first = matching()[0] || rows[0], hash = location.hash.length > 1 ? location.hash : address(list.layers[first.row[0]], first.row[1]), i = byAddress.get(hash);
  panel.dataset.i = i ?? "";
  mark();
  if (i === undefined) { panel.textContent = `There is no latent at ${hash}.`; return; }
  if (typeof DecompressionStream === "undefined") { panel.textContent = "This browser cannot unpack the pages (DecompressionStream, in all browsers since 2023)."; return; }
  const page = await pageOf(i);
  if (panel.dataset.i !== String(i)) return;                 // another one was chosen meanwhile
  const state = { pages: [page], at: 0, open: address };
  panel.replaceChildren();
  render({ model: { get: (name) => state[name], on() {} }, el: panel });
  document.title = `latent ${page.latent} of ${page.layer}`;
}

search.addEventListener("input", () => { [found.query, found.shown] = [search.value, SHOWN]; fill(); });
layers.addEventListener("change", () => { [found.layer, found.shown] = [layers.value, SHOWN]; fill(); });
more.addEventListener("click", () => { found.shown += SHOWN; fill(); });
addEventListener("hashchange", go);
fill();
go();
