// Before the page is painted, or a dark page would flash light. Only this choice is kept for long.
"use strict";
(() => {
  const SLOT = "deltaserve.theme";
  const root = document.documentElement;
  const read = () => {
    try {
      return localStorage.getItem(SLOT) ?? "system";
    } catch {
      return "system"; // storage is switched off
    }
  };
  root.dataset.theme = read();
  document.addEventListener("DOMContentLoaded", () => {
    const choice = document.getElementById("theme");
    choice.value = root.dataset.theme;
    choice.addEventListener("change", () => {
      root.dataset.theme = choice.value;
      try {
        localStorage.setItem(SLOT, choice.value);
      } catch {
        // It holds until the page is left.
      }
    });
  });
})();
