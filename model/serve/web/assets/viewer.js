// The picture and what is marked in it. The server owns both: a finished mark is sent, and comes back to be drawn.
const root = element.firstElementChild;
const $ = (selector) => element.querySelector(selector);
const frame = $('.frame'), img = $('.frame img'), canvas = $('canvas'), hint = $('.hint'), tools = $('.tools');
const HINTS = {
  look: 'Choose a tool to mark a region.',
  point: 'Click on what you mean.',
  box: 'Drag a box, or click two corners.',
  free: 'Drag around what you mean.',
};
const STEP = 0.02, FAR_STEP = 0.1, CLICK = 5;
let tool = matchMedia('(pointer: coarse)').matches ? 'look' : 'box';
let start = null, corner = null, path = [], cursor = null, pending = null, pointer = null;

const picture = () => (props.value || {}).picture;
const clamp = (value, most) => Math.min(Math.max(value, 0), most);
const say = (text) => { hint.textContent = text; };

function place(event) {
  const box = canvas.getBoundingClientRect(), { width, height } = picture();
  return [clamp(((event.clientX - box.left) / box.width) * width, width - 0.01),
          clamp(((event.clientY - box.top) / box.height) * height, height - 0.01)];
}

function emit(kind, points) {
  pending = { kind, points: points.map(([x, y]) => [Math.round(x * 100) / 100, Math.round(y * 100) / 100]) };
  trigger('select', pending);
  reset();
}

function reset() {
  start = corner = null;
  path = [];
  say(picture() ? HINTS[tool] : '');
  draw();
}

function choose(name) {
  tool = name;
  tools.querySelectorAll('[data-tool]').forEach((button) =>
    button.setAttribute('aria-pressed', String(button.dataset.tool === name)));
  canvas.dataset.tool = name;
  reset();
}

function click(point) {
  if (tool === 'point') emit('point', [point]);
  else if (tool === 'box' && corner) emit('box', [corner, point]);
  else if (tool === 'box') { corner = point; say('Now the opposite corner. Escape gives it up.'); draw(); }
}

function draw() {
  const shown = picture();
  if (!shown) return;
  const { width, height } = canvas.getBoundingClientRect(), ratio = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const ink = canvas.getContext('2d');
  ink.setTransform(ratio, 0, 0, ratio, 0, 0);
  ink.clearRect(0, 0, width, height);
  const at = ([x, y]) => [(x * width) / shown.width, (y * height) / shown.height];
  const marks = pending ? [...props.value.marks.filter((mark) => !mark.spent), pending] : props.value.marks;
  marks.forEach((mark) => outline(ink, mark, at, marks.length > 1));
  if (tool === 'free' && path.length > 1) outline(ink, { kind: 'free', points: path, open: true }, at);
  if (tool === 'box' && (start || corner) && cursor) {
    outline(ink, { kind: 'box', points: [start || corner, cursor] }, at);
  }
  if (corner) disc(ink, at(corner), 3);
  if (cursor && cursor.shown) cross(ink, at(cursor));
}

function stroke(ink, dashed) {
  ink.lineJoin = 'round';
  ink.setLineDash([]);
  ink.lineWidth = 4; ink.strokeStyle = 'rgba(0,0,0,.55)'; ink.stroke();
  ink.setLineDash(dashed ? [5, 4] : []);
  ink.lineWidth = 2; ink.strokeStyle = '#fff'; ink.stroke();
}

function outline(ink, mark, at, numbered) {
  ink.globalAlpha = mark.spent ? 0.6 : 1;
  const points = mark.points.map(at);
  ink.beginPath();
  if (mark.kind === 'point') {
    ink.arc(points[0][0], points[0][1], 8, 0, 7);
    stroke(ink, mark.spent);
    disc(ink, points[0], 2);
  } else if (mark.kind === 'box') {
    const [[x1, y1], [x2, y2]] = points;
    ink.rect(Math.min(x1, x2), Math.min(y1, y2), Math.abs(x2 - x1), Math.abs(y2 - y1));
    stroke(ink, mark.spent);
  } else {
    points.forEach(([x, y], index) => (index ? ink.lineTo(x, y) : ink.moveTo(x, y)));
    if (!mark.open) ink.closePath();
    stroke(ink, mark.spent);
  }
  if (numbered && mark.number) label(ink, points[0], mark.number);
  ink.globalAlpha = 1;
}

function disc(ink, [x, y], radius) {
  ink.beginPath(); ink.arc(x, y, radius, 0, 7); ink.fillStyle = '#fff'; ink.fill();
}

