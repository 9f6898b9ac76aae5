"""Golden numbers: recorded inputs and outputs of the papers' released code, and what the library makes of them."""
