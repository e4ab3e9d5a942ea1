"""Charts as a file."""

import xml.etree.ElementTree as ET

from k2train.report import figure
from k2train.report.chart import Series, heat_map, line_chart

SVG = "{http://www.w3.org/2000/svg}"


def test_all_charts_are_in_the_figure_with_their_legends():
    two = [Series(name=name, x=[1, 2, 3], y=[k, 2, 3], colour=k) for k, name in enumerate(("<one>", "other"))]
    charts = [
        line_chart("loss & more", "nats", two),
        line_chart("alone", "", two[:1]),
        heat_map("heads", "logit", [1, 2], [("0.0", [1.0, 2.0]), ("0.1", [3.0, 4.0])]),
    ]
    root = ET.fromstring(figure(charts))
    texts = ["".join(text.itertext()).strip() for text in root.iter(f"{SVG}text")]
    assert [text for text in texts if text.startswith(("loss & more", "alone", "heads"))] == [
        *("loss & more nats", "alone", "heads logit, 1 to 4")
    ]
    assert texts.count("<one>") == 1  # a single curve needs no legend
    assert "other" in texts
    assert len([r for r in root.iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]) == 4
    width, height = float(root.get("width")), float(root.get("height"))
    places = [g.get("transform")[len("translate(") : -1].split() for g in root.findall(f"{SVG}g")]
    assert len({tuple(place) for place in places}) == 3
    assert all(float(x) < width and float(y) + 230 < height for x, y in places)


def test_a_legend_of_long_names_fits():
    names = ["dense feed-forward, AdamW", "router", "shared experts, Muon", "a", "attention, Muon", "b" * 50]
    curves = [Series(name=name, x=[1, 2], y=[k, 2], colour=k) for k, name in enumerate(names)]
    root = ET.fromstring(figure([line_chart("loss", "nats", curves)]))
    found = {"".join(text.itertext()): text for text in root.iter(f"{SVG}text")}
    ends = {}  # of the last entry of each row
    for name in names:
        left, row = float(found[name].get("x")), float(found[name].get("y"))
        assert left - 26 >= ends.get(row, 0)
        ends[row] = left + 4.8 * len(name)  # of a character at 9.5 px, on average
        assert ends[row] <= 400
    assert len(ends) > 1
