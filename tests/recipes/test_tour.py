"""The tour: its cells run in order, beside the bundled notes, and what it keeps is what they print."""

import json
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

TOUR = Path(__file__).parents[2] / "recipes" / "tour.ipynb"
CELLS = json.loads(TOUR.read_text())["cells"]


def printed(cell):
    """What a cell of the file has printed."""
    return "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")


def test_the_tour_is_short_and_keeps_its_outputs():
    """Ten cells; every code cell was run, nothing went wrong, and the last one has its picture."""
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert len(CELLS) == 10
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["outputs"] for cell in code)
    assert {out["output_type"] for cell in code for out in cell["outputs"]} == {"stream", "display_data"}
    assert "image/png" in code[-1]["outputs"][-1]["data"]


@pytest.mark.slow
@pytest.mark.recipe
def test_the_cells_run_as_printed(monkeypatch, capsys, tmp_path):
    """Updates are cut to two; what comes before the training is printed as it is kept."""
    (tmp_path / "data").symlink_to(TOUR.parent / "data")
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("Agg")
    names, trained = {}, False
    for cell in CELLS:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        trained = trained or "max_steps" in source
        capsys.readouterr()
        exec(source.replace("max_steps=50", "max_steps=2"), names)
        if not trained:
            assert capsys.readouterr().out == printed(cell)
    assert names["trainer"].state.global_step == 2
    assert len(plt.gcf().axes) == 2
    plt.close("all")
