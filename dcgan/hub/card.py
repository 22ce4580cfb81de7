"""The model card of a network, written from the run that trained it.

Its facts are those of the checkpoint (settings, epochs, steps, images seen), the scores in ``metrics.jsonl``
and the newest sample grid that is not newer than the checkpoint. Folders of the machine are left out.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE

from dcgan import checkpoint, extras, pretrained
from dcgan.checkpoint import CheckpointError
from dcgan.choices import Network
from dcgan.settings import Settings

GRID = "samples.png"
"""The sample grid's name in the folder of the card."""

KEY_SETTINGS = (
    *("dataset", "image_size", "model", "nz", "ngf", "ndf", "dtype", "batch_size", "epochs", "lr", "beta1"),
    *("seed", "loss", "label_smoothing", "ema"),
)
"""Settings that a card states also where they are the defaults."""

FILES = ("netG", "netD", "netG_module", "netD_module")
"""Settings that hold a path, of which a card states the last part."""

METRIC_NAMES = {
    "frechet": "Fréchet distance",
    "kernel": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "pixel_frechet_distance": "Fréchet distance of 8×8 pixels",
}
LOWER_IS_BETTER = ("frechet", "kernel", "pixel_frechet_distance")

Row = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """What is known about the training of a network.

    Args:
        settings: the run's settings; None if the checkpoint does not hold them.
        epoch, step, images: epochs completed, steps taken and real images seen by these weights.
        device: 'a GPU', 'a CPU', or '' if unknown.
        averaged: whether the weights are the moving average.
        rows: the scores of the run in order, of one kind; see :data:`METRIC_NAMES`.
        grid: the sample grid's file, if there is one.
    """

    settings: Settings | None
    epoch: int
    step: int
    images: int
    device: str
    averaged: bool
    rows: Sequence[Row]
    grid: Path | None

    @staticmethod
    def of(found: pretrained.Pretrained) -> Training | None:
        """Return what the checkpoint and the folder around it say; None for a file of any other kind."""
        # Deferred: imports all of training, which who loads a network from the Hub does not need.
        from dcgan.training.report import METRICS, SAMPLES, read_metrics

        try:
            saved = checkpoint.parse(checkpoint.load(found.file), found.file)
        except CheckpointError:
            return None
        checkpoints = found.file.resolve().parent
        run = checkpoints.parent if checkpoints.name == "checkpoints" else None
        grids = [] if run is None else (run / SAMPLES).glob("step-*.png")
        steps = {int(step[0]): grid for grid in grids if (step := re.search(r"\d+", grid.stem))}
        drawn = max((step for step in steps if step <= saved.step), default=None)
        return Training(
            settings=Settings.of(saved.config, str(found.file)) if saved.config else None,
            epoch=saved.epoch,
            step=saved.step,
            images=saved.images,
            device="" if not saved.random else "a GPU" if "cuda" in saved.random else "a CPU",
            averaged=found.averaged,
            rows=[] if run is None else _scores(read_metrics(run / METRICS)),
            grid=None if drawn is None else steps[drawn],
        )

    @property
    def best(self) -> Row | None:
        """The scores with the lowest Fréchet distance."""
        return min(self.rows, key=lambda row: row[_selecting(row)], default=None)

    @property
    def own(self) -> Row | None:
        """The scores of these very weights, if they are those that the run has scored at this step."""
        if self.settings is None or self.averaged != (self.settings.ema is not None):
            return None
        return next((row for row in self.rows if row["step"] == self.step), None)

    def results(self, name: str) -> dict[str, Any]:
        """Return the arguments of ``ModelCardData`` for :attr:`own`; none if that is None."""
        row = self.own
        if row is None or self.settings is None:
            return {}
        dataset, features = self.settings.dataset, row.get("features", "pixels")
        fid = {"frechet": "fid", "kernel": "kid"} if features == "inception" else {}
        results = [
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type=fid.get(key, key),
                metric_name=f"{label} ({features} features)",
                metric_value=row[key],
            )
            for key, label in METRIC_NAMES.items()
            if key in row
        ]
        return {"model_name": name or "dcgan", "eval_results": results}


def _selecting(row: Row) -> str:
    return "frechet" if "frechet" in row else "pixel_frechet_distance"


def _scores(rows: Sequence[Row]) -> list[Row]:
    """Return the evaluations that can be compared with the last one, or without any those by the pixel score.

    They are in the same features and of the same number of images.
    """
    evaluations = [row for row in rows if "frechet" in row]
    if evaluations:
        kinds = [(row.get("features"), row.get("images")) for row in evaluations]
        return [row for row, kind in zip(evaluations, kinds, strict=True) if kind == kinds[-1]]
    return [row for row in rows if "pixel_frechet_distance" in row]


# --- the text -----------------------------------------------------------------------------------------------


