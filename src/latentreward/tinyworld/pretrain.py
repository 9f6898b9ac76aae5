"""Pretrain the two tiny pipelines: ``python -m latentreward.tinyworld.pretrain --output DIR``."""

from latentreward.tinyworld.pretraining.pipelines import main

if __name__ == "__main__":
    main()
