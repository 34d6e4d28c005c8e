"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const LEFT = 58, LEAST = 2; // pixels: room for a level's name; a cluster that is drawn
let ROW = 80; // a level's height
const number = (n) => Math.round(n).toLocaleString("en");
const nats = (n) => (n < 0 ? "−" : "+") + Math.abs(n).toFixed(4);

function make(name, attributes = {}, ...children) {
  const element = name.startsWith("svg:")
    ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children); // text is text, never HTML
  return element;
}

// The clusters of each bank as a tree of nodes.
for (const [place, bank] of data.banks.entries()) {
  bank.place = place;
  bank.root = { bank, level: 0, cluster: 0, children: [], parent: null, path: [] };
  bank.nodes = new Map();
  let above = new Map([[0, bank.root]]);
  bank.levels.forEach((level, index) => {
    const here = new Map();
    level.ids.forEach((cluster, row) => {
      const parent = above.get(index ? Math.floor(cluster / bank.branching[index]) : 0);
      if (!parent) return;
      const node = { bank, level: index + 1, cluster, parent, children: [], row,
        path: [...parent.path, cluster], examples: level.examples[row], tokens: level.tokens[row],
        terms: level.terms[row], empty: level.empty[row], effect: level.effect[row], documents: [] };
      parent.children.push(node);
      here.set(cluster, node);
      bank.nodes.set(`${index + 1}.${cluster}`, node);
    });
    above = here;
  });
  bank.documents.forEach((document, index) => {
    document.index = index;
    document.text = `${document.name} ${document.terms.join(" ")} ${document.sha256}`.toLowerCase();
    document.nodes = new Set();
    for (const leaf of document.clusters) {
      leaf.forEach((cluster, level) => {
        const node = bank.nodes.get(`${level + 1}.${cluster}`);
        if (node && !document.nodes.has(node)) {
          document.nodes.add(node);
          node.documents.push(document);
        }
      });
    }
  });
  bank.root.examples = bank.root.children.reduce((sum, n) => sum + n.examples, 0);
  bank.root.tokens = bank.root.children.reduce((sum, n) => sum + n.tokens, 0);
  bank.root.documents = bank.documents;
}

const hasEffects = data.texts !== null;
const state = { bank: data.banks[0], focus: data.banks[0].root, chosen: null, width: "examples",
  colour: hasEffects ? "effect" : "branch", view: "", query: "", routed: null };

const leaves = (node) => (node.children.length ? node.children.reduce((n, c) => n + leaves(c), 0) : 1);
const weight = (node) => (state.width === "equal" ? (node.leaves ??= leaves(node)) : node[state.width]);
const label = (node) => (node.level ? node.path.join(",") : node.bank.name || "all");
const bars = (node) => {
  const barred = barredIn(node.bank);
  for (let n = node; n.level; n = n.parent) if (barred.has(`${n.level}.${n.cluster}`)) return true;
  return barred.has("all");
};

function barredIn(bank) {
  const paths = state.view ? data.views[state.view] : [];
  const keys = new Set();
  for (const path of paths) {
    const named = typeof path[0] === "string", own = named ? path.slice(1) : path;
    if ((named ? path[0] : "") !== bank.name) continue;
    keys.add(own.length ? `${own.length}.${own[own.length - 1]}` : "all");
  }
  return keys;
}

// Colours.
function branch(node) {
  const first = node.path[0], depth = node.level - 1;
  return `oklch(calc(var(--light) + var(--step) * ${depth}) var(--chroma) ${(first * 137.5 + 230) % 360})`;
}
const largest = () => Math.max(1e-9, ...[...state.bank.nodes.values()].map((n) => Math.abs(n.effect?.[0] ?? 0)));
function effectColour(node, most) {
  if (!node.effect) return "var(--none)";
  const share = Math.min(1, Math.sqrt(Math.abs(node.effect[0]) / most));
  const hue = node.effect[0] >= 0 ? 245 : 50;
  return `oklch(calc(var(--light) + var(--step) * ${(share * 3).toFixed(2)}) ${(0.02 + 0.12 * share).toFixed(3)} ${hue})`;
}
const colour = (node, most) => (bars(node) ? "url(#barred)" : state.colour === "effect" ? effectColour(node, most) : branch(node));