def text(network: Network, module: Any, name: str, repository: str, training: Training | None) -> str:
    """Return the card's Markdown, without its YAML header.

    Args:
        network: which network it is.
        module: the network, a Generator or Discriminator of :mod:`dcgan.models`.
        name: what the example loads: a folder or a repository of the Hub.
        repository: URL of this package.
        training: what is known about the training.
    """
    size = module.image_size
    settings = None if training is None else training.settings
    dataset = f", {settings.dataset}" if settings is not None else ""
    parts = [
        f"# DCGAN {network.capitalize()}{dataset}, {size}×{size}",
        _description(network, module, repository, training),
        _samples(network, training),
        _usage(network, module, name),
        _recipe(training),
        _score_table(training),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _description(network: Network, module: Any, repository: str, training: Training | None) -> str:
    colour = {1: "grey ", 3: "RGB "}.get(module.channels, "")
    shape = f"[N, {module.channels}, {module.image_size}, {module.image_size}]"
    if network == "generator":
        computes = f"maps z ~ N(0, 1), [N, {module.latent_dim}], to {colour}images {shape} in [-1, 1]"
    else:
        computes = f"maps {colour}images {shape} in [-1, 1] to the probabilities [N] that they are real"
    average = " The weights are a moving average." if training is not None and training.averaged else ""
    return (
        f"The {network.capitalize()} of a [DCGAN](https://arxiv.org/abs/1511.06434). It {computes}, with "
        f"{sum(p.numel() for p in module.parameters()):,} parameters.{average} Trained with "
        f"[dcgan-kernels]({repository})."
    )


def _samples(network: Network, training: Training | None) -> str:
    if training is None or training.grid is None:
        return ""
    step = int(re.sub(r"\D", "", training.grid.stem))
    of = "Samples" if network == "generator" else "Samples of its Generator"
    averaged = training.settings is not None and training.settings.ema is not None
    average = ", from the moving average of the weights" if averaged else ""
    return f"![{of}]({GRID})\n\n{of} after {step:,} steps{average}."


def _usage(network: Network, module: Any, name: str) -> str:
    shape = f"{module.channels}, {module.image_size}, {module.image_size}"
    if network == "generator":
        run = f"images = generator(torch.randn(16, {module.latent_dim}))  # [16, {shape}] in [-1, 1]"
        command = textwrap.dedent(f"""

            From the command line, in a folder with these files:

            ```sh
            dcgan generate {SAFETENSORS_SINGLE_FILE} --out images.png
            ```""")
    else:
        run, command = f"probabilities = discriminator(torch.rand(16, {shape}) * 2 - 1)  # [16]", ""
    return f"""## Use

```sh
{extras.install("hub")}
```

```python
import torch
from dcgan import hub

{network} = hub.{network.capitalize()}.from_pretrained({json.dumps(name)})
with torch.no_grad():
    {run}
```{command}"""


def recipe(settings: Settings) -> Row:
    """Return the settings that a card states: the key ones, and those that differ from the defaults.

    ``dcgan train --config`` takes them. Of a path only the last part is stated, of ``dataroot`` nothing.
    """
    differing = settings.model_dump(exclude_defaults=True, exclude={"dataroot"})
    values = {name: getattr(settings, name) for name in KEY_SETTINGS} | differing
    names = [name for name in type(settings).model_fields if name in values]
    return {
        name: PurePath(values[name]).name if name in FILES and values[name] else values[name]
        for name in names
    }


def _recipe(training: Training | None) -> str:
    if training is None:
        return ""
    device = f" on {training.device}" if training.device else ""
    epochs = "1 epoch" if training.epoch == 1 else f"{training.epoch} epochs"
    lines = [
        "## Training",
        f"{epochs}, {training.step:,} steps, {training.images:,} images seen{device}, by `dcgan train`.",
    ]
    if training.settings is not None:
        values = yaml.safe_dump(recipe(training.settings), sort_keys=False, allow_unicode=True)
        lines += [
            "These settings, and the defaults for all others; `dcgan train --config FILE` takes them:",
            f"```yaml\n{values}```",
        ]
    return "\n\n".join(lines)


def _score_table(training: Training | None) -> str:
    if training is None or not training.rows:
        return ""
    last, best = training.rows[-1], training.best
    assert best is not None
    rows = [("last and best", last)] if best is last else [("last", last), ("best", best)]
    keys = [key for key in METRIC_NAMES if any(key in row for _, row in rows)]
    arrows = {key: "↓" if key in LOWER_IS_BETTER else "↑" for key in keys}
    lines = [
        "| | epoch | step | " + " | ".join(f"{METRIC_NAMES[key]} {arrows[key]}" for key in keys) + " |",
        "|---" * (len(keys) + 3) + "|",
    ]
    for label, row in rows:
        own = ", these weights" if row is training.own else ""
        values = " | ".join(_value(row, key) for key in keys)
        lines.append(f"| {label}{own} | {row['epoch']} | {row['step']:,} | {values} |")
    count = f"{last['images']:,} of " if "images" in last else ""
    features = f", in the features '{last['features']}'" if "features" in last else ""
    about = f"Measured during training on {count}the Generator's images{features}"
    return "\n\n".join(["## Scores", f"{about}. ↓: lower is better, ↑: higher is better.", "\n".join(lines)])


def _value(row: Row, key: str) -> str:
    if key not in row:
        return ""
    spread = f" ± {row[f'{key}_std']:.2g}" if f"{key}_std" in row else ""
    return f"{row[key]:.4g}{spread}"
