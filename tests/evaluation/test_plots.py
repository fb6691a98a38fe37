from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from laplace_lora_fast.evaluation import plots
from laplace_lora_fast.evaluation.metrics import bin_by_confidence
from laplace_lora_fast.evaluation.predictions import Predictions
from laplace_lora_fast.evaluation.selective import abstention_curve


def predictions(n: int = 60, classes: int = 2, seed: int = 0) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(n, classes, generator=generator)).softmax(1)
    return Predictions(probs, torch.randint(0, classes, (n,), generator=generator))


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, in order."""
    saved, save = [], Figure.savefig

    def record(self, *args, **kwargs):
        saved.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved


@pytest.mark.parametrize("classes", [2, 4])
def test_bins_equal_numpy(classes):
    p = predictions(200, classes)
    bins = bin_by_confidence(p)
    confidence, correct = p.probs.numpy().max(1), (p.probs.argmax(1) == p.labels).numpy()
    count, edges = np.histogram(confidence, bins=15, range=(0, 1))
    some = count > 0
    index = np.digitize(confidence, edges[1:-1])
    assert bins.count.tolist() == count[some].tolist()
    assert bins.confidence.tolist() == pytest.approx(
        [confidence[index == i].mean() for i in np.flatnonzero(some)]
    )
    assert bins.accuracy.tolist() == pytest.approx([correct[index == i].mean() for i in np.flatnonzero(some)])


def test_bins_hold_the_calibration_error():
    p = predictions(300)
    bins = bin_by_confidence(p)
    gap = (bins.confidence - bins.accuracy).abs() * bins.count / bins.count.sum()
    assert gap.sum().item() == pytest.approx(p.metrics().ece, abs=1e-6)


def test_full_confidence_lies_in_the_last_bin():
    bins = bin_by_confidence(Predictions(torch.tensor([[1.0, 0.0], [0.96, 0.04]]), torch.tensor([0, 1])))
    assert bins.count.tolist() == [2]


def test_both_plots_put_an_edge_into_the_bin_below_it(tmp_path, figures):
    """Nine and ten fifteenths: the right ends of the bins 8 and 9."""
    first = torch.tensor([9 / 15, 9 / 15, 10 / 15], dtype=torch.float64)
    p = Predictions(torch.stack([first, 1 - first], 1), torch.tensor([0, 1, 0]))
    assert bin_by_confidence(p).count.tolist() == [2, 1]
    plots.confidence_histogram({"": {"": p}}, tmp_path / "h.png")
    right, wrong = ([bar.get_height() for bar in bars] for bars in figures[0].axes[0].containers)
    assert right == [0] * 8 + [1, 1] + [0] * 5
    assert wrong == [0] * 8 + [1, 0] + [0] * 5
    bars = figures[0].axes[0].containers[0]
    assert [bar.get_x() for bar in bars] == pytest.approx([i / 15 for i in range(15)])
    assert [bar.get_width() for bar in bars] == pytest.approx([1 / 15] * 15)


def test_a_failed_plot_leaves_the_old_one(tmp_path, monkeypatch):
    def full(self, path, **kwargs):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "r.png").write_text("old")
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*r\.png'"):
        predictions().plot(tmp_path / "r.png")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("r.png", "old")]


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (5, 5), (3, 7), (90, 100)])
def test_wilson_ends_lie_at_the_quantile_of_their_own_binomial(successes, n):
    share = torch.tensor([successes / n], dtype=torch.float64)
    for end in plots.wilson_interval(share, torch.tensor([n])):
        p = end.item()
        assert (share.item() - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / n, abs=1e-12)


def test_reliability_diagram_shows_bins_and_scores(tmp_path, figures):
    grid = {
        d: {m: predictions(seed=s) for s, m in enumerate(("MAP", "Laplace"))} for d in ("in", "out", "far")
    }
    plots.reliability_diagram(grid, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    axes = figures[0].axes
    assert len(axes) == 6
    for ax, p in zip(axes, [p for row in grid.values() for p in row.values()], strict=True):
        bins = bin_by_confidence(p)
        drawn = np.asarray(ax.collections[-1].get_offsets())
        assert drawn == pytest.approx(torch.stack([bins.confidence, bins.accuracy], 1).numpy())
        assert f"ECE {p.metrics().ece:.3f}" in ax.get_title()
    texts = [text.get_text() for ax in axes for text in ax.texts]
    assert texts == ["MAP", "Laplace"]


def test_confidence_histogram_counts_right_and_wrong(tmp_path, figures):
    p = predictions(80)
    plots.confidence_histogram({"in": {"MAP": p}}, tmp_path / "h.png")
    ax = figures[0].axes[0]
    right, wrong = (sum(bar.get_height() for bar in container) for container in ax.containers)
    assert (right, wrong) == (p.correct.sum().item(), (~p.correct).sum().item())
    lines = [line.get_xdata()[0] for line in ax.lines]
    assert lines == pytest.approx([p.confidence.mean().item(), p.metrics().accuracy])


@pytest.mark.parametrize("draw", [plots.reliability_diagram, plots.confidence_histogram])
def test_ragged_grids_are_refused(draw, tmp_path):
    ragged = {"in": {"MAP": predictions()}, "out": {"Laplace": predictions()}}
    for grid in ({}, {"in": {}}, ragged):
        with pytest.raises(ValueError, match="at least one data set"):
            draw(grid, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_a_risk_coverage_curve_is_that_of_abstention(tmp_path, figures):
    p = predictions(50)
    plots.risk_coverage({"set": {"method": p}}, tmp_path / "risk.png")
    assert (tmp_path / "risk.png").exists()
    (axes,) = figures[0].axes
    curve = abstention_curve(p)
    assert axes.lines[0].get_xdata().tolist() == pytest.approx(curve.coverage.tolist())
    assert axes.lines[0].get_ydata().tolist() == pytest.approx(curve.risk.tolist())
    assert f"{curve.area:.3f}" in axes.get_title()
