// The drawing board: white on black, or inverted. After each stroke the drawing is uploaded like any other picture.
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d");
let paper = "#000", ink = "#fff", drawing = false, strokes = 0;
const clear = () => { pen.fillStyle = paper; pen.fillRect(0, 0, canvas.width, canvas.height); strokes = 0; };
const invert = () => {
  [paper, ink] = [ink, paper];
  pen.globalCompositeOperation = "difference";
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.globalCompositeOperation = "source-over";
};
const place = (event) => {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
};
const send = () => canvas.toBlob(async (blob) => {
  const { path } = await upload(new File([blob], "drawing.png", { type: "image/png" }));
  trigger("submit", { path });
});
clear();
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  Object.assign(pen, { lineWidth: 22, lineCap: "round", lineJoin: "round", strokeStyle: ink });
  drawing = true;
  pen.beginPath();
  pen.moveTo(...place(event));
  pen.lineTo(...place(event));
  pen.stroke();
  event.preventDefault();
});
canvas.addEventListener("pointermove", (event) => {
  if (!drawing) return;
  pen.lineTo(...place(event));
  pen.stroke();
});
for (const end of ["pointerup", "pointercancel"])
  canvas.addEventListener(end, () => { if (drawing) { drawing = false; strokes += 1; send(); } });
element.querySelector("[data-do=clear]").addEventListener("click", clear);
element.querySelector("[data-do=invert]").addEventListener("click", () => { invert(); if (strokes) send(); });
