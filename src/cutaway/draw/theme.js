"use strict";
// Light and dark: the reader's choice wins over the system's. It stands before what is drawn, so that nothing flashes.
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  try { const kept = localStorage.getItem("cutaway-theme"); if (kept) root.dataset.theme = kept; } catch {}
  document.addEventListener("DOMContentLoaded", () => {
    document.querySelector(".theme")?.addEventListener("click", () => {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      try { localStorage.setItem("cutaway-theme", root.dataset.theme); } catch {}
    });
  });
})();