// The picture.
function draw() {
  const svg = $("icicle"), bank = state.bank, depth = bank.levels.length;
  const width = Math.max(320, svg.clientWidth || svg.parentNode.clientWidth), most = largest();
  const focus = state.focus, above = focus.level ? 1 : 0;
  const rows = depth - focus.level + above, top = focus.level + 1 - above;
  ROW = Math.max(66, Math.min(124, 380 / rows));
  svg.setAttribute("viewBox", `0 0 ${width} ${rows * ROW + 8}`);
  svg.style.height = `${rows * ROW + 8}px`;
  svg.replaceChildren(make("svg:defs", {}, make("svg:pattern",
    { id: "barred", width: 8, height: 8, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    make("svg:rect", { width: 8, height: 8, fill: "var(--none)", stroke: "none" }),
    make("svg:rect", { width: 3, height: 8, fill: "var(--faint)", "fill-opacity": 0.4, stroke: "none" }))));
  let hidden = 0;
  for (let level = top; level <= depth; level++) {
    const y = (level - top) * ROW + ROW / 2;
    svg.append(make("svg:text", { class: "level", x: 8, y }, `level ${level}`));
    svg.append(make("svg:text", { class: "level", x: 8, y: y + 14 }, bank.r[level - 1] ? `r ${bank.r[level - 1]}` : "no block"));
  }
  const found = matches();
  const place = (node, x, span) => {
    if (node.level >= top) svg.append(rectangle(node, x, span, (node.level - top) * ROW + 4, most, found));
    const total = node.children.reduce((sum, child) => sum + weight(child), 0);
    let at = x, narrow = x; // where a run of children that are too narrow began
    for (const child of node.children) {
      const part = total ? (span * weight(child)) / total : 0;
      if (part >= LEAST) {
        crowd(node, narrow, at);
        place(child, at, part);
        narrow = at + part;
      } else if (part) hidden += 1;
      at += part;
    }
    crowd(node, narrow, at);
  };
  const crowd = (node, x, end) => {
    if (end - x < 0.5 || node.level + 1 < top) return;
    svg.append(make("svg:rect", { class: "crowd", x, y: node.level * ROW - (top - 1) * ROW + 4, width: end - x, height: (depth - node.level) * ROW - 6,
      fill: node.level ? colour(node, most) : "var(--none)", onclick: () => zoom(node) }));
  };
  place(focus, LEFT, width - LEFT - 6);
  legend(hidden, most);
  crumbs();
}

function rectangle(node, x, span, y, most, found) {
  const on = state.routed && state.routed.nodes.has(node);
  const classes = [found && !found.has(node) ? "dim" : "", on || (found && found.has(node)) ? "on" : "",
    node === state.chosen ? "chosen" : "", span < 10 ? "thin" : ""].join(" ").trim();
  const group = make("svg:g", { class: classes, tabindex: span > 12 ? 0 : undefined, role: "button",
    "aria-label": `cluster ${label(node)}, ${node.terms.join(" ")}`, "data-key": `${node.level}.${node.cluster}`,
    onclick: () => choose(node, node === state.chosen), onmousemove: (event) => tip(event, node), onmouseleave: () => tip(null),
    onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(node, node === state.chosen); refocus(node); } } });
  group.append(make("svg:rect", { x, y, width: Math.max(1, span - 1), height: ROW - 6, rx: 3, fill: colour(node, most) }));
  const fits = Math.floor((span - 10) / 6.6), name = node.level > 1 && fits < label(node).length ? String(node.cluster) : label(node);
  if (fits >= name.length) group.append(make("svg:text", { x: x + 6, y: y + 18 }, name));
  const room = Math.floor((span - 12) / 6.5);
  for (const [line, text] of lines(node, room).entries()) {
    group.append(make("svg:text", { class: "words", x: x + 6, y: y + 35 + 15 * line }, text));
  }
  return group;
}

