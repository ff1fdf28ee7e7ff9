"use strict";
(() => {
  const root = document.documentElement;
  const all = (css, inside = document) => [...inside.querySelectorAll(css)];
  const tip = document.createElement("div");
  tip.className = "cw-tip-box";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.append(tip);

  // Copy a command line. A page opened from disk may be denied the clipboard, so there is a second way.
  const copied = (button, word) => {
    button.textContent = word;
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  };
  const select = (code) => {
    const range = document.createRange();
    range.selectNodeContents(code);
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
  };
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        copied(button, "Copied");
      } catch {
        select(code);
        copied(button, document.execCommand("copy") ? "Copied" : "Selected");
      }
    });
  }

  // Tooltips at once, in place of the browser's slow ones.
  const words = (part) => {
    if (part.dataset.tip === undefined) {
      const title = part.querySelector(":scope > title");
      part.dataset.tip = title ? title.textContent : part.title ?? "";
      if (title) { part.setAttribute("aria-label", part.dataset.tip); title.remove(); } else part.removeAttribute("title");
    }
    return part.dataset.tip;
  };
  const show = (part) => {
    tip.textContent = words(part);
    tip.hidden = !tip.textContent;
    const box = part.getBoundingClientRect();
    const left = box.left + box.width / 2 - tip.offsetWidth / 2;
    tip.style.left = Math.max(6, Math.min(left, innerWidth - tip.offsetWidth - 6)) + "px";
    tip.style.top = (box.top > tip.offsetHeight + 10 ? box.top - tip.offsetHeight - 6 : box.bottom + 6) + "px";
  };
  const hide = () => { tip.hidden = true; };
  const tipped = (target) => target.closest && target.closest(".cw-cell, .cw-point, [title], [data-tip]");
  document.addEventListener("pointerover", (event) => {
    const part = tipped(event.target);
    if (part) show(part); else hide();
  });
  document.addEventListener("scroll", hide, { passive: true, capture: true });

  // What has values takes the focus, and arrow keys go from one to the next.
  const walk = (root, cells, columns) => {
    if (!cells.length) return;
    root.tabIndex = 0;
    let here = -1;
    const go = (to) => {
      if (here >= 0) cells[here].classList.remove("cw-here");
      here = to;
      if (here < 0) return hide();
      cells[here].classList.add("cw-here");
      cells[here].scrollIntoView({ block: "nearest", inline: "nearest", behavior: "instant" });
      requestAnimationFrame(() => { if (here >= 0) show(cells[here]); });
    };
    root.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
      if (event.key === "Escape") return go(-1);
      if (!step) return;
      event.preventDefault();
      const to = here < 0 ? 0 : here + step;
      if (to >= 0 && to < cells.length) go(to);
    });
    root.addEventListener("blur", () => go(-1));
  };
  for (const map of all(".cw-heatmap")) walk(map, all(".cw-cell", map), Number(map.dataset.columns));
  for (const grid of all(".cw-lens")) walk(grid, all("td", grid), all("tr:first-child td", grid).length);
  for (const run of all(".cw-token-run")) walk(run, all("span[title]", run), 1);
  for (const chart of all(".cw-line")) walk(chart, all(".cw-point", chart), 1);
  for (const circuit of all(".cw-circuit")) walk(circuit, all(".cw-part, .cw-link", circuit), 1);

  // A box takes the focus only while it has something to scroll that the keyboard would not reach otherwise.
  const boxes = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const scrolls = target.scrollWidth > target.clientWidth + 1 && !target.querySelector('[tabindex="0"], button');
      scrolls ? target.setAttribute("tabindex", "0") : target.removeAttribute("tabindex");
    }
  });

  // A table sorts by the column whose name is pressed: numbers by size, largest first, then the other way.
  const amount = (text) => {
    const found = /^[-−+<]?\s*([\d,]*\.?\d+)(?:×10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+))?/.exec(text);
    if (!found) return NaN;
    const power = [...found[2] ?? ""].map((sign) => "⁰¹²³⁴⁵⁶⁷⁸⁹".indexOf(sign)).map((digit) => digit < 0 ? "-" : digit).join("");
    return (/^[-−]/.test(text) ? -1 : 1) * Number(found[1].replaceAll(",", "")) * 10 ** Number(power || 0);
  };
  for (const table of all(".cw-table")) {
    const body = table.tBodies[0];
    if (body.rows.length < 3) continue;
    all("thead th", table).forEach((head, column) => {
      if (!head.textContent) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.ariaSort !== "descending";
        for (const other of all("th", table)) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => row.cells[column].textContent.trim();
        const order = (a, b) => {
          const [x, y] = [amount(key(a)), amount(key(b))];
          if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
          const found = isNaN(x) ? key(b).localeCompare(key(a)) : y - x;
          return down ? found : -found;
        };
        body.append(...[...body.rows].sort(order));
      });
    });
  }
  for (const box of all(".cw-wide")) boxes.observe(box);

  // The contents mark the section that is being read.
  const links = new Map([...document.querySelectorAll(".toc a")].map((a) => [a.getAttribute("href").slice(1), a]));
  const seen = new Set();
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) entry.isIntersecting ? seen.add(entry.target.id) : seen.delete(entry.target.id);
    const first = [...links.keys()].find((id) => seen.has(id));
    if (first === undefined) return;
    for (const [id, link] of links) id === first ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  }, { rootMargin: "-15% 0px -65% 0px" });
  for (const id of links.keys()) {
    const section = document.getElementById(id);
    if (section) watch.observe(section);
  }

  // Paper cannot be unfolded.
  addEventListener("beforeprint", () => { for (const fold of document.querySelectorAll("details")) fold.open = true; });
})();
