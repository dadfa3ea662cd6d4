// The conversation. Everything that a person or a model wrote becomes text nodes: nothing of it is ever markup.
const list = element.querySelector('ol'), start = element.querySelector('.start'), scroller = element.querySelector('.scroll');
const nodes = new Map();

function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}

function button(text, name, act, label) {
  const node = make('button', name, text);
  node.type = 'button';
  if (label) { node.setAttribute('aria-label', label); node.title = label; }
  node.addEventListener('click', act);
  return node;
}

function written(parts) {
  const text = make('p', 'text');
  text.dir = 'auto';
  parts.forEach((part) => {
    if (part.text !== undefined) return text.append(part.text);
    const chip = make('span', 'chip', part.mask || '');
    chip.style.setProperty('--chip', part.colour);
    chip.setAttribute('role', 'img');
    chip.setAttribute('aria-label', part.mask ? `mask ${part.mask}` : 'mask');
    text.append(chip);
  });
  return text;
}

function build(message) {
  const node = make('li', `message ${message.role}`);
  node.append(make('span', 'who', message.role === 'you' ? 'You' : 'MedPLIB'));
  const body = make('div', 'body');
  node.append(body);
  if (message.parts.length) body.append(written(message.parts));
  (message.about || []).forEach((about) => body.append(make('span', 'about', about)));
  if (message.role === 'you') return node;
  if (message.state === 'running') {
    const wait = make('span', 'wait');
    wait.setAttribute('aria-label', 'answering');
    body.append(wait);
    return node;
  }
  if (message.error) {
    const error = make('p', 'error', message.error);
    error.setAttribute('role', 'alert');
    body.append(error);
  }
  if (message.note) body.append(make('p', 'note', message.note));
  const foot = make('div', 'foot');
  if (!message.error) {
    [[1, '▲', 'Good answer'], [-1, '▼', 'Bad answer']].forEach(([vote, sign, label]) => {
      const thumb = button(sign, 'vote', () => trigger('like', { id: message.id, vote }), label);
      thumb.setAttribute('aria-pressed', String(message.vote === vote));
      foot.append(thumb);
    });
  }
  if (message.again) foot.append(button(message.error ? 'Try again' : 'Regenerate', 'again', () => trigger('retry', {})));
  if (foot.childElementCount) body.append(foot);
  return node;
}

function update() {
  const { messages = [], suggestions = [], busy = false, picture = false } = props.value || {};
  const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
  const keep = new Set();
  messages.forEach((message, place) => {
    const key = `${message.id} ${message.role}`, stamp = JSON.stringify(message), old = nodes.get(key);
    keep.add(key);
    if (!old || old.stamp !== stamp) {
      const node = build(message);
      if (old) {
        const held = document.activeElement && old.node.contains(document.activeElement)
          && document.activeElement.getAttribute('aria-label');
        old.node.replaceWith(node);
        if (held) node.querySelector(`[aria-label="${held}"]`)?.focus();
      }
      nodes.set(key, { node, stamp });
    }
    const { node } = nodes.get(key);
    if (list.children[place] !== node) list.insertBefore(node, list.children[place] || null);
  });
  [...nodes].forEach(([key, { node }]) => { if (!keep.has(key)) { node.remove(); nodes.delete(key); } });
  list.setAttribute('aria-busy', String(busy));
  start.hidden = messages.length > 0;
  start.querySelector('p').textContent = picture
    ? 'Ask about the image, mark a region and ask about that, or name what to segment.'
    : 'Open an image or pick an example to begin.';
  const chips = start.querySelector('.suggestions');
  if (chips.dataset.stamp !== JSON.stringify(suggestions)) {
    chips.dataset.stamp = JSON.stringify(suggestions);
    chips.replaceChildren(...suggestions.map((text) => button(text, 'suggestion', () => {
      trigger('example_select', { text });
      document.querySelector('#question textarea')?.focus();
    })));
  }
  if (atEnd) scroller.scrollTop = scroller.scrollHeight;
}

watch('value', update);
update();
