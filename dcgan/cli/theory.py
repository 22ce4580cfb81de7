"""``dcgan theory``: compute and plot D* and V(D*) for one-dimensional densities."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcgan.cli.options import integer, output_folder, reporting
from dcgan.errors import InputError, RunError
from dcgan.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dcgan.theory import Density

KINDS = "normal:MEAN,STD; uniform:LOW,HIGH; laplace:MEAN,SCALE; mixture:WEIGHT,MEAN,STD/WEIGHT,MEAN,STD/…"


@reporting
def command(
    p: Annotated[
        str, typer.Option("--p", metavar="DENSITY", help=f"Density of the real data, one of {KINDS}.")
    ] = "normal:-1,0.5",
    q: Annotated[
        str,
        typer.Option(
            "--q", metavar="DENSITY", help="Density of the generated data, in the same syntax as --p."
        ),
    ] = "mixture:0.6,1,0.7/0.4,-1.5,0.4",
    steps: Annotated[
        int,
        typer.Option(parser=integer(1), metavar="N", help="Number of discriminator training steps."),
    ] = 1000,
    seed: Annotated[
        int,
        typer.Option(
            parser=integer(0), metavar="N", help="RNG seed for the initial weights and the samples."
        ),
    ] = 0,
    out: Annotated[Path, typer.Option(file_okay=False, help="Output folder; created if needed.")] = Path(
        "runs/theory"
    ),
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="Also plot, over the distance between two normal densities, the JSD, V and the gradients "
            "of both generator losses.",
        ),
    ] = False,
) -> None:
    """Train a discriminator on samples of two densities and compare it with the optimal discriminator.

    Checks that V(D*) = 2·JSD(p‖q) − 2·log 2 and V(D) ≤ V(D*), where D* = p/(p + q), by quadrature in float64.
    Exits with code 1 if either check fails.
    """
    from dcgan import theory

    pair = theory.Pair(_density("--p", p), _density("--q", q))
    output_folder(out)
    typer.echo(f"Training D on p = {p} and q = {q}, {steps} steps")
    result = theory.train(pair, steps, seed)
    for name, number in (
        ("JSD(p‖q)", f"{result.jsd:.9f}"),
        ("2·JSD − 2·log 2", f"{result.bound:.9f}"),
        ("V(D*)", f"{result.optimal_value:.9f}"),
        ("|V(D*) − (2·JSD − 2·log 2)|", f"{abs(result.optimal_value - result.bound):.1e}"),
        ("V(D) after training", f"{result.value:.9f}"),
        ("V(D*) − V(D)", f"{result.optimal_value - result.value:.1e}"),
        ("mean |D − D*| under p", f"{result.error_p:.4f}"),
        ("mean |D − D*| under q", f"{result.error_q:.4f}"),
        ("max |D − D*| where there is data", f"{result.error_max:.4f}"),
    ):
        typer.echo(f"  {name:<36} {number:>13}")
    numbers = result.numbers() | {"seed": seed}
    _save_figure(theory.picture(result), out / "theory.png")
    written = ["theory.png", "theory.json"]
    if sweep:
        swept = theory.sweep()
        numbers["sweep"] = asdict(swept)
        typer.echo(
            "Two normal densities of std 1 at increasing distance; |gradient| of G's loss where D = D*:"
        )
        typer.echo(f"  {'distance':>8} {'JSD':>9} {'log 2 − JSD':>12} {'minimax':>9} {'non-saturating':>15}")
        for i in range(0, len(swept.distances), 5):
            typer.echo(
                f"  {swept.distances[i]:>8.2f} {swept.jsd[i]:>9.6f} {math.log(2) - swept.jsd[i]:>12.1e} "
                f"{swept.minimax[i]:>9.1e} {swept.non_saturating[i]:>15.3f}"
            )
        _save_figure(theory.sweep_picture(swept), out / "sweep.png")
        written.insert(1, "sweep.png")
    _save_json(out / "theory.json", numbers)
    typer.echo(f"Saved {', '.join(written[:-1])} and {written[-1]} in {out}")


def _density(option: str, spec: str) -> Density:
    from dcgan import theory

    try:
        return theory.parse(spec)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


def _save_json(path: Path, numbers: dict[str, Any]) -> None:
    try:
        with replacing(path) as file:
            file.write((json.dumps(numbers, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error


def _save_figure(figure: Figure, path: Path) -> None:
    try:
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=120)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error
