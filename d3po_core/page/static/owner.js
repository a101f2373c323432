// Polls the part of the page that changes, and sends what the owner does. The server renders everything visible.
"use strict";

const owner = document.getElementById("owner");
const live = document.getElementById("live");
const note = document.getElementById("note");
const { base } = owner.dataset;
const POLL = 3000;
let last = live.innerHTML.trim(), sending = 0;

function say(text, stays = false) {
  note.textContent = text;
  clearTimeout(say.timer);
  if (text && !stays) say.timer = setTimeout(() => { note.textContent = ""; }, 6000);
}

// Replaces the changing part; what had the focus keeps it.
function show(html) {
  if (html.trim() === last) return;
  const { act, rater } = document.activeElement?.dataset ?? {};
  const radio = live.contains(document.activeElement) && document.activeElement.name === "assignment";
  last = html.trim();
  live.innerHTML = html;
  const same = [...live.querySelectorAll("[data-act]")].filter((one) => one.dataset.rater === rater);
  if (act) (same.find((one) => one.dataset.act === act) ?? same[0])?.focus({ preventScroll: true });
  if (radio) live.querySelector("[name=assignment]:checked")?.focus({ preventScroll: true });
}

async function ask(where, content) {
  const options = content === undefined ? {} : {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(content),
  };
  const response = await fetch(`${base}/${where}`, { ...options, signal: AbortSignal.timeout(15000) });
  const reply = await response.json();
  if (!response.ok) throw new Error(reply.error || "The server did not accept it.");
  return reply;
}

// Resolves to the server's reply, null if there was none; whatever went wrong is said.
async function send(where, content) {
  sending += 1;
  try {
    const reply = await ask(where, content);
    show(reply.html);
    say(reply.note);
    return reply;
  } catch (error) {
    say(error.name === "Error" ? error.message : "No connection to the server; nothing was changed.", true);
    return null;
  } finally {
    sending -= 1;
  }
}

async function poll() {
  if (!document.hidden && !sending) {
    try {
      const reply = await ask("next");
      if (!sending) show(reply.html);
      if (poll.failed) say("");
      poll.failed = false;
    } catch (error) {
      poll.failed = true;
      say(error.name === "Error" ? error.message : "No connection to the server; trying again.", true);
    }
  }
  setTimeout(poll, POLL);
}

// ---------------------------------------------------------------- dialogs

function open(id, title) {
  const dialog = document.getElementById(id);
  dialog.querySelector("h2").textContent = title;
  dialog.showModal();
  return dialog;
}

function showLink(reply) {
  if (!reply) return;
  document.getElementById("link-local").hidden = !reply.local;
  document.getElementById("link-value").value = reply.link;
  document.getElementById("link-text").value = reply.text;
  open("link-dialog", `Link of ${reply.rater}`);
}

async function copy(field) {
  field.select();
  try {
    await navigator.clipboard.writeText(field.value);
    say("Copied.");
  } catch { // no clipboard over plain HTTP from another machine
    say("The browser does not allow copying here; the text is selected, press Ctrl+C.");
  }
}

const acts = {
  link: ({ rater }) => send("link", { rater }).then(showLink),
  invite: ({ rater, quota }) => send("invite", { rater, quota: Number(quota) }).then(showLink),
  quota: ({ rater, quota }) => {
    const dialog = open("quota-dialog", `Quota of ${rater}`);
    dialog.querySelector("input").value = quota;
    dialog.onsent = () => send("quota", { rater, quota: Number(dialog.querySelector("input").value) });
  },
  revoke: ({ rater }) => {
    open("revoke-dialog", `Revoke the link of ${rater}?`).onsent = () => send("revoke", { rater });
  },
};

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.act) acts[button.dataset.act](button.dataset);
  if (button.dataset.copy) copy(document.getElementById(button.dataset.copy));
  if (button.classList.contains("close")) button.closest("dialog").close();
});

document.addEventListener("submit", (event) => {
  event.preventDefault();
  const dialog = event.target.closest("dialog");
  if (dialog) {
    dialog.close();
    dialog.onsent();
    return;
  }
  const form = event.target;
  send("invite", { rater: form.rater.value.trim(), quota: Number(form.quota.value) }).then((reply) => {
    if (!reply) return;
    form.reset();
    showLink(reply);
  });
});

document.addEventListener("change", (event) => {
  if (event.target.name !== "assignment") return;
  last = null; // a refused change must be shown as refused
  send("assignment", { assignment: event.target.value }).then((reply) => reply || ask("next").then((now) => show(now.html)));
});

setTimeout(poll, POLL);