function lines(node, room) {
  if (room < 6) return [];
  const words = [...node.terms], result = [];
  const most = Math.floor((ROW - 32) / 15);
  while (words.length && result.length < most) {
    let line = words.shift();
    if (line.length > room) line = `${line.slice(0, room - 1)}…`;
    while (words.length && line.length + 1 + words[0].length <= room) line += ` ${words.shift()}`;
    result.push(line);
  }
  return result;
}

function refocus(node) {
  document.querySelector(`#icicle g[data-key="${node.level}.${node.cluster}"]`)?.focus();
}

function tip(event, node) {
  const box = $("tip");
  box.style.display = event ? "block" : "none";
  if (!event) return;
  const effect = node.effect ? `; effect ${nats(node.effect[0])} nats` : "";
  box.replaceChildren(`cluster ${label(node)}`, make("br"), node.terms.join(" ") || "no words known", make("br"),
    make("small", {}, `${number(node.examples)} examples, ${node.documents.length} documents${effect}`));
  box.style.left = `${Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8)}px`;
  box.style.top = `${Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 8)}px`;
}

function legend(hidden, most) {
  const parts = [];
  if (state.colour === "effect") {
    const swatch = (fill) => make("span", { class: "swatch", style: `background:${fill}` });
    parts.push("What leaving the block out adds to the loss of a token:", swatch(effectColour({ effect: [most] }, most)),
      `up to ${nats(most)} nats: it helps`, swatch(effectColour({ effect: [-most] }, most)), "it harms",
      swatch("var(--none)"), "no given text fetched it. ");
  }
  if (hidden) parts.push(`${number(hidden)} clusters, and those below them, are too narrow to draw; click the pale places to come nearer.`);
  $("legend").replaceChildren(...parts);
}

function crumbs() {
  const items = [];
  for (let node = state.focus; node; node = node.parent) {
    items.unshift(make("button", { type: "button", onclick: () => zoom(node) }, node.level ? `cluster ${label(node)}` : "whole tree"));
  }
  $("crumbs").replaceChildren(...items.flatMap((item, i) => (i ? ["›", item] : [item])));
}

function zoom(node) { state.focus = node; draw(); }

function choose(node, nearer) {
  state.chosen = node;
  if (nearer && node.children.length) state.focus = node;
  detail();
  draw();
}

// Details of the chosen cluster, or of the bank.
function detail() {
  const node = state.chosen ?? state.bank.root, bank = node.bank, level = bank.levels[node.level - 1];
  const facts = [["examples of the tree", number(node.examples)], ["documents", number(node.documents.length)], ["tokens", number(node.tokens)]];
  const parts = [];
  if (node.level) {
    parts.push(make("h2", {}, `Cluster ${label(node)}`));
    facts.push(["level", node.level], ["block", bank.r[node.level - 1] ? `${number(bank.blockBytes[node.level - 1])} bytes` : "none"]);
    if (node.empty) facts.push(["", "the block is zeros"]);
    if (node.effect) facts.push(["effect", `${nats(node.effect[0])} nats`], ["measured on", `${number(node.effect[1])} tokens`]);
    const who = Object.keys(data.views).filter((name) => { const before = state.view; state.view = name; const result = bars(node); state.view = before; return result; });
    if (who.length) facts.push(["barred in view", who.join(", ")]);
    if (node.children.length && state.focus !== node) parts.push(make("button", { type: "button", onclick: () => choose(node, true) }, "Come nearer"));
  } else {
    parts.push(make("h2", {}, bank.name ? `Bank ${bank.name}` : "The model's own bank"));
    facts.push(["memory", bank.kind], ["parameters", number(bank.parameters)], ["anchor", bank.anchor.slice(0, 21)], ["cluster tree", bank.tree.slice(0, 21)]);
  }
  parts.push(make("dl", {}, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))])));
  if (node.terms?.length) parts.push(make("div", { class: "terms" }, ...node.terms.map((t) => make("span", {}, t))));
  if (state.routed && !node.level) parts.push(...routedLines());
  if (node.documents.length) parts.push(make("h3", {}, "Documents that trained it"), documentList(node.documents.slice(0, 60)));
  if (node.documents.length > 60) parts.push(make("p", { class: "note" }, `… and ${number(node.documents.length - 60)} more`));
  if (!bank.documents.length) parts.push(make("p", { class: "note" }, "The bank has no documents.jsonl, so it is not known what trained it."));
  $("detail").replaceChildren(...parts);
}

