"use strict";
// Draws the curves of the page's JSON with plotly, and lets one choose runs and the x axis.
const { panels } = JSON.parse(document.getElementById("curves").textContent);
const axes = { x: "training examples", share: "share of the run (%)" };
const figures = [...document.querySelectorAll("[data-panel]")];

function trace(one, axis) {
  const drawn = { x: one[axis], y: one.y, name: one.name, hovertemplate: "%{y:.4g}", type: "scatter" };
  if (one.kind === "raw") {
    return { ...drawn, mode: "lines", hoverinfo: "skip", hovertemplate: null, opacity: 0.3,
             line: { color: one.color, width: 1 } };
  }
  const line = { color: one.color, dash: one.dash, width: one.kind === "line" ? 2 : 1 };
  const marker = { symbol: one.symbol, size: 7, color: one.color };
  return { ...drawn, line, marker, mode: one.kind === "line" ? "lines" : "lines+markers" };
}

function draw(axis) {
  figures.forEach((figure) => {
    const panel = panels[Number(figure.dataset.panel)];
    const level = { type: "line", xref: "paper", x0: 0, x1: 1, y0: panel.level, y1: panel.level,
                    line: { color: "#777", width: 1, dash: "dot" } };
    Plotly.react(figure, panel.traces.map((one) => trace(one, axis)), {
      title: { text: panel.title, font: { size: 14 } },
      margin: { l: 52, r: 12, t: 36, b: 40 },
      height: 300,
      showlegend: false,
      hovermode: "x unified",
      hoverlabel: { namelength: 40, font: { size: 11 } },
      xaxis: { title: { text: axes[axis], font: { size: 11 } }, gridcolor: "#e6e8eb", zeroline: false },
      yaxis: { type: panel.log ? "log" : "linear", gridcolor: "#e6e8eb", zeroline: false,
               exponentformat: "e" },
      shapes: panel.level === null ? [] : [level],
    }, { displayModeBar: false, responsive: true });
  });
  show();
}

function show() {
  const boxes = [...document.querySelectorAll("[data-run]")];
  const hidden = new Set(boxes.filter((box) => !box.checked).map((box) => Number(box.dataset.run)));
  figures.forEach((figure) => {
    const { traces } = panels[Number(figure.dataset.panel)];
    Plotly.restyle(figure, { visible: traces.map((one) => !hidden.has(one.run)) });
  });
}

document.querySelectorAll("[data-run]").forEach((box) => box.addEventListener("change", show));
document.querySelectorAll("[data-axis]").forEach((choice) => {
  choice.addEventListener("change", () => draw(choice.dataset.axis));
});
draw("x");
