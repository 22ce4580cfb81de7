"""``dcgan theory``: D* and V(D*) on densities on a line, by numbers and in a picture."""

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
        str, typer.Option("--p", metavar="DENSITY", help=f"Of the real data: {KINDS}.")
    ] = "normal:-1,0.5",
    q: Annotated[
        str, typer.Option("--q", metavar="DENSITY", help="Of the generated data: likewise.")
    ] = "mixture:0.6,1,0.7/0.4,-1.5,0.4",
    steps: Annotated[
        int, typer.Option(parser=integer(1), metavar="N", help="Of training the discriminator.")
    ] = 1000,
    seed: Annotated[
        int, typer.Option(parser=integer(0), metavar="N", help="Of the weights and the samples.")
    ] = 0,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the results; made if missing.")
    ] = Path("runs/theory"),
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Also draw two normal densities apart: JSD, V and G's two gradients."),
    ] = False,
) -> None:
    """Train a discriminator on samples of two densities, and hold it against the best there is.

    Checks that V(D*) = 2·JSD(p‖q) − 2·log 2 and V(D) ≤ V(D*), where D* = p/(p + q), by quadrature in float64.
    Exit code 1 if either fails.
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
        ("V(D), trained", f"{result.value:.9f}"),
        ("V(D*) − V(D)", f"{result.optimal_value - result.value:.1e}"),
        ("mean |D − D*| under p", f"{result.error_p:.4f}"),
        ("mean |D − D*| under q", f"{result.error_q:.4f}"),
        ("largest |D − D*| where there is data", f"{result.error_max:.4f}"),
    ):
        typer.echo(f"  {name:<36} {number:>13}")
    numbers = result.numbers() | {"seed": seed}
    _save_picture(theory.picture(result), out / "theory.png")
    written = ["theory.png", "theory.json"]
    if sweep:
        apart = theory.sweep()
        numbers["sweep"] = asdict(apart)
        typer.echo("Two normal densities of std 1, drawn apart; |gradient| of G's loss where D = D*:")
        typer.echo(f"  {'distance':>8} {'JSD':>9} {'log 2 − JSD':>12} {'minimax':>9} {'non-saturating':>15}")
        for i in range(0, len(apart.distances), 5):
            typer.echo(
                f"  {apart.distances[i]:>8.2f} {apart.jsd[i]:>9.6f} {math.log(2) - apart.jsd[i]:>12.1e} "
                f"{apart.minimax[i]:>9.1e} {apart.non_saturating[i]:>15.3f}"
            )
        _save_picture(theory.sweep_picture(apart), out / "sweep.png")
        written.insert(1, "sweep.png")
    _save(out / "theory.json", numbers)
    typer.echo(f"Saved {', '.join(written[:-1])} and {written[-1]} in {out}")


def _density(option: str, spec: str) -> Density:
    from dcgan import theory

    try:
        return theory.parse(spec)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


def _save(path: Path, numbers: dict[str, Any]) -> None:
    try:
        with replacing(path) as file:
            file.write((json.dumps(numbers, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error


def _save_picture(figure: Figure, path: Path) -> None:
    try:
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=120)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error
