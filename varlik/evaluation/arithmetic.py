"""What a cascade costs by count: `varlik.flops` for a model by name or folder, with what had to be assumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from varlik import flops
from varlik.calibration import Calibration
from varlik.calibration.conformal import quantile
from varlik.cascade import Cascade, Race, Screen, Smooth, Stage
from varlik.evaluation.samples import is_bundled
from varlik.models.config import VARConfig
from varlik.models.presets import CALIBRATION_FILE, bundled_folder


@dataclass(frozen=True)
class Arithmetic:
    """Cost of classifying one image in each way and convention, and of the class tables, once per model.

    `ways` lacks "released" where the released code has no such stages. `calibration` is the file whose averages were
    taken, `notes` say what was assumed.
    """

    model: str
    classes: int
    cascade: str
    calibration: str | None
    ways: dict[str, dict[flops.Convention, flops.CascadeFlops]]
    class_table: dict[flops.Convention, flops.Flops]
    notes: tuple[str, ...]


def count(
    model: str, cascade: Cascade, classes: int | None = None, calibration: str | Path | None = None
) -> Arithmetic:
    """Count a cascade over so many `classes` (default: all) of a model; no weights are needed.

    Stages with a percentage take the averages of `calibration`, by default of what lies beside the model if that was
    made for its scales, and without any the fixed counts of `Cascade.fixed`. Raises `ValueError` for a calibration of
    another model, as far as shapes tell, or one on too few images for the cascade, and as `flops.configs_of` and
    `flops.engine`.
    """
    var, vqvae = flops.configs_of(model)
    classes = flops.check_classes(var, var.num_classes if classes is None else classes)
    file, found, notes = _calibration(model, cascade, var, classes, calibration)
    ways: dict[str, dict[flops.Convention, flops.CascadeFlops]] = {}
    if all(isinstance(stage, Stage) for stage in cascade.stages):
        ways["released"] = {kind: flops.released(cascade, var, vqvae, classes, kind) for kind in flops.CONVENTIONS}
    else:
        notes.append("released: left out, the released code has no such stages")
    ways["engine"] = {kind: flops.engine(cascade, var, vqvae, classes, kind, found) for kind in flops.CONVENTIONS}
    return Arithmetic(
        model=model,
        classes=classes,
        cascade=str(cascade),
        calibration=None if file is None else str(file),
        ways=ways,
        class_table={kind: flops.class_table(var, classes, kind) for kind in flops.CONVENTIONS},
        notes=tuple(notes),
    )


def _calibration(
    model: str, cascade: Cascade, var: VARConfig, classes: int, given: str | Path | None
) -> tuple[Path | None, Calibration | None, list[str]]:
    """The calibration to count with, its file, and notes on what is assumed."""
    file = Path(given) if given is not None else _beside(model) if cascade.calibrated else None
    found = None if file is None else Calibration.load(file)
    differing = None if found is None else _difference(found, var, classes)
    if differing is not None and given is not None:
        raise ValueError(f"calibration: {file} is not for this: {differing}")
    notes = [f"{file}: not used, {differing}"] if differing is not None else []
    if not cascade.calibrated:
        return None, None, notes + (["calibration: this cascade takes none"] if found is not None else [])
    if found is None or differing is not None:
        return None, None, [*notes, f"engine: no calibration, so fixed counts are assumed: {cascade.fixed(classes)}"]
    for stage in cascade.stages:  # a run would refuse these too
        if isinstance(stage, Screen | Race | Smooth) and stage.delta is not None:
            quantile(found.full.both.scores, stage.delta)
    among = "" if len(found.labels) == classes else f" among {len(found.labels)} classes"
    notes.append(f"engine: survivors are averages{among} over the {found.images} images of {file}")
    if cascade.smooths and not found.smooths(cascade.smooths):
        notes.append("engine: no smoothing, which was not calibrated or did not pay")
    return file, found, notes


def _beside(model: str) -> Path | None:
    """A calibration in the model's folder."""
    folder = bundled_folder(model) if is_bundled(model) else Path(model).expanduser()
    file = folder / CALIBRATION_FILE
    return file if file.is_file() else None


def _difference(calibration: Calibration, var: VARConfig, classes: int) -> str | None:
    """Why a calibration cannot be for a model of this shape."""
    scales, labels = calibration.fingerprint.patch_nums, calibration.labels
    if scales != var.patch_nums:
        return f"it was made for scales {scales}, the model has {var.patch_nums}"
    if int(labels.max()) > var.num_classes or len(labels) < classes:
        return f"it was made for {len(labels)} classes up to number {int(labels.max())}, asked for {classes}"
    return None
