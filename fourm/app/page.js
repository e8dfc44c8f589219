// Behaviour of the region editor: dragging a rectangle over tokens selects them, or, if it starts on a selected token,
// deselects them. `element` and `props` are given by Gradio; the value is {picture, rows, columns, cells}.
let start = null, before = new Set();
const cellAt = (event) => {
  const box = element.querySelector("svg").getBoundingClientRect(), { rows, columns } = props.value;
  const place = (position, low, size, count) => Math.min(Math.max(Math.floor(((position - low) / size) * count), 0), count - 1);
  return [place(event.clientY, box.top, box.height, rows), place(event.clientX, box.left, box.width, columns)];
};
const selection = ([row, column]) => {
  const cells = new Set(before), add = !before.has(start[0] * props.value.columns + start[1]);
  for (let r = Math.min(row, start[0]); r <= Math.max(row, start[0]); r++)
    for (let c = Math.min(column, start[1]); c <= Math.max(column, start[1]); c++)
      cells[add ? "add" : "delete"](r * props.value.columns + c);
  return cells;
};
const show = (cells) => element.querySelectorAll("rect").forEach((rect, i) => rect.classList.toggle("on", cells.has(i)));
const keep = (cells) => { props.value = { ...props.value, cells: [...cells].sort((a, b) => a - b) }; };
element.addEventListener("pointerdown", (event) => {
  if (!event.target.closest("svg")) return;
  event.preventDefault();
  before = new Set(props.value.cells);
  start = cellAt(event);
  show(selection(start));
});
window.addEventListener("pointermove", (event) => { if (start) show(selection(cellAt(event))); });
window.addEventListener("pointerup", (event) => {
  if (!start) return;
  const cells = selection(cellAt(event));
  start = null;
  keep(cells);
});
element.addEventListener("click", (event) => {
  const tool = event.target.closest("[data-tool]")?.dataset.tool, { rows, columns } = props.value;
  if (tool) keep(tool === "all" ? Array.from({ length: rows * columns }, (_, i) => i) : []);
});
