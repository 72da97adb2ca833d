// How does a run stand? /state.json is asked every second and drawn anew: facts, islands and links, loss curves, a table.
"use strict";

const EVERY_MS = 1000;
const QUIET_S = 10; // so long without a word is worth a word
const COLOURS = 8;
const NONE = "\u2013"; // where nothing is known
const LABELLED_LINKS = 12; // labels of more would cover each other
const at = (id) => document.getElementById(id);

function svg(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function html(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// Numbers, as the terminal shows them: decimal units, three digits.

function bytes(count) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (count < 999.5) return `${unit === "B" ? Math.round(count) : Number(count.toPrecision(3))} ${unit}`;
    count /= 1000;
  }
  return `${Number(count.toPrecision(4))} TB`;
}

function seconds(value) {
  if (value < 60) return `${Number(value.toPrecision(3))} s`;
  const minutes = Math.floor(value / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(value % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

const perSecond = (rate) => `${bytes(rate)}/s`;
const whole = (value) => Math.round(value).toLocaleString("en-US");
const known = (value, show) => (value === null ? NONE : show(value));
const total = (values) => values.reduce((sum, value) => sum + (value ?? 0), 0);
const mean = (values) => (values.length ? total(values) / values.length : null);
const present = (values) => values.filter((value) => value !== null);
const names = (islands) => (islands.length > 3 ? `${islands[0]} and ${islands.length - 1} more` : islands.join(", "));

// At an island's own site nothing is known of the others.
const seen = (state) => state.islands.filter((island) => island.looks !== "elsewhere");

function looksOf(state) {
  if (state.phase === "ended") return state.how === "finished" ? "done" : "stopped";
  if (state.islands.some((island) => island.looks === "lost")) return "lost";
  return state.islands.some((island) => island.waiting_for.length) ? "waiting" : "training";
}

function drawHead(state) {
  const islands = seen(state);
  const slowest = Math.min(...islands.map((island) => island.step));
  const steps = Math.max(...islands.map((island) => island.steps));
  const looks = looksOf(state);
  document.title = `${slowest}/${steps} ${state.name}`;
  at("name").textContent = state.name;
  at("phase").className = `pill ${looks}`;
  at("phase").textContent = looks === "done" ? "finished" : state.phase;
  at("about").textContent = `${state.islands.length} island${state.islands.length === 1 ? "" : "s"}, ${state.recipe}`;
  at("done").style.width = `${(100 * slowest) / Math.max(steps, 1)}%`;
  at("run").textContent = `read from ${state.run}`;
  const lost = islands.filter((island) => island.looks === "lost");
  const quiet = state.phase === "running" && state.quiet_s >= QUIET_S;
  complain([
    ...(looks === "stopped" ? [state.how] : []),
    ...lost.map((island) => `island ${island.island}: ${island.doing}`),
    ...(state.unseen ? [state.unseen] : []),
    ...(quiet ? [`nothing was written for ${seconds(Math.round(state.quiet_s))}`] : []),
  ].join("; "));
  drawFacts(state, slowest, steps);
}

function drawFacts(state, slowest, steps) {
  const of = (key) => seen(state).map((island) => island[key]);
  const working = seen(state).filter((island) => !["lost", "stopped", "done"].includes(island.looks));
  const speeds = present(working.map((island) => island.tokens_per_s));
  const rates = present(of("wire_bytes_per_s"));
  const trained = Math.max(...of("time_s"));
  const waited = trained ? (100 * total(of("wait_s"))) / total(of("time_s")) : null;
  const restarts = total(of("restarts"));
  const merged = state.merged.at(-1);
  const facts = [
    ["step", whole(slowest), `of ${whole(steps)}`],
    ["loss, mean", known(mean(present(of("loss"))), (loss) => loss.toFixed(3)), merged ? `merged ${merged[1].toFixed(3)}` : ""],
    ["tokens/s, all", speeds.length ? whole(total(speeds)) : NONE, ""],
    ["links carry", rates.length ? perSecond(total(rates)) : NONE, ""],
    ["waited for links", known(waited, (share) => `${share.toFixed(1)} %`), trained ? `of ${seconds(Math.round(trained))}` : ""],
    ["last commit", known(state.committed_step, whole), restarts ? `${restarts} restart${restarts === 1 ? "" : "s"}` : ""],
  ];
  const shown = (value, more) => html("dd", "", value, more ? " " : "", html("small", "", more));
  at("facts").replaceChildren(
    ...facts.map(([name, value, more]) => html("div", "", html("dt", "", name), shown(value, more))),
  );
}

function complain(text) {
  at("trouble").hidden = !text;
  at("trouble").textContent = text;
}

// Islands on a circle; a line where either sends to the other.

function drawGraph(state) {
  const islands = state.islands;
  const count = islands.length;
  const [width, height] = [480, 330];
  const size = count <= 12 ? 19 : count <= 32 ? 11 : 5;
  const radius = count === 1 ? 0 : 112;
  const places = islands.map((_, k) => {
    const angle = (2 * Math.PI * k) / count - Math.PI / (count === 2 ? 1 : 2);
    const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
    return { x: width / 2 + radius * cos, y: height / 2 + radius * sin, cos, sin };
  });
  const graph = at("graph");
  graph.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const pairs = pairsOf(state.links ?? []);
  const most = Math.max(1, ...pairs.map((pair) => pair.rate ?? 0));
  const few = pairs.length <= LABELLED_LINKS;
  const lines = pairs.map((pair) => linkOf(pair, places, size, (few ? 3 : 1) / most));
  const labelled = few ? pairs.filter((pair) => pair.rate !== null) : [];
  const labels = labelled.map((pair) => labelOf(pair, places, width, height));
  const waits = islands.flatMap((island, k) =>
    island.waiting_for.filter((peer) => peer < count).map((peer) => waitOf(places[k], places[peer], size)),
  );
  const nodes = islands.map((island, k) => nodeOf(island, places[k], size));
  graph.replaceChildren(arrowHead(), ...lines, ...waits, ...labels, ...nodes);
  at("links-note").textContent = noteOf(state, pairs);
}

function noteOf(state, pairs) {
  if (state.links === null) return `${state.islands.length} islands have more links than can be drawn.`;
  if (!pairs.length) return state.islands.length > 1 ? "These islands do not talk on the way." : "";
  return "What an island sends is spread evenly over its topology's links.";
}

function pairsOf(links) {
  const pairs = new Map();
  for (const { sender, receiver, bytes_per_s } of links) {
    const key = `${Math.min(sender, receiver)}-${Math.max(sender, receiver)}`;
    const pair = pairs.get(key) ?? { ways: [], rate: null };
    pair.ways.push({ sender, receiver, bytes_per_s });
    if (bytes_per_s !== null) pair.rate = (pair.rate ?? 0) + bytes_per_s;
    pairs.set(key, pair);
  }
  return [...pairs.values()];
}

function between(from, to, gap) {
  const length = Math.hypot(to.x - from.x, to.y - from.y) || 1;
  const [x, y] = [(to.x - from.x) / length, (to.y - from.y) / length];
  return { x1: from.x + gap * x, y1: from.y + gap * y, x2: to.x - gap * x, y2: to.y - gap * y };
}

function linkOf(pair, places, size, thickness) {
  const { sender, receiver } = pair.ways[0];
  const one = pair.ways.length === 1;
  const line = svg("line", {
    ...between(places[sender], places[receiver], size + (one ? 5 : 2)),
    class: pair.rate ? "link" : "link idle",
    "stroke-width": 1 + thickness * (pair.rate ?? 0),
    "data-link": `${sender}-${receiver}`,
  });
  if (one) line.setAttribute("marker-end", "url(#arrow)");
  const said = pair.ways.map((way) => `island ${way.sender} to ${way.receiver}: ${known(way.bytes_per_s, perSecond)}`);
  line.append(svg("title", {}, said.join("\n")));
  return line;
}

function labelOf(pair, places, width, height) {
  const [a, b] = [pair.ways[0].sender, pair.ways[0].receiver].sort((p, q) => p - q).map((island) => places[island]);
  const crossed = Math.hypot(a.x + b.x - width, a.y + b.y - height) < 1; // all that go through the middle meet there
  const part = crossed && places.length > 2 ? 0.36 : 0.5;
  const place = { x: a.x + part * (b.x - a.x), y: a.y + part * (b.y - a.y) + 4, "text-anchor": "middle", class: "dim halo rate" };
  return svg("text", place, perSecond(pair.rate));
}

function waitOf(from, to, size) {
  return svg("line", { ...between(from, to, size + 6), class: "wait" });
}

function arrowHead() {
  const size = { markerWidth: 9, markerHeight: 9, markerUnits: "userSpaceOnUse" };
  const marker = { id: "arrow", viewBox: "0 0 6 6", refX: 5, refY: 3, orient: "auto", ...size };
  return svg("defs", {}, svg("marker", marker, svg("path", { d: "M0 0L6 3L0 6z", fill: "currentColor" })));
}

function nodeOf(island, place, size) {
  const node = svg("g", { class: `node ${island.looks}`, "data-island": island.island });
  const far = island.looks === "elsewhere" ? "" : `, step ${island.step}`;
  node.append(svg("title", {}, `island ${island.island}: ${island.doing}${far}`));
  node.append(svg("circle", { cx: place.x, cy: place.y, r: size }));
  if (size < 8) return node;
  node.append(svg("text", { x: place.x, y: place.y + 4.5, "text-anchor": "middle", class: "number" }, island.island));
  if (size < 15) return node;
  const waits = `waits for ${names(island.waiting_for)}, ${Math.round(island.waited_s)} s`;
  const says = island.waiting_for.length ? waits : island.looks;
  const words = wordsAt(place, size);
  node.append(svg("text", { ...words, class: "says halo" }, says));
  if (island.looks === "elsewhere") return node;
  node.append(svg("text", { ...words, y: words.y + 14, class: "dim halo" }, `step ${whole(island.step)}`));
  return node;
}

// Outside of the circle, so that no link runs through them.
function wordsAt(place, size) {
  if (Math.abs(place.cos) > 0.5) {
    return { x: place.x + Math.sign(place.cos) * (size + 8), y: place.y - 2, "text-anchor": place.cos > 0 ? "start" : "end" };
  }
  return { x: place.x, y: place.y + (place.sin > 0 ? size + 16 : -size - 20), "text-anchor": "middle" };
}

// Curves over steps.

function drawCurves(state) {
  const [width, height] = [480, 300];
  const box = { left: 34, right: 10, top: 8, bottom: 24 };
  const drawn = state.islands.filter((island) => island.curve.length);
  const points = [...drawn.flatMap((island) => island.curve), ...state.merged];
  const losses = points.map((point) => point[1]);
  const lastStep = Math.max(1, ...points.map((point) => point[0]));
  const chart = at("curves");
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  if (!points.length) {
    const middle = { x: width / 2, y: height / 2, "text-anchor": "middle", class: "dim" };
    chart.replaceChildren(svg("text", middle, "no step has been made yet"));
    at("legend").replaceChildren();
    return;
  }
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  const ticks = { y: nice(low, high === low ? low + 1 : high, 5), x: nice(0, lastStep, 5) };
  const [bottom, top] = [Math.min(low, ticks.y[0]), Math.max(high, ticks.y.at(-1))];
  const x = (step) => box.left + ((width - box.left - box.right) * step) / Math.max(lastStep, 1);
  const y = (loss) => box.top + ((height - box.top - box.bottom) * (top - loss)) / (top - bottom || 1);
  const grid = ticks.y.flatMap((loss) => [
    svg("line", { x1: box.left, x2: width - box.right, y1: y(loss), y2: y(loss), class: "grid" }),
    svg("text", { x: box.left - 6, y: y(loss) + 4, "text-anchor": "end", class: "dim" }, Number(loss.toPrecision(6))),
  ]);
  const below = { y: height - 6, "text-anchor": "middle", class: "dim" };
  const steps = ticks.x.map((step) => svg("text", { x: x(step), ...below }, whole(step)));
  const place = ([step, loss]) => [x(step).toFixed(1), y(loss).toFixed(1)];
  const path = (points) => points.map((point, k) => `${k ? "L" : "M"}${place(point).join(" ")}`).join("");
  const line = (name, island, points) =>
    svg("path", { class: `${name} c${island.island % COLOURS}`, "data-island": island.island, d: path(points) });
  const curves = [
    ...drawn.map((island) => line("curve", island, island.curve)),
    ...drawn.map((island) => line("trend", island, smooth(island.curve))),
  ];
  const merged = state.merged.map((point) => {
    const [cx, cy] = place(point);
    const said = `merged, step ${point[0]}: ${point[1].toFixed(4)}`;
    return svg("circle", { class: "merged", cx, cy, r: 3.5 }, svg("title", {}, said));
  });
  const commit = state.committed_step === null ? [] : commitAt(x(state.committed_step), box.top, height - box.bottom);
  chart.replaceChildren(...grid, ...steps, ...commit, ...curves, ...merged);
  drawLegend(state, drawn);
}

function commitAt(x, top, bottom) {
  const word = svg("text", { x: x - 5, y: top + 9, "text-anchor": "end", class: "dim" }, "last commit");
  return [svg("line", { x1: x, x2: x, y1: top, y2: bottom, class: "commit" }), word];
}

function drawLegend(state, drawn) {
  const entries = drawn.map((island) => html("li", "", html("i", `c${island.island % COLOURS}`), `island ${island.island}`));
  if (state.merged.length) entries.push(html("li", "", html("i", "dot"), "merged, held-out text"));
  if (drawn.length < state.islands.length) entries.push(html("li", "", `${drawn.length} of ${state.islands.length} islands`));
  at("legend").replaceChildren(...entries);
}

// Batches differ more than islands do: each point's mean with its neighbours shows where a curve goes.
function smooth(points) {
  const reach = Math.floor(points.length / 40);
  return points.map(([step], k) => {
    const far = Math.min(reach, k); // as far on both sides, where it falls steeply
    const near = points.slice(k - far, k + far + 1);
    return [step, mean(near.map((point) => point[1]))];
  });
}

function nice(low, high, wanted) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) ticks.push(k * step + 0); // no -0
  return ticks.length ? ticks : [low];
}

function drawTable(state) {
  at("rows").replaceChildren(
    ...seen(state).map((island) => {
      const cells = [
        ["", island.island],
        [`now ${island.looks}`, island.doing],
        ["n", `${whole(island.step)} / ${whole(island.steps)}`],
        ["n", known(island.loss, (value) => value.toFixed(3))],
        ["n", known(island.eval_loss, (value) => value.toFixed(3))],
        ["n", known(island.tokens_per_s, whole)],
        ["n", known(island.wire_bytes_per_s, perSecond)],
        ["n", bytes(island.wire_bytes_sent)],
        ["n", seconds(Math.round(10 * island.wait_s) / 10)],
        ["n", island.restarts],
      ];
      const row = html("tr", "", ...cells.map(([className, text]) => html("td", className, text)));
      row.dataset.island = island.island;
      return row;
    }),
  );
}

async function draw() {
  try {
    const answer = await fetch("state.json");
    if (!answer.ok) throw new Error((await answer.text()).trim());
    const state = await answer.json();
    drawHead(state);
    drawGraph(state);
    drawCurves(state);
    drawTable(state);
  } catch (error) {
    complain(error instanceof TypeError ? "dtrain status does not answer: what stands here is old" : error.message);
  }
  setTimeout(draw, EVERY_MS);
}

draw();
