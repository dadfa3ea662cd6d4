// Where pictures come from: a file that is opened, dropped or pasted, or an example.
const root = element.firstElementChild;
const strip = root.querySelector('.strip'), input = root.querySelector('input'), button = root.querySelector('.open');
const limit = Number(root.dataset.limit);

async function open(file) {
  if (!file) return;
  if (file.size > limit) return trigger('upload', { name: file.name, size: file.size });
  button.disabled = true;
  button.textContent = 'Opening…';
  try {
    const response = await fetch('open', { method: 'POST', body: file, headers: { 'X-MedPLIB': 'open' } });
    const { token = null } = await response.json();
    trigger('upload', { name: file.name, size: file.size, token });
  } catch {
    trigger('upload', { name: file.name, size: file.size });
  } finally {
    button.disabled = false;
    button.textContent = 'Open image…';
    input.value = '';
  }
}

button.addEventListener('click', () => input.click());
input.addEventListener('change', () => open(input.files[0]));
// A file dropped anywhere is opened here, never by the browser in place of the page.
const holdsFile = (event) => event.dataTransfer?.types.includes('Files');
const glow = (on) => document.querySelector('.viewer .frame')?.classList.toggle('over', on);
['dragenter', 'dragover'].forEach((name) => document.addEventListener(name, (event) => {
  if (holdsFile(event)) { event.preventDefault(); glow(true); }
}));
document.addEventListener('dragleave', (event) => { if (!event.relatedTarget) glow(false); });
document.addEventListener('drop', (event) => {
  glow(false);
  if (holdsFile(event)) { event.preventDefault(); open(event.dataTransfer.files[0]); }
});
document.addEventListener('paste', (event) => {
  const file = event.clipboardData?.files[0];
  if (file) { event.preventDefault(); open(file); }
});

function update() {
  const examples = props.value || [];
  strip.hidden = !examples.length;
  strip.replaceChildren(...examples.map((example, index) => {
    const pick = document.createElement('button'), img = document.createElement('img'), name = document.createElement('span');
    pick.type = 'button';
    img.src = example.thumbnail;
    img.alt = '';
    name.textContent = example.label;
    pick.append(img, name);
    pick.setAttribute('aria-label', `Example: ${example.label}`);
    pick.addEventListener('click', () => trigger('select', { index }));
    return pick;
  }));
}
watch('value', update);
update();
