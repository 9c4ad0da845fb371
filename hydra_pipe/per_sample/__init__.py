"""Per-sample gradients of a pass: layer rules, node rules and their results, before any write."""
