// The first page: a text, its tokens with lens, attribution and attention, and clicks that change the run.
import { Grid, ask, byId, legend, make, step, written } from "./blocks.js";

const question = { text: "", other: "", answer: "", rival: "" };
let card, reading, outcome = null, pattern = null;
let changes = [];
let head = [0, 0];
const running = {};

const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const layerName = (site) => (site === "blocks.0.resid_pre" ? "embed" : `L${site.split(".")[1]}`);
const headName = ([layer, number]) => `L${layer}H${number}`;
const at = (position) => `${position} ${reading.tokens[position].shown}`;
const chance = (p) => (p > 0 && p < 0.005 ? "<.01" : written(p));

/** One request of a kind at a time: a newer one takes the place of the older. */
const latest = async (kind, path, body) => {
  running[kind]?.abort();
  const mine = (running[kind] = new AbortController());
  document.body.setAttribute("aria-busy", "true");
  try {
    const data = await ask(path, body, mine.signal);
    byId("problem").hidden = true;
    return mine.signal.aborted ? null : data;
  } catch (error) {
    if (error.name === "AbortError") return null;
    byId("problem").textContent = error.message;
    byId("problem").hidden = false;
    return null;
  } finally {
    if (running[kind] === mine) delete running[kind];
    if (!Object.keys(running).length) document.body.removeAttribute("aria-busy");
  }
};

// What was asked stands in the address, so that a reload, a bookmark or another tab shows the same.
const remember = () => {
  const kept = new URLSearchParams(Object.entries(question).filter(([, value]) => value));
  if (changes.length) kept.set("edits", JSON.stringify(changes));
  history.replaceState(null, "", `#${kept}`);
};

const recall = () => {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(question)) question[name] = kept.get(name) ?? "";
  try { changes = JSON.parse(kept.get("edits") ?? "[]"); } catch { changes = []; }
};

const read = async () => {
  for (const kind of ["change", "look"]) running[kind]?.abort();
  const data = await latest("read", "/api/read", question);
  if (!data) return;
  reading = data;
  outcome = pattern = null;
  byId("views").hidden = false;
  const patches = Boolean(question.other.trim());
  const kind = document.querySelector('input[name="kind"]:checked');
  document.querySelector('input[value="patch"]').disabled = !patches;
  if (!kind || (kind.value === "patch" && !patches)) document.querySelector(`input[value="${patches ? "patch" : "mean"}"]`).checked = true;
  head = strongest();
  byId("head").value = headName(head);
  remember();
  draw();
  await Promise.all([changes.length ? apply() : null, look()]);
};

const apply = async () => {
  remember();
  if (!changes.length) {
    running.change?.abort();
    outcome = null;
    draw();
    return look();
  }
  const asked = changes;
  const data = await latest("change", "/api/change", { ...question, changes: asked });
  if (data) {
    outcome = { ...data, changes: asked };
    draw();
    await look();
  } else if (asked === changes && !byId("problem").hidden) {  // refused: the page goes back to what it shows
    changes = outcome?.changes ?? [];
    remember();
    draw();
  }
};

const look = async () => {
  const data = await latest("look", "/api/look", { ...question, changes, layer: head[0], head: head[1] });
  if (!data) return;
  pattern = data;
  drawPattern();
};

/** The head with the largest share; the first head where there are no shares. */
const strongest = () => {
  let best = [0, 0], most = -1;
  reading.parts?.values.forEach((row, r) => row.forEach((value, c) => {
    if (reading.parts.heads[r][c] !== null && Math.abs(value) > most) {
      most = Math.abs(value);
      best = [Number(reading.parts.sites[r][c].split(".")[1]), reading.parts.heads[r][c]];
    }
  }));
  return best;
};

const same = (a, b) => ["kind", "site", "position", "head", "key"].every((name) => (a[name] ?? null) === (b[name] ?? null));
const covers = (site, position, number = null) => changes.some((one) =>
  one.site === site && (one.position ?? position) === position && (one.head ?? null) === number);

/** A click: an edit more, in place of the earlier ones or beside them; the same again takes it back. */
const press = (change) => {
  const there = changes.some((one) => same(one, change));
  const others = changes.filter((one) => !same(one, change));
  const beside = byId("add").checked;
  changes = there ? (beside ? others : []) : beside ? [...others, change] : [change];
  apply();
};

const pressAt = (site, position, number) => {
  const kind = chosen("kind");
  if (kind === "look") return;
  const change = { kind, site };
  if (chosen("where") === "one") change.position = position;
  if (number !== null) change.head = number;
  press(change);
};

// Drawing ------------------------------------------------------------------------------------------------------------

const say = (text) => {
  byId("readout").textContent = text;
  byId("readout").hidden = !text;
};
const leave = () => say("");

