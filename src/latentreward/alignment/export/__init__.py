"""Export of a trained policy to the formats of diffusers and kohya's scripts."""

from latentreward.export.kohya import write_kohya
from latentreward.export.lora import TrainedLoRA
from latentreward.export.merged import loading_call, write_merged

__all__ = ["TrainedLoRA", "loading_call", "write_kohya", "write_merged"]
