import itertools
import re
from xml.etree import ElementTree

import pytest

from erase.evaluation.plot import COLOURS, DARK, HEIGHT, PAPER, WIDTH, key, scatter

SVG = "{http://www.w3.org/2000/svg}"
Mark = tuple[str, float, float, str, str]


def marks(picture: str) -> list[Mark]:
    """Title, x, y, shape and colour of each, the legend's at the end."""
    found = []
    for path in ElementTree.fromstring(picture).iter(f"{SVG}path"):
        if (title := path.find(f"{SVG}title")) is not None:
            place = re.fullmatch(r"translate\((.+),(.+)\)", path.get("transform", ""))
            assert place is not None
            x, y = map(float, place.groups())
            assert 0 < x < WIDTH
            assert 0 < y < HEIGHT
            found.append((title.text or "", x, y, path.get("d", ""), path.get("fill", "")))
    return found


def test_a_mark_a_point_and_one_a_series_in_the_legend() -> None:
    points = [("a", 0.0, 0.5), ("b", 0.5, 1.0), ("a", 1.0, -0.25)]
    picture = scatter(points, "gone", "kept")
    first, other, second, *legend = marks(picture)
    assert [mark[0] for mark in (first, other, second)] == ["a: 0, 0.5", "b: 0.5, 1", "a: 1, -0.25"]
    assert first[1] < other[1] < second[1]  # to the right
    assert second[2] > first[2] > other[2]  # upwards
    # linear: halfway between is halfway between; places are written to a tenth
    assert other[1] == pytest.approx((first[1] + second[1]) / 2, abs=0.11)
    assert (other[2] - first[2]) / (second[2] - first[2]) == pytest.approx(-0.5 / 0.75, abs=0.01)
    assert first[3:] == second[3:] == legend[0][3:]
    assert first[3] != other[3]
    assert first[4] != other[4]
    assert [mark[0] for mark in legend] == ["a", "b"]
    assert {"a", "b", "gone", "kept"} <= {text.text for text in ElementTree.fromstring(picture).iter(f"{SVG}text")}


def test_every_series_of_ten_looks_its_own() -> None:
    legend = marks(scatter([(str(i), i, i) for i in range(10)], "x", "y"))[10:]
    assert len({mark[3:] for mark in legend}) == len(COLOURS) == 10


def test_an_axis_a_hair_under_a_power_of_ten_has_ticks() -> None:
    points = [("a", 0.0, 99.0), ("b", 100 / 350, 98.0)]
    assert len(marks(scatter(points, "x", "y", ranges=((0, 100), (0, 100))))) == 4


def test_names_are_escaped() -> None:
    name, label = """<b> & "c\'""", "a < b & 'c' \"d\""
    picture = scatter([(name, 1.0, 2.0)], label, label)
    assert [mark[0] for mark in marks(picture)] == [f"{name}: 1, 2", name]
    root = ElementTree.fromstring(picture)
    assert root.get("aria-label") == f"{label} against {label}"
    assert [text.text for text in root.iter(f"{SVG}text")].count(label) == 2


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_one_point_or_several_in_one_place(value: float) -> None:
    for count in (1, 2):
        assert len(marks(scatter([("a", value, value)] * count, "x", "y"))) == count + 1


def test_rings_and_names() -> None:
    points = [("a", 0.0, 0.5), ("b", 0.5, 1.0)]
    picture = scatter(points, "gone", "kept", [1], ["a [1]", "b [2]"])
    first, second, *_ = marks(picture)
    assert [first[0], second[0]] == ["a [1]: 0, 0.5", "b [2]: 0.5, 1"]
    ring, _ = ElementTree.fromstring(picture).iter(f"{SVG}circle")
    assert "Pareto front" in picture
    assert "Pareto front" not in scatter(points, "gone", "kept")
    assert (float(ring.get("cx", "")), float(ring.get("cy", ""))) == second[1:3]


