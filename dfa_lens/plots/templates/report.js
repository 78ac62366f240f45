// The page at work: figures are unpacked and drawn when their task is chosen; the address says what is shown; tables sort,
// filter, and turn into cards where they are wider than the page; colours follow the reader's setting, a button changes them.
const DARK = {
  '#ffffff': '#16181c', white: '#16181c', '#222222': '#e6e6e6', '#000000': '#e6e6e6', '#e4e4e4': '#2b2f36',
  '#eeeeee': '#33373f', 'rgba(255,255,255,0.8)': 'rgba(22,24,28,0.8)',
};
const LIGHT = Object.fromEntries(Object.entries(DARK).map(([light, dark]) => [dark, light]));
const by = id => document.getElementById(id);
const dark = () => document.documentElement.dataset.scheme === 'dark';

// --- figures

const unpack = async script => {
  const text = atob(script.textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) { bytes[i] = text.charCodeAt(i); }
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))).text();
};
let plotly = null; // once, however many figures ask for it
const loaded = () => {
  plotly = plotly || unpack(by('plotly')).then(text => {
    const script = document.createElement('script');
    script.textContent = text; // not by a blob's address, a new one each time: the browser would compile it anew on loading again
    document.head.append(script);
  });
  return plotly;
};
// plotly.js has most kinds of traces in a list, for later (see report.py): those of a figure are taken in before it is drawn.
const known = new Set(['scatter']);
const learn = data => {
  while ((Plotly.later || []).length && data.some(({type}) => !known.has(type || 'scatter'))) {
    const kind = Plotly.later.shift()();
    Plotly.register(kind);
    known.add(kind.name);
  }
};
// What changes a figure's colours; those of traces by trace, null where none changes.
const painted = graph => {
  const to = dark() ? DARK : LIGHT;
  const {layout} = graph;
  const paper = dark() ? '#16181c' : '#ffffff', ink = dark() ? '#e6e6e6' : '#222222';
  const change = {paper_bgcolor: paper, 'font.color': ink};
  if (to[layout.plot_bgcolor]) { change.plot_bgcolor = to[layout.plot_bgcolor]; }
  Object.keys(layout).filter(key => /^[xy]axis/.test(key)).forEach(key => {
    if (to[layout[key].gridcolor]) { change[`${key}.gridcolor`] = to[layout[key].gridcolor]; }
  });
  (layout.sliders || []).forEach((_, i) => {
    Object.assign(change, {
      [`sliders[${i}].currentvalue.font.color`]: ink, [`sliders[${i}].bgcolor`]: dark() ? '#59606c' : '#f8fafc',
    });
  });
  (layout.updatemenus || []).forEach((_, i) => {
    Object.assign(change, {[`updatemenus[${i}].bgcolor`]: paper, [`updatemenus[${i}].font.color`]: ink});
  });
  const traces = graph.data.map(trace => ({
    ...(trace.line && to[trace.line.color] ? {'line.color': to[trace.line.color]} : {}),
    ...(trace.marker && trace.marker.line && to[trace.marker.line.color]
      ? {'marker.line.color': to[trace.marker.line.color]} : {}),
    ...(trace.type === 'bar' && to[trace.marker.color] ? {'marker.color': to[trace.marker.color]} : {}),
    ...((trace.name || '').endsWith(' outside')
      ? {colorscale: trace.colorscale.map(([at, color]) => [at, to[color] || color])} : {}),
  }));
  return [change, traces];
};
const paint = async graph => {
  const [change, traces] = painted(graph);
  await Plotly.relayout(graph, change);
  for (const [i, one] of traces.entries()) {
    if (Object.keys(one).length) {
      await Plotly.restyle(graph, Object.fromEntries(Object.entries(one).map(([key, value]) => [key, [value]])), [i]);
    }
  }
};
const figures = {}; // by section, its figures by name
const figuresOf = async id => {
  const ready = loaded(); // unpacked beside the figures
  figures[id] = figures[id] || JSON.parse(await unpack(document.querySelector(`script[data-of="${CSS.escape(id)}"]`)));
  await ready;
  return figures[id];
};
// When the browser has painted what was drawn, or (in a page that nobody sees, it paints nothing) a little later.
const shown = () => new Promise(resolve => {
  requestAnimationFrame(() => setTimeout(resolve));
  setTimeout(resolve, 100);
});
// What relayout and restyle would write, in what is not drawn yet.
const put = (target, changes) => Object.entries(changes).forEach(([path, value]) => {
  const keys = path.replace(/\[(\d+)\]/g, '.$1').split('.');
  const last = keys.pop();
  keys.reduce((inner, key) => { inner[key] = inner[key] || {}; return inner[key]; }, target)[last] = value;
});
// The figure in the reader's colours, and as fit.js would arrange it for this width: what is drawn so at once is not drawn
// again.
const prepared = ({data, layout, reacts}, width) => {
  const figure = structuredClone({data, layout});
  const given = reacts.find(([name]) => name === 'fit.js');
  if (given) { put(figure.layout, reactions['fit.js'](null, given[1], {layout: figure.layout, width})); }
  if (dark()) {
    const [change, traces] = painted(figure);
    put(figure.layout, change);
    traces.forEach((one, i) => put(figure.data[i], one));
  }
  return figure;
};
const draw = async (place, figure) => {
  if (place.firstElementChild) { Plotly.Plots.resize(place.firstElementChild); return; }
  const graph = document.createElement('div');
  graph.className = 'plotly-graph-div';
  const {data, layout} = prepared(figure, place.clientWidth);
  graph.style.height = `${layout.height || 450}px`;
  place.append(graph);
  learn(data);
  await Plotly.newPlot(graph, data, layout, CONFIG);
  figure.reacts.forEach(([name, given]) => reactions[name](graph, given));
  await shown();
};
const show = which => {
  document.documentElement.dataset.scheme = which;
  document.querySelectorAll('.plotly-graph-div').forEach(graph => { if (graph.layout) { paint(graph); } });
};