function documentList(documents) {
  return make("ul", {}, ...documents.map((d) => make("li", {},
    make("button", { type: "button", class: "link", onclick: () => pick(d) }, d.name || d.sha256.slice(0, 12)),
    make("small", {}, `${number(d.tokens)} tokens, ${d.clusters.length} ${d.clusters.length === 1 ? "leaf" : "leaves"}, ${d.sha256.slice(0, 12)}`))));
}

function pick(document) {
  state.query = document.sha256;
  $("search").value = document.sha256.slice(0, 12);
  state.focus = state.bank.root;
  search();
}

// Search.
function matches() {
  if (!state.query) return null;
  const found = new Set();
  for (const d of state.bank.documents) if (d.text.includes(state.query)) d.nodes.forEach((n) => found.add(n));
  for (const n of state.bank.nodes.values()) if (n.terms.some((t) => t.toLowerCase().startsWith(state.query))) for (let a = n; a.level; a = a.parent) found.add(a);
  return found;
}

function search() {
  const found = state.query ? state.bank.documents.filter((d) => d.text.includes(state.query)) : [];
  const list = $("found");
  list.replaceChildren();
  if (state.query) {
    const clusters = matches().size;
    list.append(make("p", { class: "note" }, `${number(found.length)} documents, ${number(clusters)} clusters`), documentList(found.slice(0, 100)));
  }
  draw();
}

// Routes.
function route(text) {
  state.routed = null;
  if (text.trim() && startRouter()) {
    const unit = Router.vector(text);
    const all = data.banks.filter((bank) => !barredIn(bank).has("all"));
    const found = all.map((bank) => ({ bank, ...Router.route(bank, bank.place, unit, barredIn(bank)) }));
    const best = found.reduce((a, b) => (b.nearness > a.nearness ? b : a));
    show(best.bank, best.path);
  }
  state.chosen = null;
  detail();
  draw();
}

function show(bank, path) {
  if (bank !== state.bank) setBank(bank);
  const nodes = new Set(path.map((c, i) => bank.nodes.get(`${i + 1}.${c}`)).filter(Boolean));
  state.routed = { bank, path, nodes };
  state.focus = bank.root;
  state.chosen = null;
}

function routedLines() {
  const { bank, path, nodes } = state.routed, open = [...nodes].filter((n) => !bars(n));
  const kept = open.length < path.length ? `; view ${state.view} allows ${open.length} of ${path.length} levels` : "";
  return [make("h3", {}, "Route of the text"),
    make("p", { id: "path" }, `${bank.name ? `${bank.name}: ` : ""}${path.join(", ")}${kept}`),
    make("ul", {}, ...[...nodes].map((n) => make("li", {}, make("button", { type: "button", class: "link", onclick: () => choose(n, false) }, `level ${n.level}, cluster ${n.cluster}`),
      make("small", {}, n.terms.join(" ") || "no words known"))))];
}

function startRouter() {
  if (Router.ready) return true;
  const text = $("encoder").textContent;
  if (text === "null") return false;
  Router.start(JSON.parse(text));
  return true;
}