def test_intervals_are_lines_through_their_points_and_within_the_picture() -> None:
    points = [("a", 0.2, 0.5), ("b", 0.5, 1.0), ("b", 0.3, 0.6)]
    picture = scatter(points, "gone", "kept", bars=[((0.0, 0.4), (0.0, 0.75)), (None, (0.9, 1.0)), (None, None)])
    first, second, *_ = marks(picture)
    whole, upright = (
        path for path in ElementTree.fromstring(picture).iter(f"{SVG}path") if path.get("stroke-opacity") is not None
    )
    assert (whole.get("stroke"), upright.get("stroke")) == (first[4], second[4])
    found = re.fullmatch(r"M(.+),(.+)H(.+)M(.+),(.+)V(.+)", whole.get("d", ""))
    assert found is not None
    left, y, right, x, low, high = map(float, found.groups())
    assert (x, y) == first[1:3]
    assert (left + right) / 2 == pytest.approx(x, abs=0.11)  # 0.2 is halfway
    assert (low - y) / (low - high) == pytest.approx(0.5 / 0.75, abs=0.01)
    assert 0 < left < x < second[1] < WIDTH
    assert 0 < high < y < low < HEIGHT
    assert re.fullmatch(rf"M{second[1]},(.+)V(.+)", upright.get("d", ""))


@pytest.mark.parametrize("low", [0.0, 0.3, -12.0])
@pytest.mark.parametrize("width", [0.07, 0.29, 0.3, 1.0, 2.9, 100.0, 500.0])
def test_axes_are_marked_at_round_numbers(low: float, width: float) -> None:
    picture = scatter([("a", low, 0.0), ("a", low + width, 1.0)], "x", "y")
    shown = [text for text in ElementTree.fromstring(picture).iter(f"{SVG}text") if text.get("y") == str(HEIGHT - 28)]
    ticks = [float(text.text or "") for text in shown]
    assert 3 <= len(ticks) <= 7
    steps = {f"{b - a:.3g}" for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1
    assert steps.pop()[-1] in "0125"
    assert low - 0.06 * width <= ticks[0]
    assert ticks[-1] <= low + 1.06 * width


@pytest.mark.parametrize("values", [(0.0, 100.0), (99.0, 100.0), (100.0, 100.0), (0.0, 0.0)], ids=str)
def test_no_axis_goes_beyond_what_a_value_can_be(values: tuple[float, float]) -> None:
    low, high = values
    points = [("a", low, low), ("a", high, high)]
    bars = [((low, high), (low, high))] * 2
    for ranges in (((0.0, 100.0), (0.0, 100.0)), ((0.0, 100.0), (0.0, None)), ((None, None), (None, None))):
        picture = scatter(points, "x", "y", bars=bars, ranges=ranges)
        texts = list(ElementTree.fromstring(picture).iter(f"{SVG}text"))
        across = [float(t.text or "") for t in texts if t.get("y") == str(HEIGHT - 28)]
        up = [float(t.text or "") for t in texts if t.get("text-anchor") == "end"]
        assert across
        assert up
        for ticks, (least, most) in zip((across, up), ranges, strict=True):
            assert least is None or min(ticks) >= least
            assert most is None or max(ticks) <= most
        marks(picture)  # within the picture


def test_a_legend_elsewhere_has_the_marks_of_the_plot() -> None:
    points = [("a", 0.0, 0.5), ("<b>", 0.5, 1.0), ("a", 1.0, -0.25)]
    drawn = marks(scatter(points, "x", "y", legend=False))
    assert len(drawn) == 3
    legend = key([name for name, *_ in points])
    assert [name for _, name in legend] == ["a", "<b>"]
    for (svg, name), mark in zip(legend, drawn, strict=False):
        path = ElementTree.fromstring(svg).find(f"{SVG}path")
        assert path is not None
        assert (path.findtext(f"{SVG}title"), path.get("d"), path.get("fill")) == (name, *mark[3:])


def test_no_points_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        scatter([], "x", "y")


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    ]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_what_is_drawn_stands_out_from_a_light_and_from_a_dark_background() -> None:
    """WCAG asks for a contrast of 3 for graphics and 4.5 for text."""
    picture = scatter([(str(i), i, i) for i in range(12)], "x", "y", [1], bars=[((0, 1), None)] * 12)
    dark = dict(re.findall(r"\.scatter (\.?\w+) \{ \w+: (#\w+) \}", picture))
    root = ElementTree.fromstring(picture)
    for part in root.iter():
        kind = "text" if part.tag == f"{SVG}text" else f".{part.get('class')}"
        if part.tag in (f"{SVG}text", f"{SVG}path", f"{SVG}circle"):
            light = (part.get("stroke") if kind[1] in "ab" else part.get("fill")) or "#000000"
            for colour, paper in zip((light, dark[kind]), PAPER, strict=True):
                high, low = sorted((luminance(colour) + 0.05, luminance(paper) + 0.05), reverse=True)
                assert high / low >= (4.5 if kind == "text" else 3), (kind, colour)
    assert dark[".paper"] == PAPER[1]
    assert len({*DARK}) == len(COLOURS)
