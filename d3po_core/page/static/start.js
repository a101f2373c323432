// The first page follows what waits for the rater, without a reload: focus and reading place stay.
"use strict";

const entries = document.getElementById("entries"), note = document.getElementById("note");
let before = null;

function show({ html, waiting }) {
  if (html === before) return;
  const focused = document.activeElement.closest?.("#entries a")?.getAttribute("href");
  const more = waiting > Number(entries.dataset.waiting);
  entries.innerHTML = before = html;
  entries.dataset.waiting = waiting;
  document.title = `${waiting ? `(${waiting}) ` : ""}d3po label`;
  note.textContent = more ? "New images wait for you." : "";
  if (focused) entries.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
}

async function follow() {
  try {
    const response = await fetch("/waiting", { signal: AbortSignal.timeout(10000) });
    const reply = await response.json();
    if (response.ok) show(reply);
    else note.textContent = reply.error || "The server does not answer as it should; trying again.";
  } catch {
    note.textContent = "No connection to the server; trying again.";
  }
  setTimeout(follow, 5000);
}

follow();
