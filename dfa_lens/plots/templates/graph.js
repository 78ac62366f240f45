// What a click on a node of a circuit does in an HTML file: its edges stay in colour and are named (see Clicks in
// edge_graph.py). And in a narrow window nodes and their labels shrink, so that they do not overlap.
function (graph, {edges, reads, writes, note, listed, columns, opacity}) {
  const traces = edges.map((_, trace) => trace);
  let shown = null;
  const safe = name => name.replace(/</g, '&lt;').replace(/>/g, '&gt;');
  const line = (verb, mine, word) => {
    const words = mine.filter(i => edges[i][2] <= (graph.layout.meta || 0)).map(i => edges[i][word]);
    const more = words.length > listed ? ` and ${words.length - listed} more` : '';
    return words.length ? [`${verb} ${words.slice(0, listed).join(', ')}${more}`] : [];
  };
  const show = name => {
    shown = name !== shown ? name : null;
    const [read, written] = [reads[shown] || [], writes[shown] || []];
    const mine = new Set([...read, ...written]);
    const width = Math.min(900, graph.clientWidth - 70);
    const words = [...line('reads', read, 0), ...line('writes to', written, 1)].join('<br>');
    const text = graph.wrapped(`<b>${safe(shown || '')}</b> ${words}`, note.font.size, width);
    Plotly.update(graph, {opacity: traces.map(i => shown === null || mine.has(i) ? opacity[0] : opacity[1])},
      {annotations: shown === null ? [] : [{...note, width, text}]}, traces);
  };
  graph.on('plotly_click', ({points: [point]}) => { if (point.customdata) { show(point.customdata); } });
  graph.on('plotly_doubleclick', () => show(null));
  graph.on('plotly_sliderchange', () => { if (shown !== null) { const name = shown; shown = null; show(name); } });
  const sizes = graph.data.map(trace => trace.marker && trace.marker.size);
  let before = null;
  const fit = () => {
    const room = graph._fullLayout._size.w / columns;  // pixels from head to head
    const scale = Math.min(1, room / 26);
    if (scale === before) { return; }
    before = scale;
    const chosen = graph.data.map((trace, i) => i).filter(i => sizes[i] && graph.data[i].name && !graph.data[i].textposition);
    Plotly.restyle(graph, {
      'marker.size': chosen.map(i => sizes[i] * scale),
      mode: chosen.map(i => graph.data[i].name === 'nodes' ? (room > 11 ? 'markers+text' : 'markers')
        : (room > 22 ? 'markers+text' : 'markers')),
      'textfont.size': chosen.map(i => (graph.data[i].name === 'nodes' ? 10.5 : 9) * Math.max(0.7, scale)),
    }, chosen);
  };
  graph.on('plotly_afterplot', fit);
  fit();
}
