"""What run.json says about the parts of a run: tasks, backbone, further networks, features."""

from typing import Any

from clrun.learning.method import Method
from clrun.learning.names import has_names
from clrun.running.accounting import forward_flops, parameter_counts, token_count
from clrun.running.backbone_reuse import remembered
from clrun.running.build import Built
from clrun.running.feature_records import cache_report, feature_notes, transferability
from clrun.running.networks import network_notes, network_record


def entries_of(built: Built) -> tuple[dict[str, Any], list[str]]:
    """Return the entries of run.json on the parts of a run, and notes on them."""
    stream, notes = built.stream, list[str]()
    frozen = built.method.uses_frozen_features
    weights: dict[str, Any] | None = getattr(built.backbone, "weights_read", None)
    entries: dict[str, Any] = {
        "task_order": list(stream.order),
        "class_order": list(stream.class_order),
        "task_names": [task.name for task in stream.tasks],
        "task_classes": [task.classes.tolist() for task in stream.tasks],
        "setting": stream.setting,
        "data": built.data.record,
        "input": built.input,
        "backbone": {
            "features": int(built.backbone.num_features),  # type: ignore[arg-type]
            "tokens": token_count(built.backbone),
            **parameter_counts(built.backbone, frozen=built.backbone if frozen else None),
            "weights": weights,
        },
    }
    notes += weights["notes"] if weights else []
    reads_text = built.method.needs_text or built.method.needs_decoder or has_names(built.backbone)
    if stream.captions is not None and reads_text:
        entries["captions"] = stream.captions.record()
    entries |= network_record(built.networks)
    notes += network_notes(built.networks)
    if built.extractor is not None:
        entries["features"] = cache_report(built.cache)
        if frozen:
            entries["logme"] = transferability(stream)
        notes += feature_notes(built.cache, built.images)
    return entries, notes


def flops_per_image(built: Built, method: Method) -> int | None:
    """Return the FLOPs of a forward pass of one image through backbone and head; None when they cannot be counted."""
    task = (0,) if method.needs_task_id else ()
    total = forward_flops(method, next(built.stream.tasks[0].test.batches(1)).x, *task)
    extractor = built.extractor
    if extractor is not None and total is not None:
        image = next(built.images.tasks[0].test.batches(1)).x
        extracting = remembered(extractor, f"flops of {tuple(image.shape)}", lambda: forward_flops(extractor, image))
        return None if extracting is None else total + extracting
    return total
