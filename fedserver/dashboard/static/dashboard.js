// What changes without a reload: one event stream a page, local times, and a deadline that counts down.
"use strict";

function showTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    const when = new Date(time.dateTime);
    time.title = time.dateTime;
    time.textContent = when.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
  }
}

function countDown() {
  for (const place of document.querySelectorAll("[data-deadline]")) {
    const left = Math.max(0, Number(place.dataset.deadline) - Date.now() / 1000);
    const minutes = Math.floor(left / 60);
    place.textContent = minutes >= 60 ? `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`
      : minutes ? `${minutes} min ${String(Math.floor(left % 60)).padStart(2, "0")} s` : `${Math.floor(left)} s`;
  }
}

function replace(id, html, shown) {
  const place = document.getElementById(id);
  if (!place || shown.get(id) === html) return;
  shown.set(id, html);
  const focused = place.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  const scrolled = place.querySelector(".scroll")?.scrollLeft || 0;
  place.innerHTML = html;
  if (scrolled) place.querySelector(".scroll").scrollLeft = scrolled;
  if (focused) place.querySelector(`[href="${CSS.escape(focused)}"]`)?.focus();
  showTimes(place);
  htmx.process(place);
}

function follow(address) {
  const shown = new Map();
  const status = document.getElementById("connection");
  const onFirstPage = !new URLSearchParams(location.search).get("page") && !new URLSearchParams(location.search).get("sort");
  const stream = new EventSource(address);
  let version = document.body.dataset.version, drawn = "";
  stream.onopen = () => { status.textContent = "live"; };
  stream.onerror = () => { status.textContent = stream.readyState === EventSource.CLOSED ? "signed out; reload the page" : "connection lost; trying again"; };
  stream.onmessage = (message) => {
    const told = JSON.parse(message.data);
    for (const [id, html] of Object.entries(told.fragments || {})) {
      if (id !== "arrivals" || onFirstPage) replace(id, html, shown);
    }
    const columns = told.charts && JSON.stringify(told.charts);
    if (columns && columns !== drawn) { drawn = columns; drawAll(told.charts); }
    if (told.changed && told.version !== version) htmx.trigger(document.body, "run-changed");
    version = told.version;
    countDown();
    document.body.dataset.events = String(Number(document.body.dataset.events || 0) + 1);
  };
  addEventListener("pagehide", () => stream.close());
}

// What follows the run on a page without fragments of its own: the whole page is fetched once for all of it,
// and no sooner than a second after it was fetched last. Its address is the present one, with what is searched.
const PAUSE_MILLISECONDS = 1000;
let fetching = false, again = false, timer = 0, fetched = -PAUSE_MILLISECONDS;

function fetchAnew() {
  if (fetching) again = true;
  if (fetching || timer) return;
  timer = setTimeout(() => {
    timer = 0;
    const follows = [...document.querySelectorAll("[data-follows]")].map((place) => `#${place.id}`);
    if (!follows.length) return;
    fetching = true;
    fetched = performance.now();
    const element = document.getElementById("follow");
    element.setAttribute("hx-select-oob", follows.join(","));
    htmx.trigger(element, "fetch");
  }, Math.max(0, fetched + PAUSE_MILLISECONDS - performance.now()));
}

function fetchWhenAsked() {
  document.body.addEventListener("run-changed", fetchAnew);
  document.body.addEventListener("htmx:afterRequest", (event) => {
    if (event.target.id !== "follow") return;
    fetching = false;
    if (again) fetchAnew();
    again = false;
  });
  for (const place of document.querySelectorAll("[data-every]")) setInterval(fetchAnew, 1000 * Number(place.dataset.every));
}

document.addEventListener("DOMContentLoaded", () => {
  showTimes(document);
  countDown();
  setInterval(countDown, 1000);
  document.body.addEventListener("htmx:afterSwap", (event) => showTimes(event.target));
  document.body.addEventListener("htmx:oobAfterSwap", (event) => showTimes(event.target));
  // Not under the hands of somebody who is choosing an action or filling its form.
  document.body.addEventListener("htmx:oobBeforeSwap", (event) => {
    const place = event.detail.target;
    if (place.id === "actions" && (place.contains(document.activeElement) || place.querySelector("details[open]"))) event.detail.shouldSwap = false;
  });
  document.body.addEventListener("htmx:responseError", (event) => {
    document.getElementById("connection").textContent = event.detail.xhr.status === 401 ? "signed out; reload the page" : "the server refused; reload the page";
  });
  fetchWhenAsked();
  if (document.body.dataset.stream) follow(document.body.dataset.stream);
});
