"""Rollouts of a policy: sample prompts step by step, score candidates or finished latents, select training rows."""
