// Sets each cell's class to its state, moves the outlines, writes caption and code. A click at a thread shows its accesses alone.
function (id) {
  const root = document.getElementById(id);
  const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const range = root.querySelector("input"), [back, on] = root.querySelectorAll("button"), code = root.querySelector("pre");
  const draw = (group, name, attributes) => {
    const shape = group.appendChild(document.createElementNS("http://www.w3.org/2000/svg", name));
    for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
    return shape;
  };
  const panels = [...root.querySelectorAll("[data-panel]")].map((group, i) => {
    const [x, y, rows, columns, width, height, size, colour] = data.panels[i], cells = [], words = [];
    for (let k = 0; k < rows * columns; k++) {
      const left = x + k % columns * width, top = y + Math.floor(k / columns) * height;
      cells.push(draw(group, "rect", { x: left, y: top, width, height }));
      const at = { x: left + width / 2, y: top + height / 2 + size * 0.36, style: `font-size:${size}px`, class: "word" };
      if (size) words.push(draw(group, "text", at));
    }
    return { cells, words, colour };
  });
  const outlines = [...root.querySelectorAll(".outlines rect")];
  let chosen = -1;
  const safe = (words) => words.replace(/&/g, "&amp;").replace(/</g, "&lt;");

  function listing(frame) {
    let out = "", of = "";
    for (const i of frame.l.concat(frame.e < 0 ? [] : [frame.e])) {
      const [name, number, words] = data.lines[i];
      if (name !== of) { out += `<b>${safe(name)}</b>\n`; of = name; }
      out += `<i>${String(number).padStart(4)}</i>  ${safe(words)}\n`;
    }
    return out + (frame.e < 0 ? "<b>the end</b>" : "<b>all threads wait here</b>");
  }

  // The states as the chosen thread made them: what others read or wrote in this step counts as touched before.
  function own(states, touched) {
    const mine = {};
    for (const [cell, reads, writes] of touched) mine[cell] = [(reads >>> chosen) & 1, (writes >>> chosen) & 1];
    return states.map((state, cell) => {
      if (!"rwbx".includes(state)) return state;
      const [reads, writes] = mine[cell] || [0, 0];
      if (state === "x" && (reads || writes)) return "x";
      return reads && writes ? "b" : writes ? "w" : reads ? "r" : "s";
    });
  }

  function show() {
    const frame = data.frames[+range.value];
    panels.forEach((panel, i) => {
      const threads = i === data.threads, touched = frame.t[i];
      let states = frame.s[i].split("");
      if (chosen >= 0 && !threads && touched) states = own(states, touched);
      states.forEach((state, cell) => {
        const picked = threads ? (cell === chosen ? " pick chosen" : " pick") : "";
        panel.cells[cell].setAttribute("class", `k p-${panel.colour}${state === "." ? "" : " " + state}${picked}`);
      });
      const words = frame.w[i] || [];
      panel.words.forEach((text, cell) => {
        text.textContent = words[cell] || "";
        text.classList.toggle("over", "wbx".includes(states[cell]));
      });
    });
    frame.o.forEach((outline, k) => ["x", "y", "width", "height"].forEach((a, j) => outlines[k].setAttribute(a, outline[j])));
    root.querySelector(".caption").textContent = frame.c;
    code.innerHTML = listing(frame);
    root.querySelector("output").textContent = `step ${+range.value + 1} of ${data.frames.length}`;
  }

  range.addEventListener("input", show);
  back.onclick = () => { range.stepDown(); show(); };
  on.onclick = () => { range.stepUp(); show(); };
  if (data.threads >= 0) panels[data.threads].cells.forEach((cell, k) => cell.addEventListener("click", () => {
    chosen = chosen === k ? -1 : k;
    show();
  }));
  show();
}