// Tables.
function tables() {
  const section = $("tables"), parts = [];
  for (const bank of data.banks) {
    const head = ["level", "r", "clusters", "reached by texts", "trained by documents", "empty blocks", "bytes of a block", "bytes of all", "stored as"];
    const rows = bank.levels.map((level, i) => [i + 1, bank.r[i], number(level.count), number(level.ids.length),
      number([...bank.nodes.values()].filter((n) => n.level === i + 1 && n.documents.length).length),
      number(level.empty.reduce((a, b) => a + b, 0)), number(bank.blockBytes[i]), number(bank.blockBytes[i] * level.count), bank.stored[i]]);
    parts.push(make("h2", {}, bank.name ? `Levels of bank ${bank.name}` : "Levels"), table(head, rows));
  }
  if (hasEffects) {
    const rows = data.texts.map((t) => [number(t.tokens), t.without.toFixed(4), t.fetched.toFixed(4), nats(t.fetched - t.without),
      make("span", {}, make("button", { type: "button", class: "link", onclick: () => { show(data.banks.find((b) => b.name === t.bank), t.path); detail(); draw(); scrollTo({ top: 0 }); } },
        `${t.bank ? `${t.bank}:` : ""}${t.path.join(",")}`), "  ", t.name)]);
    parts.push(make("h2", {}, "Given texts: loss in nats for each token"), table(["tokens", "without memory", "with it", "change", "route of its beginning, and name"], rows));
  }
  section.replaceChildren(...parts);
}

function table(head, rows) {
  return make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...head.map((h) => make("th", { scope: "col" }, h)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, cell instanceof Node ? cell : String(cell))))))));
}

function setBank(bank) {
  state.bank = bank;
  state.focus = bank.root;
  state.chosen = null;
  $("bank").value = String(bank.place);
  choices($("width"), bank.root.tokens ? ["tokens", "examples", "equal"] : ["examples", "equal"], bank.root.tokens ? "tokens" : "examples");
  state.width = $("width").value;
}

function choices(select, values, chosen, names = {}) {
  select.replaceChildren(...values.map((v) => make("option", { value: v }, names[v] ?? v)));
  select.value = chosen;
  select.disabled = values.length < 2;
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
}

// The page may be opened in a state: page.html?theme=dark&search=WORD&route=TEXT&view=NAME&cluster=3,51
function begin() {
  const asked = new URLSearchParams(location.search);
  theme(asked.get("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  $("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  $("title").textContent = data.title;
  $("facts").textContent = data.facts;
  choices($("bank"), data.banks.map((b) => String(b.place)), "0", Object.fromEntries(data.banks.map((b) => [b.place, b.name || "the model's own"])));
  choices($("colour"), hasEffects ? ["effect", "branch"] : ["branch"], state.colour, { effect: "effect on the loss", branch: "branch of the tree" });
  choices($("view"), ["", ...Object.keys(data.views)], "", { "": "all is allowed" });
  setBank(data.banks[0]);
  const later = (run) => { let timer; return (event) => { clearTimeout(timer); timer = setTimeout(run, 120, event.target.value); }; };
  $("search").addEventListener("input", later((value) => { state.query = value.trim().toLowerCase(); search(); }));
  $("route").addEventListener("input", later(route));
  $("bank").addEventListener("change", (e) => { setBank(data.banks[Number(e.target.value)]); state.routed = null; detail(); search(); });
  $("width").addEventListener("change", (e) => { state.width = e.target.value; draw(); });
  $("colour").addEventListener("change", (e) => { state.colour = e.target.value; draw(); });
  $("view").addEventListener("change", (e) => { state.view = e.target.value; detail(); draw(); });
  $("route-box").hidden = $("encoder").textContent === "null";
  $("route-note").textContent = data.routeNote;
  addEventListener("resize", draw);
  tables();
  state.view = asked.get("view") in data.views ? asked.get("view") : "";
  $("view").value = state.view;
  $("search").value = asked.get("search") ?? "";
  state.query = $("search").value.trim().toLowerCase();
  $("route").value = asked.get("route") ?? "";
  const path = (asked.get("cluster") ?? "").split(",");
  route($("route").value);
  state.chosen = state.bank.nodes.get(`${path.length}.${path.at(-1)}`) ?? null;
  detail();
  search();
}
begin();
