"""A trained detector as files hold it: without the choice of boxes, or with it for one image.

Without it, the outputs are what the head says of every anchor; `settings_of` is what makes boxes of
them (`decode.Decoder`). With it, the choice is torchvision's, written anew: torch.export follows no
loop over what was found, so all but the last steps have fixed shapes.

Legend: B batch, C channels, H W image, A anchors, K classes, D detections.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.ops import clip_boxes_to_image, nms


class RawOutputs(nn.Module):
    """A detector that chooses nothing: images (B, C, H, W) -> class logits (B, A, K + 1), the
    background's first, and box deltas (B, A, 4).
    """

    output_names = ("logits", "deltas")

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the deltas."""
        detector: Any = self.detector
        found = detector.head(list(detector.backbone(images).values()))
        return found["cls_logits"], found["bbox_regression"]


class WithNms(nn.Module):
    """A network that gives logits and deltas, and the choice of boxes: one image (1, ...) -> boxes
    (D, 4) in pixels, scores (D,), labels (D,), the best first.
    """

    output_names = ("boxes", "scores", "labels")
    anchors: Tensor

    def __init__(self, network: nn.Module, settings: dict[str, Any]) -> None:
        """`settings` are those of `settings_of`."""
        super().__init__()
        self.network, self.settings = network, settings
        self.coder = BoxCoder(tuple(settings["box_weights"]), settings["largest_log_ratio"])
        self.register_buffer("anchors", torch.tensor(settings["anchors"]))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes, scores and labels."""
        settings = self.settings
        height, width = settings["size"]
        logits, deltas = (output[0] for output in self.network(images))
        boxes = self.coder.decode_single(deltas, self.anchors)
        boxes = clip_boxes_to_image(boxes, (height, width))
        by_class = settings["scores"] == "softmax"
        scores, anchors, labels = self._by_class(logits) if by_class else self._by_map(logits)
        likely = scores > settings["score_threshold"]
        scores, boxes, labels = scores[likely], boxes[anchors[likely]], labels[likely]
        apart = labels[:, None] * (max(height, width) + 1.0)  # boxes of two classes never overlap
        kept = nms(boxes + apart, scores, settings["nms_threshold"])
        kept = kept[torch.arange(kept.shape[0]) < settings["detections_per_image"]]
        return boxes[kept], scores[kept], labels[kept]

    def _by_class(self, logits_AK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, anchors and labels of the best of each class, as SSD takes them."""
        scores_KA = logits_AK.softmax(1)[:, 1:].T
        most = min(self.settings["topk_candidates"], scores_KA.shape[1])
        scores, anchors = scores_KA.topk(most)
        labels = torch.arange(1, len(scores_KA) + 1)[:, None].expand_as(anchors)
        return scores.flatten(), anchors.flatten(), labels.flatten()

    def _by_map(self, logits_AK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, anchors and labels of the best of each map, as RetinaNet takes them."""
        scores, places, first = [], [], 0
        for part in logits_AK.sigmoid().split(self.settings["anchors_per_map"]):
            flat = part.flatten()
            best, where = flat.topk(min(self.settings["topk_candidates"], len(flat)))
            scores.append(best)
            places.append(where + first)
            first += len(flat)
        place, K = torch.cat(places), logits_AK.shape[1]
        return torch.cat(scores), place // K, place % K


@torch.no_grad()
def settings_of(detector: Any, images: Tensor) -> dict[str, Any]:
    """Return what makes boxes of the outputs of a detector, as JSON values.

    Args:
        detector: of torchvision, an SSD or a RetinaNet.
        images: (1, C, H, W) of the size that its anchors are wanted for.
    """
    maps = list(detector.backbone(images).values())
    size = tuple(images.shape[2:])
    (anchors,) = detector.anchor_generator(ImageList(images, [size]), maps)
    each_place = detector.anchor_generator.num_anchors_per_location()
    softmax = isinstance(detector, SSD)
    return {
        "size": list(size),
        "scores": "softmax" if softmax else "sigmoid",
        "candidates_of_each": "class" if softmax else "map",
        "anchors_per_map": [
            m.shape[2] * m.shape[3] * n for m, n in zip(maps, each_place, strict=True)
        ],
        "box_weights": list(detector.box_coder.weights),
        "largest_log_ratio": detector.box_coder.bbox_xform_clip,
        "score_threshold": detector.score_thresh,
        "topk_candidates": detector.topk_candidates,
        "nms_threshold": detector.nms_thresh,
        "detections_per_image": detector.detections_per_img,
        "anchors": [[float(f"{x:.9g}") for x in row] for row in anchors.tolist()],
    }
