// The moving pictures of a page without Python: what anywidget is in a notebook. Each picture brings its own module and its state.
class Model {
  constructor(state) { this.state = state; this.listeners = {}; this.changed = new Set(); }
  get(name) { return this.state[name]; }
  set(name, value) {
    if (this.state[name] === value) return;
    this.state[name] = value;
    this.changed.add(name);
    this.tell(`change:${name}`);
  }
  on(event, call) { (this.listeners[event] ??= new Set()).add(call); }
  off(event, call) { if (call) this.listeners[event]?.delete(call); else delete this.listeners[event]; }
  tell(event) { for (const call of this.listeners[event] ?? []) call(); }
  save_changes() { if (this.changed.size) { this.changed.clear(); this.tell("change"); } }
}

for (const place of document.querySelectorAll(".live")) {
  const state = JSON.parse(place.querySelector("script").textContent), el = document.createElement("div");
  try {
    const picture = (await import(new URL(place.dataset.module, document.baseURI))).default;
    picture.render({ model: new Model(state), el });
    place.querySelector("img").replaceWith(el);
    place.classList.add("moving");
  } catch (error) { console.error(error); }      // the still picture stays
}
