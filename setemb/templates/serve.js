"use strict";
// Everything that came from outside is put in as text, never as markup.
const at = (id) => document.getElementById(id);
let latest = 0;

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function pairTable(pairs) {
  const table = element("table", { className: "pairs" });
  table.append(element("tr", {}, element("th"), ...pairs[0].map((_, i) => element("th", {}, String(i + 1)))));
  pairs.forEach((line, i) => {
    const best = Math.max(...line);
    const row = element("tr", {}, element("th", {}, String(i + 1)));
    for (const value of line) {
      const cell = element("td", { className: value === best ? "best" : "" }, value.toFixed(2));
      cell.style.setProperty("--share", `${Math.round(100 * Math.max(0, value))}%`);
      row.append(cell);
    }
    table.append(row);
  });
  return element("details", {}, element("summary", { className: "note" }, "what each slot matched"), table);
}

function card(hit, pictured) {
  const pair = element("div", { className: "pair" });
  if (pictured) {
    const image = element("img", { src: `/picture/${hit.row}`, alt: hit.id, loading: "lazy" });
    pair.append(element("span", { className: "thumb plain" }, image));
  }
  const note = element("span", { className: "note" }, hit.id, element("br"), `similarity ${hit.score.toFixed(3)}`);
  for (const [key, value] of Object.entries(hit)) {
    if (["rank", "score", "row", "id", "name", "pairs"].includes(key)) continue;
    const text = Array.isArray(value) ? value.join(", ") : typeof value === "object" ? JSON.stringify(value) : value;
    note.append(element("br"), `${key}: ${text}`);
  }
  const title = element("strong", {}, `${hit.rank}. ${hit.name ?? hit.id}`);
  pair.append(element("div", {}, title, element("br"), note));
  return element("div", { className: "card" }, pair, pairTable(hit.pairs));
}

async function ask(address, options) {
  const mine = ++latest;
  at("status").textContent = "searching…";
  let answer;
  try {
    const response = await fetch(address, { method: "POST", ...options });
    answer = await response.json();
  } catch {
    answer = { error: "the server does not answer" };
  }
  if (mine !== latest) return; // a later question was asked meanwhile
  at("results").replaceChildren(...(answer.results ?? []).map((hit, i) => card(hit, answer.pictures[i])));
  at("status").textContent = answer.error ?? `${answer.results.length} found for “${answer.query}”`;
}

function search(query) {
  at("asked").replaceChildren();
  if (!query.trim()) return;
  history.replaceState(null, "", `/?q=${encodeURIComponent(query)}`);
  const body = JSON.stringify({ query, k: 12, pairs: true });
  ask("/api/search", { body, headers: { "Content-Type": "application/json" } });
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  search(at("query").value);
});
at("image")?.addEventListener("change", (event) => {
  const file = event.target.files[0];
  if (!file) return;
  const shown = element("img", { src: URL.createObjectURL(file), alt: file.name });
  at("asked").replaceChildren(element("p", { className: "asked" }, element("span", { className: "thumb" }, shown)));
  ask("/api/image?k=12&pairs=true", { body: file, headers: { "Content-Type": file.type || "image/unknown" } });
});
const asked = new URLSearchParams(location.search).get("q");
if (asked) {
  at("query").value = asked;
  search(asked);
}
