// Pictures to try.
const root = element.firstElementChild;
const strip = element.querySelector('.strip');
function update() {
  const examples = props.value || [];
  root.hidden = !examples.length;
  strip.replaceChildren(...examples.map((example, index) => {
    const button = document.createElement('button'), img = document.createElement('img'), name = document.createElement('span');
    button.type = 'button';
    img.src = example.thumbnail;
    img.alt = '';
    name.textContent = example.label;
    button.append(img, name);
    button.setAttribute('aria-label', `Example: ${example.label}`);
    button.addEventListener('click', () => trigger('select', { index }));
    return button;
  }));
}
watch('value', update);
update();
