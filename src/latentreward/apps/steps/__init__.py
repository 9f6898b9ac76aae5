"""Steps of long computations: commands run in processes of their own, once, with records of what they depended on."""
