// In a narrow window the nodes of a circuit shrink, so that they do not overlap. And what a click on one shows in an HTML
// file: its words and attention pattern (see Told in node_graph.py).
function (graph, told) {
  const sizes = graph.data.map(trace => trace.marker && trace.marker.size);
  let scale = 1;
  const shrink = () => {
    const axis = graph._fullLayout.xaxis;
    const room = axis._length / (axis.range[1] - axis.range[0]);  // pixels from head to head
    const now = Math.round(Math.min(1, room / 25) * 100) / 100;
    if (now === scale) { return; }
    scale = now;
    const chosen = graph.data.map((_, i) => i).filter(i => sizes[i]);
    Plotly.restyle(graph, {
      'marker.size': chosen.map(i => sizes[i] * (graph.data[i].name === 'outside' ? Math.max(scale, 0.6) : scale)),
      'textfont.size': chosen.map(() => 10 * Math.max(scale, 0.75)),
    }, chosen);
  };
  graph.on('plotly_afterplot', shrink);
  shrink();
  if (!told) { return; }
  const {n, words, patterns, causal, letters, first} = told;
  let shown = first, room = 0;
  const safe = text => text.replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');
  const z = name => {
    const flat = patterns[name];
    let at = 0;
    const weight = () => letters.indexOf(flat[at++]) / (letters.length - 1);
    return Array.from({length: n}, (_, q) =>
      Array.from({length: n}, (_, k) => flat && (k <= q || !causal) ? weight() : null));
  };
  const heading = name => {
    const none = patterns[name] ? 'attention pattern:' : 'no attention pattern: it is an MLP block';
    const last = Object.keys(patterns).length ? none : '';
    return [`<b>${safe(name)}</b>`, ...words[name].map(safe), ...(last ? [last] : [])].join('<br>');
  };
  const number = name => graph.data.findIndex(trace => trace.name === name);
  const write = () => {
    const i = graph.layout.annotations.findIndex(each => each.name === 'node');
    const {font: {size}} = graph.layout.annotations[i];
    const change = {[`annotations[${i}].text`]: graph.wrapped(heading(shown), size, room)};
    ['xaxis2', 'yaxis2'].forEach(axis => { change[`${axis}.visible`] = Boolean(patterns[shown]); });
    return Plotly.relayout(graph, change);
  };
  const show = async (name, x, y) => {
    shown = name;
    await Plotly.restyle(graph, {x: [[x]], y: [[y]]}, [number('chosen')]);
    if (number('pattern') >= 0) { await Plotly.restyle(graph, {z: [z(name)]}, [number('pattern')]); }
    write();
  };
  graph.on('plotly_click', ({points: [point]}) => {
    if (words[point.customdata]) { show(point.customdata, point.x, point.y); }
  });
  const fit = () => {
    const axis = graph._fullLayout.xaxis2;
    if (Math.abs(axis._length - room) < 8) { return; }  // the labels of an axis that comes and goes change it by little
    room = axis._length;
    write();
  };
  graph.on('plotly_afterplot', fit);
  fit();
}