const shownLens = () => (outcome ?? reading).lens;
const lensGrid = new Grid(byId("lens"), {
  onFocus: (r, c) => {
    const cell = shownLens().top[r][c], before = reading.lens.top[r][c][0];
    const list = cell.map((one) => `${one.shown} ${chance(one.p)}`).join("  ");
    const was = outcome && before.id !== cell[0].id ? `; before: ${before.shown} ${chance(before.p)}` : "";
    say(`${shownLens().sites[r]} at ${at(c)}: ${list}${was}`);
  },
  onPress: (r, c) => pressAt(reading.lens.sites[r], c, null),
  onLeave: leave,
});

const drawLens = () => {
  const lens = shownLens();
  lensGrid.fill({
    corner: question.other.trim() ? ["text", "other text"] : "text",
    columns: reading.tokens.map((token, i) => {
      const origin = reading.aligned[i];
      const other = origin === null ? (question.other.trim() ? "—" : "") : reading.other_tokens[origin].shown;
      return other && other !== token.shown ? [token.shown, other] : [token.shown];
    }),
    rows: lens.sites.map(layerName),
    cells: lens.top.map((row, r) => row.map(([best], c) => ({
      text: best.shown, small: chance(best.p), css: step(best.p, 0, 1),
      selected: covers(lens.sites[r], c), changed: outcome !== null && best.id !== reading.lens.top[r][c][0].id,
    }))),
  });
  legend(byId("lens-legend"), 0, 1, "probability of the token shown");
};

const partsGrid = new Grid(byId("parts"), {
  onFocus: (r, c, focused) => {
    const { columns, sites, heads, values, controls, pairs } = reading.parts;
    const layer = Number(sites[r][c].split(".")[1]);
    say(`L${layer} ${columns[c]}: writes ${written(values[r][c], 3)} logits; ${pairs} random pairs of tokens: ${written(controls[r][c], 3)} (mean size)`);
    if (focused && heads[r][c] !== null) choose([layer, heads[r][c]]);
  },
  onPress: (r, c) => pressAt(reading.parts.sites[r][c], reading.tokens.length - 1, reading.parts.heads[r][c]),
  onLeave: leave,
});

const drawParts = () => {
  const parts = reading.parts;
  for (const id of ["parts", "parts-legend"]) byId(id).hidden = !parts;
  if (!parts) { byId("parts-about").textContent = reading.why_no_parts; return; }
  const reach = Math.max(...parts.values.flat().map(Math.abs)) || 1;
  byId("parts-about").textContent =
    `Shares of the logit of ${reading.answer.shown} minus that of ${reading.rival.shown} at the last token, without any edit: ` +
    `these ${written(parts.total - parts.rest)} and ${written(parts.rest)} from embeddings and biases are ${written(parts.total)}. ` +
    "A share is what a part writes directly, not what is lost without it: click to see that.";
  partsGrid.fill({
    corner: "layer",
    columns: parts.columns,
    rows: parts.sites.map((row) => layerName(row[0])),
    cells: parts.values.map((row, r) => row.map((value, c) => parts.sites[r][c] === "" ? null : {
      text: written(value), css: step(value, -reach, reach, "d"),
      selected: covers(parts.sites[r][c], reading.tokens.length - 1, parts.heads[r][c]),
    })),
  });
  legend(byId("parts-legend"), -reach, reach, `logits, for ${reading.answer.shown} and against it`, "d");
};

const patternGrid = new Grid(byId("pattern"), {
  onFocus: (r, c) => say(c > r ? "" : `${headName(head)}: ${at(r)} looks at ${at(c)} with ${written(pattern.values[r][c], 3)} of its attention`),
  onPress: (r, c) => press({ kind: "cut", site: pattern.site, position: r, head: head[1], key: c }),
  onLeave: leave,
});

const drawPattern = () => {
  const names = reading.tokens.map((token) => token.shown);
  const cut = (r, c) => changes.some((one) => one.kind === "cut" && one.site === pattern.site && one.head === head[1] && one.position === r && one.key === c);
  byId("_pattern_h").textContent = `Where head ${headName(head)} looks`;
  patternGrid.fill({
    corner: "from",
    columns: names,
    rows: names,
    cells: pattern.values.map((row, r) => row.map((value, c) => c > r && value === 0 ? null : {
      text: written(value), css: step(value, 0, 1), selected: cut(r, c),
    })),
  });
  legend(byId("pattern-legend"), 0, 1, "share of a token's attention");
};

const choose = (chosenHead) => {
  if (headName(chosenHead) === headName(head)) return;
  head = chosenHead;
  byId("head").value = headName(head);
  clearTimeout(choose.soon);
  choose.soon = setTimeout(look, 80);
};

