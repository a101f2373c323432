// What opens over the page: pixels, help, the guideline, a report. label.js holds the question that they are about.
"use strict";

const zoom = document.getElementById("zoom");
const reporting = document.getElementById("report");

// ---------------------------------------------------------------- pixels

let zoomed = 0, scale = 1;

function look(index) {
  if (!images.length) return;
  zoomed = (index + images.length) % images.length;
  const source = pictures()[zoomed], picture = zoom.querySelector("img");
  if (!blurred(zoomed)) seen.add(zoomed);
  mark();
  if (!source.naturalWidth) { // not loaded yet
    source.decode().then(() => source.isConnected && look(index), () => say("This image cannot be loaded."));
    return;
  }
  if (!zoom.open) {
    zoom.showModal();
    const box = zoom.querySelector(".scroll");
    scale = Math.max(1, Math.floor(Math.min((box.clientWidth - 24) / source.naturalWidth, (box.clientHeight - 24) / source.naturalHeight)));
  }
  picture.src = source.src;
  picture.alt = `Image ${zoomed + 1} of ${images.length}${blurred(zoomed) ? ", reported and blurred" : ""}`;
  picture.classList.toggle("blurred", blurred(zoomed));
  picture.width = source.naturalWidth * scale;
  picture.height = source.naturalHeight * scale;
  zoom.querySelector(".bar span").textContent = `${zoomed + 1} of ${images.length} · ${scale} : 1`;
}

function zoomAct(what) {
  if (what === "close") return zoom.close();
  if (what === "report") {
    zoom.close();
    return report(zoomed);
  }
  if (what === "in") scale = Math.min(32, scale + Math.max(1, Math.floor(scale / 3)));
  if (what === "out") scale = Math.max(1, scale - Math.max(1, Math.floor(scale / 4)));
  look(zoomed + (what === "following") - (what === "previous"));
}

function zoomKey(event) {
  const keys = { ArrowLeft: "previous", ArrowRight: "following", "+": "in", "=": "in", "-": "out", z: "close", Z: "close", r: "report", R: "report" };
  if (!keys[event.key]) return;
  event.preventDefault();
  zoomAct(keys[event.key]);
}

// ---------------------------------------------------------------- reports

// An image that others reported is blurred until the rater chooses to see it.
const blurred = (index) => tiles[index].classList.contains("hidden");

function reveal(index) {
  tiles[index].classList.remove("hidden");
  tiles[index].querySelector(".flag").remove();
  mark();
}

function report(place) {
  if (busy || middle.dataset.state !== "question") return;
  const index = (place + images.length) % images.length, picture = reporting.querySelector("img");
  reporting.dataset.index = index;
  document.getElementById("report-title").textContent = `Report image ${index + 1} of ${images.length}`;
  reporting.querySelector("[data-reason=withdrawn]").hidden = !tiles[index].classList.contains("mine");
  picture.src = pictures()[index].src;
  picture.alt = `Image ${index + 1}`;
  picture.classList.toggle("blurred", blurred(index));
  if (!reporting.open) reporting.showModal();
}

reporting.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step) report(Number(reporting.dataset.index) + step);
});

function sendReport(reason) {
  reporting.close();
  send("report", { ticket: middle.dataset.ticket, image: Number(reporting.dataset.index), reason });
}

// ---------------------------------------------------------------- help and guideline

function openSheet(name, content) {
  const dialog = document.getElementById(name);
  dialog.querySelector(".text").replaceChildren(content.content.cloneNode(true));
  dialog.showModal();
  dialog.querySelector("h2").focus();
}

function help() {
  const keys = document.getElementById("keys");
  if (keys) openSheet("help", keys);
}

function guide() {
  if (document.getElementById("guide")) openSheet("guideline", document.getElementById("whole"));
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("dialog button");
  if (!button) return;
  if (button.dataset.do) zoomAct(button.dataset.do);
  if (button.dataset.step) report(Number(reporting.dataset.index) + Number(button.dataset.step));
  if (button.dataset.reason) sendReport(button.dataset.reason);
  if (button.classList.contains("close")) button.closest("dialog").close();
});
