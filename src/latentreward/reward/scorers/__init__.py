"""Scorers of images, for filtering of preference pairs, for evaluation and as rewards on pixels."""
