// One sentence about what went wrong, told to screen readers too.
const root = element.firstElementChild;
const line = element.querySelector('p');
function update() {
  const text = props.value || '';
  line.textContent = text;
  root.hidden = !text;
}
watch('value', update);
update();
