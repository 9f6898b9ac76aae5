"""Text of an estimate for the terminal."""

from latentreward.estimate.costs import StepCosts

ASSUMED = (
    "Computed from shapes, nothing measured: GB are 10⁹ bytes, TFLOP 10¹² operations of matrix products, convolutions "
    "and attention. One process; not counted are data loading, callbacks, validation, kernels' work space and what the "
    "allocator holds beyond tensors."
)


def as_text(costs: StepCosts, accumulated: int, notes: list[str]) -> str:
    """Return an estimate as tables of weights, memory and computation.

    ``accumulated`` is the number of batches per optimiser step; ``notes`` are printed below the tables.
    """
    lines = [f"{'weights':<38}{'million':>10}{'trained':>10}{'GB':>10}"]
    for part in costs.parts:
        millions = f"{part.parameters / 1e6:>10.1f}{part.trained / 1e6:>10.1f}"
        lines.append(f"  {part.name:<36}{millions}{gigabytes(part.bytes)}")
    memory = {
        "weights": costs.weights,
        "weights before the first step": costs.start if costs.freed else 0,
        "gradients": costs.gradients,
        f"optimiser state ({costs.optimizer})": costs.state,
        "kept for the backward pass": costs.saved,
        "peak in a rollout": costs.rollout_peak,
        "peak in the passes of a batch": costs.batch_peak,
        "peak in the optimiser's update": costs.update_peak,
        "peak": costs.peak,
    }
    lines += ["", f"{'memory':<58}{'GB':>10}"]
    lines += [f"  {name:<56}{gigabytes(value)}" for name, value in memory.items() if value]
    step = accumulated * (costs.forward + costs.backward)
    computation = {
        "rollout": costs.rollout,
        "forward pass of a batch": costs.forward,
        "backward pass of a batch": costs.backward,
        f"optimiser step of {accumulated} batch{'es' if accumulated > 1 else ''}, rollouts aside": step,
    }
    lines += ["", f"{'computation':<58}{'TFLOP':>10}"]
    lines += [f"  {name:<56}{value / 1e12:>10.3g}" for name, value in computation.items() if value]
    return "\n".join([*lines, "", *notes, ASSUMED])


def gigabytes(size: int) -> str:
    """Format a size in bytes as GB, in ten characters."""
    return f"{size / 1e9:>10.3f}" if size < 1e9 else f"{size / 1e9:>10.2f}"