function label(ink, [x, y], number) {
  ink.font = '600 13px system-ui, sans-serif';
  ink.lineWidth = 3; ink.setLineDash([]); ink.strokeStyle = 'rgba(0,0,0,.7)'; ink.fillStyle = '#fff';
  ink.strokeText(number, x + 10, y - 6); ink.fillText(number, x + 10, y - 6);
}

function cross(ink, [x, y]) {
  ink.beginPath();
  ink.moveTo(x - 12, y); ink.lineTo(x + 12, y); ink.moveTo(x, y - 12); ink.lineTo(x, y + 12);
  stroke(ink, false);
}

canvas.addEventListener('pointerdown', (event) => {
  if (!picture() || tool === 'look' || event.button) return;
  event.preventDefault();
  canvas.focus({ preventScroll: true });
  canvas.setPointerCapture(event.pointerId);
  pointer = event.pointerId;
  start = cursor = place(event);
  start.screen = [event.clientX, event.clientY];
  path = [start];
});
canvas.addEventListener('pointermove', (event) => {
  if (!picture() || tool === 'look' || (pointer !== null && event.pointerId !== pointer)) return;
  cursor = place(event);
  if (start && tool === 'free') path.push(cursor);
  if (start || corner) draw();
});
canvas.addEventListener('pointerup', (event) => {
  if (event.pointerId !== pointer || !start) return;
  pointer = null;
  const end = place(event), from = start, drawn = path;
  const moved = Math.hypot(event.clientX - from.screen[0], event.clientY - from.screen[1]) > CLICK;
  start = null; path = [];
  if (tool === 'box' && moved) emit('box', [from, end]);
  else if (tool === 'free' && moved) emit('free', drawn.filter((_, index) => index % Math.ceil(drawn.length / 2000) === 0));
  else if (tool === 'free') { say('Keep the button down and drag around what you mean.'); draw(); }
  else click(end);
});
canvas.addEventListener('pointercancel', () => { pointer = null; reset(); });
canvas.addEventListener('blur', () => { if (cursor) cursor.shown = false; draw(); });
canvas.addEventListener('keydown', (event) => {
  const shown = picture();
  if (shown && event.key === 'z' && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (props.value.marks.length) trigger('undo', {});
    return;
  }
  if (!shown || tool === 'look') return;
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (move) {
    const step = (event.shiftKey ? FAR_STEP : STEP) * Math.max(shown.width, shown.height);
    const [x, y] = cursor || [shown.width / 2, shown.height / 2];
    cursor = [clamp(x + move[0] * step, shown.width - 0.01), clamp(y + move[1] * step, shown.height - 0.01)];
    cursor.shown = true;
    say(`x ${Math.round(cursor[0])}, y ${Math.round(cursor[1])}. Enter marks.`);
    draw();
  } else if ((event.key === 'Enter' || event.key === ' ') && cursor) {
    if (tool === 'free') {
      const last = path[path.length - 1];
      if (path.length > 2 && last[0] === cursor[0] && last[1] === cursor[1]) emit('free', path);
      else { path.push(cursor); say(`Corner ${path.length}. Enter again in the same place closes the outline.`); draw(); }
    } else click(cursor);
  } else if (event.key === 'Escape') reset();
  else return;
  event.preventDefault();
});

tools.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.dataset.tool) choose(button.dataset.tool);
  else trigger(button.dataset.act, {});
});

function update() {
  const { picture: shown, marks, tools: allowed } = props.value || {};
  pending = null;
  root.classList.toggle('empty', !shown);
  tools.hidden = !allowed || !shown;
  hint.hidden = !allowed || !shown;
  $('.caption').textContent = shown ? shown.label : '';
  if (!shown) { img.removeAttribute('src'); return; }
  try { sessionStorage.setItem('medplib-open', '1'); } catch { /* no storage */ }
  frame.style.setProperty('--ratio', shown.ratio);
  if (img.src !== shown.src) img.src = shown.src;
  img.alt = shown.label;
  if (!allowed && tool !== 'look') choose('look');
  const open = marks.filter((mark) => !mark.spent).length;
  root.dataset.marks = open;
  tools.querySelectorAll('[data-act]').forEach((button) => { button.disabled = !marks.length; });
  if (!hint.textContent) say(HINTS[tool]);
  draw();
}

choose(tool);
new ResizeObserver(draw).observe(canvas);
watch('value', update);
update();
