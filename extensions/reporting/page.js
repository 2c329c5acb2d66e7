// The charts, and the lists of errors, of the data that the page embeds. Texts are set as text, never as markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // ------------------------------------------------------------------------------------------------------ charts

  const touch = matchMedia("(pointer: coarse)").matches;
  const config = {
    displaylogo: false,
    responsive: true,
    displayModeBar: touch ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
  };
  let axis = "samples";

  function onAxis(figure) { // a figure with its x values in the current unit
    for (const trace of figure.data) if (trace.meta) trace.x = trace.meta[axis];
    if (figure.data.some((trace) => trace.meta)) figure.layout.xaxis.title.text = `training ${axis}`;
    return figure;
  }

  function draw(box) {
    if (box.dataset.drawn) return;
    box.dataset.drawn = "yes";
    const figure = onAxis(data.figures[box.dataset.figure]);
    Plotly.newPlot(box, figure.data, { ...figure.layout, ...(touch && { dragmode: false }) }, config);
    if (box.closest("[data-path$='/confusion']")) {
      box.on("plotly_click", ({ points: [point] }) => {
        const list = box.closest("section").querySelector(".errors");
        if (list) list.dispatchEvent(new CustomEvent("pick", { detail: point.customdata }));
      });
    }
  }

  const seen = new IntersectionObserver(
    (entries) => entries.forEach((entry) => entry.isIntersecting && draw(entry.target)),
    { rootMargin: "400px" },
  );
  all("[data-figure]").forEach((box) => seen.observe(box));

  function press(button) {
    all("button", button.parentElement).forEach((one) => one.setAttribute("aria-pressed", one === button));
  }
  all("[data-axis]").forEach((button) => {
    button.onclick = () => {
      axis = button.dataset.axis;
      press(button);
      for (const box of all("[data-drawn]")) {
        const figure = onAxis(data.figures[box.dataset.figure]);
        if (figure.data.some((trace) => trace.meta)) Plotly.react(box, figure.data, figure.layout, config);
      }
    };
  });
  all(".tabs").forEach((tabs) => {
    all("[data-tab]", tabs).forEach((button, wanted) => {
      button.onclick = () => {
        press(button);
        all(".tab", tabs).forEach((tab, i) => (tab.hidden = i !== wanted));
        all("[data-drawn]", tabs).forEach((box) => box.offsetParent && Plotly.Plots.resize(box));
      };
    });
  });

  addEventListener("beforeprint", () => {
    all("details").forEach((one) => (one.open = true));
    for (const box of all("[data-figure]")) {
      draw(box);
      const wide = box.parentElement.clientWidth || 640;
      Plotly.relayout(box, { width: Math.min(Math.max(wide, 0), 680), autosize: false });
    }
  });
  addEventListener("afterprint", () => all("[data-drawn]").forEach((box) => Plotly.relayout(box, { width: null, autosize: true })));

  // ------------------------------------------------------------------------------------------------------ errors

  const PAGE = 20;
  const [INDEX, GOLD, ANSWER, SIZE, OLD, OLD_RIGHT, TEXTS, RESPONSE, PROBABILITIES] = [0, 1, 2, 3, 4, 5, 6, 7, 8];
  const percent = (value) => `${(100 * value).toFixed(1)}%`;

  function errorItem(list, row) {
    const item = make("div", "error");
    const size = item.appendChild(make("div", "size"));
    size.append(make("small", "", `row ${row[INDEX]}`));
    if (row[SIZE] !== null) {
      size.append(list.regression ? `off by ${+row[SIZE].toFixed(3)}` : percent(row[SIZE]));
      if (!list.regression) size.appendChild(make("span", "bar")).style.setProperty("--v", row[SIZE]);
    }
    for (const [name, value, kind] of [["gold", row[GOLD], "right"], ["answer", row[ANSWER], "wrong"]]) {
      const cell = item.appendChild(make("div", "label"));
      cell.append(make("small", "", name));
      cell.appendChild(make("span", `answer ${kind}`, value)).dir = "auto";
      if (name === "answer" && row[OLD] !== null) {
        cell.append(make("small", "", row[OLD_RIGHT] ? `before: ${row[OLD]} (right)` : `before: ${row[OLD]}`));
      }
    }
    const body = item.appendChild(make("div", "body"));
    row[TEXTS].forEach((text, i) => {
      const line = body.appendChild(make("p", "text"));
      line.dir = "auto";
      if (list.fields.length > 1) line.append(make("b", "", list.fields[i]));
      line.append(text);
    });
    const more = body.appendChild(make("details"));
    more.append(make("summary", "", "response" + (row[PROBABILITIES].length ? " and probabilities" : "")));
    more.appendChild(make("pre", "", row[RESPONSE])).dir = "auto";
    if (row[PROBABILITIES].length) {
      const line = more.appendChild(make("p", "probabilities"));
      for (const [word, value] of row[PROBABILITIES]) line.append(make("b", "", word), `${percent(value)}  `);
    }
    return item;
  }

  function select(tools, title, options) {
    const label = tools.appendChild(make("label", "", title));
    const box = label.appendChild(make("select"));
    for (const [value, text] of options) box.append(new Option(text, value));
    return box;
  }

  function errorList(root, list) {
    const tools = root.appendChild(make("div", "tools"));
    const search = tools.appendChild(make("input"));
    Object.assign(search, { type: "search", placeholder: "search in texts and answers" });
    search.setAttribute("aria-label", "search");
    const labels = [["", "all"], ...list.labels.map((label) => [label, label])];
    const gold = list.labels.length ? select(tools, "gold", labels) : null;
    const answer = list.labels.length ? select(tools, "answer", labels) : null;
    const old = list.has_before && !list.regression
      ? select(tools, "before", [["", "all"], ["right", "was right"], ["wrong", "was wrong"]]) : null;
    const what = list.regression ? "distance" : "confidence";
    const orders = [["down", `largest ${what}`], ["up", `smallest ${what}`], ["row", "row number"]];
    const order = select(tools, "sort", list.has_sizes ? orders : orders.slice(2));
    const items = root.appendChild(make("div", "items"));
    const pager = root.appendChild(make("div", "pager"));
    const place = pager.appendChild(make("span", "place"));
    const back = pager.appendChild(make("button", "back", "Back"));
    const next = pager.appendChild(make("button", "next", "Next"));
    const texts = list.rows.map((row) => [...row[TEXTS], row[RESPONSE], row[GOLD], row[ANSWER]].join("\n").toLowerCase());
    let found = [], page = 0;

    function show() {
      const rows = found.slice(page * PAGE, (page + 1) * PAGE);
      items.replaceChildren(...rows.map((i) => errorItem(list, list.rows[i])));
      const first = page * PAGE + 1;
      place.textContent = found.length ? `${first} to ${first + rows.length - 1} of ${found.length}` : "no error matches";
      back.disabled = page === 0;
      next.disabled = (page + 1) * PAGE >= found.length;
    }
    function filter() {
      const words = search.value.trim().toLowerCase();
      found = [...list.rows.keys()].filter((i) => {
        const row = list.rows[i];
        return (!gold?.value || row[GOLD] === gold.value) && (!answer?.value || row[ANSWER] === answer.value)
          && (!old?.value || row[OLD_RIGHT] === (old.value === "right")) && (!words || texts[i].includes(words));
      });
      const sign = order.value === "up" ? 1 : -1; // rows without a confidence stay last
      if (order.value === "row") found.sort((a, b) => list.rows[a][INDEX] - list.rows[b][INDEX]);
      else found.sort((a, b) => {
        const [left, right] = [list.rows[a][SIZE], list.rows[b][SIZE]];
        return (left === null) - (right === null) || sign * (left - right);
      });
      page = 0;
      show();
    }
    for (const box of [gold, answer, old, order]) if (box) box.onchange = filter;
    search.oninput = filter;
    back.onclick = () => { page -= 1; show(); };
    next.onclick = () => { page += 1; show(); };
    root.addEventListener("pick", ({ detail: [wantedGold, wantedAnswer] }) => {
      search.value = "";
      gold.value = wantedGold;
      answer.value = wantedAnswer;
      filter();
      root.scrollIntoView({ block: "start" });
    });
    filter();
  }
  for (const [id, list] of Object.entries(data.errors)) errorList(document.getElementById(id), list);

  // ------------------------------------------------------------------------------------------------------- rest

  function unfold() { // the section that a link leads to
    const part = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const fold = part && part.querySelector(":scope > .fold");
    if (fold) fold.open = true;
  }
  addEventListener("hashchange", unfold);
  unfold();

  const theme = document.getElementById("theme");
  theme.onclick = () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  };
  all("[data-copy]").forEach((button) => {
    button.onclick = () => navigator.clipboard?.writeText(button.previousElementSibling.textContent)
      .then(() => (button.textContent = "Copied"));
  });
})();
