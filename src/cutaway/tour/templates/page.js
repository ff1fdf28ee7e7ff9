"use strict";
(() => {
  const root = document.documentElement;
  const tip = document.querySelector(".tip");

  // Light and dark: the reader's choice wins over the system's.
  document.querySelector(".theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("cutaway-theme", root.dataset.theme); } catch {}
  });

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
      part.dataset.tip = title ? title.textContent : part.title;
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

  // Arrow keys go from cell to cell of a heatmap.
  for (const map of document.querySelectorAll(".cw-heatmap")) {
    const cells = [...map.querySelectorAll(".cw-cell")];
    const columns = Number(map.dataset.columns);
    let here = -1;
    const go = (to) => {
      if (here >= 0) cells[here].classList.remove("cw-here");
      here = to;
      if (here < 0) return hide();
      cells[here].classList.add("cw-here");
      cells[here].scrollIntoView({ block: "nearest", inline: "nearest", behavior: "instant" });
      requestAnimationFrame(() => show(cells[here]));
    };
    map.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
      if (event.key === "Escape") return go(-1);
      if (!step) return;
      event.preventDefault();
      const to = here < 0 ? 0 : here + step;
      if (to >= 0 && to < cells.length) go(to);
    });
    map.addEventListener("blur", () => go(-1));
  }

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