// --- what is shown, and the address: #family=llama3&task=ioi&setting=zero-shot&size=20, or #edges=NAME

const sections = [...document.querySelectorAll('section')];
let current = null;
const params = text => new URLSearchParams(text.replace(/^#/, ''));
const wanted = () => {
  const asked = params(location.hash);
  const fits = section => [...params(section.dataset.link)].every(([key, value]) => asked.get(key) === value);
  const task = section => asked.has('task') && params(section.dataset.link).get('task') === asked.get('task');
  return sections.find(fits) || sections.find(task);
};
const note = (key, value) => {
  const now = params(current.dataset.link);
  const before = params(location.hash);
  ['setting', 'size'].forEach(name => { if (before.get(name)) { now.set(name, before.get(name)); } });
  now.set(key, value);
  history.replaceState(null, '', `#${now}`);
};
const slide = (graph, size) => {
  const slider = graph.layout.sliders && graph.layout.sliders[0];
  if (!slider) { return; }
  if (size !== null) {
    const number = slider.steps.findIndex(step => step.label.startsWith(`${size} of `));
    if (number >= 0) {
      Plotly.restyle(graph, ...slider.steps[number].args);
      Plotly.relayout(graph, {'sliders[0].active': number});
    }
  }
  if (!graph.dataset.noted) {
    graph.dataset.noted = 'yes';
    graph.on('plotly_sliderchange', ({step}) => note('size', parseInt(step.label, 10)));
  }
};
const drawSetting = async () => {
  const section = current, name = by('setting').value;
  const places = [...section.querySelectorAll('figure[data-setting]')];
  places.forEach(place => { place.hidden = place.dataset.setting !== name; });
  const place = places.find(each => !each.hidden);
  if (!place) { return; }
  await draw(place, (await figuresOf(section.id))[name]);
  slide(place.firstElementChild, params(location.hash).get('size'));
};
const go = async section => {
  current = section;
  sections.forEach(each => { each.hidden = each !== section; });
  by('task').value = section.dataset.link;
  const names = [...section.querySelectorAll('figure[data-setting]')].map(place => place.dataset.setting);
  by('setting').replaceChildren(...names.map(name => new Option(name, name)));
  by('settings').hidden = names.length < 2;
  const asked = params(location.hash).get('setting');
  by('setting').value = names.includes(asked) ? asked : names.includes('zero-shot') ? 'zero-shot' : names[0];
  const found = await figuresOf(section.id);
  await drawSetting();
  for (const place of section.querySelectorAll(':scope > figure:not([data-setting])')) {
    await draw(place, found[place.dataset.figure]);
  }
};
const follow = async () => {
  const section = wanted();
  if (section && section !== current) { await go(section); } else if (section) {
    const asked = params(location.hash).get('setting');
    if (asked && [...by('setting').options].some(option => option.value === asked)) { by('setting').value = asked; }
    await drawSetting();
  }
};

// --- tables

const sort = (table, column, button) => {
  const down = button.dataset.order === 'up';
  table.querySelectorAll('th button').forEach(each => { delete each.dataset.order; });
  button.dataset.order = down ? 'down' : 'up';
  const body = table.tBodies[0];
  const value = row => {
    const text = row.cells[column].dataset.value;
    return text === '' || Number.isNaN(Number(text)) ? text : Number(text);
  };
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === '' || y === '') { return x === y ? 0 : x === '' ? 1 : -1; }
    return (down ? -1 : 1) * (typeof x === 'number' && typeof y === 'number' ? x - y : String(x).localeCompare(String(y)));
  };
  [...body.rows].sort(order).forEach(row => body.append(row));
};
const fitTable = holder => { // cards where columns would be hidden
  holder.classList.remove('cards');
  holder.classList.toggle('cards', holder.querySelector('table').offsetWidth > holder.clientWidth + 1);
};
document.querySelectorAll('.table').forEach(holder => {
  const table = holder.querySelector('table');
  table.querySelectorAll('th button').forEach((button, column) =>
    button.addEventListener('click', () => sort(table, column, button)));
  holder.querySelector('input').addEventListener('input', ({target: {value}}) => {
    const words = value.toLowerCase().split(/\s+/);
    [...table.tBodies[0].rows].forEach(row => {
      row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
    });
  });
  let width = 0;
  new ResizeObserver(() => {
    if (holder.clientWidth !== width) { width = holder.clientWidth; fitTable(holder); }
  }).observe(holder);
});

