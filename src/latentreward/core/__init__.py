"""What every room uses: records, errors, seeds, settings, durable files, checkpoints, processes and pages."""