const drawAnswer = () => {
  const rows = outcome?.answers ?? reading.answers.map((one) => ({ ...one, before: one.p, after: null, control: null }));
  const sorted = [...rows].sort((a, b) => Math.max(b.before, b.after ?? 0) - Math.max(a.before, a.after ?? 0));
  byId("chances").replaceChildren(...sorted.map((one) => {
    const bar = make("div", { className: "bar", ariaHidden: "true" });
    const mark = (kind, p) => {
      if (p === null) return;
      const part = make("i", { className: `mark-${kind}` });
      if (kind === "control") part.style.left = `${100 * p}%`; else part.style.width = `${100 * p}%`;
      bar.append(part);
    };
    mark("before", one.before);
    mark("after", one.after);
    mark("control", one.control);
    const number = (p) => make("td", { className: "number" }, p === null ? "–" : chance(p));
    return make("tr", {}, make("th", { scope: "row" }, one.shown), make("td", {}, bar), number(one.before), number(one.after), number(one.control));
  }));

  const best = sorted.reduce((a, b) => (b.before > a.before ? b : a));
  const pair = `${reading.answer.shown} minus ${reading.rival.shown}`;
  if (!outcome) {
    byId("effect").textContent = `The model says ${best.shown} (${chance(best.before)}). Logit of ${pair}: ${written(reading.difference)}. Click a cell to change the run.`;
  } else if (outcome.touched.every((one) => one.mean_abs_delta === 0)) {
    byId("effect").textContent = "This edit changes nothing: the value there is the same already.";
  } else {
    const now = sorted.reduce((a, b) => (b.after > a.after ? b : a));
    const { before, after, control, control_low, control_high, draws } = outcome.difference;
    const turned = best.id === now.id ? `The model still says ${now.shown}` : `The model says ${now.shown} in place of ${best.shown}`;
    byId("effect").textContent = `${turned} (${chance(now.after)}). Logit of ${pair}: ${written(before)} before, ${written(after)} after; ` +
      `noise of the same size, ${draws} draws: ${written(control)} [${written(control_low)} to ${written(control_high)}].`;
  }

  byId("edits").replaceChildren(...(changes.length ? changes.map(editLine) : [make("li", { className: "soft" }, "none")]));
  byId("undo").disabled = !changes.length;
  byId("code").hidden = !outcome;
  byId("python").textContent = outcome?.python ?? "";
};

const editLine = (change, i) => {
  const origin = change.kind === "patch" && change.position !== undefined ? reading.aligned[change.position] : null;
  const words = [change.kind, change.site];
  if (change.head !== undefined) words.push(`head ${change.head}`);
  words.push(change.position === undefined ? "at every token" : `at ${at(change.position)}`);
  if (change.key !== undefined) words.push(`→ ${at(change.key)}`);
  if (origin !== null) words.push(`← ${reading.other_tokens[origin].shown}`);
  const touched = outcome?.touched[i];
  const text = words.join(" ");
  const remove = make("button", { type: "button", className: "remove", ariaLabel: `Undo: ${text}` }, "×");
  remove.addEventListener("click", () => { changes = changes.filter((one) => one !== change); apply(); byId("undo").focus(); });
  return make("li", {}, make("span", {}, text, touched ? make("small", { className: "soft" }, ` mean |Δ| ${written(touched.mean_abs_delta, 3)}`) : ""), remove);
};

const draw = () => {
  drawLens();
  drawParts();
  drawAnswer();
  if (pattern) drawPattern();
};

// Beginning ----------------------------------------------------------------------------------------------------------

const FIELDS = { text: "text", other: "other", asked: "answer", rival: "rival" };
const toForm = () => { for (const [id, name] of Object.entries(FIELDS)) byId(id).value = question[name]; };
const submit = () => {
  for (const [id, name] of Object.entries(FIELDS)) question[name] = byId(id).value;
  changes = [];
  return read();
};

byId("question").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
for (const id of ["text", "other"]) {
  byId(id).addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); byId("question").requestSubmit(); }
  });
}
byId("undo").addEventListener("click", () => { changes = []; apply(); });
byId("copy").addEventListener("click", async () => {
  const button = byId("copy");
  try { await navigator.clipboard.writeText(byId("python").textContent); button.textContent = "Copied"; }
  catch { getSelection().selectAllChildren(byId("python")); button.textContent = "Selected"; }
  setTimeout(() => { button.textContent = "Copy"; }, 1600);
});
byId("head").addEventListener("change", () => { choose(byId("head").value.slice(1).split("H").map(Number)); });

const start = async () => {
  card = await latest("model", "/api/model");
  if (!card) return;
  document.title = `${card.name} · cutaway`;
  byId("title").textContent = `Look into ${card.name}`;
  byId("card").textContent = `${card.architecture}, ${card.layers} layers of ${card.heads} heads, width ${card.width}, ${card.parameters.toLocaleString("en")} parameters, ${card.dtype}`;
  byId("version").textContent = `cutaway ${card.version}`;
  for (let layer = 0; layer < card.layers; layer++) {
    for (let number = 0; number < card.heads; number++) byId("head").append(make("option", {}, headName([layer, number])));
  }
  byId("examples").append(...card.examples.map((example) => {
    const button = make("button", { type: "button", title: example.other }, example.text);
    button.addEventListener("click", () => { Object.assign(question, example, { answer: "", rival: "" }); toForm(); submit(); });
    return button;
  }));
  recall();
  if (!question.text) Object.assign(question, card.examples[0]);
  toForm();
  await read();
};

start();
