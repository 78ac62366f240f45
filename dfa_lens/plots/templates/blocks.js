// What a click on a block of edges does in an HTML file: its edges are drawn below (see Clicks in edge_heatmap.py).
function (graph, {details, missing}) {
  graph.on('plotly_click', ({points: [point]}) => {
    if (point.curveNumber !== 0 || point.z === null) { return; }
    const found = details[(point.pointIndex || point.pointNumber).join()];
    if (!found) { Plotly.relayout(graph, {'annotations[1].text': missing}); return; }
    const {z, x, y} = found.trace;
    const {title, limit} = found;
    Plotly.update(graph, {z: [z], x: [x], y: [y]},
      {'annotations[1].text': title, 'coloraxis2.cmin': -limit, 'coloraxis2.cmax': limit}, [1]);
  });
}
