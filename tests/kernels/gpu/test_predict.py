"""The predictions of a training step next to measured times: parsing, tables and totals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dcgan.kernels.gpu import cost_model
from dcgan.kernels.gpu.offline import Report
from dcgan.kernels.gpu.tools import predict


def cells(text: str, first: str) -> list[dict[str, str]]:
    """Return the rows of Markdown tables whose heading starts with ``first``, by heading."""
    found, heading = [], None
    for line in text.splitlines():
        values = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            heading = None
        elif heading is None:
            heading = values
        elif heading[0] == first and set(values[0]) != {"-"}:
            found.append(dict(zip(heading, values, strict=True)))
    return found


def test_a_step_is_printed_next_to_measured_times(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "predicted.md"
    arguments = ["--gpu", "H200", "--batch", "64", "1024", "--estimated", "--out", str(out)]
    assert predict.main(arguments) == 0
    text = capsys.readouterr().out
    assert "training on an H200" in text
    assert out.read_text().split() == text.split()

    def of(layer: str, phase: str) -> list[tuple[str, str, str]]:
        rows = [row for row in cells(text, "layer") if (row["layer"], row["phase"]) == (layer, phase)]
        return [(row["M"], row["measured before"], row["cuDNN"]) for row in rows]

    assert of("D 64→128 @32→16", "forward")[0] == ("32768", "34.0", "26.0")  # twice the time of 64 images
    assert of("G 128→64 @16→32", "dgrad")[-1] == ("262144", "337.6", "108.5")

    small, large = cells(text, "batch")
    assert (small["measured before µs"], small["cuDNN µs"]) == ("1,591", "1,939")
    assert (large["measured before µs"], large["cuDNN µs"]) == ("9,180", "13,247")
    for step in (small, large):
        seconds, cudnn = (float(step[name].replace(",", "")) for name in ("step µs", "cuDNN µs"))
        assert float(step["cuDNN / predicted"]) == pytest.approx(cudnn / seconds, rel=0.01)


def test_other_measured_times_replace_the_default(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Such as those of make gpu, which have more fields and no steps."""
    entry = {"kind": "kernels", "network": "G", "layer": "64→1 @32→64", "batch": 8, "dtype": "bfloat16"}
    ours = entry | {"phase": "forward", "contestant": "ours", "status": "ok", "us": 12.34, "ours_us": 12.34}
    wrong = entry | {"phase": "dgrad", "contestant": "ours", "status": "wrong", "error": 1.0}
    file = tmp_path / "kernels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ours, wrong)))
    assert predict.main(["--batch", "8", "--estimated", "--measured", str(file)]) == 0
    text = capsys.readouterr().out
    found = {row["phase"]: row["measured before"] for row in cells(text, "layer") if "G 64→1" in row["layer"]}
    assert found == {"forward": "12.3", "dgrad": "–", "wgrad": "–"}
    (step,) = cells(text, "batch")
    assert step["cuDNN / predicted"] == "–"


@pytest.mark.parametrize(
    "text", ["", '{"kind": "step", "us": 1.0, "batch": 1, "dtype": "x", "contestant": "ours"}']
)
def test_a_file_without_kernel_times_is_an_error(
    text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "kernels.jsonl"
    file.write_text(text)
    with pytest.raises(SystemExit):
        predict.main(["--measured", str(file)])
    assert "has no kernel times" in capsys.readouterr().err


def test_the_width_of_stores_is_that_of_most_bytes() -> None:
    """Partial sums are stored by 4 bytes a thread whatever the result's width is."""
    estimated = cost_model.Resources(64, 1024, stalls=1)
    for stores, width in (({4: 12, 16: 16}, 16), ({4: 2, 2: 8}, 2), ({2: 1}, 2)):
        report = Report(99, 0, 0, 2048, "HGMMA", {}, {}, stores, 321, None)
        found = predict.resources_of(report, estimated)
        assert found == cost_model.Resources(99, 2048, width, stalls=1, epilogue=321)
