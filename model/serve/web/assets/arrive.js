() => {
  try {  // a copy of a tab has its storage, but its page was never left
    const kept = sessionStorage, before = kept.getItem('medplib-left') && kept.getItem('medplib-tab');
    const tab = before || Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) =>
      byte.toString(16).padStart(2, '0')).join('');
    const held = before && kept.getItem('medplib-open') ? '+' : '';
    kept.setItem('medplib-tab', tab);
    ['medplib-left', 'medplib-open'].forEach((name) => kept.removeItem(name));
    addEventListener('pagehide', () => kept.setItem('medplib-left', '1'));
    addEventListener('pageshow', () => kept.removeItem('medplib-left'));
    return tab + held;
  } catch { return ''; }  // no storage: a page that is loaded again begins anew
}
