// Pieces that every live page is made of: elements, numbers, colour scales with legends, grids of cells, requests.

/** An element with properties and children; text is only ever text. */
export const make = (tag, properties = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value; else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
};

export const byId = (id) => document.getElementById(id);

/** A number as the other pages write it: a true minus sign, so many decimals. */
export const written = (value, decimals = 2) => {
  const text = value.toFixed(decimals);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
};

/** The class of one of eleven steps of colour, the scales of cutaway.css. */
export const step = (value, low, high, letter = "s") => {
  const place = high > low ? (value - low) / (high - low) : 0.5;
  return `cw-${letter}${Math.round(10 * Math.min(1, Math.max(0, place)))}`;
};

/** A strip of the eleven steps with the numbers at its ends. */
export const legend = (box, low, high, units, letter = "s") => {
  const ends = letter === "d" ? [low, 0, high] : [low, high];
  const strip = make("div", { className: "cw-legend-strip", ariaHidden: "true" });
  for (let i = 0; i < 11; i++) strip.append(make("i", { className: `cw-${letter}${i}` }));
  const numbers = make("div", { className: "cw-legend-ends" }, ...ends.map((end) => make("span", {}, written(end, 2))));
  [...numbers.children].forEach((number, i) => number.style.setProperty("--at", i / (ends.length - 1)));
  box.className = "cw-legend";
  box.replaceChildren(make("div", { className: "cw-legend-scale" }, strip, numbers), make("span", { className: "cw-legend-units" }, units));
};

/**
 * A table whose cells are reached by arrow keys and pressed by a click, Enter or Space; one of them is in the tab order.
 *
 * fill({corner, columns, rows, cells}): heads are texts or [text, small text]; a cell is {text, small, css, label,
 * selected, changed}, or null where there is nothing. onFocus(row, column) and onPress(row, column) are told.
 */
export class Grid {
  constructor(table, { onFocus, onPress, onLeave }) {
    Object.assign(this, { table, onFocus, onPress, onLeave, here: [0, 0] });
    table.setAttribute("role", "grid");
    table.setAttribute("aria-multiselectable", "true");
    table.addEventListener("keydown", (event) => this.#key(event));
    table.addEventListener("focusin", (event) => this.#focused(event.target.closest("td")));
    table.addEventListener("focusout", () => onLeave());
    table.addEventListener("click", (event) => {
      const cell = event.target.closest("td");
      if (!cell) return;
      cell.focus({ preventScroll: true });
      this.#press(cell);
    });
    table.addEventListener("pointerover", (event) => {
      const cell = event.target.closest("td");
      if (cell && event.pointerType === "mouse") onFocus(...this.#place(cell), false);
    });
    table.addEventListener("pointerleave", () => {
      const cell = document.activeElement.closest?.("td");
      if (cell && table.contains(cell)) onFocus(...this.#place(cell), false); else onLeave();
    });
  }

  fill({ corner, columns, rows, cells }) {
    const shape = `${rows.length}×${columns.length}`;
    if (this.shape !== shape) this.#build(rows.length, columns.length);
    this.shape = shape;
    const head = (th, name) => th.replaceChildren(...[name].flat().map((part, i) => make(i ? "small" : "span", {}, part)));
    head(this.table.tHead.rows[0].cells[0], corner);
    columns.forEach((name, c) => head(this.table.tHead.rows[0].cells[c + 1], name));
    rows.forEach((name, r) => {
      head(this.#row(r).cells[0], name);
      cells[r].forEach((cell, c) => this.#cell(this.#row(r).cells[c + 1], cell));
    });
    const [r, c] = this.here;
    if (r >= rows.length || c >= columns.length) this.here = [0, 0];
    this.#tab();
  }

  #build(rows, columns) {
    const th = (scope) => make("th", { scope });
    const top = make("tr", {}, th("col"), ...Array.from({ length: columns }, () => th("col")));
    const body = make("tbody");
    for (let r = 0; r < rows; r++) body.append(make("tr", {}, th("row"), ...Array.from({ length: columns }, () => make("td", { tabIndex: -1 }))));
    this.table.replaceChildren(make("thead", {}, top), body);
  }

  #row(r) { return this.table.tBodies[0].rows[r]; }

  #cell(td, cell) {
    td.className = cell ? `${cell.css}${cell.changed ? " changed" : ""}` : "none";
    td.setAttribute("aria-selected", String(Boolean(cell?.selected)));
    if (cell?.label) td.setAttribute("aria-label", cell.label); else td.removeAttribute("aria-label");
    td.replaceChildren(...(cell ? [make("span", {}, cell.text), ...(cell.small ? [make("small", {}, cell.small)] : [])] : []));
  }

  #place(td) { return [td.parentElement.rowIndex - 1, td.cellIndex - 1]; }

  #tab() {
    for (const td of this.table.querySelectorAll("td[tabindex='0']")) td.tabIndex = -1;
    this.#row(this.here[0]).cells[this.here[1] + 1].tabIndex = 0;
  }

  #focused(td) {
    if (!td) return;
    this.here = this.#place(td);
    this.#tab();
    td.setAttribute("aria-describedby", "readout");
    this.onFocus(...this.here, true);
  }

  #press(td) { if (!td.classList.contains("none")) this.onPress(...this.#place(td)); }

  #key(event) {
    const td = event.target.closest("td");
    if (!td || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); return this.#press(td); }
    const [r, c] = this.#place(td), last = [this.table.tBodies[0].rows.length - 1, td.parentElement.cells.length - 2];
    const to = {
      ArrowUp: [r - 1, c], ArrowDown: [r + 1, c], ArrowLeft: [r, c - 1], ArrowRight: [r, c + 1],
      Home: [r, 0], End: [r, last[1]], PageUp: [0, c], PageDown: [last[0], c],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    if (to[0] < 0 || to[1] < 0 || to[0] > last[0] || to[1] > last[1]) return;
    const next = this.#row(to[0]).cells[to[1] + 1];
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
}

/** Ask the server; a refusal is thrown as its sentence. */
export const ask = async (path, body, signal) => {
  let answer;
  try {
    answer = await fetch(path, body === undefined ? { signal } : {
      method: "POST", signal, headers: { "content-type": "application/json" }, body: JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer; start cutaway open again.");
  }
  const data = await answer.json();
  if (!answer.ok) throw new Error(data.error);
  return data;
};