// --- the beginning

(async () => {
  if (window.matchMedia('(prefers-color-scheme: dark)').matches) { document.documentElement.dataset.scheme = 'dark'; }
  by('scheme').addEventListener('click', () => show(dark() ? 'light' : 'dark'));
  if (!window.DecompressionStream) { by('old').hidden = false; return; }
  if (sections.length) {
    by('task').addEventListener('change', () => { location.hash = by('task').value; });
    by('setting').addEventListener('change', () => { note('setting', by('setting').value); drawSetting(); });
    window.addEventListener('hashchange', follow);
    sections.forEach(section => section.querySelectorAll('details').forEach(part => part.addEventListener('toggle', async () => {
      if (!part.open) { return; }
      part.querySelectorAll('.table').forEach(fitTable);
      const found = await figuresOf(section.id);
      for (const place of part.querySelectorAll('figure')) { await draw(place, found[place.dataset.figure]); }
    })));
    await go(wanted() || sections[0]);
  }
  if (by('summary')) { await draw(by('summary'), (await figuresOf('summary')).summary); }
  document.documentElement.dataset.drawn = 'yes';
})();
window.addEventListener('beforeprint', () => {
  show('light');
  document.querySelectorAll('section:not([hidden]) details').forEach(part => { part.open = true; });
});
