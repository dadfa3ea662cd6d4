// The list of masks and their files. A file comes as data and is saved from here: the server has no address for it.
const root = element.firstElementChild;
const list = element.querySelector('ul'), files = element.querySelector('.files');
const NAMES = { png: 'PNG', overlay: 'Overlay', rle: 'RLE (JSON)', nifti: 'NIfTI', 'dicom-seg': 'DICOM-SEG' };
let saved = null;

function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}

function row(mask) {
  const item = make('li', mask.shown ? '' : 'off'), label = make('label');
  const box = make('input');
  box.type = 'checkbox';
  box.checked = mask.shown;
  box.dataset.id = mask.id.join(' ');
  box.addEventListener('change', () => trigger('select', { id: mask.id, shown: box.checked }));
  const swatch = make('span', 'chip', mask.number);
  swatch.style.setProperty('--chip', mask.colour);
  label.append(box, swatch, make('span', 'name', mask.label));
  item.append(label, make('span', 'facts', `score ${mask.score} · ${mask.area}`));
  if (mask.warning) item.append(make('span', 'warning', `⚠ ${mask.warning}`));
  return item;
}

function save({ name, data, key }) {
  if (saved === key) return;
  saved = key;
  const bytes = Uint8Array.from(atob(data), (sign) => sign.charCodeAt(0));
  const link = make('a');
  link.href = URL.createObjectURL(new Blob([bytes], { type: 'application/octet-stream' }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function update() {
  const { rows = [], kinds = [], download = null } = props.value || {};
  root.hidden = !rows.length;
  const held = document.activeElement?.dataset?.id;
  list.replaceChildren(...rows.map(row));
  if (held) list.querySelector(`[data-id="${held}"]`)?.focus();
  if (files.dataset.stamp !== kinds.join()) {
    files.dataset.stamp = kinds.join();
    files.replaceChildren(make('span', '', 'Save masks as'), ...kinds.map((kind) => {
      const button = make('button', '', NAMES[kind]);
      button.type = 'button';
      button.addEventListener('click', () => trigger('download', { kind }));
      return button;
    }));
  }
  if (download) save(download);
}

watch('value', update);
update();
