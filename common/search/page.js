// The page of `embed_search.py serve`. A text of the index is only ever set as text: nothing in it
// becomes markup. What is shown is in the address, so that "back" leads to what was shown before.
"use strict";

const get = (id) => document.getElementById(id);
const LONG = 600, EXCERPT = 400, BEFORE = 80; // characters: shown whole up to the first, else a part
const WIDTH = 1000, HEIGHT = 600, EDGE = 20, NEAR = 16; // of the map, in its own units
// the marker of each cluster: colours are not all that tells them apart
const MARKERS = [
  "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0 -12 0", "M-5.5 -5.5h11v11h-11z",
  "M0 -7L7 5.5H-7z", "M0 -8L6.5 0L0 8L-6.5 0z",
  "M-2.2 -7h4.4v4.8h4.8v4.4h-4.8v4.8h-4.4v-4.8h-4.8v-4.4h4.8z", "M0 7L7 -5.5H-7z",
  "M-7 -4l3 -3l4 4l4 -4l3 3l-4 4l4 4l-3 3l-4 -4l-4 4l-3 -3l4 -4z", "M-7 -3.5h14v7h-14z",
];

let shown = null; // {path, parameters} of the texts that are shown
let asking = new AbortController(); // of the question whose answer is awaited

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function drawn(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

const short = (text, length) => (text.length > length ? text.slice(0, length - 3) + "..." : text);
const many = (count, unit) => `${count.toLocaleString("en")} ${count === 1 ? unit.replace(/s$/, "") : unit}`;

async function ask(path, parameters, signal) {
  const answer = await fetch(`${path}?${new URLSearchParams(parameters)}`, { signal });
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

function tell(status, problem = "") {
  get("status").textContent = status;
  get("problem").textContent = problem;
}

// Texts that were found ----------------------------------------------------------------------------

// returns the part of a text to show first, of whole words: from its beginning, or where most marks are
function excerpt(characters, marks) {
  const length = characters.length;
  if (length <= LONG) return [0, length];
  let best = 0, most = marks.filter(([, end]) => end <= EXCERPT).length;
  for (const [start] of marks) {
    const from = Math.max(0, start - BEFORE);
    const within = marks.filter(([first, end]) => first >= from && end <= from + EXCERPT).length;
    if (within > most) [best, most] = [from, within];
  }
  const end = Math.min(length, best + EXCERPT), isSpace = (character) => /\s/.test(character);
  const first = best && characters.findIndex((one, place) => place >= best && isSpace(one));
  const last = end < length ? characters.findLastIndex((one, place) => place <= end && isSpace(one)) : end;
  // in scripts without spaces a word may end anywhere
  return [first >= 0 && first < best + BEFORE ? first : best, last > end - BEFORE ? last : end];
}

// puts the characters from `first` up to `last` into an element, those within `marks` marked
function fill(element, characters, marks, first, last) {
  const piece = (start, end) => characters.slice(start, end).join("");
  element.replaceChildren();
  if (first > 0) element.append("... ");
  let place = first;
  for (const [start, end] of marks) {
    if (end <= first || start >= last) continue;
    const [from, to] = [Math.max(start, first), Math.min(end, last)];
    element.append(piece(place, from), make("mark", {}, piece(from, to)));
    place = to;
  }
  element.append(piece(place, last));
  if (last < characters.length) element.append(" ...");
}

function similarButton(id, label) {
  const button = make("button", { type: "button" }, label);
  button.addEventListener("click", () => go("/like", { ...filters(), id }));
  return button;
}

// a column of a text, which narrows the search to texts that have the same there
function columnButton(name, value) {
  const shownValue = make("bdi", {}, short(String(value ?? "none"), 40));
  const button = make("button", { type: "button" }, `${name}: `, shownValue);
  button.setAttribute("aria-label", `${name}: ${value ?? "none"}, show only such texts`);
  button.addEventListener("click", () => {
    const column = `"${name.replaceAll('"', '""')}"`;
    const text = typeof value === "string" ? `'${value.replaceAll("'", "''")}'` : value;
    const condition = value === null ? `${column} IS NULL` : `${column} = ${text}`;
    const before = get("where").value.trim();
    get("where").value = before && before !== condition ? `(${before}) AND ${condition}` : condition;
    const { where, offset, ...others } = shown.parameters;
    go(shown.path, { ...others, where: get("where").value });
  });
  return button;
}

function textItem(hit) {
  const characters = [...hit.text], marks = hit.marks ?? []; // the marks count characters, not UTF-16
  const [first, last] = excerpt(characters, marks);
  const text = make("p", { className: "text", dir: "auto" });
  fill(text, characters, marks, first, last);
  const title = make("h3", { title: hit.id }, make("bdi", {}, short(hit.id, 24)));
  const head = make("div", { className: "head" }, title);
  head.append(make("span", { className: "quiet" }, `score ${hit.score.toFixed(3)}`));
  if (hit.chunk) {
    head.append(make("span", { className: "quiet" }, `chunk ${hit.chunk.number} of ${hit.chunk.of}`));
  }
  const similar = similarButton(hit.id, "Similar texts");
  similar.setAttribute("aria-label", `Similar texts to ${short(hit.id, 24)}`);
  const actions = make("div", { className: "actions" }, similar);
  if (last - first < characters.length) {
    const whole = make("button", { type: "button" }, `Whole text (${many(characters.length, "characters")})`);
    whole.setAttribute("aria-expanded", "false");
    whole.addEventListener("click", () => {
      const isWhole = whole.getAttribute("aria-expanded") === "false";
      whole.setAttribute("aria-expanded", String(isWhole));
      fill(text, characters, marks, isWhole ? 0 : first, isWhole ? characters.length : last);
    });
    actions.append(whole);
  }
  const item = make("li", { tabIndex: -1 }, head, text);
  const isShown = (value) => value !== hit.id && (value === null || typeof value !== "object");
  const columns = Object.entries(hit.columns).filter(([, value]) => isShown(value));
  if (columns.length) {
    const list = make("ul", { className: "columns" });
    list.setAttribute("aria-label", "Columns");
    list.append(...columns.map(([name, value]) => make("li", {}, columnButton(name, value))));
    item.append(list);
  }
  item.append(actions);
  return item;
}

// shows an answer in the place of the one before, or `after` so many texts
function show(found, after) {
  const items = found.hits.map(textItem);
  if (after) get("hits").append(...items);
  else get("hits").replaceChildren(...items);
  get("notes").replaceChildren(...found.notes.map((note) => make("li", {}, note)));
  get("notes").hidden = !found.notes.length;
  const isLike = shown.path === "/like";
  const title = isLike ? `Similar to ${short(found.id, 24)}` : `Texts for “${short(found.query, 80)}”`;
  get("found").textContent = title;
  get("found").hidden = false;
  get("more").hidden = found.hits.length < Number(shown.parameters.top_k) || after + found.hits.length > 1000;
  const count = many(after + found.hits.length, "texts");
  tell(found.hits.length || after ? `${count} found` : "No text found");
  return items;
}

function filters() {
  const parameters = { top_k: get("count").value };
  if (get("where").value.trim()) parameters.where = get("where").value.trim();
  return parameters;
}

function clear() {
  get("hits").replaceChildren();
  for (const id of ["more", "found", "notes"]) get(id).hidden = true;
}

// asks for texts and shows them; without `isNew`, the address stays as it is
async function go(path, parameters, { isNew = true, after = 0 } = {}) {
  const focused = document.activeElement;
  asking.abort();
  const { signal } = (asking = new AbortController());
  tell("Searching ...");
  shown = { path, parameters };
  if (isNew) history.pushState(null, "", `?${new URLSearchParams(parameters)}`);
  try {
    const items = show(await ask(path, after ? { ...parameters, offset: after } : parameters, signal), after);
    if (after) items[0]?.focus();
    else if (focused && !focused.isConnected) get("found").focus(); // what was pressed is gone
  } catch (error) {
    if (signal.aborted) return; // another question came
    if (!after) clear();
    tell("", error.message);
  }
}

// The map ------------------------------------------------------------------------------------------

let isDrawing = false;
let points = []; // {id, text, cluster, place: [x, y], dot}

function marker(cluster, attributes) {
  const number = (cluster - 1) % MARKERS.length;
  return drawn("path", { d: MARKERS[number], class: `c${number}`, ...attributes });
}

const middle = (numbers) => numbers.sort((one, other) => one - other)[numbers.length >> 1];

function drawMap(found) {
  const size = Math.max(1, WIDTH / 2 / document.querySelector("main").clientWidth); // on a narrow screen
  points = found.points.map((point) => {
    const place = [EDGE + point.x * (WIDTH - 2 * EDGE), EDGE + (1 - point.y) * (HEIGHT - 2 * EDGE)];
    const [x, y] = place.map((coordinate) => coordinate.toFixed(1));
    const dot = marker(point.cluster, { transform: `translate(${x} ${y}) scale(${size})` });
    return { ...point, place, dot };
  });
  const labels = found.clusters.map(({ cluster }) => {
    const own = points.filter((point) => point.cluster === cluster);
    const [x, y] = [0, 1].map((axis) => middle(own.map(({ place }) => place[axis])));
    const label = drawn("text", { x, y, "font-size": 26 * size });
    label.textContent = cluster;
    return label;
  });
  get("points").replaceChildren(...points.map(({ dot }) => dot), ...labels);
  const part = points.length < found.of ? `, evenly spaced among ${many(found.of, found.unit)}` : "";
  get("map-about").textContent = `${many(points.length, found.unit)}${part}: near each other where they ` +
    "are similar. Point at one to read it, and click it for similar texts. The lists below hold the same.";
  get("clusters").replaceChildren(...found.clusters.map((cluster) => clusterItem(cluster, found.unit)));
}

function clusterItem({ cluster, size, words }, unit) {
  const sign = drawn("svg", { viewBox: "-9 -9 18 18", "aria-hidden": "true" });
  sign.append(marker(cluster, {}));
  const named = make("bdi", {}, words.join(", "));
  const title = make("summary", {}, sign, ` ${cluster}: `, named, ` (${many(size, unit)})`);
  const texts = points.filter((point) => point.cluster === cluster);
  const list = make("ul", {}, ...texts.map(({ id, text }) => {
    const button = similarButton(id, text);
    button.dir = "auto";
    return make("li", {}, button);
  }));
  return make("li", {}, make("details", {}, title, list));
}

// shows the text of the point at the pointer, and returns it
function point(event) {
  const box = get("points").getBoundingClientRect(), scale = WIDTH / box.width;
  const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  let nearest = null, least = NEAR * Math.max(1, scale);
  for (const one of points) {
    const distance = Math.hypot(one.place[0] - x, one.place[1] - y);
    if (distance < least) [nearest, least] = [one, distance];
  }
  hideTip();
  if (nearest === null) return null;
  nearest.dot.classList.add("pointed");
  const tip = get("tip");
  const id = make("bdi", {}, short(nearest.id, 24));
  const head = make("div", { className: "quiet" }, `cluster ${nearest.cluster}, `, id);
  tip.replaceChildren(head, make("div", { dir: "auto" }, nearest.text));
  tip.hidden = false;
  const [left, top] = nearest.place.map((place) => place / scale);
  const above = top + tip.offsetHeight + 16 > box.height && top > tip.offsetHeight + 16;
  tip.style.left = `${Math.max(0, Math.min(left - tip.offsetWidth / 2, box.width - tip.offsetWidth))}px`;
  tip.style.top = `${above ? top - tip.offsetHeight - 14 : top + 14}px`;
  return nearest;
}

function hideTip() {
  get("points").querySelector(".pointed")?.classList.remove("pointed");
  get("tip").hidden = true;
}

async function toggleMap() {
  const isOpen = get("draw").getAttribute("aria-expanded") === "true";
  if (!isOpen && !points.length) {
    if (isDrawing) return;
    isDrawing = true;
    tell("Drawing the map: this takes some seconds the first time ...");
    try {
      drawMap(await ask("/map", {}));
    } catch (error) {
      tell("", error.message);
      return;
    } finally {
      isDrawing = false;
    }
  }
  get("draw").setAttribute("aria-expanded", String(!isOpen));
  get("map").hidden = isOpen;
  tell(isOpen ? "" : `A map of ${many(points.length, "points")}`);
  // who is somewhere else by now, as in the search box, stays there
  if (!isOpen && [document.body, get("draw")].includes(document.activeElement)) get("map-title").focus();
}

// The form, the keys, the address ------------------------------------------------------------------

get("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const parameters = { query: get("query").value, ...filters() };
  if (get("hybrid").checked) parameters.hybrid = "true";
  go("/search", parameters);
});
get("more").addEventListener("click", () => {
  go(shown.path, shown.parameters, { isNew: false, after: get("hits").children.length });
});
get("draw").addEventListener("click", toggleMap);
get("points").addEventListener("pointermove", point);
get("points").addEventListener("pointerleave", hideTip);
get("points").addEventListener("click", (event) => {
  const pointed = point(event);
  if (pointed) go("/like", { ...filters(), id: pointed.id }).then(() => get("found").focus());
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input")) return; // where a slash is a slash
  event.preventDefault();
  get("query").focus();
  get("query").select();
});

function followAddress() {
  const parameters = Object.fromEntries(new URLSearchParams(location.search));
  get("query").value = parameters.query ?? get("query").value;
  get("where").value = parameters.where ?? "";
  get("count").value = parameters.top_k ?? 10;
  get("hybrid").checked = parameters.hybrid === "true";
  if (parameters.id) go("/like", parameters, { isNew: false });
  else if (parameters.query) go("/search", parameters, { isNew: false });
  else clear();
}
window.addEventListener("popstate", followAddress);

ask("/about", {}).then((about) => {
  document.title = `${about.index}: search`;
  get("index").textContent = about.index;
  get("about").textContent = `${many(about.rows, about.unit)}, ${about.model}`;
  get("columns").textContent = `Columns: ${Object.keys(about.columns).join(", ")}`;
}).catch((error) => tell("", error.message));
followAddress();
