"""Scripts that run in the environments of other packages and therefore import nothing of latentreward."""
