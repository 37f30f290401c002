"""Calibrate a bundled model on the held-out images of its data set, with labels, and write the result into the package.

    python -m examples.calibrate fashion-mnist
    python -m examples.calibrate glyphs-100 --data data/glyphs-100 --cache runs/scores

`varlik calibrate` does the same for any model and image files. A cached run goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

import varlik
from varlik.datasets import DATA_SETS
from varlik.evaluation.accuracy import tokenize_arrays
from varlik.models.presets import CALIBRATION_FILE, bundled_folder

SAMPLES = 4  # of smoothing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=DATA_SETS)
    parser.add_argument("--data", type=Path, help="folder with the data set's files")
    parser.add_argument("--cache", type=Path, help="folder for exact scores")
    options = parser.parse_args()
    classifier = varlik.load(options.model, device="cpu")
    data = DATA_SETS[options.model]("held-out", options.data)
    images = tokenize_arrays(classifier, data.images)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("exact scores", total=len(images))
        calibration = varlik.calibrate(
            classifier,
            images,
            truth=torch.from_numpy(data.labels),
            samples=SAMPLES,
            cache=options.cache,
            progress=lambda done, _: bar.update(task, completed=done),
        )
    path = bundled_folder(options.model) / CALIBRATION_FILE
    calibration.save(path)
    recall = ", ".join(f"{100 * share:.1f} %" for share in calibration.recall.tolist())
    print(f"wrote {path}: {calibration.images} images, correlation {calibration.correlation:.3f}")
    print(f"the right class is among the best 1 to 10 corrected scores in {recall}")
    if calibration.smoothing is not None:
        print(f"smoothing: {calibration.smoothing}")
    if calibration.temperature is not None:
        print(f"temperature of full likelihood: {float(calibration.temperature[-1]):.1f}")


if __name__ == "__main__":
    main()
