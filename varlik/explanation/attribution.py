"""TMI maps in the form that captum's users know: an object with `attribute(inputs, target=...)`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from varlik.classifier import Classes, VARClassifier
from varlik.explanation.information import Unconditional, explain
from varlik.explanation.maps import Rule, compose, heat


class TokenAttribution:
    """Maps of token-wise mutual information, or of the contrast with another class.

    It stands where an attribution method of captum does; captum itself is not needed, and no gradient is taken.
    """

    def __init__(
        self,
        classifier: VARClassifier,
        classes: Classes = None,
        *,
        unconditional: Unconditional = "others",
        rule: Rule = "area",
    ):
        """`classes` are the candidates (default: all); the others as for `explain` and `compose`."""
        self.classifier, self.classes = classifier, classes
        self.unconditional: Unconditional = unconditional
        self.rule: Rule = rule

    def attribute(
        self, inputs: Tensor, target: Any = None, contrast: Any = None, *, against: bool | None = None
    ) -> Tensor:
        """Signed maps (B, 1, H, W) of pixels (B, C, H, W) in [-1, 1], scaled to [-1, 1].

        `target` is a class or one an image (default: the most likely one). With a `contrast`, likewise, the maps are
        of the contrast with it in place of mutual information; with `against=True` they are so without one, against
        the best rival. Raises as `explain`.
        """
        images = self.classifier.tokenize_pixels(inputs)
        found = explain(
            self.classifier, images, target, contrast, classes=self.classes, unconditional=self.unconditional
        )
        against = contrast is not None if against is None else against
        values = found.contrast if against else found.information
        return heat(compose(values, found.patch_nums, self.rule), inputs.shape[-1], signed=True).unsqueeze(1)
