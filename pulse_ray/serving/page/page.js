"use strict";

// Everything that comes from users, items and models is put in as text, never as markup.

const at = (id) => document.getElementById(id);
const typed = []; // {item_id, title, rating}
let token = sessionStorage.getItem("token") || "";
let user = "";
let asked = 0;

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function show(id, visible) {
  at(id).hidden = !visible;
}

async function ask(path, body) {
  const headers = { Accept: "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) };
  const answer = await fetch(path, options);
  if (answer.status === 401) {
    show("token-form", true);
    at("token").focus();
  }
  let content = {};
  try {
    content = await answer.json();
  } catch {
    content = { message: `the server answers ${answer.status}` };
  }
  if (!answer.ok && path !== "readyz") throw new Error(content.message || `the server answers ${answer.status}`);
  return content;
}

function inDomain(path) {
  const domain = at("domain").value;
  return domain ? `${path}${path.includes("?") ? "&" : "?"}domain=${encodeURIComponent(domain)}` : path;
}

function complain(error) {
  at("problem").textContent = `That did not work: ${error.message}.`;
  show("problem", true);
}

// A text field with a list of proposals: arrows move, Enter takes, Escape closes.
function combobox(input, list, find, take) {
  let options = [];
  let active = -1;
  let latest = 0;
  let timer = 0;

  function close() {
    latest += 1;
    clearTimeout(timer);
    list.hidden = true;
    active = -1;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  }

  function mark(place) {
    active = place;
    [...list.children].forEach((node, index) => node.setAttribute("aria-selected", String(index === place)));
    if (place < 0) return;
    input.setAttribute("aria-activedescendant", list.children[place].id);
    list.children[place].scrollIntoView({ block: "nearest" });
  }

  function choose(place) {
    const option = options[place];
    close();
    take(option);
  }

  async function open() {
    const turn = ++latest;
    try {
      const found = await find(input.value.trim());
      if (turn !== latest || document.activeElement !== input) return;
      options = found;
    } catch (error) {
      complain(error);
      return;
    }
    list.replaceChildren(...options.map((option, index) => {
      const node = make("li", "", option.label);
      node.id = `${list.id}-${index}`;
      node.setAttribute("role", "option");
      node.addEventListener("pointerdown", (event) => { event.preventDefault(); choose(index); });
      return node;
    }));
    if (!options.length) list.append(make("li", "none", "Nothing begins like this"));
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
    mark(-1);
  }

  input.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(open, 120); });
  input.addEventListener("focus", open);
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    const closed = list.hidden;
    if (event.key === "Escape") close();
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (closed) open();
      else if (options.length) {
        const step = event.key === "ArrowDown" ? 1 : -1;
        mark(active < 0 ? (step > 0 ? 0 : options.length - 1) : (active + step + options.length) % options.length);
      }
    } else if (event.key === "Enter" && !closed && active >= 0) {
      event.preventDefault();
      choose(active);
    }
  });
}

combobox(at("user"), at("user-options"), async (text) => {
  const found = await ask(inDomain(`v1/users?limit=20&query=${encodeURIComponent(text)}`));
  return found.users.map((id) => ({ label: id }));
}, (option) => {
  at("user").value = option.label;
  rank();
});

combobox(at("item"), at("item-options"), async (text) => {
  const found = await ask(inDomain(`v1/items?limit=20&query=${encodeURIComponent(text)}`));
  return found.items.map((item) => ({ label: item.title, item }));
}, (option) => {
  typed.push({ ...option.item, rating: null });
  at("item").value = "";
  listTyped();
});

