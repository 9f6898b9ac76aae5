from .datamodule import CachedPreferenceDataModule, CachedSplit

__all__ = ["CachedPreferenceDataModule", "CachedSplit"]
