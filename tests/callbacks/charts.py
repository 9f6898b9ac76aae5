"""Charts of a run as TensorBoard's page *Custom Scalars* reads them."""

import re
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2


def charts_of(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Group → title of a chart → names of the logged curves that it shows."""
    log = EventAccumulator(str(folder)).Reload()
    (event,) = log.Tensors("custom_scalars__config__")
    layout, names = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]), log.Tags()["scalars"]
    return {
        group.title: {
            chart.title: [name for curves in chart.multiline.tag for name in names if re.match(curves, name)]
            for chart in group.chart
        }
        for group in layout.category
    }