function listTyped() {
  at("typed").replaceChildren(...typed.map((entry, index) => {
    const node = make("li");
    const rating = make("select");
    rating.setAttribute("aria-label", `Rating of ${entry.title}`);
    for (const value of ["", 5, 4, 3, 2, 1]) {
      const option = make("option", "", value ? `${value}/5` : "no rating");
      option.value = value;
      rating.append(option);
    }
    rating.value = entry.rating || "";
    rating.addEventListener("change", () => { entry.rating = Number(rating.value) || null; });
    const remove = make("button", "small", "Remove");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${entry.title}`);
    remove.addEventListener("click", () => { typed.splice(index, 1); listTyped(); at("item").focus(); });
    node.append(make("span", "name", entry.title), rating, remove);
    return node;
  }));
}

const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);
const plain = (value, digits) => (value < 0 ? "−" : "") + Math.abs(value).toFixed(digits);

function showRanking(answer) {
  const head = make("li", "head");
  head.append(make("span"), make("span", "", "Item"), make("span", "", "Probability among these"),
    make("span", "number"), make("span", "number", "Logit"));
  head.setAttribute("aria-hidden", "true");
  const rows = answer.items.map((item, index) => {
    const node = make("li");
    const title = make("span", "title", item.title);
    title.append(make("span", "item-id", item.item_id));
    const track = make("span", "track");
    const bar = make("span");
    bar.style.width = `${100 * item.probability}%`;
    track.append(bar);
    const logit = make("span", "number");
    logit.append(make("small", "", "logit "), plain(item.logit, 2));
    node.append(make("span", "place", index + 1), title, track,
      make("span", "number", `${(100 * item.probability).toFixed(1)} %`), logit);
    return node;
  });
  at("ranking").replaceChildren(head, ...rows);
  const from = answer.candidates_from === "sasrec" ? "found by SASRec" : "as given";
  at("ranking-about").textContent = `${answer.items.length} candidates, ${from}; ranked by ${answer.model_version} ` +
    `in ${Math.round(answer.timing.total_ms)} ms.`;
  show("ranking-section", true);
}

const selectors = {
  base: "the base reason", thought_space: "chosen by the Thought Space", sbert: "chosen by SBERT",
  encoder_base: "chosen by the untrained encoder", log_likelihood: "chosen by log-likelihood",
  random: "chosen at random", given: "from a batch job's input",
};
const compares = ["thought_space", "sbert", "encoder_base"]; // texts with the history

function showReason(reason) {
  at("reason").textContent = reason.text || `None: ${reason.why}.`;
  const notes = [];
  const sources = { store: "from the profile store", reasoner: "written just now", request: "from the request" };
  if (reason.text) notes.push(sources[reason.source]);
  if (reason.agreement !== null) {
    const kind = compares.includes(reason.selector) ? "agreement with the history" : "score";
    notes.push(`${kind} ${signed(reason.agreement)}`);
  }
  if (reason.selector) notes.push(selectors[reason.selector]);
  at("origin").textContent = notes.join(" · ");
  show("origin", notes.length > 0);
  show("reason-section", true);
}

function showTree(nodes, reason) {
  const places = new Map(); // node_id → its list entry; nodes come with parents before children
  const above = (id) => id.split(".").slice(0, -1).join(".");
  const refined = new Set(nodes.filter((node) => node.node_id !== "").map((node) => above(node.node_id)));
  at("tree").replaceChildren();
  for (const node of nodes) {
    const parent = node.node_id === "" ? null : places.get(above(node.node_id));
    const isChosen = reason.node_id === node.node_id;
    const thought = make("div", isChosen ? "thought chosen" : "thought");
    const notes = make("span", "notes");
    if (isChosen) {
      notes.append(make("span", "tag", reason.agreement === null ? "chosen" : `chosen · ${signed(reason.agreement)}`));
    } else if (node.agreement !== null) {
      notes.append(make("span", "logprob", `agreement ${signed(node.agreement)}`));
    }
    if (!node.leaf && !refined.has(node.node_id)) notes.append(make("span", "logprob", "left behind"));
    notes.append(make("span", "logprob", `log p ${plain(node.mean_logprob, 2)}`));
    thought.append(make("span", "node", node.node_id || "base"), make("span", "words", node.text), notes);
    const place = make("li");
    place.append(thought);
    places.set(node.node_id, place);
    const list = parent ? parent.querySelector(":scope > ul") || parent.appendChild(make("ul")) : at("tree");
    list.append(place);
  }
  show("tree-section", nodes.length > 0);
}

function showHistory(steps) {
  at("history").replaceChildren(...[...steps].reverse().map((step) => {
    const node = make("li", "", step.title);
    const meta = [];
    if (step.rating) meta.push(`${step.rating}/5`);
    if (step.timestamp > 86400) meta.push(new Date(1000 * step.timestamp).toISOString().slice(0, 10));
    node.append(make("span", "meta", meta.join(" · ")));
    if (step.review) node.append(make("q", "", step.review));
    return node;
  }));
  show("history-section", steps.length > 0);
}

function wait(waiting) {
  at("go").disabled = waiting;
  at("go").textContent = waiting ? "Ranking…" : "Rank";
  at("answer").setAttribute("aria-busy", String(waiting));
}

async function rank() {
  const byUser = document.querySelector("input[name=mode]:checked").value === "user";
  user = at("user").value.trim();
  if (byUser ? !user : !typed.length) {
    complain(new Error(byUser ? "choose a user first" : "add an item first"));
    return;
  }
  const turn = ++asked;
  show("problem", false);
  wait(true);
  const body = byUser ? { user_id: user } : {
    history: typed.map((entry) => ({ item_id: entry.item_id, rating: entry.rating })),
  };
  if (at("domain").value) body.domain = at("domain").value;
  try {
    const profile = byUser ? await ask(inDomain(`v1/users/${encodeURIComponent(user)}`)) : null;
    const answer = await ask("v1/rank", body);
    if (turn !== asked) return;
    showRanking(answer);
    showReason(answer.reason);
    showTree(answer.reason.source === "store" && profile ? profile.tree : answer.reason.tree, answer.reason);
    showHistory(profile ? profile.history : typed.map((entry) => ({ ...entry, timestamp: 0 })));
    location.hash = byUser ? `user=${encodeURIComponent(user)}` : "";
    at("ranking-title").focus({ preventScroll: true });
  } catch (error) {
    if (turn === asked) {
      for (const id of ["ranking-section", "reason-section", "tree-section", "history-section"]) show(id, false);
      complain(error);
    }
  } finally {
    if (turn === asked) wait(false);
  }
}

function chooseMode() {
  const byUser = document.querySelector("input[name=mode]:checked").value === "user";
  show("user-field", byUser);
  show("typed-field", !byUser);
}

for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", chooseMode);
at("form").addEventListener("submit", (event) => { event.preventDefault(); rank(); });
at("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = at("token").value.trim();
  sessionStorage.setItem("token", token);
  show("token-form", false);
  show("problem", false);
  start();
});

async function start() {
  chooseMode();
  try {
    const ready = await ask("readyz");
    const facts = [`ranker ${ready.model_version || "not ready"}`];
    if (ready.store !== "ok") facts.push(`profiles: ${ready.store}`);
    at("facts").replaceChildren(...facts.map((text) => make("span", "", text)));
    at("domain").replaceChildren(...(ready.domains || []).map((name) => make("option", "", name)));
    show("domain-field", (ready.domains || []).length > 1);
  } catch (error) {
    complain(error);
  }
  const wanted = new URLSearchParams(location.hash.slice(1)).get("user");
  if (wanted) {
    at("user").value = wanted;
    await rank();
  }
}

start();
