"use strict";
// Draws the plots of the page in the colours of the reader's scheme, and again when the scheme changes.
(() => {
  const read = id => JSON.parse(document.getElementById(id).textContent);
  const specs = read("specs"), sets = read("data");
  const style = () => getComputedStyle(document.documentElement);

  // Columns to records; a column of strings has indices into the list of distinct strings.
  const records = columns => {
    const names = Object.keys(columns);
    const values = names.map(n => Array.isArray(columns[n]) ? columns[n] : columns[n].codes.map(c => columns[n].levels[c]));
    return names.length ? values[0].map((_, i) => Object.fromEntries(names.map((n, j) => [n, values[j][i]]))) : [];
  };

  const themed = (value, colours) => {
    if (typeof value === "string" && value.startsWith("theme:")) return colours.getPropertyValue("--" + value.slice(6)).trim();
    if (Array.isArray(value)) return value.map(v => themed(v, colours));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v, colours)]));
    return value;
  };

  const config = colours => {
    const colour = name => colours.getPropertyValue("--" + name).trim();
    const words = { labelColor: colour("ink"), titleColor: colour("soft"), labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500 };
    return {
      background: null,
      font: getComputedStyle(document.body).fontFamily,
      mark: { aria: false },
      axis: { ...words, aria: false, gridColor: colour("grid"), domainColor: colour("line"), tickColor: colour("line"), labelOverlap: true },
      legend: { ...words, aria: false, symbolStrokeWidth: 1.5, padding: 0, offset: 12 },
      view: { stroke: null },
    };
  };

  const draw = async (place, colours) => {
    const name = place.dataset.plot;
    const spec = { ...themed(specs[name], colours), datasets: { ...specs[name].datasets, [name]: records(sets[name]) } };
    place.view?.finalize();
    place.view = await vegaEmbed(place, spec, {
      mode: "vega-lite", renderer: "svg", actions: false, defaultStyle: false, ast: true, config: config(colours),
      tooltip: { disableDefaultStyle: true },
    });
    place.dataset.drawn = "yes";
  };

  const save = (address, name) => {
    const link = document.createElement("a");
    link.href = address;
    link.download = name;
    link.click();
  };

  const button = (words, act) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = words;
    made.addEventListener("click", () => act(made));
    return made;
  };

  const csv = table => [...table.rows].map(row => [...row.cells].map(
    cell => '"' + cell.textContent.trim().replaceAll('"', '""') + '"').join(",")).join("\r\n");

  // Buttons that save a plot or its table, next to the table.
  for (const details of document.querySelectorAll("details.data")) {
    const name = details.id.replace("table-", "");
    const place = document.querySelector(`[data-plot="${name}"]`);
    const tools = document.createElement("div");
    tools.className = "tools";
    tools.append(
      button("CSV", () => save("data:text/csv;charset=utf-8," + encodeURIComponent(csv(details.querySelector("table"))), name + ".csv")),
      ...["svg", "png"].map(kind => button(kind.toUpperCase(),
        async () => save(await place.view.view.toImageURL(kind, 2), name + "." + kind))));
    details.querySelector("summary").after(tools);
  }

  // Commands have the folder of this page, if it was opened from a disk, and a button that copies them.
  if (location.protocol === "file:") {
    const folder = decodeURIComponent(location.pathname).replace(/\/[^/]*$/, "");
    for (const place of document.querySelectorAll("[data-run]"))
      place.textContent = place.dataset.run ? folder + "/" + place.dataset.run : folder;
  }
  for (const box of document.querySelectorAll(".copy")) {
    box.append(button("copy", async made => {
      await navigator.clipboard.writeText(box.querySelector("pre").textContent);
      made.textContent = "copied";
    }));
  }

  const drawAll = async () => {
    for (const place of document.querySelectorAll("[data-plot]")) {
      const table = document.getElementById("table-" + place.dataset.plot);
      try {
        await draw(place, style());
      } catch (error) {
        table.open = true; // it has the same data
        place.hidden = true;
        console.error(place.dataset.plot, error);
      }
    }
    document.documentElement.dataset.ready = "yes";
  };

  // Tables are open in the page for browsers without scripts.
  for (const table of document.querySelectorAll("details.data")) table.open = false;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll();
})();
