// What a click on a node does in an HTML file: it looks the answer up (see Clicks in links.py) and draws it.
function (graph, {rectangles, answers, note}) {
  let shown = null;
  const show = key => {
    const answer = answers[graph.layout.meta || 0][key];
    shown = answer && key !== shown ? key : null;
    const [words, outlines] = shown ? answer : ['', []];
    const width = Math.min(900, graph.clientWidth - 70);
    const text = graph.wrapped(words, note.font.size, width);
    const notes = (graph.layout.annotations || []).filter(each => each.name !== note.name);
    Plotly.relayout(graph, {
      shapes: outlines.map(([cell, color, width]) => ({...rectangles[cell], line: {color, width}})),
      annotations: shown ? [...notes, {...note, text, width}] : notes,
    });
  };
  graph.on('plotly_click', ({points: [point]}) =>
    show([point.curveNumber, ...(point.pointIndex || point.pointNumber)].join()));
  graph.on('plotly_doubleclick', () => show(null));
  graph.on('plotly_buttonclicked', () => { if (shown) { show(null); } });
}
