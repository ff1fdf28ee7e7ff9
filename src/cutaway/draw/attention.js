for (const root of document.querySelectorAll(".cw-att:not([data-live])")) {
  root.dataset.live = "";
  root.classList.add("cw-att-live");
  const p = Number(root.dataset.p), find = (css) => root.querySelector(css);
  const heads = [...root.querySelectorAll(".cw-att-head")], tokens = [...root.querySelectorAll(".cw-att-token")];
  const text = find(".cw-att-text"), grid = find(".cw-att-grid"), big = find(".cw-att-big"), say = find(".cw-att-say");
  const canvas = find("canvas"), rowMark = find(".cw-att-q"), columnMark = find(".cw-att-k"), title = find(".cw-att-head-name");
  let values = null, head = null, here = p - 1, pinned = false, wanted = 0;

  // The numbers are the opacity samples of the head's own PNG: signature and header, then one IDAT of unfiltered lines.
  async function read(element) {
    const png = Uint8Array.from(atob(/base64,([^)"']+)/.exec(element.firstElementChild.style.getPropertyValue("--m"))[1]), (c) => c.charCodeAt(0));
    const view = new DataView(png.buffer), side = view.getUint32(16), length = view.getUint32(33);
    const stream = new Blob([png.subarray(41, 41 + length)]).stream().pipeThrough(new DecompressionStream("deflate"));
    const lines = new Uint8Array(await new Response(stream).arrayBuffer()), f = side / p;
    return Float32Array.from({ length: p * p }, (_, n) => lines[Math.floor(n / p) * f * (2 * side + 1) + 2 + 2 * f * (n % p)] / 255);
  }

  async function choose(element) {
    const turn = ++wanted, found = await read(element);
    if (turn !== wanted) return;
    values = found;
    head = element;
    for (const other of heads) {
      other.setAttribute("aria-checked", other === element);
      other.tabIndex = other === element ? 0 : -1;
    }
    title.textContent = element.dataset.name;
    paint();
    show(here);
  }

  function paint() {
    const f = Math.max(1, Math.round(704 / p)), pen = canvas.getContext("2d");
    canvas.width = canvas.height = p * f;
    const probe = document.createElement("i");
    probe.style.color = "var(--accent)";
    root.append(probe);
    pen.fillStyle = getComputedStyle(probe).color;
    probe.remove();
    values.forEach((value, n) => {
      if (!value) return;
      pen.globalAlpha = value;
      pen.fillRect((n % p) * f, Math.floor(n / p) * f, f, f);
    });
  }

  const word = (i) => { const b = document.createElement("b"); b.textContent = tokens[i].textContent; return b; };
  function list(cells) {
    const top = cells.filter(([, v]) => v >= 0.005).sort((a, b) => b[1] - a[1]).slice(0, 4);
    return top.length ? top.flatMap(([i, v], n) => [n ? ", " : "", word(i), ` (${i}) ${v.toFixed(2)}`]) : ["nothing"];
  }

  function show(i, column = null) {
    here = i;
    const looks = tokens.map((_, j) => [j, values[i * p + j]]).filter(([j]) => j <= i);
    const looked = tokens.map((_, j) => [j, values[j * p + i]]).filter(([j]) => j > i);
    for (const [j, v] of looks) tokens[j].className = "cw-att-token" + (v >= 0.005 ? ` cw-s${Math.round(v * 10)}` : "");
    for (const [j, v] of looked) tokens[j].className = "cw-att-token" + (v >= 0.005 ? ` cw-d${5 - Math.ceil(v * 5)}` : "");
    tokens.forEach((token, j) => {
      token.classList.toggle("cw-att-here", j === i);
      token.tabIndex = j === i ? 0 : -1;
      token.setAttribute("aria-pressed", pinned && j === i);
    });
    rowMark.style.cssText = `top:${100 * i / p}%;height:${100 / p}%`;
    columnMark.style.cssText = column === null ? "display:none" : `left:${100 * column / p}%;width:${100 / p}%`;
    const cell = column === null ? [] : ["; at ", word(column), ` (${column}) ${values[i * p + column].toFixed(3)}`];
    say.replaceChildren(word(i), ` (${i}) looks at `, ...list(looks), "; looked at by ", ...list(looked), ...cell, pinned ? " · held, Escape lets go" : "");
  }

  const pin = (i) => { pinned = !(pinned && i === here); show(i); };
  function move(items, event, step, act) {
    const at = items.indexOf(event.currentTarget);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + step, ArrowUp: at - step, Home: 0, End: items.length - 1 }[event.key];
    if (to === undefined) return false;
    event.preventDefault();
    const target = items[Math.max(0, Math.min(items.length - 1, to))];
    target.focus();
    act(target);
    return true;
  }

  text.setAttribute("role", "group");
  grid.setAttribute("role", "radiogroup");
  tokens.forEach((token, i) => {
    token.setAttribute("role", "button");
    token.addEventListener("pointerenter", () => { if (values && !pinned) show(i); });
    token.addEventListener("click", () => values && pin(i));
    token.addEventListener("keydown", (event) => {
      if (!values || move(tokens, event, 1, (to) => show(tokens.indexOf(to)))) return;
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pin(i); }
    });
  });
  const inRow = Math.max(...[...root.querySelectorAll(".cw-att-row")].map((row) => row.querySelectorAll(".cw-att-head").length));
  for (const element of heads) {
    element.setAttribute("role", "radio");
    element.addEventListener("click", () => choose(element));
    element.addEventListener("keydown", (event) => {
      if (!move(heads, event, inRow, choose) && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); choose(element); }
    });
  }
  root.addEventListener("keydown", (event) => { if (event.key === "Escape" && pinned) { pinned = false; show(here); } });
  big.addEventListener("pointermove", (event) => {
    if (!values) return;
    const box = canvas.getBoundingClientRect(), place = (x, size) => Math.max(0, Math.min(p - 1, Math.floor(x / size * p)));
    show(pinned ? here : place(event.clientY - box.top, box.height), place(event.clientX - box.left, box.width));
  });
  big.addEventListener("pointerleave", () => values && show(here));
  big.addEventListener("click", () => values && pin(here));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => values && paint());
  for (const element of [big, title, find(".cw-att-key")]) element.hidden = false;
  choose(heads.find((element) => "start" in element.dataset) ?? heads[0]);
}
