// Light or dark: what the browser prefers, until the rater chooses. It runs before the page is painted.
"use strict";

(() => {
  const key = "d3po theme", dark = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => ["light", "dark"].find((one) => one === localStorage.getItem(key));
  const apply = () => { document.documentElement.dataset.theme = chosen() || (dark.matches ? "dark" : "light"); };
  apply();
  dark.addEventListener("change", apply);
  window.addEventListener("storage", apply); // chosen in another window
  document.addEventListener("click", (event) => {
    if (!event.target.closest("button.theme")) return;
    localStorage.setItem(key, document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    apply();
  });
})();
