"""Train the two pixel scorers: ``python -m latentreward.tinyworld.pixel_scorers_pretraining --output DIR``."""

from latentreward.tinyworld.pretraining.pixel_scorers import main

if __name__ == "__main__":
    main()
